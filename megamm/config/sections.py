"""The sections of a run's configuration with units and bounds of every key; RunConfig is the whole.

The descriptions are the text of docs/config.md (config/reference.py). layout.py checks which values can run together,
load.py reads files. Nothing here imports torch.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from megamm.common.errors import UserError
from megamm.common.urls import checked_url, is_url
from megamm.config.model import ModelConfig, Section


class ParallelConfig(Section):
    """Sizes of the parallel dimensions. The data-parallel size is the world size divided by tensor x pipeline x
    context (docs/parallelism.md)."""

    tensor: int = Field(1, ge=1, description="Tensor-parallel ranks.")
    sequence: bool = Field(
        False, description="Sequence parallelism: tensor ranks also split the activations between their products."
    )
    pipeline: int = Field(1, ge=1, description="Pipeline stages.")
    virtual_pipeline: int = Field(1, ge=1, description="Interleaved chunks of layers on each stage.")
    layers_per_chunk: list[Annotated[int, Field(ge=1)]] = Field(
        [], description="Layers of each chunk, in order. Empty: balanced by cost."
    )
    context: int = Field(1, ge=1, description="Context-parallel ranks, which split every row.")
    cp_comm_type: Literal["allgather", "alltoall"] = Field(
        "allgather", description="Collective of context parallelism: gather keys and values, or exchange heads."
    )
    expert: int = Field(1, ge=1, description="Expert-parallel ranks.")
    expert_tensor: int = Field(1, ge=1, description="Tensor-parallel ranks of an expert.")
    overlap_param_gather: bool | None = Field(
        None,
        description="Gather the updated parameters of other data-parallel ranks while the next forward pass runs, "
        "instead of before it. Default: on a GPU.",
    )


class ModalityConfig(Section):
    """How the model reads the parts of one modality; NAME is the modality's (docs/continuous.md)."""

    attention: Literal["causal", "span"] = Field(
        "causal",
        description="`span`: the tokens of a part attend to each other in both directions, and to nothing behind the "
        "part. They can then not be learned: the modality is input only, and its tokens and marks count in no loss.",
    )


EndRule = Literal["check", "add", "remove"]


class SourceConfig(Section):
    """One source of the data mixture."""

    path: Path = Field(
        description="Shard set: a folder that holds `train/` and `heldout/`, or its URL (`s3://`, `gs://`, "
        "`https://`, ...); or PREFIX of Megatron's PREFIX.bin and PREFIX.idx (docs/data.md)."
    )
    weight: float = Field(1.0, gt=0, description="Share of this source in the mixture, relative to the others.")
    documents: Literal["whole", "pairs", "answers"] = Field(
        "whole",
        description="What a training document is. `whole`: all parts of a sample, in another order each epoch. "
        "`pairs`: two of its parts, other ones each epoch. `answers`: the same, and only the second part counts in the "
        "loss, so that it is learned as the answer to the first.",
    )
    heldout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Of .bin and .idx files, the share of the documents that is held out for evaluation, chosen by a "
        "hash of their numbers. A shard set has its own held-out samples.",
    )
    end_token: (
        Annotated[dict[EndRule, Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=1)] | None
    ) = Field(
        None,
        description="`rule: token`, the end-of-text token of .bin and .idx files in the spelling of the text "
        "tokenizer. `check`: every document must end with it. `remove`: the same, and it is not trained on. `add`: "
        "it is appended to every document, and none may end with it. Default: the documents are as stored.",
    )

    @field_validator("path", mode="before")
    @classmethod
    def _check_url(cls, path: object) -> object:
        if not isinstance(path, str) or not is_url(path):
            return path
        url = checked_url(path)
        names = url.partition("://")[2].removeprefix("/").split("/")
        if {"", ".", ".."} & set(names):
            remedy = "give it as protocol://bucket/prefix, without empty parts, `.` and `..`"
            raise UserError("data.sources: the URL has a part without a name", where=url, remedy=remedy)
        return path


class CacheConfig(Section):
    """The cache of each node for shards at a URL, which all its processes share (docs/data.md)."""

    folder: Path = Field(
        Path("~/.cache/megamm/shards"),
        description="Folder on a local disk of the node. Runs may share it, one after the other or at a time.",
    )
    gb: float = Field(100.0, gt=0, description="Most space that the cache takes, in GB (1e9 bytes), indexes included.")
    ahead: int = Field(16, ge=1, description="Steps, beyond those of `prefetch`, whose members are downloaded ahead.")
    patience: float = Field(
        300.0, gt=0, description="Seconds for which a failing or slow request is repeated before the run ends."
    )


