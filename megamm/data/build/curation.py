"""Rules that select samples for training: text, image and audio checks that `megamm data build` applies.

In: clean texts and decodable media of one sample. Out: the name of the rule that skips it and the reason, if any; texts
with personal data masked, if requested. Near-duplicate texts are found over all samples, by MinHash (Broder 1997) over
shingles of words, with banding so that only likely pairs are compared (locality-sensitive hashing).

Personal data: e-mail addresses, phone numbers, IP addresses and payment cards are replaced by <EMAIL>, <PHONE>, <IP>
and <CARD>. Phone numbers are recognised in international form (+49 30 1234567) and in North American form
(555-123-4567); cards have 13 to 19 digits and a valid check digit (Luhn, ISO/IEC 7812-1). Names and postal addresses
are not detected.
"""

import difflib
import ipaddress
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from megamm.common.errors import UnreadableMedia, UserError
from megamm.media.image_file import decode_image
from megamm.media.sound_file import open_sound

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

RULES = ("text_length", "language", "image_sanity", "audio_sanity")
"""Rules that check a single sample, as named in report.json."""
LANGUAGE_WORDS = 20
"""The language of shorter texts cannot be detected reliably."""
NEAR_DUPLICATE_WORDS = 50
"""Shorter texts have few shingles and share them by chance."""
SHINGLE_WORDS, PERMUTATIONS, BAND_ROWS = 5, 128, 4
"""32 bands of 4: a pair of Jaccard similarity 0.8 is compared with certainty (1 - 5e-8), one of 0.2 in 5 % of cases."""
SILENCE = 1e-3
"""Peak amplitude below which audio counts as silent: -60 dB of full scale."""
FULL_SCALE = 0.999
"""Amplitude from which a sample counts as clipped."""

Signature = npt.NDArray[np.uint32]


class FilteredOut(ValueError):
    """A readable sample that a rule skips: the name of the rule, and the reason."""

    def __init__(self, rule: str, why: str) -> None:
        self.rule = rule
        super().__init__(why)


@dataclass(frozen=True)
class CurationOptions:
    """Lengths in characters, sides in pixels, aspect = longer / shorter side, durations in seconds.

    languages: ISO 639-1 codes, none = all; near_duplicates: Jaccard similarity from which a text is skipped, 0 = off;
    keep_blank: keep images of one colour and silent audio; max_clipped: share of audio samples at full scale.
    """

    min_characters: int = 1
    max_characters: int = 1_000_000
    languages: tuple[str, ...] = ()
    near_duplicates: float = 0.8
    min_side: int = 8
    max_aspect: float = 20.0
    keep_blank: bool = False
    min_seconds: float = 0.1
    max_seconds: float = 1800.0
    max_clipped: float = 0.1
    mask_pii: bool = False

    def __post_init__(self) -> None:
        for name in ("near_duplicates", "max_clipped"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}", remedy="give a number from 0 to 1")
        for name in ("characters", "seconds"):
            if not 0 <= getattr(self, f"min_{name}") <= getattr(self, f"max_{name}"):
                raise UserError(f"min_{name} is negative or above max_{name}", remedy="give 0 <= min <= max")
        if self.min_side < 1 or self.max_aspect < 1:
            raise UserError("min_side and max_aspect must be at least 1", remedy="give a larger number")
        for language in self.languages:
            # Checked at the start, not after an hour: an unknown code would skip every text.
            if language not in (known := _identifier().labels):
                near = difflib.get_close_matches(language, known, n=1)
                remedy = f"did you mean {near[0]!r}?" if near else "give ISO 639-1 codes, such as en or de"
                raise UserError(f"unknown language {language!r}", remedy=remedy)


