"""What a user sees of an error: one sentence with a way out. Only a fault of this program is a traceback."""

from __future__ import annotations

import errno
from pathlib import Path
from traceback import extract_tb

_OWN = Path(__file__).parent

_WAYS_OUT = {
    errno.ENOSPC: "make room, or write elsewhere",
    errno.EDQUOT: "make room, or write elsewhere",
    errno.EACCES: "give another place, or change its permissions",
    errno.EPERM: "give another place, or change its permissions",
    errno.EROFS: "give another place",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a file is in the way, give another path",
    errno.EEXIST: "something is in the way, give another path",
    errno.EISDIR: "that is a folder, give a file",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


def explain(error: Exception) -> str | None:
    """Return one sentence on `error` for whoever typed the command; None if the program is at fault."""
    if isinstance(error, OSError):
        return _of_system(error)
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        said = str(error).strip().partition("\n")[0][:200]
        return (
            f"out of memory{f' ({said})' if said else ''}; take smaller batches (train.micro_batch_size, "
            "eval.batch_size), train.gradient_checkpointing, a shorter data.length or a smaller model"
        )
    if _is_lost_process(error):
        said = str(error).strip().partition("\n")[0][-200:]
        return (
            f"another process has ended, or does not answer ({said}); see what it said, and start all of them again: a "
            "run goes on from its last checkpoint"
        )
    if isinstance(error, OverflowError):
        return f"a number is too large ({error}); give a smaller one"
    if isinstance(error, ImportError) and not (error.name or "").startswith("openmoba"):
        return f"{error}; pip install 'openmoba[lab]' installs what the laboratory needs, others install by their name"
    if isinstance(error, ValueError):
        library = _library(error)
        return f"{library} says: {error}" if library else str(error)
    return None


def _of_system(error: OSError) -> str:
    if error.errno is None or error.strerror is None:  # as libraries use the class
        return f"{_library(error) or 'a library'} says: {error}; check the name, and the connection if it is on the hub"
    where = "" if error.filename is None else f"{error.filename}: "
    if error.filename2 is not None:
        where = f"{error.filename} to {error.filename2}: "
    return f"{where}{error.strerror}; {way_out(error)}"


def way_out(error: OSError) -> str:
    """Say what to do where the system refused."""
    return _WAYS_OUT.get(error.errno or 0, "try another path")


def _is_out_of_memory(error: Exception) -> bool:
    """Tell whether torch ran out of memory, for which it has a class on a GPU and words on a CPU."""
    if not isinstance(error, RuntimeError):
        return False
    return type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _is_lost_process(error: Exception) -> bool:
    """Tell whether a collective failed for want of another process, for which NCCL has a class and gloo has words."""
    lost = type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError")
    words = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Application timeout caused")
    return isinstance(error, RuntimeError) and (lost or any(word in str(error) for word in words))


def _library(error: Exception) -> str | None:
    """Name the library that raised the error; None if this package did."""
    frames = extract_tb(error.__traceback__)
    if not frames or _OWN in Path(frames[-1].filename).parents:
        return None
    parts = Path(frames[-1].filename).parts
    return parts[parts.index("site-packages") + 1] if "site-packages" in parts[:-2] else "Python"