class DataConfig(Section):
    """Training data and the processes that read it. The number of workers does not change any row."""

    sources: list[SourceConfig] = Field(min_length=1, description="The sources of the mixture.")
    seq_length: int = Field(ge=8, description="Tokens of a packed row.")
    long_documents: Literal["auto", "cut", "skip", "error"] = Field(
        "auto",
        description="Action for samples longer than a row. `auto`: split text without media, and pages, into several "
        "documents; skip other samples. `cut`: also drop the end of the text beside media, to fit. `skip`: skip all. "
        "`error`: refuse the run. Media are never cut; `--dry-run` and the log count and name these samples.",
    )
    workers: int = Field(
        0, ge=0, description="Processes of each rank that read and pack rows. 0: the rank reads itself."
    )
    prefetch: int = Field(2, ge=1, description="Steps that the workers read ahead.")
    cache: CacheConfig = Field(CacheConfig(), description="Cache of shards at a URL.")


class OptimizerConfig(Section):
    """AdamW and its learning-rate schedule. Steps are optimizer steps."""

    lr: float = Field(gt=0, description="Peak learning rate.")
    min_lr: float = Field(0.0, ge=0, description="Learning rate at the end of the schedule.")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up from 0 to `lr`.")
    schedule: Literal["cosine", "wsd"] = Field(
        "cosine", description="Cosine decay, or warm-up, stable phase and decay (WSD)."
    )
    decay_steps: int = Field(0, ge=0, description="`wsd`: length of the decay at the end.")
    weight_decay: float = Field(0.1, ge=0, description="Decoupled weight decay. Norms and biases have none.")
    beta1: float = Field(0.9, gt=0, lt=1, description="Decay rate of the first moment.")
    beta2: float = Field(0.95, gt=0, lt=1, description="Decay rate of the second moment.")
    eps: float = Field(1e-8, gt=0, description="Added to the denominator of the update.")
    moments: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="Precision in which both moments are stored. `bf16` takes half of their memory; a run can resume "
        "with the other value. It needs `beta2` up to 0.99 and the native engine.",
    )
    offload_moments: bool = Field(
        False,
        description="Keep both moments in host memory and copy them to the GPU and back in each update. The numbers "
        "are the same. It needs the native engine.",
    )
    clip_grad: float = Field(1.0, ge=0, description="Largest global gradient norm. 0: no clipping.")


class Fp8Config(Section):
    """Linear layers in FP8 (`train.precision: fp8`): e4m3 for activations and weights, e5m2 for gradients, with scales
    that are computed from each tensor when it is used (docs/performance.md)."""

    recipe: Literal["tensorwise", "rowwise"] = Field(
        "tensorwise",
        description="One scale for a whole matrix, or one for each row and column of the factors of a product: more "
        "exact if magnitudes differ much between tokens or channels, but slower.",
    )
    first_layers_bf16: int = Field(1, ge=0, description="First layers of the model whose linear layers stay in bf16.")
    last_layers_bf16: int = Field(
        1, ge=0, description="Last layers that stay in bf16, as multi-token prediction then does. 0: none."
    )


RecomputedModule = Literal["norms", "activation", "mlp", "moe"]


class RecomputeConfig(Section):
    """Parts of a layer that the backward pass computes again, so that their results take no memory until then
    (docs/performance.md)."""

    modules: list[RecomputedModule] = Field(
        min_length=1,
        description="`norms`: the norms before attention and MLP. `activation`: SwiGLU in every MLP and expert, not "
        "its products. `mlp`: the MLPs of dense layers. `moe`: router, exchange of tokens, and experts.",
    )


Recompute = RecomputeConfig | Literal["none", "full"]


def recompute_override(value: Recompute) -> str:
    """Return the `key=value` that sets train.recompute to this value; it has no spaces."""
    if isinstance(value, str):
        return f"train.recompute={value}"
    return f"train.recompute.modules=[{','.join(value.modules)}]"


