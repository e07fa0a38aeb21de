"""Corpora: documents that are directories, `openmoba corpus`, and tokens of documents in pieces."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from openmoba.cli import main
from openmoba.lab.config import DataConfig
from openmoba.lab.data.corpus import Corpus, open_corpus
from openmoba.lab.data.directories import open_directories
from openmoba.lab.data.load import load_data
from openmoba.lab.data.making import pick
from openmoba.lab.data.rules import DocumentRules, FileRules
from openmoba.lab.data.store import Survey
from openmoba.lab.data.tokenizer import byte_tokenizer, cut_at_spaces, encode_texts, train_bpe


def tree(root: Path, files: dict[str, str | bytes]) -> Path:
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def directories(root: Path, merge_below: int = 1, **rules: Any) -> Corpus:
    return open_directories(str(root), FileRules(**rules), merge_below)


def files_in(corpus: Corpus) -> dict[str, list[str]]:
    return {name: re.findall("^==> (.*) <==$", str(text), re.MULTILINE) for name, text in corpus.named()}


def test_a_document_is_a_directory_of_files_in_order_of_their_paths(tmp_path: Path) -> None:
    root = tree(
        tmp_path, {"b/y.c": "why\n", "b/x.c": "no line end", "b-c/a.c": "dash\n", "b/d/z.c": "deep\n", "a.c": "top\n"}
    )
    assert list(directories(root).named()) == [
        (".", "==> a.c <==\ntop\n"),
        ("b", "==> b/x.c <==\nno line end\n\n==> b/y.c <==\nwhy\n"),
        ("b/d", "==> b/d/z.c <==\ndeep\n"),
        ("b-c", "==> b-c/a.c <==\ndash\n"),
    ]


def test_small_directories_are_merged_into_those_around_them(tmp_path: Path) -> None:
    text = "x" * 100
    root = tree(
        tmp_path,
        {
            "big/a.c": text + "1",
            "big/small/a.c": "s\n",
            "big/none/here/a.c": "h\n",  # two levels up, the one between has no files
            "none/big/a.c": text + "2",  # not merged into the one around it, which stays empty
            "few/a/a.c": "y" * 50,
            "few/b/a.c": "z" * 50,  # only together large enough
        },
    )
    assert files_in(directories(root, 100)) == {
        "big": ["big/a.c", "big/none/here/a.c", "big/small/a.c"],
        "few": ["few/a/a.c", "few/b/a.c"],
        "none/big": ["none/big/a.c"],
    }
    assert list(files_in(directories(root, 10**6))) == ["."]


def test_files_are_taken_by_the_rules_and_the_rest_is_counted_by_reason(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "a.c": "kept\n",
            "b.c": "kept\n",
            "c.C": "other case",
            "d.h": "x" * 30,
            "e.c": "",
            "f.c": b"caf\xe9",
            "g.c": b"a\0b",
            "h.c": "in UTF-16".encode("utf-16"),
            "i.c": "\ufeffmarked\r\n",
            "tools/test/j.c": "left",
            "tools/tests/k.c": "taken\n",
            ".git/l.c": "hidden",
        },
    )
    found = directories(root, suffixes=(".c", ".h"), exclude=("tools/test",), largest_file=20)
    assert files_in(found)["."] + files_in(found)["tools/tests"] == ["a.c", "i.c", "tools/tests/k.c"]
    assert dict(found.named())["."] == "==> a.c <==\nkept\n\n==> i.c <==\nmarked\n"
    assert found.left_out.paths == {
        "with the contents of another": ["b.c"],
        "with another suffix": ["c.C"],
        "above 20 bytes": ["d.h"],
        "empty": ["e.c"],
        "in another encoding than UTF-8": ["f.c"],
        "binary": ["g.c"],
        "in UTF-16, not UTF-8": ["h.c"],
        "hidden": [".git"],
        "excluded": ["tools/test/j.c"],
    }
    assert "1 binary (g.c); " in str(found.left_out)
    with pytest.raises(
        ValueError, match=r"holds no text files that the options take; left out: .*11 with another suffix"
    ):
        directories(root, suffixes=(".rs",))


def test_of_copies_the_first_path_is_kept_in_whatever_order_a_folder_lists_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tree(tmp_path, {f"{name}.c": "same\n" for name in "hbgaf"} | {"b/c.c": "same\n"})
    listed = [(here, folders, sorted(names)) for here, folders, names in os.walk(root)]
    for walked in (listed, [(here, folders, names[::-1]) for here, folders, names in listed[::-1]]):
        monkeypatch.setattr("openmoba.lab.data.files.os.walk", lambda _, onerror, walked=walked: walked)
        assert files_in(directories(root)) == {".": ["a.c"]}
        monkeypatch.undo()


def test_the_digest_of_directories_is_that_of_their_contents(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {"a/x.c": "x\n", "b/y.c": "y\n"}
    here, there = (directories(tree(tmp_path / name, files)) for name in ("here", "there"))
    moved = directories(tree(tmp_path / "moved", {"a/x.c": "x\n", "c/y.c": "y\n"}))
    changed = directories(tree(tmp_path / "changed", {"a/x.c": "x\n", "b/y.c": "z\n"}))
    merged = directories(tmp_path / "here", 10**6)
    assert here.digest == there.digest
    assert len({found.digest for found in (here, moved, changed, merged)}) == 4


def surveyed(sizes: list[int], digests: list[int] | None = None) -> Survey:
    hashes = np.asarray(digests or range(len(sizes)), dtype=np.uint64)
    return Survey(np.asarray(sizes), hashes, np.asarray(sizes))


def test_documents_are_picked_at_random_with_a_fixed_seed_and_once() -> None:
    many = surveyed([100] * 60 + [10] * 20, [*range(60), *range(40, 60)])
    rules = DocumentRules(hold_out=6)
    train, valid = pick(many, rules)
    assert len(valid) == 10
    assert sorted([*train, *valid]) == list(range(60))  # the others are copies
    assert [part.tolist() for part in pick(many, rules)] == [train.tolist(), valid.tolist()]
    assert pick(many, replace(rules, seed=1))[1].tolist() != valid.tolist()
    some, held = pick(many, replace(rules, total=1999))
    assert len(some) == 19
    assert set(some) <= set(train)
    assert held.tolist() == valid.tolist()


def test_sizes_leave_documents_out() -> None:
    few = surveyed([5, 10, 20, 40])
    assert pick(few, DocumentRules(smallest=10, largest=20))[0].tolist() == [1, 2]
    train, valid = pick(few, DocumentRules(smallest=10, largest=20, hold_out=3))
    assert sorted([*train, *valid, 3])[-1] == 3  # the largest may be held out, and is never trained on
    assert 3 not in train
    with pytest.raises(ValueError, match=r"no document is left to write of 4, of 5 to 40 bytes; change --smallest"):
        pick(few, DocumentRules(smallest=41))
    with pytest.raises(ValueError, match=r"--hold-out 5 holds out one of so many documents, and there are 4; lower it"):
        pick(few, DocumentRules(hold_out=5))
    for wrong in ({"smallest": 0}, {"hold_out": 1}, {"level": 23}, {"total": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            DocumentRules(**wrong)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve directories of two files, whose words name the directory."""
    root = tmp_path_factory.mktemp("sources")
    return tree(
        root,
        {
            f"d{n}/{f}.c": "".join(f"name{n} {f} = {i * i % 97}\n" for i in range(60 + n))
            for n in range(12)
            for f in ("a", "b")
        },
    )


