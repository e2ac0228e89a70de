"""The result for every sample of a build: report.json of a source, a console line, and the merged reports.

Out: SHARDS/<source>/report.json with counts and, by rule, each skipped sample with its reason; SHARDS/report.json
and SHARDS/ATTRIBUTION.md with those of all sources.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megamm.data.build import heldout
from megamm.data.build.curation import RULES
from megamm.data.build.media_check import CheckedSample

SKIP_RULES = ("broken", "duplicates", "near_duplicates", "leaks", *RULES)
"""Rules by which a sample can be skipped, in the order of the report."""


@dataclass
class BuildReport:
    """Results for one source's samples; left_out: rule -> [{"what", "reason"}]; media: bytes by modality.

    heldout_by: the keys of the held-out samples by the rule that holds them out (data/build/heldout.py).
    """

    source: str
    curation: dict[str, Any]
    samples: int = 0
    train: int = 0
    heldout: int = 0
    parts: Counter[str] = field(default_factory=Counter)
    media_bytes: Counter[str] = field(default_factory=Counter)
    masked: Counter[str] = field(default_factory=Counter)
    ignored_fields: dict[str, int] = field(default_factory=dict)
    heldout_by: dict[str, list[str]] = field(default_factory=lambda: {rule: [] for rule in heldout.RULES})
    left_out: dict[str, list[dict[str, str]]] = field(default_factory=lambda: {rule: [] for rule in SKIP_RULES})

    def skip(self, rule: str, what: str, reason: str) -> None:
        """Record a skipped sample."""
        self.left_out[rule].append({"what": what, "reason": reason})

    def count(self, split: str, sample: CheckedSample) -> None:
        """Record a sample stored in a split."""
        setattr(self, split, getattr(self, split) + 1)
        self.masked += sample.masked
        for part in sample.parts:
            self.parts[part.modality] += 1
            self.media_bytes[part.modality] += len(part.data)

    def summary(self) -> str:
        """A summary line for the console."""
        parts = ", ".join(
            f"{count} {modality} ({self.media_bytes[modality] / 2**20:.1f} MiB)"
            for modality, count in sorted(self.parts.items())
        )
        left_out = ", ".join(f"{len(found)} {rule.replace('_', ' ')}" for rule, found in self.left_out.items() if found)
        line = (
            f"{self.source}: {self.train} train + {self.heldout} heldout of {self.samples} samples: {parts or 'none'}"
        )
        line += f"; skipped: {left_out or 'none'}"
        if self.masked:
            line += "; masked: " + ", ".join(f"{count} {kind}" for kind, count in sorted(self.masked.items()))
        return line

    def first_reason(self) -> str:
        """The first broken sample and the reason."""
        if not self.left_out["broken"]:
            return "it contains no samples"
        return "the first is {what}: {reason}".format(**self.left_out["broken"][0])

    def write(self, folder: Path) -> None:
        """Write FOLDER/report.json."""
        folder.mkdir(parents=True, exist_ok=True)  # it does not exist yet if every sample was skipped
        (folder / "report.json").write_bytes(_to_json(self.__dict__))


def _to_json(content: Any) -> bytes:
    """Encode as JSON. File names may contain bytes that are not UTF-8; these are escaped."""
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def merge_reports(shards: Path) -> None:
    """Write SHARDS/report.json and SHARDS/ATTRIBUTION.md from those of the present sources."""
    # All sources in SHARDS, also those built earlier; a hidden folder is a build in progress.
    folders = sorted(file.parent for file in shards.glob("*/report.json") if not file.parent.name.startswith("."))
    reports = {folder.name: json.loads((folder / "report.json").read_bytes()) for folder in folders}
    credits = [folder / "ATTRIBUTION.md" for folder in folders if (folder / "ATTRIBUTION.md").exists()]
    files = {
        "report.json": _to_json(reports),
        "ATTRIBUTION.md": b"\n".join(file.read_bytes() for file in credits),
    }
    for name, data in files.items():
        partial = shards / f".{name}.partial"
        partial.write_bytes(data)
        partial.replace(shards / name)
