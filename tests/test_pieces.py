"""A study comes in pieces: some of its runs, from several machines and commits, without checkpoints, over days."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import publish
import pytest
import synthetic_study
from synthetic_study import CANDIDATES, RECIPE, train

from openmoba import cli
from openmoba.lab.measure import needle_page, resample
from openmoba.lab.measure.needle import Grid, Search
from openmoba.lab.progress import Progress
from openmoba.lab.run_files import RECIPE_FILE
from openmoba.lab.study import charts, work
from openmoba.lab.study import fit as fitting
from openmoba.lab.study.outcomes import read_outcomes
from openmoba.lab.study.recipe import Recipe, parse_recipe
from openmoba.lab.study.report import missing, write_report
from openmoba.lab.study.results import experiments, headlines, limits
from openmoba.lab.study.settings import settings_table
from openmoba.lab.study.studies import read_studies
from openmoba.lab.study.work import run_study
from openmoba.lab.train import run as training
from openmoba.records.disk import keep

KEYS = '[arms]\nkeys = { name = "moba", key_conv = 4 }\nfull-keys = { name = "full", key_conv = 4 }\n'


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """Figures are made but not written, laws and intervals are rough, nothing is planned."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charts, "save", lambda figure, path: [path.with_name(f"{path.name}.png")])
        patch.setattr(needle_page, "save", lambda figure, path: [path.with_name(f"{path.name}.png")])
        patch.setattr(synthetic_study, "RANGES", 3)
        for module in (fitting, resample):
            patch.setattr(module, "REPLICATES", 20)
        patch.setattr(fitting, "REWEIGHTINGS", 3)
        patch.setattr(fitting, "HALVINGS", 8)
        patch.setattr(work, "check_models", lambda _: None)
        patch.setattr(work, "planned_work", lambda _: 1.0)
        yield


