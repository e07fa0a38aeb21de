"""A recipe: the TOML file that says which runs make up a study.

```toml
title = "Hybrids on novels"
question = "How many full layers does it take?"   # what the study answers, for its report; may be left out

[run]                                     # tables of RunConfig, for every run
data = { source = "novels.parquet", length = 8192 }
arm = { block_size = 512, top_k = 3 }

[sizes.small]                             # tables of RunConfig, for the runs of one size
model = { size = "small" }
train = { steps = 4000 }

[arms.full]                               # ArmConfig, on top of [run.arm]
name = "full"
[arms.moba]
name = "moba"
[arms.last-3]
name = "hybrid"
full_layers = 3

[[stages]]
name = "pretrain"
sizes = ["small"]
arms = ["full", "moba"]
seeds = [0, 1]
chart = "scaling"                         # also "layers", "compare"; loss by position is always drawn

[[stages]]
name = "finetune"
sizes = ["small"]
arms = ["full", "moba", "last-3"]
seeds = [0]
more_seeds = { full = [1], moba = [1] }   # of some arms or sizes
chart = "layers"
after = "pretrain"                        # each arm goes on from its own run of that stage, and
branch = "moba"                           # an arm that the stage does not have branches from this one
run = { train = { steps = 400, loss_tokens = 1024 } }

[[stages]]
name = "hybrids"
sizes = ["small"]
arms = ["last-3"]
seeds = [0, 1]
chart = "layers"
beside = "pretrain"                       # compared with that stage's runs, which differ in nothing but the arm,
beside_arms = ["full", "moba"]            # with these of its arms; left out: all
```

A stage trains sizes x arms x seeds. What is more special wins: [run], then the size, the stage, the arm.
"""

from __future__ import annotations

import fnmatch
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any, Literal

from openmoba.lab.arms import KINDS
from openmoba.lab.config import RunConfig, changes, from_dict
from openmoba.lab.model.build import SIZES
from openmoba.lab.run_files import RECIPE_FILE

Table = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """One block of runs, see the module's example."""

    name: str
    sizes: tuple[str, ...]
    arms: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    more_seeds: dict[str, tuple[int, ...]] = field(default_factory=dict)
    chart: Literal["scaling", "layers", "compare", "positions"] = "positions"
    after: str | None = None
    branch: str | None = None
    beside: str | None = None
    beside_arms: tuple[str, ...] = ()

    def seeds_of(self, size: str, arm: str) -> tuple[int, ...]:
        """Return the seeds of one arm at one size."""
        return self.seeds + tuple(seed for key in (size, arm) for seed in self.more_seeds.get(key, ()))


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study.

    Attributes:
        name: its folder below the study's.
        after: the run it starts from.
        sweep: whether its stage trains one arm at several learning rates, and nothing else changes.
    """

    name: str
    stage: Stage
    size: str
    arm: str
    seed: int
    after: str | None
    tables: Table = field(repr=False)
    sweep: bool = False

    def config(self, study: Path) -> RunConfig:
        """Return the run's configuration in the study folder `study`."""
        start = {"start_from": str(study / self.after)} if self.after else {}
        return from_dict(RunConfig, _merge(self.tables, {"train": {"seed": self.seed, **start}}))

    def changed_from(self, stored: RunConfig, study: Path) -> list[str]:
        """Say what differs between the configuration `stored` of a run in the folder `study` and this one's."""
        wanted = self.config(study)
        # The study may move as a whole.
        if self.after is not None and str(stored.train.start_from).endswith(self.after):
            stored = replace(stored, train=replace(stored.train, start_from=wanted.train.start_from))
        return changes(stored, wanted)

    def alone(self) -> RunConfig:
        """Return its configuration without the run that it starts from, which has the same model."""
        config = self.config(Path())
        return replace(config, train=replace(config.train, start_from=None)) if self.after else config


@dataclass(frozen=True)
class Recipe:
    """A checked recipe and all its runs, dependencies first."""

    title: str
    question: str
    text: str
    stages: tuple[Stage, ...]
    runs: tuple[PlannedRun, ...]

    def chosen(self, patterns: Sequence[str]) -> Recipe:
        """Return this recipe with the runs whose names match one of the patterns, and those that they start from.

        Raises:
            ValueError: no pattern, as when a shell has left none, or one that matches no run.
        """
        names = [run.name for run in self.runs]
        if not patterns:
            raise ValueError(f"no pattern to choose runs by; leave --runs out for all, or choose of {', '.join(names)}")
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                raise ValueError(f"no run matches {pattern!r}; the runs are {', '.join(names)}")
        wanted = {name for pattern in patterns for name in fnmatch.filter(names, pattern)}
        for run in reversed(self.runs):  # dependencies come first
            if run.name in wanted and run.after is not None:
                wanted.add(run.after)
        return replace(self, runs=tuple(run for run in self.runs if run.name in wanted))


