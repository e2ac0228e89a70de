"""Reads ranges of files at a URL (s3://, gs://, http(s)://, file://, by fsspec), with retries up to a time limit.

    store = RangeStore("s3://bucket/shards/mine/train/text.tokens-abc", patience=300)
    store.read("000000.tar", 512, 2048)      exactly these bytes, or a StoreError of one line

A failed or truncated answer is repeated with growing pauses until `patience` seconds after the first attempt. Missing
files and refused access are permanent. Credentials come from the environment, never from the URL.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem, sync

from megamm.common import redact
from megamm.common.errors import UserError
from megamm.common.urls import checked_url

logger = logging.getLogger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 15.0
"""Seconds between attempts: doubled from the first to the longest."""
_SILENCE = 30.0
"""Seconds without a byte after which an attempt has failed."""
_DEFINITE = frozenset({400, 401, 403, 404, 405, 410, 416})
"""HTTP statuses that another attempt does not change."""
_EXTRAS = {"s3": "megamm[s3]", "s3a": "megamm[s3]", "http": "megamm[s3]", "https": "megamm[s3]"}


class StoreError(UserError):
    """A file of the store cannot be read: missing, refused, or failing for longer than the limit."""


class MissingFile(StoreError):
    """The store has no such file."""


class RangeStore:
    """The files below a URL. UserError for a URL that is malformed or needs a package that is not installed.

    on_failure is called for every attempt that failed.
    """

    def __init__(self, url: str, patience: float, on_failure: Callable[[], None] = lambda: None) -> None:
        self.url, self.patience, self._on_failure = checked_url(url), patience, on_failure
        protocol = self.url.partition("://")[0]
        try:
            self._fs, root = fsspec.core.url_to_fs(self.url, **_options(protocol, min(_SILENCE, patience)))
        except ImportError:
            remedy = f"pip install '{_EXTRAS.get(protocol, f'fsspec[{protocol}]')}'"
            raise UserError(f"{protocol}:// needs a package that is not installed", where=url, remedy=remedy) from None
        except ValueError as error:
            raise UserError(redact.text(str(error)), where=url, remedy="use a protocol that fsspec supports") from None
        self._root = root.rstrip("/")
        if hasattr(self._fs, "retries"):
            self._fs.retries = 1  # of s3fs and gcsfs: theirs would hide failures from the limit and the metrics

    def read(self, name: str, start: int, stop: int, *, may_end: bool = False) -> bytes:
        """The bytes [start, stop) of a file; with may_end, fewer if the file ends before. StoreError if impossible."""
        if start == stop:
            return b""
        begin, pause, where = time.monotonic(), _FIRST_PAUSE, f"{self.url}/{name}"
        while True:
            left = self.patience - (time.monotonic() - begin)
            try:
                data = self._attempt(name, start, stop, max(left, _FIRST_PAUSE))
                if len(data) == stop - start or (may_end and len(data) < stop - start):
                    return data
                cause = f"{len(data)} bytes instead of {stop - start}"
                if len(data) > stop - start:
                    remedy = "serve the shards from a server that supports range requests"
                    raise StoreError("the server ignores the range of a request", where=where, remedy=remedy)
            except UserError:
                raise
            except Exception as error:  # clients raise errors of their own and of several libraries below them
                if refusal := _refusal(error, where):
                    raise refusal from None
                cause = redact.text(f"{type(error).__name__}: {error}".splitlines()[0])
            self._on_failure()
            left = self.patience - (time.monotonic() - begin)
            if left <= 0:
                what = f"the store failed for {self.patience:g} seconds: {cause}"
                remedy = "check the network and the store; the same command resumes; data.cache.patience sets the limit"
                raise StoreError(what, where=where, remedy=remedy)
            logger.warning("%s: %s; trying again", where, cause)
            time.sleep(min(pause, left))
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _attempt(self, name: str, start: int, stop: int, seconds: float) -> bytes:
        path = f"{self._root}/{name}"
        if isinstance(self._fs, AsyncFileSystem):
            # The time limit also ends an answer that trickles in.
            request: Any = self._fs._cat_file
            return bytes(sync(self._fs.loop, request, path, start=start, end=stop, timeout=seconds))
        return bytes(self._fs.cat_file(path, start=start, end=stop))


def _options(protocol: str, silence: float) -> dict[str, Any]:
    """Options of the client that notice a silent store; retries are ours."""
    if protocol in ("http", "https"):
        import aiohttp

        limits = aiohttp.ClientTimeout(total=None, sock_connect=silence, sock_read=silence)
        # A compressed answer would have other bytes than the range that was asked for.
        return {"client_kwargs": {"timeout": limits, "headers": {"Accept-Encoding": "identity"}}}
    if protocol in ("s3", "s3a"):
        config = {"connect_timeout": silence, "read_timeout": silence, "retries": {"total_max_attempts": 1}}
        return {"config_kwargs": config, "use_listings_cache": False}
    return {}


def _refusal(error: Exception, where: str) -> StoreError | None:
    """The error to raise at once if another attempt cannot succeed."""
    status = getattr(error, "status", None)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        remedy = "upload the shards completely, or correct the path of the source"
        return MissingFile("the store has no such file", where=where, remedy=remedy)
    if isinstance(error, PermissionError) or status in _DEFINITE or type(error).__name__ == "NoCredentialsError":
        cause = redact.text(f"{type(error).__name__}: {error}".splitlines()[0])
        remedy = "give credentials in the environment that may read it (for S3: AWS_ACCESS_KEY_ID, ...)"
        return StoreError(f"the store refuses to read it: {cause}", where=where, remedy=remedy)
    return None
