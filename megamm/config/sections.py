"""Every section of a run's configuration and its keys, with their units and bounds; RunConfig is the whole.

layout.py refuses what cannot run; load.py reads files. Nothing here imports torch.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from megamm.config.model import ModelConfig, Section
from megamm.errors import UserError


class ParallelConfig(Section):
    """Ranks per dimension; data parallel is what is left of the world size."""

    tensor: int = Field(1, ge=1)
    sequence: bool = False
    pipeline: int = Field(1, ge=1)
    virtual_pipeline: int = Field(1, ge=1, description="chunks of layers on a stage, interleaved")
    layers_per_chunk: list[Annotated[int, Field(ge=1)]] = Field([], description="in order; empty: balanced by cost")
    context: int = Field(1, ge=1)
    context_exchange: Literal["allgather", "alltoall"] = "allgather"
    expert: int = Field(1, ge=1)
    expert_tensor: int = Field(1, ge=1)


class SourceConfig(Section):
    """One shard set of the mixture (a folder holding train/ and heldout/), its weight, and what a document of it is.

    whole: all parts of a sample, in another order each epoch; pairs: another two of them each epoch; answers: another
    two, of which only the second counts to the loss, so that it is learnt as an answer to the first.
    """

    path: Path
    weight: float = Field(1.0, gt=0)
    documents: Literal["whole", "pairs", "answers"] = "whole"


class DataConfig(Section):
    """The mixture, the length of a packed row in tokens, and who reads: nothing of the latter changes a row."""

    sources: list[SourceConfig] = Field(min_length=1)
    seq_length: int = Field(ge=8)
    workers: int = Field(0, ge=0, description="processes of each rank that read and pack; 0: the rank itself")
    prefetch: int = Field(2, ge=1, description="steps that the workers read ahead")


class OptimizerConfig(Section):
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


class TrainConfig(Section):
    """Batch sizes in rows, and what is run how often."""

    steps: int = Field(ge=1)
    stop_after: int = Field(0, ge=0, description="end after this step; the schedule stays that of all steps; 0: never")
    global_batch: int = Field(ge=1)
    micro_batch: int = Field(ge=1)
    seed: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    recompute: Literal["none", "selective", "full"] = "none"
    attention: Literal["auto", "sdpa", "flex"] = "auto"
    log_every: int = Field(10, ge=1)
    eval_every: int = Field(0, ge=0)


Action = Literal["load", "new", "ignore"]


class StartConfig(Section):
    """Other weights that a run begins with while it has no checkpoint of its own (docs/starting.md).

    vocabulary: what is done with a range of ids; rules: with tensors, each `action: pattern` over their names, the
    first that matches counts. load: taken from the source; new: as in a fresh model; ignore: in the source alone.
    """

    checkpoint: str = Field(description="a run, one checkpoint, a URL of checkpoints, an export or a Qwen3 folder")
    vocabulary: dict[str, Action] = Field({})
    rules: list[Annotated[dict[Action, str], Field(min_length=1, max_length=1)]] = Field([])
    model_changes: list[str] = Field([], description="keys of model that may differ though they change its function")

    @field_validator("checkpoint")
    @classmethod
    def _without_secrets(cls, place: str) -> str:
        from megamm.tiers.remote import checked_url, is_url

        return checked_url(place) if is_url(place) else place


class CheckpointConfig(Section):
    """How often the state of a run is kept, in steps, and how many of its checkpoints stay."""

    every: int = Field(0, ge=0, description="steps; 0: only at the end")
    keep: int = Field(2, ge=1, description="of the newest")
    keep_best: bool = Field(False, description="also the one of the lowest held-out loss; needs train.eval_every")
    durable: str | None = Field(None, description="URL that finished ones are copied to: s3://bucket/prefix, …")
    local: str | None = Field(None, description="a folder of each node, best on a RAM disk, for saves in between")
    local_every: int = Field(1, ge=1, description="steps between these")
    replicate: bool = Field(True, description="with several nodes, each keeps a copy of another one's share of these")

    @field_validator("durable")
    @classmethod
    def _without_secrets(cls, url: str | None) -> str | None:
        # Imported here: fsspec is not needed where there is no URL. Its error does not repeat a password.
        from megamm.tiers.remote import checked_url

        return checked_url(url) if url is not None else None


class MetricsConfig(Section):
    """Where the figures of a run go besides its output folder (metrics.jsonl, tensorboard/, metrics.prom)."""

    prometheus_port: int = Field(0, ge=0, le=65535, description="of an HTTP endpoint on rank 0; 0: none")
    prometheus_host: str = Field("127.0.0.1", description="address it listens on")


class LossGuardConfig(Section):
    """What is done about a step whose loss or gradient is not finite, or far above those before it.

    skip: its update is left out; rollback: the run goes back to a checkpoint and leaves the step's rows out; stop: the
    run ends. auto: skip, or stop where the engine cannot leave an update out.
    """

    action: Literal["auto", "skip", "rollback", "stop"] = "auto"
    spike: float = Field(0.0, ge=0, description="deviations above the median that are too far; 0: only what is finite")
    window: int = Field(128, ge=8, description="good steps that median and deviation are taken of")
    max_skips: int = Field(3, ge=1, description="in a row; one more ends the run")
    max_rollbacks: int = Field(3, ge=1, description="without a window of good steps after them; one more ends the run")
    margin: int = Field(0, ge=0, description="steps before the bad one whose rows a roll-back leaves out too")
    rerun: bool = Field(True, description="run a bad step again to tell a fault of the hardware from one of the run")
    evict: bool = Field(
        False, description="go on without the nodes of faulty hardware; their commands end with exit code 4"
    )


class StragglerConfig(Section):
    """Ranks whose own work takes long, compared with the others of their pipeline stage every train.log_every steps."""

    threshold: float = Field(1.5, gt=1, description="times the median from which on a rank is slow")
    windows: int = Field(3, ge=1, description="that a rank is slow in a row until it is reported")
    evict: bool = Field(False, description="go on without its node; the command there ends with exit code 4")


class DeepSpeedConfig(Section):
    """For engine: deepspeed. ZeRO stage: 1 shards optimizer state, 2 gradients too, 3 parameters too."""

    zero: Literal[1, 2, 3] = 1
    offload: bool = Field(False, description="optimizer state in the host's memory")


class RendezvousConfig(Section):
    """How long nodes of a job wait for each other, in seconds."""

    join: float = Field(600.0, gt=0, description="for the least number of nodes; then this try ends")
    last_call: float = Field(5.0, gt=0, description="for further nodes, once there are enough")
    keep_alive: float = Field(2.0, gt=0, description="between signs of life; a node that misses three is lost")


class ResilienceConfig(Section):
    """What is done about failures: how a hang is told, and how often the run is started again in place."""

    max_restarts: int = Field(20, ge=0, description="after failures, in all; 0: the first one ends the run")
    same_step_limit: int = Field(3, ge=1, description="failures at one step in a row after which the run gives up")
    backoff_seconds: float = Field(5.0, ge=0, description="before a restart without progress; doubles each time")
    hang_seconds: float = Field(5.0, gt=0, description="of silence beyond twice the usual time that make a hang")
    startup_seconds: float = Field(
        600.0, gt=0, description="of silence where no usual time is known: until a launch's first step is done"
    )
    grace_seconds: float = Field(120.0, gt=0, description="from a signal to the checkpoint; then it is killed")
    rendezvous: RendezvousConfig = RendezvousConfig()
    loss_guard: LossGuardConfig = LossGuardConfig()
    stragglers: StragglerConfig = StragglerConfig()


class RunConfig(Section):
    """A whole run. `output` receives checkpoints, metrics and logs."""

    output: Path
    device: Literal["auto", "cpu", "gpu"] = "auto"
    ops: Literal["auto", "csrc", "torch"] = Field("auto", description="compiled or plain torch operators (megamm/ops)")
    model: ModelConfig
    data: DataConfig
    tokenizers: dict[str, Path] = Field(description="codec folders: text, visual (image and video), audio, points")
    optimizer: OptimizerConfig
    train: TrainConfig
    start_from: StartConfig | None = None
    checkpoint: CheckpointConfig = CheckpointConfig()
    resilience: ResilienceConfig = ResilienceConfig()
    metrics: MetricsConfig = MetricsConfig()
    parallel: ParallelConfig = ParallelConfig()
    engine: Literal["native", "deepspeed"] = "native"
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    loss_weights: dict[str, float] = Field({})

    @model_validator(mode="after")
    def _best_is_measured(self) -> "RunConfig":
        if self.checkpoint.keep_best and not self.train.eval_every:
            remedy = "set train.eval_every, best to a divisor of checkpoint.every"
            raise UserError("checkpoint.keep_best, but no held-out loss is ever measured", remedy=remedy)
        return self

    def data_parallel(self, world_size: int) -> int:
        """Ranks per data-parallel group (context parallel not counted)."""
        p = self.parallel
        return world_size // (p.tensor * p.pipeline * p.context)