def read_recipe(path: Path, source: str | None = None) -> Recipe:
    """Read and check a recipe.

    Args:
        source: documents to use instead of the recipe's `run.data.source`.

    Raises:
        ValueError: not TOML, an unknown key, size, arm or stage, or a configuration that no run can have. The
            message names what was found and what is allowed.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return parse_recipe(text, title=path.stem, source=source)
    except FileNotFoundError:
        raise ValueError(f"there is no recipe {path}; recipes/demo.toml is one to start from") from None
    except OSError as error:
        raise ValueError(f"{path} is not readable as a recipe ({error.strerror}); give a TOML file") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def recipe_of(study: Path) -> Recipe:
    """Read the recipe in the folder of a study; ValueError for any other folder."""
    if not (study / RECIPE_FILE).exists():
        raise ValueError(
            f"{study} is not the folder of a study: it has no {RECIPE_FILE}; give the folder that `openmoba study` "
            "has written, its --out"
        )
    return read_recipe(study / RECIPE_FILE)


def parse_recipe(text: str, *, title: str, source: str | None = None) -> Recipe:
    """Read a recipe's text as `read_recipe` does; `title` is the default of its title."""
    tables = tomllib.loads(text)
    if source is not None:
        tables = _merge(tables, {"run": {"data": {"source": source}}})
    _check_names("the recipe", tables, ("title", "question", "run", "sizes", "arms", "stages"))
    title, question = (tables.get(key, default) for key, default in (("title", title), ("question", "")))
    for key, value in (("title", title), ("question", question)):
        if not isinstance(value, str):
            raise ValueError(f"{key} must be a text, got {value!r}")
    for key in ("sizes", "arms", "stages"):
        if not tables.get(key):
            raise ValueError(f"the recipe has no {key}; openmoba.lab.study.recipe shows an example")
    _check_shape(tables)
    stages: dict[str, Stage] = {}
    runs: dict[str, PlannedRun] = {}
    for table in tables["stages"]:
        stage = from_dict(Stage, {key: value for key, value in table.items() if key != "run"}, "stages")
        _check_stage(stage, stages, tables)
        stages[stage.name] = stage
        for run in _stage_runs(stage, stages, tables, table.get("run", {})):
            runs[run.name] = run
            _check_config(run, runs)
            _check_beside(run, runs)
    return Recipe(title, question, text, tuple(stages.values()), tuple(runs.values()))


def _stage_runs(stage: Stage, stages: dict[str, Stage], tables: Table, special: Table) -> list[PlannedRun]:
    runs = []
    for size in stage.sizes:
        for arm in stage.arms:
            merged = tables.get("run", {})
            for layer in (tables["sizes"][size], special, {"arm": tables["arms"][arm]}):
                merged = _merge(merged, layer)
            for seed in stage.seeds_of(size, arm):
                after = None
                if stage.after is not None:
                    earlier = arm if arm in stages[stage.after].arms else stage.branch
                    after = _run_name(stage.after, size, str(earlier), seed)
                name = _run_name(stage.name, size, arm, seed)
                runs.append(PlannedRun(name, stage, size, arm, seed, after, merged))
    return [replace(run, sweep=True) for run in runs] if _is_sweep(runs) else runs


def _is_sweep(runs: Sequence[PlannedRun]) -> bool:
    """Tell whether two sizes of a single arm differ in nothing but their learning rates."""
    sizes = {run.size: _flat(run.tables) for run in runs}.values()
    same_rate = {"train.learning_rate": None}
    alike = (one != other and one | same_rate == other | same_rate for one, other in combinations(sizes, 2))
    return len({run.arm for run in runs}) == 1 and any(alike)


def _run_name(stage: str, size: str, arm: str, seed: int) -> str:
    return f"{stage}/{size}-{arm}-seed{seed}"


def _check_shape(tables: Table) -> None:
    """Raise ValueError unless tables are where tables are read, and arms and stages have names."""
    groups = {"sizes": tables["sizes"], "arms": tables["arms"], "run": tables.get("run", {})}
    for key, value in groups.items():
        if not isinstance(value, dict):
            raise ValueError(f"{key} must be a table, [{key}], got {value!r}")
        for name, entry in value.items():
            if not isinstance(entry, dict):
                raise ValueError(f"{key}.{name} must be a table of options, got {entry!r}")
    for name, arm in tables["arms"].items():
        if "name" not in arm:
            raise ValueError(f"arms.{name} does not say its kind; set name to one of {', '.join(KINDS)}")
    if not isinstance(tables["stages"], list):
        raise ValueError(f"stages must be tables in double brackets, [[stages]], got {tables['stages']!r}")
    for key in ("sizes", "arms"):
        for name in tables[key]:
            _check_name(f"{key}.{name}", name)
    for stage in tables["stages"]:
        if not isinstance(stage, dict) or "name" not in stage or not isinstance(stage.get("run", {}), dict):
            raise ValueError(f"a stage must be a table with a name, and its run a table, got {stage!r}")


