"""A tiny random export with its codecs, and shards with token caches, as the real commands write them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from codec_data import write_source
from transformers import AutoModelForCausalLM

from megamm.config import RunConfig, config_from_dict
from megamm.convert.families.config import family_for, to_config
from megamm.convert.io.export_folder import LoadedExport, export_tokenizer, open_export
from megamm.data.pipeline.run_data import load_modalities, vocabulary_of
from megamm.data.tokenize.token_cache import tokenize
from megamm.model.vocabulary import Vocabulary
from megamm.tokenizers.audio.model import AudioCodec, AudioCodecConfig
from megamm.tokenizers.io import save_codec
from megamm.tokenizers.text.train import train_text_tokenizer
from megamm.tokenizers.visual.model import VisualCodec, VisualCodecConfig

IMAGE_TOKENS = 16
CPU = torch.device("cpu")


def make_export(folder: Path, train: int = 24, heldout: int = 12, *, audio: bool = False, **model: Any) -> Path:
    """Write `folder/export` of random weights (step 0) and `folder/shards/shapes`, tokenised with its codecs.

    audio: add an audio codec, for which the shards have no data. model: other values of the model section.
    """
    source = write_source(folder / "shards" / "shapes", train, heldout)
    codecs = folder / "export" / "codecs"
    train_text_tokenizer([source], codecs / "text", vocabulary_size=270)
    (codecs / "visual").mkdir()
    torch.manual_seed(0)
    image = VisualCodecConfig(image_size=32, downsample=8, width=16, decoder_depth=0, encoder_depth=0, levels=(4, 4, 4))
    assert image.grid_size**2 == IMAGE_TOKENS
    save_codec(VisualCodec(image), codecs / "visual")
    if audio:
        (codecs / "audio").mkdir()
        save_codec(
            AudioCodec(AudioCodecConfig(sample_rate=4000, width=16, codebooks=2, levels=(4, 4))), codecs / "audio"
        )
    config = _config(folder, source, codecs, model)
    modalities = load_modalities(config.tokenizers)
    tokenize([source], [modality for name, modality in modalities.items() if name != "audio"])
    _save_model(folder / "export", config, vocabulary_of(modalities))
    return folder / "export"


def _config(folder: Path, source: Path, codecs: Path, changes: dict[str, Any]) -> RunConfig:
    # A large spread of the weights, so that logits differ and no id wins by chance.
    model = dict(num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2)
    return config_from_dict(
        {
            "output": str(folder / "run"),
            "device": "cpu",
            "model": model | {"head_dim": 8, "init_std": 0.3} | changes,
            "data": {"sources": [{"path": str(source)}], "seq_length": 64},
            "tokenizers": {codec.name: str(codec) for codec in sorted(codecs.iterdir())},
            "optimizer": {"lr": 1e-3},
            "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
        },
        where="test",
    )


def _save_model(export: Path, config: RunConfig, vocabulary: Vocabulary) -> None:
    special = {"bos_token_id": vocabulary.document_start, "eos_token_id": vocabulary.document_end}
    theirs = to_config(family_for(config.model), config.model, vocabulary.size, config.data.seq_length, special)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(theirs, dtype=torch.float32).save_pretrained(export)
    own = {"vocabulary": vocabulary.to_json(), "config": config.model_dump(mode="json"), "step": 0, "versions": {}}
    (export / "megamm.json").write_text(json.dumps(own))
    export_tokenizer(export / "codecs" / "text", vocabulary, export)


def with_model(export: LoadedExport, model: object) -> LoadedExport:
    """Return the same export with another model in memory."""
    copy = dataclasses.replace(export)
    copy.__dict__["model"] = model
    return copy


def open_tiny(export: Path) -> LoadedExport:
    return open_export(export, CPU)
