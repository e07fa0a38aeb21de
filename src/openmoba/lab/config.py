"""What a run is: data, model, arm, training, evaluation.

These dataclasses are the only source of defaults and of the command line's help. `to_dict` and `from_dict`
are their JSON form, as stored in a run's `config.json` and written in recipes; unknown keys are an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from openmoba.lab.arms import ArmConfig
from openmoba.lab.run_files import CONFIG_FILE, is_run
from openmoba.limits import check_count, check_number, check_share
from openmoba.records.disk import read_json

T = TypeVar("T")

_hints: Callable[[Any], dict[str, Any]] = cache(get_type_hints)  # annotations are text, slow to evaluate


@dataclass(frozen=True)
class DataConfig:
    """Documents, tokenizer, and the windows cut from them."""

    source: str = "stdlib"
    """Training documents: "stdlib" (the running Python's own source files); a file of text, JSON, CSV, Parquet or
    Arrow, compressed or not; a folder of such files, of source code, or saved by `datasets`; a pattern such as
    "books/*.txt"; or a data set on the hub as NAME[@CONFIG][:SPLIT]."""
    valid: str | None = None
    """Validation documents, in the same forms; left out: whole documents are held out of `source`."""
    hold_out: int = 20
    """Without `valid`: one of every this many documents is held out."""
    column: str = "text"
    """Column of the text, where files have columns; a column of message lists is chat data."""
    tokenizer: str = "auto"
    """"bytes", "bpe" (trained on the training documents), a folder or hub name for AutoTokenizer, or "auto":
    the tokenizer of `train.start_from`, else "bpe"."""
    vocab_size: int = 2048
    """Entries of a trained BPE tokenizer."""
    length: int = 1024
    """Tokens per window, the model's context. Windows never cross a document's end."""
    cache: str = ".data"
    """Folder that keeps tokenised corpora."""

    def __post_init__(self) -> None:
        _at_least(self, hold_out=2, vocab_size=257, length=2)


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of the transformers library, built from its configuration."""

    family: str = "llama"
    """transformers `model_type`: llama, qwen3, mistral ..."""
    size: str = "tiny"
    """Preset of width and depth (`openmoba.lab.model.build.SIZES`). With heads of 32, for CPUs: nano, micro, tiny,
    mini, small. With heads of 64: base, medium, large, and by millions of parameters without embeddings 2m, 5m, 9m,
    14m, 15m (12 layers), 17m, 32m, 85m; grouped-query 13m-gqa, 75m-gqa. With heads of 128: 32m-d128, 85m-d128, and
    those of arXiv 2502.13189: 545m, 822m, 1.1b, 1.5b, 2.1b."""
    overrides: dict[str, bool | int | float | str | None] = field(default_factory=dict)
    """Entries of the transformers configuration that replace the preset's, e.g. num_key_value_heads 2, or
    sliding_window None, which mistral needs; a dot leads into a table: rope_parameters.rope_theta 1e6."""


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation: AdamW, warm-up, and a cosine or warm-up-stable-decay schedule."""

    steps: int = 200
    """Optimizer steps."""
    batch_size: int = 4
    """Windows per optimizer step, over all devices."""
    micro_batch_size: int | None = None
    """Windows per forward pass of one device; left out: all of the device's share. Less saves memory."""
    learning_rate: float = 2e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """Shape after warm-up: cosine, or stable and then a linear decay (wsd)."""
    warmup: float = 0.05
    """Share of the steps spent on linear warm-up."""
    decay: float = 0.2
    """wsd: share of the steps spent on the decay at the end."""
    final_learning_rate: float = 0.1
    """Learning rate at the end, as a share of the peak."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and embeddings."""
    beta1: float = 0.9
    """AdamW's first moment."""
    beta2: float = 0.95
    """AdamW's second moment."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    loss_tokens: int | None = None
    """Fine-tuning with a loss mask: only this many last positions of each window carry loss, what comes
    before is prompt. Left out: all positions (of chat data: the assistant's tokens)."""
    start_from: str | None = None
    """A run's folder, a model's folder or a hub name: its weights and tokenizer are the start."""
    seed: int = 0
    """Seed of the initial weights and of the order of the windows, the same in all arms."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 autocast or fp32; auto: bf16 on a GPU, fp32 on the CPU."""
    compile: Literal["auto", "layers", "off"] = "auto"
    """Compile the decoder layer by layer: "layers" or "off"; "auto": layers on a GPU, and each micro-batch launched as
    one CUDA graph where that can be."""
    log_every: int = 10
    """Steps between training records."""
    checkpoint_every: int = 100
    """Steps between checkpoints; a multiple of `log_every`."""
    gradient_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass: less memory, a third more compute."""
    fsdp: bool = False
    """Shard parameters, gradients and optimizer state over the processes of torchrun (FSDP2)."""
    context_parallel: int = 1
    """Processes of torchrun that share every window, each with a part of its tokens; with `fsdp` on GPUs. A run may go
    on with another number."""
    tensorboard: bool = False
    """Also write TensorBoard logs into the run's folder."""

    def __post_init__(self) -> None:
        _at_least(self, steps=1, batch_size=1, micro_batch_size=1, loss_tokens=1, log_every=1, checkpoint_every=1)
        _at_least(self, context_parallel=1)
        for name in ("warmup", "decay", "final_learning_rate"):
            check_share(f"train.{name}", getattr(self, name))
        for name in ("beta1", "beta2"):
            check_share(f"train.{name}", getattr(self, name), one_too=False)
        for name in ("learning_rate", "clip"):
            check_number(f"train.{name}", getattr(self, name), 0, low_too=False)
        if self.schedule == "wsd" and self.warmup + self.decay > 1 + 1e-9:  # shares are seldom exact
            raise ValueError(
                f"train.warmup={self.warmup} and train.decay={self.decay} are shares of the same steps, and more than "
                "all of them together; lower one"
            )
        check_number("train.weight_decay", self.weight_decay, 0)
        check_count("train.seed", self.seed, 0, 2**32 - 1)


@dataclass(frozen=True)
class EvalConfig:
    """Validation windows and what is measured on them."""

    windows: int = 32
    """Validation windows, evenly spread over the validation documents."""
    every: int | None = None
    """Steps between evaluations; left out: once, at the end."""
    count: int | None = None
    """Instead of `every`: number of evaluations, from the first step to the last, evenly spaced in the logarithm of
    the step, so in that of compute."""
    trailing: int | None = None
    """Last positions of a full window that make the trailing loss; left out: 2048, at most length // 8."""
    position_range: int | None = None
    """Positions per range of the position-wise loss; left out: 2048, at most length // 8."""
    contexts: tuple[int, ...] = ()
    """Last tokens of a full window, such as 2048 8192: at the end, the trailing loss is measured with these alone, too,
    which tells what the tokens before them are good for. Left out: not measured."""
    batch_size: int = 4
    """Windows per forward pass."""

    def __post_init__(self) -> None:
        _at_least(self, windows=1, every=1, count=1, trailing=1, position_range=1, batch_size=1)
        if list(self.contexts) != sorted(set(self.contexts)):
            raise ValueError(f"eval.contexts must rise, got {list(self.contexts)}")


@dataclass(frozen=True)
class RunConfig:
    """One training run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    arm: ArmConfig = field(default_factory=ArmConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def check(self) -> None:
        """Raise ValueError unless the settings fit each other.

        Not done on construction: options are first read on top of the defaults, then on top of a stored run.
        """
        if self.train.checkpoint_every % self.train.log_every:
            raise ValueError(
                f"train.checkpoint_every={self.train.checkpoint_every} must be a multiple of train.log_every="
                f"{self.train.log_every}, so that a resumed run continues with the same records"
            )
        if self.eval.every is not None and self.eval.count is not None:
            raise ValueError(
                f"eval.every={self.eval.every} and eval.count={self.eval.count} exclude each other; leave one out"
            )
        if (self.eval.count or 1) > self.train.steps:
            raise ValueError(f"eval.count={self.eval.count} is more than train.steps={self.train.steps}; lower it")
        for name, value in (
            ("eval.trailing", self.eval.trailing),
            ("eval.position_range", self.eval.position_range),
            ("train.loss_tokens", self.train.loss_tokens),
        ):
            if value is not None and value > self.data.length:
                raise ValueError(f"{name}={value} is more than a window of data.length={self.data.length} tokens")
        outside = [context for context in self.eval.contexts if not self.trailing <= context < self.data.length]
        if outside:
            raise ValueError(
                f"eval.contexts={outside}: a context holds the {self.trailing} trailing tokens (eval.trailing) and is "
                f"shorter than a window of data.length={self.data.length} tokens"
            )

    @property
    def size(self) -> str:
        """Name of the model's size; of a model to start from that is no run's, the name of its folder."""
        start = self.train.start_from
        return self.model.size if start is None or is_run(start) else Path(start).name

    @property
    def model_words(self) -> str:
        """The model in words."""
        start = self.train.start_from
        built = start is None or is_run(start)
        return f"{self.model.family} {self.model.size}" if built else f"that of {start}"

    @property
    def trailing(self) -> int:
        """Positions of the trailing loss."""
        return self.eval.trailing or default_range(self.data.length)

    @property
    def position_range(self) -> int:
        """Positions per range of the position-wise loss."""
        return self.eval.position_range or default_range(self.data.length)

    @property
    def evaluation_steps(self) -> tuple[int, ...]:
        """The steps after which the model is evaluated, the last among them."""
        steps = self.train.steps
        if self.eval.count is None:
            return (*range(every := self.eval.every or steps, steps, every), steps)
        return spaced_steps(steps, self.eval.count)

    @property
    def tokens(self) -> int:
        """Training tokens."""
        return self.train.steps * self.train.batch_size * self.data.length


def spaced_steps(steps: int, count: int) -> tuple[int, ...]:
    """Return `count` of `steps`, first and last among them, evenly spaced in their logarithm, all different.

    Where rounding would make two the same, as near the first step, the next free one is taken.
    """
    found = [steps] if count == 1 else [1]
    for number in range(1, count):
        found.append(max(found[-1] + 1, round(steps ** (number / (count - 1)))))
    return tuple(found)


def default_range(length: int) -> int:
    """Return 2048 positions as in arXiv 2502.13189, an eighth of windows shorter than 16K."""
    return max(1, min(2048, length // 8))


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration ready for JSON; `from_dict` reads it."""
    return {
        f.name: to_dict(value) if dataclasses.is_dataclass(value) else _plain(value)
        for f in dataclasses.fields(config)
        for value in (getattr(config, f.name),)
    }


def stored_config(folder: str | Path) -> RunConfig:
    """Read the configuration of the run in `folder`; ValueError if its config.json is missing, damaged or a model's."""
    values = read_json(Path(folder) / CONFIG_FILE)
    if "model_type" in values:
        raise ValueError(f"{folder} holds a model, not a run; use another folder, with train.start_from={folder}")
    return from_dict(RunConfig, values)


_FREE = (("data", "cache"), ("train", "context_parallel"))


def changes(stored: RunConfig, wanted: RunConfig) -> list[str]:
    """Say what makes `wanted` another run than `stored`: "train.steps was 100 and is 200".

    Configurations are compared, not files: a setting that is newer than a stored file has its default there, and the
    default of a new setting must be what runs did before it. Where the cache lies and how many processes share a
    window change no run.
    """
    before, now = to_dict(stored), to_dict(wanted)
    return [
        f"{section}.{key} was {before[section][key]!r} and is {value!r}"
        for section, values in now.items()
        for key, value in values.items()
        if (section, key) not in _FREE and before[section][key] != value
    ]


def from_dict(kind: type[T], values: dict[str, Any], where: str = "") -> T:
    """Build the dataclass `kind` from plain values; left-out keys take their defaults.

    Raises:
        ValueError: unknown key or value of a wrong type, with its dotted name and what is allowed.
    """
    hints = _hints(kind)
    if not isinstance(values, dict):
        raise ValueError(f"{where or kind.__name__} must be a table with keys {', '.join(hints)}, got {values!r}")
    unknown = sorted(set(values) - set(hints))
    if unknown:
        name = f"{where}.{unknown[0]}" if where else unknown[0]
        raise ValueError(f"unknown key {name!r}; the keys of {where or kind.__name__} are {', '.join(hints)}")
    return kind(**{key: _read(hints[key], value, f"{where}.{key}".strip(".")) for key, value in values.items()})


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, dict) else value


def _read(hint: Any, value: Any, where: str) -> Any:
    """Read `value` as `hint` asks; a ValueError names `where`."""
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)  # type: ignore[arg-type]
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for option in options:
        kind = get_origin(option) or option
        if kind is Literal and value in get_args(option):
            return value
        if kind is tuple and isinstance(value, list | tuple):
            return tuple(_read(get_args(option)[0], item, where) for item in value)
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if kind is dict and isinstance(value, dict):
            items = _dotted(value, where).items()
            return {key: _read(get_args(option)[1], item, f"{where}.{key}") for key, item in items}
        if kind in (int, str, bool, NoneType) and type(value) is kind:
            return value
    allowed = " or ".join(_name(option) for option in options)
    raise ValueError(f"{where} must be {allowed}, got {value!r}")


def _dotted(table: dict[str, Any], where: str) -> dict[str, Any]:
    """Turn `{"a": {"b": 1}}` into `{"a.b": 1}`: entries of tables by one name, as on the command line."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        inner = _dotted(value, f"{where}.{key}") if isinstance(value, dict) else None
        names = {key: value} if inner is None else {f"{key}.{name}": item for name, item in inner.items()}
        if twice := flat.keys() & names.keys():
            raise ValueError(f"{where}.{min(twice)} is set twice; leave one out")
        flat |= names
    return flat


def _name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(repr(choice) for choice in get_args(hint))
    kind = get_origin(hint) or hint
    return {NoneType: "none", tuple: "a list", dict: "a table"}.get(kind, getattr(kind, "__name__", str(kind)))


def _at_least(config: Any, **limits: int) -> None:
    section = type(config).__name__.removesuffix("Config").lower()
    for name, limit in limits.items():
        check_count(f"{section}.{name}", getattr(config, name), limit)
