"""Documents, tokenizers, windows: what is cut, what is held out, what is cached."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_config

from openmoba.lab.config import DataConfig
from openmoba.lab.data.chat import encode_chat
from openmoba.lab.data.corpus import open_corpus
from openmoba.lab.data.holdings import holding
from openmoba.lab.data.load import Data, hold_out, load_data, validation_windows
from openmoba.lab.data.store import Survey, TokenStore, cached
from openmoba.lab.data.tokenizer import byte_tokenizer, load_tokenizer, table_size, train_bpe
from openmoba.lab.data.windows import IGNORED, TrainingWindows, cut_windows
from openmoba.lab.progress import Progress
from openmoba.lab.train.run import run_training

CHAT = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "and 3+3?"},
    {"role": "assistant", "content": "It is 6."},
]


def documents(count: int, size: int = 300) -> list[str]:
    """Texts whose every line names its document."""
    return ["".join(f"document {n} line {i}\n" for i in range(size // 20 + n)) for n in range(count)]


def folder_of(path: Path, texts: list[str]) -> Path:
    path.mkdir()
    for number, text in enumerate(texts):
        (path / f"{number:03d}.txt").write_text(text)
    return path


def load(tmp_path: Path, source: Path | str, **options: object) -> Data:
    values = {"tokenizer": "bytes", "length": 64, "hold_out": 4, "cache": str(tmp_path / "cache"), **options}
    return load_data(DataConfig(source=str(source), **values))  # type: ignore[arg-type]


def texts_of(data: Data, part: str) -> list[str]:
    windows = getattr(data, part)
    return [data.tokenizer.decode(windows[i]["input_ids"]) for i in range(len(windows))]


def test_windows_lie_inside_one_document_and_labels_are_the_next_tokens(tmp_path: Path) -> None:
    data = load(tmp_path, folder_of(tmp_path / "texts", documents(8)))
    assert len(data.train) > 20
    for window in (data.train[i] for i in range(len(data.train))):
        text = data.tokenizer.decode(window["input_ids"])
        numbers = {line.split()[1] for line in text.splitlines() if line.count(" ") == 3 and line.startswith("doc")}
        assert len(numbers) <= 1
        assert len(window["input_ids"]) == 64
        assert (window["input_ids"][1:] == window["labels"][:-1]).all()


def test_each_documents_windows_follow_one_another(tmp_path: Path) -> None:
    text = "".join(chr(ord("a") + i % 26) for i in range(200))
    data = load(tmp_path, folder_of(tmp_path / "texts", [text, *documents(4, 40)]), hold_out=100)
    windows = texts_of(data, "train") + texts_of(data, "valid")
    assert [w for w in windows if w.isalpha()] == [text[:64], text[64:128], text[128:192]]


def test_every_window_knows_its_document_and_keeps_it_when_few_are_taken() -> None:
    starts = np.array([0, 30, 30, 41, 130])  # 30 tokens, none, 11, 89
    windows = cut_windows(TokenStore(np.zeros(130, np.uint16), starts, None), np.array([0, 1, 2, 3]), 10)
    assert windows.documents.tolist() == [0, 0, 2, *[3] * 8]
    assert windows.documents.dtype == np.int64
    assert windows.spread(3).documents.tolist() == [0, 3, 3]


def test_held_out_documents_are_whole_disjoint_and_always_the_same(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "texts", documents(12))
    first, again = load(tmp_path, source), load(tmp_path, source, cache=str(tmp_path / "other"))
    named = [
        {text.split()[1] for text in texts_of(first, part) if text.startswith("document")}
        for part in ("train", "valid")
    ]
    assert len(named[1]) == 3
    assert not named[0] & named[1]
    assert texts_of(first, "valid") == texts_of(again, "valid")


def test_hold_out_takes_one_of_each_group_of_like_size_and_drops_copies() -> None:
    sizes = np.array([10, 11, 12, 13, 100, 110, 120, 130, 130])
    digests = np.array([5, 6, 7, 8, 4, 3, 2, 1, 1], dtype=np.uint64)
    train, held = hold_out(Survey(sizes, digests, sizes), 4)
    assert held.tolist() == [0, 7]
    assert train.tolist() == [1, 2, 3, 4, 5, 6]


def test_separate_validation_documents_are_taken_out_of_training(tmp_path: Path) -> None:
    texts = documents(6)
    valid = folder_of(tmp_path / "valid", texts[2:4])
    data = load(tmp_path, folder_of(tmp_path / "texts", texts), valid=str(valid))
    named = [{t.split()[1] for t in texts_of(data, part) if t.startswith("document")} for part in ("train", "valid")]
    assert named == [{"0", "1", "4", "5"}, {"2", "3"}]
    with pytest.raises(ValueError, match=r"every document of data\.source=\S+ is one of data\.valid=.* none is left"):
        load(tmp_path, valid, valid=str(tmp_path / "texts"))


def test_a_tokenizer_is_made_of_the_training_documents_alone(tmp_path: Path) -> None:
    texts = [f"{word * 3} " * 40 for word in ("lemon", "river", "stone", "cloud", "tiger", "whale", "piano", "amber")]
    source = folder_of(tmp_path / "texts", texts)
    for every in (2, 4):  # in one cache
        data = load(tmp_path, source, tokenizer="bpe", vocab_size=290, hold_out=every, length=8)
        own = [texts[number] for number in np.unique(data.train.documents)]
        assert len(own) == 8 - 8 // every
        assert data.tokenizer.get_vocab() == train_bpe(own, 290).get_vocab()


def test_text_json_lines_parquet_and_folders_give_the_same_documents(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    texts = documents(4)
    folder = folder_of(tmp_path / "texts", texts)
    lines = tmp_path / "texts.jsonl"
    lines.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    table = tmp_path / "texts.parquet"
    parquet.write_table(pyarrow.table({"body": texts}), table)
    assert list(open_corpus(str(folder)).documents()) == texts
    assert list(open_corpus(str(lines), "body").documents()) == texts
    assert list(open_corpus(str(table), "body").documents()) == texts
    assert list(open_corpus(str(folder / "000.txt")).documents()) == texts[:1]
    with pytest.raises(ValueError, match=r"no column 'text'; set data\.column to one of body"):
        list(open_corpus(str(table)).documents())


def test_a_folder_of_sources_gives_its_text_files_only(tmp_path: Path) -> None:
    (tmp_path / "a.c").write_text("int main;")
    (tmp_path / "b.bin").write_bytes(b"\0\1\2")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    assert list(open_corpus(str(tmp_path)).documents()) == ["int main;"]


def test_the_default_corpus_is_the_standard_library_without_its_tests() -> None:
    corpus = open_corpus("stdlib")
    names = [name for name, _ in corpus.named()]
    assert {"argparse.py", "typing.py"} <= set(names)
    assert not any({"test", "site-packages"} & set(name.split("/")) for name in names)
    assert sum(map(len, corpus.documents())) > 8e6


def test_tokens_are_made_once_and_again_when_a_document_changes(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "texts", documents(5))
    load(tmp_path, source)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npy")}
    data = load(tmp_path, source)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npy")} == made
    assert isinstance(data.train.store.tokens, np.memmap)
    (source / "000.txt").write_text("x" * 500)
    data = load(tmp_path, source)
    assert any("xxx" in text for text in texts_of(data, "train") + texts_of(data, "valid"))


def test_a_half_written_cache_is_made_again(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "part").write_text("")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        cached(tmp_path, "thing", fail)
    folder = cached(tmp_path, "thing", lambda folder: (folder / "whole").touch())
    assert [path.name for path in folder.iterdir()] == ["whole"]


def test_training_order_is_seeded_passes_over_all_windows_and_repeats_none_before(tmp_path: Path) -> None:
    windows = load(tmp_path, folder_of(tmp_path / "texts", documents(8))).train
    count = len(windows)
    rows = [
        [tuple(TrainingWindows(windows, 2 * count, seed)[i]["input_ids"].tolist()) for i in range(2 * count)]
        for seed in (0, 0, 1)
    ]
    assert rows[0] == rows[1] != rows[2]
    assert sorted(rows[0][:count]) == sorted(rows[0][count:]) == sorted(rows[2][:count])
    assert rows[0][:count] != rows[0][count:]


def test_fine_tuning_labels_the_last_tokens_only(tmp_path: Path) -> None:
    windows = load(tmp_path, folder_of(tmp_path / "texts", documents(4))).train
    label_T = TrainingWindows(windows, 1, 0, loss_tokens=10)[0]["labels"]
    assert (label_T[:-10] == IGNORED).all()
    assert (label_T[-10:] != IGNORED).all()


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_tokenizers_reproduce_any_text(tmp_path: Path, kind: str) -> None:
    texts = ["def f(x):\n\treturn 'ä€😀'\r\n  ", *documents(3)]
    tokenizer = byte_tokenizer() if kind == "bytes" else train_bpe(texts, 300)
    assert len(tokenizer) == (257 if kind == "bytes" else 300)
    tokenizer.save_pretrained(tmp_path)
    for tool in (tokenizer, load_tokenizer(tmp_path)):
        assert tool.decode(tool(texts[0])["input_ids"]) == texts[0]


def test_numbers_of_tokens_may_leave_some_out(tmp_path: Path) -> None:
    """Here all but the end of a text are moved by 70,000."""
    byte_tokenizer().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    saved["model"]["vocab"] = {piece: number + 70_000 for piece, number in saved["model"]["vocab"].items()}
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    tokenizer = load_tokenizer(tmp_path)
    assert (len(tokenizer), table_size(tokenizer)) == (257, 70_256)
    source = folder_of(tmp_path / "texts", documents(4))
    plain, moved = (load(tmp_path, source, tokenizer=name) for name in ("bytes", str(tmp_path)))
    for i in range(len(plain.train)):
        assert (moved.train[i]["input_ids"] - plain.train[i]["input_ids"] == 70_000).all()
    corpus, tools = open_corpus(str(source)), (byte_tokenizer(), tokenizer)
    assert len({holding(corpus, tool, 64, tmp_path / "cache", Progress()) for tool in tools}) == 1
    (tmp_path / "tiny").mkdir()
    assert run_training(tiny_config(tmp_path / "tiny", tokenizer=str(tmp_path)), tmp_path / "run")


def test_chat_teaches_the_assistants_tokens_alone() -> None:
    tokenizer = byte_tokenizer()
    token_T, written_T = encode_chat(tokenizer, CHAT)
    end = tokenizer.eos_token
    assert tokenizer.decode(token_T[written_T]) == f"4{end}\nIt is 6.{end}\n"
    assert tokenizer.decode(token_T).startswith(f"<|user|>\n2+2?{end}\n<|assistant|>\n4{end}\n<|user|>")


def test_a_template_that_rewrites_the_past_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        encode_chat(tokenizer, CHAT)


def test_conversations_become_padded_windows_with_a_loss_mask(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    chats = [[*CHAT, {"role": "user", "content": f"bye {i}" * i}] for i in range(9)]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    data = load(tmp_path, path, column="messages")
    window = data.train[0]
    taught = window["labels"] != IGNORED
    assert window["input_ids"].shape == window["labels"].shape == (64,)
    assert "4" in data.tokenizer.decode(window["labels"][taught])
    assert "user" not in data.tokenizer.decode(window["labels"][taught])
    short = data.train[int(np.flatnonzero(~data.train.full)[0])]
    assert short["input_ids"][-1] == 0
    assert short["labels"][-1] == IGNORED
    assert all((data.train[i]["labels"] != IGNORED).any() for i in range(len(data.train)))
    assert not data.train.full.all()


def test_validation_windows_are_spread_over_all_documents(tmp_path: Path) -> None:
    data = load(tmp_path, folder_of(tmp_path / "texts", documents(8, 2000)))
    chosen = validation_windows(data.valid, 3)
    assert chosen.starts.tolist() == [
        data.valid.starts[0],
        data.valid.starts[(len(data.valid) - 1) // 2],
        data.valid.starts[-1],
    ]
    with pytest.raises(ValueError, match=r"eval\.windows=\d+, but the validation documents hold \d+ windows"):
        validation_windows(data.valid, len(data.valid) + 1)


def test_bad_corpora_name_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.txt does not exist"):
        load(tmp_path, tmp_path / "nowhere.txt")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="empty holds no documents; it is empty; give another folder or file"):
        load(tmp_path, empty)
    (empty / "a.txt").write_text("")
    with pytest.raises(ValueError, match=r"holds no documents; left out: 1 empty \(a\.txt\)"):
        load(tmp_path, empty)
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match="no documents with text in them"):
        load(tmp_path, tmp_path / "blank.jsonl")
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"none\.jsonl has no documents with text in them; give another source"):
        load(tmp_path, tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"is one document, none is left for validation; set data\.valid"):
        load(tmp_path, folder_of(tmp_path / "one", documents(1)))
    source = folder_of(tmp_path / "texts", documents(6))
    with pytest.raises(
        ValueError, match=r"none of 5 documents reaches the window's 5000 \+ 1 tokens, the longest has \d+; lower"
    ):
        load(tmp_path, source, length=5000)
    with pytest.raises(ValueError, match="no tokenizer in"):
        load(tmp_path, source, tokenizer=str(empty))
    (tmp_path / "number.jsonl").write_text('{"text": 3}\n{"text": 4}\n')
    with pytest.raises(ValueError, match="a document is a text or a list of messages"):
        load(tmp_path, tmp_path / "number.jsonl")
    (tmp_path / "broken.jsonl").write_text('{"text": \n')
    with pytest.raises(
        ValueError, match=r"broken\.jsonl, row 1 is not readable as JSON: .*; a file holds an object on each line"
    ):
        load(tmp_path, tmp_path / "broken.jsonl")
