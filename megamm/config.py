"""The typed configuration of a run: a YAML file plus dotted `key=value` overrides.

An unknown or ill-typed key is one line that names the nearest valid key; `RunConfig.check` refuses
impossible layouts before any process starts. Nothing here imports torch.
"""

import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megamm.errors import UserError


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MoEConfig(_Section):
    """Mixture of experts in every layer; num_experts 0 means a dense model."""

    num_experts: int = Field(0, ge=0)
    top_k: int = Field(2, ge=1)
    ffn_hidden_size: int = Field(0, ge=0)
    aux_loss_coeff: float = Field(0.0, ge=0)
    dispatcher: Literal["alltoall", "allgather"] = "alltoall"


class ModelConfig(_Section):
    """The backbone. `megatron` passes further TransformerConfig fields through as they are."""

    num_layers: int = Field(ge=1)
    hidden_size: int = Field(ge=8)
    ffn_hidden_size: int = Field(ge=8)
    num_attention_heads: int = Field(ge=1)
    num_query_groups: int = Field(ge=1)
    head_dim: int = Field(ge=2, multiple_of=2)
    rope_base: float = Field(1_000_000.0, gt=0)
    norm_eps: float = Field(1e-6, gt=0)
    init_std: float = Field(0.02, gt=0)
    tie_embeddings: bool = False
    moe: MoEConfig = MoEConfig()
    megatron: dict[str, Any] = {}


class ParallelConfig(_Section):
    """Ranks per dimension; data parallel is what is left of the world size."""

    tensor: int = Field(1, ge=1)
    pipeline: int = Field(1, ge=1)
    context: int = Field(1, ge=1)
    expert: int = Field(1, ge=1)
    sequence: bool = False


class SourceConfig(_Section):
    """One shard set of the mixture (a folder holding train/ and heldout/) and its weight."""

    path: Path
    weight: float = Field(1.0, gt=0)


class DataConfig(_Section):
    """The mixture and the length of a packed row in tokens."""

    sources: list[SourceConfig] = Field(min_length=1)
    seq_length: int = Field(ge=8)


