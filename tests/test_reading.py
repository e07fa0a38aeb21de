"""Sources of documents: every kind of file that is read, what is refused, what is left out and said so."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import feather, parquet
from tiny import Notes

from openmoba.lab.config import DataConfig
from openmoba.lab.data.corpus import Corpus, Item, open_corpus
from openmoba.lab.data.load import load_data, trained_bpe
from openmoba.lab.data.store import survey, tokenise
from openmoba.lab.data.tokenizer import byte_tokenizer
from openmoba.lab.progress import Progress

TEXTS = ["first, with a comma\nand two lines", 'second "quoted" ä漢', "x" * 200_000, "[last"]


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}) + "\n\n" for text in texts).encode()


def json_list(texts: list[str]) -> bytes:
    return json.dumps([{"text": text} for text in texts], indent=2).encode()


def table(delimiter: str) -> Callable[[list[str]], bytes]:
    def write(texts: list[str]) -> bytes:
        stream = io.StringIO()
        rows = csv.writer(stream, delimiter=delimiter)
        rows.writerows([("id", "text"), *((1, text) for text in texts)])
        return stream.getvalue().encode("utf-8-sig")

    return write


def columns(texts: list[str]) -> pyarrow.Table:
    return pyarrow.table({"id": [1] * len(texts), "text": texts})


def as_parquet(texts: list[str]) -> bytes:
    stream = io.BytesIO()
    parquet.write_table(columns(texts), stream, row_group_size=3)
    return stream.getvalue()


def as_parquet_twice(texts: list[str]) -> bytes:
    stream = io.BytesIO()
    parquet.write_table(pyarrow.table([texts, texts], names=["text", "text"]), stream)
    return stream.getvalue()


def as_feather(texts: list[str]) -> bytes:
    stream = io.BytesIO()
    feather.write_feather(columns(texts), stream)
    return stream.getvalue()


def as_stream(texts: list[str]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, columns(texts).schema) as writer:
        writer.write_table(columns(texts), max_chunksize=3)
    return bytes(sink.getvalue())


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", json_lines),
        ("a.JSONL", json_lines),
        ("a.ndjson", json_lines),
        ("a.json", json_lines),
        ("a.json", json_list),
        ("a.json", lambda texts: b"\r\n " + json_list(texts) + b"\n\n"),
        ("a.jsonl", lambda texts: b"\n \n" + json_lines(texts)),
        ("a.Csv", table(",")),
        ("a.tsv", table("\t")),
        ("a.parquet", as_parquet),
        ("a.arrow", as_stream),
        ("a.feather", as_feather),
        ("a.jsonl.gz", lambda texts: gzip.compress(json_lines(texts))),
        ("a.jsonl.GZ", lambda texts: gzip.compress(json_lines(texts[:2])) + gzip.compress(json_lines(texts[2:]))),
        ("a.json.bz2", lambda texts: bz2.compress(json_list(texts))),
        ("a.csv.xz", lambda texts: lzma.compress(table(",")(texts))),
        ("a.jsonl.zst", lambda texts: zstd(json_lines(texts))),
        ("a.jsonl", lambda texts: gzip.compress(json_lines(texts))),  # a wrong name
    ],
)
def test_rows_of_any_kind_of_file_are_the_documents(
    name: str, write: Callable[[list[str]], bytes], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(write(TEXTS))
    for source in (tmp_path / name, tmp_path):
        corpus = open_corpus(str(source))
        assert list(corpus.documents()) == TEXTS
        assert [item.share for item in corpus.items()] == sorted(item.share for item in corpus.items())
        assert list(corpus.items())[-1].share == pytest.approx(1, abs=0.51)
    with pytest.raises(ValueError, match=r"a\..* has no column 'body'; set data\.column to one of (id, )?text"):
        list(open_corpus(str(tmp_path / name), "body").documents())


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, zstd, bytes])
def test_a_text_is_one_document_compressed_or_not(compress: Callable[[bytes], bytes], tmp_path: Path) -> None:
    (tmp_path / "book").write_bytes(compress("\ufeffa book\r\nof ä".encode()))
    assert list(open_corpus(str(tmp_path / "book")).documents()) == ["a book\nof ä"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("text".encode("utf-16"), "in UTF-16, not UTF-8"),
        ("caf\u00e9".encode("latin-1"), "in another encoding than UTF-8"),
        (b"PK\x03\x04\0\0", "binary"),
        (gzip.compress(b"a\0b", mtime=0), "binary"),
        (b"%PDF-1.4\ntext", "PDF"),
    ],
)
def test_what_is_no_text_is_refused_by_name_and_left_out_of_folders(
    content: bytes, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "odd.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"odd\.txt is {reason}; documents are text in UTF-8, JSON, CSV"):
        open_corpus(str(tmp_path / "odd.txt"))
    (tmp_path / "even.txt").write_text("text")
    corpus = open_corpus(str(tmp_path))
    assert list(corpus.named()) == [("even.txt", "text")]
    assert str(corpus.left_out) == f"left out: 1 {reason} (odd.txt)"


def test_a_notebook_is_not_read_as_its_json(tmp_path: Path) -> None:
    (tmp_path / "a.ipynb").write_text('{"cells": []}')
    with pytest.raises(ValueError, match=r"a\.ipynb is a notebook, which is JSON"):
        open_corpus(str(tmp_path / "a.ipynb"))


def test_rows_beside_a_readme_are_the_documents_and_the_rest_is_named(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"{number}.jsonl.gz").write_bytes(gzip.compress(json_lines([f"text {number}"])))
    for name in ("README", "LICENSE.md", "dataset_info.json"):
        (tmp_path / name).write_text("about it")
    corpus = open_corpus(str(tmp_path))
    assert list(corpus.named()) == [("1.jsonl.gz:1", "text 1"), ("2.jsonl.gz:1", "text 2")]
    assert str(corpus.left_out) == (
        "left out: 1 about the data (dataset_info.json); 2 beside JSON files (LICENSE.md, README)"
    )


@pytest.mark.parametrize("others", [("b.jsonl",), ("b.csv", "c.csv"), ("a.txt", "b.json"), ("a.py", "c/b.CSV.gz")])
def test_files_of_kinds_that_cannot_all_be_the_documents_are_refused(others: tuple[str, ...], tmp_path: Path) -> None:
    if others[0].startswith("b"):
        (tmp_path / "a.parquet").write_bytes(as_parquet(TEXTS))
    for name in others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(json_lines(["text"]))
    with pytest.raises(ValueError, match=r"files of several kinds.*name those that are, as data\.source='\S+\*"):
        open_corpus(str(tmp_path))


def test_a_pattern_names_the_files_that_are_meant(tmp_path: Path) -> None:
    for name in ("a.jsonl", "in/b.jsonl", "in/c.txt", "d.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(json_lines([name]))
    assert list(open_corpus(f"{tmp_path}/**/*.jsonl").named()) == [
        ("a.jsonl:1", "a.jsonl"),
        ("in/b.jsonl:1", "in/b.jsonl"),
    ]
    with pytest.raises(ValueError, match=r"x\*\.csv holds no documents; it is empty"):
        open_corpus(f"{tmp_path}/x*.csv")


def test_data_sets_that_datasets_saved_are_read(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": TEXTS})
    rows.save_to_disk(tmp_path / "one", num_shards=2)
    assert list(open_corpus(str(tmp_path / "one")).documents()) == TEXTS
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "both")
    with pytest.raises(ValueError, match=r"holds the splits train, test; set data\.source to \S*both/train"):
        open_corpus(str(tmp_path / "both"))
    assert list(open_corpus(str(tmp_path / "both/train")).documents()) == TEXTS


def test_a_data_set_whose_description_is_damaged_is_named(tmp_path: Path) -> None:
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=r"state\.json has no _data_files, which datasets writes"):
        open_corpus(str(tmp_path))
    (tmp_path / "dataset_dict.json").write_text("{")
    with pytest.raises(ValueError, match=r"dataset_dict\.json"):
        open_corpus(str(tmp_path))
    (tmp_path / "dataset_dict.json").unlink()
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "gone.arrow"}]}')
    with pytest.raises(ValueError, match=r"gone\.arrow cannot be read: No such file"):
        open_corpus(str(tmp_path))


def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openmoba.lab.data.corpus._hub_files", lambda source: pytest.fail(source))
    (tmp_path / "texts").mkdir()
    monkeypatch.chdir(tmp_path)
    for source in ("texts/gone", "some/where/else", "gone.jsonl.gz", "./gone"):
        with pytest.raises(ValueError, match=rf"{source} does not exist; give a file"):
            open_corpus(source)


def test_folders_that_are_not_entered_are_named(tmp_path: Path) -> None:
    (tmp_path / "texts/in").mkdir(parents=True)
    (tmp_path / "texts/in/a.txt").write_text("text")
    (tmp_path / "texts/again").symlink_to(tmp_path / "texts/in")
    (tmp_path / "texts/gone.txt").symlink_to(tmp_path / "nowhere")
    corpus = open_corpus(str(tmp_path / "texts"))
    assert list(corpus.named()) == [("in/a.txt", "text")]
    assert corpus.left_out.paths == {"a link to a folder": ["again"], "no file": ["gone.txt"]}


def test_half_a_character_is_refused_by_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "\\ud83d"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: .*surrogates not allowed; such characters are no text"):
        survey(open_corpus(str(tmp_path / "a.jsonl")), tmp_path / "cache", Progress())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, row 2 is not readable as JSON"),
        ("a.jsonl", b'"text"\n', r"a\.jsonl, row 1: a row is an object with columns, got 'text'"),
        ("a.jsonl", b'{"text": 3}', r"a\.jsonl, row 1: a document is a text or a list of messages with roles, got 3"),
        ("a.jsonl", '{"text": "x"}'.encode("utf-16"), r"a\.jsonl holds no text in UTF-8.*; convert it"),
        ("a.json", b'[{"text": "x"}, {"text"', r"a\.json, row 2 is not readable as JSON"),
        ("a.json", json_list(TEXTS) + json_list(TEXTS), r"a\.json goes on behind its list of 4 objects; a file"),
        ("a.json", b'[{"text": "x"}]\n\n{"text": "y"}', r"a\.json goes on behind its list of 1 objects"),
        ("a.jsonl", b'\n\n{"text": "x"}\n{"text": \n', r"a\.jsonl, row 4 is not readable as JSON"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, r"a\.jsonl, row 1 is not readable as JSON: maximum recursion depth"),
        ("a.json", b'[{"text": ' + b"[" * 100_000, r"a\.json, row 1 is not readable as JSON: maximum recursion depth"),
        ("a.csv", b"text,id\nx,1,2\n", r"a\.csv, row 1 has more fields than the first line names"),
        ("a.csv", b'text\n"x', r"a\.csv is not readable as CSV behind line 1"),
        ("a.csv", b"text,id,text\nx,1,y\n", r"a\.csv has 2 columns 'text'; rename all but one"),
        ("a.parquet", as_parquet_twice(TEXTS), r"a\.parquet has 2 columns 'text'; rename all but one"),
        ("a.jsonl.gz", gzip.compress(json_lines(TEXTS))[:-20], r"a\.jsonl\.gz cannot be read: .*; restore it"),
        ("a.jsonl.xz", lzma.compress(json_lines(TEXTS))[:-20], r"a\.jsonl\.xz cannot be read: .*; restore it"),
        ("a.jsonl.zst", zstd(json_lines(TEXTS))[:40], r"a\.jsonl\.zst"),
        ("a.parquet", b"PAR1 no", r"a\.parquet is not readable as Parquet"),
        ("a.parquet.gz", gzip.compress(as_parquet(TEXTS)), r"a\.parquet\.gz is not readable as Parquet"),
        ("a.arrow", b"no", r"a\.arrow is not readable as Arrow"),
    ],
)
def test_what_is_not_readable_names_file_and_row(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(open_corpus(str(tmp_path / name)).documents())


def test_a_list_of_objects_is_read_over_the_borders_of_what_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openmoba.lab.data.rows._CHARACTERS_AT_ONCE", 7)
    texts = [f"{n} ]}}, {{" * n for n in range(1, 9)]
    (tmp_path / "a.json").write_bytes(json_list(texts))
    assert list(open_corpus(str(tmp_path / "a.json")).documents()) == texts


def test_digests_are_those_of_contents_not_of_names_and_places(tmp_path: Path) -> None:
    for name in ("here/a.jsonl", "there/b.jsonl", "here/a.txt", "there/b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(json_lines(["text"]))
    digests = [open_corpus(str(path)).digest for path in sorted(tmp_path.rglob("*.*"))]
    assert digests[0] == digests[2]  # a.jsonl and b.jsonl
    assert digests[1] == digests[3]
    assert digests[0] != digests[1]
    (tmp_path / "here/a.jsonl").write_bytes(json_lines(["other"]))
    assert open_corpus(str(tmp_path / "here/a.jsonl")).digest != digests[0]


class Told(Notes):
    """Keeps steps too."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[str, list[int]] = {}

    def step(self, done: int, total: int, detail: str = "", share: float | None = None) -> None:
        assert total == 100
        self.steps.setdefault(detail, []).append(done)


