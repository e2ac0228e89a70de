"""Import and export against transformers' own reading and saving of the same model, and against the disk.

The model: a Qwen3 in bfloat16 with random bits, in shards, of --gigabytes. Each side is a separate process, once a
round in turns, with its source out of the page cache before; medians of the rounds.
    raw          the shards copied as dd does, 4 MB at a time: read, written, synced
    import       shards -> native checkpoint; export: that -> shards. With --no-gate: the digests of an exported
                 checkpoint are checked; all output is synced, read back and checked, then named
    gated_import, gated_export    with the gate, which compares all tensors of both sides; but not the logits
    from_pretrained, save_pretrained    of transformers, one after the other in one process: nothing is synced
MB/s: bytes of weights over seconds of the call (imports of libraries are excluded); rss: peak resident MB of the
process that needs most, its libraries included; share: MB/s over raw's of the same round, median of the ratios.
Run: `python benchmarks/convert.py [--gigabytes G] [--shards N] [--nproc N] [--rounds N] [--folder F] [--json OUT]`.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1] / "tests" / "lib"
LAYER_BYTES = 18_900_000
"""Size of tests/lib/stream_models.py's model."""
PIECE = 4 << 20


def side(name: str, folder: Path, nproc: int, shards: int) -> dict[str, float]:
    """Run one side in this process: seconds of each part, and peak memory."""
    seconds: dict[str, float] = {}
    if name == "raw":
        began = time.perf_counter()
        copy(folder / "hf", folder / "raw")
        seconds["raw"] = time.perf_counter() - began
    elif name == "transformers":
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        began = time.perf_counter()
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.bfloat16)
        seconds["from_pretrained"] = time.perf_counter() - began
        began = time.perf_counter()
        model.save_pretrained(folder / "saved", max_shard_size=shard_size(folder, shards))
        seconds["save_pretrained"] = time.perf_counter() - began
    else:
        import transformers.models.qwen3

        from megamm.convert.export import export
        from megamm.convert.import_folder import import_
        from megamm.convert.verify.equivalence import VerificationOptions

        source, target = (folder / part for part in SIDES[name])
        convert = export if name.endswith("export") else import_
        verification = VerificationOptions(logits=False, compare=name.startswith("gated"))
        began = time.perf_counter()
        convert(source, target, nproc=nproc, shard_size=shard_size(folder, shards), verification=verification)
        seconds[name] = time.perf_counter() - began
    # Not this process's ru_maxrss, which begins with that of its parent.
    lines = Path("/proc/self/status").read_text().splitlines()
    own = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return seconds | {"rss": max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) * 1024 / 1e6}


def shard_size(folder: Path, shards: int) -> int:
    """Return the bytes for which the output has about as many shards."""
    return size_of(folder) // shards + LAYER_BYTES


def size_of(folder: Path) -> int:
    """Return the bytes of the model's weights."""
    return sum(file.stat().st_size for file in (folder / "hf").glob("*.safetensors"))


def copy(source: Path, target: Path) -> None:
    """Copy all shards, each synced."""
    target.mkdir()
    for file in sorted(source.glob("*.safetensors")):
        with file.open("rb", buffering=0) as read, (target / file.name).open("wb", buffering=0) as written:
            while piece := read.read(PIECE):
                written.write(piece)
            os.fsync(written.fileno())


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for file in (f for f in folder.rglob("*") if f.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


SIDES = {
    "raw": ("hf", "raw"),
    "import": ("hf", "run"),
    "gated_import": ("hf", "gated_run"),
    "export": ("run", "out"),
    "gated_export": ("run", "gated_out"),
    "transformers": ("hf", "saved"),
}
"""Input and output of each."""


def turn(folder: Path, given: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Run every side once: MB/s and memory of each."""
    found: dict[str, dict[str, float]] = {}
    for name, (source, target) in SIDES.items():
        forget(folder / source)
        command = [sys.executable, __file__, "--side", name, "--folder", str(folder), "--nproc", str(given.nproc)]
        done = subprocess.run([*command, "--shards", str(given.shards)], stdout=subprocess.PIPE, text=True, check=True)
        timed = json.loads(done.stdout.splitlines()[-1])
        peak = timed.pop("rss")
        for part, seconds in timed.items():
            found[part] = {"MB/s": size_of(folder) / seconds / 1e6, "seconds": seconds, "rss": peak}
        if name != "import":
            shutil.rmtree(folder / target)
    shutil.rmtree(folder / "run")
    for part in found.values():
        part["share"] = part["MB/s"] / found["raw"]["MB/s"]
    print(json.dumps(found), flush=True)
    return found


def main() -> None:
    """Run and print; --json also writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--shards", type=int, default=5)
    parser.add_argument("--nproc", type=int, default=0, help="processes of import and export; 0: one per core")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="folder on the measured disk; default: the temporary folder")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.side:
        print(json.dumps(side(given.side, given.folder, given.nproc, given.shards)))
        return
    sys.path.insert(0, str(TESTS))
    import torch
    from stream_models import write_synthetic

    from megamm import __version__

    result: dict[str, Any] = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "torch": torch.__version__}
    result |= {"megamm": __version__, "date": time.strftime("%Y-%m-%d"), "rounds": given.rounds}
    result |= {"nproc": given.nproc or os.cpu_count(), "load_before": os.getloadavg()}
    with tempfile.TemporaryDirectory(prefix="megamm-convert-", dir=given.folder) as place:
        folder = Path(place)
        group = write_synthetic(folder / "hf", round(given.gigabytes * 1e9 / LAYER_BYTES), given.shards, fill=True)
        result |= {"bytes": size_of(folder), "shards": given.shards, "largest_group_bytes": group}
        turns = [turn(folder, given) for _ in range(given.rounds)]
    result["load_after"] = os.getloadavg()
    for part in turns[0]:
        result[part] = {what: statistics.median(one[part][what] for one in turns) for what in turns[0][part]}
    print(json.dumps(result, indent=1))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
