"""The modalities the model can read and write: one line each."""

from megamm.modalities.base import Modality
from megamm.modalities.image import ImageModality
from megamm.modalities.text import TextModality

REGISTRY: dict[str, type[Modality]] = {
    "text": TextModality,
    "image": ImageModality,
}
