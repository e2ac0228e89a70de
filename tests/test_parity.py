"""The parity harness: it names faults, detects missing parts, and reports how a world hung or crashed."""

import sys
from dataclasses import replace
from pathlib import Path

import parity_faults as faults
import pytest
import warm

from megamm.common.errors import UserError
from megamm.parity import fuzz, harness, matrix
from megamm.parity.case import Case, CaseOutcome, Extent, RankReport
from megamm.parity.rows import MIXES, global_batch, kinds

ROOT = Path(__file__).parents[1]
MOE = "model.moe.num_experts=4 model.moe.ffn_hidden_size=40"
NAMED = [
    (
        "world=2",
        faults.image_gradient_times_data_parallel_size,
        "gradient of modality image is multiplied by 2 (= data",
    ),
    ("world=2", faults.data_parallel_sum_dropped, "a sum over the data parallel group is missing: gradient of decoder"),
    (
        "world=4 parallel.context=2",
        faults.data_parallel_sum_dropped,
        "a sum over the data x context parallel group is missing",
    ),
    (
        f"world=4 parallel.expert=2 {MOE}",
        faults.data_parallel_sum_dropped,
        "a sum over the expert data parallel group is missing: gradient of decoder.layers.mlp.experts",
    ),
    (
        "world=2 parallel.tensor=2 parallel.sequence=true",
        faults.sequence_parallel_sum_dropped,
        "a sum over the tensor parallel group is missing: gradient of decoder.final_layernorm.weight",
    ),
    (
        "world=2 parallel.pipeline=2 model.tie_embeddings=true",
        faults.tied_embedding_sum_dropped,
        "a sum over the pipeline parallel group is missing: gradient of embedding.word_embeddings.weight",
    ),
    ("world=2 parallel.tensor=2", faults.document_index_shifted, "positions used for RoPE in attention"),
    (
        "world=2 parallel.context=2 model.rope_axes=3",
        faults.row_positions_shifted,
        "segments or positions passed to attention differ from the row's: row 0, token 1: 0 instead of 1",
    ),
    (
        "world=2 parallel.context=2 modalities.image.attention=span",
        faults.span_cut_at_the_chunk,
        "spans that attention used differ from the row's: row ",
    ),
    (
        f"world=2 parallel.expert=2 model.moe.aux_loss_coeff=0.02 {MOE}",
        faults.auxiliary_loss_twice,
        "gradient of the experts' auxiliary loss is multiplied by 2",
    ),
    (
        "world=2 parallel.pipeline=2 model.mtp.num_layers=1",
        faults.prediction_depths_twice,
        "gradient of multi-token prediction is multiplied by 2",
    ),
    (
        "world=2",
        faults.counts_of_this_rank_only,
        "loss of modality image is normalised per data-parallel rank, not over the whole job",
    ),
]

# Number of named causes, if it is not one: position faults are not gradient faults, the others break two things.
CAUSES = {
    faults.document_index_shifted: 0,
    faults.row_positions_shifted: 0,
    faults.span_cut_at_the_chunk: 0,
    faults.counts_of_this_rank_only: 2,
    "expert data": 2,
}


SELDOM = {
    ("auxiliary_loss_twice", f"world=2 parallel.expert=2 model.moe.aux_loss_coeff=0.02 {MOE}"),
    ("data_parallel_sum_dropped", "world=4 parallel.context=2"),
    ("counts_of_this_rank_only", "world=2"),
    ("tied_embedding_sum_dropped", "world=2 parallel.pipeline=2 model.tie_embeddings=true"),
    ("prediction_depths_twice", "world=2 parallel.pipeline=2 model.mtp.num_layers=1"),
    ("row_positions_shifted", "world=2 parallel.context=2 model.rope_axes=3"),
}
"""Of `make test-all`; a similar fault in another sum, position or loss is always injected."""


