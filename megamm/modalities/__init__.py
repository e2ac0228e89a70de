"""The modalities that the model can read and write, one line each."""

from megamm.modalities.audio import AudioModality
from megamm.modalities.image import ImageModality
from megamm.modalities.points import PointsModality
from megamm.modalities.protocol import Modality
from megamm.modalities.text import TextModality
from megamm.modalities.video import VideoModality

# The order of the lines is part of the vocabulary's format: only append.
REGISTRY: dict[str, type[Modality]] = {
    "text": TextModality,
    "image": ImageModality,
    "audio": AudioModality,
    "video": VideoModality,
    "points": PointsModality,
}


def tokenizer_names() -> list[str]:
    """Names of the tokenizers, as used by a run's `tokenizers` and by `--codec`."""
    return list(dict.fromkeys(modality.tokenizer_name for modality in REGISTRY.values()))
