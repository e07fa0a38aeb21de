"""Reading a profile of steps: the share of attention, the time in which no kernel runs, and what takes longest."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch.autograd import DeviceType  # type: ignore[attr-defined]

# Kernels of dense attention by the names that their makers give them; the compiler's own are fused from anything.
_DENSE_KERNEL = re.compile(r"^(?!triton_).*(sdpa|flash|fmha|attention|attn)", re.IGNORECASE)
# Operations, for the CPU: registered ones, and the autograd functions of what goes around the dispatcher.
_OPERATION = re.compile(r"^(openmoba::|Differentiable|aten::(_?scaled_dot_product)|ScaledDotProduct)")

_RUNTIME = re.compile(r"cuda[A-Z]|cu[A-Z][a-z]+[A-Z]")


@dataclass(frozen=True)
class Seen:
    """Where the time of the profiled steps went.

    Attributes:
        busy_ms: time in which a kernel ran, all steps; None on a CPU.
        computing_ms: the part of it in which one ran that was no transfer between GPUs.
        kernel_ms: kernel -> its time, or operation -> its own time on a CPU, longest first, all steps.
        launches: kernel -> how often it ran.
        host_ms: call of the CUDA runtime -> its time on the host, longest first.
        attention_ms: the part of `kernel_ms` that is attention's.
        attention_kernel: the attention kernel that takes most of it.
    """

    busy_ms: float | None
    computing_ms: float | None
    kernel_ms: dict[str, float]
    launches: dict[str, int]
    host_ms: dict[str, float]
    attention_ms: float
    attention_kernel: str | None

    @property
    def attention_share(self) -> float | None:
        """Attention's share of the time of all kernels."""
        total = sum(self.kernel_ms.values())
        return self.attention_ms / total if total else None


def read_profile(profile: Any) -> Seen:
    """Sum up a profile: the GPU's kernels where it has some, else the operations."""
    events = list(profile.events())
    # An annotation has a shadow on the GPU, which spans the kernels in it.
    kernels = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    return _of_kernels(kernels, events) if kernels else _of_operations(events)


def describe(seen: Seen, steps: int, step_ms: float) -> str:
    """List the longest kernels, what they leave idle of a step of `step_ms`, and the longest runtime calls."""
    total = sum(seen.kernel_ms.values())
    lines = [
        f"a step: {step_ms:.2f} ms, {sum(seen.launches.values()) / steps:.0f} kernels of {total / steps:.2f} ms",
    ]
    if seen.busy_ms is not None:
        idle = max(0.0, 1 - seen.busy_ms / steps / step_ms)
        lines[0] += f"; the GPU is busy {seen.busy_ms / steps:.2f} ms and idle {idle:.0%} of the step"
    lines += ["", "     ms  share  count  kernel"]
    shown = list(seen.kernel_ms.items())[:25]
    lines += [
        f"{ms / steps:7.3f} {ms / total:6.1%} {seen.launches[name] / steps:6.0f}  {name[:100]}" for name, ms in shown
    ]
    rest = total - sum(ms for _, ms in shown)
    lines.append(f"{rest / steps:7.3f} {rest / total:6.1%}         others")
    if seen.host_ms:
        lines += ["", "     ms  call of the CUDA runtime, on the host"]
        lines += [f"{ms / steps:7.3f}  {name}" for name, ms in list(seen.host_ms.items())[:8]]
    return "\n".join(lines)


def _of_kernels(kernels: list[Any], events: list[Any]) -> Seen:
    own = own_kernels()
    kernel_ms, launches = _sums((event.name, event.time_range.elapsed_us() / 1000) for event in kernels)
    attention = {name: ms for name, ms in kernel_ms.items() if name in own or _DENSE_KERNEL.search(name)}
    calls = [event for event in events if event.device_type == DeviceType.CPU and _RUNTIME.match(event.name)]
    host_ms, _ = _sums((event.name, event.time_range.elapsed_us() / 1000) for event in calls)
    return Seen(
        busy_ms=_covered_ms(kernels),
        computing_ms=_covered_ms(event for event in kernels if not event.name.startswith("nccl")),
        kernel_ms=kernel_ms,
        launches=launches,
        host_ms=host_ms,
        attention_ms=sum(attention.values()),
        attention_kernel=next(iter(attention), None),
    )


def _of_operations(events: list[Any]) -> Seen:
    kernel_ms, launches = _sums((event.name, event.self_cpu_time_total / 1000) for event in events)
    outermost = [event for event in events if _OPERATION.search(event.name) and not _inside(event)]
    attention_ms, _ = _sums((event.name, event.cpu_time_total / 1000) for event in outermost)
    name = next(iter(attention_ms), None)
    return Seen(None, None, kernel_ms, launches, {}, sum(attention_ms.values()), name)


def _inside(event: Any) -> bool:
    """Tell whether an operation that calls this one is attention."""
    parent = event.cpu_parent
    while parent is not None:
        if _OPERATION.search(parent.name):
            return True
        parent = parent.cpu_parent
    return False


def own_kernels() -> dict[str, str]:
    """List the Triton and Gluon kernels of the imported modules: name in profiles -> module below `triton`."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("openmoba.ops.triton")]
    if not modules:
        return {}
    from triton.runtime import KernelInterface

    functions = [value for module in modules for value in vars(module).values()]
    kernels = [kernel for kernel in functions if isinstance(kernel, KernelInterface)]
    return {_compiled_name(kernel): kernel.fn.__module__.removeprefix("openmoba.ops.triton.") for kernel in kernels}


def _compiled_name(kernel: Any) -> str:
    """Return what the compiler calls a kernel; the interpreter has none, and calls it as Python does."""
    name: str = kernel.repr(None) if hasattr(kernel, "repr") else kernel.__name__
    return name.rpartition(".")[2]


def _sums(pairs: Iterable[tuple[str, float]]) -> tuple[dict[str, float], dict[str, int]]:
    """Return the sum and the count of each name, the largest sum first."""
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for name, value in pairs:
        sums[name] += value
        counts[name] += 1
    return dict(sorted(sums.items(), key=lambda item: -item[1])), dict(counts)


def _covered_ms(events: Iterable[Any]) -> float:
    """Return the time in which any of these ran."""
    covered_us, reached = 0.0, float("-inf")
    for start, end in sorted((event.time_range.start, event.time_range.end) for event in events):
        covered_us += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered_us / 1000
