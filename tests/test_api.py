"""The contract of the public operation: errors, dispatch, explanation, compilers, import."""

import re
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from openmoba import explain, moba_attention, moba_select
from openmoba.ops import cpu, dense
from openmoba.ops.arguments import Blocking
from openmoba.ops.attend import attend

SETTINGS = {"block_size": 4, "top_k": 2}
CU = torch.tensor([0, 5, 17], dtype=torch.int32)


def tensors(tokens=17, heads=4, kv_heads=2, width=8, batch=(1,), **options):
    torch.manual_seed(0)
    return [torch.randn(*batch, tokens, n, width, **options) for n in (heads, kv_heads, kv_heads)]


def changed(**changes):
    """Arguments of a good call, some of them replaced."""
    q, k, v = tensors()
    return {"q": q, "k": k, "v": v, **SETTINGS, **changes}


def packed(**changes):
    q, k, v = tensors(batch=())
    return {"q": q, "k": k, "v": v, **SETTINGS, "cu_seqlens_q": CU, "cu_seqlens_k": CU, **changes}


BAD_CALLS = {
    "top_k must be >= 1, got 0; top_k=1 attends within the block": lambda: changed(top_k=0),
    "top_k must be an int, got 2.0": lambda: changed(top_k=2.0),
    "top_k must be an int, got True": lambda: changed(top_k=True),
    "block_size must be >= 1, got -3": lambda: changed(block_size=-3),
    "block_size must be an int, got '4'": lambda: changed(block_size="4"),
    "v must be a torch.Tensor, got list": lambda: changed(v=[1.0]),
    "q has dtype torch.int64; use float64, float32, float16 or bfloat16": lambda: changed(q=tensors()[0].long()),
    "k has dtype torch.float16 but q has torch.float32; cast them to one dtype": lambda: changed(k=tensors()[1].half()),
    "v is on meta but q is on cpu; move them to one device": lambda: changed(v=tensors()[2].to("meta")),
    "q must be [batch, tokens, heads, dim], got shape (17, 4, 8)": lambda: changed(q=tensors(batch=())[0]),
    "a packed batch needs cu_seqlens_q and _k": lambda: changed(q=tensors(batch=())[0]),
    "k must be [tokens, heads, dim], got shape (1, 17, 2, 8); drop cu_seqlens for a batch": lambda: packed(
        k=tensors()[1]
    ),
    "v must have k's shape (1, 17, 2, 8), got (1, 16, 2, 8)": lambda: changed(v=tensors(16)[2]),
    "q has head width 16 but k has 8; they must be equal": lambda: changed(q=tensors(width=16)[0]),
    "head width must be 8 to 256, got 7; pad the heads with zeros, and keep the logits by scale=7**-0.5": lambda: dict(
        zip("qkv", tensors(width=7), strict=True), **SETTINGS
    ),
    "head width must be 8 to 256, got 257; use narrower heads": lambda: dict(
        zip("qkv", tensors(width=257), strict=True), **SETTINGS
    ),
    "q's 3 heads must be a multiple of k's 2 heads": lambda: changed(q=tensors(heads=3)[0]),
    "q's 4 heads must be a multiple of k's 0 heads": lambda: dict(
        zip("qkv", tensors(kv_heads=0), strict=True), **SETTINGS
    ),
    "q has batch 2 but k has 1; they must be equal": lambda: changed(q=tensors(batch=(2,))[0]),
    "q has 18 tokens but k only 17; queries are the last positions": lambda: changed(q=tensors(18)[0]),
    "q has 4 tokens but k only 2; queries are the last positions of the keys, so k must hold at least as many "
    "tokens; the dimensions are [batch, tokens, heads, dim]": lambda: changed(
        **{name: x.transpose(1, 2) for name, x in zip("qkv", tensors(), strict=True)}
    ),
    "cu_seqlens_q is given without cu_seqlens_k": lambda: packed(cu_seqlens_k=None),
    "cu_seqlens_k is given without cu_seqlens_q": lambda: changed(cu_seqlens_k=CU),
    "cu_seqlens_q must be int32 of shape [sequences + 1], got torch.int64 (3,); use .int()": lambda: packed(
        cu_seqlens_q=CU.long()
    ),
    "cu_seqlens_k must be int32 of shape [sequences + 1], got torch.int32 (1, 3)": lambda: packed(
        cu_seqlens_k=CU[None]
    ),
    "cu_seqlens_k is on meta but q is on cpu; move it there": lambda: packed(cu_seqlens_k=CU.to("meta")),
    "cu_seqlens_q describes 1 sequences but cu_seqlens_k 2": lambda: packed(cu_seqlens_q=CU[[0, 2]]),
    "cu_seqlens_q must start at 0, got 5": lambda: packed(cu_seqlens_q=CU[[1, 2, 2]]),
    "cu_seqlens_k must not decrease, got 20 then 17 at index 2": lambda: packed(cu_seqlens_k=CU + CU.new([0, 15, 0])),
    "cu_seqlens_q must end at q's token count 17, got 16": lambda: packed(cu_seqlens_q=CU - CU.new([0, 0, 1])),
    "sequence 1 has 12 queries but 11 keys": lambda: packed(cu_seqlens_k=CU + CU.new([0, 1, 0])),
    "impl must be one of auto, reference, cpu, triton, got 'cuda'": lambda: changed(impl="cuda"),
    "impl='cpu' does not compute in float64; use impl='reference'": lambda: dict(
        zip("qkv", tensors(dtype=torch.float64), strict=True), **SETTINGS, impl="cpu"
    ),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_calls_name_the_value_and_the_way_out(message):
    arguments = BAD_CALLS[message]()
    for operation in (moba_attention, explain):
        with pytest.raises(ValueError, match=re.escape(message)):
            operation(**arguments)


def test_selection_checks_too():
    q, k, _ = tensors()
    with pytest.raises(ValueError, match="top_k must be >= 1"):
        moba_select(q, k, block_size=4, top_k=0)


def test_triton_needs_its_device(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="impl='triton' needs CUDA tensors, got cpu; use impl='auto'"):
        moba_attention(**changed(impl="triton"))


def test_boundaries_are_checked_when_a_compiled_call_runs():
    compiled = torch.compile(lambda q, k, v, cu: moba_attention(**packed(cu_seqlens_q=cu)), backend="eager")
    with pytest.raises(ValueError, match="must end at q's token count 17, got 99"):
        compiled(*tensors(batch=()), torch.tensor([0, 5, 99], dtype=torch.int32))


@pytest.mark.parametrize(
    ("changes", "impl", "path"),
    [
        ({}, "cpu", "blocks"),
        ({"top_k": 4}, "cpu", "blocks"),
        ({"top_k": 5}, "cpu", "dense"),
        ({"top_k": 1, "block_size": 17}, "cpu", "dense"),
        ({"impl": "reference"}, "reference", "mask"),
        ({"impl": "reference", "top_k": 5}, "reference", "mask"),
    ],
)
def test_explain(changes, impl, path):
    explanation = explain(**changed(**changes))
    assert (explanation.impl, explanation.path) == (impl, path)


def test_explain_gives_reasons():
    assert explain(**changed(top_k=9)).reason == (
        "cpu tensors; top_k=9 covers all 5 blocks, where MoBA is causal attention"
    )
    assert explain(**changed(impl="cpu")).reason == "asked for; each query reads at most 2 blocks of 4 keys"
    double = dict(zip("qkv", tensors(dtype=torch.float64), strict=True))
    assert explain(**double, **SETTINGS).reason == "only the reference computes in float64"


def test_top_k_far_beyond_the_blocks_of_a_packed_batch():
    q, k, v = (packed()[name] for name in "qkv")
    cu = {"cu_seqlens_q": CU, "cu_seqlens_k": CU}
    huge = moba_attention(q, k, v, block_size=4, top_k=10**9, **cu)
    torch.testing.assert_close(huge, moba_attention(q, k, v, block_size=4, top_k=3, **cu, impl="reference"))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize(("queries", "keys"), [(0, 0), (0, 5)])
def test_no_queries(impl, queries, keys):
    q, k, v = (x.requires_grad_() for x in (tensors(queries)[0], *tensors(keys)[1:]))
    out = moba_attention(q, k, v, **SETTINGS, impl=impl)
    assert out.shape == q.shape
    assert [g.abs().sum() for g in torch.autograd.grad(out.sum(), (q, k, v))] == [0, 0, 0]
    assert moba_select(q, k, **SETTINGS, impl=impl).shape == (1, 0, 4, 1)


def test_scale_is_one_over_root_width_by_default():
    q, k, v = tensors(width=16)
    default = moba_attention(q, k, v, **SETTINGS)
    assert torch.equal(default, moba_attention(q, k, v, **SETTINGS, scale=0.25))
    assert not torch.equal(default, moba_attention(q, k, v, **SETTINGS, scale=0.5))


@pytest.mark.parametrize("top_k", [2, 5], ids=["blocks", "dense"])
def test_double_backward_is_refused(top_k):
    q, k, v = (x.requires_grad_() for x in tensors())
    (gradient,) = torch.autograd.grad(moba_attention(q, k, v, block_size=4, top_k=top_k).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once; for double backward use impl='reference'"):
        gradient.sum().backward()


def test_double_backward_of_the_reference():
    q, k, v = (x.requires_grad_() for x in tensors())
    (gradient,) = torch.autograd.grad(moba_attention(q, k, v, **SETTINGS, impl="reference").sum(), q, create_graph=True)
    gradient.square().sum().backward()
    assert v.grad.abs().sum() > 0


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_in_one_graph(dynamic):
    torch.compiler.reset()
    graphs = []

    def attention(q, k, v):
        return moba_attention(q, k, v, **SETTINGS) * moba_select(q, k, **SETTINGS).float()

    compiled = torch.compile(
        attention, fullgraph=True, dynamic=dynamic, backend=lambda graph, _: graphs.append(graph) or graph.forward
    )
    for tokens in (17, 33, 40) if dynamic else (17,):
        inputs = [x.requires_grad_() for x in tensors(tokens)]
        gradients = [torch.autograd.grad(f(*inputs).sum(), inputs) for f in (compiled, attention)]
        for actual, expected in zip(*gradients, strict=True):
            assert torch.equal(actual, expected)
    assert len(graphs) == 1


def test_compiled_packed_batch():
    torch.compiler.reset()
    cu = {"cu_seqlens_q": CU, "cu_seqlens_k": CU}
    q, k, v = tensors(batch=())
    compiled = torch.compile(moba_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, **SETTINGS, **cu), moba_attention(q, k, v, **SETTINGS, **cu))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch 2.14 to itself
@pytest.mark.parametrize("boundaries", [None, CU])
def test_registration(boundaries):
    batch = (1,) if boundaries is None else ()
    q, k, v = (x.requires_grad_() for x in tensors(batch=batch))
    forward = torch.ops.openmoba.attend.default
    torch.library.opcheck(forward, ("cpu", q, k, v, None, boundaries, boundaries, 4, 2, 0.3))
    out, lse, selected = (x.detach() for x in forward("cpu", q, k, v, None, boundaries, boundaries, 4, 2, 0.3))
    q, k, v = q.detach(), k.detach(), v.detach()
    torch.library.opcheck(
        torch.ops.openmoba.attend_backward.default,
        ("cpu", out, None, q, k, v, out, lse, selected, boundaries, boundaries, 4, 2, 0.3),
    )
    torch.library.opcheck(torch.ops.openmoba.select.default, ("cpu", q, k, boundaries, boundaries, 4, 2))


def test_plain_tensors_go_around_the_dispatcher():
    """With the bits of the registered operation, which tracers see."""
    inputs = [x.requires_grad_() for x in tensors()]
    results = []
    for call in (
        lambda *x: moba_attention(*x, **SETTINGS),
        lambda *x: torch.ops.openmoba.attend("cpu", *x, None, None, None, 4, 2, 8**-0.5)[0],
    ):
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as recorded:
            out = call(*inputs)
            results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
        dispatched = {event.name for event in recorded.events() if event.name.startswith("openmoba::")}
        assert dispatched == (set() if len(results) == 1 else {"openmoba::attend"})
    assert all(map(torch.equal, *results))
    graph = make_fx(lambda *x: moba_attention(*x, **SETTINGS), tracing_mode="fake")(*tensors())
    assert "openmoba.attend" in graph.code


@pytest.mark.parametrize("make", [changed, packed])
@pytest.mark.parametrize("top_k", [2, 5])
def test_meta_tensors(make, top_k):
    arguments = make(top_k=top_k)
    meta = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    expected, actual = moba_attention(**arguments), moba_attention(**meta)
    assert actual.device.type == "meta"
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)


