"""Two ways to make training steps: the laboratory's loop bare, and `transformers.Trainer` as `openmoba train` uses it.

Both train a model with random weights on random tokens: what a step costs does not depend on what is learned, but
tokens must differ, since equal keys would all be chosen by the same rule of ties.
"""

# B windows, T tokens

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from openmoba.bench.training.cases import TrainingCase
from openmoba.hf.releases import recompute_activations
from openmoba.hf.step_graph import StepGraph
from openmoba.lab.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from openmoba.lab.data.load import Data
from openmoba.lab.data.store import TokenStore
from openmoba.lab.data.windows import cut_windows
from openmoba.lab.measure.compute import PFLOPS_DAY, Shape, training_compute
from openmoba.lab.measure.evaluate import autocast
from openmoba.lab.model.build import build_model, set_attention
from openmoba.lab.model.compile import compile_layers
from openmoba.lab.model.loss import attach_loss
from openmoba.lab.progress import Progress

# Low enough for every size to stay finite on tokens that cannot be learned.
LEARNING_RATE = 1e-4
_WINDOWS = 16


class Loop(Protocol):
    """A model in training."""

    model: Any

    def run(self, watch: Iterator[None]) -> None:
        """Make one step for every item of `watch`, which is asked for one more before each step."""

    def loss(self) -> float | None:
        """Return the last step's loss in nats per token, where the loop has it; ValueError if it is not finite."""


class BareLoop:
    """Forward, backward, clipping, optimizer."""

    def __init__(self, case: TrainingCase, device: torch.device) -> None:
        self.case, self.device = case, device
        self.model = _model(case, device)
        attach_loss(self.model)
        if case.checkpointing:
            recompute_activations(self.model)
        if case.layers != "eager":
            compile_layers(self.model)  # after the loss is attached, which calls the model
        settings = _settings(case)
        self.clip = settings.clip
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.give(case.tokens)

    def give(self, tokens: int) -> None:
        """Train on windows of `tokens` from now on."""
        generator = torch.Generator().manual_seed(0)
        ids_BT = torch.randint(self.case.vocabulary, (self.case.batch, tokens + 1), generator=generator).to(self.device)
        self.windows = {"input_ids": ids_BT[:, :-1].contiguous(), "labels": ids_BT[:, 1:].contiguous()}
        self.count = torch.tensor(self.case.batch * tokens, device=self.device)
        self._graph: StepGraph | None = None

    def run(self, watch: Iterator[None]) -> None:
        for _ in watch:
            self.step()

    def step(self) -> None:
        """Make one step."""
        batch = {**self.windows, "count": self.count, "places": slice(None)}  # every label counts
        if self.case.layers == "graphed":
            self._graph = self._graph or StepGraph(self.model, batch, self._forward)
            self._loss = self._graph(batch)
        else:
            loss = self._forward(**batch)
            loss.backward()  # type: ignore[no-untyped-call]
            self._loss = loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _forward(self, **batch: Any) -> Tensor:
        with autocast(self.device, self.device.type == "cuda"):
            loss: Tensor = self.model(**batch)
        return loss

    def loss(self) -> float | None:
        if not self._loss.isfinite():
            raise ValueError(f"the loss became {float(self._loss)}")
        return float(self._loss)


class TrainerLoop:
    """The steps of `openmoba train`, with its records; no evaluation, no checkpoint."""

    def __init__(self, case: TrainingCase, device: torch.device) -> None:
        self.case = case
        self.model = _model(case, device)

    def run(self, watch: Iterator[None]) -> None:
        notes = _Notes()
        with tempfile.TemporaryDirectory() as folder:
            trainer = self._trainer(Path(folder), notes)
            trainer.add_callback(_callback(watch))
            trainer.train()
            trainer.check_loss()
            if trainer.compiled != (self.case.layers != "eager"):
                raise RuntimeError(f"the layers could not be compiled: {notes.last}")
            if trainer.graphs.on != (self.case.layers == "graphed"):
                raise RuntimeError(f"the steps could not be made CUDA graphs: {trainer.graphs.reason}")

    def loss(self) -> float | None:
        return None

    def config(self) -> RunConfig:
        """Return the run whose steps these are."""
        case = self.case
        data, model = DataConfig(length=case.tokens), ModelConfig(case.family, case.size)
        return RunConfig(data=data, model=model, arm=case.arm, train=_settings(case))

    def _trainer(self, folder: Path, notes: Progress) -> Any:
        from openmoba.lab.data.tokenizer import byte_tokenizer
        from openmoba.lab.train.callback import make_trainer

        case, config = self.case, self.config()
        tokens = np.random.default_rng(0).integers(case.vocabulary, size=_WINDOWS * case.tokens + 1, dtype=np.uint16)
        store = TokenStore(tokens, np.asarray([0, len(tokens)]), None)
        windows = cut_windows(store, np.asarray([0]), case.tokens)
        none = windows.spread(0)  # nothing is evaluated, nor compiled for it
        return make_trainer(config, folder, self.model, Data(windows, none, byte_tokenizer(), {}), notes)


class _Notes(Progress):
    """Keeps what was said last, which is why layers are not compiled, or steps not graphs."""

    last = ""

    def note(self, text: str) -> None:
        self.last = text


_COMPILE: dict[str, Literal["auto", "layers", "off"]] = {"graphed": "auto", "compiled": "layers", "eager": "off"}
"""`train.compile` by the word for it here; "auto" graphs steps on a GPU alone."""


def make_loop(case: TrainingCase, device: torch.device) -> BareLoop | TrainerLoop:
    """Make the loop of a case's kind."""
    return TrainerLoop(case, device) if case.kind == "trainer" else BareLoop(case, device)


def operations(case: TrainingCase, model: Any, tokens: int) -> float:
    """Count the operations of one step, by the convention `causal_exact`."""
    compute = training_compute(Shape.of(model, tokens), case.arm, 1, 1, case.batch, 0.0)
    return compute["causal_exact"] * PFLOPS_DAY


def _settings(case: TrainingCase) -> TrainConfig:
    """Return the settings of a run, with a length that is never reached."""
    return TrainConfig(
        steps=10**6,
        batch_size=case.batch,
        learning_rate=LEARNING_RATE,
        checkpoint_every=10**6,
        gradient_checkpointing=case.checkpointing,
        compile=_COMPILE[case.layers],
    )


def _model(case: TrainingCase, device: torch.device) -> Any:
    with device:
        model = build_model(ModelConfig(case.family, case.size), case.vocabulary, case.tokens, seed=0)
    set_attention(model, case.arm.attention(0, 1))
    model.train()
    return model


def _callback(watch: Iterator[None]) -> Any:
    from transformers import TrainerCallback

    class Watched(TrainerCallback):  # type: ignore[misc]
        """Asks for one more before each step, and ends the training when there is none."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            next(watch)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = next(watch, _END) is _END

    return Watched()


_END = object()
