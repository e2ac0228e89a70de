"""Removes secrets from text that is shown or written for others.

Input: text, or JSON-like data. Output: the same with *** for user, password and query of a URL, for values after names
like token, password or secret, and for the value of every environment variable with such a name.
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
# Anywhere in the name, as in PGPASSWORD or TOKEN_2. A tokenizer and a number of tokens are not secrets.
_VARIABLE = re.compile(
    "PASSWORD|PASSWD|SECRET|TOKEN(?!S|I[SZ])|SIGNATURE|CREDENTIAL|(API|ACCESS|PRIVATE)_?KEY", re.IGNORECASE
)
_USER = re.compile(r"(?<=://)[^/\s\"'<>]+(?=@)")
_QUERY = re.compile(r"(://[^\s\"'<>?]*\?)[^\s\"'<>]+")
_ASSIGNED = re.compile(
    rf"((?:^|[^a-z])(?:{_NAMES})[\"']?\s*[=:]\s*[\"']?)([^\s&\"',;}}<>]+)", re.IGNORECASE | re.MULTILINE
)
_SHORTEST = 6


def text(value: str) -> str:
    """Redact a text; secrets from environment variables only if they have 6 characters or more: others may be words."""
    for name, secret in os.environ.items():
        if _VARIABLE.search(name) and len(secret) >= _SHORTEST:
            value = value.replace(secret, HIDDEN)
    value = _QUERY.sub(rf"\g<1>{HIDDEN}", _USER.sub(HIDDEN, value))
    return _ASSIGNED.sub(rf"\g<1>{HIDDEN}", value)


def values(data: Any) -> Any:
    """Return a copy of JSON-like data, redacted at every depth; numbers are not secrets.

    A key that ends with such a name holds a secret: AWS_SECRET_ACCESS_KEY does, tokens_per_s does not.
    """
    if isinstance(data, Mapping):
        return {
            key: HIDDEN if _NAME.search(str(key)) and isinstance(value, str) else values(value)
            for key, value in data.items()
        }
    if isinstance(data, list | tuple):
        return [values(value) for value in data]
    return text(data) if isinstance(data, str) else data