def test_corpus_writes_what_a_run_then_trains_on(sources: Path, tmp_path: Path, capsys: Any) -> None:
    options = ["--documents", "directories", "--merge-below", "1", "--hold-out", "6", "--cut", "999"]
    counting = ["--vocab-size", "280", "270", "--length", "64", "--cache", str(tmp_path / "cache")]
    assert main(["corpus", str(sources), "--out", str(tmp_path / "made"), *options, *counting]) == 0
    report = capsys.readouterr().out
    tables = [parquet.read_table(tmp_path / f"made-{part}.parquet") for part in ("train", "valid")]
    documents = dict(directories(sources).named())
    train, valid = (dict(zip(*table.to_pydict().values(), strict=True)) for table in tables)
    assert [table.column_names for table in tables] == [["id", "text"]] * 2
    assert len(valid) == 2
    assert valid == {name: documents[name][:999] for name in valid}
    assert train == {name: text for name, text in documents.items() if name not in valid}

    before = sorted((tmp_path / "cache").iterdir())
    data = load_data(
        DataConfig(
            source=str(tmp_path / "made-train.parquet"),
            valid=str(tmp_path / "made-valid.parquet"),
            vocab_size=280,
            length=64,
            cache=str(tmp_path / "cache"),
        )
    )
    assert sorted((tmp_path / "cache").iterdir()) == before  # nothing is read or tokenised again
    for windows, texts in ((data.train, train), (data.valid, valid)):
        names = [list(texts)[number] for number in windows.documents]
        assert all(f"name{name[1:]} " in data.tokenizer.decode(windows[i]["input_ids"]) for i, name in enumerate(names))
    line = next(line for line in report.splitlines() if "made-train.parquet  " in line and " 280 " in line)
    size = sum(len(text) for text in train.values())
    tokens = len(data.train.store.tokens)
    assert line.split()[1:4] == ["280", f"{tokens:,}", f"{size / tokens:.4f}"]
    assert line.split()[5:] == [f"{len(data.train):,}", "10"]


