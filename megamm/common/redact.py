"""Removes secrets from text that is shown or written for others.

Input: text, or JSON-like data. Output: the same with *** for user and password of a URL, for values after names like
token, password or secret, and for the value of every environment variable with such a name.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
_NAMES = (
    "password|passwd|secret|token|signature|credentials?|api_?key|secret_?key|access_?key(?:_?id)?|private_?key|sig"
)
_NAME = re.compile(rf"(?:^|[^a-z])(?:{_NAMES})$", re.IGNORECASE)
_USER = re.compile(r"(?<=://)[^/\s@\"'<>]+(?=@)")
_ASSIGNED = re.compile(
    rf"((?:^|[^a-z])(?:{_NAMES})[\"']?\s*[=:]\s*[\"']?)([^\s&\"',;}}<>]+)", re.IGNORECASE | re.MULTILINE
)
_SHORTEST = 6


def is_secret_name(name: str) -> bool:
    """Whether a variable or key of this name holds a secret: AWS_SECRET_ACCESS_KEY does, tokens_per_s does not."""
    return _NAME.search(name) is not None


def text(value: str) -> str:
    """Redact a text; secrets from environment variables only if they have 6 characters or more: others may be words."""
    for name, secret in os.environ.items():
        if is_secret_name(name) and len(secret) >= _SHORTEST:
            value = value.replace(secret, HIDDEN)
    return _ASSIGNED.sub(rf"\g<1>{HIDDEN}", _USER.sub(HIDDEN, value))


def values(data: Any) -> Any:
    """Return a copy of JSON-like data, redacted at every depth; numbers are not secrets."""
    if isinstance(data, Mapping):
        return {
            key: HIDDEN if is_secret_name(str(key)) and isinstance(value, str) else values(value)
            for key, value in data.items()
        }
    if isinstance(data, list | tuple):
        return [values(value) for value in data]
    return text(data) if isinstance(data, str) else data
