"""`megamm generate` on files: reads prompts and files, or a file of requests, and writes the generated media.

Each request has its own prompt, modality and output; a prompt has one part or several, of any modalities. All are
checked before the model is loaded. An output gets its final name when it is complete.
"""

import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megamm.common.errors import UnreadableMedia, UserError
from megamm.convert.io.export_folder import METADATA, LoadedExport, open_export
from megamm.data.raw.extensions import ALIASES
from megamm.inference.generate import BATCH, Prompt, Sampling, generate_from, modality_in
from megamm.modalities import REGISTRY

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Medium:
    """An input given by the user; `where` names it in messages."""

    data: bytes
    extension: str
    where: str
    modality: str

    @classmethod
    def of_prompt(cls, prompt: str) -> "Medium":
        """Return a text given on the command line or in a request."""
        # What is not UTF-8 (bytes from the shell, half a surrogate pair in JSON) is kept, so that it is rejected later.
        return cls(prompt.encode("utf-8", "surrogatepass"), "txt", f"prompt {prompt!r}", "text")

    @classmethod
    def of_file(cls, path: Path) -> "Medium":
        """Read a file. UserError if no modality has its extension, or it cannot be read."""
        modality, ending = modality_of(path), path.suffix[1:].lower()
        try:
            return cls(path.read_bytes(), ALIASES.get(ending, ending), str(path), modality)
        except OSError as error:
            raise UserError(f"cannot read: {error.strerror}", where=path, remedy="give a readable file") from error


def generate_files(
    folder: Path,
    prompts: list[tuple[Medium, ...]],
    target: str,
    out: Path | None,
    sampling: Sampling,
    device: torch.device,
    on_text: Callable[[str], None] | None = None,
) -> list[Any]:
    """Generate with the export in `folder`, and write `out`: a file, or for several prompts a folder of 000.png, ...

    Return the generated media. on_text: gets the text of a single prompt as it is generated. UserError, before any
    model is loaded, if an input or `out` is invalid.
    """
    for prompt in prompts:
        _check_media(prompt)
    if target not in REGISTRY:
        raise UserError(f"unknown modality {target!r}", remedy=f"use one of {', '.join(REGISTRY)}")
    if out is None and target != "text":
        raise UserError(f"no output given for {target}", remedy="add --out")
    if out is not None:
        _check_out(out, target, len(prompts))
    export = open_export(folder, device)
    made = generate_from(export, [_read(export, prompt) for prompt in prompts], target, sampling, on_text)
    if out is not None:
        _write([export.modalities[target].write_media(medium) for medium in made], target, out)
    return made


def _read(export: LoadedExport, prompt: tuple[Medium, ...]) -> Prompt:
    """Read the media of a prompt. UserError if the export lacks a modality."""
    return [
        (part.modality, modality_in(export, part.modality).read_media(part.data, part.extension)) for part in prompt
    ]


@dataclass(frozen=True)
class Request:
    """One line of a file of requests: generate the modality `target` from a prompt, and write it to `out`."""

    prompt: tuple[Medium, ...]
    target: str
    out: Path
    is_done: bool = False
    """Whether the output exists already, from an interrupted command."""


