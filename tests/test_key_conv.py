"""Key convolution: the operation against torch's own, and in models, packed, padded, saved, switched, compiled."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

transformers = pytest.importorskip("transformers")

from decoders import LAYERS, SIZES, build, logits, tokens  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Phi3Config,
    Qwen3Config,
)

from openmoba import MobaConfig  # noqa: E402
from openmoba.cli import main  # noqa: E402
from openmoba.hf import configure, convert  # noqa: E402
from openmoba.hf.releases import recompute_activations  # noqa: E402
from openmoba.ops.key_conv import key_convolution  # noqa: E402

WIDTH = 4
PLAIN = MobaConfig(4, 2, full_layers=1)
HYBRID = MobaConfig(4, 2, full_layers=1, key_conv=WIDTH)
FULL = MobaConfig(4, 2, full_layers="all", key_conv=WIDTH)
ARMS = pytest.mark.parametrize("settings", [HYBRID, FULL], ids=["hybrid", "full"])


def convolving(settings: MobaConfig = HYBRID, config: Any = None) -> Any:
    """A small decoder whose key convolution changes its output by far."""
    return train_filters(configure(build(config), settings))


def train_filters(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        if "key_conv" in name:
            weight.data.copy_(torch.randn(weight.shape, generator=generator))
    return model


def by_torch(k_TC: Tensor, weight_CW: Tensor) -> Tensor:
    """One sequence, by torch's convolution."""
    channels, width = weight_CW.shape
    padded = torch.nn.functional.pad(k_TC.T[None], (width - 1, 0))
    out = torch.nn.functional.conv1d(padded, weight_CW.flip(1)[:, None], groups=channels)
    return k_TC + torch.nn.functional.silu(out[0].T)


def test_by_hand() -> None:
    """Two channels, width 3; the first filter looks at the key itself, the second one two tokens back."""
    k = torch.tensor([[[1.0, 5.0], [2.0, 6.0], [3.0, 7.0]]])
    weight = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, -2.0]])
    silu = torch.nn.functional.silu(torch.tensor([1.0, 2.0, 3.0, -10.0]))
    expected = torch.tensor([[[1.0, 5.0], [2.0, 6.0], [3.0, 7.0]]])
    expected[0, :, 0] += silu[:3]
    expected[0, 2, 1] += silu[3]
    torch.testing.assert_close(key_convolution(k, weight), expected)
    second = key_convolution(k, weight, torch.tensor([[True, True, False]]))
    expected[0, 2, 1] = 7.0  # the third token begins a sequence
    torch.testing.assert_close(second, expected)
    after = key_convolution(k[:, 2:], weight, None, k[:, :2])
    torch.testing.assert_close(after, key_convolution(k, weight)[:, 2:])


@pytest.mark.parametrize("width", [2, 4, 7])
@pytest.mark.parametrize("lengths", [[1], [3], [13], [1, 2, 3, 7, 1, 19]], ids=str)
def test_values_and_gradients(lengths: list[int], width: int, randn: Callable[..., Tensor]) -> None:
    """In fp64, each packed sequence is as alone, and nothing but it has a part in its gradient."""
    k, weight = randn(1, sum(lengths), 5, grad=True), randn(5, width, grad=True)
    starts = torch.cat([torch.arange(n) > 0 for n in lengths])[None]
    upstream = randn(1, sum(lengths), 5)
    out = key_convolution(k, weight, starts)
    expected = torch.cat([by_torch(part, weight) for part in k[0].split(lengths)])[None]
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    got, wanted = (torch.autograd.grad(x, (k, weight), upstream) for x in (out, expected))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_nothing_crosses_a_border() -> None:
    k = torch.randn(1, 9, 3)
    k[:, :4] = float("nan")
    goes_on = torch.tensor([[True] * 4 + [False] + [True] * 4])
    assert key_convolution(k, torch.randn(3, 4), goes_on)[:, 4:].isfinite().all()


def test_zero_weights_are_the_identity_and_train(randn: Callable[..., Tensor]) -> None:
    k, weight = randn(2, 9, 3), torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    out = key_convolution(k, weight)
    assert out.equal(k)
    gradient = torch.autograd.grad(out.square().sum(), weight)[0]
    assert (gradient != 0).all()


