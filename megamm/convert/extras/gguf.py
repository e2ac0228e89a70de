"""`megamm convert gguf EXPORT OUT.gguf`: an export's model and tokenizer as one GGUF file, which llama.cpp reads.

Matrices keep their dtype (float32, float16, bfloat16); vectors become float32, as llama.cpp requires. Differences to
transformers: the names (from the package gguf), the experts of a layer stacked `[E, out, in]`, and for the architecture
"llama" the order of the rows of q and k: rotary pairs are neighbours instead of half a head apart. Media ids are
control tokens of the vocabulary; the format cannot hold the codecs. It works tensor by tensor; at most one layer's
stack of experts is in memory. Source of the format: github.com/ggml-org/ggml, docs/gguf.md.

What the config may contain is in gguf_config.py, what the tokenizer may be in gguf_tokenizer.py.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megamm.checkpoint.whole_tensors import Described
from megamm.common.errors import UserError
from megamm.convert.extras.gguf_config import Architecture, add_config, add_sampling, architecture_of, rope_factors
from megamm.convert.extras.gguf_tokenizer import add_tokenizer
from megamm.convert.io.export_folder import read_metadata
from megamm.convert.io.safetensors_files import Weights
from megamm.convert.verify import shapes

log = logging.getLogger(__name__)

_PERMUTED = ("self_attn.q_proj", "self_attn.k_proj")
_BUFFERS = ("rotary_emb.inv_freq",)
"""Ends of tensors that older versions of transformers stored and none reads: they follow from the config."""


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file: its name there, and the one name in transformers, or all names that it stacks."""

    name: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype


def write_gguf(export: Path, out: Path, *, without_normalizer: bool = False) -> Path:
    """Write the file `out`. Raises UserError if it exists, or GGUF cannot hold the model or the tokenizer.

    without_normalizer: accept a tokenizer with NFC normalization, which llama.cpp does not apply.
    """
    try:
        import gguf
    except ImportError:
        raise UserError("the package gguf is missing", remedy="install it: pip install 'megamm[gguf]'") from None

    metadata = read_metadata(export)[2]
    if out.exists():
        raise UserError("the output exists", where=out, remedy="remove it or choose another path")
    theirs = shapes.read_config(export)
    architecture = architecture_of(theirs, export / "config.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")  # so that `out` is never an incomplete file
    try:
        with Weights(export) as weights:
            writer = gguf.GGUFWriter(partial, architecture.name)
            writer.add_name(f"{Path(metadata['config']['output']).name}-step-{metadata['step']}")
            add_config(writer, theirs, architecture)
            add_sampling(writer, export)
            add_tokenizer(writer, export, theirs, without_normalizer=without_normalizer)
            _write_tensors(writer, theirs, weights, architecture)
            writer.close()
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return out


def _tensors(theirs: Any, weights: Weights, architecture: Architecture) -> Iterator[_Tensor]:
    """All tensors of the file except the RoPE factors, in a fixed order. Raises UserError for one without a place."""
    import gguf

    infos = {name: info for name, info in weights.infos.items() if not _is_dropped(name, theirs, weights)}
    found = {name for name, key in gguf.MODEL_ARCH_NAMES.items() if key == architecture.name}
    names = gguf.get_tensor_name_map(found.pop(), theirs.num_hidden_layers)
    new_names: dict[str, str] = {}
    for name, info in infos.items():
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None and not (architecture.experts[0] and architecture.experts[0] in name):
            raise UserError(f"GGUF has no name for {name}", where=info.file, remedy="export a model without it")
        new_names[name] = new or ""
    described = {name: Described(info.shape, str(info.dtype).removeprefix("torch.")) for name, info in infos.items()}
    if lines := shapes.problems(theirs, described, weights.folder / "config.json"):
        what = f"the weights do not fit config.json: {lines[0]}"
        raise UserError(what, where=weights.folder, remedy="create the export again with `megamm convert export`")
    prefix, stacks = architecture.experts
    stacked: set[str] = set()
    for layer in range(theirs.num_hidden_layers) if stacks else ():
        for part, name in stacks.items():
            parts: list[str] = []
            # The number of experts is what the folder has: their names are numbered from 0 without gaps.
            while (one := f"model.layers.{layer}.{prefix}{len(parts)}.{part}.weight") in infos:
                parts.append(one)
            info = infos[parts[0]]
            stacked |= set(parts)
            yield _Tensor(f"blk.{layer}.{name}.weight", tuple(parts), (len(parts), *info.shape), info.dtype)
    for name, info in sorted(infos.items()):
        if name not in stacked:
            yield _Tensor(new_names[name], (name,), info.shape, info.dtype)


def _is_dropped(name: str, theirs: Any, weights: Weights) -> bool:
    """Whether a tensor of the folder is not part of the model: a buffer, or the output layer of a tied model."""
    if name.endswith(_BUFFERS):
        log.info("not written as GGUF: %s, which follows from the config", name)
        return True
    if name != "lm_head.weight" or not theirs.tie_word_embeddings:
        return False
    if torch.equal(weights[name], weights["model.embed_tokens.weight"]):
        return True
    what = f"tie_word_embeddings is true, but {name} differs from the embedding"
    raise UserError(what, where=weights.folder, remedy="set tie_word_embeddings to false in config.json")


def _write_tensors(writer: Any, theirs: Any, weights: Weights, architecture: Architecture) -> None:
    """Describe all tensors, write the header, then the values one tensor after the other, in the same order."""
    import gguf

    types = {
        torch.float32: gguf.GGMLQuantizationType.F32,
        torch.float16: gguf.GGMLQuantizationType.F16,
        torch.bfloat16: gguf.GGMLQuantizationType.BF16,
    }
    tensors = list(_tensors(theirs, weights, architecture))
    factors = rope_factors(theirs)
    # The file type is informative: that of the matrices, which make nearly all of the file.
    kept = types[next(t.dtype for t in tensors if len(t.shape) > 1)]
    writer.add_file_type(gguf.LlamaFileType[{"F32": "ALL_F32"}.get(kept.name, f"MOSTLY_{kept.name}")])
    for name, values in factors.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    for tensor in tensors:
        type_ = types[tensor.dtype] if _keeps_dtype(tensor) else types[torch.float32]
        size = int(np.prod(tensor.shape)) * (4 if type_ is types[torch.float32] else 2)
        # numpy has no bfloat16: the dtype given is ignored in favour of raw_dtype.
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in factors.values():
        writer.write_tensor_data(values)
    for tensor in tensors:
        whole = torch.stack([_as_in_gguf(name, weights[name], theirs, architecture) for name in tensor.parts])
        if not _keeps_dtype(tensor):
            whole = whole.float()
        writer.write_tensor_data(whole.contiguous().view(torch.uint8).numpy())


def _keeps_dtype(tensor: _Tensor) -> bool:
    """Whether the dtype is kept: for matrices. llama.cpp computes norms, biases and routers in float32."""
    return len(tensor.shape) > 1 and "ffn_gate_inp" not in tensor.name


def _as_in_gguf(name: str, tensor: torch.Tensor, theirs: Any, architecture: Architecture) -> torch.Tensor:
    """Reorder the rows of q and k, and their biases, into pairs: half 0 and half 1 of each head interleaved."""
    if not architecture.has_rotary_pairs or not name.removesuffix(".weight").removesuffix(".bias").endswith(_PERMUTED):
        return tensor
    heads = theirs.num_attention_heads if "q_proj" in name else theirs.num_key_value_heads
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)
