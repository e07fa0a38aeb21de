"""Needle in a haystack: examples, scores, the heat maps of several models on one scale, and the page that compares."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import Normalize

transformers = pytest.importorskip("transformers")

import synthetic_study  # noqa: E402
from decoders import save_model  # noqa: E402
from tiny import Notes  # noqa: E402

from openmoba import MobaConfig  # noqa: E402
from openmoba.cli import main  # noqa: E402
from openmoba.hf import configure  # noqa: E402
from openmoba.lab.config import DataConfig, RunConfig, TrainConfig, to_dict  # noqa: E402
from openmoba.lab.data.store import TokenStore  # noqa: E402
from openmoba.lab.data.tokenizer import byte_tokenizer  # noqa: E402
from openmoba.lab.data.windows import Windows  # noqa: E402
from openmoba.lab.measure import needle, needle_page  # noqa: E402
from openmoba.lab.measure.commands import Needle  # noqa: E402
from openmoba.lab.measure.needle import Grid, Search, hide, measure_needles, models_in  # noqa: E402
from openmoba.lab.measure.needle_page import (  # noqa: E402
    draw_needles,
    model_names,
    needle_chart,
    needle_sentences,
    read_needles,
    write_needles,
)
from openmoba.lab.model.build import model_folder  # noqa: E402
from openmoba.lab.model.checkpoint import seal  # noqa: E402
from openmoba.lab.progress import Progress  # noqa: E402
from openmoba.lab.study.recipe import parse_recipe  # noqa: E402
from openmoba.lab.study.results import experiments  # noqa: E402
from openmoba.lab.study.studies import read_studies  # noqa: E402
from openmoba.lab.study.work import run_study  # noqa: E402

DEPTHS = (0.0, 0.5, 1.0, None)
DOCUMENTS = (0, 0, 1, 2, 3, 4)


def grid(length: int, loss: float, without: float) -> Grid:
    """Six examples that all differ by the same from those of another grid, since documents are easy or hard."""
    hard = np.array([0.0, 0.1, 0.3, -0.2, 0.2, -0.1])
    losses = [tuple((hard + (without if depth is None else loss)).tolist()) for depth in DEPTHS]
    exact = [tuple(value < 1.2 for value in row) for row in losses]
    return Grid(length, DEPTHS, DOCUMENTS, tuple(exact), tuple(losses))


def search(source: str, loss: float, *, full: bool = False) -> Search:
    return Search(source, full, 4096, (grid(512, loss / 2, 3.0), grid(1024, loss, 3.0)), 1.0)


SEARCHES = [search("runs/moba-seed0", 2.5), search("runs/full-seed0", 1.25, full=True), search("runs/last-2", 3.25)]


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Options that name six documents."""
    (tmp_path / "texts").mkdir()
    for i in range(6):
        (tmp_path / "texts" / f"{i}.txt").write_text(" ".join(str(i * j * j) for j in range(150)))
    return ["--data.source", "stdlib", "--data.valid", str(tmp_path / "texts"), "--data.cache", str(tmp_path / "cache")]


def make_run(model: Path, folder: Path, steps: int = 1, **config: Any) -> Path:
    """A run with the weights of a model after its first step, which is the last."""
    checkpoint = folder / "checkpoint-1"
    shutil.copytree(model, checkpoint)
    seal(checkpoint)
    (folder / "metrics.jsonl").write_text("")
    (folder / "config.json").write_text(json.dumps(to_dict(RunConfig(train=TrainConfig(steps=steps), **config))))
    return folder


def test_the_needle_lies_at_its_depth_or_nowhere() -> None:
    """It lies `depth` of the way into what is left of the document; the length stays."""
    tokenizer = byte_tokenizer()
    words = "".join(chr(97 + i % 26) for i in range(300))
    document = torch.tensor(tokenizer(words)["input_ids"])
    for depth in DEPTHS:
        example, answer = hide(tokenizer, document, depth, np.random.default_rng(3))
        text = tokenizer.decode(example)
        question, number = text[text.rindex("\nThe") : -answer], text[-answer:]
        hidden = f"{question}{number}.\n"
        room = 300 - len(hidden) - len(question) - len(number)
        if depth is None:
            assert text == words[: room + len(hidden)] + question + number
        else:
            before = round(depth * room)
            assert text == words[:before] + hidden + words[before:room] + question + number
        assert len(number.strip()) == 5
        assert number.strip().isdecimal()
    with pytest.raises(ValueError, match="no room"):
        hide(tokenizer, document[: 300 - room], 0.5, np.random.default_rng(3))


