"""Compiled layers in the laboratory: the same loss, one graph for a kind of layer, and what happens if it fails."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from tiny import Notes

from openmoba.lab.arms import ArmConfig
from openmoba.lab.config import DataConfig, EvalConfig, ModelConfig, RunConfig, TrainConfig
from openmoba.lab.model import compile as lab_compile
from openmoba.lab.train.run import run_training
from openmoba.records import disk

# Dynamo looks at the .grad of inner tensors and hides torch's warning about it by a way that errors bypass.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture(autouse=True)
def eager_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are captured and differentiated as always, but not turned into machine code, which takes minutes here."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch.nn.Module, "compile", _compile_without_code)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


_compile = torch.nn.Module.compile


def _compile_without_code(module: Any, **options: Any) -> None:
    _compile(module, backend="aot_eager", **options)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    text = "".join(f"line {i} says {i * i % 97}\n" for i in range(400))
    for name in ("train", "valid"):
        (tmp_path / f"{name}.txt").write_text(text + name)
    data = DataConfig(
        source=str(tmp_path / "train.txt"), valid=str(tmp_path / "valid.txt"), tokenizer="bytes", length=64
    )
    return RunConfig(
        replace(data, cache=str(tmp_path / "cache")),
        ModelConfig(size="nano"),
        ArmConfig(name="time_hybrid", block_size=8, top_k=2, switch_at=0.5),
        TrainConfig(steps=4, batch_size=2, log_every=2, checkpoint_every=4, compile="off"),
        EvalConfig(windows=3, batch_size=2),
    )


def train(config: RunConfig, folder: Path, compile: str) -> tuple[dict[str, Any], list[str], list[float]]:
    progress = Notes()
    settings = replace(config, train=replace(config.train, compile=compile))
    result = run_training(settings, folder, progress=progress)
    losses = [row["loss"] for row in disk.read(folder / "metrics.jsonl") if row["kind"] == "train"]
    return result, progress.notes, losses


def test_compiled_and_eager_runs_have_the_same_loss(config: RunConfig, tmp_path: Path) -> None:
    """Both attentions of a time-wise hybrid, and both sizes of batches in evaluation."""
    _, notes, eager = train(config, tmp_path / "eager", "off")
    assert not any("layers compiled" in note for note in notes)
    torch._dynamo.utils.counters.clear()
    result, notes, compiled = train(config, tmp_path / "layers", "layers")
    assert any("layers compiled in" in note for note in notes)
    assert compiled == pytest.approx(eager, rel=1e-5)
    # With either attention, training and two sizes of batches in evaluation; and the loss.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2 * 3 + 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert result["compiled"]


def test_a_failure_to_compile_is_a_line_and_an_eager_run(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(module: Any, **_: Any) -> None:
        def call(*_: Any, **__: Any) -> None:
            raise RuntimeError("no compiler here\nand more lines")

        module._compiled_call_impl = call

    _, _, eager = train(config, tmp_path / "eager", "off")
    monkeypatch.setattr(torch.nn.Module, "compile", fail)
    result, notes, losses = train(config, tmp_path / "layers", "layers")
    assert [note for note in notes if "RuntimeError: no compiler here" in note and "run eagerly" in note]
    assert losses == eager
    assert not result["compiled"]


class Layer(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def test_more_graphs_than_are_kept_are_no_silent_eager_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    layers = [Layer(4), Layer(5)]
    monkeypatch.setattr(lab_compile, "decoder_layers", lambda model: layers)

    def try_out() -> None:
        for layer in layers:
            layer(torch.zeros(len(layer.weight)))

    problem = lab_compile.compile_or_stay_eager(torch.nn.Module(), try_out)
    assert problem is not None
    assert "limit" in problem
    assert all(layer._compiled_call_impl is None for layer in layers)


def test_graphs_of_models_before_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A study trains one model after another in one process."""
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    for layer in (Layer(4), Layer(5), Layer(6)):
        monkeypatch.setattr(lab_compile, "decoder_layers", lambda model, layer=layer: [layer])
        try_out = partial(layer, torch.zeros(len(layer.weight)))
        assert lab_compile.compile_or_stay_eager(torch.nn.Module(), try_out) is None
