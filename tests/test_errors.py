"""What is said of an error, by its kind."""

from __future__ import annotations

import json
import re

import pytest
import torch

from openmoba.errors import explain
from openmoba.records import disk


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device", "charts/a.png"), r"^charts/a\.png: No space left on device; make room"),
        (PermissionError(13, "Permission denied", "/root/x"), r"^/root/x: Permission denied; give another place"),
        (OSError(18, "Invalid cross-device link", "a", None, "b"), r"^a to b: Invalid cross-device link; try another"),
        (OSError("Couldn't reach the hub"), r"says: Couldn't reach the hub; check the name, and the connection"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB\nmore"), r"^out of memory \(CUDA .* 2 GiB\); take sm"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "^out of memory"),
        (MemoryError(), r"^out of memory; take smaller batches"),
        (OverflowError("int too big to convert"), r"^a number is too large \(int too big to convert\)"),
        (ModuleNotFoundError("No module named 'tyro'", name="tyro"), r"No module named 'tyro'; pip install"),
        (ValueError("ours"), "^ours$"),
    ],
)
def test_every_kind_of_error_has_a_way_out(error: Exception, said: str) -> None:
    assert re.search(said, explain(error) or "")


def test_a_librarys_error_says_whose_it_is() -> None:
    with pytest.raises(ValueError, match="Expecting") as raised:
        json.loads("")
    assert explain(raised.value) == "Python says: Expecting value: line 1 column 1 (char 0)"
    with pytest.raises(ValueError, match="a line is not str") as raised:
        disk.expect(3, str, "a line")
    assert explain(raised.value) == "a line is not str but 3; restore the file from a copy"
