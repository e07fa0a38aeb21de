"""Numbers that the documentation says of studies by hand are those of the records."""

from __future__ import annotations

import csv
import re
from functools import cache
from pathlib import Path
from typing import Any

from openmoba.bench.rows import read_rows
from openmoba.bench.training.cases import TrainingRow
from openmoba.lab.config import RunConfig, from_dict
from openmoba.lab.measure.compute import AXES
from openmoba.lab.model.build import SIZES
from openmoba.lab.run_files import RESULT_FILE
from openmoba.lab.train.history import evaluations, history, read_result
from openmoba.records.disk import read_json

ROOT = Path(__file__).parent.parent
STUDIES = ROOT / "results/h200/study"
CHART_B, CANDIDATES, CHART_A = "chart-b/pretrain", "candidates/candidates", "chart-a/pretrain"


def prose(page: str) -> str:
    """A page in one line, without its tables."""
    text = re.sub(r"<!-- table: \w+ -->.*?<!-- end -->", "", (ROOT / page).read_text(), flags=re.DOTALL)
    return " ".join(text.split())


@cache
def loss(run: str, kind: str = "trailing") -> float:
    """The final loss of a run."""
    folder = STUDIES / run
    return float(evaluations(folder, *read_result(folder))[-1][f"{kind}_loss"])


def above(run: str, full: str, kind: str = "lm") -> str:
    return f"{loss(run, kind) - loss(full, kind):.2f}"


def test_full_attention_of_the_largest_models_is_above_that_of_a_smaller_one() -> None:
    page = prose("docs/results.md")
    two = [f"{loss(f'{CANDIDATES}/14m-full-seed{seed}'):.3f}" for seed in (0, 1)]
    twelve, nine = f"{loss(f'{CHART_A}/15m-full-seed0'):.3f}", f"{loss(f'{CHART_B}/9m-full-seed0'):.3f}"
    assert f"loss of {two[0]} and {two[1]} with 14 M in eight layers, and at {twelve} with 15 M in twelve" in page
    assert f"all above the {nine} of 9 M in seven layers after 5,000." in page
    assert min(*two, twelve) > nine
    largest = f"{loss(f'{CHART_B}/17m-full-seed0'):.3f}"
    assert f"At 17 M, in ten layers, it ends at {largest} after 5,000." in page
    assert largest < nine
    assert [SIZES[size].layers for size in ("14m", "15m", "9m", "17m")] == [8, 12, 7, 10]


def test_hybrids_are_above_full_attention_up_to_9_m_and_below_it_from_14_m_on() -> None:
    shares = {
        size: loss(f"{CHART_B}/{size}-last-2-keys-seed0") / loss(f"{CHART_B}/{size}-full-seed0") - 1
        for size in ("2m", "5m", "9m")
    }
    first, second, third = (f"{100 * share:.0f}" for share in shares.values())
    assert f"at 2, 5 and 9 M [{first}, {second} and {third} % above it]" in prose("README.md")
    assert "From 14 M on hybrids end below full attention" in prose("README.md")
    hybrids = {
        "candidates/candidates/14m-last-2-keys-seed0": f"{CANDIDATES}/14m-full-seed0",
        f"{CHART_B}/17m-last-2-keys-seed0": f"{CHART_B}/17m-full-seed0",
    }
    hybrids |= {f"chart-a/hybrids/15m-last-{count}-seed0": f"{CHART_A}/15m-full-seed0" for count in (1, 3, 5, 10)}
    assert all(loss(run) < loss(full) for run, full in hybrids.items())


def test_the_hybrid_of_17_m_takes_this_share_of_full_attentions_cost() -> None:
    hybrid, full = (read_json(STUDIES / CHART_B / f"17m-{arm}-seed0" / RESULT_FILE) for arm in ("last-2-keys", "full"))
    compute = hybrid["compute"]["causal_exact"] / full["compute"]["causal_exact"]
    seconds = AXES["accelerator_seconds"].value(hybrid) / AXES["accelerator_seconds"].value(full)
    assert f"there for {100 * compute:.0f} % of the compute and {100 * seconds:.0f} % of the time" in prose("README.md")
    with_keys = loss(f"{CHART_B}/17m-full-keys-seed0") / loss(f"{CHART_B}/17m-last-2-keys-seed0") - 1
    assert f"Full attention with the same convolution ends {100 * with_keys:.0f} % above it." in prose("README.md")


def test_a_sentence_of_an_answer_in_short_holds_at_most_three_shares() -> None:
    """However many sizes and arms a study has."""
    page = (ROOT / "docs/results.md").read_text()
    answers = [line[line.index("In short,") :] for line in page.splitlines() if "In short," in line]
    assert len(answers) > len(list(STUDIES.iterdir())), "of every study at 32K, and of the demo"
    sentences = [sentence for answer in answers for sentence in re.split(r"(?<=\.) ", answer)]
    assert max(sentence.count("%") for sentence in sentences) <= 3