def make(out: Path, text: str = RECIPE, *patterns: str) -> Recipe:
    """Make a study, or the runs of it that match the patterns; every run takes other seconds."""
    recipe = parse_recipe(text, title="t")
    run_study(recipe, out, train, lambda _: Progress(), recipe.chosen(patterns) if patterns else None)
    for number, path in enumerate(sorted(out.glob("*/*/metrics.jsonl"))):
        path.write_text(path.read_text().replace('"accelerator_seconds":6', f'"accelerator_seconds":{6 + number}'))
    return recipe


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of which all runs are finished, without its checkpoints."""
    out = tmp_path_factory.mktemp("whole") / "study"
    make(out)
    for checkpoint in out.glob("*/*/checkpoint-*"):
        shutil.rmtree(checkpoint)
    return out


def split(whole: Path, out: Path) -> list[Path]:
    """Two pieces of a study, by seed."""
    pieces = [out / str(seed) / whole.name for seed in (0, 1)]
    for seed, piece in enumerate(pieces):
        piece.mkdir(parents=True)
        shutil.copy(whole / RECIPE_FILE, piece)
        for run in whole.glob(f"*/*seed{seed}"):
            shutil.copytree(run, piece / run.relative_to(whole))
    return pieces


def test_pieces_that_are_put_together_give_the_report_of_the_whole(whole: Path, tmp_path: Path) -> None:
    """One after the other; weights stay where they are, needles come along."""
    first, second = split(whole, tmp_path)
    (first / "pretrain" / "small-full-seed0" / "checkpoint-9").mkdir()
    grid = Grid(64, (0.0, None), (0, 1), ((True, False), (False, False)), ((1.0, 2.0), (3.0, 4.0)))
    keep(second / "needle.jsonl", [asdict(Search("runs/large-full-seed1", True, 320, (grid,), 1.0))])
    out = tmp_path / "results" / "study"
    publish.publish([first], out)
    assert "**11 of 22 runs so far**" in (out / "report.md").read_text()
    publish.publish([second], out)
    write_report(parse_recipe(RECIPE, title="t"), whole, "6nd")
    assert (out / "report.md").read_text() == (whole / "report.md").read_text()
    assert not list(out.glob("*/*/checkpoint-*"))
    assert "| Full attention, seed 1 | 64 | 1 of 2 |" in (out / "needle.md").read_text()


def test_pieces_that_contradict_each_other_are_refused_and_nothing_is_copied(whole: Path, tmp_path: Path) -> None:
    first, second = split(whole, tmp_path)
    shutil.copytree(first / "pretrain" / "small-full-seed0", second / "pretrain" / "small-full-seed0")
    publish.gather([first, second], tmp_path / "same")
    result = second / "pretrain" / "small-full-seed0" / "result.json"
    result.write_text(result.read_text().replace('"seconds": 60.0', '"seconds": 61.0'))
    with pytest.raises(ValueError, match=r"small-full-seed0/result\.json differ; delete the one that does not count"):
        publish.gather([first, second], tmp_path / "out")
    (second / RECIPE_FILE).write_text(RECIPE.replace("Synthetic", "Other"))
    with pytest.raises(ValueError, match=r"recipe\.toml differ"):
        publish.gather([first, second], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_that_diverged_is_named_until_it_finishes_elsewhere(whole: Path, tmp_path: Path) -> None:
    first, second = split(whole, tmp_path)
    name, out = "pretrain/small-full-seed1", tmp_path / "results" / "study"
    (first / name).mkdir()
    (first / name / "failed.json").write_text('{"reason": "the loss is nan", "config": {}}')
    publish.publish([first], out)
    said = f"**Diverged**, and so without a loss here: {name}."
    assert said in (out / "report.md").read_text()
    publish.publish([second], out)
    assert said not in (out / "report.md").read_text()
    assert not (out / name / "failed.json").exists()


def test_finished_runs_without_checkpoints_are_gone_on_from(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another call makes the other runs; only what starts from lost weights is refused, by name."""
    first, _ = split(whole, tmp_path)
    monkeypatch.setattr(training, "run_training", train)
    command = ["study", str(first / RECIPE_FILE), "--out", str(first), "--runs"]
    assert cli.main([*command, "pretrain/*"]) == 0
    assert "the 12 chosen of 22 runs are finished" in capsys.readouterr().out
    assert "**17 of 22 runs so far**" in (first / "report.md").read_text()
    shutil.rmtree(first / "finetune" / "large-last-2-seed0")
    assert cli.main([*command, "finetune/large-last-2-seed0"]) == 2
    assert "pretrain/large-moba-seed0, which is finished but has no checkpoint here" in capsys.readouterr().err
    assert cli.main(["plot", str(first)]) == 0


@pytest.mark.parametrize(
    "patterns",
    [
        ["pretrain/small-full-seed0"],
        ["pretrain/small-*"],
        ["pretrain/small-moba-*", "pretrain/large-moba-seed0"],
        ["pretrain/*-seed0", "pretrain/small-full-seed1"],
        ["pretrain/small-full-*", "pretrain/medium-full-seed0", "pretrain/medium-moba-seed1"],
        ["pretrain/large-moba-*", "finetune/*last-1*"],
        ["pretrain/large-*", "finetune/*-full-seed0", "finetune/*-last-1-seed1"],
    ],
)
def test_an_unfinished_study_has_a_report_and_a_place_on_the_page(patterns: list[str], tmp_path: Path) -> None:
    recipe = make(tmp_path / "study", RECIPE, *patterns)
    write_report(recipe, tmp_path / "study", "6nd")
    studies = read_studies([tmp_path / "study"])
    assert f" of {len(recipe.runs)} runs so far.**" in experiments(studies, tmp_path).partition("![")[0]
    assert headlines(studies, tmp_path).count(" runs so far.** ") == headlines(studies, tmp_path).count("![")
    assert limits(studies)
    assert isinstance(settings_table(studies, tmp_path) + headlines(studies, tmp_path), str)
    report = (tmp_path / "study" / "report.md").read_text()
    assert f" of {len(recipe.runs)} runs so far**" in report
    assert " nan" not in report


