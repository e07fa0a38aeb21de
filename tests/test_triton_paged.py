"""The kernels over a block table in Triton's interpreter: against fp64, and bit for bit against contiguous caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attending import INTERPRETED
from paging import Server, expected, of_upkeep
from torch import Tensor

pytest.importorskip("triton")

from openmoba import moba_attention, moba_decode, moba_paged, new_centroids
from openmoba.ops.arguments import KeyCache, KeyPages
from openmoba.ops.triton import decode, paged, pages

pytestmark = INTERPRETED

FP16, FP32 = torch.float16, torch.float32
SIZES = pytest.mark.parametrize(
    ("page_size", "block_size"), [(4, 4), (2, 4), (8, 4), (1, 5)], ids=["alike", "smaller", "larger", "tokens"]
)


@pytest.fixture(autouse=True)
def _no_plans_of_other_tests() -> None:
    decode._launches.cache_clear()


@pytest.fixture(params=["decoding", "pieces", "prefill"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever kernels run: those for a few queries, with blocks whole or cut, or those for many."""
    monkeypatch.setattr(decode, "_PROGRAMS_PER_MULTIPROCESSOR", 80 if request.param == "pieces" else 1)
    monkeypatch.setattr(paged, "are_few", lambda *_: request.param != "prefill")


def new_server(page_size: int, block_size: int, dtype: torch.dtype = FP32, heads: int = 2, kv_heads: int = 1) -> Server:
    return Server(page_size, block_size, dtype, pages=80, heads=heads, kv_heads=kv_heads, width=16)


def attend(server: Server, call: dict[str, Any], top_k: int) -> Tensor:
    """Upkeep and attention by the kernels."""
    paged.complete_paged(of_upkeep(call))
    return moba_paged(**call, top_k=top_k, impl="triton")


def assert_rounded(out: Tensor, wanted: Tensor) -> None:
    """No further from fp64 than rounding the output, and the fp32 sums."""
    eps = torch.finfo(out.dtype).eps + 8 * torch.finfo(FP32).eps
    assert (out.double() - wanted).norm() <= eps * wanted.norm()


