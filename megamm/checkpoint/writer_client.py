"""The rank's side of its writer process (writer.py): start, jobs, answers, exit; and the messages between the two.

A message to the writer is a JSON line, then the raw bytes of the files that it names. An answer is a JSON line. This
module does not import torch, because the writer reads its messages with it.
"""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

COMMAND = (sys.executable, "-m", "megamm.checkpoint.writer")

Message = dict[str, Any]
Files = dict[str, bytes]


def encode(message: Message, contents: Mapping[str, bytes]) -> bytes:
    """Encode one message with the contents of files."""
    lengths = {name: len(data) for name, data in contents.items()}
    return json.dumps(message | {"contents": lengths}).encode() + b"\n" + b"".join(contents.values())


def messages(stream: BinaryIO) -> Iterator[tuple[Message, Files]]:
    """Yield all messages until the other side closes the pipe."""
    for line in stream:
        message = json.loads(line)
        contents = {name: stream.read(length) for name, length in message.pop("contents").items()}
        yield message, contents


class WriterProcess:
    """A writer process without device and torch, in its own session, so that it does not receive Ctrl-C."""

    def __init__(self, descriptor: int, size: int) -> None:
        """descriptor, size: the shared memory (staging.py)."""
        package = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [*COMMAND, str(descriptor), str(size), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[descriptor],
            env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,
        )
        self.rest = b""

    def send(self, message: Message, contents: Mapping[str, bytes]) -> None:
        """Send a job. BrokenPipeError if the process has exited."""
        assert self.process.stdin is not None
        self.process.stdin.write(encode(message, contents))
        self.process.stdin.flush()

    def answers(self, seconds: float | None = 0.0) -> list[Message]:
        """Return its answers since the last call; wait up to `seconds` (None: for ever). EOFError: it has exited."""
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        waiting = select.poll()  # select() takes no descriptor above 1023
        waiting.register(descriptor, select.POLLIN)
        if not waiting.poll(None if seconds is None else 1000 * seconds):
            return []
        data = os.read(descriptor, 1 << 16)
        if not data:
            code = self.process.wait()
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise EOFError(f"the writer process ended with {how}")
        *lines, self.rest = (self.rest + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self, grace: float) -> None:
        """Send no more jobs: the process exits when it has done its jobs, or is killed after `grace` seconds."""
        assert self.process.stdin is not None and self.process.stdout is not None
        end = time.monotonic() + grace
        try:
            self.process.stdin.close()
            # Its answers are read to the end: it would block at a full pipe.
            while self.answers(max(0.0, end - time.monotonic())):
                continue
        except (BrokenPipeError, EOFError):
            pass
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdout.close()
