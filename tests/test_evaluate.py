"""Held-out loss and pair gain against a plain loop, one document at a time; a model with a known gain; compare."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_export import make_export, open_tiny, with_model
from typer.testing import CliRunner

from megamm.cli import app
from megamm.common.device import choose
from megamm.common.errors import UserError
from megamm.convert.import_folder import import_
from megamm.convert.verify.logits import logits_difference
from megamm.data.raw.samples import normalise_noun
from megamm.data.tokenize.token_cache import tokenize
from megamm.evaluation import losses
from megamm.evaluation.losses import partners, summarise
from megamm.inference.export_subject import ExportSubject
from megamm.shards.folder import ShardFolder, ShardWriter

HELDOUT = 12


def evaluate(export, sources, **options):
    return losses.evaluate(ExportSubject(export), sources, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_export(tmp_path_factory.mktemp("evaluate"), heldout=HELDOUT)


@pytest.fixture(scope="module")
def export(folder):
    return open_tiny(folder)


@pytest.fixture(scope="module")
def source(folder):
    return folder.parent / "shards" / "shapes"


def _samples(export, source):
    """Return (text ids, image ids, noun) of every held-out sample, from its media, shifted to the vocabulary."""
    folders = {name: ShardFolder(source / "heldout" / name) for name in ("text", "image")}
    samples = []
    for i in range(len(folders["text"])):
        caption = folders["text"].read(i).decode()
        image = export.modalities["image"].read_media(folders["image"].read(i), "png")
        ids = [export.modalities["text"].encode([caption])[0], export.modalities["image"].encode([image])[0]]
        samples.append((ids[0].tolist(), (ids[1] + export.vocabulary["image"].start).tolist(), normalise_noun(caption)))
    return samples


def _render(v, text, image, image_first):
    """Return the document's ids, and the label modality of each (None: certain, not counted)."""
    wrapped = [(v.begin("image"), "text"), *((i, "image") for i in image), (v.end("image"), None)]
    words = [(i, "text") for i in text]
    parts = wrapped + words if image_first else words + wrapped
    return [(v.document_start, None), *parts, (v.document_end, "text")]


def _losses(export, document):
    """Return [(cross entropy, id, modality)] of every token after the first."""
    logits = export.model(torch.tensor([[i for i, _ in document]])).logits[0].double().detach()
    return [
        (-logits[place].log_softmax(0)[token].item(), token, modality)
        for place, (token, modality) in enumerate(document[1:])
    ]


def test_loss_equals_a_plain_loop(export, source):
    result = evaluate(export, [source])
    found = {"text": [], "image": []}
    for text, image, _ in _samples(export, source):
        for image_first in (False, True):
            for loss, _, modality in _losses(export, _render(export.vocabulary, text, image, image_first)):
                if modality is not None:
                    found[modality].append(loss)
    assert result.samples == HELDOUT
    assert result.tokens == {name: len(losses) for name, losses in found.items()}
    assert result.loss == pytest.approx({name: np.mean(losses) for name, losses in found.items()}, rel=1e-5)


def test_pair_gain_equals_a_plain_loop(export, source):
    result = evaluate(export, [source], seed=3).pair_gain
    samples = _samples(export, source)
    other = partners([noun for _, _, noun in samples], np.random.default_rng([3, 0]))
    for direction, image_first in (("text_to_image", False), ("image_to_text", True)):
        gains = []
        for i, (text, image, _) in enumerate(samples):
            second = text if image_first else image
            mixed = (text, samples[other[i]][1]) if image_first else (samples[other[i]][0], image)
            means = []
            for parts in ((text, image), mixed):
                losses = [loss for loss, *_ in _losses(export, _render(export.vocabulary, *parts, image_first))]
                # The document ends with the second part, its end mark if it is an image, and the document's end.
                stop = len(losses) - (1 if image_first else 2)
                means.append(np.mean(losses[stop - len(second) : stop]))
            gains.append(means[1] - means[0])
        assert result[direction].mean == pytest.approx(np.mean(gains), rel=1e-4)
        assert result[direction].positive_share == np.mean(np.array(gains) > 0)
        assert result[direction].samples == HELDOUT


def test_batches_give_the_same_numbers(export, source):
    wanted = evaluate(export, [source])
    alone = losses.evaluate(ExportSubject(export, logits=1), [source])  # one document per batch
    assert alone.loss == pytest.approx(wanted.loss, rel=1e-6)
    for direction, gain in wanted.pair_gain.items():
        assert alone.pair_gain[direction].mean == pytest.approx(gain.mean, abs=1e-6)


def test_a_document_is_computed_once(export, source):
    """Both orders of every sample serve loss and gain; only the two mixed documents are added."""
    seen = []

    class Counting(ExportSubject):
        def token_losses(self, documents):
            seen.extend(tuple((part.modality, tuple(part.ids)) for part in document.parts) for document in documents)
            return super().token_losses(documents)

    losses.evaluate(Counting(export), [source])
    assert len(seen) == len(set(seen)) <= 4 * HELDOUT


class _Knowing(torch.nn.Module):
    """Gives the next token of a correct pair the logit K, and is uniform in any other document."""

    K = 3.0

    def __init__(self, export, samples):
        super().__init__()
        self.size = export.vocabulary.size
        pairs = [_render(export.vocabulary, t, i, first) for t, i, _ in samples for first in (False, True)]
        self.known = [[i for i, _ in pair] for pair in pairs]

    def forward(self, input_ids, attention_mask):
        logits = torch.zeros(*input_ids.shape, self.size)
        for row, (ids, used) in enumerate(zip(input_ids.tolist(), attention_mask.sum(1).tolist(), strict=True)):
            if ids[:used] in self.known:
                logits[row, torch.arange(used - 1), torch.tensor(ids[1:used])] = self.K
        return SimpleNamespace(logits=logits)


