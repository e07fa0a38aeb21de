"""`openmoba train`."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from openmoba.lab.config import RunConfig, stored_config
from openmoba.lab.measure.commands import losses_table
from openmoba.lab.progress import TerminalProgress
from openmoba.lab.run_files import CONFIG_FILE, RESULT_FILE
from openmoba.records.locks import claim, holder


@dataclass(frozen=True)
class Train:
    """Train one model into a folder. The same command again resumes a killed run and skips a finished one.

    Several devices: torchrun --nproc-per-node 2 -m openmoba train FOLDER ...
    """

    folder: tyro.conf.Positional[Path]
    """Folder of the run. Options left out are those of the run that the folder holds, if it holds one."""
    options: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)
    dry_run: bool = False
    """Check the settings, say what the run would be (parameters, tokens, compute, about how much memory and time),
    and stop; no data are read and nothing is written."""

    def as_stored(self) -> Train:
        """Return the command with the settings of the run in the folder, but no model.overrides: `run` adds those."""
        options = self._stored() or self.options
        # tyro would read a default that is not empty as options --model.overrides.KEY.
        return replace(self, options=replace(options, model=replace(options.model, overrides={})))

    def _stored(self) -> RunConfig | None:
        return stored_config(self.folder) if (self.folder / CONFIG_FILE).exists() else None

    def _settings(self) -> RunConfig:
        """Return the options, with the overrides of the run in the folder if none are given."""
        stored = self._stored()
        if stored is None:
            self.options.arm.check_read()  # recipes may give all arms what some of them read
        if stored is None or self.options.model.overrides:
            return self.options
        return replace(self.options, model=replace(self.options.model, overrides=stored.model.overrides))

    def run(self) -> None:
        """Train, and say where the result is."""
        from openmoba.lab.train.check import check_run
        from openmoba.lab.train.history import evaluations
        from openmoba.lab.train.run import is_first, run_training
        from openmoba.parallel import leave_group

        if self.dry_run:
            from openmoba.lab.train.summary import plan_text

            check_run(self._settings(), self.folder)
            print(f"{self.folder}\n{plan_text(self._settings())}")
            return
        with claim(self.folder) if is_first() else nullcontext(True) as mine:
            if not mine:
                raise ValueError(f"{self.folder} is being trained by {holder(self.folder)}; wait for it, or stop it")
            result = run_training(self._settings(), self.folder, progress=TerminalProgress(self.folder.name))
        if result:
            measured = evaluations(self.folder, self._settings(), result)[-1]
            print(losses_table(measured), f"{self.folder / RESULT_FILE}", sep="\n")
        leave_group()
