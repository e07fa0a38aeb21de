"""Where sequences lie in a row, eager and compiled: packed, padded, both, with a mask, with a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

transformers = pytest.importorskip("transformers")

from accelerate.utils import compile_regions  # noqa: E402
from decoders import SIZES, build, logits, tokens  # noqa: E402
from transformers import DynamicCache, LlamaConfig, OPTConfig, StaticCache  # noqa: E402

from openmoba import MobaConfig  # noqa: E402
from openmoba.hf import configure  # noqa: E402
from openmoba.hf.releases import recompute_activations  # noqa: E402

SPARSE, HYBRID = MobaConfig(4, 2), MobaConfig(4, 2, full_layers=(1,))
LENGTHS = [16, 24]

# Dynamo looks at the .grad of inner tensors and hides torch's warning about it by a way that errors bypass.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


def compile_layers(model: Any, backend: Any = "eager") -> Any:
    for layer in model.model.layers:
        layer.compile(backend=backend)
    return model


def compile_whole(model: Any) -> Any:
    return torch.compile(model, backend="eager", fullgraph=True)


WAYS: dict[str, Callable[[Any], Any]] = {"eager": lambda model: model, "layers": compile_layers, "model": compile_whole}


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests() -> None:
    torch._dynamo.reset()


@pytest.fixture(params=WAYS)
def run(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    """A model as it is, compiled layer by layer, and compiled as a whole without a break."""
    return WAYS[request.param]


def packed_row() -> tuple[Tensor, Tensor]:
    """Ids and positions `[1, 40]` of two sequences in one row."""
    return tokens(1, sum(LENGTHS)), torch.cat([torch.arange(n) for n in LENGTHS])[None]


def apart(model: Any, ids: Tensor) -> Tensor:
    return torch.cat([logits(model, part, use_cache=False) for part in ids.split(LENGTHS, 1)], 1)


def test_layers_of_a_kind_share_one_graph() -> None:
    """Twelve layers, three full ones among them, forward and backward, checkpointed: two graphs, no break."""
    model = build(LlamaConfig(**SIZES | {"num_hidden_layers": 12}))
    configure(model, MobaConfig(4, 2, full_layers=(1, 5, 11))).train()
    recompute_activations(model)
    torch._dynamo.utils.counters.clear()
    graphs = CompileCounterWithBackend("aot_eager")
    compile_layers(model, graphs)
    ids = tokens(2, 40)
    model(ids, labels=ids, use_cache=False).loss.backward()
    counters = torch._dynamo.utils.counters
    assert graphs.frame_count == 2
    assert counters["frames"] == {"total": 2, "ok": 2}
    assert not counters["graph_break"]
    assert not counters["recompiles"]


def test_regional_compilation_of_accelerate() -> None:
    """One graph more than the same model has with SDPA: its layers are of two kinds."""
    counts = []
    for settings in (None, MobaConfig(4, 2, full_layers=(1, 5, 9))):
        torch._dynamo.reset()
        graphs = CompileCounterWithBackend("eager")
        model = configure(build(LlamaConfig(**SIZES | {"num_hidden_layers": 10})), settings)
        logits(compile_regions(model, backend=graphs), tokens(2, 40), use_cache=False)
        counts.append(graphs.frame_count)
    assert counts[1] == counts[0] + 1


def test_packed_batches_of_any_number_of_sequences_share_graphs() -> None:
    model = configure(build(), HYBRID)
    graphs = CompileCounterWithBackend("aot_eager")
    compile_layers(model, graphs)
    ids = tokens(1, 40)
    for lengths in ([16, 24], [5, 20, 15], [9, 9, 9, 13]):
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        expected = torch.cat([logits(configure(build(), HYBRID), part) for part in ids.split(lengths, 1)], 1)
        torch.testing.assert_close(logits(model, ids, position_ids=positions, use_cache=False), expected)
    assert graphs.frame_count == 2


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_packed_rows_are_separate(run: Callable[[Any], Any], cached: bool, masked: bool) -> None:
    model = configure(build(), HYBRID)
    ids, positions = packed_row()
    expected = apart(model, ids)
    mask = {"attention_mask": torch.ones_like(ids)} if masked else {}
    out = logits(run(model), ids, position_ids=positions, use_cache=cached, **mask)
    torch.testing.assert_close(out, expected)


def test_gradients_of_packed_rows(run: Callable[[Any], Any]) -> None:
    ids, positions = packed_row()
    labels = ids.clone()
    labels[:, LENGTHS[0]] = -100  # the first sequence's last token says nothing about the second's first
    gradients = []
    for separately in (True, False):
        model = configure(build().train(), HYBRID)
        if separately:
            losses = [model(part, labels=part).loss * (part.shape[1] - 1) for part in ids.split(LENGTHS, 1)]
            loss = torch.stack(losses).sum() / (sum(LENGTHS) - 2)
        else:
            loss = run(model)(ids, position_ids=positions, labels=labels).loss
        loss.backward()
        gradients.append([weight.grad for weight in model.parameters()])
    for mine, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("padding", ["left", "right", "between"])
def test_padded_and_packed_rows(run: Callable[[Any], Any], padding: str) -> None:
    """A row that is both: padding is left out, and the sequences stay apart."""
    model = configure(build(), HYBRID)
    ids, positions = packed_row()
    expected = apart(model, ids)
    at = {"left": 0, "between": LENGTHS[0], "right": sum(LENGTHS)}[padding]

    def pad(x_BT: Tensor, value: int) -> Tensor:
        return torch.cat([x_BT[:, :at], torch.full((1, 5), value), x_BT[:, at:]], 1)

    mask = pad(torch.ones_like(ids), 0)
    out = logits(run(model), pad(ids, 0), position_ids=pad(positions, 1), attention_mask=mask, use_cache=False)
    torch.testing.assert_close(out[mask.bool()], expected[0])


def test_padding_without_positions(run: Callable[[Any], Any]) -> None:
    model = configure(build(), HYBRID)
    ids, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, 31:] = 0
    expected = logits(model, ids[1:, :31], use_cache=False)
    out = logits(run(model), ids, attention_mask=mask, use_cache=False)
    torch.testing.assert_close(out[1:, :31], expected)


@pytest.mark.parametrize("compiled", [compile_layers, compile_whole])
def test_graphs_refuse_a_sequence_with_padding_inside(compiled: Callable[[Any], Any]) -> None:
    model = compiled(configure(build(), SPARSE))
    ids, mask = tokens(1, 40), torch.ones(1, 40, dtype=torch.long)
    mask[0, 10:15] = 0
    with pytest.raises(RuntimeError, match="padding must not lie within a sequence"):
        logits(model, ids, attention_mask=mask, use_cache=False)
    # A graph that fails within a change of autocast would leave it to all that follows, with stale weights.
    assert torch.autocast_increment_nesting() == 1
    assert torch.autocast_decrement_nesting() == 0


def test_graphs_refuse_more_sequences_than_they_have_room_for() -> None:
    model = compile_whole(configure(build(), SPARSE))
    with pytest.raises(RuntimeError, match="cu_seq_lens_q"):
        logits(model, tokens(1, 40), position_ids=torch.arange(40)[None] % 4, use_cache=False)


@pytest.mark.parametrize("given", ["mask", "cache"])
def test_jumps_ahead_do_not_cut_where_transformers_does_not(given: str, run: Callable[[Any], Any]) -> None:
    ids, positions = tokens(1, 40), torch.arange(40)[None]
    positions[:, 16:] += 7
    call: dict[str, Any] = {"position_ids": positions, "use_cache": given == "cache"}
    if given == "mask":
        call["attention_mask"] = torch.ones_like(ids)
    model = build()
    expected = logits(model, ids, **call)
    torch.testing.assert_close(logits(run(configure(model, MobaConfig(4, 10))), ids, **call), expected)


def test_jumps_ahead_cut_where_transformers_cuts(run: Callable[[Any], Any]) -> None:
    ids, positions = tokens(1, 40), torch.arange(40)[None]
    positions[:, 16:] += 7
    model = build()
    expected = logits(model, ids, position_ids=positions, use_cache=False)
    model = run(configure(model, MobaConfig(4, 10)))
    torch.testing.assert_close(logits(model, ids, position_ids=positions, use_cache=False), expected)


def test_positions_rewritten_through_numpy() -> None:
    """torch does not see such a change, so nothing may be remembered about positions."""
    model = configure(build(), SPARSE)
    ids, packed = packed_row()
    positions = torch.arange(40)[None]
    logits(model, ids, position_ids=positions)
    positions.numpy()[:] = packed.numpy()
    torch.testing.assert_close(logits(model, ids, position_ids=positions), apart(model, ids))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_packed_rows_do_not_go_on_from_a_cache(kind: str) -> None:
    model = configure(build(), SPARSE)
    ids, positions = packed_row()
    cache: Any = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=64)
    if kind == "dynamic":
        logits(model, ids[:, :8], past_key_values=cache)
    with pytest.raises(ValueError, match="use_cache=False"):
        logits(model, ids, position_ids=positions, past_key_values=cache)
    with pytest.raises(RuntimeError, match="that a cache goes on from"):
        logits(torch.compile(model, backend="eager"), ids, position_ids=positions, past_key_values=cache)


def test_models_that_read_the_mask_themselves() -> None:
    """OPT's positions come from the mask, so it stays as it is; what would be joined is refused."""
    sizes = {"vocab_size": 61, "hidden_size": 48, "ffn_dim": 40, "num_hidden_layers": 2, "num_attention_heads": 6}
    config = OPTConfig(**sizes, word_embed_proj_dim=48, max_position_embeddings=64, dropout=0.0)
    model = build(config)
    ids, positions = packed_row()
    full = logits(model, ids)
    configure(model, MobaConfig(4, 10))
    torch.testing.assert_close(logits(model, ids), full)
    for call in ({}, {"attention_mask": torch.ones_like(ids)}, {"use_cache": False}):
        with pytest.raises(ValueError, match="position_ids restart"):
            logits(model, ids, position_ids=positions, **call)


def test_a_call_without_tokens_is_the_models_own_error() -> None:
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        configure(build(), SPARSE)(attention_mask=torch.ones(1, 4))


def test_settings_changed_behind_the_layers() -> None:
    model, ids = configure(build(), SPARSE), tokens(1, 20)
    model.config.moba = {"block_size": 2, "top_k": 2}
    with pytest.raises(ValueError, match="after a change of"):
        logits(model, ids)


@pytest.mark.parametrize("masked", [False, True])
def test_export(masked: bool) -> None:
    model, ids = configure(build(), HYBRID), tokens(2, 40)
    model.config.use_cache = False
    call = {"attention_mask": torch.ones_like(ids)} if masked else {}
    exported = torch.export.export(model, (ids,), call).module()
    torch.testing.assert_close(exported(ids, **call).logits, logits(model, ids, **call))