@pytest.mark.parametrize(
    "config",
    [LlamaConfig(**SIZES), Qwen3Config(**SIZES), MistralConfig(**SIZES, sliding_window=None)],
    ids=lambda c: c.model_type,
)
@ARMS
def test_configure_adds_an_identity(settings: MobaConfig, config: Any) -> None:
    """In every layer, bit for bit, and in the optimizer's reach; trained, it changes the output."""
    model, ids = build(config), tokens(2, 23)
    plain = logits(configure(model, MobaConfig(4, 2, full_layers=settings.full_layers)), ids)
    configure(model, settings)
    assert logits(model, ids).equal(plain)
    names = [name for name, weight in model.named_parameters() if "key_conv" in name and weight.requires_grad]
    assert names == [f"model.layers.{i}.self_attn.key_conv.weight" for i in range(LAYERS)]
    model(ids, labels=ids).loss.backward()
    assert all((model.get_parameter(name).grad != 0).any() for name in names)
    assert (logits(train_filters(model), ids) - plain).abs().max() > 0.01


def test_keys_are_convolved_before_norm_and_rotation() -> None:
    """A layer's keys, as the attention gets them, from its projection by torch's convolution."""
    model, ids = convolving(FULL, Qwen3Config(**SIZES)), tokens(1, 11)
    layer, seen = model.model.layers[0], {}
    layer.self_attn.k_norm.register_forward_pre_hook(lambda _, given: seen.update(keys=given[0]))
    layer.input_layernorm.register_forward_hook(lambda _, __, out: seen.update(hidden=out))
    logits(model, ids)
    raw = torch.nn.functional.linear(seen["hidden"], layer.self_attn.k_proj.weight)[0]
    torch.testing.assert_close(seen["keys"].flatten(2)[0], by_torch(raw, layer.self_attn.key_conv.weight).detach())


@ARMS
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("cache", [False, True])
def test_padding_changes_nothing(cache: bool, padding: str, settings: MobaConfig) -> None:
    model = convolving(settings)
    rows = [tokens(1, n, seed=n)[0] for n in (23, 14, 1)]
    real = torch.stack([torch.arange(27) < len(row) for row in rows])
    real = real.flip(1) if padding == "left" else real
    batch = torch.zeros(3, 27, dtype=torch.long)
    batch[real] = torch.cat(rows)
    for positions in (None, (real.cumsum(-1) - 1).clamp(min=0)):
        if positions is None and padding == "left":
            continue  # rotated by other angles than alone
        padded = logits(model, batch, attention_mask=real.long(), position_ids=positions, use_cache=cache)
        for row, ids in enumerate(rows):
            torch.testing.assert_close(padded[row, real[row]], logits(model, ids[None])[0])


def test_padding_between_tokens_is_refused() -> None:
    model, mask = convolving(), torch.ones(1, 12, dtype=torch.long)
    mask[:, 5:8] = 0
    with pytest.raises(ValueError, match="padding_side to 'left'"):
        logits(model, tokens(1, 12), attention_mask=mask)


@ARMS
@pytest.mark.parametrize("told_by", ["position_ids", "cu_seq_lens", "both"])
@pytest.mark.parametrize("cache", [False, True])
def test_packed_sequences_are_separate(cache: bool, told_by: str, settings: MobaConfig) -> None:
    model = convolving(settings)
    rows = [tokens(1, n, seed=n)[0] for n in (13, 1, 22, 4)]
    collate = DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=True)
    batch = collate([{"input_ids": ids.tolist()} for ids in rows])
    del batch["labels"]
    if told_by == "position_ids":
        batch = {name: batch[name] for name in ("input_ids", "position_ids")}
    positions = batch["position_ids"]
    if told_by == "cu_seq_lens":  # positions that run through do not hide the boundaries
        positions = batch["position_ids"] = torch.arange(40)[None]
    pieces = positions.split([13, 1, 22, 4], 1)
    separate = [logits(model, ids[None], position_ids=p)[0] for ids, p in zip(rows, pieces, strict=True)]
    packed = logits(model, batch.pop("input_ids"), use_cache=cache, **batch)[0]
    torch.testing.assert_close(packed, torch.cat(separate))


