"""Steps as CUDA graphs on a card: the same training as without, what is refused there, and what a refusal leaves."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from test_step_graph import Graphed, run  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402

from openmoba import MobaConfig  # noqa: E402
from openmoba.bench.machine import Machine  # noqa: E402
from openmoba.bench.training import measure  # noqa: E402
from openmoba.bench.training.cases import TrainingCase  # noqa: E402
from openmoba.hf import configure  # noqa: E402
from openmoba.hf.step_graph import CaptureError, StepGraph  # noqa: E402
from openmoba.lab.arms import ArmConfig  # noqa: E402
from openmoba.lab.config import DataConfig, EvalConfig, ModelConfig, RunConfig, TrainConfig  # noqa: E402
from openmoba.lab.measure.evaluate import autocast  # noqa: E402
from openmoba.lab.model.build import build_model, set_attention  # noqa: E402
from openmoba.lab.model.compile import compile_layers  # noqa: E402
from openmoba.lab.model.loss import attach_loss  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),  # of the compiler about its own code
]

CARD = torch.device("cuda")
LENGTH, VOCABULARY = 2048, 512
ATTENTIONS = {
    "full": None,
    "moba": MobaConfig(128, 3),
    "hybrid": MobaConfig(128, 3, full_layers=1),
    "key_conv": MobaConfig(128, 3, key_conv=4),
    "sorted": MobaConfig(16, 18),  # lists so many that the plan is made by a sort
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def decoder(attention: MobaConfig | None, compiled: bool) -> Any:
    """A model of two million parameters with the laboratory's loss."""
    with CARD:
        model = build_model(ModelConfig(size="2m"), VOCABULARY, LENGTH, seed=0)
    set_attention(model, attention)
    attach_loss(model)
    if compiled:
        compile_layers(model)
    return model.train()


def batches(count: int) -> list[dict[str, Any]]:
    """Windows of a few of the tokens, which is soon learned, and labels of all positions."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        ids_BT = torch.randint(16, (1, LENGTH + 1), generator=generator).to(CARD)
        count_of_labels = torch.tensor(2 * LENGTH, device=CARD)
        inputs = {"input_ids": ids_BT[:, :-1].contiguous(), "labels": ids_BT[:, 1:].contiguous()}
        made.append({**inputs, "count": count_of_labels, "places": slice(None)})
    return made


def forward(model: Any) -> Callable[..., Tensor]:
    def loss(**batch: Any) -> Tensor:
        with autocast(CARD, True):
            found: Tensor = model(**batch)
        return found

    return loss


def train(model: Any, accumulated: int, graphed: bool, steps: int = 5) -> tuple[list[float], list[Tensor]]:
    """Losses of every micro-batch and the weights, after clipped steps of AdamW."""
    data = batches(steps * accumulated)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    loss_of = forward(model)
    graph = StepGraph(model, data[0], loss_of) if graphed else None
    losses = []
    for step in range(steps):
        for batch in data[step * accumulated : (step + 1) * accumulated]:
            if graph is None:
                loss = loss_of(**batch)
                loss.backward()
                losses.append(loss.detach())
            else:
                losses.append(graph(batch))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses).tolist(), [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "layers"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_graphed_steps_train_as_others_do(attention: str, compiled: bool, accumulated: int) -> None:
    """The same kernels on the same numbers; libraries whose sums vary in order move AdamW's smallest steps."""
    settings = ATTENTIONS[attention]
    losses, weights = train(decoder(settings, compiled), accumulated, graphed=False)
    found, graphed = train(decoder(settings, compiled), accumulated, graphed=True)
    assert losses[-1] < losses[0], "the steps change something"
    assert found == pytest.approx(losses, rel=5e-3)
    apart = torch.stack([(a - b).norm() for a, b in zip(graphed, weights, strict=True)]).norm()
    start = [p.detach() for p in decoder(settings, False).parameters()]
    moved = torch.stack([(a - b).norm() for a, b in zip(weights, start, strict=True)]).norm()
    assert apart < 0.3 * moved, f"{float(apart)} apart after moving by {float(moved)}"


def test_launches_give_the_losses_of_their_batches_and_keep_their_memory(no_waiting: Any) -> None:
    """Launches wait for nothing, and take no more memory than the first."""
    model, data = decoder(ATTENTIONS["moba"], False), batches(3)
    loss_of = forward(model)
    with torch.no_grad():
        expected = [float(loss_of(**batch)) for batch in data]
    step = StepGraph(model, data[0], loss_of)
    found = [step(batch) for batch in data]
    assert [float(x) for x in found] == pytest.approx(expected, rel=1e-5)
    model.zero_grad()
    taken = torch.cuda.memory_allocated()
    with no_waiting():
        for batch in data:
            step(batch)
            model.zero_grad()
    assert torch.cuda.memory_allocated() == taken


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "layers"])
def test_evaluation_between_launches_leaves_them_alone(compiled: bool) -> None:
    """Other shapes, without gradients and in evaluation mode, with the same compiled layers."""
    model, data = decoder(ATTENTIONS["moba"], compiled), batches(2)
    loss_of = forward(model)
    step = StepGraph(model, data[0], loss_of)
    before = float(step(data[1]))
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.eval()
    with torch.no_grad(), autocast(CARD, True):
        model(input_ids=data[0]["input_ids"].repeat(3, 1), labels=data[0]["labels"].repeat(3, 1))
    model.train()
    assert float(step(data[1])) == pytest.approx(before, rel=1e-6)
    for p, expected in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))


