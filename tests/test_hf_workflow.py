"""From a checkpoint to MoBA and back to text: converting, continued training, generating."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from decoders import LAYERS, QUIETLY, build, logits, losses, save_model  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithFlattening,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
    Trainer,
    TrainingArguments,
)

from openmoba import MobaConfig  # noqa: E402
from openmoba.cli import main  # noqa: E402
from openmoba.hf import configure  # noqa: E402
from openmoba.hf.releases import CHECKPOINTING  # noqa: E402
from openmoba.lab.data.tokenizer import byte_tokenizer  # noqa: E402


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config, MistralConfig])
def test_convert(kind: Any, tmp_path: Path, capsys: Any) -> None:
    model = save_model(tmp_path / "full", kind, **({"sliding_window": None} if kind is MistralConfig else {}))
    arguments = ["--block-size", "4", "--top-k", "2", "--full-layers", "last:1"]
    assert main(["convert", str(tmp_path / "full"), str(tmp_path / "moba"), *arguments]) == 0
    assert "from_pretrained" in capsys.readouterr().out
    ids = torch.arange(40)[None]
    full = logits(model, ids)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "moba")
    assert converted.config._attn_implementation == "moba"
    configure(model, MobaConfig(4, 2, full_layers=1))
    torch.testing.assert_close(logits(converted, ids), logits(model, ids), rtol=0, atol=0)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "moba", attn_implementation="sdpa")
    torch.testing.assert_close(logits(dense, ids), full)
    assert AutoTokenizer.from_pretrained(tmp_path / "moba").decode(ids[0]) == byte_tokenizer().decode(ids[0])


def test_convert_refuses(tmp_path: Path, capsys: Any) -> None:
    save_model(tmp_path / "windowed", MistralConfig, sliding_window=8)
    save_model(tmp_path / "full")
    (tmp_path / "taken").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "unread").mkdir()
    (tmp_path / "unread" / "model.safetensors").touch()
    blocks = ["--block-size", "4", "--top-k", "2"]
    for value in ("nan", "inf"):
        model = save_model(tmp_path / value)
        model.model.layers[1].self_attn.k_proj.weight.data[3, 5] = float(value)
        model.bfloat16().save_pretrained(tmp_path / value)
    for name in ("shard", "index"):
        build().save_pretrained(tmp_path / name, max_shard_size="60KB")
    (tmp_path / "shard" / "model-00001-of-00004.safetensors").unlink()
    (tmp_path / "index" / "model.safetensors.index.json").write_text("{}")
    cases = [
        (["shard", "out"], "shard lacks model-00001-of-00004.safetensors, of 4 files of weights; download it again"),
        (["index", "out"], "index.json is no index of weights; restore or download it again"),
        (["nan", "out"], "1 of 1,152 numbers of model.layers.1.self_attn.k_proj.weight are NaN or infinite; restore"),
        (["inf", "out"], "1 of 1,152 numbers of model.layers.1.self_attn.k_proj.weight are"),
        (["windowed", "out"], "sliding_window=None"),
        (["full", "taken"], "exists"),
        (["bare", "out"], "no safetensors"),
        (["unread", "out"], "no config.json"),
        (["full", "out", "--full-layers", "9"], f"{LAYERS} layers"),
        (["full", "out", "--full-layers", "middle:9"], "last:COUNT"),
    ]
    for (source, out, *options), message in cases:
        assert main(["convert", str(tmp_path / source), str(tmp_path / out), *blocks, *options]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_continued_training_with_packing(tmp_path: Path) -> None:
    """A plain Trainer script: attn_implementation="moba", sequences packed without padding."""
    torch.manual_seed(0)
    save_model(tmp_path / "full")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "full", attn_implementation="moba", moba={"block_size": 4, "top_k": 2, "full_layers": 1}
    )
    text = byte_tokenizer()("the quick brown fox jumps over the lazy dog, and the dog sleeps on.")["input_ids"]
    rows = [{"input_ids": text[: 20 + 3 * i]} for i in range(16)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=4,
        max_steps=12,
        learning_rate=3e-3,
        **QUIETLY,
    )
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collate)
    trainer.train()
    first, *_, last = losses(trainer)
    assert last < 0.8 * first
    trainer.save_model(tmp_path / "trained")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert again.config.moba == {"block_size": 4, "top_k": 2, "full_layers": 1}


def test_fine_tuning_with_trl(tmp_path: Path) -> None:
    """SFTTrainer with its own packing: the loss is that of the same rows padded."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    save_model(tmp_path / "full")
    rows = Dataset.from_dict({"text": ["the quick brown fox jumps over the lazy dog " * 3] * 8})
    found = {}
    for packing in (True, False):
        arguments = SFTConfig(
            output_dir=str(tmp_path / "run"),
            model_init_kwargs={"attn_implementation": "moba", "moba": {"block_size": 8, "top_k": 2}},
            packing=packing,
            max_length=200,
            max_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            **{CHECKPOINTING: False},
            bf16=False,
            **QUIETLY,
        )
        trainer = SFTTrainer(str(tmp_path / "full"), args=arguments, train_dataset=rows)
        trainer.train()
        assert trainer.model.config._attn_implementation == "moba"
        found[packing] = losses(trainer)
    assert found[True] == pytest.approx(found[False], rel=1e-4)
    assert found[True][1] < found[True][0]


def test_generate_command(tmp_path: Path, capsys: Any) -> None:
    model = save_model(tmp_path / "model")
    configure(model, MobaConfig(4, 2)).save_pretrained(tmp_path / "model")
    (tmp_path / "prompt.txt").write_text("def generate(self):\n")
    options = ["--file", str(tmp_path / "prompt.txt"), "--max-new-tokens", "9"]
    assert main(["generate", str(tmp_path / "model"), *options]) == 0
    printed = capsys.readouterr()
    tokenizer = byte_tokenizer()
    ids = tokenizer("def generate(self):\n", return_tensors="pt")["input_ids"]
    for _ in range(9):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], 1)
    assert printed.out.rstrip("\n") == tokenizer.decode(ids[0, 20:], skip_special_tokens=True).rstrip("\n")
    assert "prompt 20 tokens" in printed.err
    assert "tokens/s" in printed.err
    chunked = [*options, "--prefill-chunk", "7"]
    assert main(["generate", str(tmp_path / "model"), *chunked]) == 0
    assert capsys.readouterr().out == printed.out
    assert main(["generate", str(tmp_path / "model"), "--prompt", ""]) == 2
    assert "no tokens" in capsys.readouterr().err
    assert main(["generate", str(tmp_path / "nothing"), "--prompt", "x"]) == 2