@pytest.mark.parametrize(
    ("line", "fault", "named"),
    [
        pytest.param(
            *(line, fault, named),
            id=f"{fault.__name__}-{line[:7]}",
            marks=pytest.mark.everything if (fault.__name__, line) in SELDOM else (),
        )
        for line, fault, named in NAMED
    ],
)
def test_an_injected_fault_is_named(harness, line, fault, named):
    outcome = harness.prove(Case.parse(line), fault)
    assert outcome.verdict == "mismatch"
    assert any(finding.startswith(named) for finding in outcome.findings), outcome.text()
    # Nothing else is blamed: only the effects of one fault.
    causes = [f for f in outcome.findings if "multiplied" in f or "is missing" in f or "normalised" in f]
    assert len(causes) == CAUSES.get("expert data" if "expert data" in named else fault, 1), outcome.text()


def test_a_fault_stays_in_its_own_world(harness):
    assert harness.prove(Case.parse("world=2")).verdict == "proven"


def test_a_crash_names_the_rank_and_its_error(harness):
    outcome = harness.prove(Case.parse("world=2"), faults.last_rank_dies)
    assert (outcome.verdict, outcome.findings) == ("crash", ["rank 1: ValueError: out of luck"])


def test_a_hang_says_where_each_rank_stands(worlds, request):
    with harness.Harness(worlds, timeout=20) as impatient:
        outcome = impatient.prove(Case.parse("world=2"), faults.last_rank_never_comes)
    assert outcome.verdict == "hang"
    assert any("last_rank_never_comes" in finding for finding in outcome.findings if finding.startswith("rank 1"))
    assert any("new_group" in finding for finding in outcome.findings if finding.startswith("rank 0"))
    assert request.getfixturevalue("harness").prove(Case.parse("world=2")).verdict == "proven", (
        "the next world is a new one"
    )


def test_what_layout_check_refuses_is_refused_with_its_reason(harness):
    outcome = harness.prove(Case.parse("world=3 parallel.tensor=2"))
    assert outcome.verdict == "refused"
    assert outcome.findings == ["world size = 3 is not divisible by tensor x pipeline x context = 2"]


def _report(**changes):
    extents = [Extent("w", (0, 0), (2, 3), True), Extent("w", (2, 0), (2, 3), True), Extent("w", (2, 0), (2, 3), False)]
    sizes = {"data": 1}
    good = RankReport({"data": 0}, sizes, [[1.0, 2.0]], [[3.0, 4.0]], [5.0], extents, routed={("step 1 layer 1", 0): 6})
    return replace(good, worst={}, **changes)


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({}, None),
        ({"loss": [[1.0, 2.0 + 3e-6]]}, "loss of modality image at step 1"),
        ({"loss": [[float("nan"), 2.0]]}, "loss of modality text at step 1"),
        ({"count": [[3.0, 5.0]]}, "token count of modality image at step 1: 5 instead of 4"),
        ({"grad_norm": [5.0002]}, "gradient norm at step 1"),
        ({"routed": {("step 1 layer 1", 0): 7}}, "step 1 layer 1: expert 0 got 7 tokens instead of 6"),
        ({"routed": {}}, "step 1 layer 1: expert 0 got 0 tokens instead of 6"),
        ({"extents": [Extent("w", (0, 0), (2, 3), True)]}, "elements of w are owned by no rank, or by several"),
        ({"extents": [Extent("w", (0, 0), (4, 3), True)] * 2}, "elements of w are owned by no rank, or by several"),
        ({"extents": [Extent("w", (0, 0), (4, 3), True), Extent("v", (0,), (1,), True)]}, "v is not a tensor of"),
        ({"strange": ["positions differ"]}, "positions differ"),
    ],
)
def test_every_number_is_compared(changes, finding):
    found = harness.compare([_report(**changes)], _report(), {"w": (4, 3)})
    assert (found == []) if finding is None else (len(found) == 1 and found[0].startswith(finding)), found


def test_a_case_is_its_line():
    line = "world=4 mix=mixed seed=3 model.tie_embeddings=true parallel.layers_per_chunk=[1,3] parallel.pipeline=2"
    case = Case.parse(line)
    assert case.line() == line
    assert Case.parse(case.line()) == case
    assert case.run().config.parallel.layers_per_chunk == [1, 3]
    with pytest.raises(UserError, match="not key=value"):
        Case.parse("world")
    with pytest.raises(UserError, match="unknown mix 'none'"):
        Case.parse("mix=none")
    with pytest.raises(UserError, match=r"nearest valid key is parallel\.tensor"):
        Case.parse("parallel.tensr=2").run()


