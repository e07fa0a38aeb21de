"""`transformers.Trainer` on sequences that lie over several processes.

    class MyTrainer(ContextParallel, Trainer): ...

accelerate's `ParallelismConfig(cp_size=N)` says over how many on CUDA, together with FSDP2: it makes the mesh, gives
the N processes of a sequence the same batch, and shards the model over all. It refuses CPU processes, so there
`context_parallel=N` says it, and gradients are averaged by DDP. Processes beyond N see other sequences.

The loss is the sum over this process's labels, divided by all labels of the step and multiplied by the processes;
its mean over the processes, which DDP and FSDP2 take, is that of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Sized
from dataclasses import replace
from functools import partial
from inspect import signature
from typing import Any

from torch import Tensor, distributed
from torch.utils.data import IterableDataset
from transformers import Trainer

from openmoba.hf.meshes import as_many, loadable_device, same_batches, same_seeds, sequence_mesh
from openmoba.hf.settings import NAME
from openmoba.hf.shards import check_loss, shard_inputs
from openmoba.parallel import sharded

_HOOK = "_prepare_context_parallel_inputs"


class ContextParallel:
    """A mixin, to be named before `Trainer` or a class of it.

    Args:
        context_parallel: processes that share a sequence, where accelerate's `ParallelismConfig` does not say it.

    Raises:
        ValueError: no process group, a number that does not divide the processes, CUDA without FSDP2, an attention
            that is not MoBA's, or what needs logits of whole sequences.
    """

    def __init__(self, *args: Any, context_parallel: int = 1, **kwargs: Any) -> None:
        _check_hook()
        if type(context_parallel) is not int or context_parallel < 1:
            raise ValueError(
                f"context_parallel must be a whole number >= 1, got {context_parallel!r}; 1 splits nothing"
            )
        super().__init__(*args, **kwargs)
        trainer: Any = self
        config = getattr(trainer.accelerator, "parallelism_config", None)
        self._meshed_by_accelerate = config is not None and config.cp_size > 1
        self._sequence_mesh: Any = None
        self._context_group: Any = None
        if self._meshed_by_accelerate or context_parallel > 1:
            _check_trainer(trainer)
            self._sequence_mesh = self._mesh(config, context_parallel)
            self._context_group = self._sequence_mesh["cp"].get_group()
        if self._context_group is not None and trainer.args.device.type == "cpu":
            loadable_device(trainer.args)
        if self._meshed_by_accelerate:
            _keep_loss(trainer.accelerator.state.fsdp_plugin)

    def _mesh(self, config: Any, context_parallel: int) -> Any:
        """Return accelerate's mesh, or make one on CPU."""
        accelerator = self.accelerator  # type: ignore[attr-defined]
        if not self._meshed_by_accelerate and (config is not None or accelerator.device.type != "cpu"):
            raise ValueError(
                f"context_parallel={context_parallel} is for CPU processes; on {accelerator.device.type} give "
                f"TrainingArguments fsdp=True and parallelism_config=ParallelismConfig(cp_size={context_parallel})"
            )
        if self._meshed_by_accelerate and not accelerator.is_fsdp2:
            raise ValueError(
                f"ParallelismConfig(cp_size={config.cp_size}) needs FSDP2 on CUDA; give TrainingArguments fsdp=True too"
            )
        return accelerator.torch_device_mesh if self._meshed_by_accelerate else sequence_mesh(context_parallel, "cpu")

    def get_cp_size(self) -> int:
        """Return how many processes share a sequence."""
        if self._context_group is None or self._meshed_by_accelerate:
            return int(super().get_cp_size())  # type: ignore[misc]
        return distributed.get_world_size(self._context_group)

    def get_train_dataloader(self) -> Any:
        """Return Trainer's, of which the processes of a sequence get the same batches.

        Raises:
            ValueError: some of them have more batches than others.
        """
        with same_batches(self.accelerator, self._sequence_mesh):  # type: ignore[attr-defined]
            loader = same_seeds(super().get_train_dataloader(), self._sequence_mesh)  # type: ignore[misc]
        return as_many(loader, self._context_group)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return Trainer's, of which the processes of a sequence get the same batches.

        Data that come one after another are read whole first: of how many there are the last batch has to know, which
        is filled up with others.
        """
        if self._context_group is not None:
            data = self.eval_dataset if eval_dataset is None else eval_dataset  # type: ignore[attr-defined]
            data = self.eval_dataset[data] if isinstance(data, str) else data  # type: ignore[attr-defined]
            comes_one_by_one = isinstance(data, IterableDataset) or not isinstance(data, Sized)
            eval_dataset = list(data) if comes_one_by_one and data is not None else data
        with same_batches(self.accelerator, self._sequence_mesh):  # type: ignore[attr-defined]
            loader = super().get_eval_dataloader(eval_dataset)  # type: ignore[misc]
        return as_many(loader, self._context_group)

    def _prepare_context_parallel_inputs(
        self, model: Any, inputs: dict[str, Any]
    ) -> tuple[Callable[[], Any], dict[str, Any]]:
        """Cut the batch, and put its sharding in force for both passes."""
        if self._context_group is None:
            prepared: tuple[Callable[[], Any], dict[str, Any]] = super()._prepare_context_parallel_inputs(model, inputs)  # type: ignore[misc]
            return prepared
        trainer: Any = self
        config = trainer.accelerator.unwrap_model(model).config
        inputs = trainer._prepare_inputs(inputs)  # boundaries are found on the device that needs them
        sharding, inputs = shard_inputs(inputs, self._context_group, config)
        return partial(sharded, sharding), inputs

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss as Trainer does, by the number of labels that it counted once for every process."""
        if self._counted_often and num_items_in_batch is not None:
            num_items_in_batch = num_items_in_batch // self.get_cp_size()
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]

    @property
    def _counted_often(self) -> bool:
        """Whether Trainer counts the labels of a sequence once for every process that has a part of it.

        transformers 5.17 divides by what accelerate's mesh says, which has no sequences on CPUs; later releases by
        `get_cp_size`, which says it there too.
        """
        split_here = self._context_group is not None and not self._meshed_by_accelerate
        return split_here and "get_cp_size" not in Trainer._get_num_items_in_batch.__code__.co_names

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as Trainer does, every sequence counted once."""
        if self._context_group is not None:
            self.gather_function = self._gather  # Trainer takes its own back after the loop
        return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]

    def _gather(self, x: Tensor) -> Tensor:
        """Gather what there is for each sequence of a batch, of one among the neighbours that share it.

        accelerate fills the last batch up and then drops what is too much, by a count of sequences.
        """
        accelerator = self.accelerator  # type: ignore[attr-defined]
        ranks = distributed.get_world_size(self._context_group)
        every: Tensor = accelerator.gather(x).unflatten(0, (-1, ranks, len(x)))[:, 0].flatten(0, 1)
        state = accelerator.gradient_state
        return every[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else every

    def prediction_step(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, Any, Any]:
        """Evaluate as Trainer does, with the loss of whole sequences in every process that shares them."""
        loss, logits, labels = super().prediction_step(*args, **kwargs)  # type: ignore[misc]
        if self._context_group is not None and loss is not None:
            distributed.all_reduce(loss, group=self._context_group)
            loss /= distributed.get_world_size(self._context_group)
        return loss, logits, labels

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predict as Trainer does; refused where sequences are split, of which no process has all logits."""
        if self._context_group is not None:
            raise ValueError("no process has the logits of whole sequences; predict without context parallelism")
        return super().predict(*args, **kwargs)  # type: ignore[misc]


