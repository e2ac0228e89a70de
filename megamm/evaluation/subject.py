"""What is evaluated: an export, or the live weights of a run; suites see a model only through this protocol."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from megamm.common.sample import Document, FloatArray, Row
from megamm.config import RunConfig
from megamm.config.suite import SamplingConfig
from megamm.modalities.protocol import Modality
from megamm.model.vocabulary import Vocabulary

Prompt = Sequence[tuple[str, Any]]
"""Parts in order: the modality, and a medium as returned by its `Modality.read_media`."""


class Subject(Protocol):
    """A model with its tokenizers. With several ranks, all call all methods, each with its own share of the items."""

    @property
    def config(self) -> RunConfig:
        """The configuration of the run that trained the model."""
        ...

    @property
    def vocabulary(self) -> Vocabulary:
        """The ranges of its token ids."""
        ...

    @property
    def modalities(self) -> Mapping[str, Modality]:
        """Its tokenizers, by modality."""
        ...

    @property
    def step(self) -> int:
        """The training step of its weights."""
        ...

    def token_losses(self, documents: Sequence[Document]) -> Iterator[tuple[int, Row, FloatArray]]:
        """Yield (index, row, cross entropy of each label `[S]`, 0 without a label) of every document, in any order."""
        ...

    def generate(self, prompts: Sequence[Prompt], target: str, sampling: SamplingConfig, first_seed: int) -> list[Any]:
        """Generate one medium of `target` for each prompt; item i depends only on its prompt and first_seed + i."""
        ...
