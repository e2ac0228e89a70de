"""`megamm convert modules EXPORT OUT` splits an export into folders; `megamm convert join` reverses it.

    text_base/          the backbone with only the rows of text and control ids: an export of a text model
    image_decoder/      the visual codec's decoder, ids to pixels (tokenizers/encoder_decoder.py)
    audio_encoder/      the audio codec's encoder, waveform to ids
    multimodal_fusion/  the rows of the media ids `[M, H]`, and in whole/ all files of the export except its weights

text_base and multimodal_fusion together give the export again, bit for bit. Every folder has SHA256SUMS. Parts are
made from an export instead of during the export: they take its size again, and no run is needed to split an export.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megamm.common.errors import UserError
from megamm.config import RunConfig
from megamm.convert.extras import card
from megamm.convert.io.export_folder import (
    METADATA,
    check_digests,
    copy_without_weights,
    export_tokenizer,
    read_metadata,
    write_digests,
)
from megamm.convert.io.safetensors_files import rewrite
from megamm.data.sources.media import ATTRIBUTION
from megamm.model.vocabulary import Vocabulary
from megamm.tokenizers.encoder_decoder import CodecModule, save_module
from megamm.tokenizers.io import WEIGHTS, new_folder

log = logging.getLogger(__name__)
TEXT_BASE, FUSION, WHOLE = "text_base", "multimodal_fusion", "whole"
KIND = "megamm-multimodal-fusion"
CODEC_MODULES: dict[str, tuple[str, CodecModule]] = {
    "image_decoder": ("visual", "decoder"),
    "audio_encoder": ("audio", "encoder"),
}
_ROWS = ("model.embed_tokens.weight", "lm_head.weight")
_REMEDY = "create the parts again with `megamm convert modules`"


def split(export: Path, out: Path) -> list[str]:
    """Write the parts of an export into the new folder `out`; returns their names.

    Raises UserError if it is not an export, has no media, or `out` exists.
    """
    config, vocabulary, metadata = read_metadata(export)
    # Text and control ids come first in every vocabulary with media, so a text model is a prefix of the tables.
    text = Vocabulary(vocabulary.ranges[:2])
    if [part.name for part in text.ranges] != ["text", "control"] or text == vocabulary:
        what = "the vocabulary has no media ids: this is already a text model"
        raise UserError(what, where=export, remedy="give an export with media")
    made = [TEXT_BASE, FUSION]
    with new_folder(out) as folder:
        for name in made:
            (folder / name).mkdir()
        media = _write_text_base(export, folder / TEXT_BASE, metadata, config, text)
        _write_fusion(export, folder / FUSION, media, vocabulary, text.size)
        for name, (tokenizer, module) in CODEC_MODULES.items():
            if tokenizer in config.tokenizers and save_module(
                config.tokenizers[tokenizer], tokenizer, module, folder / name
            ):
                made.append(name)
            else:
                log.info("no %s: there is no %s tokenizer with this module", name, tokenizer)
        for name in made:
            write_digests(folder / name)
    return made


def _write_text_base(
    export: Path, folder: Path, metadata: dict[str, Any], config: RunConfig, text: Vocabulary
) -> dict[str, torch.Tensor]:
    """Write an export of the text model; returns the rows that it lacks."""
    media: dict[str, torch.Tensor] = {}

    def cut(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if name not in _ROWS:
            return {name: tensor}
        media[name] = tensor[text.size :].clone()
        return {name: tensor[: text.size].clone()}

    rewrite(export, folder, cut)
    theirs = json.loads((export / "config.json").read_text()) | {"vocab_size": text.size}
    (folder / "config.json").write_text(json.dumps(theirs, indent=2) + "\n")
    export_tokenizer(config.tokenizers["text"], text, folder)
    shutil.copytree(config.tokenizers["text"], folder / "codecs" / "text")
    for name in ("generation_config.json", ATTRIBUTION):
        if (export / name).is_file():
            shutil.copy(export / name, folder / name)
    # The run's config without media, so that the part is an export of its own.
    run = metadata["config"] | {"tokenizers": {"text": metadata["config"]["tokenizers"]["text"]}}
    run["loss_weights"] = {name: w for name, w in run.get("loss_weights", {}).items() if name == "text"}
    metadata = metadata | {"vocabulary": text.to_json(), "config": run}
    (folder / METADATA).write_text(json.dumps(metadata, indent=1))
    card.write_card(folder, metadata)
    return media


def _write_fusion(
    export: Path, folder: Path, media: dict[str, torch.Tensor], vocabulary: Vocabulary, first: int
) -> None:
    save_file(media, folder / WEIGHTS, metadata={"format": "pt"})
    described = {"kind": KIND, "first_id": first, "vocabulary": vocabulary.to_json()}
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    copy_without_weights(export, folder / WHOLE)


def join(modules: Path, out: Path) -> Path:
    """Join text_base and multimodal_fusion below `modules` into the original export, in the new folder `out`.

    Raises UserError if either is damaged, or they belong to different models.
    """
    base, fusion = modules / TEXT_BASE, modules / FUSION
    for folder in (base, fusion):
        check_digests(folder)
    try:
        described = json.loads((fusion / "config.json").read_text())
        first, media = described["first_id"], load_file(fusion / WEIGHTS)
        theirs, whole = (json.loads((at / "config.json").read_text()) for at in (base, fusion / WHOLE))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"unreadable {FUSION}: {error}", where=fusion, remedy=_REMEDY) from None
    # The text model's config differs from the whole model's only in the size of the vocabulary.
    if theirs | {"vocab_size": whole["vocab_size"]} != whole or theirs["vocab_size"] != first:
        raise UserError(f"{TEXT_BASE} and {FUSION} belong to different models", where=modules, remedy=_REMEDY)

    def put_together(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: torch.cat([tensor, media[name]]) if name in media else tensor}

    with new_folder(out) as folder:
        shutil.copytree(fusion / WHOLE, folder, dirs_exist_ok=True)
        rewrite(base, folder, put_together)
        write_digests(folder)
    return out
