"""Where torch itself is set up or used in other ways: default dtypes and devices, autocast, exporting, torch.func."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.export import Dim, export
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from openmoba import complete_pages, explain, moba_attention, moba_decode, moba_select, new_centroids

NO_FORWARD_MODE = r"no forward-mode derivatives .* use impl='reference'"
BLOCKS, DENSE = {"block_size": 4, "top_k": 2}, {"block_size": 16, "top_k": 2}
PATHS = pytest.mark.parametrize("settings", [BLOCKS, DENSE], ids=["blocks", "dense"])

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
    ),  # forward mode asks for it
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),  # and linearize traces it
    pytest.mark.filterwarnings("ignore:.*batching rule for aten.._scaled_dot_product:UserWarning"),
]


@pytest.fixture
def default_dtype() -> Iterator[Callable[[torch.dtype], None]]:
    """Sets torch's default dtype for the test."""
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


def qkv(queries: int = 17, keys: int = 17) -> tuple[Tensor, Tensor, Tensor]:
    """Two query heads per key/value head of width 8, fp32 whatever the default is."""
    generator = torch.Generator().manual_seed(0)

    def make(tokens: int, heads: int) -> Tensor:
        return torch.randn(1, tokens, heads, 8, generator=generator, dtype=torch.float32)

    return make(queries, 4), make(keys, 2), make(keys, 2)


def everything(impl: str, before_backward: Callable[[], None] = lambda: None) -> list[Tensor]:
    """Attention with gradients, the choice, and decoding over pages of tiny keys, whose scale is beyond fp16."""
    q, k, v = (x.requires_grad_() for x in qkv())
    out = moba_attention(q, k, v, **BLOCKS, impl=impl)
    before_backward()
    gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
    q, keys, v = q.detach(), k.detach() * 1e-6, v.detach()
    centroids, lengths = new_centroids(keys, 17, 4).zero_(), torch.tensor([17], dtype=torch.int32)
    complete_pages(centroids, keys, lengths, None, 17, 4)
    decoded = moba_decode(q[:, -1:], keys, v, centroids, lengths, **BLOCKS)
    return [out, *gradients, moba_select(q, k, **BLOCKS, impl=impl), centroids, decoded]


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_changes_nothing(default_dtype, impl, dtype):
    expected = everything(impl)
    changed_between = everything(impl, before_backward=lambda: default_dtype(dtype))
    for results in (changed_between, everything(impl)):
        for x, y in zip(results, expected, strict=True):
            assert x.dtype == y.dtype
            assert torch.equal(x, y)


def test_the_default_device_changes_nothing():
    expected = everything("cpu")
    inputs = qkv()
    with torch.device("meta"):
        out = moba_attention(*inputs, **BLOCKS)
        selected = moba_select(*inputs[:2], **BLOCKS)
    assert torch.equal(out, expected[0])
    assert torch.equal(selected, expected[4])


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_the_choice_under_autocast_is_that_of_the_attention(impl):
    q, k, _ = qkv(200, 200)
    low = moba_select(q.bfloat16(), k.bfloat16(), **BLOCKS)
    assert not torch.equal(low, moba_select(q, k, **BLOCKS))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(moba_select(q, k, **BLOCKS, impl=impl), low)


def test_explain_knows_of_autocast():
    """Triton's interpreter takes fp32, but not bf16."""
    inputs = qkv()
    assert explain(*inputs, **BLOCKS, impl="triton").impl == "triton"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for operation in (explain, moba_attention):
            with pytest.raises(ValueError, match="interpreter computes bfloat16 wrongly"):
                operation(*inputs, **BLOCKS, impl="triton")


@pytest.mark.parametrize("make", [lambda q: q.tolist(), lambda q: q.long()], ids=["list", "integers"])
@pytest.mark.parametrize("autocast", [False, True])
def test_inputs_that_are_no_floats_are_refused(make, autocast):
    q, k, v = qkv()
    with (
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
        pytest.raises(ValueError, match=r"q must be a torch.Tensor, got list|q has dtype torch.int64"),
    ):
        moba_attention(make(q), k, v, **BLOCKS)


@PATHS
@pytest.mark.parametrize("fewer", [0, 7], ids=["all", "some queries"])
def test_lengths_change_under_a_compiler(settings, fewer):
    torch.compiler.reset()
    graphs = []
    compiled = torch.compile(
        lambda *x: moba_attention(*x, **settings),
        fullgraph=True,
        dynamic=True,
        backend=lambda graph, _: graphs.append(graph) or graph.forward,
    )
    for tokens in (17, 21, 32):
        inputs = qkv(tokens - fewer, tokens)
        assert torch.equal(compiled(*inputs), moba_attention(*inputs, **settings))
    assert len(graphs) == 1


@PATHS
@pytest.mark.parametrize("fewer", [0, 7], ids=["all", "some queries"])
def test_exported_with_a_dynamic_length(settings, fewer):
    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return moba_attention(q, k, v, **settings)

    keys = Dim("keys", min=15, max=32)
    queries = Dim("queries", min=2, max=14) if fewer else keys
    program = export(Attention(), qkv(17 - fewer), dynamic_shapes=({1: queries}, {1: keys}, {1: keys}))
    inputs = qkv(20 - fewer, 20)
    torch.testing.assert_close(program.module()(*inputs), moba_attention(*inputs, **settings))


