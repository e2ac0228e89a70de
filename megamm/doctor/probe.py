"""A look at hardware that may not answer: in a process of its own, within a time limit.

A GPU or a shared file system that is stuck holds whoever asks it for ever, where no exception and no signal reaches;
then the process is left behind, and the node is called bad. `python -m megamm.doctor.probe MODULE` reads keyword
arguments as JSON from standard input and prints findings as JSON.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from megamm.doctor.findings import Finding
from megamm.resilience import processes

LIMIT = 60.0
"""Seconds that a probe may take."""


def probe(module: str, check: str, remedy: str, limit: float = LIMIT, **arguments: Any) -> list[Finding]:
    """The findings of megamm.doctor.MODULE with these arguments; a fault if it crashes or takes longer than `limit` s.

    check, remedy: of that fault.
    """
    process = processes.start_module(
        __name__, module, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        out, err = process.communicate(json.dumps(arguments), timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()  # not waited for: in an uninterruptible call it does not end
        return [Finding(check, f"no answer within {limit:g} s", "wrong", remedy)]
    if process.returncode:
        said = (err.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        return [Finding(check, f"could not be looked at: {said}", "wrong", remedy)]
    return [Finding(**found) for found in json.loads(out)]


def main() -> None:
    """The probe's process."""
    from megamm.doctor import gpu, storage

    modules: dict[str, Callable[..., list[Finding]]] = {"gpu": gpu.look, "storage": storage.look}
    found = modules[sys.argv[1]](**json.load(sys.stdin))
    json.dump([asdict(finding) for finding in found], sys.stdout)


if __name__ == "__main__":
    main()
