"""megamm.json of an export: vocabulary ranges, run config, step and versions, which import needs, and the training
data of its model card."""

import json
from pathlib import Path
from typing import Any

from megamm.checkpoint import RunState
from megamm.common.errors import UserError
from megamm.config import RunConfig, config_from_dict
from megamm.model.vocabulary import Vocabulary

OWN = "megamm.json"


def own_of(state: RunState, training: dict[str, Any]) -> dict[str, Any]:
    """The contents for an export of a checkpoint; training: from card.record."""
    kept = {"vocabulary": state.vocabulary, "config": state.config, "step": state.step, "versions": state.versions}
    return kept | {"training": training}


def read_own(export_folder: Path) -> tuple[RunConfig, Vocabulary, dict[str, Any]]:
    """Run config, vocabulary and the remaining keys of an export's megamm.json; codec paths point into the export."""
    try:
        own = json.loads((export_folder / OWN).read_text())
        config = config_from_dict(own["config"], where=export_folder / OWN)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"not an export of megamm: {error}",
            where=export_folder,
            remedy="create one with `megamm convert export`; to start from other folders use init_from.checkpoint",
        ) from None
    inside = {name: export_folder / "codecs" / name for name in config.tokenizers}
    return config.model_copy(update={"tokenizers": inside}), Vocabulary.from_json(own["vocabulary"]), own
