"""What of a run goes into a checkpoint and comes back from it: tensors, generators, the data's history, config.

The package `checkpoint` knows how one is written and verified; here is what is in it.
"""

import logging
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megamm import checkpoint
from megamm.checkpoint.saver import Saver
from megamm.config import RunConfig
from megamm.data.run_data import RunData
from megamm.device import Device
from megamm.engine import Engine
from megamm.errors import UserError
from megamm.mcore.groups import Groups
from megamm.resilience import events, roll_back
from megamm.start.begin import begin
from megamm.tiers.choose import choose
from megamm.tiers.local import LocalTier
from megamm.tiers.uploader import Uploader

log = logging.getLogger(__name__)
UPLOAD_SECONDS = 300.0
"""How long the end of a run waits for its last checkpoint to reach the durable tier."""


class RunStore:
    """Saves and restores one run; every rank calls every method."""

    def __init__(
        self,
        config: RunConfig,
        data: RunData,
        engine: Engine,
        groups: Groups,
        place: Device,
        while_waiting: Callable[[], None],
    ) -> None:
        """while_waiting: of Saver."""
        self.config, self.data, self.engine, self.groups, self.place = config, data, engine, groups, place
        c = config.checkpoint
        self.local = self._local_tier()
        self.saver = Saver(config.output, place, c.keep, c.keep_best, while_waiting, self.local)
        engine.before_update = self.saver.settle
        self.uploader: Uploader | None = None
        self.is_in_run = True
        """Whether what was resumed is in the run's folder, not only in the local tier."""

    def _local_tier(self) -> LocalTier | None:
        c = self.config.checkpoint
        if c.local is None:
            return None
        return LocalTier(c.local, self.config.output, c.replicate, dist.new_group(backend="gloo"))

    def save(
        self,
        step: int,
        consumed_rows: int,
        tokens: dict[str, int],
        loss_guard: dict[str, Any],
        heldout_loss: float | None,
        wait: bool = False,
        to_run: bool = True,
    ) -> float:
        """Begin to write a checkpoint of the state after that many steps and rows; the seconds that this took.

        tokens: seen so far, by modality; loss_guard as LossGuard.state gives it; heldout_loss: if measured at this
        step. With `wait` it is complete at the return; UserError on all ranks where it could not be. to_run: of
        Saver.save.
        """
        # Imported here: Megatron is loaded for the device that the run has chosen (mcore/cpu.py).
        from megamm.mcore import rng, store

        state = checkpoint.RunState(
            step=step,
            consumed_rows=consumed_rows,
            world_size=self.groups.world_size,
            layout=self.config.parallel.model_dump(),
            vocabulary=self.data.vocabulary.to_json(),
            config=self.config.model_dump(mode="json"),
            versions=store.versions(),
            mixture=self.data.to_json(consumed_rows),
            tokens=tokens,
            loss_guard=loss_guard,
            heldout_loss=heldout_loss,
        )
        if self.uploader is not None:
            self.uploader.check()
        stall = self.saver.save(state, self.engine.blocks(), rng.states(self.place), wait, to_run)
        self.poll()
        return stall

    def poll(self) -> None:
        """Say which checkpoints have been completed; to be called at every step."""
        for done in self.saver.poll():
            print(f"saved {done.folder}", flush=True)

    def drain(self) -> None:
        """Wait until nothing is being written any more."""
        self.saver.drain()
        self.poll()

    def leave_node(self, ranks: Collection[int] | None = None) -> None:
        """Free the memory of the local tier, unless it has what the run's folder lacks; ranks: only on their nodes."""
        self.drain()
        if self.local is not None:
            self.local.leave(self.saver.writing.failures == 0, ranks)

    def finish(self) -> None:
        """At the end of a run that went well: the last checkpoint reaches the durable tier."""
        if self.uploader is not None:
            self.uploader.finish(UPLOAD_SECONDS)

    def close(self) -> None:
        """Let the writer complete what it has; what is not uploaded by now is taken up at the next start."""
        self.saver.close()
        if self.local is not None:
            self.local.close()
        if self.uploader is not None:
            self.uploader.stop()

    def resume(self) -> checkpoint.RunState | None:
        """Restore engine, data and generators from the newest valid checkpoint.

        None where there is none: the run is at its first step, with the weights of config.start_from if that is set.
        """
        start, c = time.monotonic(), self.config.checkpoint
        found = choose(self.config.output, c.durable, self.local, self._needed)
        if self.local is not None:
            self.local.begin(found.step if found else -1)
        if c.durable and self.groups.rank == 0:
            self.uploader = Uploader(self.config.output, c.durable, c.keep, c.keep_best)
        if found is None:
            log.info("no checkpoint in %s: starting at step 0", self.config.output)
            if self.config.start_from is not None:
                begin(self.config, self.data.vocabulary, self.engine, self.config.start_from)
            return None
        state = self.restore(found.folder)
        self.is_in_run = found.tier != "local"
        if self.groups.rank == 0:
            seconds, folder = time.monotonic() - start, str(found.folder)
            events.record(
                self.config.output, "resumed", step=state.step, folder=folder, tier=found.tier, seconds=seconds
            )
        return state

    def _needed(self, folder: Path) -> set[str]:
        return {f"tensors/{name}" for name in self.engine.files_to_load(folder / "tensors")}

    def go_back(self, folder: Path) -> checkpoint.RunState:
        """`restore` an earlier checkpoint of the run's folder; what the local tier has counts no more."""
        self.saver.forget()
        if self.local is not None:
            self.local.begin(-1)
        return self.restore(folder)

    def checkpoint_before(self, row: int) -> Path | None:
        """Of roll_back.checkpoint_before; what is being uploaded is left, for it may be one of those set aside."""
        if self.uploader is not None:
            self.uploader.stop()
        c = self.config.checkpoint
        found = roll_back.checkpoint_before(self.config.output, row, c.durable, c.keep_best)
        if self.uploader is not None:
            self.uploader.start()
        return found

    def restore(self, folder: Path) -> checkpoint.RunState:
        """Restore engine, data and generators from a verified checkpoint."""
        from megamm.mcore import rng

        self.saver.settle()
        state = checkpoint.read_state(folder)
        config = self.config.model_dump(mode="json")
        checkpoint.check_same_model(folder, state, self.data.vocabulary, config["model"])
        checkpoint.check_same_data(folder, state, config)
        if state.mixture is not None and state.consumed_rows:
            self._resume_data(folder, state, state.mixture)
        updates = state.step - state.loss_guard.get("updates_skipped", 0)
        self.engine.load(folder / "tensors", updates, state.has_optimizer)
        same_layout = state.layout == self.config.parallel.model_dump() and state.world_size == self.groups.world_size
        if same_layout and state.has_optimizer:
            rng.restore(checkpoint.read_rng(folder, self.groups.rank), self.place)
        if self.groups.rank == 0:
            layout = "the same layout" if same_layout else f"layout {state.layout} on {state.world_size} ranks"
            print(f"resumed {folder} at step {state.step}, saved by {layout}", flush=True)
        return state

    def _resume_data(self, folder: Path, state: checkpoint.RunState, recorded: dict[str, Any]) -> None:
        """Go on in the recorded mixture; say where that of the config takes over, if it is another one."""
        try:
            change = self.data.resume(recorded, state.consumed_rows)
        except UserError as error:
            where = error.where or folder
            raise UserError(error.what, where=where, remedy=error.remedy, on_all_ranks=True) from None
        if change is not None:
            step = state.step + (change.row - state.consumed_rows) // self.config.train.global_batch + 1
            log.info("the mixture changes at row %d, in step %d: %s", change.row, step, change.what)