class TrainConfig(Section):
    """Length of the run, batch sizes, precision and intervals."""

    steps: int = Field(ge=1, description="Optimizer steps of the whole run; the schedule ends here.")
    stop_after: int = Field(
        0, ge=0, description="Stop after this step without changing the schedule. 0: run to the end."
    )
    global_batch_size: int = Field(ge=1, description="Rows of a step, over all ranks.")
    micro_batch_size: int = Field(ge=1, description="Rows that a rank computes at once.")
    seed: int = Field(1, description="Seed of the initial weights, the order of the data and dropout.")
    precision: Literal["fp32", "bf16", "fp8"] = Field(
        "fp32",
        description="Precision of the computation; `bf16` keeps fp32 main weights in the optimizer, and `fp8` is "
        "`bf16` with the linear layers' products in FP8, except for the output layer.",
    )
    fp8: Fp8Config = Fp8Config()
    recompute: Recompute = Field(
        "none",
        description="Activations that the backward pass computes again to save memory: none, those of whole layers "
        "(`full`), or those of parts of a layer, `{modules: [norms, mlp]}`.",
    )
    attention: Literal["auto", "varlen", "flash", "flex", "sdpa"] = Field(
        "auto",
        description="Attention kernel. `varlen` and `flash` take the lengths of documents and need bf16 on a GPU; they "
        "are kernels of torch and of the flash-attn package. `flex` compiles a kernel that skips masked blocks; it "
        "needs a GPU. `sdpa` runs on every device. `auto` takes `varlen` on a GPU if it supports the model, else "
        "`flex`, and `sdpa` on a CPU; the log has the choice and the reason (docs/performance.md).",
    )
    experts: Literal["auto", "grouped", "sequential"] = Field(
        "auto",
        description="How a rank computes its experts: all in one product, or one after another as Megatron-core does. "
        "`auto` is `grouped`, unless a field of `model.megatron` needs `sequential`; the log has the choice and the "
        "reason (docs/performance.md).",
    )
    log_every: int = Field(10, ge=1, description="Steps between reports.")
    eval_every: int = Field(0, ge=0, description="Steps between evaluations on held-out data. 0: never.")
    gc_every: int = Field(
        100,
        ge=0,
        description="Steps between runs of Python's garbage collector, at the same step on every rank, so that ranks "
        "do not wait for each other's. 0: Python decides when it runs.",
    )

    @field_validator("recompute", mode="before")
    @classmethod
    def _known_recompute(cls, value: object) -> object:
        if isinstance(value, dict | RecomputeConfig) or value in ("none", "full"):
            return value
        remedy = "set it to none, full or {modules: [mlp, norms]}"
        raise UserError(f"train.recompute: unknown value {value!r}", remedy=remedy)


Action = Literal["load", "new", "ignore"]


class InitFromConfig(Section):
    """Weights that a run starts from while it has no checkpoint of its own (docs/starting.md).

    Actions are `load` (take it from the source), `new` (initialize it as in a fresh model) and `ignore` (it exists in
    the source only).
    """

    checkpoint: str = Field(
        description="The source: a run, one checkpoint, a URL of checkpoints, an export, or a Qwen3 model folder."
    )
    vocabulary: dict[str, Action] = Field({}, description="Action for each range of token ids, by its name.")
    rules: list[Annotated[dict[Action, str], Field(min_length=1, max_length=1)]] = Field(
        [], description="`action: pattern` over tensor names. The first pattern that matches decides."
    )
    model_changes: list[str] = Field(
        [], description="Keys of `model` that may differ from the source although they change the model's function."
    )

    @field_validator("checkpoint")
    @classmethod
    def _without_secrets(cls, source: str) -> str:
        return checked_url(source) if is_url(source) else source


class CheckpointConfig(Section):
    """When checkpoints are saved, where, and how many are kept (docs/checkpoints.md)."""

    every: int = Field(0, ge=0, description="Steps between checkpoints. 0: only at the end.")
    keep: int = Field(2, ge=1, description="Number of newest checkpoints that are kept.")
    keep_best: bool = Field(
        False, description="Also keep the checkpoint with the lowest held-out loss. Needs `train.eval_every`."
    )
    remote: str | None = Field(
        None, description="URL that finished checkpoints are uploaded to, for example s3://bucket/prefix."
    )
    local: str | None = Field(
        None, description="Folder on each node, best on a RAM disk, for frequent checkpoints in between."
    )
    local_every: int = Field(1, ge=1, description="Steps between checkpoints in the `local` folder.")
    replicate: bool = Field(
        True, description="With several nodes, each keeps a copy of another node's share of the `local` checkpoints."
    )

    @field_validator("remote")
    @classmethod
    def _without_secrets(cls, url: str | None) -> str | None:
        return checked_url(url) if url is not None else None