def test_another_graph_takes_the_memory_of_the_one_before() -> None:
    """As when a run's attention changes; products' workspaces, one for each stream, stay with nobody."""
    model, (batch,) = decoder(ATTENTIONS["moba"], False), batches(1)
    loss_of, kept = forward(model), []
    for _ in range(3):
        step = StepGraph(model, batch, loss_of)
        step(batch)
        model.zero_grad()
        kept.append(torch.cuda.memory_reserved())
        del step
    assert kept[2] <= kept[1]


def test_forgotten_workspaces_change_no_launch() -> None:
    """torch is told to forget them by others' graphs; their memory is somebody else's then."""
    model, data = decoder(ATTENTIONS["moba"], False), batches(2)
    step = StepGraph(model, data[0], forward(model))
    expected = float(step(data[1]))
    norms = torch.stack([p.grad.norm() for p in model.parameters()])
    model.zero_grad()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    others = [torch.full((2**22,), float("nan"), device=CARD) for _ in range(64)]
    assert float(step(data[1])) == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(torch.stack([p.grad.norm() for p in model.parameters()]), norms, rtol=1e-2, atol=1e-6)
    assert all(x.isnan().all() for x in others), "and a launch writes to nobody's memory"


def config(folder: Path, compile: str, arm: ArmConfig, **train: Any) -> RunConfig:
    (folder / "texts").mkdir(exist_ok=True)
    for number in range(6):
        text = "".join(f"{i} times {number} is {i * number}, " for i in range(600))
        (folder / "texts" / f"{number}.txt").write_text(text)
    settings = {"steps": 8, "batch_size": 2, "micro_batch_size": 1, "log_every": 1, "checkpoint_every": 4} | train
    return RunConfig(
        data=DataConfig(str(folder / "texts"), hold_out=3, tokenizer="bytes", length=2048, cache=str(folder / "c")),
        model=ModelConfig(size="2m"),
        arm=arm,
        train=TrainConfig(compile=compile, **settings),  # type: ignore[arg-type]
        eval=EvalConfig(windows=3, every=4, batch_size=2),
    )


@pytest.mark.parametrize("loss_tokens", [None, 256])
@pytest.mark.parametrize("arm", [ArmConfig("moba", 128, 3), ArmConfig("time_hybrid", 128, 3, switch_at=0.5)])
def test_a_run_is_graphed_by_default_and_trains_the_same(
    arm: ArmConfig, loss_tokens: int | None, tmp_path: Path
) -> None:
    """With evaluations between, and for a time-wise hybrid another graph from the switch on."""
    _, expected, notes = run(config(tmp_path, "layers", arm, loss_tokens=loss_tokens), tmp_path / "plain")
    assert not any("CUDA graph" in note for note in notes)
    result, found, notes = run(config(tmp_path, "auto", arm, loss_tokens=loss_tokens), tmp_path / "graphed")
    assert result["graphed"], notes
    assert [note for note in notes if "a micro-batch is one CUDA graph, captured in" in note], notes
    assert found == pytest.approx(expected, rel=1e-2)


def test_a_graphed_run_goes_on_after_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from openmoba.lab.errors import Terminated
    from openmoba.lab.train.trainer import RunTrainer

    arm = ArmConfig("moba", 128, 3)
    _, expected, _ = run(config(tmp_path, "auto", arm), tmp_path / "whole")
    with monkeypatch.context() as patch:

        def stop(trainer: RunTrainer, agreeing: bool) -> bool:
            trainer.stopping = trainer.state.global_step == 5
            return trainer.stopping

        patch.setattr(RunTrainer, "must_stop", stop)
        with pytest.raises(Terminated):
            run(config(tmp_path, "auto", arm), tmp_path / "stopped")
    result, found, _ = run(config(tmp_path, "auto", arm), tmp_path / "stopped")
    assert result["graphed"]
    assert found == pytest.approx(expected, rel=1e-2)


def test_runs_that_cannot_have_a_graph_say_why(tmp_path: Path) -> None:
    settings = config(tmp_path, "auto", ArmConfig("moba", 128, 3), gradient_checkpointing=True)
    result, _, notes = run(settings, tmp_path / "checkpointed")
    assert not result["graphed"]
    assert [note for note in notes if "not as a CUDA graph: activations are computed again" in note], notes


