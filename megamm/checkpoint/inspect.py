"""Checkpoints for the tools: in a run's folder, a single folder, in this node's local storage, or at a URL.

`find` turns a command-line argument into `Found` checkpoints; their files are read through the manifest.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megamm.checkpoint import manifest, retention
from megamm.checkpoint.storage import local_files
from megamm.checkpoint.storage.remote import RemoteCheckpoints, RemoteError
from megamm.common import events, redact, urls
from megamm.common.errors import UserError

_REMEDY = "give a run's output folder, a step_XXXXXXXX folder, a run's folder in local storage, or a URL of checkpoints"


@dataclass(frozen=True)
class Found:
    """One checkpoint: a local folder, or (remote given) a folder of remote storage."""

    name: str
    where: str
    folder: Path | None = None
    remote: RemoteCheckpoints | None = None

    @property
    def kind(self) -> str:
        """Storage that has it: "run", "local" or "remote", as in events."""
        return "remote" if self.remote is not None else "run"

    @property
    def step(self) -> int:
        """The step in its name; -1 for a folder with another name."""
        return manifest.step_of(self.name) if manifest.STEP_FOLDER.fullmatch(self.name) else -1

    def listed(self) -> dict[str, manifest.ManifestEntry]:
        """Return its files. UserError if there is no valid manifest."""
        if self.remote is not None:
            return self.remote.listed(self.name)
        assert self.folder is not None
        return manifest.read(self.folder)

    def sizes(self) -> dict[str, int]:
        """Return the sizes of the existing files, in bytes."""
        if self.remote is not None:
            return self.remote.store.files(self.name)
        assert self.folder is not None
        files = (path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in files}

    def state(self) -> bytes:
        """Return its state.json; empty if it has none."""
        if self.remote is not None:
            return self.remote.store.read(f"{self.name}/{manifest.STATE}") or b""
        assert self.folder is not None
        path = self.folder / manifest.STATE
        return path.read_bytes() if path.is_file() else b""

    def age(self) -> float | None:
        """Return the seconds since it was complete; None if unknown."""
        if self.folder is None or not (self.folder / manifest.NAME).is_file():
            return None
        return time.time() - (self.folder / manifest.NAME).stat().st_mtime

    def problem(self) -> str:
        """Return what is wrong by names and sizes alone; "" if nothing is."""
        try:
            listed, sizes = self.listed(), self.sizes()
        except RemoteError:
            raise
        except UserError as error:
            return error.what
        wrong = next((file for file, entry in listed.items() if sizes.get(file) != entry.size), None)
        return f"{wrong} is missing or truncated" if wrong else ""

    def damage(self) -> str:
        """Return what is wrong after comparing the digest of every file; "" if nothing is."""
        found = self.problem()
        if found:
            return found
        with self.here() as folder:
            problems = (manifest.problem_of(folder, file, entry) for file, entry in self.listed().items())
            return next(filter(None, problems), "")

    @contextmanager
    def here(self) -> Iterator[Path]:
        """Yield a local folder with all of its files; a remote checkpoint is copied for the duration of the use."""
        if self.folder is not None:
            yield self.folder
            return
        assert self.remote is not None
        with tempfile.TemporaryDirectory(prefix="megamm-") as temporary:
            for file in self.listed():
                (Path(temporary) / file).parent.mkdir(parents=True, exist_ok=True)
                self.remote.store.get(f"{self.name}/{file}", Path(temporary) / file)
            yield Path(temporary)


class FoundLocal(Found):
    """This node's parts of a step in local storage (checkpoint/storage/local_files.py)."""

    @property
    def kind(self) -> str:
        return "local"

    def listed(self) -> dict[str, manifest.ManifestEntry]:
        """Return its files. UserError unless this node has the parts of all ranks of one save."""
        found = local_files.parts_in(Path(self.where))
        # The first complete save; there is rarely a second one of the same step.
        for save in local_files.whole(found).values():
            return {name: entry for part in save.values() for name, entry in part.files.items()}
        ranks = ", ".join(str(part.rank) for part in found) or "none"
        what = f"this node has only parts of ranks {ranks} of {max((part.world for part in found), default=0)}"
        raise UserError(what, where=self.where, remedy="look for the other parts on the other nodes")

    def age(self) -> float | None:
        """Return the seconds since the last part was complete."""
        times = [path.stat().st_mtime for path in Path(self.where).glob("part_?????.json")]
        return time.time() - max(times) if times else None


def find(text: str, with_local: bool = False) -> list[Found]:
    """Return the checkpoints that an argument names, by step; at least one. UserError if there is none.

    with_local: for a run, also this node's parts in local storage, after the others.
    """
    found = _behind_url(text) if urls.is_url(text) else _in_folder(Path(text))
    found += _of_run_in_local_storage(Path(text)) if with_local and not urls.is_url(text) else []
    if not found:
        raise UserError("no checkpoint found", where=redact.text(text), remedy=_REMEDY)
    return found


def find_one(text: str) -> Found:
    """Return the checkpoint itself, or the newest of a run."""
    return find(text)[-1]


def best_of(found: list[Found]) -> str | None:
    """Return the name of the checkpoint with the lowest held-out loss."""
    losses = {f.name: retention.heldout_loss(f.state()) for f in found if f.step >= 0}
    return retention.best_of(losses)


def _of_run_in_local_storage(run: Path) -> list[Found]:
    roots = [event["folder"] for event in events.read(run) if event["kind"] == "local_tier"]
    return _in_local_storage(Path(roots[-1])) if roots else []


def _in_local_storage(root: Path) -> list[Found]:
    folders = [local_files.folder_of(root, step) for step in local_files.steps_in(root)]
    return [FoundLocal(folder.name, str(folder), folder=folder) for folder in folders]


def _in_folder(path: Path) -> list[Found]:
    # A run's folder in local storage is recognised by its staged files.
    if (path / local_files.STAGED).is_dir() or (path.parent / local_files.STAGED).is_dir():
        root, one = (path, None) if (path / local_files.STAGED).is_dir() else (path.parent, path.name)
        return [found for found in _in_local_storage(root) if one in (None, found.name)]
    if (path / manifest.NAME).is_file() or manifest.STEP_FOLDER.fullmatch(path.name):
        return [Found(path.name, str(path), folder=path)] if path.is_dir() else []
    parent = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    folders = sorted(p for p in parent.glob("step_????????") if manifest.STEP_FOLDER.fullmatch(p.name))
    return [Found(folder.name, str(folder), folder=folder) for folder in folders]


def _behind_url(url: str) -> list[Found]:
    url = urls.checked_url(url)
    parent, _, last = url.rpartition("/")
    one = bool(manifest.STEP_FOLDER.fullmatch(last))
    remote = RemoteCheckpoints(parent if one else url)
    wanted = [
        name for name in remote.store.folders() if (name == last if one else manifest.STEP_FOLDER.fullmatch(name))
    ]
    return [Found(name, f"{remote.store.url}/{name}", remote=remote) for name in wanted]
