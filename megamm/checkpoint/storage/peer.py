"""File transfer between nodes over TCP: `Server` serves a node's folder, `put` sends a part, `get` fetches a file.

Both sides prove that they know the job's key (HMAC challenge of multiprocessing.connection) before a request is read.
Requests are JSON and files are raw chunks: nothing is unpickled. Names are checked to stay in their folder.

    python -m megamm.checkpoint.storage.peer PARENT     (started by local.py, one process per node)

serves the node's folder, and so receives the replicas of other nodes. It reads its settings as a JSON line on stdin and
exits when stdin closes; it writes the TCP port as a JSON line to stdout.
"""

import json
import logging
import os
import sys
import threading
import uuid
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

from megamm.checkpoint import manifest
from megamm.checkpoint.manifest import ManifestEntry
from megamm.checkpoint.storage import local_files
from megamm.common import processes
from megamm.common.errors import UserError

CHUNK = 1 << 22
_LONGEST_REQUEST = 1 << 26
Address = tuple[str, int]


class WireError(UserError):
    """A transfer failed: the other node is gone or refused it, or the file is incomplete."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(what, where=where, remedy="check that node; other copies are tried")


class Server:
    """Serves requests for one folder (local_files.py) in threads."""

    def __init__(self, root: Path, key: bytes, host: str) -> None:
        self.root, self.key = root, key
        # Without the listener's own handshake, in which one silent client would block all others.
        self.listener = Listener((host, 0), backlog=128)
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def port(self) -> int:
        """The TCP port."""
        return int(self.listener.address[1])

    def _accept(self) -> None:
        while True:
            connection = self.listener.accept()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: "Connection[Any, Any]") -> None:
        with connection:
            try:
                deliver_challenge(connection, self.key)
                answer_challenge(connection, self.key)
                request = json.loads(connection.recv_bytes(_LONGEST_REQUEST))
                if request["do"] == "get":
                    self._send(connection, request)
                else:
                    self._receive(connection, request)
                    _send_json(connection, {"done": True})
            except (AuthenticationError, OSError, EOFError, ValueError, KeyError):
                return  # the other side sees the closed connection and reports its request

    def _folder(self, request: dict[str, Any]) -> Path:
        return local_files.folder_of(self.root, int(request["step"]))

    def _send(self, connection: "Connection[Any, Any]", request: dict[str, Any]) -> None:
        name = str(request["name"])
        if not manifest.stays_inside(name):
            raise ValueError(name)
        with (self._folder(request) / name).open("rb") as file:
            while chunk := file.read(CHUNK):
                connection.send_bytes(chunk)

    def _receive(self, connection: "Connection[Any, Any]", request: dict[str, Any]) -> None:
        """Receive a rank's part; remove its parts older than `floor`, which have been replaced everywhere."""
        part, folder = local_files.PartRecord.from_json(request["part"]), self._folder(request)
        # Without its record the part is not valid while its files are replaced.
        local_files.part_path(folder, part.rank).unlink(missing_ok=True)
        for name, entry in part.files.items():
            _write(connection, folder / name, entry)
        local_files.commit(folder, part)
        for step in local_files.steps_in(self.root):
            theirs = (
                local_files.parts_in(local_files.folder_of(self.root, step)) if step < int(request["floor"]) else []
            )
            if any((p.rank, p.node) == (part.rank, part.node) for p in theirs):
                local_files.retire(self.root, step, part.rank)


def put(address: Address, key: bytes, root: Path, step: int, rank: int, floor: int) -> None:
    """Send a rank's files and part record; floor: see Server._receive. WireError if the transfer fails."""
    folder = local_files.folder_of(root, step)
    try:
        part = local_files.PartRecord.from_json(json.loads(local_files.part_path(folder, rank).read_bytes()))
        with Client(address, authkey=key) as connection:
            _send_json(connection, {"do": "put", "step": step, "part": part.to_json(), "floor": floor})
            for name in part.files:
                with (folder / name).open("rb") as file:
                    while chunk := file.read(CHUNK):
                        connection.send_bytes(chunk)
            connection.recv_bytes(CHUNK)
    except (OSError, EOFError, AuthenticationError, ValueError) as error:
        raise WireError(
            f"replica of step {step}: {type(error).__name__} {error}", f"{address[0]}:{address[1]}"
        ) from None


def get(address: Address, key: bytes, step: int, name: str, entry: ManifestEntry, target: Path) -> None:
    """Fetch one file and verify it. WireError if the transfer fails."""
    try:
        with Client(address, authkey=key) as connection:
            _send_json(connection, {"do": "get", "step": step, "name": name})
            _write(connection, target, entry)
    except (OSError, EOFError, AuthenticationError, ValueError) as error:
        why = f"{name} of step {step}: {type(error).__name__} {error}"
        raise WireError(why, f"{address[0]}:{address[1]}") from None


def _send_json(connection: "Connection[Any, Any]", value: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps(value).encode())


def _write(connection: "Connection[Any, Any]", path: Path, entry: ManifestEntry) -> None:
    """Write a file of known size from chunks; rename it once its digest is verified. ValueError if it differs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex}")
    hasher, left = manifest.hasher(), entry.size
    try:
        with temporary.open("wb") as file:
            while left > 0:
                chunk = connection.recv_bytes(CHUNK)
                hasher.update(chunk)
                file.write(chunk)
                left -= len(chunk)
        if left or hasher.hexdigest() != entry.digest:
            raise ValueError(f"{path.name} fails its checksum")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def main() -> None:
    """Serve until the process that started it exits or closes stdin."""
    processes.die_with_parent(int(sys.argv[1]))
    processes.ignore_stop_signals()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    settings = json.loads(sys.stdin.readline())
    server = Server(Path(settings["root"]), bytes.fromhex(settings["key"]), settings["host"])
    print(json.dumps({"port": server.port}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