def transformers_run(kind: Any, **settings: Any) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of transformers' Trainer on rows of one length, with its own loss."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        use_cache=False,
    )
    model = configure(LlamaForCausalLM(shape), MobaConfig(128, 3, full_layers=1))
    data = [{"input_ids": batch["input_ids"][0].tolist()} for batch in batches(8)]

    def stack(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": ids, "labels": ids}

    arguments = TrainingArguments(
        output_dir=mkdtemp(),
        max_steps=4,
        per_device_train_batch_size=1,
        logging_steps=1,
        bf16=True,
        learning_rate=1e-3,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **settings,
    )
    trainer = kind(model, arguments, data_collator=stack, train_dataset=data)
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    return [row["loss"] for row in logs], [row["grad_norm"] for row in logs]


@pytest.mark.parametrize("accumulated", [1, 2])
def test_trainer_of_a_user_with_graphed_steps(accumulated: int) -> None:
    expected, norms = transformers_run(Trainer, gradient_accumulation_steps=accumulated)
    found, graphed = transformers_run(Graphed, gradient_accumulation_steps=accumulated)
    assert found == pytest.approx(expected, rel=5e-3)
    assert graphed == pytest.approx(norms, rel=5e-2)


def test_trainer_of_a_user_with_the_ordinary_switch() -> None:
    """`torch_compile_mode="reduce-overhead"`: inductor's own CUDA graphs around the whole model."""
    expected, norms = transformers_run(Trainer)
    found, graphed = transformers_run(Trainer, torch_compile=True, torch_compile_mode="reduce-overhead")
    assert found == pytest.approx(expected, rel=5e-3)
    assert graphed == pytest.approx(norms, rel=5e-2)


def test_a_row_of_the_benchmark_says_that_steps_were_graphs() -> None:
    machine = Machine(CARD, "c")
    for kind in ("loop", "trainer"):
        case = TrainingCase("2m", 1, 128, 3, tokens=4096, layers="graphed", kind=kind)
        row = measure.measure_case(case, machine, 1.0)
        assert row.error is None, row.error
        assert row.graphs >= 2
        assert row.tokens_per_second > 0
        assert 0 < row.busy_ms < 2 * row.p50_ms
        assert row.attention_kernel is not None, "kernels inside a graph are seen"
        plain = measure.measure_case(TrainingCase("2m", 1, 128, 3, tokens=4096), machine, 1.0)
        # The plain row holds products' workspaces beside, some 30 MB.
        assert row.peak_mb > 0.9 * plain.peak_mb, "activations inside a graph are counted"


# Refusals come last: what they leave has to be as before, and a fault there would show in no other test.


def test_steps_that_wait_are_refused_before_they_are_captured() -> None:
    model, (batch,) = decoder(ATTENTIONS["moba"], False), batches(1)
    loss_of = forward(model)

    def looking(**given: Any) -> Tensor:
        loss = loss_of(**given)
        return loss if loss.item() > 0 else loss * 2

    with pytest.raises(CaptureError, match="waits for the device"):
        StepGraph(model, batch, looking)
    packed = {**batch, "position_ids": torch.arange(LENGTH, device=CARD).remainder(700)[None]}
    with pytest.raises(CaptureError, match="position_ids"):
        StepGraph(model, packed, loss_of)
    assert torch.cuda.get_sync_debug_mode() == 0
    assert all(p.grad is None for p in model.parameters())
    assert float(StepGraph(model, batch, loss_of)(batch)) > 0


def test_a_step_that_depends_on_more_than_its_batch_is_refused() -> None:
    model, (batch,) = decoder(ATTENTIONS["moba"], False), batches(1)
    loss_of, calls = forward(model), []

    def changing(**given: Any) -> Tensor:
        calls.append(None)
        return loss_of(**given) * len(calls)

    with pytest.raises(CaptureError, match="launched as a graph it gave a loss of"):
        StepGraph(model, batch, changing)


def test_a_capture_that_fails_leaves_everything_usable() -> None:
    """Waiting that no check sees beforehand breaks the capture itself: an error, its memory back, and another one."""
    model, (batch,) = decoder(ATTENTIONS["moba"], False), batches(1)
    loss_of = forward(model)
    expected = float(loss_of(**batch).detach())

    def waiting(**given: Any) -> Tensor:
        loss = loss_of(**given)
        torch.cuda.synchronize()
        return loss

    kept = []
    for _ in range(3):
        with pytest.raises(CaptureError, match="capturing it failed"):
            StepGraph(model, batch, waiting)
        gc.collect()
        torch.cuda.empty_cache()
        kept.append(torch.cuda.memory_reserved())
    assert kept[0] == kept[1] == kept[2], "a failure leaves no memory behind"
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    loss = loss_of(**batch)
    loss.backward()
    loss = loss.detach()  # kept with its graph it would break the next capture, as the error says
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    model.zero_grad()
    assert torch.rand(3, device=CARD).isfinite().all()
    assert float(StepGraph(model, batch, loss_of)(batch)) == pytest.approx(expected, rel=1e-6)
