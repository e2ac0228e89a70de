"""From where a row's tokens lie to the row: all that a data worker does, and all that it needs.

    RowReader(vocabulary, row_length, forms).row(recipe) -> Row

A recipe names every member that is read, so that a worker holds no index of a data set and starts from some
kilobytes. Nothing here knows of ranks, sources or order.
"""

from pathlib import Path
from typing import NamedTuple

from megamm.data.packing import Forms, pack
from megamm.data.sample import Document, IntArray, Part, Row
from megamm.data.tar_reader import Stored, TarReader
from megamm.data.tokens import tokens_from_bytes
from megamm.errors import UserError
from megamm.model.vocabulary import Vocabulary


class StoredPart(NamedTuple):
    """Tokens [start, stop) of a member that has `tokens` of them."""

    modality: str
    member: Stored
    tokens: int
    start: int
    stop: int


class StoredDocument(NamedTuple):
    """A sample's key and the parts of it that are in the row, in reading order; given: see sample.Document."""

    key: str
    parts: tuple[StoredPart, ...]
    given: int = 0


Recipe = tuple[StoredDocument, ...]
"""The documents of one row."""


class RowReader:
    """Reads and packs rows of `row_length` tokens. It can be sent to another process, which opens files of its own."""

    def __init__(self, vocabulary: Vocabulary, row_length: int, forms: Forms) -> None:
        self.vocabulary, self.row_length, self.forms = vocabulary, row_length, forms
        self.tars = TarReader()

    def row(self, recipe: Recipe) -> Row:
        """UserError if a member is damaged or not what its index says."""
        documents = [read_document(self.tars, document) for document in recipe]
        return pack(documents, self.vocabulary, self.row_length, self.forms)


def read_document(tars: TarReader, document: StoredDocument) -> Document:
    """The tokens of a document."""
    parts = tuple(Part(part.modality, _ids(tars, document.key, part)) for part in document.parts)
    return Document(document.key, parts, document.given)


def _ids(tars: TarReader, key: str, part: StoredPart) -> IntArray:
    try:
        ids = tokens_from_bytes(tars.read(part.member))
    except (ValueError, EOFError) as error:
        raise _bad_cache(f"broken tokens of {key!r}", part) from error
    if ids.size != part.tokens:
        raise _bad_cache(f"tokens of {key!r} are not as many as its index says", part)
    return ids[part.start : part.stop]


def _bad_cache(what: str, part: StoredPart) -> UserError:
    remedy = "delete that token cache and run `megamm data tokenize` again"
    return UserError(what, where=Path(part.member.tar).parent, remedy=remedy)
