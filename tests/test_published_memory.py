"""Simulated memory against the peaks that Megatron-LM's own tests measured on H100.

Source: golden values of Megatron-LM, tests/functional_tests/test_cases/gpt/gpt3_7b_*_memory_speed, H100: bytes that
torch's allocator had given out at most, on the last rank. Their techniques are set here as far as this engine has them:
two matrices in an MLP, biases, dropout, no sequence parallelism, the interleaved schedule, the distributed optimizer.
The rest is counted from the shape.
"""

import fake_gpu_cases
import pytest

from megamm.config import RunConfig
from megamm.fakegpu.results import Figures, peak
from megamm.fakegpu.simulator import Simulator
from megamm.plan import job as jobs
from megamm.plan import memory

VOCABULARY, WORLD_SIZE = 131_073, 8
SHAPE = (
    *("model.num_layers=32", "model.hidden_size=4096", "model.ffn_hidden_size=16384", "model.num_attention_heads=32"),
    *("model.num_query_groups=8", "model.head_dim=128", "model.qk_norm=false", "model.rope_axes=1"),
    "model.megatron={gated_linear_unit: false, add_bias_linear: true, hidden_dropout: 0.1}",
    *("data.seq_length=8192", "train.global_batch_size=8", "train.recompute=none"),
    *("parallel.context=1", "parallel.sequence=false"),
    "train.attention=flex",  # varlen copies rows behind each other, which their attention does not
)
TENSOR_4 = ("parallel.tensor=4", *fake_gpu_cases.ONE_STAGE, "train.micro_batch_size=2")
PIPELINE_4 = (
    *("parallel.tensor=1", "parallel.pipeline=4", "parallel.virtual_pipeline=8", "parallel.layers_per_chunk=[]"),
    "train.micro_batch_size=1",
)
PUBLISHED = {"gpt3_7b_tp4_pp1": (TENSOR_4, 57_143_791_616), "gpt3_7b_tp1_pp4": (PIPELINE_4, 60_518_293_504)}


def with_their_techniques(config: RunConfig, figures: Figures) -> float:
    """Return the peak of the last rank with what this engine does otherwise counted as in the published runs.

    Positions are learned: a table on the first stage, and no copies of turned queries and keys. The loss has all logits
    in 16 bits and in float32; at that time no backward pass runs.
    """
    m, p, length = config.model, config.parallel, config.data.seq_length
    documents = jobs.Documents.whole_rows(length)
    job = jobs.of_config(config, WORLD_SIZE, VOCABULARY, documents)
    _, kinds = peak(figures)
    own = kinds["logits"] + kinds["temporaries"]
    passes = memory.in_flight(job, p.pipeline - 1)
    layers = [sum(chunk.values()) for chunk in job.chunks_of(p.pipeline - 1)]
    saved = sum(count * flight for count, flight in zip(layers, passes, strict=True))
    turned = 2 * job.tokens * saved * (m.num_attention_heads + m.num_query_groups) * m.head_dim / p.tensor
    logits = 6 * job.tokens * VOCABULARY / p.tensor
    positions = (2 + 4 + 12 / job.data) * length * m.hidden_size if p.pipeline == 1 else 0.0
    return sum(kinds.values()) - own - turned + logits + positions


@pytest.mark.everything
@pytest.mark.parametrize("name", PUBLISHED)
def test_simulated_memory_is_that_of_published_runs(name):
    overrides, published = PUBLISHED[name]
    config = fake_gpu_cases.Case("dense_8b.yaml", (*SHAPE, *overrides), WORLD_SIZE).config()
    with Simulator("h100") as simulator:
        figures = simulator.simulate(config, VOCABULARY, WORLD_SIZE, rank=WORLD_SIZE - 1).figures
    assert with_their_techniques(config, figures) == pytest.approx(published, rel=0.03)
    # As simulated, without these corrections.
    assert sum(peak(figures)[1].values()) == pytest.approx(published, rel=0.06)