@pytest.mark.parametrize(
    "patterns", [["*-full-seed0"], ["*-moba-*"], ["*keys-seed0"], ["*-full-seed0", "*-moba-seed1"], ["*-last-*"]]
)
def test_an_unfinished_short_list_has_a_report_and_a_place_on_the_page(patterns: list[str], tmp_path: Path) -> None:
    text = CANDIDATES.replace('"fine", ', '"keys", "full-keys", ').replace("[arms]\n", KEYS)
    recipe = make(tmp_path / "study", text, *patterns)
    write_report(recipe, tmp_path / "study", "6nd")
    studies = read_studies([tmp_path / "study"])
    assert experiments(studies, tmp_path)
    table = settings_table(studies, tmp_path)
    report = (tmp_path / "study" / "report.md").read_text()
    if patterns == ["*keys-seed0"]:  # the only full attention has key convolution: called by its name
        assert " that of full-keys. Its setting: " in report
        assert "from full attention" not in report
        assert table == ""


def test_hybrids_of_other_seeds_than_full_attention_are_not_compared(tmp_path: Path) -> None:
    recipe = make(tmp_path, RECIPE, "finetune/large-full-seed0", "finetune/large-last-1-seed1")
    write_report(recipe, tmp_path, "6nd")
    report = (tmp_path / "report.md").read_text()
    finetune = report[report.index("## Stage finetune") :]
    assert "Without a bar: of other seeds, not compared." in finetune
    assert "layers full" not in finetune.partition("### Runs")[0].partition("Arms:")[2].partition("\n")[2]


