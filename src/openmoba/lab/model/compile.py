"""Compiling a decoder layer by layer: layers of a kind share a graph, so the time it takes does not grow with depth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from openmoba.hf.support import is_attention
from openmoba.lab.model.loss import compile_loss


def compile_layers(model: Any) -> None:
    """Compile every decoder layer and the loss of a model after `attach_loss`, in place, when each first runs.

    Graphs of models before are let go: the compiler's limit counts all that a process has made of a class of layers, so
    the fourth run of a study would train eagerly.
    """
    torch.compiler.reset()
    for layer in decoder_layers(model):
        layer.compile(dynamic=False)
    compile_loss(model, True)


def uncompile_layers(model: Any) -> None:
    """Run every decoder layer and the loss eagerly again."""
    for layer in decoder_layers(model):
        layer._compiled_call_impl = None
    compile_loss(model, False)


def decoder_layers(model: Any) -> list[torch.nn.Module]:
    """List the layers of a decoder: the modules that hold an attention module."""
    return [module for module in model.modules() if any(is_attention(child) for child in module.children())]


@contextmanager
def strict() -> Iterator[None]:
    """Make more graphs than the compiler keeps an error; it would go on eagerly, and only log it."""
    before = torch._dynamo.config.fail_on_recompile_limit_hit
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    try:
        yield
    finally:
        torch._dynamo.config.fail_on_recompile_limit_hit = before


def compile_or_stay_eager(model: Any, try_out: Callable[[], None]) -> str | None:
    """Compile the layers and run `try_out`, which makes all graphs that training needs.

    Returns:
        None, or what went wrong, in a line; the layers run eagerly then.
    """
    compile_layers(model)
    try:
        with strict():
            try_out()
    except torch.OutOfMemoryError:
        raise  # would not fit eagerly either
    except Exception as error:  # compilers fail in many ways, and every one leaves the eager layers
        uncompile_layers(model)
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None