def test_all_depths_of_a_length_have_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, starts = byte_tokenizer(), np.array([0, 300])
    store = TokenStore(np.arange(1000, dtype=np.uint16) % 250, np.array([0, 1000]), None)
    asked: list[tuple[int, ...]] = []
    depths = (0.0, 0.5, None)

    def scores(_: Any, examples: list[tuple[torch.Tensor, int]]) -> list[tuple[bool, float]]:
        asked.extend(tuple(row[-answer:].tolist()) for row, answer in examples)
        return [(True, 0.0)] * len(examples)

    monkeypatch.setattr(needle, "_scores", scores)
    needle._grid(None, tokenizer, Windows(store, starts, starts + 300, 299), depths, [0, 299], 600)
    assert asked[:2] == asked[2:4] == asked[4:]
    assert asked[0] != asked[1]


def test_a_model_that_repeats_what_followed_the_same_words_answers() -> None:
    """Examples whose answers differ in length go through the model together."""
    tokenizer = byte_tokenizer()

    class Induction(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, ids: torch.Tensor, logits_to_keep: int, use_cache: bool) -> Any:
            out = torch.zeros(len(ids), logits_to_keep, 320)
            for number, row in enumerate(ids.tolist()):
                for place in range(logits_to_keep):
                    end = len(row) - logits_to_keep + place + 1
                    context = row[end - 12 : end]
                    first = next(i for i in range(end) if row[i : i + 12] == context)
                    out[number, place, row[first + 12] if first + 12 < end else 0] = 50.0
            return type("Output", (), {"logits": out})()

    document = torch.tensor(tokenizer("the sea " * 60)["input_ids"])
    example, answer = hide(tokenizer, document, 0.3, np.random.default_rng(0))
    wrong = example.clone()
    wrong[-1] = tokenizer("!")["input_ids"][0]
    (last_two, loss_of_two), (right, loss), (missed, loss_of_wrong) = needle._scores(
        Induction(), [(example, 2), (example, answer), (wrong, answer)]
    )
    assert right
    assert last_two
    assert max(loss, loss_of_two) < 1e-6
    assert not missed
    assert loss_of_wrong == pytest.approx(50 / answer, rel=1e-3)


def test_examples_together_and_one_by_one_have_the_same_scores(tmp_path: Path, texts: list[str]) -> None:
    configure(save_model(tmp_path / "model"), MobaConfig(16, 3)).save_pretrained(tmp_path / "model")
    data = DataConfig(source="stdlib", valid=texts[3], cache=texts[5])
    options: dict[str, Any] = {"depths": 2, "samples": 3, "data": data}
    short, _ = measure_needles([tmp_path / "model"], lengths=(128, 384), **options)[0].grids
    (alone,) = measure_needles([tmp_path / "model"], lengths=(128,), **options)[0].grids
    assert (short.documents, short.exact, short.depths) == (alone.documents, alone.exact, (0.0, 1.0, None))
    np.testing.assert_allclose(short.loss, alone.loss, rtol=1e-4)


def test_one_call_compares_the_runs_of_a_folder(tmp_path: Path, texts: list[str], capsys: Any) -> None:
    """Those with weights; the others are named by number. The page and the record are of all, and say who stopped."""
    configure(save_model(tmp_path / "model"), MobaConfig(16, 3)).save_pretrained(tmp_path / "model")
    data = DataConfig(source="stdlib", valid=texts[3], cache=texts[5])
    for name, arm, steps in (("a-moba-seed0", "moba", 4), ("b-full-seed0", "full", 1)):
        config = RunConfig(data=data)
        make_run(tmp_path / "model", tmp_path / "study" / name, steps, data=data, arm=replace(config.arm, name=arm))
    shutil.copytree(tmp_path / "study" / "a-moba-seed0", tmp_path / "study" / "c-seed0")
    shutil.rmtree(tmp_path / "study" / "c-seed0" / "checkpoint-1")
    options = ["--lengths", "128", "256", "--depths", "3", "--samples", "2", "--out", str(tmp_path / "new" / "v1.0")]
    assert main(["evaluate", "needle", str(tmp_path / "study"), *options]) == 0
    assert "| Full attention, seed 0, b | 256 | 0 of 6 |" in capsys.readouterr().out
    page = (tmp_path / "new" / "v1.0.md").read_text()
    assert "| from Full attention, seed 0, b |" in page
    found = "0 of 6 answered exactly; the needle changes the loss of the answer by "
    assert f"- MoBA, seed 0, a (step 1 of 4), 256 tokens: {found}" in page
    rows = [json.loads(line) for line in (tmp_path / "new" / "v1.0.jsonl").read_text().splitlines()]
    assert [(Path(row["source"]).name, row["full"]) for row in rows] == [
        ("a-moba-seed0", False),
        ("b-full-seed0", True),
    ]
    assert all({"commit", "hardware", "versions"} <= row.keys() for row in rows)
    assert all(0 < loss < 60 for row in rows for grid in row["grids"] for losses in grid["loss"] for loss in losses)
    assert (tmp_path / "new" / "v1.0.png").stat().st_size > 10_000
    assert main(["evaluate", "needle", str(tmp_path / "study"), "--lengths", "9000"]) == 2
    assert "9000" in capsys.readouterr().err


