"""Engine.generate: the same ids at every layout, batch, cache size and speculation; numbers of the training forward."""

import pytest
from generation_worker import SIZE, VOCABULARY, GenerationJob, generate, grammar, requests

from megamm.common.device import choose
from megamm.common.errors import UserError
from megamm.engine.build import build_engine
from megamm.mcore import process_groups
from megamm.model.generation import GenerationLimits, GenerationRequest
from megamm.model.sampling import TokenSampling
from megamm.parity.case import Case
from megamm.parity.matrix import FEATURES, LAYOUTS, compose

LIMITS = {
    "batched": GenerationLimits(4096, 64, 512),
    "alone": GenerationLimits(4096, 1, 512),
    "little memory": GenerationLimits(64 * 5, 8, 7),
    "speculative": GenerationLimits(4096, 4, 512, draft_tokens=3),
}
TEMPERATURES = {"greedy": 0.0, "sampled": 1.0}
CALLS = {
    f"{kind}, {name}": (requests(temperature), limits)
    for kind, temperature in TEMPERATURES.items()
    for name, limits in LIMITS.items()
}
ONCE = {f"{kind}, batched": CALLS[f"{kind}, batched"] for kind in TEMPERATURES}


def ids(made):
    return [[answer.ids for answer in answers] for answers in made]


def run(worlds, case, calls, compares=False):
    results = worlds.run(case.world, generate, GenerationJob(case, calls, compares), timeout=120)
    assert isinstance(results, list), "\n".join(results.lines())
    for rank in results[1:]:
        assert {name: ids(made) for name, made in rank.made.items()} == {
            name: ids(made) for name, made in results[0].made.items()
        }
    return results


MODELS = {
    "plain": {},
    "experts, 3-axis RoPE": FEATURES["shared expert"] | FEATURES["3-axis RoPE"],
    "windows, Gemma": FEATURES["windows"] | FEATURES["Gemma's norms, activation and caps"],
    "tied, one group": FEATURES["tied embeddings"] | FEATURES["one query group"],
    "biases": FEATURES["biases, no q/k norm"] | FEATURES["multi-token prediction"],
}


@pytest.mark.parametrize(
    "model", [pytest.param(m, id=m, marks=() if "3-axis" in m else pytest.mark.everything) for m in MODELS]
)
def test_cached_batches_are_the_forward_pass_of_training(worlds, model):
    (result,) = run(worlds, Case.of(1, MODELS[model]), CALLS, compares=True)
    for kind in TEMPERATURES:
        reference = ids(result.made[f"{kind}, alone"])
        for name in LIMITS:
            assert ids(result.made[f"{kind}, {name}"]) == reference, name
        # The first sample of each request has the request's own seed.
        assert [plain[0] for plain in result.plain[f"{kind}, alone"]] == [answers[0] for answers in reference]
    assert result.logprob_error < 1e-5
    assert ids(result.made["greedy, alone"]) != ids(result.made["sampled, alone"])


LAYOUTS_OF = {
    "tensor": LAYOUTS["tensor"],
    "sequence": LAYOUTS["sequence"] | FEATURES["tied embeddings"],
    "pipeline": LAYOUTS["pipeline"] | FEATURES["tied embeddings"],
    "interleaved pipeline": LAYOUTS["interleaved pipeline"],
    "expert, all-to-all": LAYOUTS["expert, all-to-all"],
    "expert, all-gather": LAYOUTS["expert, all-gather"],
    "expert tensor": LAYOUTS["expert tensor"] | FEATURES["shared expert"],
    "data": LAYOUTS["data"],
    "tensor + pipeline": LAYOUTS["tensor"] | LAYOUTS["pipeline"] | FEATURES["3-axis RoPE"],
    "tensor, one group": LAYOUTS["tensor"] | FEATURES["one query group"],
    "sequence, Gemma": LAYOUTS["sequence"] | FEATURES["Gemma's norms, activation and caps"],
}


def alone(settings):
    return {key: value for key, value in settings.items() if not key.startswith("parallel.") and key != "data"}


