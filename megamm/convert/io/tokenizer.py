"""The exported tokenizer: the text tokenizer plus one special token for every control and media id, in id order.

Stock engines print `<|image_start|><|image_17|>...` and read it back to the same ids.
"""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from megamm.common.errors import UserError
from megamm.model.vocabulary import Vocabulary


def special_tokens(vocabulary: Vocabulary) -> list[str]:
    """Names of all ids after the text range."""
    names = []
    for part in vocabulary.ranges:
        if part.name == "control":
            names += [vocabulary.control_name(token) for token in range(part.start, part.stop)]
        elif part.name != "text":
            names += [f"<|{part.name}_{i}|>" for i in range(part.size)]
    return names


def export_tokenizer(text_codec: Path, vocabulary: Vocabulary, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json. Raises UserError if the text tokenizer cannot be extended."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    file = text_codec / "tokenizer.json"
    if file.exists():
        tokenizer = Tokenizer.from_file(str(file))
    else:
        tokenizer = AutoTokenizer.from_pretrained(text_codec, local_files_only=True).backend_tokenizer
    if tokenizer.get_vocab_size(with_added_tokens=True) != vocabulary["text"].size:
        what = "the text tokenizer does not match the run's vocabulary"
        raise UserError(what, where=text_codec, remedy="restore the run's tokenizer")
    names = special_tokens(vocabulary)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    start = vocabulary["control"].start
    assert tokenizer.token_to_id(names[0]) == start and tokenizer.token_to_id(names[-1]) == vocabulary.size - 1
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=vocabulary.control_name(vocabulary.document_start),
        eos_token=vocabulary.control_name(vocabulary.document_end),
        pad_token=vocabulary.control_name(vocabulary.padding),
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def copy_tokenizer(text_codec: Path, folder: Path, size: int) -> dict[str, int]:
    """Write the text tokenizer unchanged, for a vocabulary of `size` text ids; returns its bos/eos/pad token ids.

    Token ids without a row in the model, which the tokenizer class may add, are skipped."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(text_codec, local_files_only=True, trust_remote_code=False)
    tokenizer.save_pretrained(folder)
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    return {name: token for name, token in ids.items() if token is not None and token < size}
