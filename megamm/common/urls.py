"""URLs of checkpoints and data: which are valid."""

import re
from pathlib import Path

from megamm.common import redact
from megamm.common.errors import UserError

_URL = re.compile(r"(?P<protocol>[a-z][a-z0-9+.-]*)://[^@?#\s]*")


def checked_url(url: str) -> str:
    """Return the URL if it is valid and has no secret; UserError (which does not repeat the secret) otherwise."""
    if "::" in url or not _URL.fullmatch(url):
        secret = "@" in url or "?" in url or "#" in url
        raise UserError(
            "a URL must not contain a user, password or query"
            if secret
            else f"{redact.text(url)!r} is not a URL like s3://bucket/x",
            where=redact.text(url),
            remedy="give credentials in the environment (for S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
            if secret
            else "give for example s3://bucket/prefix or file:///mnt/folder",
        )
    return url.rstrip("/")


def is_url(text: str) -> bool:
    """Whether a command-line argument is a URL; otherwise it is a path."""
    return "://" in text


_URL_AS_PATH = re.compile(r"[a-z][a-z0-9+.-]+:")


def url_of(path: Path) -> str | None:
    """The URL that this path was made from, as `Path("s3://bucket/x")`, which keeps one slash; None for a path."""
    if not _URL_AS_PATH.fullmatch(path.parts[0] if path.parts else ""):
        return None
    slashes = "///" if path.parts[0] == "file:" else "//"
    return path.parts[0] + slashes + "/".join(path.parts[1:])


def shown(path: Path) -> str | Path:
    """The URL or path, for messages."""
    return url_of(path) or path
