"""The format of an evaluation suite: a YAML file of tasks, each with its metrics and its data (docs/evaluation.md)."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from megamm.common.errors import UserError
from megamm.config.model import Section

_REMEDY = "correct the suite, see docs/evaluation.md"


class SamplingConfig(Section):
    """How media and texts are generated."""

    temperature: float = Field(1.0, ge=0, description="0 takes the most likely token.")
    top_k: int = Field(0, ge=0, description="Sample from this many tokens. 0: off.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from this share of the probability.")
    max_tokens: int = Field(64, ge=1, description="Most tokens of a generated text.")


class TaskConfig(Section):
    """One task: held-out samples of a source, and the metrics that are computed from them."""

    metrics: list[str] = Field(min_length=1, description="Names of metrics, all of one kind.")
    source: Path | None = Field(None, description="SHARDS/<source>, relative to the suite's folder.")
    direction: str | None = Field(None, description="What is generated or ranked, for example text_to_image.")
    n: int | None = Field(None, ge=1, description="Samples; default: that of the suite.")
    seed: int | None = Field(None, ge=0, description="Seed of the choice, of generation and of intervals.")
    sampling: SamplingConfig | None = None
    extractor: str | None = Field(
        None,
        description="Features of FID, KID, IS and video consistency: `efficientnet-lite0`, `pixels`, or the folder of "
        "an image model of transformers.",
    )
    weights: Path | None = Field(None, description="Folder of the model that a metric of similarity needs.")
    candidates: int = Field(16, ge=2, description="Candidates that each query is ranked against.")
    k: list[int] = Field([1, 5], min_length=1, description="The k of recall@k.")
    tau: float = Field(0.05, gt=0, description="F-score: distance that counts as a hit; the longest side is 2.")
    voxels: int = Field(32, ge=2, description="Voxels of each side, for voxel IoU.")
    harness_tasks: Path | None = Field(None, description="Folder of task files for lm-evaluation-harness.")

    @field_validator("metrics", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _each_once(self) -> "TaskConfig":
        if twice := sorted({name for name in self.metrics if self.metrics.count(name) > 1}):
            raise UserError(f"metric {twice[0]} is listed twice", remedy="list each metric of a task once")
        return self


class HumanConfig(Section):
    """Blind pairs for people to judge."""

    pairs: int = Field(20, ge=1, description="Number of pairs of each task.")
    against: Path | None = Field(
        None, description="Report of the same suite for another model. Default: the real samples."
    )


class SuiteConfig(Section):
    """A suite; `n` and `seed` apply to tasks that have none of their own."""

    tasks: list[TaskConfig] = Field(min_length=1)
    n: int = Field(64, ge=1, description="Samples of each task.")
    seed: int = Field(0, ge=0, description="Seed of all tasks.")
    sampling: SamplingConfig = SamplingConfig()
    human: HumanConfig | None = None


def load_suite(path: Path) -> SuiteConfig:
    """Read a suite; its paths become relative to its folder. UserError with the key that is wrong."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the suite: {error}", where=path, remedy="give a readable YAML file") from None
    except yaml.YAMLError as error:
        raise UserError(f"not valid YAML: {error}", where=path, remedy="correct the line named above") from None
    try:
        suite = SuiteConfig.model_validate(data)
    except UserError as error:
        raise UserError(error.what, where=path, remedy=error.remedy) from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{key or 'suite'}: {first['msg']}", where=path, remedy=_REMEDY) from None
    return _relative_to(suite, path.parent)


def _relative_to(suite: SuiteConfig, folder: Path) -> SuiteConfig:
    def found(path: Path | None) -> Path | None:
        return None if path is None else folder / path

    tasks = []
    for task in suite.tasks:
        paths: dict[str, Any] = {name: found(getattr(task, name)) for name in ("source", "weights", "harness_tasks")}
        if task.extractor is not None and (folder / task.extractor).is_dir():
            paths["extractor"] = str(folder / task.extractor)
        tasks.append(task.model_copy(update=paths))
    human = suite.human
    if human is not None:
        human = human.model_copy(update={"against": found(human.against)})
    return suite.model_copy(update={"tasks": tasks, "human": human})
