"""Where the tokens of a batch's rows lie: the one answer that attention, key convolution and caches go by.

A row holds one sequence, or several packed behind each other, with padding before, between or after them, and in a
static cache free slots behind. Which it is, `openmoba.hf.find_layout` finds out once a batch, before the first layer.
The answer travels in the place of the attention mask: every model hands that to all of its layers, and transformers
passes a four-dimensional one through untouched. It is int32, so that it is never mistaken for somebody's own mask.
It has three forms, which this file alone writes (`whole_rows`, `packed_rows`, `mapped_rows`) and reads (`Layout.read`):

    [1, 1, 0, 1]        every row is one whole sequence, as None says too
    [1, 1, n + 1, 1]    where n sequences without padding begin in the flattened batch, and where the last one ends
    [B, 1, 1, S]        a map: to which sequence of its row every key slot belongs

        -1  not written yet (the free end of a static cache)
         0  padding
         n  a token of the row's n-th sequence, n >= 1

        left padding      0 0 1 1 1 1        packed by position_ids    1 1 1 2 2 3
        static cache      0 1 1 1 -1 -1      hole in the middle        1 1 0 0 1 1

The new tokens, which are the queries, lie in the last written slots.

What follows from a map is found out when it is asked for, since that may wait for the device, and then once for all
layers. Nothing waits in a graph: of whole rows all runs of a map are taken as sequences there, those of padding too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from openmoba.hf.values import once, refuse
from openmoba.ops.decode import MAX_QUERIES
from openmoba.ops.eager import eager

UNWRITTEN, PADDING = -1, 0
TOKENS_PER_SEQUENCE = 16
"""In a graph there is room for the boundaries of so many sequences as if each had this many tokens."""

# B batch, T new tokens of a row, S key slots of a row, N tokens of all rows, H heads, D head width


class Sequences(NamedTuple):
    """Where the sequences of a batch are among its flattened tokens.

    Attributes:
        cu_q, cu_k: where each begins among the queries and among the keys, int32 `[sequences + 1]`.
        longest: an upper bound of a sequence's keys; None for those of the whole batch.
        queries: which of the `B * T` queries belong to sequences, in their order, int64; None for all.
        keys: the same for the `B * S` keys.
        padding: which queries are padding although they count as sequences, bool `[B, T, 1, 1]`; None for none.
    """

    cu_q: Tensor
    cu_k: Tensor
    longest: int | None = None
    queries: Tensor | None = None
    keys: Tensor | None = None
    padding: Tensor | None = None

    def put_back(self, out_NHD: Tensor, like_BTHD: Tensor) -> Tensor:
        """Return what was computed for the queries as rows like these, zero for padding."""
        if self.queries is not None:
            out_NHD = out_NHD.new_zeros(like_BTHD.shape).flatten(0, 1).index_copy(0, self.queries, out_NHD)
        out_BTHD = out_NHD.view(like_BTHD.shape)
        return out_BTHD if self.padding is None else out_BTHD.masked_fill(self.padding, 0)


def take(x_BTHD: Tensor, index_N: Tensor | None) -> Tensor:
    """Return the tokens at `index_N` of the flattened batch, or all: `[N, H, D]`."""
    x_NHD = x_BTHD.flatten(0, 1)
    return x_NHD if index_N is None else x_NHD.index_select(0, index_N)


class Alignment(NamedTuple):
    """Where the single sequence of each row lies in the cache.

    Attributes:
        lengths: tokens of each row, int32 `[B]`.
        starts: first slot of each row, int32 `[B]`; None for rows without padding.
        first: the same on the host; None where the host was not to look.
    """

    lengths: Tensor
    starts: Tensor | None
    first: tuple[int, ...] | None


class Layout(NamedTuple):
    """Where the tokens of a batch lie. If there is neither a map nor boundaries, every row is one whole sequence.

    Attributes:
        batch, queries: B and T.
        map: int32 `[B, 1, 1, S]`.
        cu_q, cu_k: where packed sequences begin among the flattened queries and keys, and where the last ones end.
    """

    batch: int
    queries: int
    map: Tensor | None = None
    cu_q: Tensor | None = None
    cu_k: Tensor | None = None

    @classmethod
    def read(
        cls,
        mask: Tensor | None,
        cu_q: Tensor | None,
        cu_k: Tensor | None,
        new: tuple[int, int],
        slots: int | None = None,
    ) -> Layout:
        """Read what an attention layer is given.

        Args:
            mask: one of the forms above, or None.
            cu_q, cu_k: boundaries of packed sequences that the caller of the model gave, under transformers' names
                `cu_seq_lens_q` and `cu_seq_lens_k`.
            new: B and T.
            slots: S, for a check of the map; None before the cache has said how many there are.

        Raises:
            ValueError: the mask is somebody's own, the rows are padded and packed at once, or one of the boundaries is
                missing, or no tensor.
        """
        if mask is not None and not _has_form(mask, new[0], slots):
            raise ValueError(
                f"MoBA takes no custom attention mask, got {mask.dtype} {tuple(mask.shape)} for {new[0]} x {new[1]} "
                "new tokens; pass a 2-D padding mask of the cached and new tokens, or use attn_implementation='sdpa'"
            )
        if (cu_q is None) != (cu_k is None):
            raise ValueError("packed batches need both cu_seq_lens_q and cu_seq_lens_k; they may be the same")
        if cu_q is not None and not (isinstance(cu_q, Tensor) and isinstance(cu_k, Tensor)):
            raise ValueError("cu_seq_lens_q and cu_seq_lens_k must be int32 tensors; torch.tensor makes them of lists")
        if mask is None or mask.shape[2] == 0:
            return cls(*new, None, cu_q, cu_k)
        if mask.shape[2] > 1:
            return cls(*new, None, mask, mask)
        layout = cls(*new, mask)
        if cu_q is None:
            return layout
        layout._refuse_padding()
        return cls(*new, None, cu_q, cu_k)

    @property
    def is_step(self) -> bool:
        """Return whether a few new tokens follow those of a cache, under a map."""
        return self.map is not None and self.queries <= MAX_QUERIES and self.queries < self.map.shape[3]

    @property
    def _is_opaque(self) -> bool:
        """Return whether this is a map of whole rows in a graph, where what is padding cannot decide about shapes."""
        return self.map is not None and self.map.shape[3] == self.queries and torch.compiler.is_compiling()

    def sequences(self) -> Sequences | None:
        """Return where the sequences are; None if every row is one."""
        if self.cu_q is not None and self.cu_k is not None:
            return Sequences(self.cu_q.flatten().int(), self.cu_k.flatten().int())
        if self.map is None:
            return None
        return self._all_runs() if self._is_opaque else self._real_sequences()

    def alignment(self, keys_BSHD: Tensor, *, look: bool) -> Alignment | None:
        """Return where rows of one sequence each lie; None if they are others, or padding lies not before them.

        Args:
            keys_BSHD: all keys of the cache, of which this is the layout.
            look: whether the host may look; if not, padding before the tokens has to be made sure of before.
        """
        if self.cu_q is not None or self._is_opaque:
            return None
        if self.map is not None:
            return self._seen_alignment() if look else self._counted()
        lengths = torch.full((self.batch,), keys_BSHD.shape[1], dtype=torch.int32, device=keys_BSHD.device)
        return Alignment(lengths, None, (0,) * self.batch)

    @once
    def visible_keys(self) -> Tensor:
        """Return which keys each new token may read, bool `[B, 1, T, S]`."""
        assert self.map is not None
        slot_S, slot_T = torch.arange(self.map.shape[3], device=self.map.device), self._new_slots()
        own_B1T1 = self.map.index_select(3, slot_T).transpose(2, 3)
        return (self.map > PADDING) & (self.map == own_B1T1) & (slot_S <= slot_T[:, None])

    @once
    def goes_on(self) -> Tensor | None:
        """Return which new tokens go on with the sequence of the one before, bool `[1, B * T]`.

        None if each row is one sequence, be it after those in a cache.
        """
        if self.cu_q is not None:
            tokens = self.batch * self.queries
            starts_N = torch.zeros(tokens + 1, dtype=torch.bool, device=self.cu_q.device)
            within = self.cu_q.flatten().long().clamp(0, tokens)  # attention refuses those that are not
            return ~starts_N.index_fill(0, within, True)[None, :-1]
        if self.map is None or self.map.shape[3] != self.queries:
            return None
        return ~run_starts(self.map[:, 0, 0]).flatten()[None]

    def without_padding(self, x_BTC: Tensor) -> Tensor:
        """Return numbers of the new tokens, zero for padding."""
        return x_BTC if self.map is None else x_BTC.masked_fill(self._padding(), 0)

    @once
    def refuse_holes(self, what: str, way_out: str) -> None:
        """Raise ValueError, or assert in a graph, if padding lies between the tokens of a sequence."""
        if self.map is not None:
            refuse(_resumes(self.map[:, 0, 0]), what, way_out)

    def _new_slots(self) -> Tensor:
        """Return the slots of the new tokens, int64 `[T]`."""
        assert self.map is not None
        written = (self.map[0, 0, 0] != UNWRITTEN).sum()
        return written - self.queries + torch.arange(self.queries, device=self.map.device)

    @once
    def _padding(self) -> Tensor:
        """Return which new tokens are padding, bool `[B, T, 1]`."""
        assert self.map is not None
        whole = self.map.shape[3] == self.queries
        return ((self.map if whole else self.map.index_select(3, self._new_slots())) == PADDING)[:, 0, 0, :, None]

    def _all_runs(self) -> Sequences:
        """Return the sequences and the padding between them, without looking at the map."""
        assert self.map is not None
        map_BS = self.map[:, 0, 0]
        # As two runs it would be two sequences.
        torch._assert_async(~_resumes(map_BS), "in a compiled model, padding must not lie within a sequence")
        ends = _fixed_boundaries(run_starts(map_BS))
        return Sequences(ends, ends, map_BS.shape[1], padding=self._padding()[..., None])

    @eager("the number of real tokens is a property of the data")
    @once
    def _real_sequences(self) -> Sequences:
        """Return where the sequences are without the padding."""
        assert self.map is not None
        map_BS = self.map[:, 0, 0]
        # A sequence of the batch is a pair (row, number within the row); flattening keeps pairs in order.
        row_B1 = torch.arange(self.batch, device=map_BS.device)[:, None]
        name_BS = (row_B1 * map_BS.max() + map_BS).masked_fill(map_BS <= PADDING, -1)
        name_BT = name_BS.index_select(1, self._new_slots())
        key_N, query_N = ((name >= 0).flatten().nonzero()[:, 0] for name in (name_BS, name_BT))
        key_name_N, query_name_N = name_BS.flatten()[key_N], name_BT.flatten()[query_N]
        sequences = torch.unique_consecutive(key_name_N)
        cu_q, cu_k = (
            pad(torch.searchsorted(name_N, sequences), (0, 1), value=name_N.numel()).int()
            for name_N in (query_name_N, key_name_N)
        )
        return Sequences(cu_q, cu_k, map_BS.shape[1], query_N, key_N)

    @eager("whether padding is on the left decides which kernels run")
    @once
    def _seen_alignment(self) -> Alignment | None:
        assert self.map is not None
        map_BS = self.map[:, 0, 0]
        if bool(padding_follows(map_BS) | (map_BS > 1).any()):
            return None
        counted = self._counted()
        assert counted.starts is not None
        return counted._replace(first=tuple(counted.starts.tolist()))

    @once
    def _counted(self) -> Alignment:
        assert self.map is not None
        lengths, starts = (x.sum((1, 2, 3), dtype=torch.int32) for x in (self.map > PADDING, self.map == PADDING))
        return Alignment(lengths, starts, None)

    @eager("reads the mask's values")
    @once
    def _refuse_padding(self) -> None:
        if self.map is not None and bool((self.map == PADDING).any()):
            raise ValueError(
                "a batch is either padded or packed: drop attention_mask or cu_seq_lens_q and cu_seq_lens_k"
            )


def whole_rows(tokens: Tensor) -> Tensor:
    """Return the form that says that every row is one whole sequence, on the device of `tokens`."""
    return tokens.new_empty((1, 1, 0, 1), dtype=torch.int32)


def packed_rows(starts_BT: Tensor) -> Tensor:
    """Return the form for sequences without padding, given where they begin, bool.

    Outside of graphs the device is waited for, once a batch. In a graph there is room for a fixed number of
    boundaries, the last ones of empty sequences; that there is room enough is asserted on the device.
    """
    if torch.compiler.is_compiling():
        return _fixed_boundaries(starts_BT)[None, None, :, None]
    start = starts_BT.flatten().nonzero()
    if len(start) == len(starts_BT):
        return whole_rows(starts_BT)
    ends = pad(start.int(), (0, 0, 0, 1), value=starts_BT.numel())[None, None]
    torch._dynamo.maybe_mark_dynamic(ends, 2)
    return ends


def mapped_rows(map_BS: Tensor) -> Tensor:
    """Return the shortest form that says what a map of written slots says; in a graph, which cannot look, the map."""
    if not torch.compiler.is_compiling():
        least, most = torch.stack(map_BS.aminmax()).tolist() if map_BS.numel() else (1, 1)
        if least == most == 1:
            return whole_rows(map_BS)
        if least > PADDING:
            return packed_rows(run_starts(map_BS))
    return map_BS[:, None, None]


def padding_follows(map_BS: Tensor) -> Tensor:
    """Return whether padding follows a token in any row, bool scalar."""
    return ((map_BS[:, 1:] == PADDING) & (map_BS[:, :-1] > PADDING)).any()


def _has_form(mask: Tensor, batch: int, slots: int | None) -> bool:
    if mask.dtype != torch.int32 or mask.dim() != 4 or mask.shape[1] != 1:
        return False
    if mask.shape[2] == 1:
        return mask.shape[0] == batch and slots in (None, mask.shape[3])
    return mask.shape[0] == mask.shape[3] == 1


def run_starts(map_BS: Tensor) -> Tensor:
    """Return where a row begins or the map changes, bool `[B, S]`."""
    return pad(map_BS[:, 1:] != map_BS[:, :-1], (1, 0), value=True)


def _resumes(map_BS: Tensor) -> Tensor:
    """Return whether a sequence goes on after padding in any row, bool scalar."""
    before_BS, after_BS, highest_BS = map_BS[:, :-1], map_BS[:, 1:], map_BS.cummax(1).values[:, :-1]
    return ((before_BS == PADDING) & (after_BS > PADDING) & (after_BS == highest_BS)).any()


def _fixed_boundaries(starts_BT: Tensor) -> Tensor:
    """Return boundaries of at most a fixed number of sequences, int32; those that are missing are empty, at the end."""
    tokens = starts_BT.numel()
    room = tokens // TOKENS_PER_SEQUENCE + starts_BT.shape[0]
    number_N = starts_BT.flatten().cumsum(0)
    torch._assert_async(
        number_N[-1] <= room,
        f"in a compiled model, packed sequences must have {TOKENS_PER_SEQUENCE} tokens on average; give cu_seq_lens_q "
        "and cu_seq_lens_k instead, or compile layer by layer",
    )
    # Every start writes itself to its place, everything else to one place behind them.
    place_N = torch.where(starts_BT.flatten(), number_N - 1, room + 1).clamp(max=room + 1)
    slot_N = torch.arange(tokens, dtype=torch.int32, device=starts_BT.device)
    ends = torch.full((room + 2,), tokens, dtype=torch.int32, device=starts_BT.device)
    return ends.scatter(0, place_N, slot_N)[:-1]
