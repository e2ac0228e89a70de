"""Similarity by a network whose folder the user gives; each is the mean over samples, named after the folder.

caption_similarity: cosine of two texts' embeddings, the mean of a sentence model's last states (Reimers & Gurevych
2019). clip_score: 100 max(cosine, 0) of the picture's and the prompt's CLIP embeddings (Hessel et al. 2021).
speaker_similarity: cosine of x-vectors of two sounds. The folders are those of transformers' AutoModel, CLIPModel and
AutoModelForAudioXVector.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from megamm.evaluation.extractors import digest_of, load, preprocessing
from megamm.evaluation.media_metrics import Measure
from megamm.evaluation.statistics import Unmeasurable
from megamm.media.sound_file import resample

Similarity = Callable[[Any, Any, str, Measure], float]
"""Of a generated medium, the real one and the prompt's text."""


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


def caption_similarity(folder: Path) -> Similarity:
    """Return the metric of a folder's sentence model."""
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = load(AutoModel, folder), load(AutoTokenizer, folder)

    @torch.inference_mode()
    def embedded(text: str) -> torch.Tensor:
        if not text.strip():
            raise Unmeasurable("an empty text has no embedding")
        read = tokenizer(text, return_tensors="pt", truncation=True, max_length=model.config.max_position_embeddings)
        return model(**read).last_hidden_state[0].mean(0)

    def similarity(made: str, real: str, prompt: str, measure: Measure) -> float:
        return _cosine(embedded(made), embedded(real))

    return similarity


def clip_score(folder: Path) -> Similarity:
    """Return the metric of a folder's CLIP model."""
    from transformers import AutoTokenizer, CLIPModel

    model, tokenizer = load(CLIPModel, folder), load(AutoTokenizer, folder)
    size, mean, std = preprocessing(folder, model.config.vision_config.image_size)
    most = model.config.text_config.max_position_embeddings

    @torch.inference_mode()
    def similarity(made: npt.NDArray[np.uint8], real: Any, prompt: str, measure: Measure) -> float:
        if not prompt.strip():
            raise Unmeasurable("the prompt has no text")
        # As CLIP was trained: the shorter side is scaled, and the middle is cut out.
        picture = Image.fromarray(made)
        scale = size / min(picture.size)
        picture = picture.resize([max(size, round(n * scale)) for n in picture.size], Image.Resampling.BICUBIC)
        left, top = ((n - size) // 2 for n in picture.size)
        values = np.asarray(picture.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
        pixels = torch.from_numpy((values - np.array(mean, np.float32)) / np.array(std, np.float32)).permute(2, 0, 1)[
            None
        ]
        read = tokenizer(prompt, return_tensors="pt", truncation=True, max_length=most)
        found = model(input_ids=read.input_ids, attention_mask=read.attention_mask, pixel_values=pixels)
        return 100 * max(_cosine(found.image_embeds, found.text_embeds), 0.0)

    return similarity


def speaker_similarity(folder: Path) -> Similarity:
    """Return the metric of a folder's x-vector model."""
    from transformers import AutoModelForAudioXVector

    model = load(AutoModelForAudioXVector, folder)

    @torch.inference_mode()
    def embedded(sound: npt.NDArray[np.float32], rate: int) -> torch.Tensor:
        waveform = resample(np.asarray(sound, dtype=np.float32), rate, 16_000)
        if len(waveform) < 8_000:
            raise Unmeasurable("an x-vector needs half a second")
        if not np.isfinite(waveform).all() or not waveform.std() > 1e-6:
            raise Unmeasurable("a sound that is silent or not finite")
        normal = (waveform - waveform.mean()) / waveform.std()
        return model(torch.from_numpy(normal)[None]).embeddings[0]

    def similarity(made: Any, real: Any, prompt: str, measure: Measure) -> float:
        return _cosine(embedded(made, measure.sample_rate), embedded(real, measure.sample_rate))

    return similarity


SIMILARITIES: dict[str, dict[str, Callable[[Path], Similarity]]] = {
    "text": {"caption_similarity": caption_similarity},
    "image": {"clip_score": clip_score},
    "audio": {"speaker_similarity": speaker_similarity},
}
"""The metrics of each generated modality that need a folder of weights."""


def identity(folder: Path) -> dict[str, str]:
    """Return a folder's name and digest, for a report."""
    return {"name": folder.name, "digest": digest_of(folder)}
