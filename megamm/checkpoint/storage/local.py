"""Local storage: checkpoints on the nodes' own memory or disks, and how a resuming job finds them again.

A node is the set of ranks that see the same folder `checkpoint.local` (environment variables in it are expanded). Nodes
are distinguished by a random name in that folder, so two launchers on one machine are two nodes if their folders
differ. A step can be resumed if every rank's part of one save is complete on some node; a node fetches files that its
ranks need and that it lacks from another node. Only the run's own parts count: RUN/run_id and the path of RUN identify
the run.
"""

import hashlib
import json
import logging
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megamm.checkpoint import files, manifest
from megamm.checkpoint.storage import local_files, peer
from megamm.checkpoint.storage.local_files import PartRecord
from megamm.common import addresses, events
from megamm.common.collectives import described
from megamm.common.errors import UserError

log = logging.getLogger(__name__)


Needed = Callable[[Path], set[str]]
"""Given a folder without the ranks' tensors, returns the tensor files that this rank reads."""


@dataclass(frozen=True)
class _Held:
    """A part record that a node has, and the node's index in the order."""

    node: int
    step: int
    part: PartRecord


class LocalStorage:
    """This rank's view of the local storage; all ranks call its methods together, except `passed` and `close`."""

    def __init__(self, local: str, run: Path, replicate: bool, group: Any = None) -> None:
        """Join it. UserError if the folder is unusable or shared by several hosts. group: for CPU tensors."""
        self.rank, self.world, self.group = dist.get_rank(), dist.get_world_size(), group
        folder = Path(os.path.expandvars(local))
        if "$" in str(folder):
            raise UserError(
                "checkpoint.local uses an environment variable that is not set", where=folder, remedy="set the variable"
            )
        run_id, key, self.save_id = self._agreed(run)
        self.root, self.key = folder / run_id, key
        self._make(folder)
        self.node = _own_name(folder, "node_id")
        nodes = self._gather((self.node, socket.gethostname()))
        self._check_private(folder, nodes)
        self.order = list(dict.fromkeys(node for node, _ in nodes))
        self.ranks = [rank for rank, (node, _) in enumerate(nodes) if node == self.node]
        self._is_leader = self.rank == self.ranks[0]
        if self._is_leader:
            # Of an earlier attempt; the steps in them stay, because those are hard links to the same files.
            for staged in (self.root / local_files.STAGED).iterdir():
                files.remove_file(staged)
        self.replicates = replicate and len(self.order) > 1
        self.copies = 4 if self.replicates else 3
        """Copies of a rank's state: one being filled, the newest, and an older one in case the newest is damaged; with
        replicas also the newest replicated one."""
        self._held: list[_Held] = []
        self._resumed, self._passed = -1, True
        self._peer = self._start_peer() if self._is_leader and len(self.order) > 1 else None
        self.addresses = self._connect()
        if self.rank == 0:
            self._log(folder, replicate)
            events.record(run, "local_tier", folder=str(self.root.absolute()))

    def _agreed(self, run: Path) -> tuple[str, bytes, str]:
        """Return the run's name, the job's key and this attempt's save id, as chosen by rank 0."""
        chosen: list[Any] = [None]
        if self.rank == 0:
            chosen[0] = (_name_of(run), secrets.token_bytes(32), secrets.token_hex(8))
        dist.broadcast_object_list(chosen, src=0, group=self.group)
        return chosen[0]

    def _make(self, folder: Path) -> None:
        problem = None
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self.root / local_files.STAGED).mkdir(exist_ok=True)
        except OSError as error:
            problem = str(error)
        if (first := next(filter(None, self._gather(problem)), None)) is not None:
            remedy = "set checkpoint.local to a folder that every node can write to, best on a RAM disk (/dev/shm/...)"
            raise UserError(f"checkpoint.local: {first}", where=folder, remedy=remedy, on_all_ranks=True)

    def _gather(self, value: Any) -> list[Any]:
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered

    def _check_private(self, folder: Path, nodes: list[tuple[str, str]]) -> None:
        for node in {node for node, _ in nodes}:
            hosts = sorted({host for name, host in nodes if name == node})
            if len(hosts) > 1:
                raise UserError(
                    f"checkpoint.local is shared by {hosts[0]} and {hosts[1]}",
                    where=folder,
                    remedy="set checkpoint.local to a folder on each node's own RAM disk or NVMe",
                    on_all_ranks=True,
                )

    def _log(self, folder: Path, replicate: bool) -> None:
        why = f"on the next of {len(self.order)} nodes" if self.replicates else "none: checkpoint.replicate is off"
        if replicate and not self.replicates:
            why = "none: there is only one node"
        log.info("local storage %s, %d copies of each rank's state, replicas %s", folder, self.copies, why)
        others = [p.name for p in folder.iterdir() if p.is_dir() and p != self.root]
        if others:
            log.warning("%s also contains %d other runs: %s", folder, len(others), ", ".join(sorted(others)[:5]))

    # --- the helper process ---

    def _start_peer(self) -> "tuple[subprocess.Popen[str], str, int]":
        bind, name = _addresses()
        command = [sys.executable, "-m", "megamm.checkpoint.storage.peer", str(os.getpid())]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps({"root": str(self.root), "key": self.key.hex(), "host": bind}) + "\n")
        process.stdin.flush()
        return process, name, int(json.loads(process.stdout.readline())["port"])

    def _connect(self) -> list[peer.Address]:
        """Return the addresses of all nodes' helper processes, in node order; empty with a single node."""
        own = (self.node, *self._peer[1:]) if self._peer else None
        found = {node: (host, port) for node, host, port in filter(None, self._gather(own))}
        return [found[node] for node in self.order if node in found]

    @property
    def writer_settings(self) -> dict[str, Any]:
        """Settings for this rank's writer (checkpoint/writer.py); `key` is a secret of the job."""
        settings = {"root": str(self.root), "save": self.save_id, "node": self.node}
        if not self.replicates:
            return settings
        # A ring: each node keeps the replicas of the one before it, so that two neighbours must be lost to lose a part.
        next_node = self.addresses[(self.order.index(self.node) + 1) % len(self.order)]
        return settings | {"peer": next_node, "key": self.key.hex()}

    def begin(self, resumed: int) -> None:
        """Remove every step except the one that the run resumes from (-1: none), at a start or after a roll-back."""
        dist.barrier(group=self.group)
        if self._is_leader:
            for step in local_files.steps_in(self.root):
                if step != resumed:
                    local_files.remove(self.root, step)
        dist.barrier(group=self.group)
        self._resumed, self._passed = resumed, False

    def passed(self, step: int) -> None:
        """Note that all ranks have this step: the step that the run resumed from may be removed."""
        if self._is_leader and not self._passed and step > self._resumed:
            for old in [s for s in local_files.steps_in(self.root) if s <= self._resumed]:
                local_files.remove(self.root, old)
            self._passed = True

    def leave(self, is_saved: bool, ranks: Collection[int] | None = None) -> None:
        """Remove all that the run has here, if on every rank its newest state is saved in the run's folder.

        ranks: only on the nodes of these ranks.
        """
        is_meant = ranks is None or not set(ranks).isdisjoint(self.ranks)
        if all(self._gather(is_saved)) and self._is_leader and is_meant:
            self.close()  # otherwise a replica that is being sent would be written here afterwards
            files.remove_tree(self.root)

    def close(self) -> None:
        """Kill the helper process; the files stay."""
        if self._peer:
            process, self._peer = self._peer[0], None
            process.kill()
            process.wait()
            assert process.stdin is not None and process.stdout is not None
            process.stdin.close()
            process.stdout.close()

    # --- finding and fetching ---

    def steps(self) -> list[int]:
        """Return the steps that the nodes together have, by their part records (`restore` verifies the files)."""
        own: list[tuple[int, PartRecord]] = []
        if self._is_leader:
            for step in local_files.steps_in(self.root):
                own += [(step, part) for part in local_files.parts_in(local_files.folder_of(self.root, step))]
        index = self.order.index(self.node)
        gathered = self._gather([_Held(index, step, part) for step, part in own])
        self._held = [held for of_rank in gathered for held in of_rank]
        return sorted(step for step in {h.step for h in self._held} if self._whole(step))

    def _whole(self, step: int) -> dict[str, dict[int, PartRecord]]:
        return local_files.whole(held.part for held in self._held if held.step == step)

    def restore(self, step: int, needed: Needed) -> Path:
        """Return a folder on this node with all that its ranks need. The same UserError on all ranks if that fails.

        needed: returns names by their path in the folder.
        """
        folder = local_files.folder_of(self.root, step)
        saves = self._whole(step)
        save = min(saves)  # if several are complete, all ranks must choose the same one
        files = {name: entry for part in saves[save].values() for name, entry in part.files.items()}
        holders = self._verified(step, save, files)
        lost = next((name for name in sorted(files) if name not in holders), None)
        if lost is not None:
            what = f"damaged checkpoint: no node has a valid {lost} of step {step}"
            raise UserError(what, where=folder, remedy="an older checkpoint is used", on_all_ranks=True)
        # What every rank reads besides tensors; `needed` reads the index from there.
        small = {n for n in files if not n.startswith(("tensors/__", "rng_"))} | {f"rng_{self.rank:05d}.safetensors"}
        self._fetch(step, small & files.keys(), files, holders)
        self._fetch(step, needed(folder) & files.keys(), files, holders)
        return folder

    def _verified(self, step: int, save: str, files: dict[str, manifest.ManifestEntry]) -> dict[str, list[int]]:
        """Return, for each file, the nodes that have a valid copy; the ranks of a node share the reading."""
        index = self.order.index(self.node)
        mine = [h.part for h in self._held if (h.node, h.step, h.part.save) == (index, step, save)]
        names = sorted({name for part in mine for name in part.files})
        share = names[self.ranks.index(self.rank) :: len(self.ranks)]
        folder = local_files.folder_of(self.root, step)
        whole = [name for name in share if manifest.is_whole(folder / name, files[name])]
        holders: dict[str, list[int]] = {}
        for node, found in self._gather((index, whole)):
            for name in found:
                holders.setdefault(name, []).append(node)
        return holders

    def _fetch(
        self, step: int, wanted: set[str], files: dict[str, manifest.ManifestEntry], holders: dict[str, list[int]]
    ) -> None:
        """Fetch the files that this node's ranks need and it lacks, a share per rank. The same error on all ranks."""
        index, folder = self.order.index(self.node), local_files.folder_of(self.root, step)
        everyone = self._gather(wanted)
        missing = sorted({n for rank in self.ranks for n in everyone[rank] if index not in holders[n]})
        problem = None
        for i, name in enumerate(missing):
            if i % len(self.ranks) != self.ranks.index(self.rank):
                continue
            # Files are fetched from their holders in turn, so that no node sends all of them.
            source = holders[name][i % len(holders[name])]
            try:
                peer.get(self.addresses[source], self.key, step, name, files[name], folder / name)
            except UserError as error:
                problem = problem or described(error)
        first = next((p for p in self._gather(problem) if p), None)
        if first is not None:
            raise UserError(**first, on_all_ranks=True)
        for name in missing:
            holders[name].append(index)


def _own_name(folder: Path, file: str) -> str:
    """Return a random name that is stored in a file of the folder: the same for all processes that see the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path, mine = folder / file, secrets.token_hex(8)
    temporary = folder / f".{file}.{mine}"
    temporary.write_text(mine)
    # link(2) fails if the name exists: the first process decides, and the file is never seen without its contents.
    try:
        os.link(temporary, path)
    except FileExistsError:
        mine = path.read_text().strip()
    finally:
        temporary.unlink()
    return mine


def _name_of(run: Path) -> str:
    """Return a name for the run at its path: a copy of its folder has the same id file, but must not find its steps."""
    return hashlib.sha256(f"{_own_name(run, 'run_id')} {run.resolve()}".encode()).hexdigest()[:16]


def _addresses() -> tuple[str, str]:
    """Return the address to listen on, and the name by which other nodes reach it."""
    master = os.environ["MASTER_ADDR"]
    if addresses.is_local(master):
        return addresses.LOOPBACK, addresses.LOOPBACK
    own = addresses.routed(master)
    # The first node may reach itself by loopback; the others reach it by MASTER_ADDR.
    return ("", master) if own is None or addresses.is_loopback(own) else (own, own)
