"""Shared by the tests and the benchmark of streaming conversion: tokenizers, tensors in memory, streaming alone."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from megamm.convert.conversion import ConversionJob
from megamm.convert.export import plan_export
from megamm.convert.families.mapping import TensorRule
from megamm.convert.io.safetensors_files import header


def add_tokenizer(folder: Path, size: int) -> None:
    """Write a tokenizer of exactly that many ids."""
    Tokenizer(WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of all safetensors files of a folder."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        there = load_file(file)
        assert not found.keys() & there.keys()
        found |= there
    return found


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Return whether names, dtypes and bits are equal."""
    return ours.keys() == theirs.keys() and all(
        tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]) for name, tensor in ours.items()
    )


def cut_weights(
    step: Path, rules: tuple[TensorRule, ...], m: Any, vocabulary_size: int, out: Path
) -> dict[str, torch.Tensor]:
    """Write the weights of a checkpoint's folder as `megamm convert export` streams them to `out`."""
    planned = plan_export(step, rules, m, vocabulary_size, None, 1 << 20)
    with ConversionJob(planned, out, nproc=1) as job:
        job.fill()
        job.publish()
    return tensors_of(out)


SYNTHETIC = {"vocab_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128}
"""With hidden_size 1024 and intermediate_size 2048 a bfloat16 layer takes 18.9 MB, its largest group 8.4 MB."""


def write_synthetic(folder: Path, layers: int, shards: int, fill: bool) -> int:
    """Write a Qwen3 of that many layers in bfloat16, hidden 1024, and its tokenizer; return bytes of its largest group.

    fill: random bits below 1; else the files are sparse: zeros that take no disk space.
    """
    import transformers

    sizes: dict[str, Any] = SYNTHETIC | {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": layers}
    config = transformers.Qwen3Config(**sizes, dtype="bfloat16", architectures=["Qwen3ForCausalLM"])
    config.save_pretrained(folder)
    add_tokenizer(folder, sizes["vocab_size"])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    named = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]
    placed: dict[str, str] = {}
    for number in range(shards):
        mine = named[number * len(named) // shards : (number + 1) * len(named) // shards]
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        placed |= dict.fromkeys((name for name, _, _ in mine), file)
        with (folder / file).open("wb") as opened:
            opened.write(header(mine))
            for seed, (_, dtype, shape) in enumerate(mine):
                count = torch.Size(shape).numel()
                if fill:
                    draw = torch.Generator().manual_seed(number * 1000 + seed)
                    bits = torch.randint(0, 0x3F80, (count,), generator=draw, dtype=torch.int16)
                    opened.write(memoryview(bits.numpy()))  # type: ignore[arg-type]
                else:
                    opened.seek(count * dtype.itemsize, 1)
            opened.truncate()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return 2 * 2 * 2048 * 1024