def test_layouts_of_one_model_share_a_reference():
    lines = ("world=2 parallel.tensor=2", "world=2 train.recompute=full parallel.context=2", "world=1")
    assert len({Case.parse(line).run().reference().name() for line in lines}) == 1
    others = ("world=2 model.tie_embeddings=true", "world=2 seed=2", "world=2 mix=step_without_images")
    assert len({Case.parse(line).run().reference().name() for line in (*lines, *others)}) == 4


@pytest.mark.parametrize("mix", MIXES)
def test_mixes_hold_what_they_say(mix):
    seen = {}
    for step in (1, 2, 3):
        which = kinds(mix, step, rows=8, micro_batch=2, data_size=2)
        rows = global_batch(1, step, [(i in which.text, i in which.image) for i in range(8)], 47)
        seen[step] = [({0, 1} & set(row.modality.tolist()), bool((row.segment >= 0).any())) for row in rows]
    images = {step: [i for i, (modalities, _) in enumerate(rows) if 1 in modalities] for step, rows in seen.items()}
    assert images[3] == {
        "rank_without_images": [0, 1, 4, 5],
        "padding_row": [1, 2, 3, 4, 5, 6, 7],
        "text_only": [],
    }.get(mix, list(range(8)))
    assert bool(images[1]) == (mix not in ("step_without_images", "images_from_step_3", "text_only"))
    assert bool(images[2]) == (mix not in ("images_from_step_3", "text_only"))
    without_text = [i for i, (modalities, _) in enumerate(seen[1]) if 0 not in modalities]
    assert without_text == {"microbatch_without_text": [2, 3, 6, 7], "padding_row": [0]}.get(mix, [])


def test_draws_are_a_pure_function_of_the_seed():
    cases = [fuzz.draw(1, n, 8) for n in range(200)]
    assert cases == [fuzz.draw(1, n, 8) for n in range(200)]
    assert len(set(cases)) == 200
    assert cases != [fuzz.draw(2, n, 8) for n in range(200)]
    assert max(fuzz.draw(1, n, 4).world for n in range(50)) == 4
    admitted = [case for case in cases if matrix.expected(case).verdict == "proven"]
    assert 100 < len(admitted) < 200, "most are admitted, some are refused"
    keys = {key for case in admitted for key, value in case.settings if value not in (0, 1, False)}
    assert {"parallel.virtual_pipeline", "parallel.expert_tensor", "model.mla.kv_lora_rank"} <= keys
    assert {case.mix for case in admitted} == set(MIXES)


def test_a_failing_case_is_made_small():
    """Every case with tensor parallel and an auxiliary loss fails here, so these two settings remain."""
    asked = []

    def fails(case):
        asked.append(case)
        settings = dict(case.settings)
        wrong = settings.get("parallel.tensor", 1) > 1 and settings.get("model.moe.aux_loss_coeff")
        return CaseOutcome(case.line(), "mismatch") if wrong else None

    case = next(c for n in range(2000) if fails(c := fuzz.draw(3, n, 8)) and matrix.expected(c).verdict == "proven")
    small = Case.parse(fuzz.minimise(case, fails).case)
    assert small.world == dict(small.settings)["parallel.tensor"]
    assert all(matrix.expected(candidate).verdict == "proven" for candidate in asked[asked.index(case) :])
    assert len(small.settings) <= 8, small.line()
    assert small.mix == "mixed"


def test_the_table_shows_what_the_matrix_proves_and_refuses():
    assert (ROOT / "docs" / "parallelism.md").read_text() == matrix.table(matrix.expected), "make parity writes it"


@pytest.mark.everything
def test_the_tool_proves_refuses_and_counts():
    tool = [sys.executable, str(ROOT / "tools" / "parity.py")]
    done = warm.run([*tool, "--fuzz", "4", "--seed", "2", "--max-ranks", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 mismatches" in done.stdout
    wrong = warm.run([*tool, "--case", "tensor"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
