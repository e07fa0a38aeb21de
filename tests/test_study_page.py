"""docs/study.md runs as written, from the first recipe to the last chart, on records that are computed, not trained."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import synthetic_study

from openmoba import cli
from openmoba.lab.measure import resample
from openmoba.lab.model.build import SIZES
from openmoba.lab.study import charts, work
from openmoba.lab.study import fit as fitting
from openmoba.lab.study.recipe import read_recipe
from openmoba.lab.train import run

ROOT = Path(__file__).parent.parent


def page_commands() -> list[list[str]]:
    """The commands of the page's shell blocks, as lists of words."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", (ROOT / "docs" / "study.md").read_text(), re.DOTALL | re.MULTILINE)
    return [
        words[1:] for block in blocks for line in block.replace("\\\n", "").splitlines() if (words := shlex.split(line))
    ]


def test_the_page_runs_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A needle is looked for where there are weights: test_readme.py reads those commands' options."""
    monkeypatch.setattr(run, "run_training", synthetic_study.train)
    monkeypatch.setattr(synthetic_study, "PARAMETERS", {name: size.matrices for name, size in SIZES.items()})
    monkeypatch.setitem(synthetic_study.LAWS, "time_hybrid", (1.48, -0.1))
    for module in (fitting, resample):
        monkeypatch.setattr(module, "REPLICATES", 10)
    monkeypatch.setattr(work, "check_models", lambda _: None)  # test_recipes.py builds them
    monkeypatch.setattr(work, "planned_work", lambda _: 1.0)
    drawn = []
    monkeypatch.setattr(charts, "save", lambda _, path: drawn.append(path) or [path.with_suffix(".png")])
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    reported = {}
    for words in page_commands():
        seeds = words[1:] == ["recipes/chart-b.toml", "--out", "runs/chart-b"]  # 54 runs; those of one seed follow
        if words[:2] != ["evaluate", "needle"] and not seeds:
            assert cli.main(words) == 0, words
            reported[" ".join(words)] = capsys.readouterr().out
    for name in ("context", "candidates", "chart-a"):
        recipe = read_recipe(ROOT / "recipes" / f"{name}.toml")
        assert f"all {len(recipe.runs)} runs are finished" in reported[f"study recipes/{name}.toml --out runs/{name}"]
    assert {path.name for path in drawn} >= {
        "context-positions",
        "candidates-14m-candidates",
        "candidates-contexts",
        "rotation-14m-half-candidates",
        "granularity-14m-candidates",
        "switch-positions",
        "pretrain-scaling-law-equal-cost",
        "hybrids-15m-layerwise-hybrid",
        "finetune-15m-layerwise-hybrid",
    }
    assert (
        "at 55% of 700 TFLOP/s"
        in reported["study recipes/candidates.toml --out runs/candidates --dry-run --tflops 700"]
    )