class ProfileConfig(Section):
    """Steps that torch's profiler records: RUN/profile/ then has a trace of each rank (docs/observability.md)."""

    steps: list[Annotated[int, Field(ge=1)]] = Field(
        min_length=2, max_length=2, description="The first and the last step, for example [10, 13]."
    )
    ranks: list[Annotated[int, Field(ge=0)]] = Field([0], description="Ranks that record.")

    @field_validator("steps")
    @classmethod
    def _in_order(cls, steps: list[int]) -> list[int]:
        if steps[0] > steps[1]:
            raise UserError(
                f"metrics.profile.steps {steps} end before they begin", remedy="set [first step, last step]"
            )
        return steps


class MetricsConfig(Section):
    """Where metrics are published besides the output folder (metrics.jsonl, tensorboard/, metrics.prom)."""

    prometheus_port: int = Field(0, ge=0, le=65535, description="Port of an HTTP endpoint on rank 0. 0: no endpoint.")
    prometheus_host: str = Field("127.0.0.1", description="Address that the endpoint listens on.")
    profile: ProfileConfig | None = None


class LossGuardConfig(Section):
    """What happens at a step whose loss or gradient is not finite, or is a spike (docs/loss_guard.md)."""

    action: Literal["auto", "skip", "rollback", "stop"] = Field(
        "auto",
        description="`skip`: do not apply the update. `rollback`: return to a checkpoint and skip the step's rows. "
        "`stop`: end the run. `auto`: skip, or stop if the engine cannot discard an update.",
    )
    spike: float = Field(
        0.0, ge=0, description="Deviations above the median that count as a spike. 0: only non-finite values count."
    )
    window: int = Field(128, ge=8, description="Number of last good steps that median and deviation are computed from.")
    max_skips: int = Field(3, ge=1, description="Skipped steps in a row; one more ends the run.")
    max_rollbacks: int = Field(
        3, ge=1, description="Roll-backs without a full `window` of good steps after them; one more ends the run."
    )
    margin: int = Field(0, ge=0, description="Steps before the bad one whose rows a roll-back skips too.")
    rerun: bool = Field(
        True, description="Run a bad step again, to distinguish a hardware fault from a reproducible one."
    )
    evict: bool = Field(
        False,
        description="Continue without nodes with faulty hardware. `megamm train` exits there with code 4.",
    )


class StragglerConfig(Section):
    """Detection of slow ranks: every `train.log_every` steps, the compute time of a rank is compared with the other
    ranks of its pipeline stage."""

    threshold: float = Field(1.5, gt=1, description="A rank is slow from this multiple of the median on.")
    windows: int = Field(3, ge=1, description="Slow windows in a row before a rank is reported.")
    evict: bool = Field(False, description="Continue without the slow node. `megamm train` exits there with code 4.")


class DeepSpeedConfig(Section):
    """Options of `engine: deepspeed`."""

    zero: Literal[1, 2, 3] = Field(
        1, description="ZeRO stage: 1 shards the optimizer state, 2 also gradients, 3 also parameters."
    )
    offload_optimizer: bool = Field(False, description="Keep the optimizer state in host memory.")


class RendezvousConfig(Section):
    """How long the nodes of a job wait for each other, in seconds."""

    join_timeout: float = Field(
        600.0, gt=0, description="Time until the least number of nodes has joined, or the job fails."
    )
    lost_timeout: float = Field(
        120.0,
        gt=0,
        description="The same once the job has run: until lost nodes are back, or the launch ends with exit code 1.",
    )
    last_call_timeout: float = Field(5.0, gt=0, description="Wait for further nodes once there are enough.")
    keep_alive_interval: float = Field(
        2.0, gt=0, description="Interval of keep-alive messages. A node that misses three is lost."
    )


