"""Makes the test data of this folder with version 0.1 (commit 6fc1dea): shards, codecs, runs, an export, figures.

    git worktree add ../megamm-0.1 6fc1dea
    .venv/bin/python tests/data/v0_1/make.py ../megamm-0.1 FOLDER

Everything but the raw media is written by commands of that checkout, with the libraries of this environment. The paths
in FOLDER are relative to it. Commands and sizes are below; README.md lists the files.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import soundfile
import torch
import yaml
from PIL import Image, ImageDraw
from transformers import AutoModelForCausalLM

COMMIT = "6fc1dea036385a4e2426a667b9710a74c19954d5"
STOP, STEPS = 2, 6
"""The runs kept here stopped after STOP steps; the figures are those of runs of STEPS steps that did not stop."""
COLOURS = {"red": (220, 30, 30), "green": (20, 160, 40), "blue": (30, 60, 220), "black": (0, 0, 0)}
NOUNS = ("box", "ball", "boat", "star", "kite", "lamp")
SOURCE = "shards/things"
CODECS = {
    "text": "--vocabulary 256",
    "visual": "--image-size 16 --downsample 8 --max-frames 5 --width 16 --encoder-depth 0 --decoder-depth 0 "
    "--levels 5,5 --steps 3 --batch-size 4 --clip-share 0.5 --clip-frames 5",
    "audio": "--sample-rate 4000 --hop 100 --stride 4 --codebooks 2 --levels 4,4 --width 16 --encoder-depth 0 "
    "--decoder-depth 1 --steps 20 --batch-size 4 --crop-seconds 0.4 --heldout-seconds 1",
    "points": "--points 64 --patches 4 --cells 4 --width 16 --encoder-depth 1 --decoder-depth 1 --levels 4,4 "
    "--steps 3 --batch-size 2",
}
CONFIG = {
    "device": "cpu",
    "model": {
        "num_layers": 2,
        "hidden_size": 8,
        "ffn_hidden_size": 16,
        "num_attention_heads": 2,
        "num_query_groups": 2,
        "head_dim": 4,
    },
    "data": {"seq_length": 64, "sources": [{"path": SOURCE, "documents": "pairs"}]},
    "tokenizers": {name: f"tokenizers/{name}" for name in CODECS},
    # A large eps: the rounding of another processor must not decide an update where the second moment is almost zero.
    "optimizer": {"lr": 1e-2, "warmup_steps": 2, "eps": 1e-3},
    "train": {"steps": STEPS, "global_batch": 4, "micro_batch": 1, "log_every": 1},
    "loss_weights": {"audio": 0.5},
}
RUNS = {
    "native": ["parallel.tensor=2", "parallel.sequence=true"],
    "deepspeed": ["engine=deepspeed", "deepspeed.zero=2"],
}
"""The runs of two ranks -> what their configs have besides CONFIG."""
KEPT_OF_A_RUN = ("checkpoints", "events.jsonl", "metrics.jsonl")
"""The rest holds the name of the machine, or is a copy."""
ROW = list(range(0, 36, 3))
"""Token ids whose last logits in transformers are kept."""
PROMPT = "a red box"
GENERATED = {"image": "image.png", "audio": "audio.flac", "points": "points.npz"}


def picture(number: int) -> Image.Image:
    image = Image.new("RGB", (16, 16), "white")
    n, c = number % len(NOUNS), number // len(NOUNS) % len(COLOURS)
    ImageDraw.Draw(image).rectangle((n, c, 6 + n, 9 + c), fill=list(COLOURS.values())[c])
    return image


def write_sound(number: int, path: Path) -> None:
    """Write a gliding tone whose loudness rises or falls, in few steps of amplitude, so that the file is small."""
    seconds = np.arange(1600) / 4000
    tone = np.sin(2 * np.pi * (100 + 60 * number + 400 * (number % 3) * seconds) * seconds)
    loudness = seconds / 0.4 if number % 2 else np.exp(-9 * seconds)
    soundfile.write(path, np.round(24 * tone * loudness) / 32, 4000, format="FLAC")


def write_video(number: int, path: Path) -> None:
    still = np.asarray(picture(number))
    with av.open(path, "w", format="mp4") as container:
        stream = container.add_stream("libvpx-vp9", rate=8)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        for k in range(5):
            frame = av.VideoFrame.from_ndarray(np.roll(still, 2 * k, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_cloud(number: int, path: Path) -> None:
    """Write an ellipsoid of one colour."""
    rng = np.random.default_rng(number)
    normal = rng.standard_normal((96, 3))
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    colour = np.broadcast_to(np.array(list(COLOURS.values())[number % 4]) / 255, normal.shape)
    cloud = np.concatenate([normal * rng.uniform(0.3, 2.0, 3), normal, colour], axis=1).astype(np.float32)
    np.savez_compressed(path, points=cloud)


def write_raw(folder: Path) -> None:
    """Write folder/samples.jsonl: pictures, every second one with a sound, some with a video or a cloud; one page."""
    folder.mkdir(parents=True)
    lines = []
    for number in range(len(COLOURS) * len(NOUNS)):
        noun, colour = NOUNS[number % len(NOUNS)], list(COLOURS)[number // len(NOUNS)]
        sample = {"image": f"{number}.png", "caption": f"a {colour} {noun}", "noun": noun}
        picture(number).save(folder / sample["image"])
        kind = number + number // len(NOUNS)  # so that each noun has each of them
        if kind % 2:
            sample["audio"] = f"{number}.flac"
            write_sound(number, folder / sample["audio"])
        elif kind % 4:
            sample["points"] = f"{number}.npz"
            write_cloud(number, folder / sample["points"])
        else:
            sample["video"] = f"{number}.mp4"
            write_video(number, folder / sample["video"])
        lines.append(sample)
    for name in ("first", "second"):
        picture(len(lines)).rotate(90 if name == "first" else 180).save(folder / f"{name}.png")
    page = [{"text": "A page: "}, {"image": "first.png"}, {"text": " and then "}, {"image": "second.png"}]
    lines.append({"parts": page, "key": "page", "noun": NOUNS[0]})
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


class Old:
    """The commands of version 0.1, run in `folder`."""

    def __init__(self, checkout: Path, folder: Path) -> None:
        head = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        if head.stdout.strip() != COMMIT:
            sys.exit(f"error: {checkout} is at {head.stdout.strip()}; check out {COMMIT}")
        self.folder = folder
        self.variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout)}

    def megamm(self, *arguments: object) -> None:
        print("$ megamm", *arguments, flush=True)
        command = [sys.executable, "-m", "megamm", *map(str, arguments)]
        subprocess.run(command, cwd=self.folder, env=self.variables, check=True)

    def train(self, run: str, *arguments: str, ranks: int = 2) -> list[dict]:
        """Train FOLDER/run.yaml with another output; return losses and gradient norms of each step."""
        self.megamm("train", "run.yaml", f"output={run}", *arguments, "--nproc", ranks)
        lines = map(json.loads, (self.folder / run / "metrics.jsonl").read_text().splitlines())
        return [
            {key: value for key, value in line.items() if key in ("step", "grad_norm") or key.startswith("loss/")}
            for line in lines
        ]


def make_data(old: Old) -> None:
    write_raw(old.folder / "raw" / "things")
    old.megamm("data", "build", "raw/things", "--to", "shards", "--heldout", "0.3", "--max-broken", "0")
    for name, options in CODECS.items():
        old.megamm("tokenizer", "train", name, SOURCE, "--to", f"tokenizers/{name}", *options.split())
    codecs = [word for name in CODECS for word in ("--codec", f"{name}=tokenizers/{name}")]
    old.megamm("data", "tokenize", SOURCE, *codecs, "--device", "cpu")
    shutil.rmtree(old.folder / "raw")


def make_runs(old: Old) -> dict[str, list[dict]]:
    """Return the figures of every step: of one rank, and of the kept runs as if they had not stopped."""
    figures = {"one_rank": old.train("scratch/one_rank", f"train.stop_after={STOP}", ranks=1)}
    for name, more in RUNS.items():
        figures[name] = old.train(f"scratch/{name}", *more)
        stopped = old.train(f"runs/{name}", *more, f"train.stop_after={STOP}")
        if stopped != figures[name][:STOP]:
            sys.exit(f"error: two runs of the same command differ: {name}")
        for path in (old.folder / "runs" / name).iterdir():
            if path.name not in KEPT_OF_A_RUN:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return figures


def make_export(old: Old) -> dict:
    """Export the native run; generate from it; return its last logits, its held-out losses, and those of its import."""
    old.megamm("convert", "export", "runs/native", "export", "--nproc", "1")
    old.megamm("convert", "import", "export", "scratch/imported", "--nproc", "1")
    old.megamm("eval", "export", SOURCE, "--json", "scratch/eval.json", "--device", "cpu")
    figures = {"eval": json.loads((old.folder / "scratch/eval.json").read_text())}
    figures["imported"] = old.train("scratch/imported", f"train.stop_after={STOP}", ranks=1)
    (old.folder / "generated").mkdir()
    for modality, file in GENERATED.items():
        options = ("--prompt", PROMPT, "--to", modality, "--out", f"generated/{file}", "--temperature", "0")
        old.megamm("generate", "export", *options, "--device", "cpu")
    model = AutoModelForCausalLM.from_pretrained(old.folder / "export", dtype=torch.float32)
    with torch.no_grad():
        figures["logits"] = model(torch.tensor([ROW])).logits[0, -1].tolist()
    drop_copies(old.folder / "export" / "codecs", old.folder / "tokenizers")
    return figures


def drop_copies(folder: Path, of: Path) -> None:
    """Remove a folder that has the same files as another one."""
    for path in (path for path in of.rglob("*") if path.is_file()):
        if (folder / path.relative_to(of)).read_bytes() != path.read_bytes():
            sys.exit(f"error: {folder} differs from {of} in {path.relative_to(of)}")
    shutil.rmtree(folder)


def main(checkout: Path, folder: Path) -> None:
    old = Old(checkout.resolve(), folder.resolve())
    make_data(old)
    (folder / "run.yaml").write_text(yaml.safe_dump({"output": "runs/native"} | CONFIG, sort_keys=False))
    figures = make_runs(old) | make_export(old)
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    shutil.rmtree(folder / "scratch")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
