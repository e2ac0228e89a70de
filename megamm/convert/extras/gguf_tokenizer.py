"""The tokenizer of an export as llama.cpp's metadata: byte-level BPE, with its tokens sorted by id.

llama.cpp selects the text-splitting rule by name from a fixed list; other rules cannot be expressed.
"""

import json
from pathlib import Path
from typing import Any

from megamm.common.errors import UserError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {_WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe", _WORDS + r"\p{N}" + _REST: "qwen2"}
"""llama.cpp's names of splits, by pattern: Llama 3 and Qwen 2; the GPT-2 split is built into ByteLevel."""


def add_tokenizer(writer: Any, export: Path, theirs: Any) -> None:
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
    writer.add_add_bos_token(False)


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
