"""The durable tier: uploads finished checkpoint folders to an fsspec URL, and downloads them.

    URL/step_00001000/…                 the files of RUN/checkpoints/step_00001000
    URL/step_00001000/manifest.json     written last: object stores cannot rename, so this file makes the folder valid
    URL/latest, URL/best                the name of a folder (checkpoint/retention.py)

An interrupted upload continues where it stopped: RUN/uploads/step_00001000.jsonl lists the uploaded files.
"""

import json
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megamm.checkpoint import manifest, retention
from megamm.checkpoint.manifest import Entry
from megamm.checkpoint.storage.remote import Remote, RemoteError
from megamm.common.errors import UserError

log = logging.getLogger(__name__)
STREAMS = 8
"""Files copied in parallel: one connection rarely uses the full bandwidth to an object store."""


@dataclass(frozen=True)
class Copied:
    """Result of one upload: files and bytes sent now, and number of files that were already there."""

    files: int
    bytes: int
    kept: int


class DurableTier:
    """The checkpoints at a URL. Methods raise RemoteError if the store fails, UserError for damaged checkpoints."""

    def __init__(self, url: str) -> None:
        """UserError for a URL that cannot be used (remote.py)."""
        self.remote = Remote(url)

    def check_writable(self) -> None:
        """Raise UserError unless a file can be written and removed there; called before training starts."""
        try:
            self.remote.write(".write-test", b"x")
            self.remote.remove(".write-test")
        except RemoteError as error:
            remedy = "create the bucket or folder, set the store's credentials, or remove checkpoint.remote"
            raise UserError(error.what, where=self.remote.url, remedy=remedy) from None

    def complete(self) -> list[str]:
        """Return the names of the complete checkpoints (with a valid manifest), by step."""
        names = [name for name in self.remote.folders() if manifest.STEP_FOLDER.fullmatch(name)]
        return [name for name in names if self._listed(name) is not None]

    def _listed(self, name: str) -> dict[str, Entry] | None:
        data = self.remote.read(f"{name}/{manifest.NAME}")
        if data is None:
            return None
        try:
            return manifest.parse(data, f"{self.remote.url}/{name}")
        except UserError as error:
            log.warning("skipped: %s", error)
            return None

    def listed(self, name: str) -> dict[str, Entry]:
        """Return the files of a checkpoint. UserError if it is not complete."""
        data = self.remote.read(f"{name}/{manifest.NAME}")
        return manifest.parse(data or b"", f"{self.remote.url}/{name}")

    def upload(self, folder: Path, journal: Path) -> Copied:
        """Upload a finished folder, manifest last. UserError if it is damaged, FileNotFoundError if it disappears."""
        name, data = folder.name, (folder / manifest.NAME).read_bytes()
        listed = manifest.parse(data, folder)
        there = self.remote.read(f"{name}/{manifest.NAME}")
        if there == data:
            return Copied(0, 0, len(listed))
        if there is not None:
            # The step was trained again: while its files are replaced it must not be valid.
            self.remote.remove(f"{name}/{manifest.NAME}")
        arrived = self._arrived(name, listed, journal)
        missing = [file for file in listed if file not in arrived]
        journal.parent.mkdir(parents=True, exist_ok=True)
        with journal.open("a") as lines:

            def send(file: str) -> None:
                if found := manifest.problem_of(folder, file, listed[file]):
                    if not (folder / file).exists():
                        raise FileNotFoundError(folder / file)
                    raise UserError(f"{found}: not uploaded", where=folder, remedy="check the disk")
                self.remote.put(folder / file, f"{name}/{file}")
                line = {"url": self.remote.url, "file": file, "digest": listed[file].digest}
                lines.write(json.dumps(line) + "\n")
                lines.flush()

            _each(send, missing)
        self._check_sizes(name, listed)
        self.remote.write(f"{name}/{manifest.NAME}", data)
        journal.unlink(missing_ok=True)
        return Copied(len(missing), sum(listed[file].size for file in missing), len(arrived))

    def _arrived(self, name: str, listed: dict[str, Entry], journal: Path) -> set[str]:
        """Return the files that an earlier attempt has uploaded: the journal has their digest, the store their size."""
        sizes = self.remote.files(name)
        arrived = set()
        for line in journal.read_text().splitlines() if journal.exists() else []:
            try:
                done = json.loads(line)
                file, digest, url = done["file"], done["digest"], done["url"]
            except (ValueError, KeyError, TypeError):
                continue
            if (
                url == self.remote.url
                and file in listed
                and (sizes.get(file), digest) == (listed[file].size, listed[file].digest)
            ):
                arrived.add(file)
        return arrived

    def _check_sizes(self, name: str, listed: dict[str, Entry]) -> None:
        sizes = self.remote.files(name)
        wrong = next((file for file, entry in listed.items() if sizes.get(file) != entry.size), None)
        if wrong is not None:
            raise RemoteError(f"{name}/{wrong} is incomplete after the upload", self.remote.url)

    def download(self, name: str, target: Path, files: Iterable[str]) -> None:
        """Download some files of a checkpoint into a folder and verify them; valid files already there are kept."""
        listed = self.listed(name)

        def fetch(file: str) -> None:
            path, entry = target / file, listed[file]
            if manifest.is_whole(path, entry):
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            self.remote.get(f"{name}/{file}", path)
            if found := manifest.problem_of(target, file, entry):
                raise manifest.damaged(found, f"{self.remote.url}/{name}")

        _each(fetch, files)

    def withdraw(self, name: str) -> None:
        """Invalidate a checkpoint; the retention removes its files when there is a newer one."""
        self.remote.remove(f"{name}/{manifest.NAME}")

    def remove(self, name: str) -> None:
        """Remove a checkpoint; the manifest first, so that a partly removed one is never valid."""
        self.withdraw(name)
        self.remote.remove(name)

    def apply_retention(self, keep: int, keep_best: bool) -> list[str]:
        """Remove checkpoints that are not kept, and partial uploads older than the newest; update the pointers."""
        complete = self.complete()
        losses = {name: self._heldout_loss(name) for name in complete} if keep_best else {}
        best = retention.best_of(losses)
        doomed = retention.doomed(complete, keep, {best} if best else set())
        unfinished = set(self.remote.folders()) - set(complete)
        stale = [n for n in unfinished if manifest.STEP_FOLDER.fullmatch(n) and complete and n < complete[-1]]
        if complete:
            self.remote.write(retention.LATEST, f"{complete[-1]}\n".encode())
        if best:
            self.remote.write(retention.BEST, f"{best}\n".encode())
        for name in sorted([*doomed, *stale]):
            self.remote.remove(name) if name in stale else self.remove(name)
        return doomed

    def _heldout_loss(self, name: str) -> float | None:
        return retention.heldout_loss(self.remote.read(f"{name}/{manifest.STATE}") or b"")


def _each(action: Callable[[str], None], files: Iterable[str]) -> None:
    """Run the action on all files, some in parallel; raise the first error and cancel what has not begun."""
    with ThreadPoolExecutor(STREAMS) as pool:
        futures = [pool.submit(action, file) for file in files]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()
