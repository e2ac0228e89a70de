"""A run's live weights as the subject of an evaluation: losses at any layout, the documents packed as in training."""

import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megamm.common.device import Device
from megamm.common.errors import UserError
from megamm.common.sample import Batch, Document, FloatArray, Row
from megamm.config import EvaluationConfig, RunConfig
from megamm.config.suite import SamplingConfig, load_suite
from megamm.data.pipeline.packing import document_length, pack, plan_rows
from megamm.data.pipeline.run_data import RunData
from megamm.engine.api import Engine
from megamm.evaluation.made_task import MadeTask
from megamm.evaluation.report import scalars
from megamm.evaluation.subject import Prompt
from megamm.evaluation.suite import IDENTITY, Ranks, open_tasks, run_suite
from megamm.mcore.process_groups import ProcessGroups
from megamm.modalities.protocol import Modality
from megamm.model.vocabulary import Vocabulary


class EngineSubject:
    """megamm.evaluation.subject.Subject of an engine; all ranks call all methods, each data rank with its own items."""

    def __init__(self, config: RunConfig, data: RunData, engine: Engine, groups: ProcessGroups, device: Device) -> None:
        self._config, self.data, self.engine, self.groups, self.device = config, data, engine, groups, device
        self._step = 0

    def at(self, step: int) -> "EngineSubject":
        """Return this subject after a step of training."""
        self._step = step
        return self

    @property
    def config(self) -> RunConfig:
        return self._config

    @property
    def vocabulary(self) -> Vocabulary:
        return self.data.vocabulary

    @property
    def modalities(self) -> Mapping[str, Modality]:
        return self.data.modalities

    @property
    def step(self) -> int:
        return self._step

    def token_losses(self, documents: Sequence[Document]) -> Iterator[tuple[int, Row, FloatArray]]:
        """Yield (index, row, cross entropy of each label `[S]`) of every document."""
        length, specs = self.config.data.seq_length, self.data.options.packing
        sizes = [document_length(*document.sizes) for document in documents]
        plan = plan_rows(np.array(sizes, dtype=np.int64), length)
        rows = [pack([documents[i] for i in numbers], self.vocabulary, length, specs) for numbers in plan]
        losses: list[FloatArray] = []
        for batches in self._steps(rows, pack([], self.vocabulary, length, specs)):
            found = self.engine.token_losses([batch.to(self.device.torch_device) for batch in batches])
            losses += [row for loss_BS in found for row in loss_BS.cpu().numpy()]
        for numbers, loss_S in zip(plan, losses, strict=False):
            stops = list(itertools.accumulate(sizes[i] for i in numbers))
            for i, stop in zip(numbers, stops, strict=True):
                yield i, pack([documents[i]], self.vocabulary, sizes[i], specs), loss_S[stop - sizes[i] : stop]

    def _steps(self, rows: list[Row], empty: Row) -> Iterator[list[Batch]]:
        """Yield microbatches, as many as the data rank with the most rows has; a pipeline needs one for each stage."""
        micro, microbatches = self.config.train.micro_batch_size, self.config.parallel.pipeline
        most = torch.tensor([len(rows)], device=self.device.torch_device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        for first in range(0, int(most), micro * microbatches):
            parts = [rows[first + i * micro :][:micro] for i in range(microbatches)]
            yield [Batch.stack(part + [empty] * (micro - len(part))) for part in parts]

    def generate(self, prompts: Sequence[Prompt], target: str, sampling: SamplingConfig, first_seed: int) -> list[Any]:
        """Raise the UserError that names what to do instead."""
        remedy = "evaluate an export with `megamm eval EXPORT --suite FILE`"
        raise UserError("an evaluation during a run does not generate", remedy=remedy, on_all_ranks=True)


class SuiteDuringRun:
    """The suite of a run's config; its reports are RUN/evaluations/step_00000100."""

    def __init__(
        self,
        config: RunConfig,
        evaluation: EvaluationConfig,
        data: RunData,
        engine: Engine,
        groups: ProcessGroups,
        device: Device,
    ) -> None:
        """UserError, before the first step, if the suite cannot run."""
        self.every, self.folder, self.groups = evaluation.every, config.output / "evaluations", groups
        self.subject = EngineSubject(config, data, engine, groups, device)
        self.suite = load_suite(evaluation.suite)
        for name, task in open_tasks(self.subject, self.suite, self.folder):
            if isinstance(task, MadeTask):
                remedy = "remove the task, and evaluate an export with `megamm eval EXPORT --suite FILE`"
                raise UserError(
                    f"task {name} generates, which a run's suite does not", remedy=remedy, on_all_ranks=True
                )

    def run(self, step: int, consumed_rows: int, beat: Callable[[], None]) -> dict[str, float]:
        """Evaluate the weights after a step; what an earlier attempt of the same step has computed is not repeated."""
        g = self.groups
        is_first_of_data_rank = g.tensor_rank == g.pipeline_rank == g.context_rank == 0
        ranks = Ranks(g.data_rank, g.data_size, is_first_of_data_rank, g.rank == 0, dist.barrier, beat)
        report, digest = self.folder / f"step_{step:08d}", f"rows {consumed_rows}"
        if g.rank == 0:
            self._remove_other(report, digest)
        result = run_suite(self.subject.at(step), self.suite, report, digest, ranks)
        return scalars(result["figures"])

    def _remove_other(self, report: Path, digest: str) -> None:
        """Remove the report of this step if it is of other weights: after a roll-back, or with another suite."""
        file = report / IDENTITY
        wanted = {"model": digest, "suite": self.suite.model_dump(mode="json")}
        if file.is_file() and wanted.items() <= json.loads(file.read_bytes()).items():
            return
        shutil.rmtree(report, ignore_errors=True)