def test_weights_of_an_unfinished_run_are_said_to_be_such(tmp_path: Path) -> None:
    """Whatever is done with them: they are measured, copied and continued like those of a finished one."""
    save_model(tmp_path / "model")
    for steps, said in ((4, ["is not finished: these are the weights of step 1 of 4"]), (1, [])):
        notes = Notes()
        with model_folder(make_run(tmp_path / "model", tmp_path / str(steps), steps), notes) as folder:
            assert Path(folder).name == "checkpoint-1"
        assert notes.notes == [f"{tmp_path / str(steps)} {text}" for text in said]


def test_runs_without_weights_are_left_out_and_said(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "stage" / name / "checkpoint-1").mkdir(parents=True)
        (tmp_path / "stage" / name / "metrics.jsonl").write_text("")
    (tmp_path / "stage" / "b" / "checkpoint-1").rmdir()
    notes = Notes()
    assert models_in(str(tmp_path), notes) == [str(tmp_path / "stage" / "a")]
    assert notes.notes == [f"1 of 2 runs below {tmp_path} have no checkpoint here: left out"]
    assert models_in("Qwen/Qwen3-0.6B", Notes()) == ["Qwen/Qwen3-0.6B"]


def test_models_that_do_not_compare_are_refused_before_the_work(tmp_path: Path, texts: list[str], capsys: Any) -> None:
    save_model(tmp_path / "model")
    save_model(tmp_path / "other")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(tmp_path / "other")
    runs = [
        str(make_run(tmp_path / "model", tmp_path / name, data=DataConfig(source=source)))
        for name, source in (("one", "stdlib"), ("two", texts[3]))
    ]
    for sources, said in (
        ([str(tmp_path / "model"), str(tmp_path / "other")], "has another tokenizer than"),
        (runs, r"were made of other documents (data.source); look for needles in one of them"),
        ([str(tmp_path / "model"), str(tmp_path / "none")], "none"),
    ):
        assert main(["evaluate", "needle", *sources, "--lengths", "128", "--samples", "2"]) == 2
        assert said in capsys.readouterr().err
    shutil.rmtree(tmp_path / "one" / "checkpoint-1")
    (tmp_path / "study").mkdir()
    (tmp_path / "one").rename(tmp_path / "study" / "one")
    assert main(["evaluate", "needle", str(tmp_path / "study")]) == 2
    assert "none of the 1 runs below" in capsys.readouterr().err


def test_all_models_share_one_scale_from_zero_to_chance_with_a_bar_of_colours() -> None:
    figure = needle_chart(SEARCHES)
    exact, loss = figure.axes[:6:2], figure.axes[1:6:2]
    for panels, high in ((exact, 1.0), (loss, math.log(4096))):
        norms: list[Normalize] = [panel.images[0].norm for panel in panels]
        assert {(norm.vmin, norm.vmax) for norm in norms} == {(0, high)}
        assert any(panel.images[0].colorbar is not None for panel in panels)
    assert [panel.get_title(loc="left") for panel in exact] == ["moba-seed0", "full-seed0", "last-2"]
    assert [label.get_text() for label in exact[0].get_yticklabels()] == ["0%", "50%", "100%", "none"]
    assert [label.get_text() for label in loss[2].get_xticklabels()] == ["512", "1,024"]
    assert [text.get_text() for text in loss[0].texts] == ["1.30", "2.55"] * 3 + ["3.05", "3.05"]
    np.testing.assert_allclose(exact[1].images[0].get_array(), [[1, 1 / 3]] * 3 + [[0, 0]])


