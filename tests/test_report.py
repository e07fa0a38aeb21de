"""The report of a study with known laws: figures, tables, and verdicts that follow the noise."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import synthetic_study
from matplotlib.figure import Figure
from synthetic_study import CANDIDATES, DOCUMENTS, RANGES, RECIPE, WINDOWS, silent, train

from openmoba import cli
from openmoba.lab.arms import ArmConfig
from openmoba.lab.measure.compute import AXES, Axis, Shape, training_compute
from openmoba.lab.run_files import RECIPE_FILE
from openmoba.lab.study import charts, figures, panels
from openmoba.lab.study.candidates import standings
from openmoba.lab.study.charts import describe_sparsity
from openmoba.lab.study.figures import Level
from openmoba.lab.study.outcomes import behind, by, difference, fit, of_stage, read_outcomes, seed_noise
from openmoba.lab.study.recipe import Recipe, parse_recipe, read_recipe
from openmoba.lab.study.report import write_report
from openmoba.lab.study.results import experiments, read_studies
from openmoba.lab.study.work import run_study


def make(out: Path, text: str = RECIPE) -> Recipe:
    recipe = parse_recipe(text, title="t")
    run_study(recipe, out, train, silent)
    return recipe


pytestmark = pytest.mark.usefixtures("few_replicates")


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports whose figures are made but not written, which takes most of the time."""
    monkeypatch.setattr(charts, "save", lambda figure, path: [path.with_name(f"{path.name}.png")])


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study with its report."""
    out = tmp_path_factory.mktemp("study")
    write_report(make(out), out, "6nd")
    return out


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


def test_report_lists_every_run_with_compute_by_all_conventions(study: Path) -> None:
    report = (study / "report.md").read_text()
    rows = [line for line in report.splitlines() if line.startswith(("| small", "| medium", "| large"))]
    rows = [line for line in rows if line.count("|") == 14]
    assert len(rows) == 22
    run = next(row for row in rows if row.startswith("| large | Full attention | 1 | 1,200,000 | 1,638,400"))
    assert all(f"| {value} |" in run for value in ("1.37e-07", "1.91e-07", "1.50e-07", "60", "50,000", "42%"))


def test_laws_that_made_the_runs_are_found_again(study: Path) -> None:
    outcomes = [o for o in read_outcomes(parse_recipe(RECIPE, title="t"), study) if o.run.stage.name == "pretrain"]
    for arm, runs in by("arm", outcomes).items():
        law = fit(runs, "trailing", "6nd")
        assert law is not None
        assert law.law.b == pytest.approx(synthetic_study.LAWS[arm][1], abs=0.003)
        assert synthetic_study.LAWS[arm][1] in law.b


def test_what_moba_loses_with_distance_is_paired_on_the_same_text(study: Path) -> None:
    outcomes = [
        o for o in read_outcomes(parse_recipe(RECIPE, title="t"), study) if o.run.name.startswith("pretrain/large")
    ]
    moba, full = (by("arm", outcomes)[arm] for arm in ("moba", "full"))
    found = difference(moba, full, (RANGES - 1, 1), seed_noise(outcomes, (RANGES - 1, 1)))
    ends = [difference(moba, full, number) for number in (RANGES - 1, 1)]
    assert found is not None
    assert ends[0] is not None
    assert ends[1] is not None
    assert found.mean == pytest.approx(ends[0].mean - ends[1].mean)
    assert found.mean < 0
    assert found.resolved
    sentence = (
        f"from 128-256 to 896-1,024 the difference of MoBA from full attention changes by {found.mean:+.4f} nats ["
    )
    assert sentence in (study / "report.md").read_text()


def comparisons(study: Path) -> list[str]:
    """Differences of MoBA from full attention: those in LM and trailing loss, of each size and stage."""
    lines = [line.split(" | ") for line in (study / "report.md").read_text().splitlines()]
    return [cell for line in lines if line[1:3] == ["MoBA", "Full attention"] for cell in line[4:6]]


def test_real_differences_are_resolved(study: Path) -> None:
    assert len(comparisons(study)) == 8
    assert all(re.fullmatch(r"\*\*\+0\.\d{4} \[\+0\.\d{4}, \+0\.\d{4}\]\*\*", cell) for cell in comparisons(study))


@pytest.mark.usefixtures("undrawn")
def test_equal_arms_are_within_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(synthetic_study.LAWS, "moba", synthetic_study.LAWS["full"])
    write_report(make(tmp_path), tmp_path, "6nd")
    assert sum("**" not in cell for cell in comparisons(tmp_path)) >= 6
    exponents = [line for line in (tmp_path / "report.md").read_text().splitlines() if "exponent minus" in line]
    assert len(exponents) == 4, "by two conventions; the seconds of these runs are all the same"
    assert all("**within noise**" in line for line in exponents)


@pytest.mark.usefixtures("undrawn")
def test_one_seed_is_said_to_be_one_seed(tmp_path: Path) -> None:
    write_report(make(tmp_path, RECIPE.replace("seeds = [0, 1]", "seeds = [0]")), tmp_path, "6nd")
    report = (tmp_path / "report.md").read_text()
    assert "one seed" in report
    assert "**resolved**" not in report
    assert "**resolved on these windows**, for this one seed" in report


@pytest.mark.usefixtures("undrawn")
def test_the_noise_of_seeds_is_said_by_stage_and_size(study: Path, tmp_path: Path) -> None:
    report = (study / "report.md").read_text()
    assert "small in stage pretrain: 0.0" in report
    assert "nats between the seeds of full, moba; " in report
    assert "one seed" not in report
    before, _, after = RECIPE.rpartition("seeds = [0, 1]")
    write_report(make(tmp_path, f"{before}seeds = [0]{after}"), tmp_path, "6nd")
    report = (tmp_path / "report.md").read_text()
    assert "Every run of large in stage finetune was trained with one seed." in report


@pytest.mark.usefixtures("undrawn")
def test_settings_are_those_of_the_arms_that_have_blocks(tmp_path: Path) -> None:
    text = RECIPE.replace("arm = { block_size = 64, top_k = 3 }", "")
    text = text.replace('"moba" }', '"moba", block_size = 32, top_k = 5 }')
    recipe = make(tmp_path, text)
    write_report(recipe, tmp_path, "6nd")
    settings = "MoBA: blocks of 32, top-5 of 32 blocks; blocks of 64, top-3 of 16 blocks. Losses"
    assert settings in (tmp_path / "report.md").read_text()
    runs = by("arm", read_outcomes(recipe, tmp_path))
    assert describe_sparsity([*runs["full"], *runs["moba"]]) == "block 32, top-5 of 32 blocks"
    assert describe_sparsity(runs["full"]) == "full attention alone"


@pytest.mark.usefixtures("undrawn")
def test_hybrids_with_equally_many_full_layers_are_all_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[list[str]] = []
    draw = figures.layers_chart

    def record(hybrid: dict[str, Level], *args: Any, **kwargs: Any) -> Figure:
        shown.append(list(hybrid))
        return draw(hybrid, *args, **kwargs)

    monkeypatch.setattr(figures, "layers_chart", record)
    write_report(make(tmp_path / "counts"), tmp_path / "counts", "6nd")
    text = RECIPE.replace("last-3", "first").replace("full_layers = 3", "full_layers = [0]")
    write_report(make(tmp_path / "indices", text), tmp_path / "indices", "6nd")
    assert shown == [["1 layer", "2 layers", "3 layers"], ["last-1", "first", "last-2"]]


@pytest.mark.usefixtures("undrawn")
def test_windows_shorter_than_the_length_leave_a_report_of_the_lm_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make(tmp_path)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    for path in tmp_path.glob("*/*/metrics.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row["trailing_loss"] = None
        rows[-1]["intervals"]["trailing"] = None
        rows[-1]["windows"]["trailing"] = [None] * WINDOWS
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = write_report(recipe, tmp_path, "6nd")
    report = (tmp_path / "report.md").read_text()
    assert "none of their validation windows reaches data.length=1,024; the scaling chart, which shows it, is" in report
    assert [file.name for file in files] == ["report.md", "pretrain-positions.png", "finetune-positions.png"]
    runs = [line for line in report.splitlines() if line.startswith("| ") and line.count("|") == 14]
    assert len([line for line in runs if " | - | " in line]) == 22
    assert set(comparisons(tmp_path)[1::2]) == {"-"}
    assert all("nats" not in cell and "+0." in cell for cell in comparisons(tmp_path)[::2])
    assert cli.main(["fit", str(tmp_path)]) == 0
    assert "trailing" not in capsys.readouterr().out


@pytest.mark.usefixtures("undrawn")
def test_report_of_unfinished_study_says_so(tmp_path: Path) -> None:
    recipe = parse_recipe(RECIPE, title="t")
    for run in recipe.runs[:3]:
        train(run.config(tmp_path), tmp_path / run.name)
    write_report(recipe, tmp_path, "6nd")
    assert "**3 of 22 runs are finished**" in (tmp_path / "report.md").read_text()


def test_report_says_what_small_models_cannot_show(study: Path) -> None:
    report = (study / "report.md").read_text()
    assert "1,200,000 parameters" in report
    assert "cannot confirm or refute" in report
    assert "positions 896-1,024 differs from that at 128-256 by -0." in report
    assert f"{DOCUMENTS} documents, {WINDOWS} windows, 2 seeds" in report


def test_differences_pair_windows_and_seeds(study: Path) -> None:
    runs = [o for o in read_outcomes(parse_recipe(RECIPE, title="t"), study) if o.run.name.startswith("pretrain/large")]
    arms = by("arm", runs)
    both = difference(arms["moba"], arms["full"], "trailing")
    one = difference(arms["moba"], arms["full"][1:], "trailing")
    assert both is not None
    assert one is not None
    assert len(both.per_seed) == 2
    assert one.per_seed == both.per_seed[1:]
    assert difference(arms["moba"][:1], arms["full"][1:], "trailing") is None


def test_the_noise_of_seeds_widens_intervals_of_single_seeds(tmp_path: Path) -> None:
    runs = read_outcomes(make(tmp_path, CANDIDATES), tmp_path)
    arms, noise = by("arm", runs), seed_noise(runs, "trailing")
    assert noise is not None
    assert noise.freedom == 4
    without, within = (difference(arms["last-3"], arms["full"], "trailing", n) for n in (None, noise))
    assert without is not None
    assert within is not None
    assert without.interval is not None
    assert within.interval is not None
    assert within.mean == without.mean
    widths = [found.high - found.low for found in (without.interval, within.interval)]
    assert widths[1] > max(widths[0], 1.8 * noise.smallest_difference(1))


@pytest.mark.usefixtures("undrawn")
def test_short_lists_say_distance_cost_and_the_smallest_difference_that_can_be_seen(tmp_path: Path) -> None:
    recipe = make(tmp_path, CANDIDATES)
    files = write_report(recipe, tmp_path, "6nd")
    assert [file.name for file in files[1:]] == ["candidates-large-candidates.png", "candidates-positions.png"]
    outcomes = read_outcomes(recipe, tmp_path)
    found = standings(outcomes)
    assert found[0].runs[0].run.arm == "last-3"
    assert {standing.runs[0].run.arm for standing in found} == {"moba", "fine", "last-1", "last-3"}
    shares = {standing.runs[0].run.arm: standing.key_share for standing in found}
    assert shares["last-3"] == pytest.approx(shares["moba"] + 3 / 16 * (1 - shares["moba"]))
    pairs = sum(min(t % 64 + 1 + 128, t + 1) for t in range(1024)) / sum(t + 1 for t in range(1024))
    assert shares["moba"] == pytest.approx(pairs)
    assert by("arm", outcomes)["full"][0].key_share() == 1
    report = (tmp_path / "report.md").read_text()
    noise = seed_noise(outcomes, "trailing")
    assert noise is not None
    assert f"lets one see is {2.776445 * noise.sd * 2**0.5:.4f} nats" in report
    assert "t · s · √(2 / seeds)" in report
    best = found[0].plain.trailing
    assert best is not None
    assert f"| last-3 | 1 | {best.mean:+.4f} [" in report
    assert "the lowest trailing loss of 4 sparse candidates is that of last-3: " in report
    assert "All but last-3 are resolved above full attention (for arms with key convolution: " in report
    assert "**Which setting is as good as full attention?**" in report


@pytest.mark.usefixtures("undrawn")
def test_arms_with_key_convolution_are_also_compared_with_full_attention_that_has_it(tmp_path: Path) -> None:
    text = CANDIDATES.replace('"fine", ', '"keys", "full-keys", ')
    keys = 'keys = { name = "moba", key_conv = 4 }\nfull-keys = { name = "full", key_conv = 4 }\n'
    recipe = make(tmp_path, text.replace("[arms]\n", f"[arms]\n{keys}"))
    write_report(recipe, tmp_path, "6nd")
    outcomes = read_outcomes(recipe, tmp_path)
    own = {standing.runs[0].run.arm: standing.own for standing in standings(outcomes)}
    assert {arm for arm, against in own.items() if against} == {"keys"}
    arms, noise = by("arm", outcomes), seed_noise(outcomes, "trailing")
    against = own["keys"]
    assert against is not None
    assert against.trailing == difference(arms["keys"], arms["full-keys"], "trailing", noise)
    report = (tmp_path / "report.md").read_text()
    assert "| trailing, from full with the same keys | % |" in report
    assert against.trailing is not None
    row = next(line for line in report.splitlines() if line.startswith("| keys | 1 |"))
    assert f"| {against.trailing.mean:+.4f} [" in row
    assert sum(line.startswith("| large | keys | full-keys | 1 |") for line in report.splitlines()) == 1
    assert arms["full-keys"][0].key_share() == 1


@pytest.mark.usefixtures("undrawn")
def test_one_arm_shows_what_each_size_gains_from_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, Any]] = []
    draw = panels.position_chart

    def record(ranges: Any, losses: Any, differences: Any, **kwargs: Any) -> Figure:
        shown.append({"losses": losses, "differences": differences, **kwargs})
        return draw(ranges, losses, differences, **kwargs)

    monkeypatch.setattr(panels, "position_chart", record)
    text = RECIPE[: RECIPE.index('[[stages]]\nname = "finetune"')].replace('"moba"]', '"]').replace(', "]', "]")
    write_report(make(tmp_path, text.replace('chart = "scaling"', "")), tmp_path, "6nd")
    ((names, gains), difference_name) = (shown[0]["losses"], shown[0]["differences"]), shown[0]["difference_name"]
    assert list(names) == ["small, 200 K parameters", "medium, 500 K parameters", "large, 1.2 M parameters"]
    assert "positions 0-128" in difference_name
    for levels in gains.values():
        assert [level.loss == 0 for level in levels] == [True] + [False] * (RANGES - 1)
        assert all(level.interval.low < level.loss < level.interval.high < 0 for level in levels[1:])
    report = (tmp_path / "report.md").read_text()
    assert "large: the loss at positions 896-1,024 is -0.6" in report
    assert "from that at 0-128: context counts. From that at 384-512 it is -0.2" in report
    assert "the second half of the window counts (8 documents, 24 windows, 2 seeds;" in report


def test_the_context_cut_short_tells_what_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several arms every one, in the results full attention; where nothing is lost it says so."""
    recipe = parse_recipe(CANDIDATES.replace("[sizes]", "[run.eval]\ncontexts = [256, 512]\n[sizes]"), title="t")
    folders = {cut: tmp_path / str(cut) for cut in (0.05, 0.0)}
    for cut, folder in folders.items():
        monkeypatch.setattr(synthetic_study, "CUT", cut)
        run_study(recipe, folder, train, silent)
        write_report(recipe, folder, "6nd")
    text, unmoved = (folder.joinpath("report.md").read_text() for folder in folders.values())
    sentence = (
        "large, Full attention, the same last 128 tokens of every window: with all 1,024 tokens in sight their loss is "
        "-0.1000 nats [-0.1000, -0.1000] from that with 256, -0.0500 nats [-0.0500, -0.0500] from that with 512. "
        "What lies farther back than 512 counts (8 documents, 24 windows, 3 seeds)."
    )
    assert text.count(" | **+0.1000 [+0.1000, +0.1000]** | **+0.0500 [+0.0500, +0.0500]** |") == 5
    assert unmoved.count(" | +0.0000 [+0.0000, +0.0000] | +0.0000 [+0.0000, +0.0000] |") == 5
    assert "figures/candidates-contexts.png" in text
    assert (folders[0.05] / "figures" / "candidates-contexts.png").exists()
    shown = experiments(read_studies([folders[0.05]]), tmp_path)
    assert sentence in shown
    assert shown.count("What lies farther back") == 1
    assert "candidates-contexts.png" in shown


