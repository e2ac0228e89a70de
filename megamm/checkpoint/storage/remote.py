"""Remote storage: checkpoints at an fsspec URL (s3://bucket/prefix, file:///mnt/x, …), uploaded and downloaded.

    URL/step_00001000/…                 the files of RUN/checkpoints/step_00001000
    URL/step_00001000/manifest.json     written last: object stores cannot rename, so this file makes the folder valid
    URL/latest, URL/best                the name of a folder (checkpoint/retention.py)

An interrupted upload continues where it stopped: RUN/uploads/step_00001000.jsonl lists the uploaded files.

Credentials come from the environment or the store's own config files, never from the URL, because URLs are written into
logs, events and checkpoints. Every failure of the store is a RemoteError whose text contains no secret.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from megamm.checkpoint import manifest, retention
from megamm.checkpoint.manifest import ManifestEntry
from megamm.common import redact
from megamm.common.errors import UserError
from megamm.common.urls import checked_url

log = logging.getLogger(__name__)
STREAMS = 8
"""Files copied in parallel: one connection rarely uses the full bandwidth to an object store."""
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss"}
"""Stores without folders: creating a folder there would create a bucket."""
_EXTRAS = {"s3": "megamm[s3]", "s3a": "megamm[s3]"}
_OPTIONS: dict[str, dict[str, Any]] = {
    # A slow or unreachable store is detected within a minute; the caller retries (uploader.py).
    "s3": {
        "use_listings_cache": False,
        # Parts (50 MiB each) of a large file that are in memory, for each of STREAMS files.
        "max_concurrency": 2,
        "config_kwargs": {"connect_timeout": 10, "read_timeout": 30, "retries": {"total_max_attempts": 2}},
    },
    "file": {"auto_mkdir": True},
}
_OPTIONS["s3a"] = _OPTIONS["s3"]


class RemoteError(UserError):
    """An operation of the store failed: unreachable, refused or interrupted. A retry may succeed."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(what, where=where, remedy="check the URL, the network and the store's credentials")


class Remote:
    """The folder at a URL; names are relative to it, in "/" notation. All methods raise RemoteError on failure."""

    def __init__(self, url: str) -> None:
        """Open the URL. UserError if it is malformed, contains secrets or needs a package that is not installed."""
        self.url = checked_url(url)
        protocol = self.url.partition("://")[0]
        try:
            self.fs, root = fsspec.core.url_to_fs(self.url, **_OPTIONS.get(protocol, {}))
        except ImportError as error:
            remedy = f"pip install '{_EXTRAS[protocol]}'" if protocol in _EXTRAS else redact.text(str(error))
            raise UserError(f"{protocol}:// needs a package that is not installed", where=url, remedy=remedy) from None
        except ValueError as error:
            raise UserError(redact.text(str(error)), where=url, remedy="use a protocol that fsspec supports") from None
        self.root = root.rstrip("/")
        self._is_local = isinstance(self.fs, LocalFileSystem)
        self._has_folders = protocol not in _OBJECT_STORES

    def folders(self) -> list[str]:
        """Return the names of the entries directly in the folder."""
        with self._one_line_errors("list", ""):
            self.fs.invalidate_cache()
            try:
                return sorted(str(path).rstrip("/").rsplit("/", 1)[-1] for path in self.fs.ls(self.root, detail=False))
            except FileNotFoundError:
                return []

    def files(self, folder: str) -> dict[str, int]:
        """Return the sizes of all files below a folder, by their path in it; empty if there are none."""
        with self._one_line_errors("list", folder):
            self.fs.invalidate_cache()
            base = self._path(folder) + "/"
            found = self.fs.find(base, detail=True)
            return {path.removeprefix(base): int(info["size"]) for path, info in found.items()}

    def read(self, name: str) -> bytes | None:
        """Read a small file; None if it does not exist."""
        with self._one_line_errors("read", name):
            try:
                return self.fs.cat_file(self._path(name))
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        """Write a small file; on an object store it is replaced atomically."""
        with self._one_line_errors("write", name):
            self._make_folder(name)
            self.fs.pipe_file(self._path(name), data)
            self._sync(name)

    def put(self, source: Path, name: str) -> None:
        """Upload a file. FileNotFoundError if the source does not exist."""
        if not source.exists():
            raise FileNotFoundError(source)
        with self._one_line_errors("write", name):
            self._make_folder(name)
            self.fs.put_file(str(source), self._path(name))
            self._sync(name)

    def get(self, name: str, target: Path) -> None:
        """Download a file."""
        with self._one_line_errors("read", name):
            self.fs.get_file(self._path(name), str(target))

    def remove(self, name: str) -> None:
        """Remove a file or a folder with its contents, if it exists."""
        with self._one_line_errors("remove", name):
            self.fs.invalidate_cache()
            if self.fs.exists(self._path(name)):
                self.fs.rm(self._path(name), recursive=True)

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def _make_folder(self, name: str) -> None:
        if self._has_folders:
            self.fs.makedirs(self._path(name).rsplit("/", 1)[0], exist_ok=True)

    def _sync(self, name: str) -> None:
        """Sync the data to disk if the store is a mounted file system."""
        if self._is_local:
            for path in (self._path(name), self._path(name).rsplit("/", 1)[0]):
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)

    @contextmanager
    def _one_line_errors(self, verb: str, name: str) -> Iterator[None]:
        """Turn any error of the store's client into a RemoteError of one line without secrets."""
        try:
            yield
        except Exception as error:  # clients raise errors of their own and of several libraries below them
            cause = redact.text(f"{type(error).__name__}: {error}".splitlines()[0])
            raise RemoteError(f"cannot {verb} {name or 'it'}: {cause}", self.url) from error


