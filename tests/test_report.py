"""The report of a study with known laws: tables, and verdicts that follow the noise."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import synthetic_study
from synthetic_study import CANDIDATES, DOCUMENTS, RANGES, RECIPE, WINDOWS, make_study, train

from openmoba import cli
from openmoba.lab.run_files import RECIPE_FILE
from openmoba.lab.study.candidates import standings
from openmoba.lab.study.charts import describe_sparsity
from openmoba.lab.study.compare import behind, difference, seed_noise
from openmoba.lab.study.groups import by, of_stage
from openmoba.lab.study.laws import fit
from openmoba.lab.study.outcomes import read_outcomes
from openmoba.lab.study.recipe import parse_recipe
from openmoba.lab.study.report import write_report
from openmoba.lab.train.history import history, keep

pytestmark = pytest.mark.usefixtures("few_replicates")


def test_report_lists_every_run_with_compute_by_all_conventions(study: Path) -> None:
    report = (study / "report.md").read_text()
    assert report.count("| tokens/s | MFU of 1,000 TFLOP/s, the data sheet's |") == 2, "one base for all runs"
    rows = [line for line in report.splitlines() if line.startswith(("| small", "| medium", "| large"))]
    rows = [line for line in rows if line.count("|") == 15]
    assert len(rows) == 22
    run = next(row for row in rows if row.startswith("| large | Full attention | 1 | 1,200,000 | 1,638,400 | 1.00"))
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
        f"1.2 M: the difference of MoBA from full attention goes from {ends[1].mean:+.4f} nats at positions 128-256 to "
        f"{ends[0].mean:+.4f} at 896-1,024, a change of {found.mean:+.4f} nats ["
    )
    assert sentence in (study / "report.md").read_text()


@pytest.mark.usefixtures("undrawn")
def test_what_the_largest_size_lacks_is_shown_of_the_one_before(tmp_path: Path) -> None:
    beside = """
