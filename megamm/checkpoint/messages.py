"""Messages between a rank and its writer over pipes: a JSON line, then the raw bytes of the files that it names."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

Message = dict[str, Any]
Files = dict[str, bytes]


def encode(message: Message, contents: Mapping[str, bytes]) -> bytes:
    """Encode one message with the contents of files."""
    lengths = {name: len(data) for name, data in contents.items()}
    return json.dumps(message | {"contents": lengths}).encode() + b"\n" + b"".join(contents.values())


def read(stream: BinaryIO) -> Iterator[tuple[Message, Files]]:
    """Yield all messages until the other side closes the pipe."""
    for line in stream:
        message = json.loads(line)
        contents = {name: stream.read(length) for name, length in message.pop("contents").items()}
        yield message, contents
