"""Published config.json files: each is refused with a reason, or has transformers' logits (docs/families.md).

Weights are random. transformers builds its model from the published file; our backbone is built from what we read, and
the model of an export from the config.json that we write.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from convert_rows import documents
from family_models import SEQUENCE
from published import MODELS, Published, page, refusal
from safetensors.torch import load_file

from megamm.checkpoint import TrainState, path_of
from megamm.common.device import choose
from megamm.convert.families import mapping
from megamm.convert.families.config import read_config, to_config
from megamm.convert.families.family import leaves
from megamm.mcore import process_groups
from megamm.parity.case import Case
from megamm.parity.rows import VOCABULARY, global_batch, rank_batches

DOCS = Path(__file__).parents[1] / "docs" / "families.md"
ACCEPTED = [model for model in MODELS if refusal(model) is None]


def test_the_page_is_what_the_configs_give() -> None:
    assert len(MODELS) >= 40 and len({model.name for model in MODELS}) == len(MODELS)
    assert DOCS.read_text() == page(), "python tests/lib/published.py > docs/families.md"


def random_model(config: Any) -> Any:
    """A model of transformers whose attention and routing are far from uniform."""
    torch.manual_seed(3)
    kind = transformers.AutoModelForCausalLM
    model = kind.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" in name:
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point() and "inv_freq" not in name:
                tensor.normal_(0, 0.2)
    return model


def _marked(model: Published) -> Any:
    """Of checkpoints of one model type, the first always runs; `make test-all` runs the others too."""
    same_type = [other.name for other in ACCEPTED if other.config["model_type"] == model.config["model_type"]]
    marks = pytest.mark.everything if same_type.index(model.name) else ()
    return pytest.param(model, id=model.name, marks=marks)


@pytest.mark.parametrize("model", map(_marked, ACCEPTED))
def test_logits_equal_transformers(model: Published, tmp_path: Path) -> None:
    theirs = random_model(transformers.CONFIG_MAPPING[model.config["model_type"]].from_dict(model.config))
    theirs.save_pretrained(tmp_path)
    family, section = read_config(model.config, SEQUENCE, Path("config.json"))
    config = Case.of(1, {f"model.{key}": value for key, value in leaves(section)}).config
    stored = mapping.from_transformers(family.rules, load_file(tmp_path / "model.safetensors"), config.model)
    exported = random_model(to_config(family, config.model, VOCABULARY, 4096, {"pad_token_id": None}))
    exported.load_state_dict(theirs.state_dict())
    batch = rank_batches(global_batch(5, 1, [(True, True)] * 2, SEQUENCE), 2, 0, 1)[0]
    ours = our_logits(config, stored, batch, tmp_path)
    with torch.no_grad():
        for row, part in documents(batch):
            ids = batch.input_ids[row : row + 1, part]
            wanted = theirs(ids, use_cache=False).logits[0]
            for found in (ours[row, part], exported(ids, use_cache=False).logits[0]):
                assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def our_logits(config: Any, stored: dict[str, torch.Tensor], batch: Any, folder: Path) -> torch.Tensor:
    """Logits of our backbone with these stored tensors."""
    device = choose("cpu")
    process_groups.start(device)
    from checkpoint_folders import generator_states, save_now, whole_blocks

    from megamm.engine.native import NativeEngine

    try:
        engine = NativeEngine(config, VOCABULARY, process_groups.build(config.parallel, seed=3), device)
        state = TrainState(0, 0, 1, layout={}, vocabulary=[], config={}, versions={}, has_optimizer=False)
        save_now(folder / "run", state, whole_blocks(stored), generator_states(), device)
        engine.load(path_of(folder / "run", 0) / "tensors", 0, with_optimizer=False)
        found: torch.Tensor = engine.chunks[0].module(batch.input_ids, None, batch.packed_seq_metadata)
    finally:
        process_groups.destroy()
    return found.detach()