@ARMS
@pytest.mark.parametrize("boundaries", [[0, 7, 21], [0, 7, 19], [-1, 7, 20]])
def test_boundaries_that_are_not_those_of_the_tokens_are_refused(settings: MobaConfig, boundaries: list[int]) -> None:
    starts = torch.tensor(boundaries, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cu_seqlens_q must (start at 0|end at q's token count 20), got"):
        logits(convolving(settings), tokens(1, 20), cu_seq_lens_q=starts, cu_seq_lens_k=starts)


@ARMS
def test_several_packed_rows(settings: MobaConfig) -> None:
    model, ids, cuts = convolving(settings), tokens(2, 20), ([7, 13], [12, 8])
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in cuts])
    starts = torch.tensor([0, 7, 20, 32, 40], dtype=torch.int32)
    separate = [
        torch.cat([logits(model, x[None])[0] for x in row.split(cut)]) for row, cut in zip(ids, cuts, strict=True)
    ]
    for told in ({}, {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}):
        torch.testing.assert_close(logits(model, ids, position_ids=positions, **told), torch.stack(separate))


@ARMS
def test_saving_and_loading(settings: MobaConfig, tmp_path: Any) -> None:
    model, ids = convolving(settings), tokens(1, 23)
    model.save_pretrained(tmp_path / "first")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert MobaConfig.from_dict(again.config.moba) == settings
    assert logits(again, ids).equal(logits(model, ids))
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert logits(copied, ids).equal(logits(model, ids))
    elsewhere = AutoModelForCausalLM.from_pretrained(tmp_path / "first", attn_implementation="sdpa")
    with pytest.raises(ValueError, match="load it with 'moba'"):
        logits(elsewhere, ids)


def test_asked_for_by_the_configuration(tmp_path: Any) -> None:
    """Built from a configuration, or loaded from weights without it, it starts at zero."""
    model, ids = build(), tokens(1, 23)
    model.save_pretrained(tmp_path)
    plain = logits(configure(model, PLAIN), ids)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="moba", moba=HYBRID.to_dict())
    assert logits(loaded, ids).equal(plain)
    assert sum("key_conv" in name for name, _ in loaded.named_parameters()) == LAYERS
    built = LlamaForCausalLM(LlamaConfig(**SIZES, moba=HYBRID.to_dict())).eval()
    weights = {name: weight for name, weight in built.named_parameters() if "key_conv" in name}
    assert len(weights) == LAYERS
    assert all((weight == 0).all() for weight in weights.values())


def test_convert(tmp_path: Any) -> None:
    model, ids = build(), tokens(1, 23)
    model.save_pretrained(tmp_path / "full")
    options = ["--block-size", "4", "--top-k", "2", "--full-layers", "last:1", "--key-conv", "4"]
    assert main(["convert", str(tmp_path / "full"), str(tmp_path / "moba"), *options]) == 0
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "moba")
    assert logits(converted, ids).equal(logits(configure(model, PLAIN), ids))
    assert MobaConfig.from_dict(converted.config.moba) == HYBRID
    fused = AutoModelForCausalLM.from_config(Phi3Config(**SIZES, sliding_window=None))
    fused.save_pretrained(tmp_path / "fused")
    with pytest.raises(ValueError, match="no key projection k_proj"):
        convert(tmp_path / "fused", tmp_path / "out", HYBRID)
    with pytest.raises(ValueError, match="no key projection k_proj"):
        configure(fused, HYBRID)
    assert configure(fused, PLAIN).config.moba["top_k"] == 2
    configure(model, HYBRID).save_pretrained(tmp_path / "with")
    with pytest.raises(ValueError, match="key convolution of width 4, got key_conv=None"):
        convert(tmp_path / "with", tmp_path / "out", PLAIN)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("settings", [None, PLAIN.to_dict(), MobaConfig(4, 2, key_conv=3).to_dict()], ids=str)
@pytest.mark.parametrize("options", [{}, {"attn_implementation": "sdpa"}], ids=["moba", "sdpa"])
def test_loading_it_with_settings_that_leave_it_out(settings: Any, options: Any, tmp_path: Any) -> None:
    """transformers reports weights that a model has no place for, as often harmless."""
    model, ids = configure(build(), HYBRID), tokens(1, 23)
    train_filters(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"key convolution of width 4, and moba=.* would leave it out; give key_conv=4"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path, moba=settings, **options)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, moba=FULL.to_dict())
    assert logits(again, ids).equal(logits(configure(model, FULL), ids))


