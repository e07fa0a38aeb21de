"""A model, and engines over it in this process. Run by `make test-vllm`; without vLLM everything here is left out.

vLLM runs on a CPU or on a GPU, as it was built; `*_gpu.py` wants the latter, and all else the former.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if find_spec("vllm") is None:
    collect_ignore_glob = ["*"]
else:
    from served_models import Engine, Generated, save_full, text, tokens
    from vllm.platforms import current_platform

    collect_ignore_glob = ["*_gpu.py"] if current_platform.is_cpu() else ["test_*[!u].py"]

# Read when an engine is made: its core stays in this process, where a test can look inside. On a GPU vLLM would import
# FlashInfer's sampler, which the likeliest tokens do not need.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0"}

SMALL = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 2**26,
}


@pytest.fixture(scope="session")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with full attention."""
    return save_full(tmp_path_factory.mktemp("models") / "full")


@contextmanager
def _engine(folder: Path, **options: Any) -> Iterator[Any]:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(str(folder), **{**SMALL, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


@pytest.fixture
def engine() -> Engine:
    """Make an engine for a while."""
    return _engine


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an engine have two, on one memory node, and be asked for what both hold."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")


@pytest.fixture
def generated(capsys: pytest.CaptureFixture[str]) -> Generated:
    """Continue a prompt with the command `openmoba generate`; the new tokens."""
    from openmoba.cli import main

    def run(folder: Path, prompt: list[int], count: int) -> list[int]:
        capsys.readouterr()
        assert main(["generate", str(folder), "--prompt", text(prompt), "--max-new-tokens", str(count)]) == 0
        return tokens(capsys.readouterr().out)

    return run
