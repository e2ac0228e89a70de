"""Reads a row from the places of its tokens: the complete task of a data worker, with everything it needs.

    RowReader(vocabulary, row_length, forms).row(recipe) -> Row

A recipe names every member to read, so a worker holds no index of a data set and starts with a few kilobytes. This
module is independent of ranks, sources and order.
"""

from pathlib import Path
from typing import NamedTuple

from megamm.common.errors import UserError
from megamm.common.sample import Document, IntArray, Part, Row
from megamm.data.pipeline.packing import Forms, pack
from megamm.model.vocabulary import Vocabulary
from megamm.shards.folder import tokens_from_bytes
from megamm.shards.tar_reader import StoredMember, TarReader


class StoredPart(NamedTuple):
    """Tokens [start, stop) of a member that has `tokens` tokens in total."""

    modality: str
    member: StoredMember
    tokens: int
    start: int
    stop: int


class StoredDocument(NamedTuple):
    """A sample's key and its parts in the row, in reading order; given: see sample.Document."""

    key: str
    parts: tuple[StoredPart, ...]
    given: int = 0


Recipe = tuple[StoredDocument, ...]
"""The documents of one row."""


class RowReader:
    """Reads and packs rows of `row_length` tokens. A copy in another process opens its own files."""

    def __init__(self, vocabulary: Vocabulary, row_length: int, forms: Forms) -> None:
        self.vocabulary, self.row_length, self.forms = vocabulary, row_length, forms
        self.tars = TarReader()

    def row(self, recipe: Recipe) -> Row:
        """Read a row. Raises UserError if a member is damaged or does not match its index."""
        documents = [read_document(self.tars, document) for document in recipe]
        return pack(documents, self.vocabulary, self.row_length, self.forms)


def read_document(tars: TarReader, document: StoredDocument) -> Document:
    """Read the tokens of a document."""
    parts = tuple(Part(part.modality, _ids(tars, document.key, part)) for part in document.parts)
    return Document(document.key, parts, document.given)


def _ids(tars: TarReader, key: str, part: StoredPart) -> IntArray:
    try:
        ids = tokens_from_bytes(tars.read(part.member))
    except (ValueError, EOFError) as error:
        raise _bad_cache(f"damaged tokens of {key!r}", part) from error
    if ids.size != part.tokens:
        raise _bad_cache(f"the number of tokens of {key!r} does not match the index", part)
    return ids[part.start : part.stop]


def _bad_cache(what: str, part: StoredPart) -> UserError:
    remedy = "delete that token cache and run `megamm data tokenize` again"
    return UserError(what, where=Path(part.member.tar).parent, remedy=remedy)