def test_the_same_source_makes_the_same_bytes(sources: Path, tmp_path: Path) -> None:
    command = ["corpus", str(sources), "--documents", "directories", "--tokenizer", "bytes"]
    for name in ("one", "two"):
        options = ["--out", str(tmp_path / name), "--cache", str(tmp_path / "cache" / name)]
        assert main([*command, *options]) == 0
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()
    column = parquet.ParquetFile(tmp_path / "one.parquet").metadata.row_group(0).column(1)
    assert (column.path_in_schema, column.compression) == ("text", "ZSTD")


def test_corpus_says_what_a_source_holds_without_writing(tmp_path: Path, capsys: Any) -> None:
    tree(tmp_path / "texts", {"a.txt": "ab" * 50, "b.txt": "ä" * 20, "c.txt": "ab" * 50})
    assert (
        main(["corpus", str(tmp_path / "texts"), "--tokenizer", "bytes", "--length", "30", "--cache", str(tmp_path)])
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{tmp_path}/texts: 3 documents, 1 of them copies; 0.0 MB; from 0.000 to 0.000 MB")
    # 240 bytes and three ends; windows of 30 need 31 tokens: 101 give three each, 41 give one.
    assert lines[2].split()[1:4] == ["257", "243", f"{240 / 243:.4f}"]
    assert lines[2].split()[5:] == ["7", "3"]
    share = np.array([100, 100, 20, 20, 3]) / 243  # a, b, the two bytes of ä, the end
    assert float(lines[2].split()[4]) == pytest.approx(-(share * np.log2(share)).sum() * 243 / 240, abs=1e-4)


@pytest.mark.parametrize("kind", ["files", "directories"])
def test_names_that_are_no_utf8_are_written_so_that_they_are(kind: str, tmp_path: Path) -> None:
    """As old archives have them; a name is an id in Parquet, and a line of a directory's document."""
    root = tree(tmp_path / "texts", {"a.txt": "text\n"})
    (root / os.fsdecode(b"caf\xe9.txt")).write_text("more\n")
    (root / os.fsdecode(b"\xe9.pdf")).write_bytes(b"%PDF-")
    command = ["corpus", str(root), "--documents", kind, "--tokenizer", "bytes", "--cache", str(tmp_path / "cache")]
    assert main([*command, "--out", str(tmp_path / "made")]) == 0
    made = parquet.read_table(tmp_path / "made.parquet").to_pylist()
    if kind == "files":
        assert [row["id"] for row in made] == ["a.txt", r"caf\xe9.txt"]
        assert open_corpus(str(root)).left_out.paths == {"PDF": [r"\xe9.pdf"]}
        assert [item.name for item in open_corpus(f"{root}/*.txt").items()] == ["a.txt", r"caf\xe9.txt"]
    else:
        assert made == [{"id": ".", "text": "==> a.txt <==\ntext\n\n==> caf\\xe9.txt <==\nmore\n"}]


def test_a_source_without_text_is_refused_and_says_what_it_holds(tmp_path: Path, capsys: Any) -> None:
    root = tree(tmp_path, {"pdf/a.pdf": b"%PDF-", "rows.jsonl": '{"text": ""}\n{"text": null}\n'})
    for source, said in (("pdf", " (left out: 1 PDF (a.pdf))"), ("rows.jsonl", "")):
        for _ in range(2):  # the second time from the cache
            assert main(["corpus", str(root / source), "--cache", str(tmp_path / "cache")]) == 2
            assert f"{source} has no documents with text in them{said}; give another" in capsys.readouterr().err


def test_bad_options_name_the_way_out(tmp_path: Path, capsys: Any) -> None:
    chat = tree(tmp_path, {"chat.jsonl": '{"messages": [{"role": "user", "content": "hi"}]}\n'}) / "chat.jsonl"
    for arguments, message in (
        (["stdlib", "--hold-out", "5"], "need --out"),
        (["stdlib", "--documents", "directories"], "stdlib is no folder"),
        ([str(chat), "--suffixes", ".c"], "chat.jsonl is no folder, so there are no files to choose"),
        ([str(chat), "--column", "messages", "--out", str(tmp_path / "x")], "holds conversations"),
        ([str(tmp_path), "--documents", "directories", "--out", "/proc/none/x"], "choose another --out"),
    ):
        assert main(["corpus", *arguments, "--cache", str(tmp_path / "cache")]) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.parquet"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vocab-size", "4096", "256"], "vocab_size must be >= 257, got 256"),
        (["--length", "1"], "length must be >= 2, got 1"),
        (["--merge-below", "-1"], "merge_below must be >= 0, got -1"),
        (["--smallest-file", "0"], "smallest_file must be >= 1 bytes, got 0"),
        (["--smallest-file", "9", "--largest-file", "8"], "largest_file must be >= 9 bytes, got 8"),
        (["--out", "x", "--hold-out", "1"], "hold_out must be >= 2, got 1"),
    ],
)
def test_options_out_of_range_are_refused(arguments: list[str], message: str, capsys: Any) -> None:
    assert main(["corpus", "stdlib", *arguments]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


CODE = st.text(st.sampled_from("ab1_'s (){};\n\n\n \t\r\x1c\x85\u2028ä漢😀"), max_size=60)


@pytest.fixture(scope="module")
def bpe() -> Any:
    return train_bpe(["a b;\n\n\tab1_ 's ab's\n  ab(b) {ä 漢}\r\n" * 3], 320)


@settings(max_examples=100, deadline=None)
@given(text=CODE, size=st.integers(0, 9))
@example(text="a\n\n\n b", size=0)
@example(text="<|endoftext|> a<|endoftext|>\n<|endoftext|>", size=0)
def test_tokens_of_pieces_are_those_of_the_whole(bpe: Any, text: str, size: int) -> None:
    pieces = cut_at_spaces(text, size)
    whole = bpe(text, add_special_tokens=False)["input_ids"]
    assert "".join(pieces) == text
    assert [token for piece in pieces for token in bpe(piece, add_special_tokens=False)["input_ids"]] == whole


def test_long_texts_are_cut_where_words_end_and_nowhere_else() -> None:
    assert cut_at_spaces("aa bb\n\n cc dd", 2) == ["aa", " bb", "\n\n cc", " dd"]
    assert cut_at_spaces("a" * 100, 2) == ["a" * 100]


@pytest.mark.parametrize("kind", ["own", "spaces"])
def test_long_texts_have_the_same_tokens_in_any_tokenizer(bpe: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that put a space before each text would have others in pieces."""
    from tokenizers import pre_tokenizers

    tokenizer = bpe if kind == "own" else train_bpe(["a b"], 270)
    if kind == "spaces":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    texts = ["(a) b1;\n\tab " * 6_000, "", "b"]
    encoded: list[int] = []
    monkeypatch.setattr(
        "openmoba.lab.data.tokenizer.cut_at_spaces", lambda text: encoded.append(1) or cut_at_spaces(text)
    )
    rows = encode_texts(tokenizer, texts)
    assert [row[:-1].tolist() for row in rows] == tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert [row[-1] for row in rows] == [tokenizer.eos_token_id] * 3
    assert len(encoded) == (3 if kind == "own" else 0)


def test_a_byte_tokenizer_cuts_too() -> None:
    assert encode_texts(byte_tokenizer(), ["a b" * 30_000])[0].tolist()[:4] == [64, 220, 65, 64]


def test_an_empty_corpus_of_directories_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it is empty"):
        directories(tmp_path)
    assert open_corpus(str(Path(__file__))).digest
