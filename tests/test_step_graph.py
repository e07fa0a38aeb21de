"""Steps as CUDA graphs, as far as they show without a GPU: what is launched when, gradients, refusals, runs."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from decoders import QUIETLY, SIZES, build, losses, stacked, tokens  # noqa: E402
from tiny import Notes, tiny_config  # noqa: E402
from transformers import LlamaConfig, Trainer, TrainingArguments  # noqa: E402

from openmoba import MobaConfig  # noqa: E402
from openmoba.hf import configure, step_graph  # noqa: E402
from openmoba.hf.graphed_steps import GraphedSteps  # noqa: E402
from openmoba.hf.releases import recompute_activations  # noqa: E402
from openmoba.hf.step_graph import CaptureError, StepGraph, why_not  # noqa: E402
from openmoba.lab.arms import ArmConfig  # noqa: E402
from openmoba.lab.config import RunConfig, TrainConfig  # noqa: E402
from openmoba.lab.train import graphs  # noqa: E402
from openmoba.lab.train.run import run_training  # noqa: E402
from openmoba.records import disk  # noqa: E402


class Launches:
    """Counts the graphs that were captured, and how often one was launched."""

    made = 0
    launched = 0


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> type[Launches]:
    """Stands for a GPU: a graph does the work that was captured again, with and into the same tensors."""
    Launches.made = Launches.launched = 0

    def captured(run: Any, stream: Any) -> tuple[Any, Tensor]:
        step, loss = run.__self__, run()
        Launches.made += 1
        own = [None if p.grad is None else p.grad for p in step._parameters]

        def replay() -> None:
            Launches.launched += 1
            held = [p.grad for p in step._parameters]
            loss.copy_(run())
            for p, its, before in zip(step._parameters, own, held, strict=True):
                if its is not None:
                    its.copy_(p.grad)
                p.grad = before

        return SimpleNamespace(replay=replay), loss

    stream = SimpleNamespace(wait_stream=lambda _: None)
    monkeypatch.setattr(step_graph, "_captured", captured)
    for module in (step_graph, graphs):
        monkeypatch.setattr(module, "why_not", lambda *_: None)
    monkeypatch.setattr(step_graph, "_waiting_refused", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    fork = torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices=(): fork(devices=[]))
    return Launches


def small() -> Any:
    return configure(build(LlamaConfig(**SIZES, use_cache=False)), MobaConfig(4, 2)).train()


def batch(seed: int, rows: int = 2) -> dict[str, Tensor]:
    ids = tokens(rows, 13, seed)
    return {"input_ids": ids, "labels": ids}


def gradients(model: Any) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters()]


def plain(model: Any, *batches: dict[str, Tensor]) -> tuple[list[float], list[Tensor]]:
    """Losses, and the sum of the gradients, of the step itself."""
    model.zero_grad()
    losses = []
    for one in batches:
        loss = model(**one).loss
        loss.backward()
        losses.append(float(loss.detach()))
    found = gradients(model)
    model.zero_grad()
    return losses, found


def test_launches_add_the_gradients_of_their_batches(launches: type[Launches]) -> None:
    """One micro-batch, several, with and without gradients that are there already; the caller's tensors stay his."""
    model, batches = small(), [batch(seed) for seed in range(3)]
    losses, expected = plain(model, *batches)
    _, of_last = plain(model, batches[2])
    step = StepGraph(model, batches[0])
    assert all(p.grad is None for p in model.parameters()), "capturing leaves no gradients behind"
    found = [step(one) for one in batches]
    assert [float(x) for x in found] == losses
    for got, wanted in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(got, wanted)
    model.zero_grad()
    step(batches[2])
    assert all(map(torch.equal, gradients(model), of_last))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    step(batches[2])
    assert all(torch.equal(got, one + 1) for got, one in zip(gradients(model), of_last, strict=True))
    assert (launches.made, launches.launched) == (1, 1 + 5)


def test_gradients_there_before_are_kept_while_a_step_is_captured(launches: type[Launches]) -> None:
    model = small()
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    StepGraph(model, batch(0))
    assert all((p.grad == 3).all() for p in model.parameters())


def test_steps_of_another_kind_run_without_the_graph_and_say_so(launches: type[Launches]) -> None:
    model = small()
    step = StepGraph(model, batch(0))
    one = batch(1, rows=1)
    losses, expected = plain(model, one)
    with pytest.warns(UserWarning, match="runs without the graph"):
        assert float(step(one)) == losses[0]
    assert all(map(torch.equal, gradients(model), expected))
    model.zero_grad()
    step(one)  # said once
    changes = [lambda: configure(model, MobaConfig(4, 3)), model.eval, lambda: configure(model, None)]
    for change in changes:
        change()
        model.zero_grad()
        losses, expected = plain(model, batch(2))
        assert float(step(batch(2))) == losses[0]
        assert all(map(torch.equal, gradients(model), expected))
    assert launches.launched == 1
    configure(model.train(), MobaConfig(4, 2))
    step(batch(2))
    assert launches.launched == 2