@dataclass(frozen=True)
class Copied:
    """Result of one upload: files and bytes sent now, and number of files that were already there."""

    files: int
    bytes: int
    kept: int


class RemoteCheckpoints:
    """The checkpoints at a URL. Methods raise RemoteError if the store fails, UserError for damaged checkpoints."""

    def __init__(self, url: str) -> None:
        """UserError for a URL that cannot be used, as Remote."""
        self.store = Remote(url)

    def check_writable(self) -> None:
        """Raise UserError unless a file can be written and removed there; called before training starts."""
        try:
            self.store.write(".write-test", b"x")
            self.store.remove(".write-test")
        except RemoteError as error:
            remedy = "create the bucket or folder, set the store's credentials, or remove checkpoint.remote"
            raise UserError(error.what, where=self.store.url, remedy=remedy) from None

    def complete(self) -> list[str]:
        """Return the names of the complete checkpoints (with a valid manifest), by step."""
        names = [name for name in self.store.folders() if manifest.STEP_FOLDER.fullmatch(name)]
        return [name for name in names if self._listed(name) is not None]

    def _listed(self, name: str) -> dict[str, ManifestEntry] | None:
        data = self.store.read(f"{name}/{manifest.NAME}")
        if data is None:
            return None
        try:
            return manifest.parse(data, f"{self.store.url}/{name}")
        except UserError as error:
            log.warning("skipped: %s", error)
            return None

    def listed(self, name: str) -> dict[str, ManifestEntry]:
        """Return the files of a checkpoint. UserError if it is not complete."""
        data = self.store.read(f"{name}/{manifest.NAME}")
        return manifest.parse(data or b"", f"{self.store.url}/{name}")

    def upload(self, folder: Path, journal: Path) -> Copied:
        """Upload a finished folder, manifest last. UserError if it is damaged, FileNotFoundError if it disappears."""
        name, data = folder.name, (folder / manifest.NAME).read_bytes()
        listed = manifest.parse(data, folder)
        there = self.store.read(f"{name}/{manifest.NAME}")
        if there == data:  # complete, since the manifest is written last
            return Copied(0, 0, len(listed))
        if there is not None:
            # The step was trained again: while its files are replaced it must not be valid.
            self.store.remove(f"{name}/{manifest.NAME}")
        arrived = self._arrived(name, listed, journal)
        missing = [file for file in listed if file not in arrived]
        journal.parent.mkdir(parents=True, exist_ok=True)
        with journal.open("a") as lines:

            def send(file: str) -> None:
                if found := manifest.problem_of(folder, file, listed[file]):
                    if not (folder / file).exists():
                        raise FileNotFoundError(folder / file)
                    raise UserError(f"{found}: not uploaded", where=folder, remedy="check the disk")
                self.store.put(folder / file, f"{name}/{file}")
                line = {"url": self.store.url, "file": file, "digest": listed[file].digest}
                lines.write(json.dumps(line) + "\n")
                lines.flush()

            _each(send, missing)
        self._check_sizes(name, listed)
        self.store.write(f"{name}/{manifest.NAME}", data)
        journal.unlink(missing_ok=True)
        return Copied(len(missing), sum(listed[file].size for file in missing), len(arrived))

    def _arrived(self, name: str, listed: dict[str, ManifestEntry], journal: Path) -> set[str]:
        """Return the files that an earlier attempt has uploaded: the journal has their digest, the store their size."""
        sizes = self.store.files(name)
        arrived = set()
        for line in journal.read_text().splitlines() if journal.exists() else []:
            try:
                done = json.loads(line)
                file, digest, url = done["file"], done["digest"], done["url"]
            except (ValueError, KeyError, TypeError):
                continue  # a line that a kill has cut off
            if (
                url == self.store.url
                and file in listed
                and (sizes.get(file), digest) == (listed[file].size, listed[file].digest)
            ):
                arrived.add(file)
        return arrived

    def _check_sizes(self, name: str, listed: dict[str, ManifestEntry]) -> None:
        sizes = self.store.files(name)
        wrong = next((file for file, entry in listed.items() if sizes.get(file) != entry.size), None)
        if wrong is not None:
            raise RemoteError(f"{name}/{wrong} is incomplete after the upload", self.store.url)

    def download(self, name: str, target: Path, files: Iterable[str]) -> None:
        """Download some files of a checkpoint into a folder and verify them; valid files already there are kept."""
        listed = self.listed(name)

        def fetch(file: str) -> None:
            path, entry = target / file, listed[file]
            if manifest.is_whole(path, entry):
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            self.store.get(f"{name}/{file}", path)
            if found := manifest.problem_of(target, file, entry):
                raise manifest.damaged(found, f"{self.store.url}/{name}")

        _each(fetch, files)

    def withdraw(self, name: str) -> None:
        """Invalidate a checkpoint; the retention removes its files when there is a newer one."""
        self.store.remove(f"{name}/{manifest.NAME}")

    def remove(self, name: str) -> None:
        """Remove a checkpoint; the manifest first, so that a partly removed one is never valid."""
        self.withdraw(name)
        self.store.remove(name)

    def apply_retention(self, keep: int, keep_best: bool) -> list[str]:
        """Remove checkpoints that are not kept, and partial uploads older than the newest; update the pointers."""
        complete = self.complete()
        losses = {name: self._heldout_loss(name) for name in complete} if keep_best else {}
        best = retention.best_of(losses)
        doomed = retention.doomed(complete, keep, {best} if best else set())
        unfinished = set(self.store.folders()) - set(complete)
        # Only the newest checkpoint is uploaded: older partial uploads are never continued.
        stale = [n for n in unfinished if manifest.STEP_FOLDER.fullmatch(n) and complete and n < complete[-1]]
        if complete:
            self.store.write(retention.LATEST, f"{complete[-1]}\n".encode())
        if best:
            self.store.write(retention.BEST, f"{best}\n".encode())
        for name in sorted([*doomed, *stale]):
            self.store.remove(name) if name in stale else self.remove(name)
        return doomed

    def _heldout_loss(self, name: str) -> float | None:
        return retention.heldout_loss(self.store.read(f"{name}/{manifest.STATE}") or b"")


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
