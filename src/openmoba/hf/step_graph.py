"""Forward and backward of a micro-batch as one CUDA graph, for models that a GPU is done with before the host is.

A step of a small model is a thousand kernels of some microseconds. Launched one by one they take the host longer than
the GPU; a graph holds them all, is captured once, and is launched as a whole. It does the same with the same memory
each time, so a batch is copied to where the captured one was, and gradients lie where they lay.

What a captured step may not do is wait for the device, or decide by the values of tensors: it has to be whole rows of
one shape. `StepGraph` refuses what it cannot capture, and compares the first launch with the step itself.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed

_WARM_UPS = 2
_TOKENS = "input_ids"


class CaptureError(ValueError):
    """A step that cannot be a CUDA graph, and why."""


class StepGraph:
    """Runs a model's forward and backward by launching a graph that was captured for such a batch.

    Python inside the model runs while it is captured and never again. Memory of the activations stays taken as long as
    this object lives. A batch of another shape, or after a change of the model's attention or mode, runs without the
    graph, with a warning.

    Args:
        model: on one CUDA device, with its attention, and compiled if it is to be.
        batch: what `loss` takes, like all that will come: tensors on the device, and constants.
        loss: returns the scalar to differentiate; left out: `model(**batch).loss`.

    Raises:
        CaptureError: the step waits for the device, recomputes activations, is shared by processes, or gives
            something else as a graph.
    """

    def __init__(
        self, model: torch.nn.Module, batch: Mapping[str, Any], loss: Callable[..., Tensor] | None = None
    ) -> None:
        reason = why_not(model, batch)
        if reason is not None:
            raise CaptureError(reason)
        self.model = model
        self._loss_of = loss or (lambda **given: model(**given).loss)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._inputs = {name: x.clone() if isinstance(x, Tensor) else x for name, x in batch.items()}
        self._kind, self._weights = self._kind_of(batch), self._state_of_weights()
        self._warned = False
        before = [p.grad for p in self._parameters]
        try:
            self._capture()
        finally:
            for p, gradient in zip(self._parameters, before, strict=True):
                p.grad = gradient

    def __call__(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the loss of a batch, detached; its gradients are added to what `.grad` holds, as by `backward`.

        Raises:
            ValueError: weights were moved, frozen or replaced since the graph was captured.
        """
        if self._kind_of(batch) != self._kind:
            self._warn()
            loss: Tensor = self._loss_of(**batch)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()
        if self._state_of_weights() != self._weights:
            raise ValueError("weights were moved, frozen or replaced since the step was captured; make a new StepGraph")
        return self._launch(batch)

    def _launch(self, batch: Mapping[str, Any]) -> Tensor:
        for name, x in batch.items():
            if isinstance(x, Tensor):
                self._inputs[name].copy_(x)
        held = [(p, own) for p, own in zip(self._parameters, self._gradients, strict=True) if own is not None]
        added = [(own, p.grad) for p, own in held if p.grad is not None]
        # Copies, by a product that changes no bit: earlier gradients may lie where the graph writes its own.
        earlier = torch._foreach_mul([gradient for _, gradient in added], 1.0) if added else ()
        self._graph.replay()
        if added:
            torch._foreach_add_([own for own, _ in added], earlier)
        for p, own in held:
            p.grad = own
        return self._loss.clone()

    def _run(self) -> Tensor:
        """Run the step as it is, with new gradients."""
        for p in self._parameters:
            p.grad = None
        # A cast that autocast remembers would be of weights before the graph, or lie in memory that only it fills.
        torch.clear_autocast_cache()
        loss: Tensor = self._loss_of(**self._inputs)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.clear_autocast_cache()
        return loss.detach()

    def _capture(self) -> None:
        """Capture the step on a stream of its own, after it has run there: kernels are loaded, libraries ready."""
        device = self._parameters[0].device
        here = torch.cuda.current_stream(device)
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(here)
        with torch.random.fork_rng(devices=[device]):
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    self._run()
                with self._other_tokens(), _waiting_refused():
                    expected = self._seen(self._run())
                for p in self._parameters:  # their memory is not the graph's
                    p.grad = None
                self._graph, self._loss = _captured(self._run, stream)
            here.wait_stream(stream)
            self._gradients = [p.grad for p in self._parameters]
            with self._other_tokens():
                self._graph.replay()
                found = self._seen(self._loss)
        _compare(found, expected)

    @contextmanager
    def _other_tokens(self) -> Iterator[None]:
        """Give the step its tokens in the opposite order, so that a graph of one batch alone is found out."""
        tokens = self._inputs.get(_TOKENS)
        if tokens is None:
            yield
            return
        tokens.copy_(tokens.flip(-1))
        try:
            yield
        finally:
            tokens.copy_(tokens.flip(-1))

    def _seen(self, loss: Tensor) -> Tensor:
        """Return the loss, and the norm of each gradient (-1: none), fp32."""
        none = torch.full_like(loss, -1.0)
        norms = [none if p.grad is None else p.grad.norm() for p in self._parameters]
        return torch.stack([loss, *norms]).float()

    def _kind_of(self, batch: Mapping[str, Any]) -> Any:
        """Return what the kernels of a step depend on, beside its numbers."""
        config = getattr(self.model, "config", None)
        mode = (self.model.training, torch.is_grad_enabled(), torch.is_autocast_enabled("cuda"))
        attention = (getattr(config, "moba", None), getattr(config, "_attn_implementation", None))
        inputs = {name: (x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for name, x in batch.items()}
        return mode, torch.get_autocast_dtype("cuda"), attention, inputs

    def _state_of_weights(self) -> list[tuple[int, bool]]:
        return [(p.data_ptr(), p.requires_grad) for p in self._parameters]

    def _warn(self) -> None:
        if not self._warned:
            warnings.warn(
                "a batch of another shape, or another attention or mode of the model, than the step was captured with: "
                "it runs without the graph",
                stacklevel=3,
            )
            self._warned = True


def why_not(model: torch.nn.Module, batch: Mapping[str, Any]) -> str | None:
    """Return why a step cannot be captured, as far as that can be told before it is tried."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        return "no parameter is trained"
    if not isinstance(batch, Mapping):
        return f"the batch is no table of tensors by the names that the model takes, but a {type(batch).__name__}"
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        return "several processes share the step"
    if any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules()):
        return "activations are computed again, which keeps the state of random numbers"
    if any(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in trained):
        return "a parameter has hooks, which would run once"
    if getattr(getattr(model, "config", None), "layerdrop", 0):
        return "layers are left out at random (layerdrop)"
    devices = {x.device for x in (*trained, *batch.values()) if isinstance(x, Tensor)}
    if len(devices) > 1:
        return f"model and batch are on {' and '.join(sorted(map(str, devices)))}"
    return None if trained[0].is_cuda else f"the model is on {trained[0].device}, and only GPUs have graphs"


def _captured(run: Callable[[], Tensor], stream: torch.cuda.Stream) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Capture a function on the current stream; CaptureError if it does what a graph cannot."""
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    gc.collect()  # what is collected while a graph is captured may not be freed then
    try:
        # A thread of the loader's or a logger's may do what it likes meanwhile.
        with (
            _own_workspaces(),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            loss = run()
    except torch.OutOfMemoryError:
        _abandon(graph, pool, stream)
        raise
    except RuntimeError as error:
        _abandon(graph, pool, stream)
        raise CaptureError(
            f"capturing it failed: {_first_line(error)}; one cause is an earlier loss, kept without detach()"
        ) from error
    return graph, loss


@contextmanager
def _own_workspaces() -> Iterator[None]:
    """Have products take their workspaces from the graph's own memory in the body of the `with`.

    torch keeps one for each stream until it is told to forget them, which inductor's graphs do: what a launch wrote to
    would be somebody else's then. A graph's own memory is given to nobody as long as the graph lives.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


_abandoned: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture failed: torch may still ask them which streams are theirs."""


def _abandon(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream) -> None:
    """Give memory out as before after a capture that failed in its end, which torch leaves half done."""
    try:
        torch._C._cuda_endAllocateToPool(stream.device_index, pool)
    except RuntimeError:
        return  # it came to its end
    torch._C._cuda_releasePool(stream.device_index, pool)
    _abandoned.append(graph)
    # In some releases random numbers stay unavailable until another capture has ended.
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        torch.zeros(1, device="cuda")


def _first_line(error: BaseException) -> str:
    """Return what went wrong first: the end of a failed capture fails too, and says less."""
    first = error.__context__ if isinstance(error.__context__, RuntimeError) else error
    return f"{type(first).__name__}: {(str(first).strip() or 'no reason given').splitlines()[0]}"


@contextmanager
def _waiting_refused() -> Iterator[None]:
    """Make waiting for the device an error, CaptureError, in the body of the `with`."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        raise CaptureError(
            "the step waits for the device, as it does for attention_mask and position_ids, or where a model looks at "
            "numbers; leave them out if no row is padded or packed"
        ) from error
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _compare(found: Tensor, expected: Tensor) -> None:
    """Raise CaptureError unless a launch gave what the step gave: loss, and norms of gradients.

    In 16 bits sums without a fixed order, as some libraries make them, differ by a part in hundreds at most.
    """
    size = expected[1:].norm()
    apart = (found - expected).abs()
    near = apart[0] <= 1e-3 * expected[0].abs() + 1e-6
    near = near & (apart[1:] <= 0.02 * expected[1:].abs() + 1e-3 * size).all()
    same = near | (found.isnan() & expected.isnan()).all()
    if not bool(same):
        raise CaptureError(
            f"launched as a graph it gave a loss of {float(found[0]):.6g} and not {float(expected[0]):.6g}, or other "
            "gradients; the step depends on more than its batch and weights"
        )
