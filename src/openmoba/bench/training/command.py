"""`openmoba bench training`: time training steps of every case of a grid, one CSV row each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from openmoba.bench.training.cases import GRIDS, TrainingCase
from openmoba.bench.training.table import markdown
from openmoba.limits import check_number


@dataclass(frozen=True)
class Training:
    """Time training, optimizer included, by size, attention and length; the same command goes on where it stopped."""

    grid: str = "headline"
    """"headline" (five models, compiled layers), "eager", "graphed" and "trainer" (the same, eager, with micro-batches
    launched as CUDA graphs, and as `openmoba train` makes steps), "study" (the arms and sizes of recipes/chart-b.toml),
    "sizes", "lengths" or "longest" (the longest window that fits) on a GPU; or "cpu"."""
    only: tuple[str, ...] = ()
    """Only cases with all of these words in their name, such as 14m 4x32K 512/3 qwen3."""
    trace: Path | None = None
    """Write a Chrome trace of three steps of the first case into this file (.json or .json.gz), and print what takes
    longest, instead of timing the grid."""
    step_seconds: float = 20.0
    """longest: no window is tried of which a step would take longer."""
    minutes: float | None = None
    """Begin no further case after this time."""
    out: Path = Path("training.csv")
    """CSV file that rows are added to; what it holds for this commit and device is not measured again."""
    commit: str | None = None
    """Recorded instead of the checkout's, for a copy of its files; by default what git says."""

    def __post_init__(self) -> None:
        check_number("--minutes", self.minutes, 0)
        check_number("--step-seconds", self.step_seconds, 0, low_too=False)

    def run(self) -> None:
        """Measure, and print a table."""
        cases = self._cases()
        from openmoba.bench.machine import Machine, device_for
        from openmoba.bench.training.measure import run_training_benchmark, trace

        machine = Machine(device_for(self.grid), self.commit)
        if self.trace is not None:
            print(trace(cases[0], machine, self.trace))
            return
        rows = run_training_benchmark(cases, self.out, machine, minutes=self.minutes, step_seconds=self.step_seconds)
        print(markdown(rows))

    def _cases(self) -> list[TrainingCase]:
        """List the cases asked for."""
        if self.grid not in GRIDS:
            raise ValueError(f"grid must be one of {', '.join(GRIDS)}, got {self.grid!r}")
        cases = [case for case in GRIDS[self.grid] if set(self.only) <= set(case.words)]
        if not cases:
            names = "\n".join(" ".join(case.words) for case in GRIDS[self.grid])
            raise ValueError(
                f"no case of the grid {self.grid!r} has all words of {' '.join(self.only)}; it has\n{names}"
            )
        if self.trace is not None and not self.trace.name.endswith((".json", ".json.gz")):
            raise ValueError(f"trace must be a .json or .json.gz file, got {self.trace}")
        return cases
