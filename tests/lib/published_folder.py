"""A tiny folder as it is published: weights, config, generation settings, a Llama-3-style tokenizer, its template.

Expected values of tests that use it are what transformers reads from the same folder.
"""

import json
from pathlib import Path
from typing import Any

from family_models import write_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

BEGIN, ENDS = "<|begin_of_text|>", ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
SPECIAL = (BEGIN, *ENDS)
IDS = 256 + len(SPECIAL)
"""Ids of the tokenizer: bytes, then special tokens."""
ROWS = IDS + 12
"""Rows of the embedding, more than the tokenizer has ids."""
EOS = [IDS - 3, IDS - 2, IDS - 1]
TEMPLATE = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|eot_id|>{% endfor %}"
GENERATION = {"bos_token_id": 256, "eos_token_id": EOS, "do_sample": True, "temperature": 0.6, "top_p": 0.9}
CONFIG = {"bos_token_id": 256, "eos_token_id": EOS, "max_position_embeddings": 131072, "use_cache": False}
CONFIG |= {"attention_dropout": 0.1, "pretraining_tp": 2}


def bpe() -> Tokenizer:
    """Return a byte-level tokenizer that puts BEGIN in front of a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    template = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 256)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return tokenizer


def publish(folder: Path, model: str = "llama3", *, rows: int = ROWS, config: dict[str, Any] | None = None) -> Path:
    """Write the folder; config: other values of config.json."""
    write_model(model, folder, {"vocab_size": rows})
    write_json(folder / "config.json", json.loads((folder / "config.json").read_text()) | CONFIG | (config or {}))
    write_json(folder / "generation_config.json", GENERATION)
    bpe().save(str(folder / "tokenizer.json"))
    names = {"bos_token": BEGIN, "eos_token": ENDS[-1], "model_max_length": 131072}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def write_json(file: Path, values: Any) -> None:
    file.write_text(json.dumps(values))
