"""Checks before the first step that a run can be exported, so that no run trains for days what no engine loads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megamm.checkpoint.folder import all_of
from megamm.common.errors import UserError
from megamm.config import RunConfig
from megamm.convert.families.config import family_for
from megamm.model.vocabulary import Vocabulary
from megamm.tokenizers.text.model import load_tokenizer, vocabulary_size

_REMEDY = "or set export: off to train a model that cannot be exported"


def check(config: RunConfig, vocabulary: Vocabulary | None = None, origin: Mapping[str, Any] | None = None) -> str:
    """What the run's export will be, in a line for the dry run. vocabulary None: unknown, ids are not checked.

    origin: TrainState.origin of the weights that the run starts from, whose family an export keeps if it can.

    Raises UserError if `export: required` cannot be met. A run that has checkpoints already continues in any case.
    """
    try:
        line = _describe(config, vocabulary, origin)
    except UserError as error:
        if config.export == "required" and not any(all_of(config.output)):
            remedy = f"{error.remedy}, {_REMEDY}"
            raise UserError(error.what, where=error.where, remedy=remedy, on_all_ranks=True) from None
        return f"export: not possible: {error.what}"
    return f"export: {line}"


def _describe(config: RunConfig, vocabulary: Vocabulary | None, origin: Mapping[str, Any] | None) -> str:
    """The class of the export and what it lacks. Raises UserError for what an export would refuse."""
    m = config.model
    family = family_for(m, origin)
    text = config.tokenizers.get("text")
    if text is not None and text.exists():
        _check_tokenizer(text, vocabulary)
    without = ", without the modules of multi-token prediction" if m.mtp.num_layers else ""
    return f"{family.architecture} of transformers{without}"


def _check_tokenizer(folder: Path, vocabulary: Vocabulary | None) -> None:
    """Raise UserError if the control and media ids cannot follow the tokenizer's ids, as they do in an export."""
    tokenizer, _ = load_tokenizer(folder)
    ids = tokenizer.get_vocab(with_added_tokens=True)
    missing = sorted(set(range(vocabulary_size(tokenizer))) - set(ids.values()))
    if missing:
        what = (
            f"the text tokenizer has no token with id {missing[0]} ({len(missing)} of {vocabulary_size(tokenizer)} ids)"
        )
        raise UserError(what, where=folder, remedy="add tokens with these ids to its tokenizer.json")
    # An added token whose text exists already gets no id of its own.
    names = [] if vocabulary is None else vocabulary.names_after_text()
    if taken := next((name for name in names if name in ids), None):
        what = f"the text tokenizer has a token {taken}, which is the name of a control or media id"
        raise UserError(what, where=folder, remedy="rename it in its tokenizer.json")