def read_requests(file: Path, resume: bool = False) -> list[Request]:
    """Read requests from a file of JSON lines: {"prompt": TEXT or "from": FILE, "to": MODALITY, "out": FILE}.

    Instead, {"parts": [{"prompt": TEXT}, {"from": FILE}, ...], "to": ..., "out": ...} is one prompt of several parts.
    Relative paths are relative to the folder of `file`. UserError for the first line that is not a request, and for an
    output that exists (unless `resume`) or is used twice.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the requests: {error}", where=file, remedy="give a readable file") from error
    requests: list[Request] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            requests.append(_request(line, f"{file}:{number}", file.parent, resume))
    if not requests:
        raise UserError("no requests", where=file, remedy='add a line {"prompt": TEXT, "to": "image", "out": FILE}')
    for out, count in Counter(request.out for request in requests).items():
        if count > 1:
            raise UserError(f"{count} requests write the same file", where=out, remedy="give each its own `out`")
    return requests


def _request(line: str, where: str, folder: Path, resume: bool) -> Request:
    remedy = 'write {"prompt": TEXT, "to": "image", "out": FILE}, or "from": FILE in place of "prompt"'
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise UserError(f"not JSON: {error}", where=where, remedy=remedy) from error
    if not isinstance(entry, dict) or not all(isinstance(entry[key], str) for key in entry if key != "parts"):
        raise UserError("not a JSON object of strings", where=where, remedy=remedy)
    given = {"prompt", "from", "parts"} & set(entry)
    if len(given) != 1 or set(entry) - given != {"to", "out"}:
        raise UserError(f"wrong keys: {', '.join(sorted(entry)) or 'missing'}", where=where, remedy=remedy)
    if entry["to"] not in REGISTRY:
        remedy = f"use one of {', '.join(REGISTRY)}"
        raise UserError(f"unknown modality {entry['to']!r}", where=where, remedy=remedy)
    out = folder / entry["out"]
    is_done = resume and out.is_file()
    if not is_done:
        _check_out(out, entry["to"], 1)
    parts = entry["parts"] if "parts" in entry else [{key: entry[key] for key in given}]
    if not isinstance(parts, list) or not parts or not all(map(_is_part, parts)):
        raise UserError("wrong parts", where=where, remedy='write "parts": [{"prompt": TEXT}, {"from": FILE}]')
    media = [Medium.of_prompt(p["prompt"]) if "prompt" in p else Medium.of_file(folder / p["from"]) for p in parts]
    return Request(tuple(media), entry["to"], out, is_done)


def _is_part(part: Any) -> bool:
    return isinstance(part, dict) and len(part) == 1 and isinstance(part.get("prompt", part.get("from")), str)


def generate_requests(
    folder: Path, requests: list[Request], sampling: Sampling, device: torch.device, progress: Path
) -> None:
    """Generate all requests that are not done with the export in `folder`, in batches of the same direction.

    Within a direction, item i uses seed + i, also if items before it are done. Outputs are written after each batch, so
    that an interrupted command loses one batch. progress: the file that notes what the outputs are made with.
    UserError, before any model is loaded, for an invalid input, or if there are outputs of another export or settings.
    """
    directions: dict[tuple[tuple[str, ...], str], list[Request]] = {}
    for request in requests:
        # Before the model is loaded, which takes long: a broken input ends the command at once.
        _check_media(request.prompt)
        directions.setdefault((tuple(part.modality for part in request.prompt), request.target), []).append(request)
    if sampling.stop and all(request.target != "text" for request in requests):
        raise UserError("stop strings end text, and no request is for text", remedy="remove --stop")
    done = sum(request.is_done for request in requests)
    _note_progress(progress, folder, sampling, done > 0)
    if done == len(requests):
        return
    export = open_export(folder, device)
    for (_, target), same in directions.items():
        sampled = sampling if target == "text" else replace(sampling, stop=())
        pending = [(number, request) for number, request in enumerate(same) if not request.is_done]
        for first in range(0, len(pending), BATCH):
            batch = pending[first : first + BATCH]
            prompts = [_read(export, request.prompt) for _, request in batch]
            made = generate_from(export, prompts, target, sampled, numbers=[number for number, _ in batch])
            for (_, request), medium in zip(batch, made, strict=True):
                _write([export.modalities[target].write_media(medium)], target, request.out)
            done += len(batch)
            log.info("%d of %d requests are complete", done, len(requests))


def _note_progress(noted: Path, folder: Path, sampling: Sampling, has_outputs: bool) -> None:
    """Note export and settings; UserError if there are outputs of others."""
    try:
        digest = hashlib.sha256((folder / METADATA).read_bytes()).hexdigest()
    except OSError:
        return  # open_export names what is wrong
    ours = {"export": digest, "sampling": json.loads(json.dumps(asdict(sampling)))}
    if has_outputs and noted.is_file():
        try:
            theirs = json.loads(noted.read_bytes())
        except ValueError:
            theirs = None
        if theirs != ours:
            what = "--resume: the outputs so far are of another export or of other settings"
            raise UserError(what, where=noted, remedy="use the same ones, or remove the outputs and this file")
    partial = noted.with_name(f".{noted.name}.partial")
    partial.write_text(json.dumps(ours, indent=1) + "\n")
    partial.rename(noted)


def modality_of(path: Path) -> str:
    """Return the modality of a file, by its extension. UserError if no modality reads it."""
    ending = path.suffix[1:].lower()
    for name, modality in REGISTRY.items():
        if ALIASES.get(ending, ending) in modality.extensions:
            return name
    known = ", ".join(f".{ending}" for modality in REGISTRY.values() for ending in modality.extensions)
    raise UserError(f"no modality reads .{ending} files", where=path, remedy=f"use one of {known}")


def _check_media(prompt: tuple[Medium, ...]) -> None:
    """Decode every part of a prompt. UserError for the first that fails."""
    for part in prompt:
        try:
            REGISTRY[part.modality].check_media(part.data, part.extension)
        except UnreadableMedia as error:
            what, remedy = f"unusable {part.modality}: {error}", f"give another {part.modality}"
            raise UserError(what, where=part.where, remedy=remedy) from error


def _check_out(out: Path, target: str, items: int) -> None:
    """Raise UserError if `out` exists, or its extension is not that of the target's files."""
    if out.exists():
        raise UserError("the output exists", where=out, remedy="remove it or choose another output")
    ending = f".{REGISTRY[target].extensions[0]}"
    if items == 1 and out.suffix != ending:
        raise UserError(f"{target} is written as {ending}", where=out, remedy=f"use the extension {ending}")


def _write(media: list[bytes], target: str, out: Path) -> None:
    """Write one file, or a folder of 000.png, 001.png, ...; it gets its name when complete."""
    partial = out.with_name(f".{out.name}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    if len(media) == 1:
        partial.write_bytes(media[0])
    else:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for i, data in enumerate(media):
            (partial / f"{i:03d}.{REGISTRY[target].extensions[0]}").write_bytes(data)
    partial.rename(out)
