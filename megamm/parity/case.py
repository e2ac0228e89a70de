"""A case (layout, model, mix of modalities) as one line of text, the runs that it defines, and their results.

`world=4 mix=mixed seed=3 parallel.tensor=2 parallel.sequence=true model.moe.num_experts=4`: world size, mix (rows.py)
and seed, then config keys as in a run's YAML. Keys that a case does not name have the values of BASE.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from megamm.common.errors import UserError
from megamm.config import RunConfig, config_from_dict
from megamm.model import layout
from megamm.parity import rows

BASE: dict[str, Any] = {
    "output": "unused",
    "model.num_layers": 4,
    "model.hidden_size": 48,
    "model.ffn_hidden_size": 80,
    "model.num_attention_heads": 4,
    "model.num_query_groups": 2,
    "model.head_dim": 16,
    # Larger than for training, so that attention and routing are not almost uniform.
    "model.init_std": 0.08,
    "data.seq_length": 48,
    "data.sources": [{"path": "unused"}],
    "tokenizers.text": "unused",
    # Adam's update is g / |g| where |g| >> eps: rounding of a gradient near zero would decide its sign. With this eps
    # the updates of two layouts are as close as their gradients.
    "optimizer.eps": 1e-3,
    "optimizer.lr": 1e-2,
    "optimizer.clip_grad": 1.0,
    "train.steps": 10,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 2,
}
BOUNDS = {"loss": 1e-6, "gradient": 1e-5, "gradient norm": 1e-5, "parameter": 1e-5}
"""Maximum relative errors from rounding in float32; a tensor's error is the norm of the difference over the norm."""
LOSS_WEIGHTS = (1.0, 0.5)
# Keys that decide which rank computes, not what is computed.
_LAYOUT_ONLY = (
    *("parallel.", "train.recompute", "train.attention", "train.experts", "model.moe.dispatcher", "model.megatron."),
)


@dataclass(frozen=True)
class Run:
    """The computation of one world; `muted` rows keep their tokens but have no loss."""

    world: int
    seed: int
    settings: tuple[tuple[str, Any], ...]
    rows: tuple[tuple[tuple[bool, bool], ...], ...]
    weights: tuple[float, ...] = LOSS_WEIGHTS
    muted: frozenset[int] = frozenset()

    @property
    def config(self) -> RunConfig:
        """The run's configuration. UserError if a key or value is wrong."""
        nested: dict[str, Any] = {}
        for key, value in (BASE | dict(self.settings)).items():
            *parents, last = key.split(".")
            section = nested
            for parent in parents:
                section = section.setdefault(parent, {})
            section[last] = value
        return config_from_dict(nested, "parity case")

    def reference(self) -> "Run":
        """Return the run with the same numbers on one rank, with plain torch operators instead of the compiled ones,
        and experts one after another.

        It also has other microbatches, unless a loss is defined per microbatch.
        """
        kept = {k: v for k, v in self.settings if not k.startswith(_LAYOUT_ONLY)}
        kept["ops"], kept["train.experts"] = "torch", "sequential"
        if not kept.get("model.moe.aux_loss_coeff"):
            kept["train.micro_batch_size"] = 1
        return replace(self, world=1, settings=tuple(sorted(kept.items())))

    def name(self) -> str:
        """Return a short hash of everything that this run computes."""
        fields = asdict(self) | {"muted": sorted(self.muted)}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Case:
    """One composition to prove; settings are config keys with values, sorted by key."""

    world: int
    mix: str = "mixed"
    seed: int = 1
    settings: tuple[tuple[str, Any], ...] = field(default=())

    @classmethod
    def of(cls, world: int, settings: dict[str, Any], mix: str = "mixed", seed: int = 1) -> "Case":
        """Create a case from a mapping of dotted keys."""
        frozen = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
        return cls(world, mix, seed, tuple(sorted(frozen.items())))

    @classmethod
    def parse(cls, line: str) -> "Case":
        """Parse the text that `line` writes. UserError for anything else."""
        given: dict[str, Any] = {}
        for word in line.split():
            key, separator, text = word.partition("=")
            if not separator:
                raise UserError(f"{word!r} is not key=value", where="case", remedy="write for example world=2")
            given[key] = yaml.safe_load(text)
        world, mix, seed = given.pop("world", 1), given.pop("mix", "mixed"), given.pop("seed", 1)
        if mix not in rows.MIXES:
            raise UserError(f"unknown mix {mix!r}", where="case", remedy=f"use one of {', '.join(rows.MIXES)}")
        return cls.of(world, given, mix, seed)

    def line(self) -> str:
        """Return the case as one line."""
        words = [f"world={self.world}", f"mix={self.mix}", f"seed={self.seed}"]
        return " ".join(words + [f"{k}={_text(v)}" for k, v in self.settings])

    def with_setting(self, key: str, value: Any) -> "Case":
        """Return the case with one key set, or reset to its default (value None)."""
        kept = {k: v for k, v in self.settings if k != key}
        return Case.of(self.world, kept | ({} if value is None else {key: value}), self.mix, self.seed)

    def with_settings(self, settings: Iterable[tuple[str, Any]]) -> "Case":
        """Return the case with these keys set."""
        return Case.of(self.world, dict(self.settings) | dict(settings), self.mix, self.seed)

    @property
    def config(self) -> RunConfig:
        """The configuration of the settings, even if the layout is rejected. UserError for a wrong key."""
        return Run(self.world, self.seed, self.settings, ()).config

    def run(self) -> Run:
        """Return the computation of the case's ranks. UserError if the layout is rejected."""
        config = self.config
        layout.check(config, self.world)
        batch, micro = config.train.global_batch_size, config.train.micro_batch_size
        data = config.data_parallel(self.world)
        steps = []
        for step in range(1, rows.steps_of(self.mix) + 1):
            kinds = rows.kinds(self.mix, step, batch, micro, data)
            steps.append(tuple((i in kinds.text, i in kinds.image) for i in range(batch)))
        return Run(self.world, self.seed, self.settings, tuple(steps))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


