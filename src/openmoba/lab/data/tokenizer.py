"""Tokenizers: bytes, a byte-level BPE trained on a corpus, any of `AutoTokenizer`.

All of them are fast tokenizers of the transformers library, so a model's folder carries its own in
`tokenizer.json` and every tool that reads model folders can use it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from openmoba.hub import check_model_source

END = "<|endoftext|>"

# Roles in plain text: a tokenizer trained here has no special tokens for them.
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def byte_tokenizer() -> Any:
    """Make a tokenizer of 256 bytes and an end-of-text token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return _wrap(Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[])))


def train_bpe(texts: Iterable[str], vocab_size: int) -> Any:
    """Train a byte-level BPE of `vocab_size` entries, the end-of-text token included, on texts read once."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The library takes texts by the 256: pieces of them bound its memory, and keep all cores at work.
    tokenizer.train_from_iterator((piece for text in texts for piece in cut_at_spaces(text)), trainer)
    return _wrap(tokenizer)


def load_tokenizer(name: str | Path) -> Any:
    """Load the tokenizer in a folder or of a hub name, which must be a fast one."""
    from transformers import AutoTokenizer

    check_model_source(name, "bytes, bpe, a folder, or OWNER/NAME on the hub")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name))
    except Exception as error:  # the readers of JSON, of tokenizers and the hub have no common base of errors
        raise ValueError(f"no tokenizer in {name}; use bytes, bpe, a folder or a hub name ({error})") from error
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer of {name} has no tokenizer.json (fast tokenizer), which is needed")
    return tokenizer


def table_size(tokenizer: Any) -> int:
    """Return the rows of a table with one for every token; some tokenizers leave numbers out, and have fewer tokens."""
    return int(max(tokenizer.get_vocab().values())) + 1


def fingerprint(tokenizer: Any) -> str:
    """Hash all that decides what a document's tokens are."""
    parts = [tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token, tokenizer.chat_template]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def encode_texts(tokenizer: Any, texts: list[str]) -> list[np.ndarray]:
    """Yield the tokens of each text, and the end-of-text token where the tokenizer has one; int64.

    The cores share the texts, or pieces of them where the tokenizer makes the same tokens of those.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    cut = cut_at_spaces if _knows_words_by_spaces(backend) else _whole
    pieces = [cut(text) for text in texts]
    encoded = iter(backend.encode_batch_fast([p for parts in pieces for p in parts], add_special_tokens=False))
    return [
        np.concatenate([*(np.asarray(next(encoded).ids, dtype=np.int64) for _ in parts), np.asarray(end, np.int64)])
        for parts in pieces
    ]


def cut_at_spaces(text: str, size: int = 1 << 16) -> list[str]:
    """Yield pieces of `size` characters and those up to the next space or line end after a character that
    is none, where a byte-level tokenizer's words end whatever follows."""
    pieces, start = [], 0
    while found := _WORD_END.search(text, start + max(1, size)):
        pieces.append(text[start : found.start()])
        start = found.start()
    return [*pieces, text[start:]]


_WORD_END = re.compile(r"(?<=\S)[ \n]")


def _whole(text: str) -> list[str]:
    return [text]


def _knows_words_by_spaces(backend: Any) -> bool:
    """Tell whether no token crosses the places where `cut_at_spaces` cuts, or depends on what is there.

    True of GPT-2's byte-level words, as of the tokenizers made here; others, such as those that put a space before
    each text, are not told apart.
    """
    settings = json.loads(backend.to_str())
    words = settings["pre_tokenizer"] or {}
    return (
        settings["normalizer"] is None
        and settings["model"]["type"] == "BPE"
        and not settings["model"]["dropout"]
        and (words.get("type"), words.get("add_prefix_space"), words.get("use_regex")) == ("ByteLevel", False, True)
        and not any(t["lstrip"] or t["rstrip"] or re.search(r"\s", t["content"]) for t in settings["added_tokens"])
    )


def _wrap(tokenizer: Any) -> Any:
    from tokenizers import decoders, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
    wrapped.chat_template = _CHAT_TEMPLATE
    return wrapped
