"""The text tokenizer: any Hugging Face tokenizer folder; `tokenizer.json` alone is enough.

The text of a special token ("<|endoftext|>") in the data is read as plain characters, so no document can inject one.
"""

import hashlib
import logging
from pathlib import Path

from tokenizers import Tokenizer

from megamm.common.errors import UserError

logger = logging.getLogger(__name__)


def load_tokenizer(folder: Path) -> tuple[Tokenizer, str]:
    """Load the tokenizer of a folder, offline, and its codec_id. Raises UserError if it is not a tokenizer folder."""
    file = folder / "tokenizer.json"
    if file.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises no other class
            raise UserError(f"unreadable tokenizer: {error}", where=file, remedy="restore or retrain it") from error
        codec_id = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    else:
        tokenizer = _converted(folder)
        codec_id = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:12]
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True  # in the data their text is plain text
    return tokenizer, codec_id


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Return the number of ids, added tokens included: the largest id plus one."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def _converted(folder: Path) -> Tokenizer:
    """Convert the tokenizer of a folder without tokenizer.json by transformers."""
    remedy = "give a Hugging Face tokenizer folder, or create one with `megamm tokenizer train text`"
    if not folder.is_dir():
        raise UserError("no such tokenizer folder", where=folder, remedy=remedy)
    from transformers import AutoTokenizer  # takes seconds to import, rarely needed

    try:
        converted = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer = converted.backend_tokenizer
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"not a tokenizer folder: {reason}", where=folder, remedy=remedy) from error
    logger.info("%s has no tokenizer.json: converting from %s", folder, type(converted).__name__)
    return tokenizer