def test_moved_or_frozen_weights_are_refused(launches: type[Launches]) -> None:
    model = small()
    step = StepGraph(model, batch(0))
    head = model.lm_head.weight
    head.requires_grad_(False)
    with pytest.raises(ValueError, match="moved, frozen or replaced"):
        step(batch(0))
    head.requires_grad_(True)
    step(batch(0))
    head.data = head.data.clone()
    with pytest.raises(ValueError, match="make a new StepGraph"):
        step(batch(0))


def test_what_cannot_be_captured_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "only GPUs have graphs" in str(why_not(small(), batch(0)))
    with pytest.raises(CaptureError, match="only GPUs have graphs"):
        StepGraph(small(), batch(0))
    assert "no parameter" in str(why_not(small().requires_grad_(False), batch(0)))
    with pytest.raises(CaptureError, match="no table of tensors by the names that the model takes, but a NoneType"):
        StepGraph(small(), None)
    elsewhere = {"input_ids": torch.zeros(1, 4, device="meta")}
    assert why_not(small(), elsewhere) == "model and batch are on cpu and meta"
    model = small()
    recompute_activations(model)
    assert "computed again" in str(why_not(model, batch(0)))
    model = small()
    model.lm_head.weight.register_hook(lambda gradient: gradient)
    assert "hooks" in str(why_not(model, batch(0)))
    model = small()
    model.config.layerdrop = 0.1
    assert "layerdrop" in str(why_not(model, batch(0)))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert "several processes" in str(why_not(small(), batch(0)))


def test_a_step_that_depends_on_more_than_its_batch_is_refused(launches: type[Launches]) -> None:
    """The first launch, on other tokens than were captured, is compared with the step itself."""
    model, calls = small(), []

    def changing(**given: Tensor) -> Tensor:
        calls.append(None)
        return model(**given).loss * len(calls)

    with pytest.raises(CaptureError, match="depends on more than its batch"):
        StepGraph(model, batch(0), changing)


def test_a_launch_that_gives_something_else_is_refused() -> None:
    expected = torch.tensor([2.0, 1.0, 0.1, -1.0])  # a loss, two norms, and a parameter without gradient
    step_graph._compare(expected * 1.0005, expected)
    step_graph._compare(expected + torch.tensor([0.0, 0.01, 0.0, 0.0]), expected)
    step_graph._compare(expected * float("nan"), expected * float("nan"))
    for place, by in ((0, 0.01), (1, 0.1), (2, 0.1), (3, 1.0), (0, float("nan"))):
        wrong = expected.clone()
        wrong[place] += by
        with pytest.raises(CaptureError, match="launched as a graph it gave a loss of"):
            step_graph._compare(wrong, expected)


@pytest.mark.parametrize("ended", [False, True])
def test_a_capture_that_fails_says_what_failed_first_and_gives_its_memory_back(
    monkeypatch: pytest.MonkeyPatch, ended: bool
) -> None:
    """torch's own error at the end of a failed capture says nothing, and leaves its allocator in the capture.

    Workspaces of products that were there before are no graph's, and those that were made in it are no other's.
    """
    calls: list[Any] = []

    class Capture:
        def __init__(
            self, graph: Any, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"
        ) -> None:
            self.pool = pool

        def __enter__(self) -> None:
            calls.append("begin" if self.pool else "begin another")

        def __exit__(self, *_: Any) -> None:
            if self.pool and not ended:
                raise RuntimeError("operation failed due to a previous error during capture")

    def end(device: int, pool: Any) -> None:
        if ended:
            raise RuntimeError("not currently recording")
        calls.append(("end", device, pool))

    def run() -> Tensor:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda size, device: zeros(size))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: calls.append("clear"), raising=False)
    release = lambda *of: calls.append(("release", *of))  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_releasePool", release, raising=False)
    monkeypatch.setattr(step_graph, "_abandoned", [])
    said = r"^capturing it failed: RuntimeError: operation not permitted when stream is capturing; one cause"
    with pytest.raises(CaptureError, match=said):
        step_graph._captured(run, SimpleNamespace(device_index=3))
    mended = [("end", 3, "pool"), ("release", 3, "pool"), "begin another"]
    assert calls == ["clear", "begin", "clear", *([] if ended else mended)]
    assert len(step_graph._abandoned) == (0 if ended else 1)


def test_waiting_is_an_error_while_it_is_looked_for_and_other_errors_stay_what_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modes: list[Any] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with pytest.raises(CaptureError, match="as it does for attention_mask"), step_graph._waiting_refused():
        raise RuntimeError("called a synchronizing CUDA operation")
    with pytest.raises(RuntimeError, match="another") as other, step_graph._waiting_refused():
        raise RuntimeError("another")
    assert not isinstance(other.value, CaptureError)
    assert modes == ["error", 1, "error", 1]


# Trainer.


class Graphed(GraphedSteps, Trainer):
    """What a user writes."""


