"""`megamm convert gguf EXPORT OUT.gguf`: an export's model and tokenizer as one GGUF file, which llama.cpp reads.

Matrices keep their dtype (float32, float16, bfloat16); vectors become float32, as llama.cpp requires. Differences to
transformers: the names (from the package gguf), the experts of a layer stacked `[E, out, in]`, and for the architecture
"llama" the order of the rows of q and k: rotary pairs are neighbours instead of half a head apart. Media ids are
control tokens of the vocabulary; the format cannot hold the codecs. It works tensor by tensor; at most one layer's
stack of experts is in memory. Source of the format: github.com/ggml-org/ggml, docs/gguf.md.

The tokenizer must be byte-level BPE. llama.cpp selects the text-splitting rule by name from a fixed list; other rules
cannot be expressed.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from megamm.common.errors import UserError
from megamm.convert.io.export_folder import read_metadata
from megamm.convert.io.safetensors_files import Weights

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
}
"""llama.cpp's architectures, by model_type of config.json."""
_EXPERTS = {
    "mixtral": ("block_sparse_moe.experts.", {"w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps"}),
    "qwen3_moe": (
        "mlp.experts.",
        {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"},
    ),
}
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {_WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe", _WORDS + r"\p{N}" + _REST: "qwen2"}
"""llama.cpp's names of splits, by pattern: Llama 3 and Qwen 2; the GPT-2 split is built into ByteLevel."""
_PERMUTED = ("self_attn.q_proj.weight", "self_attn.k_proj.weight")


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file: its name there, and the one name in transformers, or all names that it stacks."""

    name: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype


def write_gguf(export: Path, out: Path) -> Path:
    """Write the file `out`. Raises UserError if it exists, or GGUF cannot hold the model or the tokenizer."""
    try:
        import gguf
    except ImportError:
        raise UserError("the package gguf is missing", remedy="install it: pip install 'megamm[gguf]'") from None
    from transformers import AutoConfig

    metadata = read_metadata(export)[2]
    if out.exists():
        raise UserError("the output exists", where=out, remedy="remove it or choose another path")
    theirs = AutoConfig.from_pretrained(export, local_files_only=True, trust_remote_code=False)
    if theirs.model_type not in ARCHITECTURES or getattr(theirs, "quantization_config", None) is not None:
        kind = theirs.model_type if theirs.model_type not in ARCHITECTURES else "a quantised model"
        remedy = f"export one of {', '.join(ARCHITECTURES)}, not quantised"
        raise UserError(f"{kind} cannot be written as GGUF", where=export, remedy=remedy)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")  # so that `out` is never an incomplete file
    try:
        with Weights(export) as weights:
            writer = gguf.GGUFWriter(partial, ARCHITECTURES[theirs.model_type])
            writer.add_name(f"{Path(metadata['config']['output']).name}-step-{metadata['step']}")
            _add_sizes(writer, theirs, export)
            _add_tokenizer(writer, export, theirs)
            _write_tensors(writer, theirs, weights)
            writer.close()
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return out


def _add_sizes(writer: Any, theirs: Any, where: Path) -> None:
    """Add the metadata from which llama.cpp builds the model."""
    head = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    writer.add_vocab_size(theirs.vocab_size)
    writer.add_context_length(theirs.max_position_embeddings)
    writer.add_embedding_length(theirs.hidden_size)
    writer.add_block_count(theirs.num_hidden_layers)
    writer.add_feed_forward_length(theirs.intermediate_size)
    writer.add_head_count(theirs.num_attention_heads)
    writer.add_head_count_kv(theirs.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(theirs.rms_norm_eps)
    writer.add_rope_freq_base(theirs.rope_parameters["rope_theta"])
    if theirs.model_type in _EXPERTS:
        count = "num_local_experts" if theirs.model_type == "mixtral" else "num_experts"
        writer.add_expert_count(getattr(theirs, count))
        writer.add_expert_used_count(theirs.num_experts_per_tok)
        if theirs.model_type == "qwen3_moe":
            writer.add_expert_feed_forward_length(theirs.moe_intermediate_size)
    kind = theirs.rope_parameters["rope_type"]
    if kind == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(theirs.rope_parameters["factor"])
    elif kind not in ("default", "llama3"):
        raise UserError(f"rope_type {kind} cannot be written as GGUF", where=where, remedy="export a model without it")


def _add_tokenizer(writer: Any, export: Path, theirs: Any) -> None:
    """Add the tokenizer of export/tokenizer.json. Raises UserError if it is of another kind.

    theirs: transformers' config of the model, with its special ids.
    """
    import gguf

    file = export / "tokenizer.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        model, split = values["model"], _split(values["pre_tokenizer"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        what, remedy = f"unreadable tokenizer: {error!r}", "create the export again with `megamm convert export`"
        raise UserError(what, where=file, remedy=remedy) from None
    if model["type"] != "BPE" or split is None:
        remedy = "use a byte-level BPE with the split of GPT-2, Llama 3 or Qwen 2"
        raise UserError("this tokenizer cannot be written as GGUF", where=file, remedy=remedy)
    tokens = {id_: (token, gguf.TokenType.NORMAL) for token, id_ in model["vocab"].items()}
    for added in values["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]] = (added["content"], kind)
    # An id without a token is a padding row of the embedding table; the format needs a text for it.
    rows = [tokens.get(id_, (f"[PAD{id_}]", gguf.TokenType.UNUSED)) for id_ in range(theirs.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list([token for token, _ in rows])
    writer.add_token_types([kind for _, kind in rows])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    for name in ("bos", "eos", "pad"):
        id_ = getattr(theirs, f"{name}_token_id")
        if id_ is not None:
            getattr(writer, f"add_{name}_token_id")(id_ if isinstance(id_, int) else id_[0])
    writer.add_add_bos_token(Tokenizer.from_file(str(file)).encode("").ids[:1] == [theirs.bos_token_id])


def _split(pre_tokenizer: dict[str, Any]) -> str | None:
    """llama.cpp's name of the split rule; None if there is none."""
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    kinds = [step["type"] for step in steps]
    if kinds[-1] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    if kinds == ["ByteLevel"]:
        return "gpt-2" if steps[0].get("use_regex", True) else None
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        return _SPLITS.get(steps[0]["pattern"].get("Regex", ""))
    return None


def _rope_factors(theirs: Any) -> npt.NDArray[np.float32]:
    """The factors of llama3 scaling: the divisor of each frequency, `[D / 2]`."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, torch.device("cpu"))
    powers = torch.arange(len(scaled), dtype=torch.float64) / len(scaled)
    # llama.cpp divides the plain frequencies by these factors instead of computing the scaling itself.
    plain = float(theirs.rope_parameters["rope_theta"]) ** -powers
    return (plain / scaled.double()).float().numpy()


def _tensors(theirs: Any, weights: Weights) -> Iterator[_Tensor]:
    """All tensors of the file except the RoPE factors, in a fixed order."""
    import gguf

    found = {name for name, key in gguf.MODEL_ARCH_NAMES.items() if key == ARCHITECTURES[theirs.model_type]}
    names = gguf.get_tensor_name_map(found.pop(), theirs.num_hidden_layers)
    prefix, stacks = _EXPERTS.get(theirs.model_type, ("", {}))
    stacked: set[str] = set()
    for layer in range(theirs.num_hidden_layers) if stacks else ():
        for part, name in stacks.items():
            parts: list[str] = []
            # The number of experts is what the folder has: their names are numbered from 0 without gaps.
            while (one := f"model.layers.{layer}.{prefix}{len(parts)}.{part}.weight") in weights:
                parts.append(one)
            info = weights.infos[parts[0]]
            stacked |= set(parts)
            yield _Tensor(f"blk.{layer}.{name}.weight", tuple(parts), (len(parts), *info.shape), info.dtype)
    for name, info in sorted(weights.infos.items()):
        if name not in stacked:
            new = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if new is None:
                raise UserError(f"GGUF has no name for {name}", where=info.file, remedy="export a model without it")
            yield _Tensor(new, (name,), info.shape, info.dtype)


def _write_tensors(writer: Any, theirs: Any, weights: Weights) -> None:
    """Describe all tensors, write the header, then the values one tensor after the other, in the same order."""
    import gguf

    types = {
        torch.float32: gguf.GGMLQuantizationType.F32,
        torch.float16: gguf.GGMLQuantizationType.F16,
        torch.bfloat16: gguf.GGMLQuantizationType.BF16,
    }
    tensors = list(_tensors(theirs, weights))
    factors = {}
    if theirs.rope_parameters["rope_type"] == "llama3":
        factors = {"rope_freqs.weight": _rope_factors(theirs)}
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
        whole = torch.stack([_as_in_gguf(name, weights[name], theirs) for name in tensor.parts])
        if not _keeps_dtype(tensor):
            whole = whole.float()
        writer.write_tensor_data(whole.contiguous().view(torch.uint8).numpy())


def _keeps_dtype(tensor: _Tensor) -> bool:
    """Whether the dtype is kept: for matrices. llama.cpp computes norms, biases and routers in float32."""
    return len(tensor.shape) > 1 and "ffn_gate_inp" not in tensor.name


def _as_in_gguf(name: str, tensor: torch.Tensor, theirs: Any) -> torch.Tensor:
    """Reorder the rows of q and k into pairs: half 0 and half 1 of each head interleaved."""
    if ARCHITECTURES[theirs.model_type] != "llama" or not name.endswith(_PERMUTED):
        return tensor
    heads = theirs.num_attention_heads if "q_proj" in name else theirs.num_key_value_heads
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)
