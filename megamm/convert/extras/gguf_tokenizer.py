"""The tokenizer of a GGUF file, from an export's tokenizer.json: llama.cpp gives the same ids for the same text.

llama.cpp selects the rule that splits text, and whether whole words are looked up before merging, by a name from a
fixed list; it does not normalise text. So the tokenizer must be a byte-level BPE with one of a few splits. Anything
else is refused by name: Unigram, BPE of SentencePiece (byte_fallback), normalizers, affixes of words.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megamm.common.errors import UserError
from megamm.convert.io.origin import GENERATION, ends_of

log = logging.getLogger(__name__)

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2, _LLAMA3, _QWEN2, _DIGITS = "GPT-2", "Llama 3", "Qwen 2", "SmolLM"
_SPLITS = {_WORDS + r"\p{N}{1,3}" + _REST: _LLAMA3, _WORDS + r"\p{N}" + _REST: _QWEN2}
_NAMES = {
    (_GPT2, False): "gpt-2",
    (_LLAMA3, True): "llama-bpe",
    (_LLAMA3, False): "smaug-bpe",
    (_QWEN2, False): "qwen2",
    (_DIGITS, False): "smollm",
}
"""llama.cpp's names, by split and ignore_merges (whether a word that is a token is not merged)."""
_PLAIN_BPE = {
    "dropout": (None, 0, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (None, False),
}
"""Fields of a BPE model, and the values for which it is a plain byte-level one."""
_FLAGS = ("single_word", "lstrip", "rstrip")
_STOPS = ("eos", "eot", "eom")
"""llama.cpp's names of ids that end a text, in the order in which they are used."""


def add_tokenizer(writer: Any, export: Path, config: Any, *, without_normalizer: bool = False) -> None:
    """Add the tokenizer, its chat template and special ids. Raises UserError if llama.cpp would read text otherwise.

    config: transformers' config of the model. without_normalizer: write a tokenizer without its NFC normalization.
    """
    from transformers import AutoTokenizer

    file = export / "tokenizer.json"
    if not file.exists() and (export / "tokenizer.model").exists():
        remedy = "use a byte-level BPE with a tokenizer.json"
        raise UserError("SentencePiece cannot be written as GGUF", where=export / "tokenizer.model", remedy=remedy)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        pre = _checked(values, file, without_normalizer)
        _add_tokens(writer, values, config.vocab_size, file)
        tokenizer: Any = AutoTokenizer.from_pretrained(export, local_files_only=True, trust_remote_code=False)
        in_use = json.loads(tokenizer.backend_tokenizer.to_str())
    except UserError:
        raise
    except Exception as error:  # transformers and tokenizers raise many kinds, tokenizers even plain Exception
        reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
        remedy = "create the export again with `megamm convert export`"
        raise UserError(f"unreadable tokenizer: {reason}", where=file, remedy=remedy) from None
    # Training reads tokenizer.json; for some model types transformers builds another tokenizer from its tokens.
    if _rules(in_use) != _rules(values):
        name = type(tokenizer).__name__
        log.warning("written with the rules of %s: transformers reads it as %s, with others", file, name)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    _add_special_ids(writer, tokenizer, config, export)
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several, by name
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def _checked(values: dict[str, Any], file: Path, without_normalizer: bool) -> str:
    """Return llama.cpp's name of the tokenizer's rules. Raises UserError for a tokenizer of another kind."""
    problems = list(_problems(values))
    split = _split(values["pre_tokenizer"])
    ignores = bool(values["model"].get("ignore_merges"))
    if not problems and split is None:
        problems = [f"pre_tokenizer {_kinds(values['pre_tokenizer'])} splits otherwise"]
    if not problems and (split, ignores) not in _NAMES:
        problems = [f"ignore_merges = {ignores} with the split of {split}"]
    if problems:
        remedy = "use a byte-level BPE with the split of GPT-2, Llama 3, Qwen 2 or SmolLM"
        what = f"this tokenizer cannot be written as GGUF: {'; '.join(problems)}"
        raise UserError(what, where=file, remedy=remedy)
    normalizers = [step["type"] for step in _steps(values.get("normalizer"), "normalizers")]
    is_nfc = set(normalizers) == {"NFC"}
    if normalizers and not (without_normalizer and is_nfc):
        kinds = ", ".join(normalizers)
        what = f"this tokenizer cannot be written as GGUF: it normalises text ({kinds}) and llama.cpp does not"
        remedy = "add --without-normalizer, and give llama.cpp text in NFC" if is_nfc else "use one without normalizer"
        raise UserError(what, where=file, remedy=remedy)
    if normalizers:
        log.warning("the tokenizer's NFC normalization is not written: llama.cpp needs text in NFC for the same ids")
    return _NAMES[split, ignores] if split else ""


def _rules(values: dict[str, Any]) -> Any:
    """What decides the ids of a text besides tokens and merges."""
    return values.get("normalizer"), _split(values["pre_tokenizer"]), bool(values["model"].get("ignore_merges"))


def _problems(values: dict[str, Any]) -> Iterator[str]:
    """Yield what makes the model of a tokenizer another kind than byte-level BPE."""
    model = values["model"]
    if model["type"] != "BPE":
        yield f"{model['type']} instead of BPE"
        return
    if model.get("byte_fallback"):
        yield "BPE of SentencePiece (byte_fallback)"
        return
    for name, plain in _PLAIN_BPE.items():
        if model.get(name) not in plain:
            yield f"{name} = {model[name]!r}"
    for token in values["added_tokens"]:
        for flag in _FLAGS:
            if token.get(flag):
                yield f"{flag} of the token {token['content']!r}"


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a pre_tokenizer or normalizer, without nesting."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for inner in part[key] for step in _steps(inner, key)]


def _kinds(pre_tokenizer: dict[str, Any] | None) -> str:
    return ", ".join(step["type"] for step in _steps(pre_tokenizer, "pretokenizers")) or "None"


def _split(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """The name of the split rule; None if llama.cpp has none."""
    steps = _steps(pre_tokenizer, "pretokenizers")
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    splits_itself = steps[-1].get("use_regex", True)
    match steps[:-1]:
        case []:
            return _GPT2 if splits_itself else None
        case [{"type": "Digits", "individual_digits": True}]:
            return _DIGITS if splits_itself else None
        case [{"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": pattern}}]:
            return None if splits_itself else _SPLITS.get(pattern)
    return None


def _add_tokens(writer: Any, values: dict[str, Any], rows: int, file: Path) -> None:
    """Add the text and the kind of every id, and the merges. rows: rows of the model's embedding table."""
    import gguf

    model = values["model"]
    tokens = {id_: (token, gguf.TokenType.NORMAL) for token, id_ in model["vocab"].items()}
    surplus = []
    for added in values["added_tokens"]:
        # An added token replaces the one that the vocabulary has at its id.
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        if added["id"] < rows:
            tokens[added["id"]] = (added["content"], kind)
        else:
            surplus.append(added["content"])
            tokens.pop(added["id"], None)
    if surplus:
        log.warning("left out of the GGUF vocabulary: %s, which the model has no rows for", ", ".join(surplus))
    if beyond := sorted(id_ for id_ in tokens if id_ >= rows):
        what = f"the model has {rows:,} rows, but {tokens[beyond[0]][0]!r} is token {beyond[0]:,}"
        raise UserError(what, where=file, remedy="restore the model's own tokenizer.json")
    ids: dict[str, int] = {}
    for id_, (text, _) in sorted(tokens.items()):
        if ids.setdefault(text, id_) != id_:
            what = f"tokens {ids[text]:,} and {id_:,} are both {text!r}, which GGUF cannot hold"
            raise UserError(what, where=file, remedy="use a tokenizer without the same token twice")
    # An id without a token is a padding row of the embedding table; the format needs a text for it.
    filled = [tokens.get(id_, (f"[PAD{id_}]", gguf.TokenType.UNUSED)) for id_ in range(rows)]
    writer.add_token_list([token for token, _ in filled])
    writer.add_token_types([kind for _, kind in filled])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])


