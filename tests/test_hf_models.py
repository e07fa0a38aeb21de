"""MoBA in transformers models: layers, padding, packing, saving, switching, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from decoders import LAYERS, SIZES, build, logits, tokens  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen3Config,
)

from openmoba import MobaConfig  # noqa: E402
from openmoba.hf import configure  # noqa: E402
from openmoba.hf.releases import recompute_activations  # noqa: E402

SPARSE = MobaConfig(block_size=4, top_k=2)


@pytest.mark.parametrize(
    "config",
    [LlamaConfig(**SIZES), Qwen3Config(**SIZES), MistralConfig(**SIZES, sliding_window=None)],
    ids=lambda c: c.model_type,
)
def test_covering_all_blocks_is_full_attention(config: Any) -> None:
    model = build(config)
    ids = tokens(2, 23)
    full = logits(model, ids)
    configure(model, MobaConfig(block_size=4, top_k=6))
    torch.testing.assert_close(logits(model, ids), full)
    configure(model, SPARSE)
    assert (logits(model, ids) - full).abs().max() > 0.01


def test_layers_of_a_hybrid() -> None:
    """A model with every layer full is the sdpa model; each single full layer changes the output."""
    model, ids = build(), tokens(1, 23)
    full = logits(model, ids)
    outputs = []
    for layers in (0, 1, (0,), (1,), (0, 2)):
        configure(model, MobaConfig(4, 2, full_layers=layers))
        outputs.append(logits(model, ids))
    for i, a in enumerate(outputs):
        assert all((a - b).abs().max() > 1e-3 for b in outputs[i + 1 :])
    last = configure(model, MobaConfig(4, 2, full_layers=(LAYERS - 1,)))
    torch.testing.assert_close(logits(last, ids), outputs[1])
    torch.testing.assert_close(logits(configure(model, MobaConfig(4, 2, full_layers=LAYERS)), ids), full)


@pytest.mark.parametrize("full_layers", [0, 1], ids=["moba", "hybrid"])
@pytest.mark.parametrize("padding", ["left", "right", "middle"])
def test_padding_changes_nothing(padding: str, full_layers: int) -> None:
    model = configure(build(), MobaConfig(4, 2, full_layers=full_layers))
    rows = [tokens(1, n, seed=n)[0] for n in (23, 14, 1)]
    real = torch.zeros(3, 27, dtype=torch.bool)
    for row, ids in enumerate(rows):
        n, free = len(ids), 27 - len(ids)
        if padding == "left":
            real[row, free:] = True
        elif padding == "right":
            real[row, :n] = True
        else:  # a hole that starts inside a block
            real[row, : n // 2] = True
            real[row, n // 2 + free :] = True
    batch = torch.zeros(3, 27, dtype=torch.long)
    batch[real] = torch.cat(rows)
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    padded = logits(model, batch, attention_mask=real.long(), position_ids=positions)
    for row, ids in enumerate(rows):
        torch.testing.assert_close(padded[row, real[row]], logits(model, ids[None])[0])


@pytest.mark.parametrize("full_layers", [0, 1], ids=["moba", "hybrid"])
@pytest.mark.parametrize("told_by", ["position_ids", "cu_seq_lens", "both"])
def test_packed_sequences_are_separate(told_by: str, full_layers: int) -> None:
    model = configure(build(), MobaConfig(4, 2, full_layers=full_layers))
    rows = [tokens(1, n, seed=n)[0] for n in (13, 1, 22, 4)]
    collate = DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=True)
    batch = collate([{"input_ids": ids.tolist()} for ids in rows])
    del batch["labels"]
    separate = torch.cat([logits(model, ids[None])[0] for ids in rows])
    if told_by == "position_ids":
        batch = {name: batch[name] for name in ("input_ids", "position_ids")}
    if told_by == "cu_seq_lens":  # positions that run through do not hide the boundaries
        batch["position_ids"] = torch.arange(40)[None]
        pieces = batch["cu_seq_lens_q"].tolist()
        shifted = [torch.arange(a, b)[None] for a, b in pairwise(pieces)]
        separate = torch.cat([logits(model, i[None], position_ids=p)[0] for i, p in zip(rows, shifted, strict=True)])
    torch.testing.assert_close(logits(model, batch.pop("input_ids"), **batch)[0], separate)


@pytest.mark.parametrize("full_layers", [0, 1], ids=["moba", "hybrid"])
@pytest.mark.parametrize("cuts", [([7, 13], [12, 8]), ([5, 4], [1, 8])], ids=["long", "short"])
def test_several_packed_rows(cuts: tuple[list[int], list[int]], full_layers: int) -> None:
    model = configure(build(), MobaConfig(4, 2, full_layers=full_layers))
    ids = tokens(2, sum(cuts[0]))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in cuts])
    packed = logits(model, ids, position_ids=positions)
    torch.testing.assert_close(logits(model, ids, position_ids=positions, use_cache=False), packed)
    for row, lengths in enumerate(cuts):
        separate = [logits(model, part[None])[0] for part in ids[row].split(lengths)]
        torch.testing.assert_close(packed[row], torch.cat(separate))


def test_positions_changed_in_place() -> None:
    """What is remembered about a tensor is forgotten when it changes."""
    model, ids, positions = configure(build(), SPARSE), tokens(1, 20), torch.arange(20)[None]
    whole = logits(model, ids, position_ids=positions)
    positions[:, 9:] -= 9
    packed = logits(model, ids, position_ids=positions)
    torch.testing.assert_close(packed[:, 9:], logits(model, ids[:, 9:]))
    assert not torch.allclose(packed, whole)


def test_settings_survive_saving(tmp_path: Any) -> None:
    hybrid = MobaConfig(4, 2, full_layers=(1,))
    model, ids = configure(build(), hybrid), tokens(1, 23)
    model.save_pretrained(tmp_path / "first")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    again.save_pretrained(tmp_path / "second")  # without a forward pass in between
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    for loaded in (again, third):
        assert loaded.config._attn_implementation == "moba"
        assert MobaConfig.from_dict(loaded.config.moba) == hybrid
        torch.testing.assert_close(logits(loaded, ids), logits(model, ids), rtol=0, atol=0)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "first", attn_implementation="sdpa")
    torch.testing.assert_close(logits(dense, ids), logits(configure(model, None), ids))
    model.save_pretrained(tmp_path / "full")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "full").config._attn_implementation == "sdpa"


def test_settings_from_the_configuration(tmp_path: Any) -> None:
    """The way Trainer scripts go: settings as arguments of `from_pretrained` or of the configuration."""
    model, ids = build(), tokens(1, 23)
    model.save_pretrained(tmp_path)
    sparse = logits(configure(model, SPARSE), ids)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="moba", moba={"block_size": 4, "top_k": 2}
    )
    torch.testing.assert_close(logits(loaded, ids), sparse)
    built = LlamaForCausalLM(LlamaConfig(**SIZES, moba={"block_size": 4, "top_k": 2}))
    built.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(built.eval(), ids), sparse)
    bare = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="moba")
    with pytest.raises(ValueError, match=r"configure\(model, MobaConfig"):
        logits(bare, ids)


def test_switching_in_the_middle_of_training() -> None:
    """MoBA, full, hybrid: each step's gradient is that of a fresh model in that setting."""
    model, ids = build().train(), tokens(2, 23)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = sorted(model.state_dict())
    for settings in (SPARSE, None, MobaConfig(4, 2, full_layers=1)):
        configure(model, settings)
        fresh = configure(build().train(), settings)
        fresh.load_state_dict(model.state_dict())
        for each in (model, fresh):
            each.zero_grad()
            each(ids, labels=ids).loss.backward()
        for mine, other in zip(model.parameters(), fresh.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad)
        optimizer.step()
    assert sorted(model.state_dict()) == names