def parameters(options: CurationOptions) -> dict[str, Any]:
    """The options and the fixed thresholds, for the report."""
    return asdict(options) | {
        "language_words": LANGUAGE_WORDS,
        "near_duplicate_words": NEAR_DUPLICATE_WORDS,
        "shingle_words": SHINGLE_WORDS,
        "permutations": PERMUTATIONS,
        "band_rows": BAND_ROWS,
        "silence": SILENCE,
        "full_scale": FULL_SCALE,
    }


def check_text(text: str, options: CurationOptions) -> None:
    """Raise FilteredOut if a sample's text is too short or long, or in an unwanted language."""
    if not options.min_characters <= len(text) <= options.max_characters:
        limits = f"{options.min_characters} to {options.max_characters}"
        raise FilteredOut("text_length", f"{len(text)} characters, not {limits}")
    # Short texts pass in any language.
    if options.languages and len(text.split()) >= LANGUAGE_WORDS:
        language, _ = _identifier().classify(text)
        if language not in options.languages:
            raise FilteredOut("language", f"language {language}, not {', '.join(options.languages)}")


@cache
def _identifier() -> "LanguageIdentifier":
    """The language identifier, loaded once."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # takes a second to load; used for --language only

    return LanguageIdentifier.from_model_file(MODEL_FILE)


def check_image(data: bytes, extension: str, options: CurationOptions) -> None:
    """Raise FilteredOut if a decodable image is tiny, a strip, or all of one colour, as it is in training."""
    image = decode_image(data, extension)
    short, long = sorted(image.size)
    if short < options.min_side:
        raise FilteredOut("image_sanity", f"{image.width} x {image.height} is less than {options.min_side} pixels")
    if long > options.max_aspect * short:
        raise FilteredOut("image_sanity", f"{image.width} x {image.height} is more than {options.max_aspect:g} : 1")
    if options.keep_blank:
        return
    pixels_YXC = np.asarray(image.convert("RGBA"))
    # Completely transparent, or every pixel equal to the first.
    if not pixels_YXC[..., 3].any() or (pixels_YXC == pixels_YXC[0, 0]).all():
        raise FilteredOut("image_sanity", "blank: a single colour")


def check_audio(data: bytes, extension: str, options: CurationOptions) -> None:
    """Raise FilteredOut if audio, as training reads it, is too short or long, silent, or clipped."""
    peak, clipped, total, length = 0.0, 0, 0, 0
    try:
        with open_sound(data, extension) as sound:
            for block in sound.blocks:
                amplitude = np.abs(block)
                peak = max(peak, float(amplitude.max(initial=0)))
                # All channels count: a sample of each channel is one sample here.
                clipped += int((amplitude >= FULL_SCALE).sum())
                total += block.size
                length += len(block)
    except UnreadableMedia as error:
        raise FilteredOut("audio_sanity", f"cannot be checked: {error}") from error
    seconds = length / sound.samplerate
    if not options.min_seconds <= seconds <= options.max_seconds:
        limits = f"{options.min_seconds:g} to {options.max_seconds:g}"
        raise FilteredOut("audio_sanity", f"{seconds:.2f} s, not {limits} s")
    if peak < SILENCE and not options.keep_blank:
        raise FilteredOut("audio_sanity", f"silent: peak {peak:.1e} of full scale")
    if clipped > options.max_clipped * total:
        raise FilteredOut("audio_sanity", f"clipped: {clipped / total:.1%} of the samples at full scale")


MEDIA_CHECKS = {"image": check_image, "audio": check_audio}
"""The rules for a modality's media; for other modalities it is enough that they decode."""


def signature(text: str) -> Signature | None:
    """MinHash of a text's shingles of words, `[PERMUTATIONS]`; None for texts too short to compare."""
    words = re.findall(r"\w+", text.casefold())
    if len(words) < NEAR_DUPLICATE_WORDS:
        return None
    from rensa import RMinHash

    # The seed is fixed: signatures of different runs and machines are equal.
    sketch = RMinHash(num_perm=PERMUTATIONS, seed=0)
    sketch.update(shingles(words))
    return np.array(sketch.digest(), dtype=np.uint32)