@pytest.mark.parametrize("make", [changed, packed])
def test_fake_tensors(make):
    arguments = make()
    expected = moba_attention(**arguments)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
        actual = moba_attention(**fake)
    assert (actual.shape, actual.dtype, actual.device) == (expected.shape, expected.dtype, expected.device)


def test_import_needs_torch_alone():
    """Beyond what torch itself imports, only openmoba's own modules and no implementation."""
    program = (
        "import sys, torch; torch_alone = set(sys.modules); import openmoba; openmoba.moba_attention; "
        "new = set(sys.modules) - torch_alone; "
        "print(sorted({name.split('.')[0] for name in new if not name.startswith('torch.')})); "
        "print([name for name in new if name.startswith(('openmoba.hf', 'openmoba.lab', 'openmoba.ops.triton'))])"
    )
    lines = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    foreign = set(eval(lines[0])) - {"openmoba"} - set(sys.stdlib_module_names)
    assert foreign == set()
    assert lines[1] == "[]"


class _Cut(torch.autograd.Function):
    """Passes its input on and no gradient back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, _):
        return None


def forward_on_cpu(registered, q, k, v):
    """The output of the registered operation, or of the way around the dispatcher."""
    blocking = Blocking(None, None, *SETTINGS.values())
    if registered:
        return torch.ops.openmoba.attend("cpu", q, k, v, None, *blocking, 0.25)[0]
    return attend("cpu", q, k, v, None, blocking, 0.25)[0]


@pytest.mark.parametrize("registered", [False, True])
def test_no_gradient_of_the_output_gives_none(registered):
    q, k, v = (x.requires_grad_() for x in tensors())
    _Cut.apply(forward_on_cpu(registered, q, k, v)).sum().backward()
    assert q.grad is k.grad is v.grad is None


@pytest.mark.parametrize("registered", [False, True])
def test_backward_fills_no_gradients_of_what_has_none(monkeypatch, registered):
    """Zeros for the log-sum-exp and the choice would take memory and launches."""
    q, k, v = (x.requires_grad_() for x in tensors())
    out = forward_on_cpu(registered, q, k, v)
    monkeypatch.setattr(
        cpu, "backward", lambda _d_out, _d_lse, q, k, v, *rest: tuple(torch.empty_like(x) for x in (q, k, v))
    )
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as recorded:
        torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    names = {event.name for event in recorded.events()}
    assert "aten::empty_like" in names
    assert not {"aten::zeros", "aten::zero_", "aten::new_zeros"} & names


def test_the_order_of_dense_backends_is_restored():
    before = torch._C._get_sdp_priority_order()
    orders = []

    def fail():
        orders.append(torch._C._get_sdp_priority_order())
        raise RuntimeError("no such shape")

    with pytest.raises(RuntimeError, match="no such shape"), dense._preferred():
        fail()
    assert torch._C._get_sdp_priority_order() == before
    with sdpa_kernel(dense._CUDA_BACKENDS, set_priority=True):
        assert orders == [torch._C._get_sdp_priority_order()] != [before]
