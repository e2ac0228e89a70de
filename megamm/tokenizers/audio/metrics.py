"""Figures that judge an audio codec: held-out clips against their reconstructions, computed in float32.

During training: `loss` (mean absolute error of the log-mel), `mel_db` (the same in decibels), and for each level q of
the residual quantiser `codes_used_q` and `perplexity_q` (tokenizers/training_loop.py). At the end also, for the
waveforms of Griffin-Lim: `stft_distance` (spectral convergence plus log-magnitude distance, each the mean over three
resolutions; Yamamoto et al. 2020, "Parallel WaveGAN", section 2.3). For clips with known words: the share `understood`
in the original (at most half of the words wrong; the recogniser knows one language), and for these clips `word_error`
and `word_error_of_originals`.

Word error: (substituted + missing + added words) / spoken words, measured with a recogniser that runs on a laptop:
PocketSphinx with the English model in its package. It makes many errors itself, so a rate is meaningful only in
comparison with the rate of the original recordings. Both packages are optional (the extra "speech").
"""

import importlib.util
import logging
import math
import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megamm.media.sound_file import Waveform, resample
from megamm.tokenizers.audio.model import AudioCodec
from megamm.tokenizers.training_loop import Figures, codebook_use

logger = logging.getLogger(__name__)

DECIBELS = 20 / math.log(10)
"""Decibels per unit of a natural logarithm of magnitudes."""
RESOLUTIONS = (512, 1024, 2048)
"""Fourier transform lengths of `stft_distance` in samples; hops are a quarter."""
SMALLEST = 1e-5
"""Magnitude below which `stft_distance` ignores differences."""
RECOGNISER_RATE = 16_000
"""Sample rate in Hz of the recogniser's acoustic model."""
PACKAGES = ("pocketsphinx", "jiwer")
_DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@dataclass(frozen=True)
class TranscribedClip:
    """A sound, float32 `[samples]`, with the words spoken in it, or "" if unknown."""

    waveform: Waveform
    said: str


@torch.inference_mode()
def evaluate(codec: AudioCodec, clips: list[TranscribedClip]) -> Figures:
    """Mel distance and codebook use for clips of at least one sample each."""
    device = codec.norm.weight.device
    total, values = 0.0, 0
    counts = torch.zeros(codec.codebooks, codec.codebook_size, dtype=torch.int64)
    for clip in clips:
        log_mel = codec.mel(codec.padded(torch.from_numpy(clip.waveform).to(device)[None]))
        reconstruction, codes = codec.reconstruct(log_mel)
        total += (reconstruction - log_mel).abs().sum().item()
        values += log_mel.numel()
        for level in range(codec.codebooks):
            counts[level] += torch.bincount(codes[0, :, level].cpu(), minlength=codec.codebook_size)
    figures = {"loss": total / values, "mel_db": total / values * DECIBELS}
    for level in range(codec.codebooks):
        figures |= {f"{name}_{level}": value for name, value in codebook_use(counts[level]).items()}
    return figures


def evaluate_waveforms(codec: AudioCodec, clips: list[TranscribedClip]) -> Figures:
    """Distance of the decoded waveforms, and the share of words that a recogniser still understands."""
    device = codec.norm.weight.device
    originals = [torch.from_numpy(clip.waveform).to(device) for clip in clips]
    decoded = [
        codec.decode(codec.encode(waveform[None], [len(waveform)])[0])[: len(waveform)] for waveform in originals
    ]
    distances = [stft_distance(made, original) for made, original in zip(decoded, originals, strict=True)]
    return {
        "stft_distance": float(np.mean(distances)),
        **_word_errors(clips, [waveform.cpu().numpy() for waveform in decoded], codec.sample_rate),
    }


def stft_distance(made: Tensor, original: Tensor) -> float:
    """Distance of waveforms `[samples]`: 0 for equal ones; an all-zero `made` has a spectral convergence of 1."""
    total = 0.0
    for size in RESOLUTIONS:
        window = torch.hann_window(size, device=made.device)
        ours, theirs = (
            torch.stft(x, size, size // 4, window=window, pad_mode="constant", return_complex=True).abs()
            for x in (made, original)
        )
        convergence = (ours - theirs).norm() / theirs.norm().clamp(min=SMALLEST)
        logarithms = ours.clamp(min=SMALLEST).log() - theirs.clamp(min=SMALLEST).log()
        total += (convergence + logarithms.abs().mean()).item()
    return total / len(RESOLUTIONS)


def _word_errors(clips: list[TranscribedClip], decoded: list[Waveform], sample_rate: int) -> Figures:
    """Word error rates of the clips with known words; {} if they cannot be measured (logged)."""
    spoken = [i for i, clip in enumerate(clips) if clip.said]
    missing = missing_package()
    if missing or not spoken:
        reason = f"{missing} is not installed" if missing else "no clip has a text"
        logger.info("word error not measured: %s", reason)
        return {}

    def heard(waveforms: list[Waveform], chosen: list[int]) -> list[str]:
        return recognise([resample(waveforms[i], sample_rate, RECOGNISER_RATE) for i in chosen])

    originals = dict(zip(spoken, heard([clip.waveform for clip in clips], spoken), strict=True))
    # Clips that the recogniser does not understand in the original say nothing about the codec.
    understood = [i for i in spoken if word_error_rate([clips[i].said], [originals[i]]) <= 0.5]
    if not understood:
        return {"understood": 0.0}
    said = [clips[i].said for i in understood]
    return {
        "understood": len(understood) / len(spoken),
        "word_error": word_error_rate(said, heard(decoded, understood)),
        "word_error_of_originals": word_error_rate(said, [originals[i] for i in understood]),
    }


def missing_package() -> str | None:
    """The name of a package that is needed to measure word error but not installed, if any."""
    return next((package for package in PACKAGES if importlib.util.find_spec(package) is None), None)


def words(transcript: str) -> str:
    """A transcript as words that a recogniser could give: lower case, digits spelled, no remarks in brackets."""
    spoken = re.sub(r"\([^)]*\)|\[[^]]*\]|<[^>]*>", " ", transcript.lower())
    spoken = re.sub(r"\d", lambda digit: f" {_DIGITS[int(digit[0])]} ", spoken)
    return " ".join(re.findall(r"[a-z]+(?:'[a-z]+)?", spoken))


def recognise(waveforms: list[npt.NDArray[np.float32]]) -> list[str]:
    """The recognised words of each waveform `[samples]` (16 kHz), in lower case."""
    from pocketsphinx import Decoder

    decoder = Decoder(samprate=RECOGNISER_RATE, loglevel="FATAL")
    heard = []
    for waveform in waveforms:
        samples = (waveform.clip(-1, 1) * (2**15 - 1)).astype(np.int16)
        decoder.start_utt()
        decoder.process_raw(samples.tobytes(), full_utt=True)
        decoder.end_utt()
        hypothesis = decoder.hyp()
        heard.append(hypothesis.hypstr if hypothesis else "")
    return heard


def word_error_rate(transcripts: list[str], heard: list[str]) -> float:
    """Errors per word, over all of them; transcripts as returned by `words`, none empty."""
    import jiwer

    return float(jiwer.wer(transcripts, heard))
