"""Speeds of a study's arms at their fastest micro-batch take the place of the runs' own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_study import RECIPE, silent, train

from openmoba.bench.rows import append_row
from openmoba.bench.training.cases import GRIDS, TrainingCase, TrainingRow
from openmoba.lab.run_files import RESULT_FILE
from openmoba.lab.study.compare import speeds_apart
from openmoba.lab.study.outcomes import read_outcomes, unrated
from openmoba.lab.study.rates import RATES_FILE, rate_of, read_rates
from openmoba.lab.study.recipe import parse_recipe, read_recipe
from openmoba.lab.study.report import write_report
from openmoba.lab.study.work import run_study

ROOT = Path(__file__).parent.parent
CARD = "a card"
PRETRAIN = parse_recipe(RECIPE[: RECIPE.index('[[stages]]\nname = "finetune"')], title="t")
RATES = {None: 1000.0, 64: 4000.0}
"""Tokens per second by the size of blocks."""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """One on a GPU, each run at another commit, so that their own speeds do not compare."""
    run_study(PRETRAIN, tmp_path, train, silent)
    for path in tmp_path.rglob(RESULT_FILE):
        result = json.loads(path.read_text())
        result["hardware"]["gpus"] = [CARD]
        result["commit"] = path.parent.name
        path.write_text(json.dumps(result))
    return tmp_path


def rate(study: Path, size: str, block_size: int | None, batch: int, rate: float | None, **changes: object) -> None:
    """Append a row of `openmoba bench training`."""
    case = TrainingCase(size, batch, block_size, block_size and 3, tokens=1024, vocabulary=2048, layers="graphed")
    row = TrainingRow.of(case, "bfloat16", device=CARD, tokens_per_second=rate, p50_ms=1.0)
    append_row(study / RATES_FILE, replace(row, **changes))


def rate_all(study: Path) -> None:
    for size in ("small", "medium", "large"):
        for block_size, fastest in RATES.items():
            rate(study, size, block_size, 1, fastest / 2)
            rate(study, size, block_size, 4, fastest)
            rate(study, size, block_size, 8, None, error="out of memory")
            rate(study, size, block_size, 4, 9e9, kind="longest")
            rate(study, size, block_size, 4, 9e9, checkpointing=True)
            rate(study, size, block_size, 4, 9e9, device="another card")
            rate(study, size, block_size, 4, 9e9, vocabulary=4096)
            rate(study, size, block_size, 4, 9e9, key_conv=4)


def test_seconds_are_those_of_the_fastest_micro_batch(study: Path) -> None:
    plain = read_outcomes(PRETRAIN, study)
    assert speeds_apart(plain)
    rate_all(study)
    rated = read_outcomes(PRETRAIN, study)
    assert speeds_apart(rated) is None
    for own, run in zip(plain, rated, strict=True):
        fastest = RATES[64 if run.run.arm == "moba" else None]
        assert (run.rate, run.tokens_per_second, run.mfu) == (fastest, fastest, None)
        for before, after in zip(own.evals, run.evals, strict=True):
            assert after["compute"]["accelerator_seconds"] == before["tokens"] / fastest
            assert after["compute"]["6nd"] == before["compute"]["6nd"]


def test_report_says_whose_seconds_they_are(study: Path) -> None:
    rate_all(study)
    write_report(PRETRAIN, study, "accelerator_seconds")
    report = (study / "report.md").read_text()
    assert f"\nSeconds and tokens/s are of arms at their fastest micro-batch: [{RATES_FILE}]" in report
    assert (
        f"Of a size's arms at the fastest micro-batch of each ({RATES_FILE}). Full attention is SDPA/cuDNN." in report
    )
    assert "Of full attention's cost the largest takes 25% by accelerator seconds" in report
    assert "each arm at its fastest micro-batch" in next(study.rglob("*law*.svg")).read_text()


def test_a_run_without_a_rate_keeps_all_at_their_own(study: Path) -> None:
    for size in ("small", "medium"):
        for block_size, fastest in RATES.items():
            rate(study, size, block_size, 4, fastest)
    outcomes = read_outcomes(PRETRAIN, study)
    assert {run.rate for run in outcomes} == {None}
    lacking = [f"pretrain/large-{arm}-seed{seed}" for arm in ("full", "moba") for seed in (0, 1)]
    assert unrated(outcomes, study) == lacking
    write_report(PRETRAIN, study, "6nd")
    said = f"Seconds and tokens/s are the runs' own, since {RATES_FILE} has no row for {', '.join(lacking)}."
    assert said in (study / "report.md").read_text()


def test_a_run_that_trains_otherwise_has_no_rate(study: Path) -> None:
    rate_all(study)
    rates, config = read_rates(study), read_outcomes(PRETRAIN, study)[0].config
    assert rate_of(config, [CARD], rates) == RATES[None]
    model, run, arm = config.model, config.train, config.arm
    rotary = replace(config, model=replace(model, overrides={"rope_parameters.rope_theta": 1e6}))
    assert rate_of(rotary, [CARD], rates) == RATES[None], "a rotary base costs nothing"
    for other in (
        replace(config, model=replace(model, overrides={"num_hidden_layers": 3})),
        replace(config, train=replace(run, loss_tokens=128)),
        replace(config, train=replace(run, gradient_checkpointing=True)),
        replace(config, train=replace(run, compile="off")),
        replace(config, train=replace(run, precision="fp32")),
        replace(config, arm=replace(arm, name="moba", warm_start=0.5)),
        replace(config, arm=replace(arm, name="time_hybrid")),
    ):
        assert rate_of(other, [CARD], rates) is None
    assert rate_of(config, [CARD, CARD], rates) is rate_of(config, [], rates) is None


def test_another_file_is_refused(study: Path) -> None:
    (study / RATES_FILE).write_text("size,arm\n")
    with pytest.raises(ValueError, match=r"rates\.csv has no column family, vocab.*; write it with `openmoba"):
        read_outcomes(PRETRAIN, study)


def test_a_row_that_no_run_can_be_is_refused_and_a_torn_one_left_out(study: Path) -> None:
    rate_all(study)
    path, rates = study / RATES_FILE, read_rates(study)
    whole = path.read_text()
    row = whole.splitlines()[1].replace("llama", "qwen3")
    path.write_text(f"{whole}{row[: len(row) // 2]}")
    assert read_rates(study) == rates
    for cell, damaged in (("1024", "long"), ("2048", "")):
        path.write_text(f"{whole}{row.replace(cell, damaged)}\n")
        with pytest.raises(ValueError, match=r"rates\.csv has a row that no run can be .*; write it with `openmoba"):
            read_rates(study)


def test_the_grid_has_every_run_of_chart_b(tmp_path: Path) -> None:
    """And no other: each case is of a run's size and arm."""
    for case in GRIDS["study"]:
        row = TrainingRow.of(case, "bfloat16", device=CARD, tokens_per_second=1.0)
        append_row(tmp_path / RATES_FILE, row)
    rates = read_rates(tmp_path)
    recipe = read_recipe(ROOT / "recipes/chart-b.toml")
    runs = [run.config(tmp_path) for run in recipe.runs]
    assert all(rate_of(config, [CARD], rates) for config in runs)
    assert len({str((config.model, config.arm)) for config in runs}) == len(rates) == len(GRIDS["study"])