def trained(kind: Any, rows: int, **settings: Any) -> tuple[list[float], Any]:
    model = small()
    data = [{name: x[0].tolist() for name, x in batch(seed, 1).items()} for seed in range(rows)]
    settings |= QUIETLY | {"num_train_epochs": 1, "per_device_train_batch_size": 2}
    trainer = kind(model, TrainingArguments(mkdtemp(), **settings), data_collator=stacked, train_dataset=data)
    trainer.train()
    return losses(trainer), model


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.filterwarnings("ignore:a batch of another shape:UserWarning")
def test_trainer_with_graphed_steps_trains_the_same(launches: type[Launches], accumulated: int) -> None:
    """Seven rows: the last batch has one, and the last step with two micro-batches has them both."""
    expected, model = trained(Trainer, 7, gradient_accumulation_steps=accumulated)
    found, graphed = trained(Graphed, 7, gradient_accumulation_steps=accumulated)
    assert found == pytest.approx(expected, rel=1e-6)
    for one, other in zip(model.parameters(), graphed.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert (launches.made, launches.launched) == (1, 1 + 3)


# Runs of the laboratory.


def run(config: RunConfig, folder: Path) -> tuple[dict[str, Any], list[float], list[str]]:
    progress = Notes()
    result = run_training(config, folder, progress=progress)
    losses = [row["loss"] for row in disk.read(folder / "metrics.jsonl") if row["kind"] == "train"]
    return result, [*losses, result["eval"]["lm_loss"]], progress.notes


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A run whose attention changes halfway, with two micro-batches a step and evaluations between steps."""
    plain = tiny_config(tmp_path)
    arm = ArmConfig("time_hybrid", block_size=8, top_k=2, switch_at=0.5)
    return replace(
        plain,
        arm=arm,
        train=replace(plain.train, steps=4, batch_size=2, micro_batch_size=1, log_every=1, checkpoint_every=4),
        eval=replace(plain.eval, every=2),
    )


@pytest.mark.parametrize("loss_tokens", [None, 5])
def test_a_run_of_graphs_has_the_losses_of_one_without(
    config: RunConfig,
    launches: type[Launches],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    loss_tokens: int | None,
) -> None:
    """Each attention has a graph, in the trial and in training; no launch is left out and none too many."""
    config = replace(config, train=replace(config.train, loss_tokens=loss_tokens))
    result, expected, notes = run(config, tmp_path / "plain")
    assert (result["graphed"], launches.made) == (False, 0)
    assert not any("CUDA graph" in note for note in notes)
    monkeypatch.setattr("openmoba.lab.train.trainer.wanted", lambda *_: True)
    result, found, notes = run(config, tmp_path / "graphed")
    assert found == pytest.approx(expected, rel=1e-6)
    assert result["graphed"]
    assert any("a micro-batch is one CUDA graph, captured in" in note for note in notes)
    assert (launches.made, launches.launched) == (2 + 2, 4 + 2 + 4 * 2)


@pytest.mark.parametrize(
    ("error", "said"),
    [(CaptureError("it waits"), "it waits"), (torch.OutOfMemoryError("no"), "there is no memory for it")],
)
def test_where_no_graph_can_be_had_the_run_says_why_and_goes_on(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def refuse(*_: Any) -> None:
        raise error

    _, expected, _ = run(config, tmp_path / "plain")
    monkeypatch.setattr("openmoba.lab.train.trainer.wanted", lambda *_: True)
    monkeypatch.setattr(graphs, "why_not", lambda *_: None)
    monkeypatch.setattr(graphs, "StepGraph", refuse)
    result, found, notes = run(config, tmp_path / "refused")
    assert found == expected
    assert not result["graphed"]
    lines = [note for note in notes if "CUDA graph" in note]
    assert lines == [f"a step is launched kernel by kernel, not as a CUDA graph: {said} (train.compile=auto)"]


def test_a_graph_that_leaves_no_memory_for_evaluation_is_given_up(
    config: RunConfig, launches: type[Launches], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from openmoba.lab.train import trainer

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("full")

    _, expected, _ = run(config, tmp_path / "plain")
    monkeypatch.setattr(trainer, "wanted", lambda *_: True)
    monkeypatch.setattr(trainer, "window_losses", full)
    result, found, notes = run(config, tmp_path / "full")
    assert found == expected
    assert (result["graphed"], launches.made) == (False, 1)
    assert any("no memory for it beside evaluation" in note for note in notes)


def test_which_runs_want_graphs_and_which_cannot_have_them() -> None:
    config = RunConfig()
    assert graphs.wanted(config, "cuda")
    assert not graphs.wanted(config, "cpu")
    for setting in ("layers", "off"):
        assert not graphs.wanted(RunConfig(train=TrainConfig(compile=setting)), "cuda")  # type: ignore[arg-type]
    assert graphs.reason_against(config, small(), conversations=False) == why_not(small(), {})
    assert "conversations" in str(graphs.reason_against(config, small(), conversations=True))
    sharded = RunConfig(train=TrainConfig(fsdp=True))
    assert "train.fsdp gathers" in str(graphs.reason_against(sharded, small(), conversations=False))
