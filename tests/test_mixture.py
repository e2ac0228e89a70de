"""The mixture: exact proportions, every sample once an epoch, both orders; a function of (seed, mixture, block)."""

from collections import Counter

import numpy as np
import pytest

from megamm.common.errors import UserError
from megamm.data.pipeline.mixture import BLOCK, Mixture, MixtureSource, permute

SOURCES = [MixtureSource("emoji", 0.7, 3000), MixtureSource("clipart", 0.25, 9000), MixtureSource("tiny", 0.05, 37)]


def stream(mixture, blocks):
    parts = [mixture.block(w) for w in range(blocks)]
    return {
        name: np.concatenate([getattr(p, name) for p in parts]) for name in ("source", "sample", "epoch", "permutation")
    }


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 1000, 4096])
def test_permute_is_a_permutation_that_the_key_chooses(n):
    first, second = (permute(np.arange(n), n, np.uint64(key)) for key in (1, 2))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(n))
    if n > 100:
        assert (first != second).mean() > 0.9 and (first != np.arange(n)).mean() > 0.9
    assert permute(np.array([n - 1]), n, np.uint64(1)) == first[-1]  # random access


def test_a_permutation_has_no_visible_order():
    positions = permute(np.arange(20000), 20000, np.uint64(5))
    assert abs(np.corrcoef(positions, np.arange(20000))[0, 1]) < 0.03
    assert abs(np.corrcoef(positions[1:], positions[:-1])[0, 1]) < 0.03


def test_proportions_never_drift():
    mixture = Mixture(SOURCES, seed=1)
    source = stream(mixture, 5)["source"]
    for w in range(1, 6):
        counts = np.bincount(source[: w * BLOCK], minlength=3)
        assert np.abs(counts - np.array([0.7, 0.25, 0.05]) * w * BLOCK).max() <= 1
    far = mixture.counts(10**15)
    assert sum(far) == 10**15 and abs(far[2] - 5 * 10**13) <= 1


def test_every_sample_once_an_epoch_across_blocks():
    drawn = stream(Mixture(SOURCES, seed=3), 6)
    for index, source in enumerate(SOURCES):
        mine = drawn["source"] == index
        seen = Counter(zip(drawn["epoch"][mine].tolist(), drawn["sample"][mine].tolist(), strict=True))
        assert set(seen.values()) == {1}  # never twice in an epoch, although blocks cross epochs
        last = max(epoch for epoch, _ in seen)
        per_epoch = Counter(epoch for epoch, _ in seen)
        assert all(per_epoch[e] == source.documents for e in range(last))
    assert drawn["epoch"].max() > 10


def test_both_orders_of_every_sample_are_seen():
    drawn = stream(Mixture(SOURCES, seed=3), 2)
    tiny = drawn["source"] == 2
    orders = {
        (s, e): r
        for s, e, r in zip(*(drawn[k][tiny].tolist() for k in ("sample", "epoch", "permutation")), strict=True)
    }
    pairs = [(orders[s, e], orders[s, e + 1]) for s, e in orders if (s, e + 1) in orders]
    assert len(pairs) > 37 and all(now != then for now, then in pairs)
    assert 0.45 < (drawn["permutation"] % 2).mean() < 0.55


def test_a_block_depends_on_nothing_but_seed_mixture_and_number():
    mixture, fresh = Mixture(SOURCES, seed=1), Mixture(SOURCES, seed=1)
    mixture.block(0)
    for name in ("source", "sample", "epoch", "permutation"):
        assert np.array_equal(getattr(mixture.block(7), name), getattr(fresh.block(7), name))
        assert not np.array_equal(getattr(mixture.block(7), name), getattr(mixture.block(8), name))
    assert not np.array_equal(mixture.block(7).sample, Mixture(SOURCES, seed=2).block(7).sample)


def test_the_order_is_pinned():
    """A changed order breaks resuming of running jobs: these values may change only with a new major version."""
    block = Mixture(SOURCES, seed=1234).block(3)
    digest = [int((column.astype(np.int64) * np.arange(BLOCK)).sum()) for column in (block.source, block.sample)]
    assert digest == PINNED


PINNED = [2895363, 18253484774]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "no data sources"),
        ([MixtureSource("a", 0, 10)], "weight 0"),
        ([MixtureSource("a", float("nan"), 10)], "weight nan"),
        ([MixtureSource("a", 1, 0)], "has no documents"),
        ([MixtureSource("a", 1, 5), MixtureSource("a", 1, 6)], "same name"),
        ([MixtureSource("a", 1, 5), MixtureSource("b", 1e-6, 6)], "less than one in 4096"),
    ],
)
def test_wrong_mixtures_are_refused(sources, message):
    with pytest.raises(UserError, match=message):
        Mixture(sources, seed=0)


def changing(seed=3):
    """Three blocks of SOURCES, then two without clipart, then all again with a new source."""
    later = [SOURCES[2], SOURCES[0]]
    return Mixture(SOURCES, seed).then(3, later).then(5, [*SOURCES, MixtureSource("new", 0.5, 100)])


def test_epochs_go_on_through_changes_of_the_mixture():
    mixture = changing()
    drawn = stream(mixture, 8)
    for index, source in enumerate(mixture.sources):
        mine = drawn["source"] == index
        seen = Counter(zip(drawn["epoch"][mine].tolist(), drawn["sample"][mine].tolist(), strict=True))
        assert set(seen.values()) == {1}
        per_epoch = Counter(epoch for epoch, _ in seen)
        last = max(per_epoch)
        assert all(per_epoch[e] == source.documents for e in range(last)) and sum(per_epoch.values()) == mine.sum()
    blocks = [np.bincount(mixture.block(w).source, minlength=4).tolist() for w in range(8)]
    assert blocks == [mixture.counts_in(w) for w in range(8)]
    assert blocks[3][1] == 0 and blocks[3][3] == 0 and blocks[5][3] > 0
    assert np.abs(np.sum(blocks[3:5], axis=0) - 2 * BLOCK * np.array([0.7, 0, 0.05, 0]) / 0.75).max() <= 1
    assert sum(mixture.counts(10**15 + 7)) == 10**15 + 7


def test_what_was_before_a_change_stays():
    before, after = Mixture(SOURCES, seed=3), changing()
    for w in range(3):
        assert np.array_equal(before.block(w).sample, after.block(w).sample)
    assert not np.array_equal(before.block(3).sample, after.block(3).sample)
    assert after.has_shares_of(
        [MixtureSource("new", 1.0, 100), *(MixtureSource(s.name, 2 * s.weight, 1) for s in SOURCES)]
    )
    assert not after.has_shares_of(SOURCES)


def test_a_source_with_other_shards_is_refused():
    with pytest.raises(UserError, match=r"'tiny' have changed .*38 samples now, 37 before"):
        Mixture(SOURCES, seed=0).then(2, [MixtureSource("tiny", 1.0, 38)])
    with pytest.raises(UserError, match="'tiny' have changed"):
        Mixture(SOURCES, seed=0).then(2, [MixtureSource("tiny", 1.0, 37, shards="other")])
