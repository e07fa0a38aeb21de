"""The loss without all logits, and the three measures made of it."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import Notes

from openmoba import cli
from openmoba.lab.config import DataConfig, EvalConfig, ModelConfig, RunConfig
from openmoba.lab.data.load import load_validation
from openmoba.lab.data.store import TokenStore
from openmoba.lab.data.tokenizer import byte_tokenizer
from openmoba.lab.data.windows import IGNORED, Windows, cut_windows
from openmoba.lab.measure.contexts import context_losses
from openmoba.lab.measure.evaluate import evaluate_source, measure, summary
from openmoba.lab.measure.generate import generate_text
from openmoba.lab.measure.losses import window_losses
from openmoba.lab.measure.needle import measure_needles
from openmoba.lab.model import loss as loss_module
from openmoba.lab.model.build import build_model, load_model
from openmoba.lab.model.loss import attach_loss, has_linear_head, linear_loss


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss_module.LOGITS_PER_CHUNK, "cpu", 1)  # the least chunk: 64 positions


def batch(vocabulary: int = 47, tokens: int = 150) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, tokens, 16, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, 16, generator=generator, requires_grad=True)
    bias = torch.randn(vocabulary, generator=generator, requires_grad=True)
    labels = torch.randint(vocabulary, (2, tokens), generator=generator)
    labels[0, ::3] = IGNORED
    return hidden, weight, bias, labels


def dense_loss(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
) -> torch.Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return torch.nn.functional.cross_entropy(logits.mT, labels, ignore_index=IGNORED, reduction="none")


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("biased", [False, True])
def test_chunked_loss_and_gradients_equal_dense_cross_entropy(biased: bool) -> None:
    hidden, weight, bias, labels = batch()
    inputs = (hidden, weight, bias) if biased else (hidden, weight)
    expected = dense_loss(hidden, weight, bias if biased else None, labels)
    count = (labels != IGNORED).sum() * 3
    found = linear_loss(hidden, weight, bias if biased else None, labels, count)
    torch.testing.assert_close(found, expected.sum() / count)
    for mine, theirs in zip(
        torch.autograd.grad(2 * found, inputs), torch.autograd.grad(2 * expected.sum() / count, inputs), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
    with torch.no_grad():
        torch.testing.assert_close(linear_loss(hidden, weight, bias if biased else None, labels), expected)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_products_are_bf16_and_sums_fp32(dtype: torch.dtype) -> None:
    hidden, weight, _, labels = batch()
    hidden = hidden.detach().to(dtype).requires_grad_()
    count = (labels != IGNORED).sum()
    logits = torch.nn.functional.linear(hidden.bfloat16(), weight.bfloat16()).float()
    expected = torch.nn.functional.cross_entropy(logits.mT, labels, ignore_index=IGNORED, reduction="none")
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_loss(hidden, weight, None, labels, count)
        each = linear_loss(hidden, weight, None, labels)
    found.backward()
    assert found.dtype == each.dtype == weight.grad.dtype == torch.float32
    assert hidden.grad.dtype == dtype
    torch.testing.assert_close(found, expected.sum() / count)
    torch.testing.assert_close(each, expected)


def test_no_chunk_holds_the_logits_of_all_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _, labels = batch()
    monkeypatch.setitem(loss_module.LOGITS_PER_CHUNK, "cpu", 64 * 47)
    largest = 0
    plain = loss_module._losses

    def spy(logit_NV: torch.Tensor, label_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal largest
        largest = max(largest, logit_NV.shape[0])
        return plain(logit_NV, label_N)

    monkeypatch.setattr(loss_module, "_losses", spy)
    linear_loss(hidden, weight, None, labels, torch.tensor(1))
    assert largest == 64


@pytest.mark.parametrize(
    ("family", "overrides", "linear"),
    [
        ("llama", {}, True),
        ("phi", {}, True),  # with a bias
        ("gpt2", {}, True),  # with dropout
        ("granite", {"logits_scaling": 1.02}, False),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, False),
    ],
)
def test_attached_loss_is_that_of_the_models_own_logits(family: str, overrides: dict[str, Any], linear: bool) -> None:
    model = build_model(ModelConfig(family, "nano", overrides), 100, 32, 0)
    if (bias := model.get_output_embeddings().bias) is not None:
        torch.nn.init.normal_(bias, generator=torch.Generator().manual_seed(1))
    for training in (True, False):
        assert has_linear_head(model.train(training)) == linear
        assert model.training == training
    ids = torch.randint(100, (2, 33), generator=torch.Generator().manual_seed(0))
    labels = ids[:, 1:].clone()
    labels[0, ::3] = IGNORED
    expected = torch.nn.functional.cross_entropy(
        model(ids[:, :-1]).logits.mT, labels, ignore_index=IGNORED, reduction="none"
    )
    attach_loss(model)
    torch.testing.assert_close(model(ids[:, :-1], labels), expected)
    torch.testing.assert_close(model(ids[:, :-1], labels, torch.tensor(40)), expected.sum() / 40)


def windows_of(lengths: list[int], length: int) -> Windows:
    """Windows that begin documents of so many tokens."""
    starts = np.cumsum([0, *lengths])
    store = TokenStore(np.zeros(starts[-1], np.uint16), starts, None)
    return Windows(store, starts[:-1], starts[1:], length)


def test_measures_by_hand() -> None:
    loss = np.array([[4.0, 3, 2, 1], [8, 7, 6, 5], [1, 1, 0, 0]], dtype=np.float32)
    labelled = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]], dtype=bool)
    windows = windows_of([5, 9, 3], 4)
    row = summary(loss, labelled, windows, trailing=2, position_range=3)
    assert row["lm_loss"] == pytest.approx(38 / 10)
    assert row["trailing_loss"] == pytest.approx(14 / 4)
    assert row["windows"] == {
        "document": [0, 1, 2],
        "lm": [2.5, 6.5, 1.0],
        "trailing": [1.5, 5.5, None],
        "positions": [[3.0, 1.0], [7.0, 5.0], [1.0, None]],
    }
    assert [(r["start"], r["end"], r["loss"]) for r in row["position_loss"]] == [(0, 3, 4.0), (3, 4, 3.0)]
    low, high = row["intervals"]["trailing"]
    of_two = 2 * 12.706 * 2**0.5 / 1.95996  # documents, whose means lie 2 from that of both
    assert (low, high) == pytest.approx((3.5 - of_two, 3.5 + of_two), rel=1e-4)
    means = summary(loss, labelled, windows, trailing=2, position_range=3, each_window=False)
    assert set(means) == {"lm_loss", "trailing_loss", "position_loss", "trailing"}
    assert means["position_loss"] == [{"start": 0, "end": 3, "loss": 4.0}, {"start": 3, "end": 4, "loss": 3.0}]
    assert [means[name] for name in ("lm_loss", "trailing_loss")] == [row["lm_loss"], row["trailing_loss"]]


def test_without_full_windows_there_is_no_trailing_loss() -> None:
    row = summary(np.ones((2, 4)), np.ones((2, 4), dtype=bool), windows_of([3, 4], 4), 2, 2)
    assert row["trailing_loss"] is None
    assert row["intervals"]["trailing"] is None
    assert row["windows"]["trailing"] == [None, None]


def test_a_range_without_labels_is_left_out_of_means_and_windows_alike() -> None:
    labelled = np.array([[1, 1, 0, 0, 1, 1], [1, 0, 0, 0, 1, 0]], dtype=bool)
    row = summary(np.ones((2, 6)) * labelled, labelled, windows_of([7, 7], 6), 2, 2)
    assert [part["start"] for part in row["position_loss"]] == [0, 4]
    assert row["windows"]["positions"] == [[1.0, 1.0], [1.0, 1.0]]


def test_the_records_of_a_study_at_32k_stay_below_5_mb() -> None:
    """60 runs of 250 windows of 16 ranges: the final record of each, and its result without the windows."""
    rng = np.random.default_rng(0)
    labelled = np.ones((250, 128), dtype=bool)
    windows = windows_of([129] * 250, 128)
    row = summary(rng.uniform(0.5, 8, (250, 128)), labelled, windows, 8, 8)
    means = summary(rng.uniform(0.5, 8, (250, 128)), labelled, windows, 8, 8, each_window=False)
    assert len(row["windows"]["positions"]) == 250
    assert len(row["windows"]["positions"][0]) == 16
    final, earlier = (len(json.dumps(value, separators=(",", ":"))) for value in (row, means))
    assert 60 * (final + 15 * earlier) < 4e6


def test_intervals_of_a_record_are_over_documents() -> None:
    loss = np.repeat(np.random.default_rng(1).normal(5.0, 1.0, 20), 5)[:, None] * np.ones((1, 4))
    labelled, starts = np.ones((100, 4), dtype=bool), np.arange(21) * 21
    together = cut_windows(TokenStore(np.zeros(starts[-1], np.uint16), starts, None), np.arange(20), 4)
    widths = [
        np.diff(summary(loss, labelled, windows, 2, 2)["intervals"]["lm"])[0]
        for windows in (windows_of([5] * 100, 4), together)
    ]
    assert widths[1] / widths[0] == pytest.approx(1.077 * 5**0.5, rel=0.1), (
        "five windows of a document tell as much as one"
    )


def numbered(lengths: list[int], length: int) -> Windows:
    """`windows_of` in which every token is its own number."""
    windows = windows_of(lengths, length)
    store = TokenStore(np.arange(sum(lengths), dtype=np.uint16), windows.store.starts, None)
    return Windows(store, windows.starts, windows.ends, length)


def test_a_context_cut_short_leaves_the_same_tokens_with_fewer_before_them() -> None:
    """Losses that say which token it is and how many are read before it."""
    windows, config = numbered([17, 9, 20], 16), RunConfig(DataConfig(length=16), eval=EvalConfig(contexts=(4, 8)))
    config = replace(config, eval=replace(config.eval, trailing=4, batch_size=2))

    def losses(input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.where(labels == IGNORED, 0, labels + 1000.0 * torch.arange(input_ids.shape[1]))

    row = measure(losses, windows, config, torch.device("cpu"))
    tokens = {0: (13 + 14 + 15 + 16) / 4, 2: 26 + (13 + 14 + 15 + 16) / 4}  # of the two full windows
    read = {4: 1500, 8: 5500, 16: 13500}
    assert row["windows"]["trailing"] == [tokens[0] + read[16], None, tokens[2] + read[16]]
    assert row["windows"]["contexts"] == [
        [pytest.approx(tokens[window] + read[context]) if window in tokens else None for context in (4, 8)]
        for window in range(3)
    ]
    assert [part["context"] for part in row["context_loss"]] == [4, 8]
    assert row["context_loss"][1]["loss"] == pytest.approx((tokens[0] + tokens[2]) / 2 + read[8])
    assert row["context_loss"][1]["interval"] is not None
    assert "context_loss" not in measure(losses, windows, config, torch.device("cpu"), each_window=False)
    assert "context_loss" not in measure(losses, numbered([9], 16), config, torch.device("cpu"))


def test_the_loss_of_a_context_is_that_of_labels_alone() -> None:
    windows, written = numbered([17], 16), np.arange(17) != 15
    windows = replace(windows, store=replace(windows.store, written=written))
    found = context_losses(lambda _, labels: labels.clamp(min=0), windows, (8,), 4, 1, torch.device("cpu"))
    assert found[8].mean == (13 + 14 + 16) / 3


def test_no_graph_is_made_for_a_context() -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    losses = torch.compile(lambda ids, labels: (ids * labels).float(), backend=backend)
    context_losses(losses, numbered([17], 16), (4, 8), 4, 1, torch.device("cpu"))
    assert not graphs
    losses(torch.ones(1, 4), torch.ones(1, 4))
    assert graphs, "so it would have been"


@pytest.mark.parametrize(
    ("contexts", "message"),
    [
        ((8, 4), r"eval\.contexts must rise, got \[8, 4\]"),
        ((4, 64), r"eval\.contexts=\[4, 64\]: a context holds the 8 trailing tokens .* shorter than a window of .*=64"),
    ],
)
def test_contexts_hold_the_trailing_tokens(contexts: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig(DataConfig(length=64), eval=EvalConfig(contexts=contexts)).check()


@pytest.fixture
def documents(tmp_path: Path) -> DataConfig:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.txt").write_text(f"the quick fox {number} " * 40)
    return DataConfig(str(folder), hold_out=2, length=64, cache=str(tmp_path / "cache"))


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    build_model(ModelConfig(size="nano"), 257, 64, 0).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_model_folder_is_evaluated_on_whole_windows_in_any_batch_size(
    documents: DataConfig, model_folder: Path
) -> None:
    rows = [evaluate_source(str(model_folder), documents, EvalConfig(5, batch_size=b)) for b in (1, 2)]
    assert rows[0]["lm_loss"] == pytest.approx(rows[1]["lm_loss"], abs=1e-5)
    assert rows[0]["lm_loss"] == pytest.approx(np.log(257), abs=0.3)
    assert len(rows[0]["windows"]["lm"]) == len(rows[0]["windows"]["trailing"]) == 5
    assert [part["start"] for part in rows[0]["position_loss"]] == list(range(0, 64, 8))


def test_the_loss_with_a_short_context_is_that_of_a_shorter_input(documents: DataConfig, model_folder: Path) -> None:
    row = evaluate_source(str(model_folder), documents, EvalConfig(3, contexts=(8, 24), batch_size=1))
    model, windows = load_model(model_folder), load_validation(documents, model_folder).spread(3)
    for number, window in enumerate(row["windows"]["contexts"]):
        ids, labels = (windows[number][key][None] for key in ("input_ids", "labels"))
        for context, loss in zip((8, 24), window, strict=True):
            logits = model(ids[:, -context:]).logits[:, -8:]
            assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits.mT, labels[:, -8:]).item(), rel=1e-5)
    assert row["windows"]["contexts"][0][0] != row["windows"]["contexts"][0][1]


def test_the_folder_of_a_trainer_is_that_of_a_model(documents: DataConfig, model_folder: Path) -> None:
    """`transformers.Trainer` leaves checkpoints beside the model, as a run does."""
    (model_folder / "checkpoint-5").mkdir()
    data = ["--data.source", documents.source, "--data.cache", documents.cache, "--data.hold-out", "2"]
    assert cli.main(["evaluate", str(model_folder), *data, "--data.length", "64", "--eval.windows", "2"]) == 0


def test_no_more_trailing_positions_than_there_are(documents: DataConfig, model_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"eval\.trailing=70 is more than a window of data\.length=64"):
        evaluate_source(str(model_folder), documents, EvalConfig(5, trailing=70))


def test_window_losses_put_each_loss_at_its_position(documents: DataConfig, model_folder: Path) -> None:
    windows = load_validation(documents, model_folder).spread(3)
    loss, labelled = window_losses(lambda ids, labels: ids + labels / 1000, windows, 2, torch.device("cpu"))
    expected = [windows[i]["input_ids"] + windows[i]["labels"] / 1000 for i in range(3)]
    np.testing.assert_allclose(loss, torch.stack(expected).numpy(), rtol=1e-6)
    assert labelled.all()


def test_more_tokens_than_a_model_has_positions_for(documents: DataConfig, model_folder: Path, tmp_path: Path) -> None:
    """Looked up in a table there is no number for them; rotary embeddings have any, which is said."""
    learned = tmp_path / "learned"
    build_model(ModelConfig("gpt2", "nano", {"attn_pdrop": 0.0}), 257, 64, 0).save_pretrained(learned)
    byte_tokenizer().save_pretrained(learned)
    needles = partial(measure_needles, lengths=[130])
    longer, said = replace(documents, length=130), "130 tokens are more than the 64 positions of the model of"
    for measured in (
        lambda model, notes: evaluate_source(str(model), longer, EvalConfig(2), notes),
        lambda model, notes: needles([model], depths=1, samples=1, data=longer, progress=notes),
        lambda model, notes: generate_text(model, "x" * 125, max_new_tokens=6, progress=notes),
    ):
        notes = Notes()
        with pytest.raises(ValueError, match=rf"{said} \S*learned, which has no others; give fewer"):
            measured(learned, notes)
        measured(model_folder, notes)
        assert [note for note in notes.notes if said in note]
    assert generate_text(learned, "x" * 60, max_new_tokens=5).new_tokens == 5


def test_broken_models_are_named(documents: DataConfig, model_folder: Path) -> None:
    weights = model_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="holds no readable model with safetensors weights"):
        evaluate_source(str(model_folder), documents, EvalConfig(2))
    weights.unlink()
    torch.save({}, model_folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds no readable model with safetensors weights"):
        load_model(model_folder)
