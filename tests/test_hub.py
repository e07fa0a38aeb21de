"""Names of models and documents that are not here: looked for on the hub where it may have them."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from openmoba import cli
from openmoba.hub import check_model_source, check_source

CONVERT = ["--block-size", "8", "--top-k", "2"]


def test_names_that_the_hub_may_have_are_looked_for_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("gpt2", "Qwen/Qwen3-0.6B", "runs", str(tmp_path)):
        check_source(name)
    for name in ("runs/demo", "/runs", "./gpt2", "a b", "a/b/c", "~/nowhere", "", "runs/"[:-1] + "/x"):
        with pytest.raises(ValueError, match="does not exist"):
            check_source(name)


def test_a_hub_that_does_not_answer_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "kept"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("gpt2", "Qwen/Qwen3-0.6B"):
        with pytest.raises(
            ValueError, match=f"{name} does not exist here, and the hub does not answer .*; give bytes$"
        ):
            check_model_source(name, "bytes")
    (tmp_path / "kept" / "models--gpt2").mkdir(parents=True)
    check_model_source("gpt2", "bytes")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check_model_source("Qwen/Qwen3-0.6B", "bytes")


@pytest.mark.parametrize(
    "words", [["evaluate", "nope"], ["evaluate", "needle", "nope"], ["convert", "nope", "out", *CONVERT]], ids=str
)
def test_a_name_that_is_nowhere_is_an_error_at_once(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)  # as between one try and the next
    assert cli.main(words) == 2
    assert waits == []
    assert "nope does not exist here, and the hub does not answer" in capsys.readouterr().err
