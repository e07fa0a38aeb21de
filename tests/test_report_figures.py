"""The figures of a study with known laws: which there are, and what is in them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import synthetic_study
from matplotlib.figure import Figure
from synthetic_study import CANDIDATES, RANGES, RECIPE, make_study, silent, train

from openmoba import cli
from openmoba.lab.arms import ArmConfig
from openmoba.lab.measure.compute import AXES, Axis, Shape, training_compute
from openmoba.lab.run_files import RECIPE_FILE
from openmoba.lab.study import figures, panels
from openmoba.lab.study.figures import Level
from openmoba.lab.study.outcomes import read_outcomes
from openmoba.lab.study.recipe import parse_recipe, read_recipe
from openmoba.lab.study.report import write_report
from openmoba.lab.study.results import experiments
from openmoba.lab.study.studies import read_studies
from openmoba.lab.study.work import run_study

pytestmark = pytest.mark.usefixtures("few_replicates")


def test_report_shows_its_figures_and_they_exist(study: Path) -> None:
    report = (study / "report.md").read_text()
    shown = [part.partition(")")[0] for part in report.split("](")[1:]]
    assert [Path(name).name for name in shown] == [
        "pretrain-scaling-law.png",
        "pretrain-scaling-law-equal-cost.png",
        "pretrain-scaling-law-seconds.png",
        "pretrain-positions.png",
        "finetune-large-layerwise-hybrid.png",
        "finetune-positions.png",
    ]
    for name in shown:
        assert (study / name).stat().st_size > 10_000
        assert (study / name).with_suffix(".svg").exists()


@pytest.mark.usefixtures("undrawn")
def test_hybrids_with_equally_many_full_layers_are_all_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[list[str]] = []
    draw = figures.layers_chart

    def record(hybrid: dict[str, Level], *args: Any, **kwargs: Any) -> Figure:
        shown.append(list(hybrid))
        return draw(hybrid, *args, **kwargs)

    monkeypatch.setattr(figures, "layers_chart", record)
    write_report(make_study(tmp_path / "counts"), tmp_path / "counts", "6nd")
    text = RECIPE.replace("last-3", "first").replace("full_layers = 3", "full_layers = [0]")
    write_report(make_study(tmp_path / "indices", text), tmp_path / "indices", "6nd")
    assert shown == [["1 layer", "2 layers", "3 layers"], ["last-1", "first", "last-2"]]


@pytest.mark.usefixtures("undrawn")
def test_one_arm_shows_what_each_size_gains_from_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, Any]] = []
    draw = panels.position_chart

    def record(ranges: Any, losses: Any, differences: Any, looks: Any, **kwargs: Any) -> Figure:
        shown.append({"losses": losses, "differences": differences, **kwargs})
        return draw(ranges, losses, differences, looks, **kwargs)

    monkeypatch.setattr(panels, "position_chart", record)
    text = RECIPE[: RECIPE.index('[[stages]]\nname = "finetune"')].replace('"moba"]', '"]').replace(', "]', "]")
    write_report(make_study(tmp_path, text.replace('chart = "scaling"', "")), tmp_path, "6nd")
    ((names, gains), difference_name) = (shown[0]["losses"], shown[0]["differences"]), shown[0]["difference_name"]
    assert list(names) == ["200 K parameters", "500 K parameters", "1.2 M parameters"]
    assert "positions 0-128" in difference_name
    for levels in gains.values():
        assert [level.loss == 0 for level in levels] == [True] + [False] * (RANGES - 1)
        assert all(level.interval.low < level.loss < level.interval.high < 0 for level in levels[1:])
    report = (tmp_path / "report.md").read_text()
    assert "1.2 M: the loss at positions 896-1,024 is -0.6" in report
    assert "from that at 0-128: context counts. From that at 384-512 it is -0.2" in report
    assert "the second half of the window counts (8 documents, 24 windows, 2 seeds;" in report


def test_the_context_cut_short_tells_what_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every arm, in the report and in the results; where nothing is lost, and where more context does harm."""
    recipe = parse_recipe(CANDIDATES.replace("[sizes]", "[run.eval]\ncontexts = [256, 512]\n[sizes]"), title="t")
    folders = {cut: tmp_path / str(cut) for cut in (0.05, 0.0, -0.05)}
    for cut, folder in folders.items():
        monkeypatch.setattr(synthetic_study, "CUT", cut)
        run_study(recipe, folder, train, silent)
        write_report(recipe, folder, "6nd")
    text, unmoved, harmed = (folder.joinpath("report.md").read_text() for folder in folders.values())
    sentence = (
        "1.2 M, Full attention: the last 128 tokens have their lowest loss with all 1,024 tokens in sight. It is "
        "-0.0500 nats [-0.0500, -0.0500] from that with 512: what lies farther back counts (8 documents, 24 windows, 3 "
        "seeds)."
    )
    assert text.count(" | **+0.1000 [+0.1000, +0.1000]** | **+0.0500 [+0.0500, +0.0500]** |") == 5
    assert unmoved.count(" | +0.0000 [+0.0000, +0.0000] | +0.0000 [+0.0000, +0.0000] |") == 5
    assert "figures/candidates-contexts.png" in text
    assert (folders[0.05] / "figures" / "candidates-contexts.png").exists()
    shown = experiments(read_studies([folders[0.05]]), tmp_path)
    assert sentence in shown
    assert shown.count("what lies farther back counts") == text.count("what lies farther back counts") == 5
    assert "differs from" not in shown + text, "by position, where the text differs too"
    assert unmoved.count("what lies farther back is not seen to count") == 5
    assert (
        "1.2 M, MoBA: the last 128 tokens have their lowest loss with 256 tokens in sight. With all 1,024 it is "
        "+0.1000 nats [+0.1000, +0.1000] from that: what lies farther back does harm (8 documents, 24 windows, 3 "
        "seeds)."
    ) in harmed
    assert "candidates-contexts.png" in shown