def test_sentences_compare_with_full_attention_document_by_document() -> None:
    moba, full, last = needle_sentences(SEARCHES)
    assert moba.startswith(
        "moba-seed0, 1,024 tokens: 0 of 18 answered exactly; the needle changes the loss of the answer by -0.500 "
        "[-0.500, -0.500] nats per token, **resolved on these documents**; its loss lies +1.250 [+1.250, +1.250] "
        "from that of full-seed0, **resolved"
    )
    assert full.endswith("nats per token, **resolved on these documents** (5 documents, 6 windows, 1 seed).")
    assert "by +0.250 [+0.250, +0.250] nats per token" in last
    noisy = replace(SEARCHES[0].grids[1], loss=((1.0, 3.0, 1.0, 3.0, 1.0, 3.0),) * 3 + ((2.0,) * 6,))
    (alone,) = needle_sentences([replace(SEARCHES[0], grids=(noisy,))])
    assert "by +0.000 [" in alone
    assert "**within noise**" in alone


def test_the_record_gives_the_page_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needle_page, "save", lambda figure, path: [path.with_name(f"{path.name}.png")])
    page, record, *_ = write_needles(SEARCHES, tmp_path / "needle")
    assert read_needles(record) == SEARCHES
    before = page.read_text(), record.read_text()
    draw_needles(read_needles(record), tmp_path / "needle")
    assert (page.read_text(), record.read_text()) == before
    record.write_text(record.read_text().replace('"length":512', '"length":"512"'))
    with pytest.raises(ValueError, match="length must be int"):
        read_needles(record)


def test_names_are_as_long_as_they_must_be() -> None:
    a, b = (replace(SEARCHES[0], source=f"runs/{name}/14m-full-seed0") for name in "ab")
    assert model_names([a, b]) == ["a/14m-full-seed0", "b/14m-full-seed0"]
    assert model_names([a, replace(b, stopped="step 1 of 4")]) == ["a/14m-full-seed0", "b/14m-full-seed0 (step 1 of 4)"]


def test_runs_of_a_study_are_called_by_arm_and_seed() -> None:
    """And by the size, where it differs."""

    def names(*runs: str) -> list[str]:
        return model_names([replace(SEARCHES[0], source=f"runs/{run}") for run in runs])

    assert names("14m-full-seed0") == ["Full attention, seed 0"]
    assert names("14m-moba-seed0", "14m-moba-seed1", "14m-last-2-keys-seed0") == [
        "MoBA, seed 0", "MoBA, seed 1", "last-2-keys, seed 0",
    ]  # fmt: skip
    assert names("14m-moba-seed0", "9m-moba-seed0") == ["MoBA, seed 0, 14m", "MoBA, seed 0, 9m"]
    assert names("14m-moba-seed0", "exported") == ["14m-moba-seed0", "exported"]


def test_the_tokens_of_a_search_are_counted() -> None:
    command = Needle(("run",), lengths=(128, 128, 256), depths=3, samples=5)
    assert command.tokens == (128 + 256) * 5 * 4


def test_the_results_show_what_a_study_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needle_page, "save", lambda figure, path: [path.with_name(f"{path.name}.png")])
    monkeypatch.setattr(synthetic_study, "WINDOWS", 8)
    recipe = parse_recipe(synthetic_study.CANDIDATES.replace("seeds = [0]\nmore_seeds", "seeds = [0]\n#"), title="t")
    run_study(recipe, tmp_path / "study", synthetic_study.train, lambda _: Progress())
    before = experiments(read_studies([tmp_path / "study"]), tmp_path)
    write_needles(SEARCHES, tmp_path / "study" / "needle")
    after = experiments(read_studies([tmp_path / "study"]), tmp_path)
    assert "needle" not in before
    assert "![Needle in a haystack, 3 models of Short list](study/needle.png)" in after
    assert "- moba-seed0, 1,024 tokens: 0 of 18 answered exactly; the needle changes the loss of" in after
    assert "- At depth 0% the needle is whole, but it is the window's first tokens" in after
    assert "- A guess has a loss of 8.32 nats; every length stands in the [table](study/needle.md)." in after
