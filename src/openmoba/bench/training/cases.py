"""What is trained: a model, its attention, a length and a micro-batch; the named grids of such cases; their rows."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from openmoba.bench.rows import CsvRow, length_name
from openmoba.lab.arms import ArmConfig

VOCABULARY = 8192
LAYERS = ("graphed", "compiled", "eager")
KINDS = ("loop", "trainer", "longest")


@dataclass(frozen=True)
class TrainingCase:
    """One model and what it is trained on.

    Attributes:
        size, family: of the model, as in `openmoba.lab.config.ModelConfig`.
        batch: windows of a micro-batch; a step has one.
        block_size, top_k: MoBA's; None for full attention.
        full_layers: of a hybrid, as in `openmoba.MobaConfig`; None: no layer is full, or all are.
        key_conv: width of the convolution of keys; None: none.
        tokens: of a window; of kind "longest", where the search begins.
        layers: "eager", "compiled" (each decoder layer on its own, and the loss), or "graphed" (that, and forward and
            backward of a micro-batch launched as one CUDA graph).
        kind: "loop" (forward, backward, clip and optimizer, nothing else), "trainer" (the steps of
            `openmoba train`), or "longest" (the loop, with ever longer windows until one does not fit).
        checkpointing: whether activations are computed again in the backward pass.
    """

    size: str
    batch: int
    block_size: int | None = None
    top_k: int | None = None
    full_layers: int | str | None = None
    key_conv: int | None = None
    tokens: int = 2**15
    family: str = "llama"
    vocabulary: int = VOCABULARY
    layers: str = "compiled"
    kind: str = "loop"
    checkpointing: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (("layers", self.layers, LAYERS), ("kind", self.kind, KINDS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")

    @property
    def arm(self) -> ArmConfig:
        """The attention."""
        return ArmConfig.of(self.block_size, self.top_k, self.full_layers, self.key_conv)

    @property
    def words(self) -> tuple[str, ...]:
        """The case in words, each of which `--only` takes."""
        stored = ("checkpointing",) if self.checkpointing else ()
        size = f"{self.batch}x{length_name(self.tokens)}"
        return (self.family, self.size, size, *arm_name(self).split(), self.layers, self.kind, *stored)


@dataclass(frozen=True)
class TrainingRow(CsvRow):
    """One case on one machine. An empty cell is None: MoBA's settings for full attention, results of a failure.

    Attributes:
        total, non_embedding: parameters.
        head_dim: width of a head.
        p20_ms, p50_ms, p80_ms: of steps.
        tokens_per_second, tflops: at the median; operations are counted as `causal_exact` of
            `openmoba.lab.measure.compute`, 10^12 a second.
        matrix_tflops: rate of a large matrix product in this run; `mfu` is `tflops` over it, not over the data
            sheet's rate as in the records of runs.
        peak_mb: most memory that tensors took in a step, weights and optimizer included, 10^6 bytes; with graphed steps
            what torch held, which is a little more.
        attention_share: of the time of all kernels, that of attention's; of all operations on a CPU.
        attention_kernel: the attention kernel that takes most of it.
        busy_ms: time in a step in which a kernel runs, from a profile of one step; what `p50_ms` has beyond it, the
            GPU waits.
        first_ms: time of the first step, which compiles.
        graphs: graphs that torch.compile made.
        loss: of the last step, nats per token.
        limit: of kind "longest", why no longer window was found: an error, or "time".
    """

    family: str
    size: str
    batch: int
    block_size: int | None
    top_k: int | None
    full_layers: str | None
    key_conv: int | None
    tokens: int
    vocabulary: int
    layers: str
    kind: str
    checkpointing: bool
    dtype: str
    head_dim: int | None = None
    total: int | None = None
    non_embedding: int | None = None
    tokens_per_second: float | None = None
    tflops: float | None = None
    matrix_tflops: float | None = None
    mfu: float | None = None
    peak_mb: float | None = None
    attention_share: float | None = None
    attention_kernel: str | None = None
    busy_ms: float | None = None
    first_ms: float | None = None
    graphs: int | None = None
    loss: float | None = None
    limit: str | None = None
    transformers: str | None = None

    @classmethod
    def of(cls, case: TrainingCase, dtype: str, **results: Any) -> TrainingRow:
        """Make the row of `case`."""
        return cls(**asdict(case), dtype=dtype, **results)

    @property
    def key(self) -> tuple[Any, ...]:
        tokens = None if self.kind == "longest" else self.tokens
        model = (self.family, self.size, self.vocabulary, self.layers, self.kind, self.checkpointing, self.dtype)
        return (*model, self.batch, tokens, arm_name(self), self.device, self.commit)

    @property
    def arm(self) -> str:
        """Name of the attention in tables and figures."""
        return arm_name(self)


def arm_name(case: TrainingCase | TrainingRow) -> str:
    """Name an arm: `full`, `512/3`, `128/9 last:2 keys`."""
    words = ["full" if case.block_size is None else f"{case.block_size}/{case.top_k}"]
    words += [] if case.full_layers is None else [str(case.full_layers)]
    return " ".join(words + ([] if case.key_conv is None else ["keys"]))


_K = 1024
_ARMS: tuple[tuple[int | None, int | None], ...] = ((None, None), (512, 3), (128, 9))
_MODELS = (
    TrainingCase("14m", 4),
    TrainingCase("14m", 1),
    TrainingCase("32m", 4),
    TrainingCase("545m", 1),
    TrainingCase("14m", 4, family="qwen3"),
)
_LADDER = (("2m", 8), ("5m", 8), ("9m", 4), ("14m", 4), ("17m", 4), ("32m", 4), ("85m", 2), ("545m", 1))
_LENGTHS = (8, 128)


def _arms(*cases: TrainingCase) -> tuple[TrainingCase, ...]:
    return tuple(replace(case, block_size=block, top_k=top_k) for case in cases for block, top_k in _ARMS)


def _study(size: str) -> tuple[TrainingCase, ...]:
    """List the arms of recipes/chart-b.toml, in micro-batches of four windows."""
    case = TrainingCase(size, 4, family="qwen3", vocabulary=4096, layers="graphed")
    hybrid = replace(case, block_size=128, top_k=9, full_layers="last:2", key_conv=4)
    return (case, replace(case, block_size=512, top_k=3), hybrid, replace(case, key_conv=4))


def _longest(size: str, checkpointing: bool) -> tuple[TrainingCase, ...]:
    case = TrainingCase(size, 1, kind="longest", checkpointing=checkpointing)
    return (case, replace(case, block_size=512, top_k=3))


_HEADLINE = _arms(*_MODELS)
GRIDS: dict[str, tuple[TrainingCase, ...]] = {
    "headline": _HEADLINE,
    "eager": tuple(replace(case, layers="eager") for case in _HEADLINE),
    "graphed": tuple(replace(case, layers="graphed") for case in _HEADLINE),
    "trainer": tuple(replace(case, layers="graphed", kind="trainer") for case in _HEADLINE),
    "sizes": _arms(*(TrainingCase(size, batch) for size, batch in _LADDER)),
    "lengths": _arms(
        *(TrainingCase("14m", max(1, 128 // k), tokens=k * _K) for k in _LENGTHS),
        *(TrainingCase("545m", max(1, 32 // k), tokens=k * _K) for k in _LENGTHS),
    ),
    "study": tuple(case for size in ("17m", "9m", "5m", "2m", "32m") for case in _study(size)),
    "longest": tuple(case for on in (False, True) for size in ("14m", "85m", "545m") for case in _longest(size, on)),
    "cpu": tuple(
        replace(case, layers=layers, block_size=block, top_k=top_k)
        for layers in ("compiled", "eager")  # only GPUs have graphs
        for block, top_k in ((None, None), (64, 3))
        for case in (TrainingCase("tiny", 1, tokens=2 * _K),)
    ),
}
"""Name -> cases, the most important first: a run that is cut short has them."""