[[stages]]
name = "hybrids"
sizes = ["medium", "large"]
arms = ["last-1"]
beside = "pretrain"
"""
    recipe = make_study(tmp_path, RECIPE + beside)
    for run in ("medium-full-seed0", "medium-full-seed1", "large-moba-seed0", "large-moba-seed1"):
        shutil.rmtree(tmp_path / "pretrain" / run)
    write_report(recipe, tmp_path, "6nd")
    pretrain, _, hybrids = (tmp_path / "report.md").read_text().split("\n## Stage ")[1:]
    assert "Loss by position (200 K), and the difference from full attention" in pretrain, "others have one arm"
    assert "200 K: with full attention the loss at positions" in pretrain
    assert "Loss by position (1.2 M), and the difference from full attention" in hybrids
    assert re.search(r"Arms, layers of 1\.2 M: .*; last-1: blocks of 64, top-3, 1 of 16 layers full \(15\)", hybrids)


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
    write_report(make_study(tmp_path), tmp_path, "6nd")
    assert sum("**" not in cell for cell in comparisons(tmp_path)) >= 6
    exponents = [line for line in (tmp_path / "report.md").read_text().splitlines() if "exponent minus" in line]
    assert len(exponents) == 4, "by two conventions; the seconds of these runs are all the same"
    assert all("**within noise**" in line for line in exponents)


@pytest.mark.usefixtures("undrawn")
def test_one_seed_is_said_to_be_one_seed(tmp_path: Path) -> None:
    write_report(make_study(tmp_path, RECIPE.replace("seeds = [0, 1]", "seeds = [0]")), tmp_path, "6nd")
    report = (tmp_path / "report.md").read_text()
    assert "one seed" in report
    assert "**resolved**" not in report
    assert "**resolved on these windows**, for this one seed" in report


@pytest.mark.usefixtures("undrawn")
def test_the_noise_of_seeds_is_said_by_stage_and_size(study: Path, tmp_path: Path) -> None:
    report = (study / "report.md").read_text()
    assert "200 K in stage pretrain: 0.0" in report
    assert "nats between the seeds of full, moba; " in report
    assert "one seed" not in report
    before, _, after = RECIPE.rpartition("seeds = [0, 1]")
    write_report(make_study(tmp_path, f"{before}seeds = [0]{after}"), tmp_path, "6nd")
    report = (tmp_path / "report.md").read_text()
    assert "Every run of 1.2 M in stage finetune was trained with one seed." in report


@pytest.mark.usefixtures("undrawn")
def test_settings_are_those_of_the_arms_that_have_blocks(tmp_path: Path) -> None:
    text = RECIPE.replace("arm = { block_size = 64, top_k = 3 }", "")
    text = text.replace('"moba" }', '"moba", block_size = 32, top_k = 5 }')
    recipe = make_study(tmp_path, text)
    write_report(recipe, tmp_path, "6nd")
    settings = "MoBA: blocks of 32, top-5 of 32 blocks; blocks of 64, top-3 of 16 blocks. Losses"
    assert settings in (tmp_path / "report.md").read_text()
    runs = by("arm", read_outcomes(recipe, tmp_path))
    assert describe_sparsity([*runs["full"], *runs["moba"]]) == "block 32, top-5 of 32 blocks"
    assert describe_sparsity(runs["full"]) == "full attention alone"


@pytest.mark.usefixtures("undrawn")
def test_a_single_window_resolves_nothing(tmp_path: Path) -> None:
    recipe = make_study(tmp_path, RECIPE.replace("seeds = [0, 1]", "seeds = [0]"))
    for path in tmp_path.glob("*/*/metrics.jsonl"):
        rows = history(path.parent)
        rows[-1]["windows"] = {key: values[:1] for key, values in rows[-1]["windows"].items()}
        path.unlink()
        keep(path.parent, rows)
    write_report(recipe, tmp_path, "6nd")
    report = (tmp_path / "report.md").read_text()
    assert "(1 document, 1 window, 1 seed)" in report
    assert "resolved" not in report
    assert "Fitted laws" not in report
    assert "There is no law yet: it takes two windows" in report


@pytest.mark.usefixtures("undrawn")
def test_windows_shorter_than_the_length_leave_a_report_of_the_lm_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_study(tmp_path)
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
    runs = [line for line in report.splitlines() if line.startswith("| ") and line.count("|") == 15]
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
    assert "**3 of 22 runs so far**" in (tmp_path / "report.md").read_text()


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
    runs = read_outcomes(make_study(tmp_path, CANDIDATES), tmp_path)
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
    recipe = make_study(tmp_path, CANDIDATES)
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
    assert "last-3 has the lowest trailing loss of 4 sparse candidates. " in report
    assert "Resolved above it: last-1, " in report
    assert "**Which setting is as good as full attention?**" in report


@pytest.mark.usefixtures("undrawn")
def test_arms_with_key_convolution_are_also_compared_with_full_attention_that_has_it(tmp_path: Path) -> None:
    text = CANDIDATES.replace('"fine", ', '"keys", "full-keys", ')
    keys = 'keys = { name = "moba", key_conv = 4 }\nfull-keys = { name = "full", key_conv = 4 }\n'
    recipe = make_study(tmp_path, text.replace("[arms]\n", f"[arms]\n{keys}"))
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
    assert sum(line.startswith("| 1.2 M | keys | full-keys | 1 |") for line in report.splitlines()) == 1
    assert arms["full-keys"][0].key_share() == 1


def test_records_with_a_mean_for_every_range_and_no_documents_are_read(tmp_path: Path) -> None:
    """As they were made before windows kept their documents and ranges."""
    recipe = make_study(tmp_path, CANDIDATES)
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
    recipe = make_study(tmp_path, CANDIDATES)
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
    files = write_report(make_study(tmp_path, text), tmp_path, "6nd")
    assert [file.name for file in files] == ["report.md", "context-positions.png"]
    report = (tmp_path / "report.md").read_text()
    sentence = next(line for line in report.splitlines() if line.startswith("1.2 M, learning rate: "))
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
    recipe = make_study(tmp_path, f'{text}{stage}chart = "layers"\nbeside = "pretrain"\n')
    files = write_report(recipe, tmp_path, "6nd")
    assert [file.name for file in files[5:]] == ["hybrids-large-layerwise-hybrid.png", "hybrids-positions.png"]
    report = (tmp_path / "report.md").read_text()
    hybrids = report[report.index("## Stage hybrids") :]
    assert "4 runs; compared with Full attention, MoBA of stage pretrain." in hybrids
    assert "1.2 M: MoBA in every layer costs +0." in hybrids
    assert "With 2 of 16 layers full (12%; last-2): +0." in hybrids
    assert len([line for line in hybrids.splitlines() if line.startswith("| large |") and line.count("|") == 15]) == 4
    fewer = parse_recipe(f'{text}{stage}beside = "pretrain"\nbeside_arms = ["moba"]\n', title="t")
    compared = of_stage(fewer.stages[-1], read_outcomes(fewer, tmp_path))
    assert list(by("arm", compared)) == ["moba", "last-1", "last-2"]


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


def test_nothing_finished_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    assert cli.main(["plot", str(tmp_path)]) == 2
    assert "no run of" in capsys.readouterr().err
    assert cli.main(["fit", str(tmp_path)]) == 2
    assert "at least three sizes" in capsys.readouterr().err
