"""What the GPU tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch

from openmoba.ops.triton.host import replay


@pytest.fixture(autouse=True)
def nothing_to_replay() -> None:
    """A test that changes how launches are worked out leaves none of them to others."""
    replay.forget()


@pytest.fixture
def no_waiting() -> Callable[[], AbstractContextManager[None]]:
    """A context in which waiting for the device is an error, which no later test inherits."""

    @contextmanager
    def context() -> Iterator[None]:
        torch.cuda.synchronize()
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return context