class ResilienceConfig(Section):
    """How failures and hangs are handled (docs/failures.md)."""

    max_restarts: int = Field(
        20, ge=0, description="Restarts after failures, in total. 0: the first failure ends the run."
    )
    same_step_limit: int = Field(3, ge=1, description="Failures at the same step in a row that end the run.")
    backoff_seconds: float = Field(
        5.0, ge=0, description="Wait before a restart that follows no progress; doubled each time."
    )
    hang_seconds: float | None = Field(
        None,
        gt=0,
        description="A rank hangs if it is silent for this long beyond twice its usual time. Default: 120 on a GPU, 5 "
        "on a CPU. A compilation does not count.",
    )
    startup_seconds: float = Field(
        600.0,
        gt=0,
        description="The same limit while no usual time is known: until the first step of a launch is done.",
    )
    grace_seconds: float = Field(
        120.0, gt=0, description="Time from a stop signal until the checkpoint must be saved; then ranks are killed."
    )
    rendezvous: RendezvousConfig = RendezvousConfig()
    loss_guard: LossGuardConfig = LossGuardConfig()
    stragglers: StragglerConfig = StragglerConfig()


class EvaluationConfig(Section):
    """Evaluation of the live weights by a suite (docs/evaluation.md), at any layout."""

    suite: Path = Field(description="The suite. A run computes losses, pair gains and recall; it does not generate.")
    every: int = Field(ge=1, description="Steps between evaluations.")


class RunConfig(Section):
    """A run."""

    output: Path = Field(description="Folder that receives checkpoints, metrics and logs.")
    device: Literal["auto", "cpu", "gpu"] = Field("auto", description="Device; `auto` is the GPU where there is one.")
    ops: Literal["auto", "csrc", "torch"] = Field(
        "auto", description="Compiled operators (`csrc`) or plain torch; `auto` is compiled where they are built."
    )
    model: ModelConfig
    data: DataConfig
    tokenizers: dict[str, Path] = Field(
        description="Tokenizer folders: `text`, `visual` (image and video), `audio`, `points`."
    )
    modalities: dict[str, ModalityConfig] = Field(
        {}, description="How parts of a modality are read. Modalities that are not named have the defaults."
    )
    optimizer: OptimizerConfig
    train: TrainConfig
    init_from: InitFromConfig | None = None
    checkpoint: CheckpointConfig = CheckpointConfig()
    resilience: ResilienceConfig = ResilienceConfig()
    evaluation: EvaluationConfig | None = None
    metrics: MetricsConfig = MetricsConfig()
    parallel: ParallelConfig = ParallelConfig()
    engine: Literal["native", "deepspeed"] = Field(
        "native", description="Training engine: Megatron-core (`native`), or DeepSpeed (data parallel only)."
    )
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    export: Literal["required", "off"] = Field(
        "required",
        description="`required`: refuse, before the first step, a model or tokenizer that cannot be exported to "
        "transformers. `off`: train it anyway.",
    )
    loss_weights: dict[str, float] = Field(
        {},
        description="Weight of the mean loss of each modality in the total loss. Modalities that are not named have 1.",
    )

    @field_validator("export", mode="before")
    @classmethod
    def _off_is_false_in_yaml(cls, value: object) -> object:
        return "off" if value is False else value

    @model_validator(mode="after")
    def _best_is_measured(self) -> "RunConfig":
        if self.checkpoint.keep_best and not self.train.eval_every:
            remedy = "set train.eval_every, best to a divisor of checkpoint.every"
            raise UserError("checkpoint.keep_best, but no held-out loss is ever measured", remedy=remedy)
        return self

    @model_validator(mode="after")
    def _engine_evaluates(self) -> "RunConfig":
        if self.evaluation is not None and self.engine != "native":
            remedy = "set engine: native, or remove the section evaluation"
            raise UserError("evaluation.suite needs the native engine", remedy=remedy)
        return self

    @property
    def spans(self) -> frozenset[str]:
        """The modalities whose parts are bidirectional spans."""
        return frozenset(name for name, modality in self.modalities.items() if modality.attention == "span")

    @property
    def bytes_per_parameter(self) -> tuple[int, int, int]:
        """Bytes of a parameter on the device: weight, gradient, and optimizer state, which is sharded (ZeRO-1)."""
        moments = 0 if self.optimizer.offload_moments else 4 if self.optimizer.moments == "bf16" else 8
        return (4, 4, moments) if self.train.precision == "fp32" else (2, 4, 4 + moments)

    def data_parallel(self, world_size: int) -> int:
        """Ranks per data-parallel group (context parallel not counted)."""
        p = self.parallel
        return world_size // (p.tensor * p.pipeline * p.context)
