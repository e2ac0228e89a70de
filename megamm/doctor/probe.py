"""Check hardware that may hang: in a separate process, within a time limit.

A stuck GPU or shared file system blocks the calling process forever, and no exception or signal can interrupt it. The
process is then abandoned, and the node is reported as bad. `python -m megamm.doctor.probe PROBE` reads keyword
arguments as JSON from standard input and prints findings as JSON.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from megamm.common import processes
from megamm.doctor.findings import Finding

LIMIT = 60.0
"""Time limit of a probe in seconds."""


def probe(probed: str, check: str, remedy: str, limit: float = LIMIT, **arguments: Any) -> list[Finding]:
    """Check hardware with these arguments and return the findings; a fault if the check crashes or exceeds `limit` s.

    probed: "gpu" or "storage". check, remedy: used for that fault.
    """
    process = processes.start_module(
        __name__, probed, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        out, err = process.communicate(json.dumps(arguments), timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()  # do not wait: a process in an uninterruptible call does not end
        return [Finding(check, f"no answer within {limit:g} s", "wrong", remedy)]
    if process.returncode:
        said = (err.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        return [Finding(check, f"check failed: {said}", "wrong", remedy)]
    return [Finding(**found) for found in json.loads(out)]


def main() -> None:
    """Run the probe in this process."""
    from megamm.doctor import gpu, machine

    probes: dict[str, Callable[..., list[Finding]]] = {"gpu": gpu.look, "storage": machine.look_at_folder}
    found = probes[sys.argv[1]](**json.load(sys.stdin))
    json.dump([asdict(finding) for finding in found], sys.stdout)


if __name__ == "__main__":
    main()