@pytest.mark.parametrize(("page_size", "turns"), [(3, {8, 3}), (12, {2, 1})])
def test_pages_are_looked_up_in_turns(page_size: int, turns: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of blocks of 192 tokens, read whole and in pieces of 64, which begin within a page; 8 pages at once."""
    seen, pages_of = [], decode.pages_of
    monkeypatch.setattr(decode, "pages_of", lambda *sizes: seen.append(pages_of(*sizes)) or seen[-1])
    monkeypatch.setattr(decode, "_MOST_PAGES", 8)
    server = new_server(page_size, 192)
    paged.complete_paged(of_upkeep(server.call({server.begin(): 230})))
    for programs in (1, 80):
        monkeypatch.setattr(decode, "_PROGRAMS_PER_MULTIPROCESSOR", programs)
        decode._launches.cache_clear()
        call = server.call({0: 1})
        assert_rounded(attend(server, call, 2), expected(call, 2))
    assert {turns for _, turns in seen} == turns


@SIZES
@pytest.mark.usefixtures("kernels")
def test_ragged_batches(page_size: int, block_size: int) -> None:
    """Some tokens, one token, none, and a whole prompt; of 7, 4, no, and 1 complete blocks."""
    top_k, dtype = (3, FP32) if page_size in (1, 4) else (2, FP16)
    server = new_server(page_size, block_size, dtype)
    a, b, c, d = (server.begin() for _ in range(4))
    paged.complete_paged(of_upkeep(server.call({a: 6 * block_size + 2, b: 4 * block_size - 1})))
    call = server.call({a: block_size, b: 1, c: 0, d: block_size + 1})
    assert_rounded(attend(server, call, top_k), expected(call, top_k))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("top_k", [1, 40])
def test_limits(top_k: int) -> None:
    """The own block alone, and everything."""
    server = new_server(2, 4, heads=6, kv_heads=3)
    call = server.call({server.begin(): 14, server.begin(): 4})
    server.complete(call)
    call = server.call({0: 1, 1: 2})
    assert_rounded(attend(server, call, top_k), expected(call, top_k))


@pytest.mark.usefixtures("kernels")
def test_a_block_larger_than_any_sequence() -> None:
    server = new_server(4, 2**31 - 4)
    server.complete(server.call({server.begin(): 14, server.begin(): 4}))
    call = server.call({0: 1, 1: 5})
    assert_rounded(attend(server, call, 3), expected(call, 3))


@pytest.mark.parametrize("tokens", [1, 100])
def test_tables_without_a_page_are_of_no_sequence(tokens: int) -> None:
    server = new_server(4, 4)
    call = server.call({server.begin(): 0})
    call |= {"q": server.draw(tokens, 2, 16), "block_table": call["block_table"][:, :0].contiguous()}
    assert not moba_paged(**call, top_k=2, impl="triton").any()


@SIZES
@pytest.mark.usefixtures("kernels")
def test_a_shared_prefix(page_size: int, block_size: int) -> None:
    """Sequences that begin alike read the same pages and centroids, one of which only the first one wrote."""
    server = new_server(page_size, block_size)
    shared = 16 // page_size
    paged.complete_paged(of_upkeep(server.call({server.begin(): 29})))
    b = server.begin(0, shared)
    call = server.call({0: 1, b: 3})
    assert server.tables[0][:shared] == server.tables[b][:shared]
    assert_rounded(attend(server, call, 2), expected(call, 2))


@SIZES
@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_bits_of_centroids_are_those_of_a_cache_of_its_own(
    dtype: torch.dtype, page_size: int, block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the steps in which tokens came and the programs that pool, and nothing else is written."""
    monkeypatch.setattr(paged, "_POOLING_PROGRAMS_PER_MULTIPROCESSOR", 3)
    server = new_server(page_size, block_size, dtype, heads=2, kv_heads=2)
    server.begin()
    for new in (3, 1, 40, 7, 1, 1, 9):
        paged.complete_paged(of_upkeep(server.call({0: new})))
    keys = server.keys[0][None]
    tokens = keys.shape[1]
    wanted = new_centroids(keys, tokens, block_size)
    lengths = torch.tensor([tokens], dtype=torch.int32)
    pages.complete_pages(KeyCache(wanted, keys, lengths, None, block_size), tokens)
    lasts = torch.arange(block_size - 1, tokens, block_size)
    places = torch.tensor(server.tables[0])[lasts // page_size], lasts % page_size // block_size
    assert server.centroids[places].equal(wanted[0, : len(lasts)])
    server.centroids[places] = float("nan")
    assert server.centroids.isnan().all()


@pytest.mark.parametrize("page_size", [2, 16])
def test_bits_are_those_of_contiguous_calls(page_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of decoding rows of one token, in equal shares, and of a chunk of a prompt, at truly sparse top_k."""
    monkeypatch.setattr(decode, "_PROGRAMS_PER_MULTIPROCESSOR", 1)
    server = new_server(page_size, 8, FP16, heads=2, kv_heads=1)
    call = server.call({server.begin(): 70, server.begin(): 50})
    paged.complete_paged(of_upkeep(call))
    step = server.call({0: 1, 1: 1})
    out = attend(server, step, 3)
    for row, length in enumerate((71, 51)):
        cache = [x[row][None] for x in (server.keys, server.values)]
        lengths, centroids = torch.tensor([length], dtype=torch.int32), new_centroids(cache[0], length, 8)
        pages.complete_pages(KeyCache(centroids, cache[0], lengths, None, 8), length)
        q = step["q"][row][None, None]
        assert moba_decode(q, *cache, centroids, lengths, block_size=8, top_k=3, impl="triton").equal(
            out[row][None, None]
        )
    monkeypatch.setattr(paged, "are_few", lambda *_: False)
    chunk = server.call({0: 19})
    cache = [x[0][None] for x in (server.keys, server.values)]
    contiguous = moba_attention(chunk["q"][None], *cache, block_size=8, top_k=3, impl="triton")[0]
    assert attend(server, chunk, 3).equal(contiguous)


@pytest.mark.usefixtures("kernels")
def test_queries_of_no_sequence_are_zero() -> None:
    """What fills up the batch of a CUDA graph: queries behind the last sequence's, and sequences of no token."""
    server = new_server(4, 4)
    server.complete(server.call({server.begin(): 20, server.begin(): 0}))
    call = server.call({0: 2, 1: 0})
    out = attend(server, call | {"q": torch.cat([call["q"], server.draw(3, 2, 16)])}, 3)
    assert_rounded(out[:2], expected(call, 3))
    assert out[2:].eq(0).all()
    assert moba_paged(
        **call | {"q": call["q"][:0], "cu_seqlens_q": 0 * call["cu_seqlens_q"]}, top_k=3, impl="triton"
    ).shape == (0, 2, 16)


@pytest.mark.usefixtures("kernels")
def test_ties_go_to_the_later_block() -> None:
    """Of five alike blocks the last two are read, beside the own one."""
    server = new_server(2, 4)
    call = server.call({server.begin(): 22})
    where = torch.tensor(server.tables[0])[torch.arange(20) // 2], torch.arange(20) % 2
    server.k_pages[where] = server.keys[0][:4].repeat(5, 1, 1)
    paged.complete_paged(of_upkeep(call))
    server.k_pages[where[0][:12], where[1][:12]] = float("nan")
    last = call | {"q": call["q"][-1:], "cu_seqlens_q": torch.tensor([0, 1], dtype=torch.int32)}
    assert moba_paged(**last, top_k=3, impl="triton").isfinite().all()


@pytest.mark.usefixtures("kernels")
def test_strides() -> None:
    """Pages of vLLM's layout, or side by side; strided queries, centroids and tables."""
    server = new_server(4, 4)
    server.complete(server.call({server.begin(): 14, server.begin(): 9}))
    call = server.call({0: 1, 1: 2})
    out = attend(server, call, 3)
    other = {
        "q": call["q"].repeat(1, 1, 2)[..., :16],
        "k_pages": call["k_pages"].contiguous(),
        "v_pages": call["v_pages"].contiguous(),
        "centroids": call["centroids"].repeat(1, 1, 2, 2)[:, :, :1, :16],
        "block_table": call["block_table"].repeat(1, 2)[:, : call["block_table"].shape[1]],
    }
    assert moba_paged(**call | other, top_k=3, impl="triton").equal(out)


@pytest.mark.parametrize(
    ("queries", "megabytes", "decoded"), [(2, "1", True), (64, "800", True), (65, "800", False), (8, "1", False)]
)
def test_which_kernels_run(queries: int, megabytes: str, decoded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many queries are not decoded, nor more than sequences where their scores would take too much memory."""
    monkeypatch.setenv("OPENMOBA_WORKSPACE_MB", megabytes)
    ran = []
    monkeypatch.setattr(decode, "run_packed", lambda *_: ran.append(True))
    monkeypatch.setattr(paged, "_prefill", lambda *_: ran.append(False))
    table, lengths = torch.zeros(2, 10**5, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    k = torch.zeros(1, 16, 1, 16)
    centroids = torch.zeros(1, 1, 1, 16)
    cache = KeyPages(centroids, k, table, lengths, lengths, 16)
    paged.attend_paged(torch.zeros(queries, 1, 16), cache, k, 2, 1.0)
    assert ran == [decoded]


def test_in_a_compiled_graph() -> None:
    server = new_server(4, 4)
    server.complete(server.call({server.begin(): 14, server.begin(): 9}))
    call = server.call({0: 1, 1: 1})
    server.complete(call)
    others = {name: x for name, x in call.items() if name != "q"}

    def step(q: Tensor) -> Tensor:
        return 2 * moba_paged(q, **others, top_k=3, impl="triton")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(call["q"]), step(call["q"]))
    call["centroids"].nan_to_num_()
    torch.library.opcheck(
        torch.ops.openmoba.attend_paged, ("triton", call["q"], *of_upkeep(call), call["v_pages"], 3, 0.25)
    )
    torch.library.opcheck(torch.ops.openmoba.write_paged, ("triton", *of_upkeep(call)))


def test_what_triton_cannot_run() -> None:
    server = new_server(4, 4)
    call = server.call({server.begin(): 9})
    with pytest.raises(ValueError, match="impl must be one of"):
        moba_paged(**call, top_k=3, impl="cuda")
    with pytest.raises(ValueError, match="block_table's last dimension must be contiguous"):
        moba_paged(**call | {"block_table": call["block_table"].repeat(1, 2)[:, ::2]}, top_k=3, impl="triton")
