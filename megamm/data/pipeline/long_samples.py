"""What becomes of the samples that are longer than a row: counted, and named."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar


@dataclass(frozen=True)
class Named:
    """A number of samples and the keys of the first ones."""

    NAMES: ClassVar[int] = 3
    count: int
    first: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.count:,} ({', '.join(self.first)}{', ...' if self.count > len(self.first) else ''})"


@dataclass(frozen=True)
class LongSamples:
    """Those of one split with `samples` samples: split into several documents, with a shorter text, or not used."""

    folder: Path
    row_length: int
    samples: int
    split: Named
    shortened: Named
    skipped: Named

    def __bool__(self) -> bool:
        return any(named.count for named in (self.split, self.shortened, self.skipped))

    def __str__(self) -> str:
        done = {"split": self.split, "with shortened text": self.shortened, "skipped": self.skipped}
        words = ", ".join(f"{what}: {named}" for what, named in done.items() if named.count)
        return (
            f"{self.folder}: of {self.samples:,} samples, longer than a row of {self.row_length:,} tokens and {words}"
        )
