"""Word error rate of speech, with a recogniser that runs on a laptop: how much speech survives a codec.

In: float32 `[samples]` at 16 kHz with their transcripts. Out: (substituted + missing + added words) / spoken words.
Recogniser: PocketSphinx with the English model in its package. It makes many errors itself, so a rate is meaningful
only in comparison with the rate of the original recordings. Both packages are optional (the extra "speech").
"""

import importlib.util
import re

import numpy as np
import numpy.typing as npt

SAMPLE_RATE = 16_000
"""Sample rate in Hz of the recogniser's acoustic model."""
PACKAGES = ("pocketsphinx", "jiwer")
_DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


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

    decoder = Decoder(samprate=SAMPLE_RATE, loglevel="FATAL")
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