def test_rates_matter_as_much_as_arms() -> None:
    page, full = prose("docs/results.md"), f"{CHART_B}/2m-full-seed0"
    half, twice = (above(f"chart-b/sweep/2m-{rate}-full-seed0", full) for rate in ("25e-4", "1e-2"))
    nine = [above(f"context/sweep/9m-{rate}-full-seed0", "context/context/9m-full-seed0") for rate in ("15e-4", "6e-3")]
    assert f"by {half} and {twice} nats of LM loss at 2 M parameters, and by {nine[0]} and {nine[1]} at 9 M" in page
    moba = [above(f"{CHART_B}/{size}-moba-seed0", f"{CHART_B}/{size}-full-seed0") for size in ("2m", "9m")]
    assert f"MoBA lies {moba[0]} above full attention at 2 M, and {moba[1]} at 9 M." in page


def test_tokens_of_chart_b_are_the_same_for_all_sizes() -> None:
    results = {size: read_json(STUDIES / CHART_B / f"{size}-full-seed0" / RESULT_FILE) for size in ("2m", "9m")}
    each = {size: f"{result['tokens'] / result['params']['non_embedding']:.0f}" for size, result in results.items()}
    steps = {from_dict(RunConfig, result["config"]).train.steps for result in results.values()}
    planned = results["2m"]["tokens"] / SIZES["32m"].matrices
    told = f"{each['2m']} tokens for each parameter at 2 M, {each['9m']} at 9 M, and {planned:.0f} at the 32 M"
    said = f"All sizes of chart B have 5,000 steps, {results['2m']['data']['epochs']:.1f} epochs: {told}"
    assert said in prose("docs/results.md")
    assert steps == {5000}
    below = []
    for size in ("2m", "5m", "9m", "17m"):
        rows = history(STUDIES / CHART_B / f"{size}-full-seed0")
        below.append(next(row["step"] for row in rows if row["kind"] == "train" and row["loss"] < 3))
    assert f"falls below 3 between steps {min(below):,} and {max(below):,}" in prose("docs/results.md")


def test_what_the_page_says_of_speeds() -> None:
    page = prose("docs/results.md")
    slow, fast = (
        read_json(STUDIES / CANDIDATES / f"14m-moba-seed{seed}" / RESULT_FILE)["speed"]["tokens_per_second"]
        for seed in (0, 1)
    )
    assert f"made {slow:,.0f} and {fast:,.0f} tokens a second" in page
    rows: dict[tuple[Any, ...], TrainingRow] = {}
    for row in read_rows(ROOT / "results/h200/training.csv", TrainingRow):
        if (row.family, row.size, row.kind) == ("llama", "14m", "loop"):
            rows[row.layers, row.batch, row.block_size] = row

    def rate(*case: Any) -> float:
        return rows[case].tokens_per_second or 0.0

    gain = rate("compiled", 4, 512) / rate("compiled", 4, None)
    assert f"a model of 14 M trains {gain:.1f} times as fast with MoBA" in page
    moba, full = (f"{100 * (1 - rate('graphed', 1, size) / rate('graphed', 4, size)):.0f} %" for size in (512, None))
    assert f"MoBA takes {moba} less for a token than in graphs of one, full attention {full}:" in page
    assert len({rows["graphed", batch, size].commit for batch in (1, 4) for size in (512, None)}) == 1


def test_requests_that_gain_in_vllm_are_many_and_long() -> None:
    with (ROOT / "results/h200/serving.csv").open(newline="") as file:
        rows = {(row["attention"], int(row["context"]), int(row["batch"])): row for row in csv.DictReader(file)}
    gains = {
        (context, batch): float(rows["moba", context, batch]["decode_tokens_per_s"]) / float(row["decode_tokens_per_s"])
        for (attention, context, batch), row in rows.items()
        if attention == "full"
    }
    assert "in [vLLM](docs/serving.md) single or short requests hardly gain" in prose("README.md")
    assert max(gain for (context, batch), gain in gains.items() if batch == 1 or context == 8192) < 1.2
    assert gains[131072, 32] > 10
    prompts = {
        context: float(rows["moba", context, 1]["prefill_tokens_per_s"]) / float(row["prefill_tokens_per_s"])
        for (attention, context, batch), row in rows.items()
        if (attention, batch) == ("full", 1)
    }
    assert "for prompts from 32K tokens on" in prose("docs/serving.md")
    assert prompts[8192] < 1 < 1.5 < prompts[32768] < prompts[131072]


def test_two_gpus_gain_this_much_by_heads() -> None:
    with (ROOT / "results/h200x2/parallel.csv").open(newline="") as file:
        found = [row for row in csv.DictReader(file) if row["kind"] == "attention" and row["way"] == "heads"]
    newest = [float(row["speedup"]) for row in found if row["commit"] == found[-1]["commit"]]
    assert len(newest) == 4
    said = f"[Two GPUs](docs/parallel.md) are {min(newest):.1f} to {max(newest):.1f} times as fast as one"
    assert said in prose("README.md")