def _keep_loss(plugin: Any) -> None:
    """Have FSDP2 return what the model does: accelerate's policy rounds outputs to 16 bits, the loss among them."""
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


def _check_hook() -> None:
    """Raise ValueError unless transformers calls the hook as this module answers it; its name is private."""
    hook = getattr(Trainer, _HOOK, None)
    if hook is None or list(signature(hook).parameters) != ["self", "model", "inputs"]:
        import transformers

        raise ValueError(
            f"transformers {transformers.__version__} has no Trainer.{_HOOK}(model, inputs), where sequences are "
            "split; use a release that was tested, such as 5.17"
        )


def _check_trainer(trainer: Any) -> None:
    config = trainer.model.config
    if config._attn_implementation != NAME:
        raise ValueError(
            f"attn_implementation={config._attn_implementation!r} does not know of split sequences; call "
            "openmoba.hf.configure(model, MobaConfig(...)) first, with full_layers='all' for full attention"
        )
    check_loss(config)
    if trainer.neftune_noise_alpha is not None:
        raise ValueError(
            f"neftune_noise_alpha={trainer.neftune_noise_alpha} scales noise by a sequence's length, of which a "
            "process has a part; leave it out"
        )
    if trainer.accelerator.dispatch_batches:
        raise ValueError(
            "dispatch_batches=True deals out other batches to the processes that share a sequence; leave it out of "
            "accelerator_config: every process reads the data"
        )
    if trainer.compute_metrics is not None:
        raise ValueError("compute_metrics needs logits of whole sequences, which no process has; leave it out")
    if trainer.compute_loss_func is not None or trainer.label_smoother is not None:
        raise ValueError(
            "a loss of one's own and label smoothing shift labels, which here are shifted before sequences are split; "
            "leave compute_loss_func and label_smoothing_factor out"
        )
    if not (trainer.model_accepts_loss_kwargs and trainer.args.average_tokens_across_devices):
        raise ValueError(
            "the loss of a split sequence is divided by the labels of all processes: leave "
            "average_tokens_across_devices=True, and use a model whose loss takes num_items_in_batch"
        )
