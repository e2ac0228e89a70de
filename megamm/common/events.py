"""Event log of a run: RUN/events.jsonl, one JSON object per line, append-only, written by any process of the job.

Every line has "time" (Unix seconds) and "kind"; other fields depend on the kind. Times and durations are in seconds.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

EVENTS = "events.jsonl"


def record(run: Path, kind: str, **fields: Any) -> None:
    """Append one event in a single write, so that lines of several processes never mix."""
    line = json.dumps({"time": time.time(), "kind": kind} | fields) + "\n"
    run.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run / EVENTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def read(run: Path) -> list[dict[str, Any]]:
    """Return all complete events in the order in which they were written; a line cut off by a kill is skipped."""
    path = run / EVENTS
    lines = path.read_text().splitlines() if path.exists() else []
    events = []
    for line in lines:
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events