def _check_stage(stage: Stage, earlier: dict[str, Stage], tables: Table) -> None:
    where = f"stage {stage.name!r}"
    _check_name(where, stage.name)
    if stage.name in earlier:
        raise ValueError(f"two stages are called {stage.name!r}; give each its own name")
    _check_names(f"{where}: sizes", stage.sizes, tables["sizes"])
    _check_names(f"{where}: arms", stage.arms, tables["arms"])
    for key in ("sizes", "arms", "seeds"):
        values = getattr(stage, key)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{where}: {key} must be a list of at least one, without repetitions, got {list(values)}")
    _check_names(f"{where}: more_seeds", stage.more_seeds, [*stage.sizes, *stage.arms])
    for size, arm in product(stage.sizes, stage.arms):
        seeds = stage.seeds_of(size, arm)
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{where}: seeds and more_seeds give {arm} of size {size} a seed twice, {list(seeds)}")
    if stage.beside is not None:
        _check_names(f"{where}: beside", [stage.beside], earlier)
        _check_names(f"{where}: sizes, those of stage {stage.beside!r}", stage.sizes, earlier[stage.beside].sizes)
        _check_names(f"{where}: beside_arms", stage.beside_arms, earlier[stage.beside].arms)
    if stage.after is not None:
        _check_names(f"{where}: after", [stage.after], earlier)
        _check_origins(stage, earlier[stage.after], where)


def _check_origins(stage: Stage, start: Stage, where: str) -> None:
    """Raise ValueError unless every run of `stage` has one in `start` to go on from."""
    missing = [size for size in stage.sizes if size not in start.sizes]
    if missing:
        raise ValueError(f"{where}: stage {start.name!r}, which it goes on from, lacks the sizes {missing}")
    new_arms = [arm for arm in stage.arms if arm not in start.arms]
    if new_arms and stage.branch not in start.arms:
        raise ValueError(
            f"{where}: the arms {', '.join(new_arms)} are not in stage {start.name!r}; set branch to the arm "
            f"they branch from ({', '.join(start.arms)}), got {stage.branch!r}"
        )
    for size, arm in product(stage.sizes, stage.arms):
        origin = arm if arm in start.arms else str(stage.branch)
        lacking = [seed for seed in stage.seeds_of(size, arm) if seed not in start.seeds_of(size, origin)]
        if lacking:
            raise ValueError(
                f"{where}: {arm} of size {size} goes on from {origin} of stage {start.name!r}, which lacks the seeds "
                f"{lacking}"
            )


def _check_beside(run: PlannedRun, runs: dict[str, PlannedRun]) -> None:
    """Raise ValueError if the runs that this one is compared with differ from it in more than arm and seed."""
    for other in runs.values():
        if other.stage.name == run.stage.beside and other.size == run.size:
            own, theirs = (_flat({**one.tables, "arm": {}}) for one in (run, other))
            keys = [key for key in sorted(own.keys() | theirs.keys()) if own.get(key) != theirs.get(key)]
            if keys or (run.after is None) != (other.after is None):
                raise ValueError(
                    f"run {run.name} cannot be compared with {other.name}, beside which its stage stands: they differ "
                    f"in {', '.join(keys) or 'what they go on from'}; give both stages the same settings"
                )


def _check_config(run: PlannedRun, runs: dict[str, PlannedRun]) -> None:
    try:
        config = run.config(Path())
        config.check()
        if config.model.size not in SIZES:
            raise ValueError(f"unknown model.size {config.model.size!r}; the sizes are {', '.join(SIZES)}")
        attention, layers = config.arm.sparsest(config.train.steps), _layers(run, runs)
        if attention is not None and layers is not None:
            attention.full_layer_indices(layers)
    except ValueError as error:
        raise ValueError(f"run {run.name}: {error}") from error


def _layers(run: PlannedRun, runs: dict[str, PlannedRun]) -> int | None:
    """Count the layers of the run's model; None if it comes from outside the study."""
    if run.after is not None:
        return _layers(runs[run.after], runs)
    config = run.config(Path())
    layers = config.model.overrides.get("num_hidden_layers", SIZES[config.model.size].layers)
    return layers if isinstance(layers, int) and config.train.start_from is None else None


def _check_name(where: str, name: str) -> None:
    """Raise ValueError unless `name` can be a part of a run's folder, inside the study's."""
    if not re.fullmatch(r"[\w+=-][\w.+=-]*", name):
        raise ValueError(
            f"{where} is a part of a folder's name, so it takes letters, digits and _ - + = ., not {name!r}; rename it"
        )


def _check_names(where: str, names: Any, allowed: Any) -> None:
    unknown = [name for name in names if name not in allowed]
    if unknown:
        allowed = ", ".join(allowed) or "none"
        raise ValueError(f"{where}: unknown {', '.join(map(repr, unknown))}; allowed are {allowed}")


def _flat(tables: Table, prefix: str = "") -> Table:
    """Turn `{"train": {"steps": 1}}` into `{"train.steps": 1}`."""
    flat: Table = {}
    for key, value in tables.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _merge(base: Table, special: Table) -> Table:
    """Merge `base` with the entries of `special`, table by table; ValueError for a value where a table belongs."""
    merged = dict(base)
    for key, value in special.items():
        earlier: Any = merged.get(key, value)
        if isinstance(value, dict) != isinstance(earlier, dict):
            raise ValueError(f"{key} must be a table of options wherever it is set, got {earlier!r} and {value!r}")
        merged[key] = _merge(earlier, value) if isinstance(value, dict) else value
    return merged