@pytest.mark.usefixtures("undrawn")
def test_the_training_loss_around_a_switch_stands_beside_that_of_full_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(synthetic_study.LAWS, "time_hybrid", synthetic_study.LAWS["full"])
    text = CANDIDATES.replace('last-1 = { name = "hybrid", full_layers = 1 }', 'last-1 = { name = "time_hybrid" }')
    recipe = make(tmp_path, text)
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
        "large, last-1, seed 0: the attention changes after step 360. Training loss of the 20 steps before and after "
        "it: 2.0000 and 3.2500 nats (+1.2500), 3.5000 in its highest record; full attention on the same batches "
        "2.0000 and 1.2500 nats (-0.7500), 1.5000 in its highest record."
    ) in (tmp_path / "report.md").read_text()


def test_records_with_a_mean_for_every_range_and_no_documents_are_read(tmp_path: Path) -> None:
    """As they were made before windows kept their documents and ranges."""
    recipe = make(tmp_path, CANDIDATES)
    for path in tmp_path.glob("*/*/metrics.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        windows = rows[-1]["windows"]
        rows[-1]["windows"] = {"lm": windows["lm"], "trailing": windows["trailing"][2:]}  # two were shorter, say
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        result = json.loads((path.parent / "result.json").read_text())
        (path.parent / "result.json").write_text(json.dumps({k: v for k, v in result.items() if k != "speed"}))
    runs = by("arm", read_outcomes(recipe, tmp_path))
    found = difference(runs["moba"], runs["full"], "trailing")
    assert found is not None
    assert found.interval is not None
    assert found.mean in found.interval
    assert runs["full"][0].tokens_per_second == pytest.approx(1_638_400 / 60)
    by_range = difference(runs["moba"], runs["full"], RANGES - 1)
    assert by_range is not None
    assert by_range.mean == pytest.approx(found.mean, abs=0.01)
    assert by_range.interval is None, "a mean over all windows has no spread to draw from"
    assert behind(runs["moba"], "trailing") == behind(runs["moba"], 0).replace("24", "22") == "22 windows, 3 seeds"


@pytest.mark.usefixtures("undrawn")
def test_runs_on_different_windows_are_not_compared(tmp_path: Path) -> None:
    recipe = make(tmp_path, CANDIDATES)
    path = tmp_path / "candidates" / "large-moba-seed0" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"document":[0,0,0,1', '"document":[0,0,1,1'))
    with pytest.raises(ValueError, match=r"large-moba-seed0 and .* were not measured on the same validation windows"):
        write_report(recipe, tmp_path, "6nd")


@pytest.mark.usefixtures("undrawn")
def test_a_sweep_names_the_best_learning_rate_of_every_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic_study, "MORE", {(1e-3, 0): 0.03, (4e-3, 0): 0.01})
    head = RECIPE[: RECIPE.index("[[stages]]")]
    sizes = "".join(
        f'"large-{rate}" = {{ model = {{ size = "large" }}, train = {{ steps = 400, learning_rate = {rate} }} }}\n'
        for rate in (1e-3, 4e-3)
    )
    text = head.replace("[arms]", f"{sizes}[arms]")
    text += '[[stages]]\nname = "context"\nsizes = ["small", "large"]\narms = ["full"]\n'
    text += '[[stages]]\nname = "sweep"\nsizes = ["large-0.001", "large-0.004"]\narms = ["full"]\n'
    files = write_report(make(tmp_path, text), tmp_path, "6nd")
    assert [file.name for file in files] == ["report.md", "context-positions.png"]
    report = (tmp_path / "report.md").read_text()
    sentence = next(line for line in report.splitlines() if line.startswith("large, learning rate: "))
    outcomes = [
        run for run in read_outcomes(parse_recipe(text, title="t"), tmp_path) if run.config.model.size == "large"
    ]
    losses = {run.config.train.learning_rate: run.loss("lm") for run in outcomes}
    assert set(losses) == {1e-3, 2e-3, 4e-3}
    assert f"0.002 has the lowest LM loss, {losses[2e-3]:.4f} nats" in sentence
    assert "0.001 is +0.0300 nats [" in sentence
    assert "0.004 is +0.0100 nats [" in sentence
    assert "may be better still" not in sentence, "it is between the others"


@pytest.mark.usefixtures("undrawn")
def test_a_stage_beside_another_is_compared_with_its_runs(tmp_path: Path) -> None:
    text = RECIPE[: RECIPE.index('[[stages]]\nname = "finetune"')]
    stage = '[[stages]]\nname = "hybrids"\nsizes = ["large"]\narms = ["last-1", "last-2"]\nseeds = [0, 1]\n'
    recipe = make(tmp_path, f'{text}{stage}chart = "layers"\nbeside = "pretrain"\n')
    files = write_report(recipe, tmp_path, "6nd")
    assert [file.name for file in files[5:]] == ["hybrids-large-layerwise-hybrid.png", "hybrids-positions.png"]
    report = (tmp_path / "report.md").read_text()
    hybrids = report[report.index("## Stage hybrids") :]
    assert "4 runs; compared with Full attention, MoBA of stage pretrain." in hybrids
    assert "large: MoBA in every layer costs +0." in hybrids
    assert "With 2 of 16 layers full (12%; last-2): +0." in hybrids
    assert len([line for line in hybrids.splitlines() if line.startswith("| large |") and line.count("|") == 14]) == 4
    fewer = parse_recipe(f'{text}{stage}beside = "pretrain"\nbeside_arms = ["moba"]\n', title="t")
    compared = of_stage(fewer.stages[-1], read_outcomes(fewer, tmp_path))
    assert list(by("arm", compared)) == ["moba", "last-1", "last-2"]


def test_fit_and_plot_work_on_the_folder_alone(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", str(study), "--axis", "causal_exact"]) == 0
    assert "causal_exact" in (printed := capsys.readouterr().out)
    assert "| MoBA | trailing loss |" in printed
    before = (study / "figures" / "pretrain-scaling-law.svg").read_text()
    assert cli.main(["plot", str(study), "--axis", "chinchilla"]) == 0
    assert (study / "figures" / "pretrain-scaling-law.svg").read_text() != before
    assert cli.main(["plot", str(study)]) == 0


def test_a_run_that_is_not_the_recipes_is_not_drawn_as_if_it_were(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after folders of two studies were merged: charts would show one arm, or one length of training, as another."""
    copy = Path(shutil.copytree(study, tmp_path / "study")) / "pretrain"
    shutil.rmtree(copy / "large-full-seed0")
    shutil.copytree(copy / "large-moba-seed0", copy / "large-full-seed0")
    for command in ("fit", "plot"):
        assert cli.main([command, str(copy.parent)]) == 2
        said = capsys.readouterr().err
        assert f"{copy / 'large-full-seed0'} holds another run than {copy.parent / RECIPE_FILE} says" in said
        assert "(arm.name was 'moba' and is 'full'); bring the run or the recipe" in said


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
    assert "million tokens (tokens) the trailing loss of MoBA lies" in report
    assert "Fitted laws, L = a · C^b, C by the convention tokens" in report
    assert "accelerator s | tokens (M) | squared | tokens/s" in report
    assert f"| {tokens / 1e6:.1f} | - |" in report
    assert "Tokens (million tokens)" in (copy / "figures" / "pretrain-scaling-law.svg").read_text()
    with pytest.raises(ValueError, match="does not hold the compute by squared; train its run again, or choose one"):
        write_report(recipe, copy, "squared")
    shape = Shape(1100, 1000, hidden=8, layers=3, heads=2, head_dim=4, vocab=10, length=32)
    assert training_compute(shape, ArmConfig(), 2, 4, 5, 0.0)["squared"] == 320**2


def test_nothing_finished_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    assert cli.main(["plot", str(tmp_path)]) == 2
    assert "no run of" in capsys.readouterr().err
    assert cli.main(["fit", str(tmp_path)]) == 2
    assert "at least two sizes" in capsys.readouterr().err
