"""A store of shards for tests: an HTTP server on the loopback that answers ranges, counts bytes, and fails as asked.

with serve(folder) as store:
    store.url, store.sent, store.requests
    store.fault = lambda request: "cut"       what happens to a request; None: nothing
"""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple


class Request(NamedTuple):
    """A request: its number, and the file and range that it asks for."""

    number: int
    name: str
    start: int
    stop: int


class Store:
    """The server's state; faults: "cut" (half an answer), "damage" (a wrong byte), "hang" (no answer until the server
    ends), "trickle" (a byte, then nothing more), "whole" (the range is ignored), or a status."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.url = folder, ""
        self.requests: list[Request] = []
        self.sent = 0
        self.fault: Callable[[Request], str | int | None] = lambda request: None
        self.ended = threading.Event()
        self._lock = threading.Lock()

    def begin(self, name: str, start: int, stop: int) -> Request:
        """Note a request."""
        with self._lock:
            self.requests.append(Request(len(self.requests), name, start, stop))
            return self.requests[-1]

    def count(self, sent: int) -> None:
        """Note bytes that were sent."""
        with self._lock:
            self.sent += sent


def _handler(store: Store) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            path = store.folder / self.path.lstrip("/")
            if not path.is_file():
                self.send_error(404)
                return
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            size = path.stat().st_size
            start, stop = (int(found[1]), min(int(found[2]) + 1, size)) if found else (0, size)
            request = store.begin(self.path.lstrip("/"), start, stop)
            fault = store.fault(request)
            if isinstance(fault, int):
                self.send_error(fault)
                return
            if fault == "hang":
                store.ended.wait()
                return
            if fault == "whole":
                start, stop = 0, size
            with path.open("rb") as file:
                file.seek(start)
                data = bytearray(file.read(stop - start))
            if fault == "damage":
                data[len(data) // 2] ^= 1
            self.send_response(206)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            part = {"cut": len(data) // 2, "trickle": 1}.get(str(fault), len(data))
            self.wfile.write(data[:part])
            self.wfile.flush()
            store.count(part)
            if fault == "trickle":
                store.ended.wait()
            self.close_connection = part < len(data)

    return Handler


@contextmanager
def serve(folder: Path) -> Iterator[Store]:
    """Serve a folder until the end of the block."""
    store = Store(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(store))
    server.daemon_threads = True
    store.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield store
    finally:
        store.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()