def test_two_sizes_make_no_law(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing would check it: no exponent, no ratio, no chart of one; the runs are compared size by size."""
    recipe = make(tmp_path, RECIPE, "pretrain/small-*", "pretrain/large-*")
    write_report(recipe, tmp_path, "6nd")
    (tmp_path / RECIPE_FILE).write_text(RECIPE)
    two = (tmp_path / "report.md").read_text() + experiments(read_studies([tmp_path]), tmp_path)
    for word in (
        "Fitted laws",
        "fitted laws",
        "exponent minus",
        "the most that both have spent",
        "attention by position (",
    ):
        assert word not in two
    assert two.count("| 200 K | MoBA | Full attention | 2 |") == 2
    assert cli.main(["fit", str(tmp_path)]) == 2
    assert "at least three sizes" in capsys.readouterr().err
    one = make(tmp_path / "one", RECIPE, "pretrain/small-*")
    write_report(one, tmp_path / "one", "6nd")
    report = (tmp_path / "one" / "report.md").read_text()
    assert "Fitted laws" not in report, "seconds differ, but it is one size"
    assert "fitted laws" not in report
    assert "There is no law yet: it takes two windows, and 3 sizes that the arms share." in report


def test_an_unfinished_chart_b_draws_what_is_there_and_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of five sizes, every arm, one seed; then one run of a third size."""
    text = chart_b(monkeypatch)
    chosen = ["pretrain/2m-*-seed0", "pretrain/5m-*-seed0"]
    recipe = make(tmp_path, text, *chosen)
    drawn = {path.name for path in write_report(recipe, tmp_path, "6nd")}
    assert {"pretrain-scaling-law.png", "pretrain-scaling-law-equal-cost.png", "pretrain-positions.png"} <= drawn
    report = (tmp_path / "report.md").read_text()
    assert (
        "**8 of 54 runs so far**; what follows is of these alone. Missing: all of stage sweep; of stage pretrain "
        "the sizes 9m, 17m, 32m, the seeds 1, 2.\n"
    ) in report
    assert "exponent minus" not in report
    make(tmp_path, text, *chosen, "pretrain/9m-moba-seed0", "pretrain/5m-full-seed1")
    said = missing(recipe, read_outcomes(recipe, tmp_path))
    assert said == "all of stage sweep; of stage pretrain the sizes 17m, 32m, the seed 2, 14 others"
    make(tmp_path, text, "sweep/*", "pretrain/2m-*", "pretrain/5m-*", "pretrain/9m-*-seed[02]", "pretrain/17m-*")
    make(tmp_path, text, "pretrain/9m-full-seed1", "pretrain/32m-moba-*")
    assert missing(recipe, read_outcomes(recipe, tmp_path)) == "of stage pretrain 6 others"
    make(tmp_path, text, "pretrain/9m-*", "pretrain/32m-full-seed0")
    assert missing(recipe, read_outcomes(recipe, tmp_path)) == (
        "of stage pretrain 32m-last-2-keys-seed0, 32m-full-keys-seed0"
    )


def chart_b(monkeypatch: pytest.MonkeyPatch) -> str:
    """The recipe of that name, whose sizes this machine need not build."""
    for size in ("2m", "5m", "9m", "17m", "32m"):
        monkeypatch.setitem(synthetic_study.PARAMETERS, size, int(size[:-1]) * 10**6)
    return (Path(__file__).parents[1] / "recipes" / "chart-b.toml").read_text()


def test_an_unfinished_sweep_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of its two rates: no answer about context, no chart of it, and the rate of the other stage beside it."""
    recipe = make(tmp_path, chart_b(monkeypatch), "sweep/2m-25e-4-full-seed0")
    drawn = [path.name for path in write_report(recipe, tmp_path, "6nd")]
    assert drawn == ["report.md"]
    report = (tmp_path / "report.md").read_text()
    assert "2 M, learning rate: 0.0025 has the lowest LM loss" in report
    assert "no other rate is measured yet" in report
    assert "is not seen to count" not in report
    assert "\n1 run.\n" in report
    make(tmp_path, chart_b(monkeypatch), "pretrain/2m-full-seed0")
    write_report(recipe, tmp_path, "6nd")
    (sentence,) = (line for line in (tmp_path / "report.md").read_text().splitlines() if "learning rate: " in line)
    assert "0.005 is " in sentence or "0.0025 is " in sentence
    assert sentence.endswith(" Runs: sweep/2m-25e-4-full-seed0, pretrain/2m-full-seed0.")


def test_learning_rates_are_compared_over_the_seeds_that_all_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: at seed 0 0.01 is the best by 0.02; seeds 1 and 2, which 0.005 alone has, would make that the best."""
    more = {(25e-4, 0): 0.05, (5e-3, 0): 0.02, (1e-2, 0): 0.0, (5e-3, 1): -0.5, (5e-3, 2): -0.5}
    for key, nats in more.items():
        monkeypatch.setitem(synthetic_study.MORE, key, nats)
    recipe = make(tmp_path, chart_b(monkeypatch), "sweep/*", "pretrain/2m-full-*")
    write_report(recipe, tmp_path, "6nd")
    (sentence,) = (line for line in (tmp_path / "report.md").read_text().splitlines() if "learning rate: " in line)
    assert sentence.startswith("2 M, learning rate: 0.01 has the lowest LM loss, ")
    assert "0.0025 is +0.0500 nats [" in sentence
    assert "0.005 is +0.0200 nats [" in sentence
    assert "1 seed). It is the highest of these rates: a higher one may be better still." in sentence
    assert "seed1" not in sentence


def test_a_sweep_of_two_models_of_a_size_says_of_each_its_best(tmp_path: Path) -> None:
    sizes = "".join(
        f'"{family}-{rate}" = {{ model = {{ family = "{family}", size = "small" }}, '
        f"train = {{ steps = 100, learning_rate = {rate} }} }}\n"
        for family in ("llama", "qwen3")
        for rate in (1e-3, 4e-3)
    )
    text = RECIPE[: RECIPE.index("[[stages]]")].replace("[sizes]\n", f"[sizes]\n{sizes}")
    names = '"llama-0.001", "qwen3-0.001", "llama-0.004", "qwen3-0.004"'
    text += f'[[stages]]\nname = "sweep"\nsizes = [{names}]\narms = ["full"]\n'
    write_report(make(tmp_path, text), tmp_path, "6nd")
    found = [line for line in (tmp_path / "report.md").read_text().splitlines() if "learning rate: " in line]
    assert [line.partition("Runs: ")[2] for line in found] == [
        f"sweep/{family}-0.001-full-seed0, sweep/{family}-0.004-full-seed0." for family in ("llama", "qwen3")
    ]


def test_stages_that_differ_in_more_than_the_rate_are_no_sweep(tmp_path: Path) -> None:
    sizes = '[sizes]\nlonger = { model = { size = "small" }, train = { steps = 200, learning_rate = 1e-3 } }\n'
    text = RECIPE[: RECIPE.index("[[stages]]")].replace("[sizes]\n", sizes)
    text += '[[stages]]\nname = "steps"\nsizes = ["small", "longer"]\narms = ["full"]\n'
    recipe = make(tmp_path, text)
    assert [path.name for path in write_report(recipe, tmp_path, "6nd")] == ["report.md", "steps-positions.png"]
    assert "learning rate: " not in (tmp_path / "report.md").read_text()


def scaling_charts(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> list[dict[str, Any]]:
    """Write a report; returns what its scaling charts were drawn from."""
    given: list[dict[str, Any]] = []
    real = charts.figures.scaling_chart

    def chart(curves: Any, laws: Any, differences: Any, looks: Any, **rest: Any) -> Any:
        given.append({"curves": curves, "laws": laws, "differences": differences})
        return real(curves, laws, differences, looks, **rest)

    monkeypatch.setattr(charts.figures, "scaling_chart", chart)
    write_report(*arguments)
    return given


def test_laws_and_curves_side_by_side_are_of_the_same_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full attention alone has a second, lucky seed of one size: that is not its lead."""
    monkeypatch.setitem(synthetic_study.MORE, (2e-3, 1), -0.5)
    recipe = make(tmp_path, RECIPE, "pretrain/*-seed0", "pretrain/small-full-seed1")
    first, *_ = scaling_charts(monkeypatch, recipe, tmp_path, "6nd")
    outcomes = {run.run.name: run for run in read_outcomes(recipe, tmp_path)}
    ends = [curve.loss[-1] for curve in first["curves"]]
    assert outcomes["pretrain/small-full-seed0"].loss("trailing") in ends
    assert [len(law.loss) for law in first["laws"].values()] == [3, 3]
    (own, other) = first["differences"]["MoBA"]
    assert own.law == first["laws"]["MoBA"].law
    assert other.law == first["laws"]["Full attention"].law
    report = (tmp_path / "report.md").read_text()
    assert "Left out: seeds that not every arm of a size has." in report
    assert "### Fitted laws, L = a · C^b, C by 6ND (8 documents, 24 windows, 1 seed)" in report
    assert "### Comparisons (8 documents, 24 windows, 1 to 2 seeds)" in report
    exponents = [line for line in report.splitlines() if "'s exponent minus that of" in line]
    assert exponents
    assert all(", over 3 runs each, lies in " in line for line in exponents)
    assert not any(line.endswith("**resolved**.") for line in exponents), "of one seed each"
    assert report.count("MoBA and full attention by position") == 1


def test_curves_by_position_are_of_the_same_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(synthetic_study.MORE, (2e-3, 1), -0.5)
    drawn: list[Any] = []
    for name in ("position_chart", "context_chart"):
        real = getattr(charts.panels, name)
        monkeypatch.setattr(
            charts.panels,
            name,
            lambda x, losses, *rest, real=real, **named: drawn.append(losses) or real(x, losses, *rest, **named),
        )
    text = RECIPE.replace("[sizes]", "eval = { contexts = [256, 512] }\n[sizes]")
    recipe = make(tmp_path, text, "pretrain/large-*-seed0", "pretrain/large-full-seed1")
    write_report(recipe, tmp_path, "6nd")
    outcomes = {run.run.name: run for run in read_outcomes(recipe, tmp_path)}
    alone = outcomes["pretrain/large-full-seed0"]
    assert drawn[0]["Full attention"] == [alone.loss(k) for k in range(len(alone.ranges))]
    assert drawn[1]["Full attention"][-1] == alone.loss("trailing")
    assert len(drawn) == 2


def test_an_arm_that_lacks_a_size_of_three_has_no_law(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make(tmp_path, RECIPE, "pretrain/*-full-*", "pretrain/small-moba-*", "pretrain/medium-moba-*")
    first, *_ = scaling_charts(monkeypatch, recipe, tmp_path, "6nd")
    assert [len(law.loss) for law in first["laws"].values()] == [6]
    assert first["differences"] == {}
    report = (tmp_path / "report.md").read_text()
    assert "the trailing loss of MoBA lies" not in report
    assert "(figures/pretrain-scaling-law.png)" in report


def test_charts_that_are_drawn_no_more_do_not_stay(tmp_path: Path) -> None:
    recipe = make(tmp_path, RECIPE, "pretrain/small-*")
    folder = tmp_path / "figures"
    folder.mkdir()
    kept = ["pretrain-positions.svg", "notes.png", "pretrain-notes.png", "other-positions.png"]
    gone = ["pretrain-small-candidates.png", "pretrain-contexts.svg", "finetune-large-layerwise-hybrid.png"]
    for name in [*kept, *gone]:
        (folder / name).touch()
    write_report(recipe, tmp_path, "6nd")
    assert sorted(path.name for path in folder.iterdir()) == sorted(kept)


@pytest.mark.parametrize("differing", ["commit", "device", "compiled"])
def test_seconds_of_different_commits_devices_or_launches_are_not_compared(
    differing: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where they were before, their chart does not stay behind."""
    study = Path(shutil.copytree(whole, tmp_path / "study"))
    recipe = parse_recipe(RECIPE, title="t")
    seconds = study / "figures" / "pretrain-scaling-law-seconds.png"
    assert seconds in write_report(recipe, study, "6nd")
    assert "C by accelerator seconds" in (study / "report.md").read_text()
    assert " accelerator seconds, the most that both have spent, the trailing loss" in experiments(
        read_studies([study]), tmp_path
    )
    path = study / "pretrain" / "large-moba-seed1" / "result.json"
    result = json.loads(path.read_text())
    if differing == "commit":
        result["commit"] = "1111111"
        said = "2 commits (0000000, 1111111)"
    elif differing == "compiled":
        result["compiled"] = True
        said = "2 ways to run layers (eager, compiled)"
    else:
        result["hardware"]["gpus"] = ["a card"]
        said = "2 devices (an imagined processor, a card)"
    path.write_text(json.dumps(result))
    seconds.parent.mkdir(exist_ok=True)
    seconds.touch()
    assert seconds not in write_report(recipe, study, "6nd")
    assert not seconds.exists()
    report = (study / "report.md").read_text()
    assert f"Measured seconds, tokens/s and MFU do not compare here, since these runs are of {said}." in report
    assert "C by accelerator seconds" not in report
    page = experiments(read_studies([study]), tmp_path)
    assert f"- Measured seconds do not compare here, since these runs are of {said}." in page
    assert "accelerator seconds" not in page
    for command in ("plot", "fit"):
        assert cli.main([command, str(study), "--axis", "accelerator_seconds"]) == 2
        assert f"the runs of stage pretrain are of {said}, so their seconds do not compare" in capsys.readouterr().err
