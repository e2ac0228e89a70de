"""`megamm attach`: prints the events and metrics of a run as they are written, until the run has ended.

Input: RUN/events.jsonl and metrics.jsonl, which a restart replaces. Output: lines of text, or the JSON lines unchanged.
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megamm.common import events, redact
from megamm.observability import metrics
from megamm.observability.report import runs

POLL = 0.5
"""Seconds between two polls; each poll reads two file sizes from a shared file system."""
STATUS_SECONDS = 5.0
BEFORE = 10
"""Number of earlier lines that are shown first."""


class Tail:
    """Reads new complete lines of a JSON-lines file. A replaced file is read again; known lines are skipped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.inode, self.offset, self.newest = -1, 0, float("-inf")

    def read(self) -> list[dict[str, Any]]:
        """Return the lines since the last call, oldest first."""
        try:
            with self.path.open("rb") as file:
                found = os.fstat(file.fileno())
                if found.st_ino != self.inode or found.st_size < self.offset:
                    self.inode, self.offset, known = found.st_ino, 0, self.newest
                else:
                    known = float("-inf")
                file.seek(self.offset)
                text = file.read()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self.offset += len(whole)
        lines = [line for line in map(_parsed, whole.splitlines()) if line.get("time", 0.0) > known]
        self.newest = max([self.newest, *(line.get("time", 0.0) for line in lines)])
        return lines


def _parsed(text: bytes) -> dict[str, Any]:
    """Parse a line; {} for one that a kill cut off and that the next writer continued."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def follow(run: Path) -> Iterator[dict[str, Any]]:
    """Yield events and lines of metrics sorted by time, starting with the last earlier ones; end with the run."""
    tails = [Tail(run / events.EVENTS), Tail(run / metrics.METRICS)]
    is_first, looked = True, float("-inf")
    while True:
        new = sorted((line for tail in tails for line in tail.read() if line), key=lambda line: line.get("time", 0.0))
        yield from redact.values(new[-BEFORE:] if is_first else new)
        is_first = False
        if new or time.monotonic() - looked > STATUS_SECONDS:
            looked = time.monotonic()
            # More lines may have been written since the last read: read them before the end.
            if runs.status(run).state in runs.FINAL:
                yield from redact.values([line for tail in tails for line in tail.read() if line])
                return
        time.sleep(POLL)


def text(line: dict[str, Any]) -> str:
    """Format a line for people: time (UTC), then the fields."""
    at = time.strftime("%m-%d %H:%M:%S", time.gmtime(line.get("time", 0.0)))
    if "kind" in line:
        told = ", ".join(f"{key} {value}" for key, value in line.items() if key not in ("time", "kind", "reports"))
        return f"{at}  {line['kind']}  {told}".replace("\n", " ")
    losses = " ".join(f"{k} {v:.4f}" for k, v in line.items() if k.startswith(("loss/", "heldout/")) and v is not None)
    speed = f"  {line['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in line else ""
    goodput = f"  goodput {line['goodput']:.1%}" if "goodput" in line else ""
    return f"{at}  step {line['step']}  {losses}{speed}{goodput}"
