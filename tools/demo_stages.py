"""Stages of the demo: they run the command line, are timed, and are kept when complete and unchanged.

A mark `OUT/stages/<name>.json` (seconds, peak_rss_gib, details, identity) is written when a stage is done. Its identity
covers its commands and all stages before it. Seconds are wall time; memory in GiB, summed over the process tree.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
MEGAMM = [sys.executable, "-m", "megamm"]


class DemoError(Exception):
    """A promise that does not hold; shown as one line, exit code 1."""


@dataclass(frozen=True)
class Stage:
    """`commands` are run in turn or `at_once`; without commands, `action` is called with the log file.

    outputs are removed before a stage is repeated.
    """

    name: str
    outputs: tuple[str, ...]
    commands: tuple[tuple[str, ...], ...] = ()
    at_once: bool = False
    action: Callable[[Path], dict[str, Any]] | None = None
    depends_on: str = ""
    """Other inputs of the stage, as text: a change repeats it."""


@dataclass
class Memory:
    """Peak resident memory of this process and all below it, sampled in a thread."""

    peak: int = 0
    stop: threading.Event = field(default_factory=threading.Event)

    def sample(self) -> None:
        me, is_over = psutil.Process(), False
        while not is_over:
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.peak = max(self.peak, total)
            is_over = self.stop.wait(0.3)

    @classmethod
    @contextmanager
    def watch(cls) -> Iterator["Memory"]:
        memory = cls()
        thread = threading.Thread(target=memory.sample)
        thread.start()
        try:
            yield memory
        finally:
            memory.stop.set()
            thread.join()


def command(log: Path, *arguments: str, threads: int | None = None) -> str:
    """Run `megamm ARGUMENTS`, shown and logged; return its output. Raises DemoError if it fails."""
    process = start(*arguments, threads=threads)
    output = follow(process, log)
    if process.wait() != 0:
        last = (output.strip().splitlines() or ["no output"])[-1]
        raise DemoError(
            f"`megamm {' '.join(arguments[:3])} ...` exited with code {process.returncode}: {last} (see {log})"
        )
    return output


def start(*arguments: str, threads: int | None = None) -> subprocess.Popen[str]:
    """Start `megamm ARGUMENTS`, optionally with that many threads."""
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    return subprocess.Popen(
        [*MEGAMM, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def follow(process: subprocess.Popen[str], log: Path) -> str:
    """Show and log a process's output until it ends; return it."""
    assert process.stdout is not None
    lines = []
    with log.open("a", buffering=1) as file:  # by line: complete even if the demo is killed
        for line in process.stdout:
            if not line.startswith("[rank"):  # the traceback of a rank that lost its peer is in the log only
                print(f"    {line}", end="", flush=True)
            file.write(line)
            lines.append(line)
    return "".join(lines)


def run_commands(stage: Stage, log: Path) -> None:
    """Run a stage's commands; at once means as many as there are cores, one thread each."""
    workers = min(os.cpu_count() or 1, len(stage.commands)) if stage.at_once else 1
    threads = 1 if workers > 1 else None
    with ThreadPoolExecutor(max(1, workers)) as pool:
        list(pool.map(lambda arguments: command(log, *arguments, threads=threads), stage.commands))


def run_stages(out: Path, stages: list[Stage]) -> dict[str, dict[str, Any]]:
    """Run incomplete stages; return every stage's mark (seconds, peak_rss_gib, details), written when it is done."""
    marks: dict[str, dict[str, Any]] = {}
    folder = out / "stages"
    folder.mkdir(parents=True, exist_ok=True)
    is_changed = False
    for number, stage in enumerate(stages, start=1):
        title, mark = f"[{number}/{len(stages)}] {stage.name}", folder / f"{stage.name}.json"
        identity = hashlib.sha256(repr((stage.commands, stage.depends_on)).encode()).hexdigest()
        if not is_changed and mark.exists() and json.loads(mark.read_text())["identity"] == identity:
            marks[stage.name] = json.loads(mark.read_text())
            print(f"{title}: complete, kept ({marks[stage.name]['seconds']:.0f} s when it was made)", flush=True)
            continue
        is_changed = True
        print(title, flush=True)
        for path in [mark, *(out / name for name in stage.outputs)]:
            remove(path)
        log = folder / f"{stage.name}.log"
        log.unlink(missing_ok=True)
        began = time.monotonic()
        with Memory.watch() as memory:
            details = stage.action(log) if stage.action else {}
            run_commands(stage, log)
        done = {"seconds": round(time.monotonic() - began, 1), "peak_rss_gib": round(memory.peak / 2**30, 2)}
        marks[stage.name] = done | {"identity": identity, "details": details}
        write(mark, marks[stage.name])
        print(f"  {stage.name}: {done['seconds']} s, at most {done['peak_rss_gib']} GiB", flush=True)
    return marks


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def write(path: Path, value: dict[str, Any]) -> None:
    """Write JSON atomically."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.rename(path)
