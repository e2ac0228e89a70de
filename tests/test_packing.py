"""Packing: every document once and whole, document boundaries respected, positions as in Qwen2-VL, little padding."""

import numpy as np
import pytest

from megamm.common.errors import UserError
from megamm.common.sample import IGNORE_LABEL, Document, Part
from megamm.data.pipeline.packing import PackingSpec, document_length, pack, plan_rows
from megamm.modalities.protocol import sequential_positions
from megamm.model.vocabulary import Vocabulary

VOCABULARY = Vocabulary.of({"text": (100, "t"), "image": (50, "i")})
GRID = 3


def grid_positions(length):
    cells = np.arange(length)
    return np.stack([np.zeros_like(cells), cells // GRID, cells % GRID])


POSITIONS = {"text": PackingSpec(sequential_positions, False), "image": PackingSpec(grid_positions, True)}
START, END, PADDING = VOCABULARY.document_start, VOCABULARY.document_end, VOCABULARY.padding
IMAGE, IMAGE_END = VOCABULARY.begin("image"), VOCABULARY.end("image")


def pair(key, text, image=9, reversed=False):
    parts = (Part("text", np.arange(text) + 1), Part("image", np.arange(image) + 2))
    return Document(key, parts[::-1] if reversed else parts)


def first_fit_decreasing(lengths, row_length):
    """Return the number of rows that the textbook heuristic needs."""
    spaces = []
    for length in sorted(lengths, reverse=True):
        index = next((i for i, space in enumerate(spaces) if space >= length), None)
        if index is None:
            spaces.append(row_length - length)
        else:
            spaces[index] -= length
    return len(spaces)


@pytest.mark.parametrize("seed", range(20))
def test_rows_hold_every_document_once_in_order_and_fit(seed):
    generator = np.random.default_rng(seed)
    row_length = int(generator.integers(8, 300))
    lengths = generator.integers(2, row_length + 1, size=int(generator.integers(1, 500)))
    rows = plan_rows(lengths, row_length)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(row == sorted(row) and lengths[row].sum() <= row_length for row in rows)
    assert rows == plan_rows(lengths, row_length)
    assert len(rows) <= 1.01 * first_fit_decreasing(lengths.tolist(), row_length) + 1


def test_caption_and_image_lengths_leave_little_padding():
    text = np.random.default_rng(0).integers(2, 14, size=4096)
    lengths = np.array([document_length(("text", int(t)), ("image", 64)) for t in text])
    for row_length, most in [(1024, 0.025), (2048, 0.015)]:
        rows = plan_rows(lengths, row_length)
        assert 1 - lengths.sum() / (len(rows) * row_length) < most
        assert len(rows) < first_fit_decreasing(lengths.tolist(), row_length)


def test_no_documents_make_no_rows_and_a_long_one_is_named():
    assert plan_rows(np.array([], dtype=np.int64), 10) == []
    with pytest.raises(UserError, match=r"document 1 has 11 tokens, but a row has 10.*seq_length to at least 11"):
        plan_rows(np.array([3, 11, 4]), 10)


def test_a_row_token_by_token():
    row = pack([pair("a", 2, image=4)], VOCABULARY, 14, POSITIONS)
    image = [VOCABULARY["image"].start + i for i in (2, 3, 4, 5)]
    ids = [START, 1, 2, IMAGE, *image, IMAGE_END, END]
    assert row.input_ids.tolist() == [*ids, *[PADDING] * 4]
    assert row.labels.tolist() == [*ids[1:], *[IGNORE_LABEL] * 5]
    #                               1  2  <i> i  i  i  i  </i> </d> ...
    assert row.modality.tolist() == [0, 0, 0, 1, 1, 1, 1, -1, 0, -1, -1, -1, -1, -1]
    assert row.loss_weight.tolist() == [1, 1, 1, 1, 1, 1, 1, 0, 1, 0, 0, 0, 0, 0]
    assert row.segment.tolist() == [0] * 10 + [-1] * 4
    assert row.position[:, :10].T.tolist() == [
        *[[p, p, p] for p in (0, 1, 2, 3)],  # <document_start> 1 2 <image_start>
        *[[4, 4, 4], [4, 4, 5], [4, 4, 6], [4, 5, 4]],  # t, h, w from the running position on
        [7, 7, 7],  # its maximum, 6, plus 1
        [8, 8, 8],
    ]


@pytest.mark.parametrize("reversed", [False, True])
def test_a_given_part_counts_to_no_loss_and_changes_nothing_else(reversed):
    documents = [pair("a", 2, image=4, reversed=reversed), pair("b", 3, image=4)]
    given = Document("a", documents[0].parts, given=1)
    row, other = (pack([first, documents[1]], VOCABULARY, 24, POSITIONS) for first in (documents[0], given))
    for name in ("input_ids", "labels", "segment", "position"):
        assert np.array_equal(getattr(row, name), getattr(other, name))
    # Neither the given part's tokens nor its marks; the start mark of an image belongs to the image.
    counts = [0, 0, 0, 0, 0, 0, 1, 1, 1] if reversed else [0, 0, 1, 1, 1, 1, 1, 0, 1]
    assert other.loss_weight[: len(counts)].tolist() == counts
    assert np.array_equal(other.modality >= 0, other.loss_weight > 0)
    assert np.array_equal(row.loss_weight[10:], other.loss_weight[10:])


def test_the_other_order_starts_with_the_image():
    row = pack([pair("a", 2, image=4, reversed=True)], VOCABULARY, 10, POSITIONS)
    assert row.input_ids[[0, 1, 6, 7, 8, 9]].tolist() == [START, IMAGE, IMAGE_END, 1, 2, END]
    assert row.modality.tolist() == [0, 1, 1, 1, 1, -1, 0, 0, 0, -1]
    assert row.position[0].tolist() == [0, 1, 2, 2, 2, 2, 5, 6, 7, 8]


@pytest.mark.parametrize("seed", range(5))
def test_labels_stay_in_their_document(seed):
    generator = np.random.default_rng(seed)
    documents = [
        pair(str(i), int(generator.integers(0, 9)), int(generator.integers(1, 20)), bool(generator.integers(2)))
        for i in range(6)
    ]
    lengths = [document_length(*d.sizes) for d in documents]
    row = pack(documents, VOCABULARY, sum(lengths) + 7, POSITIONS)
    assert np.bincount(row.segment + 1).tolist() == [7, *lengths]
    for s in range(len(row.labels)):
        last = s + 1 == len(row.labels) or row.segment[s + 1] != row.segment[s] or row.segment[s] < 0
        assert row.labels[s] == (IGNORE_LABEL if last else row.input_ids[s + 1])
        if last:
            assert row.loss_weight[s] == 0 and row.modality[s] == -1
    for segment, document in enumerate(documents):  # each document is as if it were alone
        alone = pack([document], VOCABULARY, lengths[segment], POSITIONS)
        here = row.segment == segment
        for name in ("input_ids", "labels", "loss_weight", "modality"):
            assert np.array_equal(getattr(row, name)[here], getattr(alone, name))
        assert np.array_equal(row.position[:, here], alone.position)


@pytest.mark.parametrize(("modality", "bad"), [("image", 50), ("text", 100), ("text", -1)])
def test_an_id_outside_its_codec_is_named(modality, bad):
    document = Document("odd-one", (Part(modality, np.array([0, bad])),))
    with pytest.raises(UserError, match=r"'odd-one'.*megamm data tokenize"):
        pack([document], VOCABULARY, 20, POSITIONS)
