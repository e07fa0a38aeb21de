"""Training on a GPU: the host runs ahead of the device between two records."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from openmoba.lab.arms import ArmConfig
from openmoba.lab.config import DataConfig, EvalConfig, ModelConfig, RunConfig, TrainConfig
from openmoba.lab.train.run import run_training
from openmoba.lab.train.trainer import RunTrainer
from openmoba.records import disk

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LOGGED = 4


@pytest.mark.parametrize("loss_tokens", [None, 256])
@pytest.mark.parametrize("arm", ["full", "moba", "hybrid"])
def test_no_step_between_two_records_waits_for_the_device(
    arm: str, loss_tokens: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(6):
        text = "".join(f"{i} times {number} is {i * number}, " for i in range(600))
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    config = RunConfig(
        data=DataConfig(str(tmp_path / "texts"), hold_out=3, tokenizer="bytes", length=2048, cache=str(tmp_path / "c")),
        model=ModelConfig(size="2m"),
        arm=ArmConfig(arm, 128, 3),  # type: ignore[arg-type]
        train=TrainConfig(
            steps=16, batch_size=2, micro_batch_size=1, log_every=LOGGED, checkpoint_every=16, loss_tokens=loss_tokens
        ),
        eval=EvalConfig(windows=2),
    )
    plain = RunTrainer.attend_as_configured

    def watch(trainer: RunTrainer, step: int) -> None:
        """From the second record on, when kernels are compiled, waiting is an error in steps that write no record."""
        plain(trainer, step)
        quiet = step > LOGGED and (step + 1) % LOGGED
        torch.cuda.set_sync_debug_mode("error" if quiet else "default")

    monkeypatch.setattr(RunTrainer, "attend_as_configured", watch)
    try:
        run_training(config, tmp_path / "run")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    rows = [row for row in disk.read(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["step"] for row in rows] == [4, 8, 12, 16]
    assert all(row["tokens_per_second"] > 0 for row in rows)