def config(source: Path, tmp_path: Path, **options: Any) -> DataConfig:
    values = {"length": 16, "hold_out": 4, "cache": str(tmp_path / "cache"), "vocab_size": 300, **options}
    return DataConfig(source=str(source), **values)


def test_reading_and_tokenising_tell_how_far_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openmoba.lab.data.store._CHARACTERS_PER_BATCH", 3000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines([f"{n} and {n * n % 1009}, " * 90 for n in range(100)]))
    told = Told()
    load_data(config(path, tmp_path), progress=told)
    assert set(told.steps) == {
        f"percent read of {path}",
        "percent read for the tokenizer",
        f"percent tokenised of {path}",
    }
    assert all(len(steps) > 10 and steps == sorted(set(steps)) for steps in told.steps.values())
    assert all(steps[-1] == 100 for steps in told.steps.values())


def test_what_is_left_out_is_said_and_so_are_rows_without_text(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    rows = [{"text": f"text {n} " * 20} for n in range(8)] + [{"text": None}, {"text": ""}, {"id": 3}]
    (tmp_path / "texts/a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "texts/README").write_text("about it")
    told = Told()
    data = load_data(config(tmp_path / "texts", tmp_path, tokenizer="bytes"), progress=told)
    assert len(data.train.store.lengths) == 8
    assert f"{tmp_path}/texts: left out: 1 beside JSON files (README)" in told.notes
    assert f"{tmp_path}/texts: left out 3 rows that hold no text" in told.notes


def test_documents_that_are_not_trained_on_are_counted(tmp_path: Path) -> None:
    texts = [f"text {n} " * 20 for n in range(8)]
    (tmp_path / "a.jsonl").write_bytes(json_lines([*texts, texts[0], texts[0], texts[3]]))
    (tmp_path / "valid.jsonl").write_bytes(json_lines([texts[2], "another text " * 20]))
    copies = f"{tmp_path}/a.jsonl: left out 3 of its documents: copies of others among them"
    held = f"{tmp_path}/a.jsonl: left out 1 of its documents: they are in data.valid too"
    for options, said in (({}, {copies}), ({"valid": str(tmp_path / "valid.jsonl")}, {copies, held})):
        told = Told()
        load_data(config(tmp_path / "a.jsonl", tmp_path, tokenizer="bytes", **options), progress=told)
        assert {note for note in told.notes if "of its documents" in note} == said


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """Of all that comes before training: the survey, the tokenizer, the tokens."""
    size = 210_000

    def corpus(count: int) -> Corpus:
        def items() -> Iterator[Item]:
            return (Item(str(n), f"{n:06d} " * (size // 7), (n + 1) / count) for n in range(count))

        return Corpus("made", f"made-{count}", items)

    def peak(count: int) -> int:
        tracemalloc.start()
        try:
            survey(corpus(count), tmp_path, Progress())
            trained_bpe(corpus(count), np.arange(count), 300, tmp_path, Progress())
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(1)
    assert peak(9) < peak(3) + size


def test_batches_bound_what_is_tokenised_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openmoba.lab.data.store._CHARACTERS_PER_BATCH", 1000)
    sizes = []
    encode = byte_tokenizer().backend_tokenizer.encode_batch_fast

    class Counting:
        """A tokenizer's backend that notes how much it is given."""

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer_backend, name)

        def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
            sizes.append(sum(map(len, texts)))
            return encode(texts, **options)

    tokenizer = byte_tokenizer()
    tokenizer_backend = tokenizer.backend_tokenizer
    monkeypatch.setattr(type(tokenizer), "backend_tokenizer", property(lambda _: Counting()))
    items = [Item(str(n), "a" * 400, n / 10) for n in range(10)]
    store = tokenise(Corpus("made", "made", lambda: iter(items)), tokenizer, tmp_path, Progress())
    assert store.lengths.tolist() == [401] * 10
    assert sizes == [1200, 1200, 1200, 400]


def test_validation_documents_that_are_all_of_training_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    with pytest.raises(ValueError, match=r"every document of data\.source=\S+ is one of data\.valid=\S+ too: none is"):
        load_data(config(tmp_path / "a.jsonl", tmp_path, valid=str(tmp_path / "a.jsonl")))