def shingles(words: list[str]) -> list[str]:
    """All distinct runs of SHINGLE_WORDS words."""
    starts = range(len(words) - SHINGLE_WORDS + 1)
    return sorted({" ".join(words[start : start + SHINGLE_WORDS]) for start in starts})


class NearDuplicates:
    """The texts kept so far, by the bands of their signatures; each signature has 0.5 kB."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._names: list[str] = []
        self._signatures: list[Signature] = []
        self._bands: dict[tuple[int, bytes], list[int]] = {}

    def find(self, sketch: Signature) -> tuple[str, float] | None:
        """The most similar kept text and its estimated Jaccard similarity, if that reaches the threshold."""
        # Texts that share at least one band; only these are compared.
        candidates = sorted({number for band in bands(sketch) for number in self._bands.get(band, ())})
        if not candidates:
            return None
        # The share of equal entries of two MinHash signatures estimates the Jaccard similarity of the shingles.
        similarity = (np.stack([self._signatures[number] for number in candidates]) == sketch).mean(axis=1)
        best = int(similarity.argmax())
        if similarity[best] < self.threshold:
            return None
        return self._names[candidates[best]], float(similarity[best])

    def add(self, name: str, sketch: Signature) -> None:
        """Keep a text under a name."""
        for band in bands(sketch):
            self._bands.setdefault(band, []).append(len(self._names))
        self._names.append(name)
        self._signatures.append(sketch)


def bands(sketch: Signature) -> list[tuple[int, bytes]]:
    """The bands of a signature, each with its position: texts that share one are candidates."""
    return [(start, sketch[start : start + BAND_ROWS].tobytes()) for start in range(0, PERMUTATIONS, BAND_ROWS)]


def mask(text: str) -> tuple[str, Counter[str]]:
    """The masked text and the count of each kind. Masking twice changes nothing."""
    counts: Counter[str] = Counter()
    for kind, pattern, is_meant in _KINDS:

        def replace(match: re.Match[str], kind: str = kind, is_meant: Callable[[str], bool] = is_meant) -> str:
            if not is_meant(match[0]):
                return match[0]
            counts[kind] += 1
            return f"<{kind}>"

        text = pattern.sub(replace, text)
    return text, counts


def is_card(text: str) -> bool:
    """Whether 13 to 19 digits, optionally with spaces or hyphens, are not all equal and pass the Luhn check."""
    digits = [int(character) for character in text if character.isdigit()]
    # Luhn: every second digit from the right is doubled, and two digits of a result are added.
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and (sum(doubled) + sum(digits[-1::-2])) % 10 == 0


def is_address(text: str) -> bool:
    """Whether this is an IP address. Version 6 needs at least three groups: `a::b` is more often code."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return address.version == 4 or sum(1 for group in text.split(":") if group) >= 3


_KINDS: tuple[tuple[str, re.Pattern[str], Callable[[str], bool]], ...] = (
    ("EMAIL", re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,8}"), bool),
    ("IP", re.compile(r"(?<![\w.])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?!\w|\.[0-9])"), is_address),
    ("IP", re.compile(r"(?<![\w:])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])"), is_address),
    ("CARD", re.compile(r"(?<![\w-])[0-9](?:[ -]?[0-9]){12,18}(?![\w-])"), is_card),
    (
        "PHONE",
        re.compile(r"(?<![\w+])\+[0-9]{1,3}[ .-]?(?:\([0-9]{1,4}\)[ .-]?)?[0-9](?:[ .-]?[0-9]){5,12}(?!\w)"),
        bool,
    ),
    ("PHONE", re.compile(r"(?<![\w.-])(?:\([0-9]{3}\) ?|[0-9]{3}[-. ])[0-9]{3}[-. ][0-9]{4}(?![\w-])"), bool),
)
"""Kind, pattern (of bounded length, so that no text takes long), and the check of a match."""
