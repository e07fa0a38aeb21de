"""A study whose runs two processes train together is that of one process: the checks are in `study_checks.py`."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from ranks import checked


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return checked("study_checks.py", 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(
    "check",
    [
        "as one process",
        "refused in one sentence",
        "all train what the first says",
        "one speaks where all fail",
        "others end where the first fails alone",
        "who fails alone speaks",
    ],
)
def test_two_processes_train_each_run_together(outcomes: dict[str, list[str]], check: str) -> None:
    assert not outcomes[check], "\n".join(outcomes[check])
