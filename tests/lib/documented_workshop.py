"""A folder in which the docs' commands run as typed: tiny data, runs and exports with the names used there.

It has copies of the user-visible parts of a checkout, links to its code, and a real run with its export, made by the
command line: `python documented_workshop.py FOLDER`.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch
import yaml
from media_samples import example, make_codecs
from tiny_run import ROOT

from megamm.data.build.heldout import is_heldout
from megamm.modalities import REGISTRY
from megamm.tokenizers.io import save_codec
from megamm.tokenizers.visual.model import VisualCodec, VisualCodecConfig

COPIED = ("docs", "examples", "launchers")
LINKED = ("benchmarks", "csrc", "megamm", "requirements", "tests", "tools")
LINKED += (
    ".pre-commit-config.yaml",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "MANIFEST.in",
    "NOTICE",
    "README.md",
    "pyproject.toml",
    "setup.py",
)
SOURCES = ("mine", "emoji", "clipart")
CLEAN = ("HOME", "LANG", "LC_ALL", "TZ", "USER")
"""Variables of a new shell, besides PATH."""


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of a new shell with megamm's venv active: no thread counts, Python paths or pytest."""
    kept = {name: os.environ[name] for name in CLEAN if name in os.environ}
    return kept | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "EDITOR": "cat",
        "TMPDIR": str(folder),
    }


