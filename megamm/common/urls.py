"""URLs of checkpoints and data: which are valid, and how they are written into logs, without secrets."""

import os
import re

from megamm.common.errors import UserError

_URL = re.compile(r"(?P<protocol>[a-z][a-z0-9+.-]*)://[^@?#\s]*")
_USER = re.compile(r"(?<=://)[^/\s]*@")
_QUERY = re.compile(r"(?<=\w)\?\S*")
_SECRET_VARIABLE = re.compile("SECRET|TOKEN|PASSWORD|ACCESS_KEY|CREDENTIAL")


def redacted(text: str) -> str:
    """Return the text without users, passwords and queries of URLs, and without the values of secret variables."""
    for name, value in os.environ.items():
        if _SECRET_VARIABLE.search(name.upper()) and len(value) >= 8:
            text = text.replace(value, "***")
    return _QUERY.sub("", _USER.sub("", text))


def checked_url(url: str) -> str:
    """Return the URL if it is valid and has no secret; UserError (which does not repeat the secret) otherwise."""
    if "::" in url or not _URL.fullmatch(url):
        secret = "@" in url or "?" in url or "#" in url
        raise UserError(
            "a URL must not contain a user, password or query"
            if secret
            else f"{redacted(url)!r} is not a URL like s3://bucket/x",
            where=redacted(url),
            remedy="give credentials in the environment (for S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
            if secret
            else "give for example s3://bucket/prefix or file:///mnt/folder",
        )
    return url.rstrip("/")


def is_url(text: str) -> bool:
    """Whether a command-line argument is a URL; otherwise it is a path."""
    return "://" in text
