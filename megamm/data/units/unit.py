"""A unit of work: an input that is turned into output files once, and a record that says that it is done.

In: a stage's folder, a function and its argument. Out: the function's result, also in STAGE/<name>.json. The record is
written after the outputs, so a unit without one is done again, and one with a record is never done twice. A function
writes its outputs with `new_file`, so two processes may do the same unit at a time: both write the same bytes.
Results are small: they are counts and names, never data, because the process that asks for them keeps all of them.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamm.common.errors import UserError
from megamm.common.files import new_file

Result = dict[str, Any]
"""What a unit returns: JSON with the number of its samples under SAMPLES."""
SAMPLES = "samples"
ATTEMPTS = 3
"""Times that a unit may lose its worker before it is blamed for it."""
AHEAD = 2
"""Units per worker that are submitted at a time."""


@dataclass(frozen=True)
class Unit:
    """A name that is the same in every attempt, and the argument of the stage's function."""

    name: str
    argument: Any


@dataclass(frozen=True)
class Stage:
    """The units of one kind: the folder of their records, and a function that a worker process can import."""

    folder: Path
    function: Callable[[Any], Result]

    def record(self, unit: Unit) -> Path:
        """The file that says that the unit is done."""
        return self.folder / f"{unit.name}.json"

    def done(self, unit: Unit) -> Result | None:
        """The result of a unit that was finished before; None if it has to be done."""
        try:
            result: Result = json.loads(self.record(unit).read_bytes())
        except FileNotFoundError:
            return None
        return result

    def do(self, unit: Unit) -> Result:
        """Do a unit, unless another process has finished it meanwhile."""
        if (kept := self.done(unit)) is not None:
            return kept
        result = self.function(unit.argument)
        with new_file(self.record(unit)) as file:
            file.write(json.dumps(result).encode())
        return result


class KilledUnit(UserError):
    """A unit that kills its workers; the others stay done."""


def killed(stage: Stage, unit: Unit) -> KilledUnit:
    """The error of a unit that kills its workers."""
    what = f"unit {unit.name} of {stage.folder.name}: its worker process was killed {ATTEMPTS} times"
    remedy = "probably out of memory: use fewer workers, or find the sample with --limit and remove it"
    return KilledUnit(what, where=stage.folder, remedy=remedy)