def test_a_saved_program_is_loaded_by_whoever_imports_the_operation(tmp_path):
    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return moba_attention(q, k, v, block_size=4, top_k=2)

    inputs = qkv(17)
    saved, answer = tmp_path / "attention.pt2", tmp_path / "out.pt"
    torch.export.save(export(Attention(), inputs), saved)
    torch.save(inputs, answer)
    program = (
        "import sys, torch; from openmoba import moba_attention; saved, answer = sys.argv[1:]\n"
        "torch.save(torch.export.load(saved).module()(*torch.load(answer)), answer)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program, saved, answer], check=True)
    torch.testing.assert_close(torch.load(answer), moba_attention(*inputs, block_size=4, top_k=2))


def attend_to(settings: dict[str, int], impl: str) -> Callable[[Tensor], Tensor]:
    """A function of q alone."""
    _, k, v = qkv()
    return lambda q: moba_attention(q, k, v, **settings, impl=impl)


def twice(q: Tensor) -> Tensor:
    return torch.stack([q, 2 * q])


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "grad": lambda f, q: grad(lambda q: f(q).square().sum())(q),
    "vjp": lambda f, q: vjp(f, q)[1](q)[0],
    "vmap": lambda f, q: vmap(f)(twice(q)),
    "vmap_elsewhere": lambda f, q: vmap(f, in_dims=-1)(twice(q).movedim(0, -1)),
    "vmap_grad": lambda f, q: vmap(grad(lambda q: f(q).square().sum()))(twice(q)),
    "grad_vmap": lambda f, q: grad(lambda q: vmap(f)(twice(q)).square().sum())(q),
    "jacrev": lambda f, q: jacrev(lambda q: f(q).sum((1, 3)))(q),
    "functionalize": lambda f, q: functionalize(f)(q),
    "is_grads_batched": lambda f, q: torch.autograd.grad(
        f(x := q.clone().requires_grad_()), x, twice(q), is_grads_batched=True
    )[0],
    "make_fx_grad": lambda f, q: make_fx(grad(lambda q: f(q).square().sum()))(q)(q),
}


@PATHS
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_those_of_the_reference(settings, name):
    transform, (q, _, _) = TRANSFORMS[name], qkv()
    expected = transform(attend_to(settings, "reference"), q)
    assert expected.abs().sum() > 0
    torch.testing.assert_close(transform(attend_to(settings, "cpu"), q), expected)


def test_the_choice_in_batches():
    q, k, _ = qkv()
    expected = torch.stack([moba_select(q, k, **BLOCKS), moba_select(-q, k, **BLOCKS)])
    assert torch.equal(vmap(lambda q: moba_select(q, k, **BLOCKS))(torch.stack([q, -q])), expected)


def with_dual(f: Callable[[Tensor], Tensor], q: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(q, q))).tangent


FORWARD_MODE: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "jvp": lambda f, q: jvp(f, (q,), (q,))[1],
    "jacfwd": lambda f, q: jacfwd(lambda q: f(q).sum((1, 3)))(q),
    "linearize": lambda f, q: linearize(f, q)[1](q),
    "dual": with_dual,
}


@PATHS
@pytest.mark.parametrize("name", FORWARD_MODE)
def test_forward_mode_is_refused_except_by_the_reference(settings, name):
    transform, (q, _, _) = FORWARD_MODE[name], qkv()
    assert transform(attend_to(settings, "reference"), q).abs().sum() > 0
    with pytest.raises(NotImplementedError, match=NO_FORWARD_MODE):
        transform(attend_to(settings, "cpu"), q)


def test_forward_over_reverse_is_refused():
    (q, _, _), f = qkv(), attend_to(BLOCKS, "cpu")
    with pytest.raises(NotImplementedError, match=NO_FORWARD_MODE):
        hessian(lambda q: f(q).square().sum())(q)


@pytest.mark.parametrize("name", ["grad", "jvp"])
def test_transforms_in_compiled_code(name):
    torch.compiler.reset()
    transform, (q, _, _) = {**TRANSFORMS, **FORWARD_MODE}[name], qkv()
    compiled = torch.compile(lambda q: transform(attend_to(BLOCKS, "cpu"), q), backend="aot_eager")
    if name in FORWARD_MODE:
        with pytest.raises(NotImplementedError, match=NO_FORWARD_MODE):
            compiled(q)
    else:
        torch.testing.assert_close(compiled(q), transform(attend_to(BLOCKS, "reference"), q))


def decode(impl: str) -> Callable[[Tensor], Tensor]:
    """Decoding as a function of the query."""
    _, k, v = qkv()
    centroids, lengths = new_centroids(k, 17, 4).zero_(), torch.tensor([17], dtype=torch.int32)
    complete_pages(centroids, k, lengths, None, 17, 4)
    return lambda q: moba_decode(q, k, v, centroids, lengths, **BLOCKS, impl=impl)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_decoding_in_batches(impl):
    (q, _, _), f = qkv(1), decode(impl)
    assert torch.equal(vmap(f)(twice(q)), torch.stack([f(q), f(2 * q)]))


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("name", ["grad", "jvp", "linearize", "dual"])
def test_decoding_has_no_derivatives(impl, name):
    transform, (q, _, _) = {**TRANSFORMS, **FORWARD_MODE}[name], qkv(1)
    with pytest.raises(ValueError, match="use moba_attention, with impl='reference' for forward mode"):
        transform(decode(impl), q)


def test_decoding_is_traced():
    f, (q, _, _) = decode("triton"), qkv(1)
    graph = make_fx(f)(q)
    assert "openmoba.decode" in graph.code
    assert torch.equal(graph(2 * q), f(2 * q))
    assert math.isfinite(f(q).sum())
