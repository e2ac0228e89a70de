"""Metrics of texts against one reference each, by the field's packages; all are over the corpus.

bleu, chrf: sacrebleu's defaults (BLEU-4 with the tokeniser 13a; chrF2). rouge1, rouge2, rougeL: the mean F-measure of
rouge-score with stemming, in [0, 1]. wer, cer: jiwer, errors over the words or characters of all references.
exact_match: the share of texts that equal their reference. Texts are compared as they are, without surrounding spaces.
"""

from collections.abc import Callable, Sequence
from functools import partial

from megamm.evaluation.packages import require


def bleu(made: Sequence[str], references: Sequence[str]) -> float:
    """Return BLEU in [0, 100]."""
    sacrebleu = require("sacrebleu")
    return float(sacrebleu.corpus_bleu(list(made), [list(references)]).score)


def chrf(made: Sequence[str], references: Sequence[str]) -> float:
    """Return chrF2 in [0, 100]."""
    sacrebleu = require("sacrebleu")
    return float(sacrebleu.corpus_chrf(list(made), [list(references)]).score)


def rouge(kind: str, made: Sequence[str], references: Sequence[str]) -> float:
    """Return the mean F-measure of one kind of ROUGE."""
    scorer = require("rouge_score.rouge_scorer").RougeScorer([kind], use_stemmer=True)
    scores = [scorer.score(reference, text)[kind].fmeasure for text, reference in zip(made, references, strict=True)]
    return float(sum(scores) / len(scores))


def wer(made: Sequence[str], references: Sequence[str]) -> float:
    """Return wrong, missing and added words over the words of the references, which are not empty."""
    return float(require("jiwer").wer(list(references), list(made)))


def cer(made: Sequence[str], references: Sequence[str]) -> float:
    """Return wrong, missing and added characters over the characters of the references, which are not empty."""
    return float(require("jiwer").cer(list(references), list(made)))


def exact_match(made: Sequence[str], references: Sequence[str]) -> float:
    """Return the share of equal texts."""
    return sum(text == reference for text, reference in zip(made, references, strict=True)) / len(made)


TEXT_METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "bleu": bleu,
    "chrf": chrf,
    "rouge1": partial(rouge, "rouge1"),
    "rouge2": partial(rouge, "rouge2"),
    "rougeL": partial(rouge, "rougeL"),
    "wer": wer,
    "cer": cer,
    "exact_match": exact_match,
}
PACKAGES_OF = {"bleu": "sacrebleu", "chrf": "sacrebleu", "wer": "jiwer", "cer": "jiwer"}
PACKAGES_OF |= dict.fromkeys(("rouge1", "rouge2", "rougeL"), "rouge-score")
NEED_REFERENCE = ("wer", "cer", "bleu", "chrf", "rouge1", "rouge2", "rougeL")
"""Undefined for an empty reference; an empty text that was made is an error of the model and counts as such."""
