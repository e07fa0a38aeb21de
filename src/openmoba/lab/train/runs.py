"""`openmoba runs`: what the runs below some folders are, how far they have come, and what they measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from openmoba.lab.columns import aligned, short
from openmoba.lab.config import RunConfig, from_dict, stored_config, to_dict
from openmoba.lab.data.identity import stored_identity
from openmoba.lab.progress import duration
from openmoba.lab.run_files import CONFIG_FILE, FAILED_FILE, METRICS_FILE, RESULT_FILE
from openmoba.lab.train.history import evaluations, history, read_result
from openmoba.records.disk import Row, read_json

HEADS = ("run", "state", "arm", "size", "tokens", "LM", "trailing", "to first", "tokens/s", "MFU of data sheet", "time")


@dataclass(frozen=True)
class Runs:
    """List the runs below some folders, side by side: state, losses of the last evaluation, speed."""

    folders: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs"),)
    """Folders of runs, of studies, or of many of them, to be listed in this order; left out: runs."""

    def run(self) -> None:
        """Print the table."""
        print(runs_table(self.folders))


def runs_table(folders: tuple[Path, ...]) -> str:
    """Write a line per run.

    "to first" is the trailing loss, or without one the LM loss, minus that of the first run in the table that was
    measured on the same windows; what is different by so much may still lie within the noise.

    Raises:
        ValueError: no runs there, or a folder that is not.
    """
    signs = (METRICS_FILE, FAILED_FILE)  # a run may fail before its first record
    below = ({path.parent for sign in signs for path in folder.rglob(sign)} for folder in folders)
    found = list(dict.fromkeys(run for runs in below for run in sorted(runs)))
    missing = [folder for folder in folders if not folder.exists()]
    if missing or not found:
        raise ValueError(
            f"there are no runs below {', '.join(map(str, missing or folders))}; give a folder that holds some"
        )
    lines, problems = [], []
    first: dict[str, float] = {}
    for folder in found:
        try:
            finished = (folder / RESULT_FILE).exists()
            config, result = read_result(folder) if finished else (_config(folder), {})
            rows = history(folder) if (folder / METRICS_FILE).exists() else []
            measured = evaluations(folder, config, result) if finished else [r for r in rows if r["kind"] == "eval"]
            evaluation = measured[-1] if measured else None
            loss = None if evaluation is None else _loss(evaluation)
            reference = first.setdefault(_windows(folder, config), loss) if loss is not None else None
            against = None if loss is None or reference is None else loss - reference
            lines.append(_line(folder, config, result, rows, evaluation, against))
        except ValueError as error:
            problems.append(f"not listed: {folder}: {error}")
    if not lines:
        raise ValueError("\n".join(problems))
    return "\n".join([aligned(HEADS, lines), *problems])


def _config(folder: Path) -> RunConfig:
    """Read the configuration of an unfinished run, also of one that failed before it kept its own."""
    if (folder / CONFIG_FILE).exists() or not (folder / FAILED_FILE).exists():
        return stored_config(folder)
    return from_dict(RunConfig, read_json(folder / FAILED_FILE).get("config", {}))


def _line(
    folder: Path, config: RunConfig, result: Row, rows: list[Row], evaluation: Row | None, against: float | None
) -> list[str]:
    trained = [row for row in rows if row["kind"] == "train"]
    last: Row = rows[-1] if rows else {"step": 0, "tokens": 0}
    failed = (folder / FAILED_FILE).exists()
    speed = result.get("speed") or (trained[-1] if trained else {})
    return [
        str(folder),
        "finished" if result else "failed" if failed else f"step {last['step']}/{config.train.steps}",
        config.arm.short,
        config.size,
        short(last["tokens"]),
        _number((evaluation or {}).get("lm_loss"), ".4f"),
        _number((evaluation or {}).get("trailing_loss"), ".4f"),
        _number(against, "+.4f"),
        _number(speed.get("tokens_per_second"), ",.0f"),
        _number(speed.get("mfu"), ".0%"),
        duration(trained[-1]["seconds"]) if trained else "-",
    ]


def _loss(evaluation: Row) -> float:
    trailing = evaluation["trailing_loss"]
    return float(evaluation["lm_loss"] if trailing is None else trailing)


def _windows(folder: Path, config: RunConfig) -> str:
    """Return what must be the same in runs that were measured on the same windows and positions."""
    identity = stored_identity(folder)
    data: Any = {name: identity[name] for name in ("valid", "tokenizer") if name in identity}
    data = data or {name: value for name, value in to_dict(config.data).items() if name != "cache"}
    return repr((data, config.data.length, config.eval.windows, config.trailing))


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