@pytest.mark.usefixtures("undrawn")
def test_the_training_loss_around_a_switch_stands_beside_that_of_full_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(synthetic_study.LAWS, "time_hybrid", synthetic_study.LAWS["full"])
    text = CANDIDATES.replace('last-1 = { name = "hybrid", full_layers = 1 }', 'last-1 = { name = "time_hybrid" }')
    recipe = make_study(tmp_path, text)
    for arm, after in (("full", 1.0), ("last-1", 3.0)):
        rows = [
            {"kind": "train", "step": step, "loss": 2.0 if step <= 360 else after, "seconds": 1.0,
             "compute": {"accelerator_seconds": 1.0}}
            for step in range(10, 401, 10)
        ]  # fmt: skip
        rows[36]["loss"] = after + 0.5
        with (tmp_path / f"candidates/large-{arm}-seed0" / "metrics.jsonl").open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    write_report(recipe, tmp_path, "6nd")
    assert (
        "1.2 M, last-1, seed 0: the attention changes after step 360. Training loss of the 20 steps before and after "
        "it: 2.0000 and 3.2500 nats (+1.2500), 3.5000 in its highest record; full attention on the same batches "
        "2.0000 and 1.2500 nats (-0.7500), 1.5000 in its highest record."
    ) in (tmp_path / "report.md").read_text()


def test_fit_and_plot_work_on_the_folder_alone(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", str(study), "--axis", "causal_exact"]) == 0
    assert "compute by causal-exact" in (printed := capsys.readouterr().out)
    assert "| MoBA | trailing loss |" in printed
    before = (study / "figures" / "pretrain-scaling-law.svg").read_text()
    assert cli.main(["plot", str(study), "--axis", "chinchilla"]) == 0
    assert (study / "figures" / "pretrain-scaling-law.svg").read_text() != before
    assert cli.main(["plot", str(study)]) == 0


def test_an_axis_of_compute_is_one_entry(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn, fitted and tabled for runs that were recorded before anybody thought of it."""
    read = Axis("tokens", "tokens (M)", "Tokens", "million tokens", ".1f", read=lambda row: row["tokens"] / 1e6)
    counted = Axis("squared", "squared", "Tokens squared", count=lambda spent: spent.tokens**2)
    for axis in (read, counted):
        monkeypatch.setitem(AXES, axis.name, axis)
    copy = Path(shutil.copytree(study, tmp_path / "study"))
    recipe, tokens = (
        read_recipe(copy / RECIPE_FILE),
        read_outcomes(read_recipe(copy / RECIPE_FILE), copy)[0].final["tokens"],
    )
    report = write_report(recipe, copy, "tokens")[0].read_text()
    assert "million tokens by tokens (M), the most that both have spent, the trailing loss of MoBA lies" in report
    assert "Fitted laws, L = a · C^b, C by tokens (M)" in report
    assert "accelerator seconds | tokens (M) | squared | tokens/s" in report
    assert f"| {tokens / 1e6:.1f} | - |" in report
    assert "Tokens (million tokens)" in (copy / "figures" / "pretrain-scaling-law.svg").read_text()
    with pytest.raises(ValueError, match="does not hold the compute by squared; train its run again, or choose one"):
        write_report(recipe, copy, "squared")
    shape = Shape(1100, 1000, hidden=8, layers=3, heads=2, head_dim=4, vocab=10, length=32)
    assert training_compute(shape, ArmConfig(), 2, 4, 5, 0.0)["squared"] == 320**2
