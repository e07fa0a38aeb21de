"""Continuing a text with a trained model, and how fast that went."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, TextStreamer

import openmoba.hf  # noqa: F401  registers the attention that a saved model may ask for
from openmoba.lab.data.tokenizer import load_tokenizer
from openmoba.lab.model.build import check_finite, check_positions, model_folder
from openmoba.lab.progress import Progress


@dataclass(frozen=True)
class Speed:
    """What was generated and how long it took.

    Attributes:
        text: the continuation.
        prompt_tokens, new_tokens: counts.
        prefill: seconds until the first new token.
        decode: seconds from the first new token to the last.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill: float
    decode: float

    def __str__(self) -> str:
        rate = "" if self.new_tokens < 2 else f", {(self.new_tokens - 1) / self.decode:.1f} tokens/s"
        return (
            f"prompt {self.prompt_tokens} tokens in {self.prefill:.2f} s; "
            f"{self.new_tokens} new tokens in {self.prefill + self.decode:.2f} s{rate}"
        )


def generate_text(
    source: str | Path,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    prefill_chunk: int | None = None,
    progress: Progress | None = None,
) -> Speed:
    """Stream a continuation of `prompt` to standard output.

    Args:
        source: a run's folder (its newest checkpoint), a model's folder, or a model of the hub.
        temperature: 0 takes the likeliest token, more samples.
        prefill_chunk: tokens of the prompt per forward pass; None takes it whole.

    Raises:
        ValueError: no readable model, a prompt without tokens, or more tokens than the model has positions for.
    """
    with model_folder(source, progress) as folder:
        tokenizer = load_tokenizer(folder)
        inputs = tokenizer(prompt, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        if length == 0:
            raise ValueError("the prompt has no tokens; give some text to continue")
        check_positions(folder, length + max_new_tokens - 1, progress)  # the last token is not read any more
        model = _load(folder)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    streamer = _Stopwatch(tokenizer, skip_prompt=True, skip_special_tokens=True)
    torch.manual_seed(seed)
    tokens = model.generate(
        **inputs.to(model.device),
        **sampling,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        streamer=streamer,
        prefill_chunk_size=prefill_chunk,
        pad_token_id=tokenizer.pad_token_id,
    )
    new = tokens[0, length:]
    text = str(tokenizer.decode(new, skip_special_tokens=True))
    return Speed(text, length, len(new), streamer.times[1] - streamer.times[0], streamer.times[-1] - streamer.times[1])


class _Stopwatch(TextStreamer):  # type: ignore[misc]
    """A streamer that notes when the prompt and each token arrived."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())
        super().put(value)


def _load(folder: str | Path) -> Any:
    try:
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto", use_safetensors=True)
    except Exception as error:  # the readers of JSON, safetensors and the hub have no common base of errors
        raise ValueError(f"{folder} holds no readable model with safetensors weights ({error})") from error
    check_finite(model, folder)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """Read the prompt as given, from a file, or from standard input.

    Raises:
        ValueError: both are given, or the file is not text.
        OSError: there is no such file, or it is not readable.
    """
    if prompt is not None and file is not None:
        raise ValueError("give a prompt or a file with one, not both")
    if prompt is not None:
        return prompt
    if file is None:
        return sys.stdin.read()
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8 ({error}); convert it, or give another file") from error