def _add_special_ids(writer: Any, tokenizer: Any, config: Any, export: Path) -> None:
    """Add the ids that begin and end a text, and whether llama.cpp adds them to a text as the tokenizer does."""
    before, after = _around(tokenizer, export)
    stops = _stops(config, export)
    if after:  # llama.cpp adds the first one
        stops = [after[0], *(stop for stop in stops if stop != after[0])]
    if not stops:
        # Without one, llama.cpp ends every text at the token 11.
        raise UserError("no eos_token_id", where=export / "config.json", remedy="add it: the id that ends a text")
    if len(stops) > len(_STOPS):
        what = f"{len(stops)} ids end a text ({', '.join(map(str, stops))}), GGUF holds {len(_STOPS)}"
        raise UserError(what, where=export, remedy="remove ids from eos_token_id in generation_config.json")
    for name, id_ in zip(_STOPS, stops, strict=False):
        getattr(writer, f"add_{name}_token_id")(id_)
    start = before[0] if before else config.bos_token_id
    if start is None:
        start = tokenizer.bos_token_id
    for name, id_ in (("bos", start), ("pad", config.pad_token_id)):
        if id_ is not None and 0 <= id_ < config.vocab_size:  # older Llamas have -1 for none
            getattr(writer, f"add_{name}_token_id")(id_)
    writer.add_add_bos_token(bool(before))
    writer.add_add_eos_token(bool(after))


def _around(tokenizer: Any, export: Path) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after a text. Raises UserError if there are several."""
    plain, whole = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
    # What surrounds the ids of the plain text is added to every text.
    first = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    before, after = whole[:first], whole[first + len(plain) :]
    if len(before) > 1 or len(after) > 1:
        what = f"the tokenizer adds {len(before)} tokens before a text and {len(after)} after it, GGUF holds one each"
        raise UserError(what, where=export / "tokenizer.json", remedy="use a post_processor with one token each")
    return before, after


def _stops(config: Any, export: Path) -> list[int]:
    """The ids that end a text: of generation_config.json where it names them, as transformers does, or config.json."""
    file = export / GENERATION
    # Read before: add_sampling reports a damaged one.
    generation = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    ids = ends_of(generation, {"eos_token_id": config.eos_token_id})
    rows = range(config.vocab_size)
    if beyond := [id_ for id_ in ids if id_ not in rows]:
        log.warning("left out of the ids that end a text: %s, which the model has no rows for", beyond)
    return [id_ for id_ in dict.fromkeys(ids) if id_ in rows]
