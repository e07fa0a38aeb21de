"""Trainer on split sequences is Trainer: the checks are in `trainer_checks.py`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from ranks import checked
from trainer_checks import all_checks
from transformers import Trainer

from openmoba.hf.context_parallel import ContextParallel
from openmoba.hf.meshes import sequence_mesh


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return checked("trainer_checks.py", 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("check", all_checks(2))
def test_two_processes_share_every_sequence(outcomes: dict[str, list[str]], check: str) -> None:
    assert not outcomes[check], "\n".join(outcomes[check])


def test_two_of_four_processes_share_a_sequence(tmp_path: Path) -> None:
    for check, errors in checked("trainer_checks.py", 4, tmp_path).items():
        assert not errors, "\n".join([check, *errors])


def test_without_torchrun_its_command_is_named() -> None:
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 2"):
        sequence_mesh(2, "cpu")


def test_another_hook_of_transformers_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is private: a release that renames it, or gives it other arguments, must not train on whole batches."""
    monkeypatch.setattr(Trainer, "_prepare_context_parallel_inputs", lambda self, inputs: None)
    with pytest.raises(ValueError, match=r"has no Trainer\._prepare_context_parallel_inputs\(model, inputs\)"):
        ContextParallel()


def test_on_cuda_accelerate_makes_the_mesh_with_fsdp2() -> None:
    class Made:
        def __init__(self) -> None:
            config: Any = SimpleNamespace(_attn_implementation="moba")
            self.model = SimpleNamespace(config=config)
            self.compute_metrics = self.compute_loss_func = self.label_smoother = self.neftune_noise_alpha = None
            self.model_accepts_loss_kwargs = True
            self.args = SimpleNamespace(average_tokens_across_devices=True)
            self.accelerator = accelerator

    class Split(ContextParallel, Made):
        pass

    accelerator: Any = SimpleNamespace(
        parallelism_config=SimpleNamespace(cp_size=2),
        is_fsdp2=False,
        device=torch.device("cuda"),
        dispatch_batches=None,
    )
    with pytest.raises(ValueError, match=r"ParallelismConfig\(cp_size=2\) needs FSDP2"):
        Split()
    accelerator.parallelism_config = None
    with pytest.raises(ValueError, match=r"on cuda give TrainingArguments fsdp=True and parallelism_config="):
        Split(context_parallel=2)
