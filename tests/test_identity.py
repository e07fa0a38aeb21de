"""Runs and studies are bound to their data: what has changed since is refused, by name, before work is lost."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_config, write_texts

from openmoba import cli
from openmoba.lab.config import DataConfig, RunConfig
from openmoba.lab.data import load as data_module
from openmoba.lab.data.identity import ASPECTS, Known, differences, shared, stored_identity
from openmoba.lab.measure.evaluate import evaluate_source
from openmoba.lab.measure.needle import measure_needles
from openmoba.lab.model.checkpoint import newest_checkpoint
from openmoba.lab.progress import Progress
from openmoba.lab.study.outcomes import read_outcomes
from openmoba.lab.study.recipe import parse_recipe
from openmoba.lab.study.report import write_report
from openmoba.lab.study.work import check_folders, run_study
from openmoba.lab.train.run import run_training
from openmoba.records import disk

OLD_STUDY = Path(__file__).parent / "data" / "study-de9d508"
"""Two finished runs as commit de9d508 wrote them, without weights; the documents were those of `write_texts`."""


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Four steps on a BPE of its own documents, which a test may change."""
    return tiny_config(tmp_path, tokenizer="bpe")


def cut_at_step_2(config: RunConfig, folder: Path) -> None:
    """A run of which records and checkpoint are those of its second step."""
    run_training(replace(config, train=replace(config.train, steps=2)), folder)
    (folder / "result.json").unlink()
    stored = disk.read_json(folder / "config.json")
    stored["train"]["steps"] = 4
    disk.write_json(folder / "config.json", stored)
    rows = [row for row in disk.read(folder / "metrics.jsonl") if row["kind"] == "train"]
    disk.keep(folder / "metrics.jsonl", rows)


def test_a_run_says_what_it_was_trained_on(config: RunConfig, tmp_path: Path) -> None:
    result = run_training(config, tmp_path / "run")
    identity = stored_identity(tmp_path / "run")
    assert identity == disk.read_json(tmp_path / "run" / "data.json")
    assert set(identity) == {"train", "valid", "tokenizer", "vocabulary", "training_windows"}
    assert identity.items() <= result["data"].items()
    assert identity["vocabulary"] == 270


def test_documents_and_not_their_files_are_what_counts(config: RunConfig, tmp_path: Path) -> None:
    lines = [json.dumps({"text": path.read_text()}) for path in sorted((tmp_path / "texts").iterdir())]
    (tmp_path / "same.jsonl").write_text("\n".join(lines) + "\n")
    folder, file = (
        data_module.load_data(replace(config.data, source=str(tmp_path / name))).identity
        for name in ("texts", "same.jsonl")
    )
    assert folder == file


