"""Modalities are independent: gradients of one with and without the other in the step, and their sum."""

import pytest
import torch

from megamm.common.device import choose
from megamm.common.sample import Row
from megamm.config import config_from_dict
from megamm.mcore import process_groups
from megamm.parity.rows import VOCABULARY, global_batch, rank_batches

MODEL = {
    "num_layers": 2,
    "hidden_size": 48,
    "ffn_hidden_size": 80,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "head_dim": 16,
}
MOE = {"moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 40}}
LENGTH, MICRO = 48, 2
TEXT, IMAGE, NONE = (True, False), (False, True), (False, False)


@pytest.fixture(params=[{}, {"mtp": {"num_layers": 1}}, MOE], ids=["dense", "mtp", "moe"])
def gradients(request):
    """Return a function from (rows, loss weights of text and image) to the one-rank gradients, on the same weights."""
    config = config_from_dict(
        {
            "output": "unused",
            "model": MODEL | request.param,
            "data": {"seq_length": LENGTH, "sources": [{"path": "unused"}]},
            "tokenizers": {"text": "unused"},
            "optimizer": {"lr": 1e-3},
            "train": {"steps": 1, "global_batch_size": 8, "micro_batch_size": MICRO},
        },
        "test",
    )
    device = choose("cpu")
    process_groups.start(device)
    from megamm.engine.native import NativeEngine
    from megamm.mcore import step

    engine = NativeEngine(config, VOCABULARY, process_groups.build(config.parallel, seed=5), device)

    def gradients(rows: list[Row], weights: tuple[float, float]) -> dict[str, torch.Tensor]:
        batches = rank_batches(rows, MICRO, 0, 1)
        step.run(engine.chunks, batches, torch.tensor(weights, dtype=torch.float64), 0.1, engine.groups)
        return {name: p.main_grad.clone() for name, p in engine.chunks[0].module.named_parameters()}

    yield gradients
    process_groups.destroy()


def _same(ours, theirs):
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_a_modality_has_the_same_gradient_beside_another_alone_and_in_the_sum(gradients):
    both = global_batch(1, 1, [TEXT] * 4 + [IMAGE] * 4, LENGTH)
    padding = global_batch(1, 1, [NONE] * 4, LENGTH)
    text, image = both[:4] + padding, padding + both[4:]
    of_text, of_image = gradients(both, (1.0, 0.0)), gradients(both, (0.0, 1.0))
    _same(gradients(text, (1.0, 0.0)), of_text)
    _same(gradients(image, (0.0, 1.0)), of_image)
    _same(gradients(text, (1.0, 1.0)), of_text)  # a step without images, with any weight
    _same(gradients(both, (1.0, 0.5)), {name: of_text[name] + 0.5 * of_image[name] for name in of_text})


def test_the_same_documents_in_other_microbatches_have_the_same_gradient(gradients):
    """Mixed microbatches of uneven counts, for which a mean of microbatch means would differ."""
    rows = global_batch(2, 1, [(True, True)] * 3 + [TEXT] * 2 + [IMAGE] * 2 + [NONE], LENGTH)
    _same(gradients([rows[i] for i in (7, 4, 0, 6, 2, 5, 1, 3)], (1.0, 0.5)), gradients(rows, (1.0, 0.5)))
