"""One word, one meaning: the words at the end of docs/kernels.md, as the code of the operation uses them.

What a name stands for only a reader can tell. Checked here is what names show by themselves: that every word of the
list is in use, and that the words that once meant several things are told apart.
"""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OPS = ROOT / "src/openmoba/ops"
FILES = {path.relative_to(OPS).as_posix(): path.read_text() for path in sorted(OPS.rglob("*.py"))}

CACHES = {"centroids.py", "decode.py", "pages.py", "raw_keys.py", "reference.py", "triton/raw_keys.py"}
SORTING = {f"triton/{name}.py" for name in ("route", "gate", "ranking", "given", "plan", "attention")}
ATTENTIONS = {"key_begin", "key_partial_bytes"}
"""Names in files that sort, of the keys that attention reads."""


def words() -> list[str]:
    """The words of the list, each as it is written there."""
    page = (ROOT / "docs/kernels.md").read_text()
    table = page.partition("## Words")[2]
    first = [line.split("|")[1] for line in table.splitlines() if line.startswith("| *")]
    return [word for cell in first for word in re.findall(r"\*([\w ]+)\*", cell)]


def names(text: str) -> set[str]:
    """The identifiers of a file."""
    return {
        token.string for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type == tokenize.NAME
    }


def parts(name: str) -> list[str]:
    """The words in an identifier: `_MOST_PAIRS` and `MostPairs` have two."""
    return [part.lower() for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]


def having(word: str, found: Iterable[str]) -> set[str]:
    """Those identifiers that have a word in them, or its plural."""
    return {name for name in found if {word, f"{word}s"} & set(parts(name))}


def slots_without_a_kind(text: str) -> list[str]:
    """Slots, in names and in prose, that are not said to be of tiles or blocks."""
    return re.findall(
        r"\b(?<!tile )(?<!block )\w*(?<!tile_)(?<!block_)\bslots?\b|\b(?!\w*(?:tile|block)_slots?)\w*_slots?\w*", text
    )


def test_words_are_found() -> None:
    found = words()
    assert {"row", "own block", "past", "block slot", "fixed launch", "tape"} <= set(found)
    assert len(found) == len(set(found)) > 25
    assert having("plan", {"_write_plan", "Plan", "plans", "Explanation", "planned"}) == {
        "_write_plan",
        "Plan",
        "plans",
    }


@pytest.mark.parametrize("word", words())
def test_every_word_is_in_use(word: str) -> None:
    text = "\n".join(text for name, text in FILES.items() if name.startswith("triton/"))
    assert re.search(rf"(?i)\b_?(\w+_)?{re.sub(' ', '[ _]', word)}(s|d|_\w+)?\b", text), word


def test_slots_are_of_tiles_of_blocks_or_of_caches() -> None:
    assert slots_without_a_kind("locate(tile_slot); first_block_slot_M  # a block slot, tile slots") == []
    assert slots_without_a_kind("locate(slot, own_slot)  # an empty slot") == ["slot", "own_slot", "slot"]
    for name in FILES.keys() - CACHES:
        assert slots_without_a_kind(FILES[name]) == [], name


def test_integers_to_sort_by_are_sort_keys() -> None:
    for name in SORTING:
        found = having("key", names(FILES[name])) - ATTENTIONS
        assert {one for one in found if "sort_key" not in one.lower()} == set(), name
    assert having("key", names(FILES["triton/plan.py"])) >= {"sort_keys", "key_begin"}


def test_what_a_program_of_decoding_attends_to_is_a_portion() -> None:
    """Shares are of dQ, and pages are a block table's: in kernels of decoding both were blocks once."""
    for name in ("triton/decode.py", "triton/decode_kernels.py"):
        assert having("portion", names(FILES[name]))
        assert having("share", names(FILES[name])) == set(), name
    of_tables = {"PAGES", "first_page", "page", "page_N", "page_P", "page_of", "k_page", "v_page"}
    assert having("page", names(FILES["triton/decode_kernels.py"])) == of_tables


def test_plans_are_of_lists() -> None:
    holders = {name for name, text in FILES.items() if having("plan", names(text))}
    assert "triton/plan.py" in holders
    assert {name for name in holders if not name.startswith("triton/")} == set()


def test_rows_of_a_key_value_head_are_not_its_query_tokens() -> None:
    """`rows` once were tokens on the host, and tokens in all heads of a group on the device."""
    pytest.importorskip("triton")
    from openmoba.ops.triton.arguments import Call
    from openmoba.ops.triton.geometry import Geometry, Heads

    geometry = Geometry(False, 2, 5, 7, Heads(6, 2, 8), 4, 3)
    assert (geometry.query_tokens, geometry.rows) == (2 * 5, 2 * 5 * 3)
    assert Call.of(geometry).rows == geometry.rows