def test_a_cut_run_goes_on_with_its_checkpoints_tokenizer_and_with_no_other_documents(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_at_step_2(config, tmp_path / "run")
    write_texts(tmp_path / "texts", 13)
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(data_module, "train_bpe", None)  # the checkpoint's is there
    with pytest.raises(ValueError, match=r"run were others: training documents .*train in another folder"):
        run_training(config, tmp_path / "run")
    for n in range(8, 13):
        (tmp_path / "texts" / f"{n}.txt").unlink()
    assert run_training(config, tmp_path / "run")["eval"]["step"] == 4


def test_a_run_without_a_checkpoint_is_bound_to_its_data_too(config: RunConfig, tmp_path: Path) -> None:
    cut_at_step_2(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    write_texts(tmp_path / "texts", 13)
    with pytest.raises(ValueError, match="training documents"):
        run_training(config, tmp_path / "run")


def test_a_run_is_measured_on_the_documents_it_did_not_see(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_training(config, tmp_path / "run")
    write_texts(tmp_path / "texts", 13)
    with pytest.raises(ValueError, match=r"run were others: validation documents .*has changed since; restore it"):
        evaluate_source(str(tmp_path / "run"))
    with pytest.raises(ValueError, match="validation documents"):
        measure_needles([tmp_path / "run"], lengths=(32,), depths=1, samples=1)
    assert cli.main(["evaluate", str(tmp_path / "run"), "--data.length", "31"]) == 2, "only its windows are others"
    assert "validation documents" in capsys.readouterr().err
    shutil.copytree(tmp_path / "texts", tmp_path / "others")
    assert cli.main(["evaluate", str(tmp_path / "run"), "--data.source", str(tmp_path / "others")]) == 0
    (tmp_path / "run" / "data.json").unlink()
    (tmp_path / "run" / "result.json").unlink()
    notes: list[str] = []
    monkeypatch.setattr(Progress, "note", lambda self, text: notes.append(text))
    evaluate_source(str(tmp_path / "run"))
    assert "is still what it was trained on is not known" in notes[0], "as of runs older than this record"


def test_tokenizers_are_compared_where_they_come_from_one_place() -> None:
    mine, other = ({"train": "a", "tokenizer": name, "vocabulary": 9} for name in "xy")
    assert differences(mine, other) == ["tokenizer (x there, y here)"]
    every, data = dict.fromkeys(ASPECTS, 0), DataConfig()
    assert shared(every, data, data) == every
    assert set(shared(every, data, data, same_origin=False)) == {"train", "valid"}


def test_a_run_is_not_measured_on_another_split_of_its_documents(config: RunConfig, tmp_path: Path) -> None:
    run_training(config, tmp_path / "run")
    for held in ({"hold_out": 2}, {"hold_out": 2, "length": 16}):
        with pytest.raises(ValueError, match=r"trained with data\.hold_out=4, so data\.hold_out=2 would measure it on"):
            evaluate_source(str(tmp_path / "run"), replace(config.data, **held))
    write_texts(tmp_path / "held", 3)
    named = replace(config, data=replace(config.data, valid=str(tmp_path / "held")))
    run_training(named, tmp_path / "named")
    with pytest.raises(ValueError, match=r"trained with data\.valid=.*held, so data\.hold_out=4 would measure it on"):
        evaluate_source(str(tmp_path / "named"), config.data)
    assert evaluate_source(str(tmp_path / "run"), replace(named.data, length=16))["lm_loss"] > 0
    write_texts(tmp_path / "held", 4)
    with pytest.raises(ValueError, match="named were others: validation documents"):
        evaluate_source(str(tmp_path / "named"))


def test_a_run_that_starts_from_another_keeps_its_split(config: RunConfig, tmp_path: Path) -> None:
    run_training(config, tmp_path / "run")
    write_texts(tmp_path / "texts", 13)
    tuning = replace(config, train=replace(config.train, start_from=str(tmp_path / "run")))
    with pytest.raises(ValueError, match=r"run were others: .*validation documents"):
        run_training(tuning, tmp_path / "tuned")
    shutil.copytree(tmp_path / "texts", tmp_path / "others")
    other = replace(tuning, data=replace(config.data, tokenizer="auto", source=str(tmp_path / "others")))
    assert run_training(other, tmp_path / "tuned")["data"]["vocabulary"] == 270


def test_the_standard_library_is_said_to_change_with_python() -> None:
    known = Known("runs/old", {"train": "0123456789", "valid": "same"}, "restore them")
    with pytest.raises(ValueError, match=r"training documents \(01234567 there, abcdefgh here\).* changes with every"):
        known.check({"train": "abcdefghij", "valid": "same"}, "stdlib")
    known.check({"tokenizer": "not known"}, "stdlib")


@pytest.fixture
def old_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That study and its documents, in the current folder."""
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "texts")
    shutil.copytree(OLD_STUDY, tmp_path / "study")
    return Path("study")


def extended(study: Path, *, arms: str = '["full", "moba"]') -> Any:
    return parse_recipe((study / "recipe.toml").read_text().replace('arms = ["full"]', f"arms = {arms}"), title="t")


def test_a_study_of_de9d508_is_read_extended_and_reported(old_study: Path) -> None:
    recipe = extended(old_study)
    assert run_study(recipe, old_study, run_training, lambda _: Progress()) == 2
    write_report(recipe, old_study, "6nd")
    report = (old_study / "report.md").read_text()
    assert "MoBA is" in report
    assert "4 runs" in report
    assert "2 of 4 runs are older than the record of their data" in report


def test_a_study_of_de9d508_is_not_extended_with_other_documents(old_study: Path) -> None:
    write_texts(Path("texts"), 13)
    with pytest.raises(ValueError, match=r"seed0 were others: training windows \(129 there, 222 here.*another --out"):
        run_study(extended(old_study), old_study, run_training, lambda _: Progress())


def test_a_setting_that_an_older_run_does_not_have_is_its_default(old_study: Path) -> None:
    folder = old_study / "pretrain" / "nano-full-seed0"
    stored = disk.read_json(folder / "config.json")
    del stored["train"]["fsdp"], stored["data"]["column"]
    disk.write_json(folder / "config.json", stored)
    check_folders(extended(old_study), old_study)
    run = next(run for run in extended(old_study).runs if run.name == "pretrain/nano-full-seed0")
    assert run_training(run.config(old_study), folder)["eval"]["step"] == 4
    moved = replace(run.config(old_study), data=replace(run.config(old_study).data, cache="elsewhere"))
    assert run_training(moved, folder)["eval"]["step"] == 4


def test_a_study_goes_on_with_no_other_documents(old_study: Path) -> None:
    """As with `arms = ["full"]`, the documents overwritten, and then `arms = ["full", "moba"]`."""
    study = Path("new")
    assert run_study(extended(old_study, arms='["full"]'), study, run_training, lambda _: Progress()) == 2
    write_texts(Path("texts"), 13)
    with pytest.raises(ValueError, match=r"new/pretrain/nano-full-seed0 were others: training documents"):
        run_study(extended(old_study), study, run_training, lambda _: Progress())
    assert newest_checkpoint(study / "pretrain" / "nano-moba-seed0") is None


def test_runs_of_different_documents_are_not_compared(old_study: Path) -> None:
    for seed in (0, 1):
        path = old_study / "pretrain" / f"nano-full-seed{seed}" / "result.json"
        result = disk.read_json(path)
        result["data"] |= {"train": f"documents {seed}", "valid": "0" * 32, "tokenizer": "1" * 32}
        disk.write_json(path, result)
    with pytest.raises(ValueError, match=r"seed0 were others: training documents.*--out"):
        read_outcomes(extended(old_study, arms='["full"]'), old_study)
    with pytest.raises(ValueError, match=r"seed0 were others: training documents.*--out"):
        check_folders(extended(old_study), old_study)
    assert cli.main(["plot", str(old_study)]) == 2
