"""The result for every sample of a build: report.json of a source, console lines, and the merged reports.

Out: SHARDS/<source>/report.json with counts and, by rule, each skipped sample with its reason; SHARDS/report.json
and SHARDS/ATTRIBUTION.md with those of all sources.
"""

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megamm.data.build import heldout
from megamm.data.build.check_unit import StoredSample
from megamm.data.build.curation import RULES

SKIP_RULES = ("broken", "duplicates", "near_duplicates", "leaks", *RULES)
"""Rules by which a sample can be skipped, in the order of the report."""


EXAMPLES = 3
"""Names shown of each reason."""


@dataclass(frozen=True)
class Reason:
    """Samples with the same reason: the first one's, in full, their number, and the first names."""

    reason: str
    count: int
    first: tuple[str, ...]

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.first) else ""
        return f"{self.count} x {self.reason} ({', '.join(self.first)}{more})"


def grouped(entries: list[dict[str, str]]) -> list[Reason]:
    """Group {"what", "reason"} by reason, the most frequent first; numbers and details after a colon may differ."""
    groups: dict[str, list[dict[str, str]]] = {}
    for entry in entries:
        groups.setdefault(re.sub(r"[\d.,]+", "N", re.split(r": | to ", entry["reason"])[0]), []).append(entry)
    reasons = [
        Reason(found[0]["reason"], len(found), tuple(entry["what"] for entry in found[:EXAMPLES]))
        for found in groups.values()
    ]
    return sorted(reasons, key=lambda reason: -reason.count)


@dataclass
class BuildReport:
    """Results for one source's samples; left_out: rule -> [{"what", "reason"}]; media: bytes by modality.

    missing: the same by modality, of samples that are used without a part of it (--allow-missing); no_data: number of
    files that do not belong to the data, by kind.

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
    missing: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    no_data: Counter[str] = field(default_factory=Counter)
    ignored_fields: dict[str, int] = field(default_factory=dict)
    heldout_by: dict[str, list[str]] = field(default_factory=lambda: {rule: [] for rule in heldout.RULES})
    left_out: dict[str, list[dict[str, str]]] = field(default_factory=lambda: {rule: [] for rule in SKIP_RULES})

    def skip(self, rule: str, what: str, reason: str) -> None:
        """Record a skipped sample."""
        self.left_out[rule].append({"what": what, "reason": reason})

    def count(self, sample: StoredSample) -> None:
        """Record a sample stored in a split."""
        for lost in sample.missing:
            self.missing.setdefault(lost.modality, []).append({"what": sample.key, "reason": lost.reason})
        setattr(self, sample.split, getattr(self, sample.split) + 1)
        self.masked += sample.masked
        for part in sample.parts:
            self.parts[part.modality] += 1
            self.media_bytes[part.modality] += part.size
        if sample.rule:
            self.heldout_by[sample.rule].append(sample.key)

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

    def details(self) -> list[str]:
        """Console lines below the summary: counts by reason with the first names, parts missing, files of no use."""
        lines = [f"{rule.replace('_', ' ')}: {r}" for rule in self.left_out for r in self.reasons(rule)]
        for modality, entries in sorted(self.missing.items()):
            lines += [f"used without {modality}: {reason}" for reason in grouped(entries)]
        lines += [f"not read: {count} {kind}" for kind, count in sorted(self.no_data.items())]
        return [f"  {line}" for line in lines]

    def reasons(self, rule: str) -> list[Reason]:
        """The samples that a rule skips, by reason."""
        return grouped(self.left_out[rule])

    def first_reason(self) -> str:
        """The first broken sample and the reason."""
        if not self.left_out["broken"]:
            return "it contains no samples"
        return "the first is {what}: {reason}".format(**self.left_out["broken"][0])

    def write(self, folder: Path) -> None:
        """Write FOLDER/report.json."""
        folder.mkdir(parents=True, exist_ok=True)  # it does not exist yet if every sample was skipped
        reasons = {rule: [asdict(reason) for reason in self.reasons(rule)] for rule in self.left_out}
        (folder / "report.json").write_bytes(_to_json(self.__dict__ | {"reasons": reasons}))


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
