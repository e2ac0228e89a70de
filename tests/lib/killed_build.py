"""Builds shards in processes that kill themselves after some units: `python killed_build.py RAW TO UNITS ...`.

A build for each number of UNITS, in TO/UNITS; exit code 0 if all were killed. See test_units.py.
"""

import os
import signal
import sys
from pathlib import Path

import megamm.data.build.raw_units as raw_units
from megamm.data.build.shards import BuildOptions, build
from megamm.data.units.unit import Result, Stage, Unit

UNIT_SAMPLES = 8


def main(raw: str, to: str, *numbers: str) -> None:
    """Build once for each number of units, in a fork."""
    for units in numbers:
        child = os.fork()
        if not child:
            _build(Path(raw), Path(to) / units, int(units))
            os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"{units} units: status {status}"


def _build(raw: Path, to: Path, units: int) -> None:
    """Build in this process; SIGKILL before the record of the last of the units is written."""
    raw_units.UNIT_SAMPLES = UNIT_SAMPLES
    left, do = [units], Stage.do

    def counted(stage: Stage, unit: Unit) -> Result:
        left[0] -= 1
        if not left[0]:
            stage.function(unit.argument)  # its files are there, the record is not
            os.kill(os.getpid(), signal.SIGKILL)
        return do(stage, unit)

    Stage.do = counted  # type: ignore[method-assign]
    build([raw], to, BuildOptions(), workers=0)


if __name__ == "__main__":
    main(*sys.argv[1:])