def test_a_model_that_knows_the_pairs_has_the_gain_that_follows(export, source):
    samples = _samples(export, source)
    v, k = export.vocabulary.size, _Knowing.K
    each = math.log(v) - (math.log(math.exp(k) + v - 1) - k)
    gains = evaluate(with_model(export, _Knowing(export, samples)), [source]).pair_gain
    # A partner with an identical caption (the toy data has few) is a correct pair, too: no gain.
    pairs = {(tuple(text), tuple(image)) for text, image, _ in samples}
    other = partners([noun for _, _, noun in samples], np.random.default_rng([0, 0]))
    for direction, of in (("text_to_image", lambda i, o: (o[0], i[1])), ("image_to_text", lambda i, o: (i[0], o[1]))):
        wrong = [tuple(map(tuple, of(samples[i], samples[o]))) not in pairs for i, o in enumerate(other)]
        assert sum(wrong) >= HELDOUT / 2
        assert gains[direction].mean == pytest.approx(each * np.mean(wrong), rel=1e-5)
        assert gains[direction].positive_share == np.mean(wrong)


@pytest.mark.parametrize("sizes", [(1, 1), (2, 2, 1), (5, 5), (3, 1, 1, 1), (1,) * 9, (4, 3, 2), (7, 1), (6,)])
def test_partners_are_a_permutation_to_other_nouns(sizes):
    nouns = [f"noun {g}" for g, size in enumerate(sizes) for _ in range(size)]
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(len(nouns))
        mixed = [nouns[i] for i in order]
        partner = partners(mixed, np.random.default_rng(seed))
        assert sorted(partner) == list(range(len(nouns)))
        assert not (partner == np.arange(len(nouns))).any()
        same = sum(mixed[i] == mixed[p] for i, p in enumerate(partner))
        if 2 * max(sizes) <= len(nouns):
            assert same == 0
        assert np.array_equal(partner, partners(mixed, np.random.default_rng(seed)))


def test_standard_error_is_over_nouns():
    gains = np.random.default_rng(0).normal(1, 2, 50)
    single = summarise(gains, [str(i) for i in range(50)])
    assert single.standard_error == pytest.approx(gains.std(ddof=1) / math.sqrt(50))
    # Repeating every sample four times adds no information.
    copied = summarise(np.repeat(gains, 4), [str(i) for i in range(50) for _ in range(4)])
    assert (copied.mean, copied.standard_error) == pytest.approx((single.mean, single.standard_error))
    assert (copied.samples, copied.nouns) == (200, 50)
    assert summarise(gains, ["one"] * 50).standard_error is None


def test_a_source_of_text_alone_counts_to_the_loss_only(export, source, tmp_path, caplog):
    with ShardWriter(tmp_path / "texts" / "heldout" / "text") as writer:
        writer.add("long", "txt", b"a red box and " * 30)  # longer than a row of 64: split
        writer.add("short", "txt", b"a box")
    tokenize([tmp_path / "texts"], [export.modalities["text"]])
    alone, both = evaluate(export, [tmp_path / "texts"]), evaluate(export, [tmp_path / "texts", source])
    assert set(alone.loss) == {"text"} and alone.pair_gain == {} and alone.samples == 2
    assert {g.samples for g in both.pair_gain.values()} == {HELDOUT}
    assert evaluate(export, [source], limit=5).samples == 5
    assert "of 2 samples, longer than a row of 64 tokens and split: 1 (long)" in caplog.text
    # A run that refuses long samples still evaluates other data.
    data = export.config.data.model_copy(update={"long_documents": "error"})
    strict = replace(export, config=export.config.model_copy(update={"data": data}))
    assert evaluate(strict, [tmp_path / "texts"]).samples == 1
    assert "of 2 samples, longer than a row of 64 tokens and skipped: 1 (long)" in caplog.text


def test_without_the_token_caches_of_the_export_the_command_to_make_them_is_named(export, tmp_path):
    with ShardWriter(tmp_path / "heldout" / "text") as writer:
        writer.add("a", "txt", b"a box")
    with pytest.raises(UserError, match="megamm data tokenize"):
        evaluate(export, [tmp_path])


def test_logits_of_the_run_equal_those_of_the_export(folder, tmp_path):
    run = tmp_path / "run"
    import_(folder, run)
    assert 0 < logits_difference(run, folder, choose("cpu"), rows=3) <= 2e-4  # this model's logits reach hundreds
    own = json.loads((folder / "megamm.json").read_text())
    (tmp_path / "other").mkdir()
    for path in folder.iterdir():
        (tmp_path / "other" / path.name).symlink_to(path)
    (tmp_path / "other" / "megamm.json").unlink()
    (tmp_path / "other" / "megamm.json").write_text(json.dumps(own | {"step": 7}))
    with pytest.raises(UserError, match=r"the export is of step 7, but the run's newest checkpoint is of step 0"):
        logits_difference(run, tmp_path / "other", choose("cpu"))


def test_the_command(folder, source, tmp_path):
    arguments = ["eval", str(folder), str(source), "--limit", "8", "--json", str(tmp_path / "figures.json")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "pair gain image_to_text" in done.stdout and "of 8 samples" in done.stdout
    assert json.loads((tmp_path / "figures.json").read_text())["samples"] == 8
    assert isinstance(CliRunner().invoke(app, arguments).exception, UserError)  # the file is not overwritten