@pytest.mark.parametrize("padded", [False, True])
def test_gradients_through_checkpointing_and_against_the_reference(padded: bool) -> None:
    ids = tokens(2, 23)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0 if padded else 1
    labels = ids.masked_fill(mask == 0, -100)
    gradients = {}
    for name, dtype in (("plain", torch.float32), ("checkpointed", torch.float32), ("oracle", torch.float64)):
        model = configure(build().to(dtype).train(), MobaConfig(4, 2, full_layers=(0,)))
        model.config.use_cache = False
        if name == "checkpointed":
            recompute_activations(model)
        model(ids, attention_mask=mask, labels=labels).loss.backward()
        gradients[name] = [p.grad for p in model.parameters()]
    for plain, checkpointed, oracle in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(plain, checkpointed)
        scale = oracle.abs().max()
        torch.testing.assert_close(plain.double() / scale, oracle / scale, rtol=1e-3, atol=1e-4)


# Dynamo looks at the .grad of inner tensors and hides torch's warning about it by a way that errors bypass.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("padded", [False, True])
def test_compiled_training_step(padded: bool) -> None:
    torch._dynamo.reset()
    model, ids = configure(build().train(), MobaConfig(4, 2, full_layers=1)), tokens(2, 23)
    model.config.use_cache = False
    mask = torch.ones_like(ids)
    mask[0, :5] = 0 if padded else 1
    labels = ids.masked_fill(mask == 0, -100)
    gradients = []
    for run in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        run(ids, attention_mask=mask, labels=labels).loss.backward()
        gradients.append([weight.grad for weight in model.parameters()])
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_autocast() -> None:
    model, ids = configure(build(), SPARSE), tokens(1, 23)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = logits(model, ids)
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


def test_unsupported_models() -> None:
    with pytest.raises(ValueError, match="sliding_window=None"):
        configure(build(MistralConfig(**SIZES, sliding_window=8)), SPARSE)
    mixed = Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    with pytest.raises(ValueError, match="sliding_attention"):
        configure(build(mixed), SPARSE)
    with pytest.raises(ValueError, match="3 layers"):
        configure(build(), MobaConfig(4, 2, full_layers=4))
    by_name = MistralConfig(**SIZES, sliding_window=8, moba={"block_size": 4, "top_k": 2})
    with pytest.raises(ValueError, match="sliding window"):
        AutoModelForCausalLM.from_config(by_name)


def test_unsupported_calls() -> None:
    model, ids = configure(build(), SPARSE), tokens(1, 8)
    with pytest.raises(ValueError, match="custom attention mask"):
        logits(model, ids, attention_mask=torch.ones(1, 1, 8, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="eager"):
        logits(model, ids, output_attentions=True)
    padded = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]])
    cu = torch.tensor([0, 8], dtype=torch.int32)
    with pytest.raises(ValueError, match="either padded or packed"):
        logits(model, ids, attention_mask=padded, cu_seq_lens_q=cu, cu_seq_lens_k=cu)
    dropping = configure(build(LlamaConfig(**SIZES, attention_dropout=0.1)), SPARSE)
    logits(dropping, ids)
    with pytest.raises(ValueError, match="attention_dropout=0, which some families call attn_pdrop"):
        dropping.train()(ids)
    with pytest.raises(ValueError, match="softcap"):
        model(ids, softcap=30.0)
    with pytest.raises(ValueError, match="causal"):
        model(ids, is_causal=False)
