"""Common parts of all codecs: access to their training media, and the format of a codec folder.

In: source folders `SHARDS/<source>`, each with `<train|heldout>/<modality>/` shards. A codec folder has `config.json`,
whose `kind` identifies the codec, and `model.safetensors`. A folder saved by transformers has `model_type` instead and
can have its weights in shards; tokenizers/hf/load.py reads it.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megamm.common.errors import UserError
from megamm.shards.folder import ShardFolder

logger = logging.getLogger(__name__)

Split = Literal["train", "heldout"]
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class CodecConfig(BaseModel):
    """Sizes of a codec; each kind adds its own and sets `kind`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str


class Codec(Protocol):
    """A torch module built from its config alone; its class attribute `Config` is the config's class."""

    config: Any

    def state_dict(self) -> dict[str, torch.Tensor]: ...


AnyConfig = TypeVar("AnyConfig", bound=CodecConfig)


def checked_config(config: type[AnyConfig], values: dict[str, Any], where: Path | None = None) -> AnyConfig:
    """The config from untrusted values, of the file `where` if any. Raises UserError for the first invalid value."""
    try:
        return config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        what = f"tokenizer config: {'.'.join(map(str, first['loc']))} {first['msg']}".replace(": Value error,", ":")
        raise UserError(what, where=where, remedy="correct this value, or train the tokenizer again") from error


def save_codec(codec: Codec, folder: Path) -> None:
    """Write `config.json` and `model.safetensors` into an existing folder."""
    (folder / "config.json").write_text(codec.config.model_dump_json(indent=2) + "\n")
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in codec.state_dict().items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def read_config(folder: Path, tokenizer: str, remedy: str | None = None) -> dict[str, Any]:
    """A tokenizer folder's config.json. Raises UserError if config or weights are missing, with `remedy` if given.

    tokenizer: its name in a run's `tokenizers`.
    """
    file = folder / "config.json"
    if not (file.is_file() and weight_files(folder)):
        remedy = remedy or f"give a folder made by `megamm tokenizer train {tokenizer}`"
        raise UserError(
            f"not a tokenizer for {tokenizer}: config.json or {WEIGHTS} is missing", where=folder, remedy=remedy
        )
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"unreadable config: {error}", where=file, remedy="restore or retrain it") from error


def weight_files(folder: Path) -> list[Path]:
    """`model.safetensors`, or the shards that its index names, sorted by name; empty if there is neither.

    For a path to a file: this file. Raises UserError if the index is damaged or wrong, if a file is outside the
    folder, or if the only weights are a pickle; pickles can run code and are never read.
    """
    index = folder / INDEX
    if folder.is_file():
        return [folder]
    if (folder / WEIGHTS).is_file():
        return [_inside(folder, WEIGHTS)]
    if index.is_file():
        return _indexed(folder, index)
    pickled = next((path.name for pattern in PICKLES for path in sorted(folder.glob(pattern))), None)
    if pickled is not None:
        remedy = "load it with the library that wrote it, and save it as safetensors with save_pretrained"
        raise UserError(f"{pickled} is a pickle, which can run code", where=folder, remedy=remedy)
    return []


def _indexed(folder: Path, index: Path) -> list[Path]:
    """The shards; each tensor must be in exactly one of them, the one that the index names."""
    try:
        said = dict(json.loads(index.read_text())["weight_map"])
        names = sorted(set(said.values()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        what = f"unreadable index of weights: {error!r}"
        raise UserError(what, where=index, remedy="download or copy the folder again") from None
    if not names:
        what = "the index names no weights"
        raise UserError(what, where=index, remedy="download or copy the folder again")
    files = [_inside(folder, str(name)) for name in names]
    found: dict[str, str] = {}
    for file in files:
        for tensor in tensor_names(file):
            if tensor in found:
                what = f"{tensor} is both in {found[tensor]} and in {file.name}"
                raise UserError(what, where=folder, remedy="download or copy the folder again")
            found[tensor] = file.name
    # The index and the headers must agree on every tensor: with a stale index a wrong weight could be read.
    for tensor in sorted(said.keys() | found.keys()):
        if said.get(tensor) != found.get(tensor):
            is_said, is_so = (side.get(tensor, "no file") for side in (said, found))
            what = f"the index places {tensor} in {is_said}, but it is in {is_so}"
            raise UserError(what, where=index, remedy="download or copy the folder again")
    return files


def tensor_names(file: Path) -> list[str]:
    """Tensor names of a safetensors file. Raises UserError if its header or its length is damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        what, remedy = f"unreadable weights: {error}", "download or copy the file again"
        raise UserError(what, where=file, remedy=remedy) from None


def _inside(folder: Path, name: str) -> Path:
    """A file of the folder. Raises UserError for one outside of it, by its name or through a link.

    Links in a hub's cache may lead from a snapshot to its blobs, and nowhere else.
    """
    path = folder / name
    if Path(name).name != name or not path.is_file():
        what = f"no file {name!r} in this folder"
        raise UserError(what, where=folder, remedy="download or copy the folder again")
    here, real = folder.resolve(), path.resolve()
    blobs = here.parent.parent / "blobs" if here.parent.name == "snapshots" else here
    if real.parent not in (here, blobs):
        what = f"{name} is a link to outside the folder"
        raise UserError(what, where=folder, remedy="replace the link by a copy of the file")
    return path


def codec_id(folder: Path) -> str:
    """First 12 hex digits of the SHA-256 over config and weights."""
    # Over contents only: a copied or moved folder has the same id, and its token caches stay valid.
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in weight_files(folder):
        with file.open("rb") as weights:
            while block := weights.read(2**20):
                digest.update(block)
    return digest.hexdigest()[:12]


def open_media(sources: list[Path], split: Split, modality: str) -> list[ShardFolder]:
    """The shards of one modality in every source that has it. Raises UserError if none has it."""
    folders = []
    for source in sources:
        folder = source / split / modality
        if folder.is_dir():
            folders.append(ShardFolder(folder))
        else:
            logger.info("%s has no %s for %s", source, modality, split)
    if not any(folders):
        remedy = f"give source folders with {split}/{modality}/ in them (made by `megamm data build`)"
        raise UserError(f"no {modality} data found", where=", ".join(map(str, sources)) or None, remedy=remedy)
    return folders


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that is renamed when the block ends without error. Raises UserError if the target exists.

    With many ranks, only the first one's folder is kept.
    """
    if os.environ.get("RANK", "0") != "0":
        with tempfile.TemporaryDirectory() as unused:
            yield Path(unused)
        return
    if target.exists():
        raise UserError("the folder already exists", where=target, remedy="choose another one or delete it first")
    partial = target.with_name(f".{target.name}.partial")
    if partial.exists():  # left by a killed run
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
