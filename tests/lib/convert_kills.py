"""A conversion that is killed (SIGKILL) at random times and restarted, until that has happened often enough.

`python tests/lib/convert_kills.py export|import SOURCE OUT KILLS [--nproc N] [--shard-size BYTES]`. After every kill
there is either no output or a complete one, with the bytes of an uninterrupted conversion. The figures are printed as
JSON. kills; resumed: kills after which the next one resumed; finished: conversions that ended in between.
"""

import argparse
import json
import multiprocessing
import random
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

from megamm import checkpoint
from megamm.checkpoint import manifest
from megamm.convert.export import export
from megamm.convert.import_folder import import_
from megamm.convert.verify.equivalence import VerificationOptions


def convert(kind: str, source: Path, out: Path, options: dict[str, Any]) -> None:
    """Run the conversion; without logits, whose threads do not exist in a forked process."""
    verification = VerificationOptions(logits=False)
    if kind == "export":
        export(source, out, verification=verification, **options)
    else:
        import_(source, out, overrides=["data.seq_length=48"], verification=verification, **options)


class Killing:
    """Repeats the same conversion."""

    def __init__(self, kind: str, source: Path, out: Path, options: dict[str, Any]) -> None:
        self.given = kind, source, out, options
        self.kind, self.out = kind, out
        self.final = out if kind == "export" else checkpoint.path_of(out, 0)
        self.temporary = self.final.with_name(f".tmp-{self.final.name}")
        self.resumed = self.finished = 0

    def run(self, seconds: float | None) -> bool:
        """Run in a process, killed after that time; return whether it was killed. AssertionError for partial output."""
        begun = self._done() > 0
        process = multiprocessing.get_context("fork").Process(target=convert, args=self.given)
        process.start()
        process.join(seconds)
        was_killed = process.exitcode is None
        process.kill()
        process.join()
        self.resumed += begun and (self._done() > 0 or self.final.exists())
        assert was_killed or process.exitcode == 0
        assert self.final.exists() or not list(self.out.rglob("config.json"))
        return was_killed

    def _done(self) -> int:
        """Return the number of segments in the journal."""
        journal = self.temporary / "journal.jsonl"
        return journal.read_bytes().count(b"segment") if journal.exists() else 0

    def digests(self) -> dict[str, str]:
        """Return digests of all weight files (for an export, of all files); the output is removed."""
        if self.kind == "import":
            checkpoint.verify(self.final)
        files = self.final.rglob("*.distcp") if self.kind == "import" else self.final.rglob("*")
        found = {str(f.relative_to(self.final)): manifest.digest(f).digest for f in files if f.is_file()}
        for folder in (self.out, self.temporary):
            shutil.rmtree(folder, ignore_errors=True)
        return found

    def all(self, kills: int, draw: random.Random) -> dict[str, Any]:
        """Run until that many kills; return the figures."""
        convert(*self.given)  # loads modules that are imported at first use
        wanted, killed, began = self.digests(), 0, time.monotonic()
        self.run(None)
        seconds = time.monotonic() - began
        assert self.digests() == wanted
        while killed < kills:
            killed += self.run(draw.uniform(0.0, seconds))
            if self.final.exists():
                self.finished += 1
                assert self.digests() == wanted
        self.run(None)
        assert self.digests() == wanted
        return {"kills": killed, "resumed": self.resumed, "finished": self.finished, "seconds_without_kills": seconds}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("export", "import"))
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("kills", type=int)
    parser.add_argument("--nproc", type=int, default=1)
    parser.add_argument("--shard-size", type=int, default=20_000)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    options = {"nproc": given.nproc, "shard_size": given.shard_size}
    killing = Killing(given.kind, given.source, given.out, options)
    print(json.dumps(killing.all(given.kills, random.Random(5))))


if __name__ == "__main__":
    main()
