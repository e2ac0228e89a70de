"""Text metrics against other implementations, and statistics against closed forms."""

import math

import numpy as np
import pytest

from megamm.evaluation.statistics import GROUPS, Unmeasurable, jackknife, mean, ratio
from megamm.evaluation.text_metrics import TEXT_METRICS

REFERENCES = ["a red box on a table", "two green circles", "the cat sat on the mat", "a blue lamp", "running fast"]
MADE = ["a red box on the table", "two circles green", "the cat the cat on the mat", "", "runs fast"]


def _distance(a, b):
    """Return the edit distance by its recursion, row by row."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a):
        new = [i + 1]
        for j, y in enumerate(b):
            new.append(min(row[j] + (x != y), row[j + 1] + 1, new[j] + 1))
        row = new
    return row[-1]


def test_error_rates_are_edit_distances_over_lengths():
    words = sum(_distance(m.split(), r.split()) for m, r in zip(MADE, REFERENCES, strict=True))
    assert TEXT_METRICS["wer"](MADE, REFERENCES) == pytest.approx(words / sum(len(r.split()) for r in REFERENCES))
    characters = sum(_distance(m, r) for m, r in zip(MADE, REFERENCES, strict=True))
    assert TEXT_METRICS["cer"](MADE, REFERENCES) == pytest.approx(characters / sum(map(len, REFERENCES)))


def test_bleu_and_chrf_equal_torchmetrics():
    from torchmetrics.functional.text import chrf_score, sacre_bleu_score

    made, references = MADE * 2, REFERENCES * 2
    theirs = sacre_bleu_score(made, [[r] for r in references], tokenize="13a")
    assert TEXT_METRICS["bleu"](made[:3], references[:3]) == pytest.approx(
        100 * float(sacre_bleu_score(made[:3], [[r] for r in references[:3]], tokenize="13a")), abs=1e-4
    )
    assert TEXT_METRICS["bleu"](made, references) == pytest.approx(100 * float(theirs), abs=1e-4)
    theirs = chrf_score(made[:3], [[r] for r in references[:3]], n_word_order=0)
    assert TEXT_METRICS["chrf"](made[:3], references[:3]) == pytest.approx(
        100 * float(theirs), abs=0.01
    )  # another smoothing


def test_rouge_by_hand():
    made, reference = MADE[2], REFERENCES[2]
    common = {"rouge1": 5, "rouge2": 3, "rougeL": 5}  # the, cat, on, the, mat; the cat, on the, the mat; in order
    sizes = {"rouge1": (7, 6), "rouge2": (6, 5), "rougeL": (7, 6)}
    for name, hits in common.items():
        precision, recall = hits / sizes[name][0], hits / sizes[name][1]
        found = TEXT_METRICS[name]([made], [reference])
        assert found == pytest.approx(2 * precision * recall / (precision + recall)), name
    assert TEXT_METRICS["rougeL"](["", "a box"], ["a box", "a box"]) == 0.5


@pytest.mark.parametrize("name", TEXT_METRICS)
def test_empty_equal_and_single_texts(name):
    best = {"bleu": 100.0, "chrf": 100.0, "wer": 0.0, "cer": 0.0}.get(name, 1.0)
    assert TEXT_METRICS[name](REFERENCES, REFERENCES) == pytest.approx(best)
    worst = 1.0 if name in ("wer", "cer") else 0.0
    assert TEXT_METRICS[name](["", ""], REFERENCES[:2]) == pytest.approx(worst)
    assert math.isfinite(TEXT_METRICS[name](MADE[:1], REFERENCES[:1]))


def test_the_mean_and_its_error():
    values = np.random.default_rng(0).normal(2, 3, 40)
    found = mean(values.tolist())
    assert (found.value, found.n) == (pytest.approx(values.mean()), 40)
    assert found.standard_error == pytest.approx(values.std(ddof=1) / math.sqrt(40))
    assert mean([1.0]).standard_error is None and mean([]).value is None


def test_a_ratio_of_equal_denominators_is_a_mean():
    values = np.random.default_rng(1).normal(2, 3, 40)
    found, wanted = ratio((5 * values).tolist(), [5] * 40), mean(values.tolist())
    assert found.value == pytest.approx(wanted.value)
    assert found.standard_error == pytest.approx(wanted.standard_error)
    assert ratio([0.0], [0]).value is None and ratio([2.0], [4]) == ratio([2.0, 0.0], [4, 0])


def test_the_error_of_a_ratio_is_near_that_of_many_draws():
    rng = np.random.default_rng(2)
    sizes = rng.integers(1, 20, (400, 60))
    totals = rng.normal(1.5, 0.5, sizes.shape) * sizes + rng.normal(0, 2, sizes.shape)
    spread = (totals.sum(1) / sizes.sum(1)).std(ddof=1)
    errors = [ratio(t.tolist(), s.tolist()).standard_error for t, s in zip(totals, sizes, strict=True)]
    assert np.mean(errors) == pytest.approx(spread, rel=0.1)


def test_the_jackknife_of_a_mean_is_its_error():
    values = np.random.default_rng(3).normal(2, 3, GROUPS)  # one sample a group
    found = jackknife(lambda which: float(values[which].mean()), GROUPS, seed=0)
    assert found.standard_error == pytest.approx(values.std(ddof=1) / math.sqrt(GROUPS))
    assert jackknife(lambda which: 1.0, 1, seed=0).standard_error is None

    def needs_all(which):
        if len(which) < 3:
            raise Unmeasurable("needs 3")
        return 1.0

    assert jackknife(needs_all, 3, seed=0).standard_error is None
    with pytest.raises(Unmeasurable, match="needs 3"):
        jackknife(needs_all, 2, seed=0)
