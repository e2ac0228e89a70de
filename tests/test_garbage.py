"""Python's garbage collector in the training loop: when it runs, and that a step leaves it no tensor."""

import gc
import weakref
from typing import Any

import pytest
import torch
from step_costs_worker import CONFIG, LENGTH, ROWS

from megamm.common.device import choose
from megamm.config import config_from_dict
from megamm.mcore import process_groups
from megamm.parity.rows import VOCABULARY, global_batch, rank_batches
from megamm.parity.worlds import WorldFailure, Worlds
from megamm.train.garbage import GarbageCollection


class Node:
    """A cycle: only the collector frees it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.mark.parametrize(("every", "collected_after"), [(3, 3), (2, 2), (1, 1)])
def test_cycles_are_collected_at_the_interval(every: int, collected_after: int) -> None:
    collection = GarbageCollection(every)
    collection.begin()
    try:
        assert not gc.isenabled()
        node = weakref.ref(Node())
        steps = 0
        while node() is not None:
            steps += 1
            collection.end_step(steps)
        assert steps == collected_after
    finally:
        collection.close()
    assert gc.isenabled()


def test_with_zero_nothing_changes() -> None:
    frozen, collection = gc.get_freeze_count(), GarbageCollection(0)
    collection.begin()
    assert gc.isenabled() and gc.get_freeze_count() == frozen
    collection.end_step(1)
    collection.close()
    assert gc.isenabled()


def tensors_in_cycles(recompute: Any) -> list[str]:
    """Run a step and an evaluation; return the tensors that only the collector would free."""
    settings = {"train": CONFIG["train"] | {"recompute": recompute}, "parallel": {}}
    config = config_from_dict(CONFIG | settings, "test")
    groups = process_groups.build(config.parallel, seed=5)
    from megamm.engine.native import NativeEngine

    engine = NativeEngine(config, VOCABULARY, groups, choose("cpu"))
    batches = rank_batches(global_batch(1, 1, [(True, True)] * ROWS, LENGTH), 1, 0, 1)

    def step() -> None:
        engine.compute_gradients(batches, torch.ones(2, dtype=torch.float64))
        engine.apply_update()
        engine.evaluate(batches, torch.ones(2, dtype=torch.float64))

    step()  # what is made once is not left behind by each step
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    step()
    gc.collect()
    return [f"{tuple(x.shape)} {x.dtype}" for x in gc.garbage if isinstance(x, torch.Tensor)]


MODULES = {"modules": ["norms", "activation", "moe"]}


@pytest.mark.parametrize(
    "recompute", [MODULES, *(pytest.param(x, marks=pytest.mark.everything) for x in ("none", "full"))]
)
def test_a_step_leaves_no_tensor_to_the_collector(worlds: Worlds, recompute: Any) -> None:
    found = worlds.run(1, tensors_in_cycles, recompute, timeout=60)
    assert not isinstance(found, WorldFailure), found.lines()
    assert found == [[]]
