"""Word error rate of speech by a recogniser that a laptop can run: how much of what is said survives a codec.

In: float32 `[samples]` at 16 kHz with their transcripts. Out: (substituted + missing + added words) / words said.
Recogniser: PocketSphinx with the English model in its package; it makes many errors of its own, so a rate means
something only beside that of the original recordings. Both packages are optional (the extra "speech").
"""

import importlib.util
import re

import numpy as np
import numpy.typing as npt

SAMPLE_RATE = 16_000
"""Hz; what the recogniser's acoustic model was trained on."""
PACKAGES = ("pocketsphinx", "jiwer")
_DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def missing_package() -> str | None:
    """The package without which no word error can be measured, if one is not installed."""
    return next((package for package in PACKAGES if importlib.util.find_spec(package) is None), None)


def words(transcript: str) -> str:
    """A transcript as words a recogniser could give: lower case, digits spelled, no remarks in brackets."""
    spoken = re.sub(r"\([^)]*\)|\[[^]]*\]|<[^>]*>", " ", transcript.lower())
    spoken = re.sub(r"\d", lambda digit: f" {_DIGITS[int(digit[0])]} ", spoken)
    return " ".join(re.findall(r"[a-z]+(?:'[a-z]+)?", spoken))


def recognise(waveforms: list[npt.NDArray[np.float32]]) -> list[str]:
    """What is said in each waveform `[samples]` (16 kHz), as lower-case words."""
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
    """Errors a word, over all of them; transcripts as `words` gives them, none empty."""
    import jiwer

    return float(jiwer.wer(transcripts, heard))
