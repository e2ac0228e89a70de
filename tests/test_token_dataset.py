"""Documents of a split: every order and every pair of a sample's parts, interleaved documents, and their cuts."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from token_members import CODECS, page, write

from megamm.common.errors import UserError
from megamm.data.pipeline.packing import document_length
from megamm.data.pipeline.token_dataset import TokenDataset, selection, selections


def needed(dataset):
    """Return the tokens that a row must have for each sample."""
    return dataset.needed(np.arange(len(dataset))).tolist()


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_permutations_go_through_every_order_and_every_ordered_pair(parts):
    orders = [tuple(selection(parts, index, "whole")) for index in range(selections(parts, "whole"))]
    assert sorted(orders) == sorted(permutations(range(parts))) and orders[0] == tuple(range(parts))
    pairs = [tuple(selection(parts, index, "pairs")) for index in range(selections(parts, "pairs"))]
    assert sorted(pairs) == sorted(permutations(range(parts), min(parts, 2)))
    for kind, all_of_them in (("whole", orders), ("pairs", pairs)):
        drawn = [tuple(selection(parts, index, kind)) for index in range(7, 7 + 3 * len(all_of_them))]
        assert set(Counter(drawn).values()) == {3}  # every stretch of indexes is balanced


def test_a_triple_is_read_whole_or_as_pairs(tmp_path):
    members = [("text", "a", None, [1]), ("image", "a", None, [2, 3]), ("audio", "a", None, [4, 5, 6])]
    split = write(tmp_path / "train", members)
    whole, pairs = TokenDataset(split, CODECS), TokenDataset(split, CODECS, "pairs")
    documents = [whole.read(whole.plan(0, index, 64)[0]) for index in range(6)]
    assert {tuple(p.modality for p in d.parts) for d in documents} == set(permutations(CODECS))
    for document in documents:
        assert {p.modality: p.ids.tolist() for p in document.parts} == {
            "text": [1],
            "image": [2, 3],
            "audio": [4, 5, 6],
        }
        assert document_length(*document.sizes) == needed(whole)[0] == 2 + 6 + 4
    twos = [pairs.read(pairs.plan(0, index, 64)[0]) for index in range(6)]
    assert {tuple(p.modality for p in d.parts) for d in twos} == set(permutations(CODECS, 2))
    assert needed(pairs)[0] == 2 + 5 + 4  # image and audio are the longest two


def test_answers_are_pairs_whose_first_part_is_given(tmp_path):
    members = [("text", "a", None, [1]), ("image", "a", None, [2, 3]), ("audio", "a", None, [4, 5, 6])]
    split = write(tmp_path / "train", [*members, ("text", "alone", None, [7])])
    pairs, answers = TokenDataset(split, CODECS, "pairs"), TokenDataset(split, CODECS, "answers")
    for index in range(6):
        (answer,), (pair,) = answers.plan(0, index, 64), pairs.plan(0, index, 64)
        assert answer.spans == pair.spans
        assert (pairs.read(pair).given, answers.read(answer).given) == (0, 1)
    (alone,) = answers.plan(1, 0, 64)
    assert answers.read(alone).given == 0  # a single part counts to the loss, otherwise nothing is learnt from it
    assert needed(answers) == needed(pairs) and answers.digest != pairs.digest
    numbered = TokenDataset(write(tmp_path / "pages", page("p", [("text", [1]), ("image", [2, 3])])), CODECS, "answers")
    assert numbered.read(numbered.plan(0, 0, 64)[0]).given == 0  # its parts have an order: all of it is learnt


def test_a_page_keeps_its_order_and_is_cut_between_or_inside_texts(tmp_path):
    rng = np.random.default_rng(0)
    parts = [
        (name, rng.integers(0, 1000, size).tolist())
        for name, size in (
            ("text", 50),
            ("image", 9),
            ("text", 3),
            ("image", 9),
            ("image", 9),
            ("audio", 20),
            ("text", 7),
        )
    ]
    dataset = TokenDataset(write(tmp_path / "train", page("p", parts) + page("q", parts[:2])), CODECS)
    assert dataset.keys == ["p", "q"] and needed(dataset) == [24, 13]
    for index in (0, 1, 5):
        planned = dataset.plan(0, index, 32)
        assert max(document.length for document in planned) <= 32
        read = [dataset.read(document) for document in planned]
        assert [document.length for document in planned] == [document_length(*d.sizes) for d in read]
        joined: list = []
        for part in (part for d in read for part in d.parts):  # cut texts joined again
            if joined and joined[-1][0] == part.modality == "text":
                joined[-1][1].extend(part.ids.tolist())
            else:
                joined.append((part.modality, part.ids.tolist()))
        assert joined == parts
    assert [d.parts[0].modality for d in dataset.documents(1, 64)] == ["text"]  # one order, so once


def test_text_alone_is_cut_to_rows_and_a_pair_never(tmp_path):
    ids = list(range(95))
    dataset = TokenDataset(write(tmp_path / "train", [("text", "t", None, ids)]), CODECS)
    pieces = [document.spans[0] for document in dataset.plan(0, 0, 32)]
    assert [span.stop - span.start for span in pieces] == [30, 30, 30, 5] and needed(dataset) == [3]
    assert [i for document in dataset.plan(0, 0, 32) for i in dataset.read(document).parts[0].ids.tolist()] == ids
    pair = TokenDataset(write(tmp_path / "pair", [("text", "t", None, ids), ("image", "t", None, [1] * 9)]), CODECS)
    assert needed(pair) == [108] and pair.plan(0, 0, 32) == [] and pair.plan(0, 0, 108)[0].length == 108


@pytest.mark.parametrize("numbers", [(0, 2), (1, 2), (None, 0)])
def test_parts_with_a_gap_are_refused(tmp_path, numbers):
    members = [("text", "p", numbers[0], [1]), ("image", "p", numbers[1], [2])]
    with pytest.raises(UserError, match="not numbered 0, 1, 2"):
        TokenDataset(write(tmp_path / "train", members), CODECS)