@dataclass(frozen=True)
class ParityJob:
    """A job for all ranks. reference: file that is written if `makes_reference`, otherwise compared with.

    fault: changes this process before the model is built (for tests of the harness). with_values: report the values of
    differing blocks. first_step_only: stop after the first gradients.
    """

    run: Run
    reference: Path
    makes_reference: bool = False
    fault: Callable[[], None] | None = None
    with_values: bool = False
    first_step_only: bool = False


@dataclass(frozen=True)
class Extent:
    """The block of the whole tensor `key` at this offset and of this size; exactly one replica is main."""

    key: str
    offset: tuple[int, ...]
    size: tuple[int, ...]
    is_main: bool

    def box(self) -> tuple[slice, ...]:
        """Return the block as an index into the whole tensor."""
        return tuple(slice(start, start + n) for start, n in zip(self.offset, self.size, strict=True))


@dataclass(frozen=True)
class TensorDifference:
    """A block that differs from the reference.

    ratio: the factor with which the reference is closest to it; residual: the relative distance from that multiple.
    values: only if requested.
    """

    what: str
    step: int
    extent: Extent
    error: float
    ratio: float
    residual: float
    values: npt.NDArray[np.float32] | None = None


@dataclass
class RankReport:
    """Report of one rank: its mesh coordinates; per step the loss and token count by modality and the grad norm."""

    coordinates: dict[str, int]
    sizes: dict[str, int]
    loss: list[list[float]] = field(default_factory=list)
    count: list[list[float]] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    extents: list[Extent] = field(default_factory=list)
    differences: list[TensorDifference] = field(default_factory=list)
    worst: dict[str, float] = field(default_factory=dict)
    routed: dict[tuple[str, int], int] = field(default_factory=dict)
    strange: list[str] = field(default_factory=list)
    margin: float = float("inf")


@dataclass
class CaseOutcome:
    """Result of a case. verdict: proven, refused, mismatch, crash or hang; findings: errors, or why it is refused."""

    case: str
    verdict: str
    findings: list[str] = field(default_factory=list)
    worst: dict[str, float] = field(default_factory=dict)
    coordinates: list[dict[str, int]] = field(default_factory=list)
    seconds: float = 0.0

    def text(self) -> str:
        """Format the outcome for people."""
        figures = "  ".join(f"{name} {error:.1e}" for name, error in self.worst.items())
        return "\n".join([f"{self.verdict:9}{self.seconds:5.1f} s  {self.case}  {figures}", *self.findings])