def test_switching_keeps_it_and_dropping_it_asks() -> None:
    """MoBA to full and back shares the weights; a trained convolution is not dropped, an untrained one is."""
    model, ids = configure(build(), HYBRID), tokens(1, 23)
    full = logits(configure(model, None), ids)
    assert not any("key_conv" in name for name, _ in model.named_parameters())
    assert type(model.model.layers[0].self_attn) is type(build().model.layers[0].self_attn)
    configure(model, HYBRID)
    weights = [layer.self_attn.key_conv.weight for layer in model.model.layers]
    train_filters(configure(model, FULL))
    assert all(layer.self_attn.key_conv.weight is w for layer, w in zip(model.model.layers, weights, strict=True))
    assert (logits(model, ids) - full).abs().max() > 0.01
    for settings in (None, PLAIN, MobaConfig(4, 2, key_conv=3)):
        with pytest.raises(ValueError, match=r'is trained.*key_conv=4, with full_layers="all"'):
            configure(model, settings)
        assert MobaConfig.from_dict(model.config.moba) == FULL


@pytest.mark.parametrize("width", [1, 0, -4, True, 4.0, "4"])
def test_widths_that_are_none(width: Any) -> None:
    with pytest.raises(ValueError, match="key_conv is a width >= 2"):
        MobaConfig(4, 2, key_conv=width)


def test_training_against_fp64_and_checkpointing() -> None:
    ids, gradients = tokens(2, 23), {}
    for name, dtype in (("plain", torch.float32), ("checkpointed", torch.float32), ("oracle", torch.float64)):
        model = convolving().to(dtype).train()
        model.config.use_cache = False
        if name == "checkpointed":
            recompute_activations(model)
        model(ids, labels=ids).loss.backward()
        gradients[name] = {key: p.grad for key, p in model.named_parameters()}
    for key, oracle in gradients["oracle"].items():
        torch.testing.assert_close(gradients["plain"][key], gradients["checkpointed"][key])
        scale = oracle.abs().max()
        torch.testing.assert_close(gradients["plain"][key].double() / scale, oracle / scale, rtol=1e-3, atol=1e-4)


def test_autocast_and_16_bits() -> None:
    """Weights stay as they are, keys are computed in autocast's dtype."""
    model, ids, seen = convolving(), tokens(1, 23), []
    module = model.model.layers[0].self_attn.key_conv
    module.register_forward_hook(lambda _, given, out: seen.append((given[0].dtype, out.dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(ids, labels=ids).loss.backward()
    assert seen == [(torch.bfloat16, torch.bfloat16)]
    assert module.weight.dtype == module.weight.grad.dtype == torch.float32
    half = configure(build().to(torch.bfloat16), HYBRID)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def trained(model: Any, run: Any, **inputs: Any) -> list[torch.Tensor]:
    """Loss and gradients of a model, called as `run`."""
    model.zero_grad()
    loss = run(**inputs).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_layers_share_a_graph() -> None:
    """Full layers, compiled one by one and checkpointed: one graph, the loss and gradients of eager layers."""
    torch._dynamo.reset()
    model, ids = convolving(FULL).train(), tokens(2, 23)
    model.config.use_cache = False
    recompute_activations(model)
    graphs = CompileCounterWithBackend("eager")
    eager = trained(model, model, labels=ids, input_ids=ids)
    for layer in model.model.layers:
        layer.compile(backend=graphs, fullgraph=True)
    torch.testing.assert_close(trained(model, model, labels=ids, input_ids=ids), eager)
    assert graphs.frame_count == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("rows", ["packed", "left padded"])
def test_compiled_models(rows: str) -> None:
    """A whole model, checkpointed: one graph, the loss and gradients of the eager one."""
    torch._dynamo.reset()
    model, ids = convolving().train(), tokens(1, 40)
    model.config.use_cache = False
    recompute_activations(model)
    told: dict[str, Any] = {"position_ids": torch.cat([torch.arange(16), torch.arange(24)])[None]}
    if rows == "left padded":
        told = {"attention_mask": (torch.arange(40) > 6).long()[None]}
    graphs = CompileCounterWithBackend("eager")
    eager = trained(model, model, labels=ids, input_ids=ids, **told)
    compiled = trained(model, torch.compile(model, backend=graphs), labels=ids, input_ids=ids, **told)
    torch.testing.assert_close(compiled, eager)
    assert graphs.frame_count == 1
