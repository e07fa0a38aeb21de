"""`transformers.Trainer` for runs of the laboratory: our loss, order of data, schedule, records and switch."""

from __future__ import annotations

import math
import shutil
import time
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer
from transformers.utils.logging import disable_progress_bar

from openmoba.config import MobaConfig
from openmoba.hf.meshes import same_batches, sequence_mesh
from openmoba.lab.config import RunConfig
from openmoba.lab.data.load import Data
from openmoba.lab.data.windows import IGNORED, TrainingWindows
from openmoba.lab.errors import DivergenceError
from openmoba.lab.measure.compute import Shape, training_compute
from openmoba.lab.measure.evaluate import autocast, measure
from openmoba.lab.measure.losses import TokenLosses, window_losses
from openmoba.lab.model.build import set_attention
from openmoba.lab.model.checkpoint import prune, seal
from openmoba.lab.model.compile import compile_or_stay_eager
from openmoba.lab.model.loss import attach_loss
from openmoba.lab.model.split import SharedLosses, cut, in_force, sharding_of_windows
from openmoba.lab.progress import Progress, duration
from openmoba.lab.train.arguments import training_arguments
from openmoba.lab.train.clock import Clock, Speedometer, peak_operations
from openmoba.lab.train.graphs import StepGraphs, reason_against, wanted
from openmoba.lab.train.history import record
from openmoba.lab.train.schedule import learning_rate_factor
from openmoba.parallel import Sharding
from openmoba.records import disk

_UNRECORDED = "unrecorded.json"
"""In a checkpoint, what its run goes on from and no record holds in full: the time that all attempts took, and the sum
of the losses since the last record, with its step."""


class RunTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """Trains one run and writes its records, when a callback says so (`openmoba.lab.train.callback`).

    Args:
        model: a decoder of the transformers library; its `forward` is replaced by `attach_loss`.
        data: all training windows, the validation windows to measure, and the tokenizer, saved with every checkpoint.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        model: Any,
        data: Data,
        progress: Progress,
    ) -> None:
        self.config, self.folder, self.data, self.progress = config, folder, data, progress
        self.shape = Shape.of(model, config.data.length)
        attach_loss(model)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(model.config, name, getattr(data.tokenizer, name))
            setattr(model.generation_config, name, getattr(data.tokenizer, name))
        disable_progress_bar()  # of writing weights, in the middle of ours
        settings = config.train
        order = TrainingWindows(data.train, settings.steps * settings.batch_size, settings.seed, settings.loss_tokens)
        super().__init__(
            model=model,
            args=training_arguments(config, folder),
            train_dataset=order,
            processing_class=data.tokenizer,
        )
        if settings.fsdp:  # whose own policy rounds the loss too; `compute_loss` says what is in 16 bits
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None
        self.sharding = self._share_windows()
        self.data_collator = _stack if self.sharding is None else partial(_stack, sharding=self.sharding)
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # our loss is divided by the whole step's count already
        self.clock = Clock(self.args.device, self.args.world_size)
        self.speedometer = Speedometer(peak_operations(self.args.device, self.args.bf16, self.args.world_size))
        self._unchecked: list[tuple[int, Tensor]] = []
        self.compiled = False
        self.graphs = StepGraphs(progress)
        self.stopping = False
        self._attention: MobaConfig | str | None = "unset"

    def _share_windows(self) -> Sharding | None:
        """Return how windows lie over processes that share them. accelerate makes a mesh of GPUs, but none of CPUs."""
        self._mesh: Any = None
        ranks = self.config.train.context_parallel
        if ranks == 1:
            return None
        mesh = self.accelerator.torch_device_mesh
        if mesh is None:
            mesh = self._mesh = sequence_mesh(ranks, "cpu")
        return sharding_of_windows(mesh["cp"].get_group(), self.config.data.length, self.model)

    def _losses(self, model: Any) -> TokenLosses:
        """Return what evaluations ask for losses."""
        return model if self.sharding is None else SharedLosses(model, self.sharding)

    @property
    def mesh(self) -> dict[str, int]:
        """How many processes have windows of their own, and how many share each."""
        context = self.config.train.context_parallel
        return {"data": self.args.world_size // context, "context": context}

    def attend_as_configured(self, step: int) -> None:
        """Give the model the attention of step `step` (from 0)."""
        attention = self.config.arm.attention(step, self.config.train.steps)
        if attention != self._attention:
            self.graphs.forget()
            set_attention(self.accelerator.unwrap_model(self.model), attention)
            self._attention = attention

    def compile_layers(self) -> None:
        """Compile the layers if the run says so, with all graphs that it needs: before its time is measured."""
        setting = self.config.train.compile
        self.compiled = setting == "layers" or (setting == "auto" and self.args.device.type == "cuda")
        if not self.compiled:
            return
        start = time.perf_counter()
        problem = compile_or_stay_eager(self.accelerator.unwrap_model(self.model), self._try_out)
        self.compiled = problem is None
        seconds = duration(time.perf_counter() - start)
        outcome = f"layers compiled in {seconds}" if self.compiled else f"layers run eagerly, not compiled: {problem}"
        self.progress.note(f"{outcome} (train.compile={setting})")

    def graph_steps(self) -> None:
        """Have micro-batches launched as CUDA graphs if the run says so and it can be: before its time is measured."""
        if not wanted(self.config, self.args.device.type):
            return
        model, conversations = self.accelerator.unwrap_model(self.model), self.data.train.store.written is not None
        reason = reason_against(self.config, model, conversations)
        if reason is not None:
            self.graphs.stop(reason)
            return
        start, self.graphs.on = time.perf_counter(), True
        try:
            # The optimizer's two moments, which come with the first step and have to find room too.
            moments = torch.empty(8 * self.shape.total, dtype=torch.uint8, device=self.args.device)
            self._try_out()
            del moments
        except torch.OutOfMemoryError:
            self.graphs.stop("there is no memory for it beside evaluation")
        if self.graphs.on:
            seconds = duration(time.perf_counter() - start)
            self.progress.note(f"a micro-batch is one CUDA graph, captured in {seconds} (train.compile=auto)")

    def _try_out(self) -> None:
        """Train and evaluate on one batch of every shape, with every attention of the run; leaves nothing behind."""
        model, evaluation = self.model_wrapped, self.config.eval
        attention = partial(self.config.arm.attention, steps=self.config.train.steps)
        last = self.config.train.steps - 1
        sizes = {min(evaluation.batch_size, len(self.data.valid)), len(self.data.valid) % evaluation.batch_size}
        try:
            for step in [0] if attention(0) == attention(last) else [0, last]:
                self.attend_as_configured(step)
                windows = [self.train_dataset[i] for i in range(self.args.per_device_train_batch_size)]
                batches, count = self.get_batch_samples(iter([self.data_collator(windows)]), 1, self.args.device)
                model.train()
                self.training_step(model, self._prepare_inputs(batches[0]), num_items_in_batch=count)
                model.zero_grad()  # evaluation has FSDP gather weights, whose gradients are not these
                model.eval()
                with autocast(self.args.device, self.args.bf16):
                    for size in sizes - {0}:
                        window_losses(
                            self._losses(model), self.data.valid.spread(size), evaluation.batch_size, self.args.device
                        )
        finally:
            model.train()
            model.zero_grad()
            self._unchecked.clear()

    def stop(self) -> None:
        """Stop after this step, with a checkpoint."""
        self.stopping = True

    def must_stop(self, agreeing: bool) -> bool:
        """Tell whether to stop now. Several devices tell each other where they are `agreeing`, in the same steps."""
        if self.args.world_size == 1 or not agreeing:
            return self.stopping and self.args.world_size == 1
        self.stopping = bool(self.accelerator.gather(torch.tensor([self.stopping], device=self.args.device)).any())
        return self.stopping

    def go_on(self) -> None:
        """Take up what the checkpoint has and no record: the time spent, and the losses since the last record."""
        if self.state.global_step > 0:
            checkpoint = self.folder / f"checkpoint-{self.state.global_step}"
            if not (checkpoint / _UNRECORDED).exists():
                raise ValueError(
                    f"{checkpoint} does not say how long its run has taken, as those of older versions; delete the "
                    f"folder {self.folder} to train the run again"
                )
            found = disk.read_json(checkpoint / _UNRECORDED)
            self.clock.go_on(found["seconds"], found["accelerator_seconds"])
            self._tr_loss += found["loss"]
            self._globalstep_last_logged = found["since"]

    def check_loss(self) -> None:
        """Raise DivergenceError if the loss of a step since the last check was not a number, on any device."""
        steps, losses = zip(*self._unchecked, strict=True)
        self._unchecked.clear()
        bad = [step for step, fine in zip(steps, torch.stack(losses).isfinite().tolist(), strict=True) if not fine]
        first = torch.tensor([min(bad, default=math.inf)], device=self.args.device)
        step = float(self.accelerator.gather(first).min())
        if step < math.inf:
            raise self.diverged("loss", step)

    def diverged(self, what: str, step: float) -> DivergenceError:
        """Make the error that says which number was none, and what to lower."""
        train = self.config.train
        ways_out = [f"lower train.learning_rate={train.learning_rate}", f"lower train.clip={train.clip}"]
        if self.args.bf16:
            ways_out.append("use train.precision=fp32")
        return DivergenceError(
            f"{self.folder}: the {what} was not a finite number at step {step:.0f}, nothing later is saved; "
            f"{' or '.join(ways_out)}"
        )

    def record(self, kind: str, row: dict[str, Any], compute: dict[str, float]) -> None:
        """Append a record, completed by step and tokens."""
        if self.is_world_process_zero():
            head = {"kind": kind, "step": self.state.global_step, "tokens": self.tokens}
            record(self.folder, {**head, **row, "compute": compute})

    def start_clock(self) -> None:
        """Measure time and speed from here on."""
        self.speedometer.start(self.tokens, self.clock.trained, self.compute()["causal_exact"])
        self.clock.skip()

    @property
    def tokens(self) -> int:
        """Tokens trained so far, over all devices."""
        return self.state.global_step * self.config.train.batch_size * self.config.data.length  # type: ignore[no-any-return]

    def compute(self, step: int | None = None) -> dict[str, float]:
        """Count the compute of the first `step` steps, by all conventions; by default of those so far."""
        step, settings = self.state.global_step if step is None else step, self.config.train
        return training_compute(
            self.shape, self.config.arm, step, settings.steps, settings.batch_size, self.clock.accelerator_seconds
        )

    # What Trainer calls.

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer does, and keep nothing that only training needs."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.graphs.forget()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Say what Trainer says, but nothing of weights that are tied to others, which a checkpoint holds once."""
        tied = self.accelerator.unwrap_model(self.model).all_tied_weights_keys
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Tensor]:
        """Return the micro-batches of one step, and their labelled positions over all devices."""
        batches = list(islice(epoch_iterator, num_batches))
        # Counted before they went to the device: neither the host nor the device waits for the other here.
        count = torch.full((1,), sum(batch.pop("labelled") for batch in batches), device=device)
        if self.args.world_size > 1:
            count = self.accelerator.gather(count)
        return batches, count.sum()

    def training_step(
        self, model: Any, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run forward and backward of one micro-batch; return its share of the step's mean loss.

        Does without what Trainer does here for other devices and optimizers: it took 1 ms of the host.
        """
        found = self.graphs.launch(model, {**inputs, "count": num_items_in_batch})
        if found is not None:
            self._unchecked.append((self.state.global_step + 1, found))
            return found
        with in_force(self.sharding):  # in the backward pass too, for layers that are computed again
            loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return this micro-batch's share of the step's mean loss, in nats per labelled position."""
        with autocast(self.args.device, self.args.bf16):  # accelerate has it already, but not with FSDP
            loss: Tensor = model(**inputs, count=num_items_in_batch)
        self._unchecked.append((self.state.global_step + 1, loss.detach()))
        # Gradients are averaged over devices, and `count` is the sum over them.
        devices: int = self.args.world_size
        return loss * devices if devices > 1 else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: `compute` counts them, and Trainer's own count looks through the whole model each step."""
        return 0

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the schedule of `learning_rate_factor`."""
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer,
            lambda step: learning_rate_factor(step, num_training_steps, self.config.train),
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the model on the validation windows and record it."""
        self.clock.tick()
        model = self.model_wrapped
        model.eval()
        with autocast(self.args.device, self.args.bf16):
            last = self.state.global_step == self.config.train.steps
            row = measure(self._losses(model), self.data.valid, self.config, self.args.device, each_window=last)
        self.record("eval", row, self.compute())
        tail = "" if row["trailing_loss"] is None else f", last {row['trailing']:,} tokens {row['trailing_loss']:.4f}"
        self.progress.note(f"step {self.state.global_step:,}: held-out loss {row['lm_loss']:.4f}{tail}")
        logs = {f"eval_{name}": row[name] for name in ("lm_loss", "trailing_loss") if row[name] is not None}
        self.log(dict(logs))
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics=logs)
        model.train()
        self.clock.skip()
        return logs

    def _save_checkpoint(self, *args: Any) -> None:
        checkpoint = self.folder / f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero() and checkpoint.exists():
            shutil.rmtree(checkpoint)  # damaged, else training would have gone on from it
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(*args)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                disk.write_json(checkpoint / _UNRECORDED, self._unrecorded())
                seal(checkpoint)
                prune(self.folder, keep=2)
        except (OSError, RuntimeError, SafetensorError) as error:  # as writers of files and of tensors say it
            raise ValueError(
                f"cannot write {checkpoint}: {error}; earlier checkpoints are whole, make room and run again"
            ) from error
        self.clock.skip()

    def _unrecorded(self) -> dict[str, float]:
        """Return what the checkpoint of this step keeps for `go_on`; only a single device stops between two records."""
        return {
            "seconds": self.clock.seconds,
            "accelerator_seconds": self.clock.accelerator_seconds,
            "loss": self._tr_loss.item(),
            "since": self._globalstep_last_logged,
        }

    def get_train_dataloader(self) -> Any:
        """Return Trainer's, of which processes that share windows get the same ones."""
        with same_batches(self.accelerator, self._mesh):
            return super().get_train_dataloader()

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        # TrainingWindows are in their order already.
        return SequentialSampler(self.train_dataset)


def _stack(windows: list[dict[str, Tensor]], sharding: Sharding | None = None) -> dict[str, Any]:
    """Stack a batch, with the places of its labels and how many there are, see `attach_loss`.

    Of windows that are shared it is this process's part, and so are its labels.
    """
    batch: dict[str, Any] = cut({key: torch.stack([w[key] for w in windows]) for key in windows[0]}, sharding)
    labels = batch["labels"].flatten()
    batch["places"] = (labels != IGNORED).nonzero()[:, 0] if (labels.numpy() == IGNORED).any() else slice(None)
    batch["labelled"] = len(labels[batch["places"]])
    return batch
