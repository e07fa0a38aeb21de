"""Where a result comes from: versions, hardware, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openmoba import __version__

if TYPE_CHECKING:
    import torch


def provenance() -> dict[str, Any]:
    """Return `{"versions", "hardware", "commit"}` of this process.

    The commit is that of the checkout; of a copy of its files without history, what OPENMOBA_COMMIT says, or None.
    """
    commit = _commit() or os.environ.get("OPENMOBA_COMMIT")
    return {"versions": versions(), "hardware": _hardware(), "commit": commit}


def versions() -> dict[str, str]:
    """Return the version of this package, of Python, and of the libraries that a result depends on."""
    found = {"openmoba": __version__, "python": platform.python_version()}
    for package in ("torch", "triton", "transformers", "accelerate", "tokenizers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _hardware() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpus": gpus}


def cpu_name() -> str:
    """Name the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def device_name(device: torch.device) -> str:
    """Name the GPU, or the processor with its threads."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"


def _commit() -> str | None:
    """Return the commit of the checkout this package runs from, with "+changes" if it differs from it."""
    package = Path(__file__).parents[1]
    try:
        commit = _git(package, "rev-parse", "HEAD")
        # Elsewhere, such as in site-packages, the repository around is some other project's.
        if not _git(package, "ls-files", "__init__.py"):
            return None
        return commit + ("+changes" if _git(package, "status", "--porcelain", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()
