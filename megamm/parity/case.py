"""A case (layout, model, mix of modalities) as one line of text, and the runs that it defines.

`world=4 mix=mixed seed=3 parallel.tensor=2 parallel.sequence=true model.moe.num_experts=4`: world size, mix (rows.py)
and seed, then config keys as in a run's YAML. Keys that a case does not name have the values of BASE.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

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
LOSS_WEIGHTS = (1.0, 0.5)
# Keys that decide which rank computes, not what is computed.
_LAYOUT_ONLY = ("parallel.", "train.recompute", "train.attention", "model.moe.dispatcher", "model.megatron.")


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
            place = nested
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = value
        return config_from_dict(nested, "parity case")

    def reference(self) -> "Run":
        """Return the run with the same numbers on one rank, with plain torch operators instead of the compiled ones.

        It also has other microbatches, unless a loss is defined per microbatch.
        """
        kept = {k: v for k, v in self.settings if not k.startswith(_LAYOUT_ONLY)}
        kept["ops"] = "torch"
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