@pytest.mark.parametrize(
    "layout",
    [pytest.param(n, id=n, marks=() if n == "tensor + pipeline" else pytest.mark.everything) for n in LAYOUTS_OF],
)
def test_every_layout_gives_the_ids_of_one_rank(worlds, layout):
    settings = LAYOUTS_OF[layout]
    (reference,) = run(worlds, Case.of(1, alone(settings)), ONCE)
    case = compose(settings)
    found = run(worlds, case, ONCE)[0]
    for name in ONCE:
        assert ids(found.made[name]) == ids(reference.made[name])
        for ours, theirs in zip(found.made[name], reference.made[name], strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def refusals(case):
    """The messages of what the rank's engine refuses."""
    engine = build_engine(case.config, SIZE, process_groups.build(case.config.parallel, 1), choose("cpu"))
    found = []
    for request, limits in REFUSED:
        try:
            engine.generate([request], limits)
        except UserError as error:
            found.append(str(error))
    return found


SMALL = GenerationLimits(128, 2, 64)
REFUSED = [
    (GenerationRequest([1, 2], 200), SMALL),
    (GenerationRequest([], 2), SMALL),
    (GenerationRequest([SIZE], 2), SMALL),
    (GenerationRequest([1], 0), SMALL),
    (GenerationRequest([300], 2, grammar=grammar()), SMALL),
    (GenerationRequest([1], 2, guidance=2.0), SMALL),
]


def test_what_cannot_run_is_refused_by_name(worlds):
    (found,) = worlds.run(1, refusals, Case.of(1, {}), 60)
    for text, message in zip(("256 tokens", "empty", "301", "max_tokens", "id 300", "empty"), found, strict=True):
        assert text in message


UNSUPPORTED = {
    "parallel.context > 1": LAYOUTS["context, all-gather"],
    "latent attention": FEATURES["latent attention"],
    "model.megatron.moe_router_dtype": {"model.megatron.moe_router_dtype": "fp64"},
}


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_an_unsupported_layout_is_refused_by_name(worlds, what):
    case = compose(UNSUPPORTED[what])
    for found in worlds.run(case.world, refusals, case, 60):
        assert len(found) == len(REFUSED)
        assert all(f"does not support {what}" in message for message in found)


def test_guidance_and_settings_at_any_batch(worlds):
    settings = {"top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2}
    asked = requests(1.0, guidance=2.5, count=4, **settings) + requests(1.0, count=3, **settings)
    calls = {name: (asked, LIMITS[name]) for name in ("alone", "batched", "speculative")}
    calls["little memory"] = asked, GenerationLimits(64 * 5, 8, 5)
    calls["without guidance"] = requests(1.0, count=4, **settings), LIMITS["batched"]
    (result,) = run(worlds, Case.of(1, {"model.num_layers": 2}), calls)
    for name in ("batched", "speculative", "little memory"):
        assert ids(result.made[name]) == ids(result.made["alone"])
    assert ids(result.made["without guidance"]) != ids(result.made["alone"])[:4]
    streamed = [[[] for _ in answers] for answers in result.made["without guidance"]]
    for request, copy, token in result.streamed[-sum(len(a.ids) for m in result.made["without guidance"] for a in m) :]:
        streamed[request][copy].append(token)
    assert streamed == ids(result.made["without guidance"])


def test_an_answer_ends_with_a_stop_id_or_where_its_text_does(worlds):
    sampling = TokenSampling(0.0)
    plain = GenerationRequest([VOCABULARY.document_start, 5, 9], 12, sampling)
    (first,) = run(worlds, Case.of(1, {"model.num_layers": 2}), {"plain": ([plain], SMALL)})
    made = first.made["plain"][0][0]
    assert (len(made.ids), made.reason) == (12, "length")
    stop = made.ids[4]
    stopped = GenerationRequest(plain.prompt, 12, sampling, stop_ids=frozenset([stop]))
    ended = GenerationRequest(plain.prompt, 12, sampling, ends=AfterThree)
    (again,) = run(worlds, Case.of(1, {"model.num_layers": 2}), {"stops": ([stopped, ended], SMALL)})
    ((by_id,), (by_text,)) = again.made["stops"]
    assert by_id.ids == made.ids[: made.ids.index(stop) + 1] and by_id.reason == "stop"
    assert by_text.ids == made.ids[:3] and by_text.reason == "stop"


class AfterThree:
    """Ends an answer with its third id."""

    def __init__(self):
        self.count = 0

    def __call__(self, _):
        self.count += 1
        return self.count == 3
