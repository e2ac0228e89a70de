"""Sets the weights of a run that starts from others: each rank reads, moves and initialises the values that it holds.

Every rank reads only what it needs, directly into its live tensors. Weights are read from the source's float32 copies
where these exist, and so are the float32 copies of a bfloat16 run; moments, step and schedule start fresh. The log
reports the result for every range of the vocabulary, and which tensors are new or skipped.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import TypeAdapter

from megamm.checkpoint import folder
from megamm.checkpoint.tensor_shards import Shape, TensorShard
from megamm.common import events
from megamm.common.collectives import Collectives
from megamm.common.errors import UserError
from megamm.config import InitFromConfig, ModelConfig, RunConfig
from megamm.config.model import FUNCTION
from megamm.engine.api import Engine
from megamm.init_from import new_rows, rules
from megamm.init_from.new_rows import RowDistribution
from megamm.init_from.rules import VocabularyResize, resize_vocabulary
from megamm.init_from.source import MAIN_COPY, WeightSource, open_unverified, opened
from megamm.model.vocabulary import Vocabulary

log = logging.getLogger(__name__)
WINDOW = 1 << 22
"""Values of text rows in memory at a time, for computing their mean and deviation."""


def check(config: RunConfig, vocabulary: Vocabulary) -> dict[str, Any] | None:
    """Check `init_from` before any process runs, as far as no tensors are needed.

    Return the source's TrainState.origin; None without a source, or if the run has checkpoints of its own. Raises
    UserError as `init_from` does.
    """
    start, run = config.init_from, config.output
    has_own = config.checkpoint.remote is not None or any(folder.all_of(run))
    source = None if start is None or has_own else open_unverified(start.checkpoint, config.data.seq_length)
    if start is not None and source is not None:
        _plan_resize(config, vocabulary, start, source)
    return None if source is None else source.origin


def init_from(
    config: RunConfig, vocabulary: Vocabulary, engine: Engine, start: InitFromConfig
) -> dict[str, Any] | None:
    """Set the engine's weights as `start` describes; return the source's TrainState.origin.

    Raises UserError, the same on all ranks, if that is impossible.
    """
    ranks = Collectives()
    with opened(start.checkpoint, config.output, config.data.seq_length, ranks) as source:
        engine.init_weights(_WeightInitializer(config, vocabulary, start, source, ranks))
        if ranks.rank == 0:
            events.record(config.output, "started_from", place=start.checkpoint, folder=str(source.where))
            print(f"started from {source.where}", flush=True)
        return source.origin


class _WeightInitializer:
    """Implements megamm.engine.api.WeightInitializer: sets the blocks that the engine passes to it."""

    def __init__(
        self, config: RunConfig, vocabulary: Vocabulary, start: InitFromConfig, source: WeightSource, ranks: Collectives
    ) -> None:
        self.config, self.start, self.source, self.ranks = config, start, source, ranks
        self.resize: VocabularyResize = ranks.together(lambda: _plan_resize(config, vocabulary, start, source))

    def __call__(self, blocks: Sequence[TensorShard], whole: Mapping[str, Shape], tables: set[str]) -> None:
        """Set the blocks of this rank. whole: shapes of the run's tensors; tables: those with a row for each id."""
        actions: dict[str, str] = self.ranks.together(lambda: self._decide(whole, tables))
        if self.ranks.rank == 0:
            self._log_decision(actions)
        distributions = self._text_distributions(tables, actions)
        # New values are set block by block; what comes from the source is collected and read in one call, because
        # reading a Hugging Face folder joins each group once for all blocks that need it.
        to_read: list[TensorShard] = []
        for block in blocks:
            name = block.key.removeprefix(MAIN_COPY)
            if name in tables:
                to_read += self._set_new_rows(block, name, actions[name] == "new", distributions)
            elif actions[name] == "new":
                self._init_new(block, name)
            else:
                to_read.append(self._from_source(block, name))
        self.ranks.together(lambda: self.source.read(to_read))

    def _decide(self, whole: Mapping[str, Shape], tables: set[str]) -> dict[str, str]:
        theirs = {name: shape for name, shape in self.source.shapes.items() if not name.startswith("optimizer.")}
        pairs = [pair for rule in self.start.rules for pair in rule.items()]
        try:
            return rules.decide(theirs, whole, tables, pairs)
        except UserError as error:
            raise UserError(error.what, where=self.source.where, remedy=error.remedy) from None

    def _log_decision(self, actions: Mapping[str, str]) -> None:
        for line in self.resize.lines:
            log.info("vocabulary: %s", line)
        by_action: dict[str, list[str]] = {"load": [], "new": [], "ignore": []}
        for name in sorted(self.source.shapes.keys() | actions.keys()):
            if not name.startswith("optimizer."):
                by_action[actions.get(name, "ignore")].append(name)
        log.info("tensors: %d loaded from %s", len(by_action["load"]), self.source.where)
        for action, what in (("new", "new, initialised as in a new model"), ("ignore", "skipped")):
            if by_action[action]:
                log.info("tensors %s: %s", what, ", ".join(by_action[action]))

    def _from_source(self, block: TensorShard, name: str) -> TensorShard:
        """The block as the source is asked for it: of the float32 copy where there is one."""
        key = MAIN_COPY + name if MAIN_COPY + name in self.source.shapes else name
        return replace(block, key=key, shape=tuple(self.source.shapes[key]), grows=False)

    def _init_new(self, block: TensorShard, name: str, rows: RowDistribution | None = None) -> None:
        new_rows.init_new(block, name, self.config.model, self.config.train.seed, rows)

    def _set_new_rows(
        self, block: TensorShard, name: str, is_new: bool, distributions: Mapping[str, RowDistribution]
    ) -> list[TensorShard]:
        """Set the new rows and the padding of a table's block; returns the blocks to read from the source.

        is_new: no row comes from the source, and all are initialised as in a new model.
        """
        first, stop, size = block.offset[0], block.offset[0] + block.size[0], self.resize.spans[-1].stop
        read = []
        for span in self.resize.spans:  # the part of each span that this block holds
            low, high = max(first, span.start), min(stop, span.stop)
            if low >= high:
                continue
            rows = _rows_of(block, low, high)
            if is_new or span.taken_from is None:
                self._init_new(rows, name, None if is_new else distributions[name])
            else:
                row = span.taken_from + low - span.start
                read.append(self._from_source(replace(rows, offset=(row, *rows.offset[1:])), name))
        if stop > size:  # padding rows for tensor parallelism have no id
            _rows_of(block, max(first, size), stop).data.zero_()
        return read

    def _text_distributions(self, tables: set[str], actions: Mapping[str, str]) -> dict[str, RowDistribution]:
        """The distribution of text rows in each loaded table; empty if the vocabulary has no new rows.

        The first rank computes it for all: each rank would read the whole table.
        """
        if all(span.taken_from is not None for span in self.resize.spans):
            return {}
        loaded = [name for name in sorted(tables) if actions[name] == "load"]
        found: dict[str, RowDistribution] = self.ranks.on_first(
            lambda: {name: self._text_distribution(name) for name in loaded}
        )
        return found

    def _text_distribution(self, name: str) -> RowDistribution:
        """Mean and deviation of the source's text rows, window by window: independent of how they are stored."""
        text, width = self.resize.text, self.source.shapes[name][1]
        # float64, because E[x^2] - E[x]^2 loses digits where the mean is large against the deviation.
        total = torch.zeros(2, width, dtype=torch.float64)
        step = max(1, WINDOW // width)
        for row in range(text.start, text.stop, step):
            rows = torch.empty(min(step, text.stop - row), width)
            self.source.read([self._from_source(TensorShard(name, (), (row, 0), tuple(rows.shape), rows), name)])
            total += torch.stack([rows.sum(0, dtype=torch.float64), rows.square().sum(0, dtype=torch.float64)])
        mean, square = total / len(text)
        return RowDistribution(mean.float(), (square - mean.square()).clamp(min=0).sqrt().float())


def _plan_resize(
    config: RunConfig, vocabulary: Vocabulary, start: InitFromConfig, source: WeightSource
) -> VocabularyResize:
    """Plan the change from the source's vocabulary to the run's. Raises UserError if model or vocabulary do not fit."""
    try:
        _check_function(source.model, config, start.model_changes)
        return resize_vocabulary(source.vocabulary, vocabulary, start.vocabulary)
    except UserError as error:
        raise UserError(error.what, where=source.where, remedy=error.remedy) from None


def _rows_of(block: TensorShard, low: int, high: int) -> TensorShard:
    """Rows [low, high) of the whole tensor, all of which are in the block."""
    first = low - block.offset[0]
    data = block.data.view(block.size)[first : first + high - low]
    return replace(block, offset=(low, *block.offset[1:]), size=(high - low, *block.size[1:]), data=data)


def _check_function(theirs: Mapping[str, Any], config: RunConfig, admitted: Sequence[str]) -> None:
    """Raise UserError for a key that changes what the same tensors compute, unless it is in `admitted`."""
    ours = config.model.model_dump(mode="json")
    # A source older than a key behaves like today's default of this key.
    fields = ModelConfig.model_fields.items()
    default = {name: field.get_default() for name, field in fields if not field.is_required()}
    defaults = TypeAdapter(dict[str, Any]).dump_python(default, mode="json")
    unknown = next((key for key in admitted if key not in FUNCTION), None)
    if unknown is not None:
        what = f"init_from.model_changes: {unknown} is not one of the keys that it can admit"
        raise UserError(what, remedy=f"use only {', '.join(FUNCTION)}")
    for key in FUNCTION:
        before, after = _at(theirs, key), _at(ours, key)
        if before is None:
            before = _at(defaults, key)
        if before is None or before == after:
            continue
        if key not in admitted:
            what = (
                f"model.{key} is {before} in the source, but {after} in the config: the same weights would compute "
                f"something else"
            )
            raise UserError(what, remedy=f"set model.{key}: {before}, or add {key} to init_from.model_changes")
        log.info("model.%s: %s in the source, now %s: allowed by init_from.model_changes", key, before, after)


def _at(section: Mapping[str, Any], key: str) -> Any:
    """A dotted key's value; None if it is missing."""
    *sections, last = key.split(".")
    for name in sections:
        section = section.get(name) or {}
    return section.get(last)
