"""What a rank and its writer say to each other over pipes: a JSON line, then the raw bytes of the files it names."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

Message = dict[str, Any]
Files = dict[str, bytes]


def encode(message: Message, contents: Mapping[str, bytes]) -> bytes:
    """One message with files' contents."""
    lengths = {name: len(data) for name, data in contents.items()}
    return json.dumps(message | {"contents": lengths}).encode() + b"\n" + b"".join(contents.values())


def read(stream: BinaryIO) -> Iterator[tuple[Message, Files]]:
    """All messages until the other side closes; one cut off in the middle is none."""
    for line in stream:
        message = json.loads(line)
        contents = {name: stream.read(length) for name, length in message.pop("contents").items()}
        yield message, contents