class OptimizerConfig(_Section):
    """AdamW and its learning-rate schedule; steps count optimizer steps."""

    lr: float = Field(gt=0)
    min_lr: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["cosine", "wsd"] = "cosine"
    decay_steps: int = Field(0, ge=0, description="WSD: length of the decay at the end")
    weight_decay: float = Field(0.1, ge=0)
    beta1: float = Field(0.9, gt=0, lt=1)
    beta2: float = Field(0.95, gt=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    clip_grad: float = Field(1.0, ge=0)


class TrainConfig(_Section):
    """Batch sizes in rows, and what is run how often."""

    steps: int = Field(ge=1)
    stop_after: int = Field(0, ge=0, description="end after this step; the schedule stays that of all steps; 0: never")
    global_batch: int = Field(ge=1)
    micro_batch: int = Field(ge=1)
    seed: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    recompute: Literal["none", "selective", "full"] = "none"
    log_every: int = Field(10, ge=1)
    eval_every: int = Field(0, ge=0)
    checkpoint_every: int = Field(0, ge=0)
    keep_checkpoints: int = Field(2, ge=1)


class RunConfig(_Section):
    """A whole run. `output` receives checkpoints, metrics and logs."""

    output: Path
    device: Literal["auto", "cpu", "gpu"] = "auto"
    model: ModelConfig
    data: DataConfig
    tokenizers: dict[str, Path]
    optimizer: OptimizerConfig
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    loss_weights: dict[str, float] = {}

    def data_parallel(self, world_size: int) -> int:
        """Ranks per data-parallel group (context parallel not counted)."""
        p = self.parallel
        return world_size // (p.tensor * p.pipeline * p.context)

    def check(self, world_size: int) -> None:
        """Refuse what cannot run on world_size ranks: one UserError, before any process starts."""
        m, p, t = self.model, self.parallel, self.train
        product = p.tensor * p.pipeline * p.context
        _divisible("world size", world_size, "tensor x pipeline x context", product, "start a multiple of that many")
        _divisible("model.num_attention_heads", m.num_attention_heads, "parallel.tensor", p.tensor)
        _divisible("model.num_query_groups", m.num_query_groups, "parallel.tensor", p.tensor)
        _divisible("model.num_attention_heads", m.num_attention_heads, "model.num_query_groups", m.num_query_groups)
        _divisible("model.ffn_hidden_size", m.ffn_hidden_size, "parallel.tensor", p.tensor)
        _divisible("model.num_layers", m.num_layers, "parallel.pipeline", p.pipeline)
        _divisible("data.seq_length", self.data.seq_length, "parallel.tensor", p.tensor if p.sequence else 1)
        data_parallel = self.data_parallel(world_size)
        _divisible("train.global_batch", t.global_batch, "micro_batch x data parallel", t.micro_batch * data_parallel)
        if p.context > 1:
            raise UserError("parallel.context > 1 is not supported yet", remedy="set parallel.context=1")
        if p.sequence and p.tensor == 1:
            raise UserError("parallel.sequence needs parallel.tensor > 1", remedy="set parallel.sequence=false")
        self._check_experts(data_parallel)
        self._check_schedule()

    def _check_experts(self, data_parallel: int) -> None:
        moe, p = self.model.moe, self.parallel
        if moe.num_experts == 0:
            if p.expert > 1:
                raise UserError("parallel.expert > 1 with a dense model", remedy="set model.moe.num_experts")
            return
        _divisible("model.moe.num_experts", moe.num_experts, "parallel.expert", p.expert)
        # Experts are not split over tensor parallel (ETP = 1): expert parallel ranks come from TP x DP.
        _divisible("data parallel x tensor", data_parallel * p.tensor, "parallel.expert", p.expert)
        if moe.top_k > moe.num_experts:
            raise UserError("model.moe.top_k > model.moe.num_experts", remedy="choose a smaller top_k")
        if moe.ffn_hidden_size == 0:
            raise UserError("model.moe.ffn_hidden_size is not set", remedy="set the hidden size of one expert")
        if p.tensor > 1 and not p.sequence:
            raise UserError("MoE with parallel.tensor > 1 needs sequence parallel", remedy="set parallel.sequence=true")

    def _check_schedule(self) -> None:
        o, t = self.optimizer, self.train
        if o.warmup_steps >= t.steps and t.steps > 1:
            raise UserError(
                f"optimizer.warmup_steps={o.warmup_steps} leaves nothing of train.steps={t.steps}",
                remedy="choose a shorter warm-up",
            )
        if o.schedule == "wsd" and not 0 < o.decay_steps <= t.steps - o.warmup_steps:
            raise UserError("optimizer.schedule=wsd needs decay_steps", remedy="set 0 < decay_steps <= steps - warmup")
        if o.schedule == "cosine" and o.decay_steps:
            raise UserError("optimizer.decay_steps is for schedule=wsd", remedy="remove it, cosine decays to the end")
        if o.min_lr > o.lr:
            raise UserError("optimizer.min_lr > optimizer.lr", remedy="choose a smaller min_lr")


def _divisible(what: str, value: int, by: str, divisor: int, remedy: str = "change one of the two") -> None:
    if value % divisor or value < divisor:
        raise UserError(f"{what} = {value} is not divisible by {by} = {divisor}", remedy=remedy)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the YAML file, apply overrides like `train.steps=100`, validate. UserError names the key."""
    try:
        data = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError("no such config file", where=path, remedy="name one of examples/*.yaml") from None
    except yaml.YAMLError as error:
        raise UserError(f"not valid YAML: {error}", where=path, remedy="mend the file") from None
    if not isinstance(data, dict):
        raise UserError("the config is not a mapping", where=path, remedy="start from examples/cpu_tiny.yaml")
    for override in overrides:
        _apply_override(data, override)
    return config_from_dict(data, where=path)


def config_from_dict(data: dict[str, Any], where: str | Path) -> RunConfig:
    """Validate a plain mapping (from YAML, or as recorded in a checkpoint)."""
    _check_keys(RunConfig, data, "", where)
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        given = "" if isinstance(first["input"], dict) else f" (given: {first['input']!r})"
        raise UserError(f"{key}: {first['msg']}{given}", where=where, remedy="correct this key") from None


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r} is not key=value", remedy="write for example train.steps=100")
    *parents, last = key.split(".")
    place: Any = data
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise UserError(f"override {override!r}: {parent} is not a section", remedy="use keys of the YAML file")
    try:
        place[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"override {override!r}: the value is not YAML", remedy="quote the value") from None
    if isinstance(place[last], str):
        place[last] = _number(place[last])


def _number(text: str) -> str | float:
    """YAML 1.1 reads 3e-4 as a string; a person means the number."""
    try:
        return float(text)
    except ValueError:
        return text


def _check_keys(section: type[BaseModel], data: dict[str, Any], prefix: str, where: str | Path) -> None:
    """Unknown keys, deepest message first: pydantic reports them without a suggestion."""
    for key, value in data.items():
        if key not in section.model_fields:
            near = difflib.get_close_matches(str(key), _all_keys(RunConfig, ""), n=1, cutoff=0.0)
            siblings = difflib.get_close_matches(str(key), list(section.model_fields), n=1, cutoff=0.6)
            nearest = prefix + siblings[0] if siblings else near[0]
            raise UserError(f"unknown key {prefix}{key}", where=where, remedy=f"the nearest valid key is {nearest}")
        inner = _section_of(section.model_fields[key].annotation)
        if inner is not None:
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, dict):
                    _check_keys(inner, item, f"{prefix}{key}.", where)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class behind a field's type, also inside list[...]."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    return next((found for arg in typing.get_args(annotation) if (found := _section_of(arg))), None)


def _all_keys(section: type[BaseModel], prefix: str) -> list[str]:
    keys: list[str] = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        inner = _section_of(field.annotation)
        if inner is not None:
            keys += _all_keys(inner, f"{prefix}{name}.")
    return keys
