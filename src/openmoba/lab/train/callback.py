"""A trainer with the callback of a run: when it switches its attention, logs, evaluates and saves, what it tells."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from openmoba.lab.config import RunConfig
from openmoba.lab.data.load import Data
from openmoba.lab.progress import SECONDS_PER_LINE, Progress
from openmoba.lab.train.trainer import RunTrainer


def make_trainer(config: RunConfig, folder: Path, model: Any, data: Data, progress: Progress) -> RunTrainer:
    """Make what trains a run: a trainer whose callback has it log, evaluate and save as the settings say."""
    trainer = RunTrainer(config, folder, model, data, progress)
    trainer.add_callback(RunCallback(trainer))
    return trainer


class RunCallback(TrainerCallback):  # type: ignore[misc]
    """Switches the attention, and decides when to log, evaluate and save."""

    def __init__(self, trainer: RunTrainer) -> None:
        self.trainer = trainer
        self.evaluations = frozenset(trainer.config.evaluation_steps)
        self._told, self._detail = time.monotonic(), ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.compile_layers()
        self.trainer.graph_steps()
        self.trainer.model_wrapped.train()
        self.trainer.go_on()
        self.trainer.start_clock()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.attend_as_configured(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        config, step = self.trainer.config, state.global_step
        last = step == config.train.steps
        control.should_log = last or step % config.train.log_every == 0
        control.should_evaluate = step in self.evaluations
        control.should_training_stop = last or self.trainer.must_stop(control.should_log)
        control.should_save = control.should_training_stop or step % config.train.checkpoint_every == 0
        if control.should_log or control.should_evaluate or control.should_save:
            self.trainer.check_loss()
            self.trainer.clock.tick()
        elif time.monotonic() - self._told >= SECONDS_PER_LINE:
            self._tell(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        trainer = self.trainer
        if not math.isfinite(logs["grad_norm"]):
            raise trainer.diverged("gradient", state.global_step)
        compute = trainer.compute()["causal_exact"]
        speed = trainer.speedometer.read(trainer.tokens, trainer.clock.trained, compute)
        trainer.record(
            "train",
            {
                "loss": logs["loss"],
                "lr": logs["learning_rate"],
                "grad_norm": logs["grad_norm"],
                "seconds": trainer.clock.seconds,
                **speed,
                **({"mesh": trainer.mesh} if trainer.args.world_size > 1 else {}),
            },
            # What is measured alone: the other conventions follow from the step, and evaluations have them.
            {"accelerator_seconds": trainer.clock.accelerator_seconds},
        )
        self._detail = _told(logs, speed)
        self._tell(state)

    def _tell(self, state: Any) -> None:
        """Show how far the training is, with what the last record said."""
        self._told = time.monotonic()
        done, whole = (self.trainer.compute(step)["causal_exact"] for step in (state.global_step, state.max_steps))
        self.trainer.progress.step(state.global_step, state.max_steps, self._detail, done / whole)


def _told(logs: dict[str, float], speed: dict[str, float | None]) -> str:
    """Say what progress tells of a step."""
    mfu = "" if speed["mfu"] is None else f"  MFU {speed['mfu']:.0%} of data sheet"
    return f"loss {logs['loss']:.3f}  lr {logs['learning_rate']:.2g}  {speed['tokens_per_second']:,.0f} tokens/s{mfu}"
