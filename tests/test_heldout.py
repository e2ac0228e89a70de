"""Held-out combinations: new orders of words that all occur in training, and which rule holds a sample out."""

import json
import math

import pytest
from source_packages import dotted_png

from megamm.common.errors import UserError
from megamm.data.build.heldout import Heldout, words
from megamm.data.build.shards import BuildOptions, build
from megamm.data.raw.samples import RawPart, RawSample
from megamm.evaluation.losses import heldout_rules
from megamm.shards.folder import ShardFolder

ROLES, TONES = ("cook", "judge", "pilot", "guard", "mage", "elf"), ("light", "medium-dark", "dark", "yellow")
GRID = [f"{role}, {gender}, {tone} skin" for role in ROLES for gender in ("man", "woman") for tone in TONES]


def samples(captions):
    return [RawSample(f"s{i}", c.split(",")[0].casefold(), (RawPart("text", c),)) for i, c in enumerate(captions)]


def split(captions, nouns, combinations):
    """Return (training texts, texts held out as combinations, texts held out by noun)."""
    made = samples(captions)
    heldout = Heldout.of(made, nouns, combinations)
    found = {"train": [], "combination": [], "noun": []}
    for sample, caption in zip(made, captions, strict=True):
        found[heldout.rule(sample.key) if sample.key in heldout else "train"].append(caption)
    return found["train"], found["combination"], found["noun"]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.95, 1.0])
def test_every_word_of_a_held_out_combination_occurs_in_training(share):
    train, combinations, nouns = split(GRID, 0.0, share)
    assert combinations and not nouns
    assert set().union(*map(words, combinations)) <= set().union(*map(words, train))
    if share < 0.9:
        assert len(combinations) == round(share * len(GRID))
    else:  # words would be missing
        assert len(combinations) < share * len(GRID)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.35])
def test_every_word_loses_about_the_same_share_of_its_texts(share):
    _, combinations, _ = split(GRID, 0.0, share)
    for word in set().union(*map(words, GRID)):
        held, occurs = (sum(word in words(text) for text in texts) for texts in (combinations, GRID))
        assert held <= math.ceil(share * occurs), word


def test_a_word_is_counted_apart_with_pictures_and_with_videos():
    sides = {"image": ("",), "video": ("left, ", "right, ", "up, ", "down, ")}
    made = [
        RawSample(f"{kind}-{i}-{j}", "cook", (RawPart("text", f"{side}{text}"), RawPart(kind, "file")))
        for i, text in enumerate(GRID)
        for kind in sides
        for j, side in enumerate(sides[kind])
    ]
    heldout = Heldout.of(made, 0.0, 0.25).combinations
    for word in set().union(*map(words, GRID)):
        of_pictures = [s.key for s in made if s.key.startswith("image") and word in words(s.parts[0].content)]
        assert len(heldout.intersection(of_pictures)) <= math.ceil(0.25 * len(of_pictures)), word
    assert any(key.startswith("image") for key in heldout)


def test_of_long_texts_the_share_is_reached_too():
    captions = [f"{caption} before a wall of stone, seen from {side}" for caption in GRID for side in ("left", "right")]
    train, combinations, _ = split(captions, 0.0, 0.4)
    assert len(combinations) == round(0.4 * len(captions))
    assert set().union(*map(words, combinations)) <= set().union(*map(words, train))


def test_a_text_with_a_word_of_its_own_is_trained_on():
    train, combinations, _ = split([*GRID, "astronaut, woman, light skin"], 0.0, 1.0)
    assert "astronaut, woman, light skin" in train and combinations


def test_nouns_are_held_out_first_and_one_text_is_on_one_side():
    captions = [caption for caption in GRID for _ in range(3)] + [caption.upper() for caption in GRID]
    train, combinations, nouns = split(captions, 0.3, 0.3)
    assert train and combinations and nouns
    sides = [{caption.casefold() for caption in side} for side in (train, combinations, nouns)]
    assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]
    assert not {c.split(",")[0] for c in sides[2]} & {c.split(",")[0] for c in sides[0] | sides[1]}


def test_samples_without_text_are_no_combinations():
    pictures = [RawSample(f"p{i}", f"p{i}", (RawPart("image", f"{i}.png"),)) for i in range(20)]
    assert Heldout.of(pictures, 0.0, 1.0) == Heldout(frozenset(), frozenset())


def test_the_build_says_by_which_rule_a_sample_is_held_out(tmp_path):
    raw = tmp_path / "people"
    raw.mkdir()
    lines = []
    for i, caption in enumerate(GRID):
        (raw / f"{i}.png").write_bytes(dotted_png((i, 2 * i, 3 * i)))
        lines.append(
            json.dumps({"key": f"k{i}", "noun": caption.split(",")[0], "image": f"{i}.png", "caption": caption})
        )
    (raw / "samples.jsonl").write_text("\n".join(lines))
    (report,) = build([raw], tmp_path / "shards", BuildOptions(heldout=0.2, heldout_combinations=0.25))
    rules = heldout_rules(tmp_path / "shards" / "people")
    texts = {name: ShardFolder(tmp_path / "shards" / "people" / name / "text") for name in ("train", "heldout")}
    assert set(rules) == set(texts["heldout"].keys) and len(rules) == report.heldout
    train = {words(texts["train"].read(i).decode()) for i in range(len(texts["train"]))}
    seen = frozenset().union(*train)
    for i, key in enumerate(texts["heldout"].keys):
        unseen = words(texts["heldout"].read(i).decode()) - seen
        assert (rules[key] == "noun") == bool(unseen)
    assert set(rules.values()) == {"noun", "combination"}
    assert heldout_rules(tmp_path) == {}


def test_a_share_of_combinations_beyond_one_is_a_user_error():
    with pytest.raises(UserError, match=r"heldout_combinations is 1\.5"):
        BuildOptions(heldout_combinations=1.5)
