"""Storage at an fsspec URL (s3://bucket/prefix, file:///mnt/x, …), with the few operations that a tier needs.

Credentials come from the environment or the store's own config files, never from the URL, because URLs are written into
logs, events and checkpoints. Every failure is a RemoteError whose text contains no secret.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from megamm.common.errors import UserError
from megamm.common.urls import checked_url, redacted

_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss"}
"""Stores without folders: creating a folder there would create a bucket."""
_EXTRAS = {"s3": "megamm[s3]", "s3a": "megamm[s3]"}
_OPTIONS: dict[str, dict[str, Any]] = {
    # A slow or unreachable store is detected within a minute; the caller retries (uploader.py).
    "s3": {
        "use_listings_cache": False,
        # Parts (50 MiB each) of a large file that are in memory, for each of durable.STREAMS files.
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
            remedy = f"pip install '{_EXTRAS[protocol]}'" if protocol in _EXTRAS else redacted(str(error))
            raise UserError(f"{protocol}:// needs a package that is not installed", where=url, remedy=remedy) from None
        except ValueError as error:
            raise UserError(redacted(str(error)), where=url, remedy="use a protocol that fsspec supports") from None
        self.root = root.rstrip("/")
        self._is_local = isinstance(self.fs, LocalFileSystem)
        self._has_folders = protocol not in _OBJECT_STORES

    def folders(self) -> list[str]:
        """Return the names of the entries directly in the folder."""
        with self._told("list", ""):
            self.fs.invalidate_cache()
            try:
                return sorted(str(path).rstrip("/").rsplit("/", 1)[-1] for path in self.fs.ls(self.root, detail=False))
            except FileNotFoundError:
                return []

    def files(self, folder: str) -> dict[str, int]:
        """Return the sizes of all files below a folder, by their path in it; empty if there are none."""
        with self._told("list", folder):
            self.fs.invalidate_cache()
            base = self._path(folder) + "/"
            found = self.fs.find(base, detail=True)
            return {path.removeprefix(base): int(info["size"]) for path, info in found.items()}

    def read(self, name: str) -> bytes | None:
        """Read a small file; None if it does not exist."""
        with self._told("read", name):
            try:
                return self.fs.cat_file(self._path(name))
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        """Write a small file; on an object store it is replaced atomically."""
        with self._told("write", name):
            self._make_folder(name)
            self.fs.pipe_file(self._path(name), data)
            self._sync(name)

    def put(self, source: Path, name: str) -> None:
        """Upload a file. FileNotFoundError if the source does not exist."""
        if not source.exists():
            raise FileNotFoundError(source)
        with self._told("write", name):
            self._make_folder(name)
            self.fs.put_file(str(source), self._path(name))
            self._sync(name)

    def get(self, name: str, target: Path) -> None:
        """Download a file."""
        with self._told("read", name):
            self.fs.get_file(self._path(name), str(target))

    def remove(self, name: str) -> None:
        """Remove a file or a folder with its contents, if it exists."""
        with self._told("remove", name):
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
    def _told(self, verb: str, name: str) -> Iterator[None]:
        """Turn any error of the store's client into a RemoteError of one line without secrets."""
        try:
            yield
        except Exception as error:  # clients raise errors of their own and of several libraries below them
            cause = redacted(f"{type(error).__name__}: {error}".splitlines()[0])
            raise RemoteError(f"cannot {verb} {name or 'it'}: {cause}", self.url) from error
