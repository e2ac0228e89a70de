"""The process that simulates a GPU: `python -m megamm.fakegpu.process PARENT GPU`, started by `Simulator`.

It exists because the simulation replaces parts of torch and Megatron-core for good. It reads one `ProbeRequest` per
line of stdin as JSON and answers each with one line: {"result": ...}, or {"error": ...} for a UserError. It ends at the
end of its input, or with the traceback of another error on stderr.
"""

import json
import logging
import os
import sys
import warnings
from dataclasses import asdict
from typing import TextIO

from megamm.common import gpu_constants, processes
from megamm.common.errors import UserError
from megamm.fakegpu import library
from megamm.fakegpu.results import ProbeRequest


def main() -> None:
    """Become a node with GPUs of this kind and answer requests."""
    parent, gpu = int(sys.argv[1]), gpu_constants.load(sys.argv[2])
    processes.die_with_parent(parent)
    # Answers go to a descriptor of their own: libraries print to stdout.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        library.load()
    except UserError as error:
        _answer(answers, {"error": [error.what, error.remedy]})
        return
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    # Megatron-core looks at the device when it is imported, so the device comes first.
    from megamm.fakegpu import runtime
    from megamm.fakegpu.fake_mode import HostWaits

    waits = HostWaits()
    runtime.install(gpu, waits.note)
    from megamm.fakegpu.probe import Simulation

    simulation = Simulation(waits)
    for line in sys.stdin:
        try:
            _answer(answers, {"result": asdict(simulation.run(ProbeRequest(**json.loads(line))))})
        except UserError as error:
            _answer(answers, {"error": [error.what, error.remedy]})


def _answer(answers: TextIO, value: dict[str, object]) -> None:
    print(json.dumps(value), file=answers, flush=True)


if __name__ == "__main__":
    main()