def shell(line: str, cwd: Path, timeout: float = 600, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a line with bash in the clean environment; return stdout and stderr together."""
    temporary = cwd / ".tmp"
    temporary.mkdir(exist_ok=True)
    command = ["bash", "-euo", "pipefail", "-c", line]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL, "text": True}
    return subprocess.run(command, cwd=cwd, env=environment(temporary) | more, timeout=timeout, **output)


def make(folder: Path) -> None:
    """Make everything except the output of the commands themselves."""
    folder.mkdir(exist_ok=True)
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(sys.prefix)
    _write_raw(folder)
    codecs = make_codecs(folder / "tokenizers")
    _write_configs(folder, {name: f"tokenizers/{name}" for name in codecs})
    _make_other_codec(folder / "tokenizers" / "new_visual")
    data, ending = example("image", 50)
    (folder / f"heart.{ending}").write_bytes(data)
    shards = [f"shards/{name}" for name in SOURCES]
    options = [word for name in codecs for word in ("--codec", f"{name}=tokenizers/{name}")]
    _megamm(
        folder,
        ["data", "build", *(f"raw/{name}" for name in SOURCES), "--to", "shards"],
        ["data", "tokenize", *shards, *options],
        ["data", "tokenize", *shards, "--codec", "visual=tokenizers/new_visual"],
        ["train", "mine.yaml", "output=RUN", "train.steps=4", "resilience.max_restarts=0"],
        ["convert", "export", "RUN", "EXPORT"],
        ["convert", "modules", "EXPORT", "PARTS"],
    )
    steps = sorted((folder / "RUN" / "checkpoints").glob("step_*"))
    run = folder / "RUN"
    for name, target in {"ONE": steps[0], "OTHER": steps[-1], "CHECKPOINT": run, "MODEL": run}.items():
        (folder / name).symlink_to(target.relative_to(folder))
    for name in ("mine", "old_codec"):
        shutil.copytree(folder / "RUN", folder / "runs" / name, symlinks=True)
    shutil.copytree(folder / "EXPORT", folder / "export")


def _megamm(folder: Path, *commands: list[str]) -> None:
    """Run these commands in one process, for speed."""
    code = (
        "import json, sys; from megamm.cli import app\nfor a in json.loads(sys.argv[1]): app(a, standalone_mode=False)"
    )
    command = [sys.executable, "-c", code, json.dumps(commands)]
    one_thread = environment(folder) | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=one_thread, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def _nouns() -> Iterator[str]:
    """Yield two words of the train split, then one held-out word, and so on, at the default share."""
    words = [f"thing{k}" for k in range(2000)]
    heldout, trained = [[w for w in words if is_heldout(w, 0.05) is held] for held in (True, False)]
    for k in count():
        yield heldout[k // 3] if k % 3 == 2 else trained[k]


def _write_raw(folder: Path) -> None:
    """Write raw/SOURCE with samples of all modalities, and captioned pictures in every other supported format."""
    numbers, nouns = count(), _nouns()
    for source in SOURCES:
        raw = folder / "raw" / source
        raw.mkdir(parents=True)
        with (raw / "samples.jsonl").open("w") as lines:
            for _ in range(12):
                number = next(numbers)
                sample = {"key": f"s{number}", "noun": next(nouns)}
                for modality in REGISTRY:
                    data, ending = example(modality, number)
                    if modality == "text":
                        sample["caption"] = data.decode()
                    else:
                        sample[modality] = f"{modality}{number}.{ending}"
                        (raw / sample[modality]).write_bytes(data)
                lines.write(json.dumps(sample) + "\n")
    shutil.copytree(folder / "raw" / "mine", folder / "RAW" / "mine")
    shutil.copytree(folder / "raw" / "mine", folder / "dump")
    (folder / "dump" / "samples.jsonl").rename(folder / "dump" / "train.jsonl")
    _write_other_forms(folder)


def _write_other_forms(folder: Path) -> None:
    """Write pictures/, tars/ and tables/ of the same samples."""
    import pyarrow
    import webdataset
    from pyarrow import parquet

    samples = [(f"s{n}", example("image", n)[0], example("text", n)[0].decode()) for n in range(200, 212)]
    for name in ("pictures", "tars", "tables"):
        (folder / name).mkdir()
    with webdataset.ShardWriter(str(folder / "tars" / "%06d.tar"), maxcount=6, verbose=0) as tars:
        for key, image, text in samples:
            tars.write({"__key__": key, "png": image, "txt": text})
            (folder / "pictures" / f"{key}.png").write_bytes(image)
            (folder / "pictures" / f"{key}.txt").write_text(text)
    columns = dict(zip(("key", "image", "caption"), map(list, zip(*samples, strict=True)), strict=True))
    parquet.write_table(pyarrow.table(columns), folder / "tables" / "train.parquet")


def _make_other_codec(folder: Path) -> None:
    """Write a visual codec that none of the runs was trained with."""
    folder.mkdir()
    torch.manual_seed(1)
    sizes = VisualCodecConfig(image_size=32, downsample=8, width=16, decoder_depth=0, encoder_depth=0, levels=(4, 4))
    save_codec(VisualCodec(sizes), folder)


def _write_configs(folder: Path, tokenizers: dict[str, str]) -> None:
    """Write CONFIG, mine.yaml and with_images.yaml: tiny models that fit all documented layouts."""
    heads = {"num_attention_heads": 4, "num_query_groups": 4, "head_dim": 8}
    config = {
        "device": "cpu",
        "model": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, **heads},
        "data": {"seq_length": 160, "sources": [{"path": f"shards/{name}", "documents": "pairs"} for name in SOURCES]},
        "tokenizers": tokenizers,
        "optimizer": {"lr": 3e-3, "warmup_steps": 2},
        "train": {"steps": 8, "global_batch_size": 4, "micro_batch_size": 2, "log_every": 1, "eval_every": 8},
        "checkpoint": {"every": 2},
        "resilience": {"hang_seconds": 300, "startup_seconds": 300},  # the cores are shared: slow is not a hang
    }
    for name, output in {"CONFIG": "runs/config", "mine.yaml": "runs/mine", "with_images.yaml": "runs/new"}.items():
        if name == "with_images.yaml":
            config |= {"tokenizers": tokenizers | {"visual": "tokenizers/new_visual"}}
        (folder / name).write_text(yaml.safe_dump({"output": output, **config}))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
