"""Saves and restores the state of a run: tensors, random generators, the mixture schedule, config.

The package `checkpoint` writes and verifies checkpoints; this module defines their contents.
"""

import logging
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megamm import checkpoint
from megamm.checkpoint.saver import Saver
from megamm.checkpoint.storage.choose import choose
from megamm.checkpoint.storage.local import LocalStorage
from megamm.checkpoint.storage.uploader import Uploader
from megamm.common import events
from megamm.common.device import Device
from megamm.common.errors import UserError
from megamm.config import RunConfig
from megamm.data.pipeline.run_data import RunData
from megamm.engine.api import Engine
from megamm.guards import roll_back
from megamm.init_from.initialize import init_from
from megamm.mcore.process_groups import ProcessGroups

log = logging.getLogger(__name__)
UPLOAD_SECONDS = 300.0
"""Seconds that the end of a run waits for the upload of its last checkpoint to remote storage."""


class CheckpointManager:
    """Saves and restores one run; every rank calls every method."""

    def __init__(
        self,
        config: RunConfig,
        data: RunData,
        engine: Engine,
        groups: ProcessGroups,
        device: Device,
        while_waiting: Callable[[], None],
    ) -> None:
        """while_waiting: see Saver."""
        self.config, self.data, self.engine, self.groups, self.device = config, data, engine, groups, device
        c = config.checkpoint
        self.local = self._local_storage()
        self.saver = Saver(config.output, device, c.keep, c.keep_best, while_waiting, self.local)
        engine.before_update = self.saver.settle  # the weights must not change while they are copied
        self.uploader: Uploader | None = None
        self.origin: dict[str, Any] | None = None
        """TrainState.origin of every checkpoint of the run."""
        self.is_in_run = True
        """Whether the resumed checkpoint is in the run's folder, not only in local storage."""

    def _local_storage(self) -> LocalStorage | None:
        c = self.config.checkpoint
        if c.local is None:
            return None
        return LocalStorage(c.local, self.config.output, c.replicate, dist.new_group(backend="gloo"))

    def save(
        self,
        step: int,
        consumed_rows: int,
        tokens: dict[str, int],
        loss_guard: dict[str, Any],
        heldout_loss: float | None,
        wait: bool = False,
        to_run: bool = True,
    ) -> None:
        """Start to write a checkpoint of the state after `step` steps and `consumed_rows` rows.

        tokens: seen so far, by modality; loss_guard: the result of LossGuard.state; heldout_loss: if measured at this
        step. With `wait` the checkpoint is complete on return; UserError on all ranks if it fails. to_run: see
        Saver.save.
        """
        # Imported here: Megatron is loaded for the device that the run has chosen (mcore/cpu.py).
        from megamm.mcore import rng, store

        state = checkpoint.TrainState(
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
            origin=self.origin,
        )
        if self.uploader is not None:
            self.uploader.check()
        self.saver.save(state, self.engine.blocks(), rng.states(self.device), wait, to_run)
        self.poll()

    def poll(self) -> None:
        """Print which checkpoints have been completed; call it at every step."""
        for done in self.saver.poll():
            print(f"saved {done.folder}", flush=True)

    def drain(self) -> None:
        """Wait until all writes are done."""
        self.saver.drain()
        self.poll()

    def leave_node(self, ranks: Collection[int] | None = None) -> None:
        """Free local storage, unless the run's folder lacks its state; ranks: only on these ranks' nodes."""
        self.drain()
        if self.local is not None:
            self.local.leave(self.saver.pending.failures == 0, ranks)

    def finish(self) -> None:
        """At the end of a successful run, wait until the last checkpoint is in remote storage."""
        if self.uploader is not None:
            self.uploader.finish(UPLOAD_SECONDS)

    def close(self) -> None:
        """Let the writer complete its work; the next start continues unfinished uploads."""
        self.saver.close()
        if self.local is not None:
            self.local.close()
        if self.uploader is not None:
            self.uploader.stop()

    def resume(self) -> checkpoint.TrainState | None:
        """Restore engine, data and generators from the newest valid checkpoint.

        Return None if there is none: the run starts at step 0, with the weights of config.init_from if that is set.
        """
        start, c = time.monotonic(), self.config.checkpoint
        found = choose(self.config.output, c.remote, self.local, self._needed)
        if self.local is not None:  # the next restart must not find other steps there
            self.local.begin(found.step if found else -1)
        if c.remote and self.groups.rank == 0:
            self.uploader = Uploader(self.config.output, c.remote, c.keep, c.keep_best)
        if found is None:
            log.info("no checkpoint in %s: starting at step 0", self.config.output)
            if self.config.init_from is not None:
                self.origin = init_from(self.config, self.data.vocabulary, self.engine, self.config.init_from)
            return None
        state = self.restore(found.folder)
        self.is_in_run = found.storage != "local"
        if self.groups.rank == 0:
            seconds, folder = time.monotonic() - start, str(found.folder)
            events.record(
                self.config.output, "resumed", step=state.step, folder=folder, tier=found.storage, seconds=seconds
            )
        return state

    def _needed(self, folder: Path) -> set[str]:
        return {f"tensors/{name}" for name in self.engine.files_to_load(folder / "tensors")}

    def go_back(self, folder: Path) -> checkpoint.TrainState:
        """Restore an earlier checkpoint of the run's folder and discard the steps in local storage."""
        self.saver.forget()
        if self.local is not None:
            self.local.begin(-1)
        return self.restore(folder)

    def checkpoint_before(self, row: int) -> Path | None:
        """Call roll_back.checkpoint_before; uploads stop meanwhile, since it may rename the uploaded checkpoint."""
        if self.uploader is not None:
            self.uploader.stop()
        c = self.config.checkpoint
        found = roll_back.checkpoint_before(self.config.output, row, c.remote, c.keep_best)
        if self.uploader is not None:
            self.uploader.start()
        return found

    def restore(self, folder: Path) -> checkpoint.TrainState:
        """Restore engine, data and generators from a verified checkpoint."""
        from megamm.mcore import rng

        self.saver.settle()
        state = checkpoint.read_state(folder)
        self.origin = state.origin
        config = self.config.model_dump(mode="json")
        checkpoint.check_same_model(folder, state, self.data.vocabulary, config["model"])
        checkpoint.check_same_data(folder, state, config)
        if state.mixture is not None and state.consumed_rows:
            self._resume_data(folder, state, state.mixture)
        # A skipped update did not advance the optimizer and its schedule.
        updates = state.step - state.loss_guard.get("updates_skipped", 0)
        self.engine.load(folder / "tensors", updates, state.has_optimizer)
        same_layout = state.layout == self.config.parallel.model_dump() and state.world_size == self.groups.world_size
        if same_layout and state.has_optimizer:
            # The states of the generators belong to ranks: at another layout, they start from the seed.
            rng.restore(checkpoint.read_rng(folder, self.groups.rank), self.device)
        if self.groups.rank == 0:
            layout = "the same layout" if same_layout else f"layout {state.layout} on {state.world_size} ranks"
            print(f"resumed {folder} at step {state.step}, saved by {layout}", flush=True)
        return state

    def _resume_data(self, folder: Path, state: checkpoint.TrainState, recorded: dict[str, Any]) -> None:
        """Continue with the recorded mixture; log where the config's mixture takes over, if it differs."""
        try:
            change = self.data.resume(recorded, state.consumed_rows)
        except UserError as error:
            where = error.where or folder
            raise UserError(error.what, where=where, remedy=error.remedy, on_all_ranks=True) from None
        if change is not None:
            step = state.step + (change.row - state.consumed_rows) // self.config.train.global_batch_size + 1
            log.info("the mixture changes at row %d, in step %d: %s", change.row, step, change.what)
