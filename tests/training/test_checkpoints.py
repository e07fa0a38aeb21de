"""Checkpoints: damaged ones are passed over and named, those that are read stay, what is in them is whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import curve, flip_a_byte

from openmoba.lab.config import RunConfig
from openmoba.lab.measure.evaluate import evaluate_source
from openmoba.lab.measure.generate import generate_text
from openmoba.lab.measure.needle import measure_needles
from openmoba.lab.model.checkpoint import checkpoints, damage, newest_checkpoint, newest_held, prune, seal
from openmoba.lab.progress import Progress
from openmoba.lab.train.run import run_training
from openmoba.records import disk


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json", "tokenizer.json"])
def test_corruption_of_the_same_size_falls_back_to_the_older_checkpoint(cut: Path, notes: list[str], name: str) -> None:
    flip_a_byte(cut / "checkpoint-4" / name)
    assert newest_checkpoint(cut, Progress()) == cut / "checkpoint-2"
    assert notes == [f"{cut / 'checkpoint-4'} is not used: {name} is not what was written (its hash differs)"]
    assert damage(cut / "checkpoint-4", contents=False) is None


def test_a_damaged_checkpoint_is_passed_over_or_named(short: RunConfig, cut: Path) -> None:
    weights = cut / "checkpoint-4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "model.safetensors has 100 bytes" in (damage(cut / "checkpoint-4") or "")
    assert newest_checkpoint(cut) == cut / "checkpoint-2"
    (cut / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"no usable checkpoint .*optimizer\.pt is missing.*delete the folder"):
        run_training(short, cut)


def test_whoever_measures_a_damaged_run_is_told(cut: Path, notes: list[str]) -> None:
    flip_a_byte(cut / "checkpoint-4" / "model.safetensors")
    evaluate_source(str(cut), progress=Progress())
    assert f"{cut / 'checkpoint-4'} is not used" in notes[0]


def test_a_damaged_run_goes_on_from_the_older_checkpoint(short: RunConfig, cut: Path, trained: Path) -> None:
    """And writes the damaged one again, whole."""
    flip_a_byte(cut / "checkpoint-4" / "optimizer.pt")
    (cut / "checkpoint-4" / "stray").write_text("of the damaged one")
    run_training(short, cut)
    assert curve(cut) == curve(trained)
    assert newest_checkpoint(cut) == cut / "checkpoint-4"
    assert not (cut / "checkpoint-4" / "stray").exists()


def test_tied_weights_of_a_checkpoint_are_not_said_to_be_missing(
    short: RunConfig, cut: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("transformers.trainer.logger.warning", lambda text, *_: said.append(text))
    shutil.rmtree(cut / "checkpoint-4")
    run_training(short, cut)
    assert "lm_head.weight" not in load_file(cut / "checkpoint-4" / "model.safetensors")
    assert not [text for text in said if "missing keys" in text]


def test_a_seal_without_hashes_is_one_of_an_older_run(cut: Path) -> None:
    seal_file = cut / "checkpoint-4" / "complete.json"
    disk.write_json(seal_file, {"files": disk.read_json(seal_file)["files"]})
    assert newest_checkpoint(cut) == cut / "checkpoint-4"
    seal_file.write_text('{"files": 3}')
    assert newest_checkpoint(cut) == cut / "checkpoint-2"


def test_weights_that_are_no_numbers_are_one_error(copied: Path) -> None:
    weights = copied / "checkpoint-4" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    seal(copied / "checkpoint-4")
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds NaN or infinity.*use an earlier checkpoint"):
        evaluate_source(str(copied))
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds NaN"):
        measure_needles([copied], lengths=(32,), depths=1, samples=1)
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds NaN"):
        generate_text(copied, "2 times", max_new_tokens=2)


def test_a_checkpoint_that_is_read_is_not_pruned(cut: Path) -> None:
    shutil.copytree(cut / "checkpoint-4", cut / "checkpoint-6")
    with newest_held(cut) as held:
        assert held == cut / "checkpoint-6"
        shutil.copytree(cut / "checkpoint-4", cut / "checkpoint-8")  # as training goes on
        prune(cut, keep=1)
        assert checkpoints(cut) == [cut / "checkpoint-8", held]
    prune(cut, keep=1)
    assert checkpoints(cut) == [cut / "checkpoint-8"]


def test_a_checkpoint_that_was_pruned_meanwhile_is_not_missed(cut: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = damage

    def late(checkpoint: Path) -> str | None:
        if checkpoint.name == "checkpoint-4" and checkpoint.exists():
            checkpoint.rename(cut / "checkpoint-6")  # the reader has listed it, and it is there no more
        return plain(checkpoint)

    monkeypatch.setattr("openmoba.lab.model.checkpoint.damage", late)
    assert newest_checkpoint(cut) == cut / "checkpoint-2", "an older one that is whole will do"
    shutil.rmtree(cut / "checkpoint-2")
    (cut / "checkpoint-6").rename(cut / "checkpoint-4")
    assert newest_checkpoint(cut) == cut / "checkpoint-6"


def test_a_checkpoint_that_does_not_say_its_time_is_named(short: RunConfig, cut: Path) -> None:
    (cut / "checkpoint-4").rename(cut / "checkpoint-3")
    state = disk.read_json(cut / "checkpoint-3" / "trainer_state.json")
    disk.write_json(cut / "checkpoint-3" / "trainer_state.json", state | {"global_step": 3})
    (cut / "checkpoint-3" / "unrecorded.json").unlink()
    seal(cut / "checkpoint-3")
    with pytest.raises(ValueError, match=r"checkpoint-3 does not say how long its run has taken.*delete the folder"):
        run_training(short, cut)
