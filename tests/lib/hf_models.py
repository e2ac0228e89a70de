"""Tiny models of the codecs that transformers has, with random weights, saved to disk as a user would have them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from megamm.tokenizers.load import load_codec

RATE, SIDE = 1600, 12
"""Samples a second, and pixels along a side; a cell of the grid has 2 x 2 pixels."""
SMALL_VQ: dict[str, Any] = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1}
SIZES: dict[str, Any] = {
    "mimi": {"sampling_rate": RATE, "upsampling_ratios": [4, 2], "hidden_size": 16, "num_filters": 4, "head_dim": 8}
    | {"codebook_size": 32, "codebook_dim": 8, "num_quantizers": 4, "vector_quantization_hidden_dimension": 8}
    | {"num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    | {"upsample_groups": 16, "sliding_window": 10},
    "encodec": {"sampling_rate": RATE, "upsampling_ratios": [4, 2], "hidden_size": 16, "num_filters": 4}
    | {"target_bandwidths": [1.0, 3.0], "codebook_size": 32, "num_lstm_layers": 1},
    "dac": {"sampling_rate": RATE, "downsampling_ratios": [2, 5], "encoder_hidden_size": 4, "decoder_hidden_size": 16}
    | {"n_codebooks": 3, "codebook_size": 32, "codebook_dim": 4},
    "emu3": SMALL_VQ | {"codebook_size": 64, "attn_resolutions": [1], "hidden_size": 32, "resolution": SIDE},
    "chameleon": SMALL_VQ | {"num_embeddings": 64, "embed_dim": 8, "latent_channels": 8, "resolution": SIDE},
    "janus": SMALL_VQ | {"num_embeddings": 64, "embed_dim": 4, "latent_channels": 8, "num_patches": SIDE // 2},
}
MODELS: dict[str, Any] = {
    "mimi": transformers.MimiModel,
    "encodec": transformers.EncodecModel,
    "dac": transformers.DacModel,
    "emu3": transformers.Emu3VQVAE,
    "chameleon": transformers.ChameleonVQVAE,
    "janus": transformers.JanusVQVAE,
}
AUDIO, VISUAL = ("mimi", "encodec", "dac"), ("emu3", "chameleon", "janus")
Folders = dict[str, Path]


def make_folders(parent: Path) -> Folders:
    """Write parent/<name>/ of each model. Codes are spread around the latents of noise: some are all zeros at first."""
    for seed, (name, sizes) in enumerate(SIZES.items()):
        torch.manual_seed(seed)
        model = MODELS[name](MODELS[name].config_class(**sizes)).eval()
        _spread_codes(name, model)
        model.save_pretrained(parent / name)
    return {name: parent / name for name in SIZES}


@torch.no_grad()
def _spread_codes(name: str, model: Any) -> None:
    """Spread the codes; DAC's are spread already."""
    if name in ("mimi", "emu3"):
        for key, tensor in model.state_dict().items():
            if key.endswith(("embed_sum", "embedding.weight")):
                tensor.normal_(std=0.3)
    elif name == "encodec":
        latents = model.encoder(noise(4000)[None, None])[0].T
        for level, layer in enumerate(model.quantizer.layers):
            layer.codebook.embed.copy_(_around(latents, 32) - latents.mean(0) * (level > 0))
    elif name in ("chameleon", "janus"):
        pixels = pictures(4, 1)[:, 0].permute(0, 3, 1, 2) / 127.5 - 1
        latents = model.quant_conv(model.encoder(pixels)).permute(0, 2, 3, 1).flatten(0, 2)
        model.quantize.embedding.weight.copy_(_around(latents, 64))


def _around(latents: torch.Tensor, codes: int) -> torch.Tensor:
    return latents.mean(0) + latents.std(0) * torch.randn(codes, latents.shape[1])


def load(folders: Folders, name: str) -> tuple[Any, str]:
    """Return the adapter and its codec_id."""
    return load_codec(folders[name], {}, "audio" if name in AUDIO else "visual")


def direct(folders: Folders, name: str) -> Any:
    """Return the model as transformers loads it."""
    return MODELS[name].from_pretrained(folders[name]).eval()


def edited(folders: Folders, name: str, target: Path, **changes: Any) -> Path:
    """Return a copy of the folder with another config."""
    shutil.copytree(folders[name], target)
    values = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(values))
    return target


def noise(samples: int, seed: int = 0) -> torch.Tensor:
    """Return float32 `[samples]` in [-1, 1]."""
    return torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, samples).astype(np.float32))


def pictures(batch: int, frames: int, seed: int = 0) -> torch.Tensor:
    """Return uint8 `[batch, frames, SIDE, SIDE, 3]` of noise."""
    shape = (batch, frames, SIDE, SIDE, 3)
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))
