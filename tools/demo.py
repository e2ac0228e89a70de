"""`make demo`: from nothing to a trained, exported, evaluated and sampled text-and-image model, on a CPU.

    python tools/demo.py --out out/demo [--fresh]

Every stage runs the real command line and is timed. A complete stage is kept if its command and all stages before it
are unchanged; --fresh makes everything anew. In the middle of training one rank is killed with SIGKILL, and the
same command must resume. Out: report.html and summary.json; the exit code is 0 only if what the demo promises
holds (losses fell, each part of a pair tells of the other, transformers gives the logits of our own model).
Units: losses and gains in nats per token, PSNR in dB, memory in GiB (summed over the process tree).
"""

import argparse
import hashlib
import json
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from megamm import checkpoint, metrics
from megamm.data.nouns import normalise_noun
from megamm.data.shards import ShardFolder

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "examples" / "cpu_tiny.yaml"
SOURCES = ("emoji", "clipart")
SHOWN = 6
"""Held-out samples of each source in the report."""
SIZES = {
    "text": ("--vocabulary", "2048"),  # the captions are 40,000 tokens in all
    "image": ("--image-size", "48", "--steps", "1200"),  # 36 tokens an image: minutes of training see more images
}
"""What differs from the defaults so that the demo ends within minutes on two cores."""
MEGAMM = [sys.executable, "-m", "megamm"]
MAX_LOGITS_DIFFERENCE = 1e-4


class DemoError(Exception):
    """A promise that does not hold; shown as one line, exit code 1."""


@dataclass(frozen=True)
class Stage:
    """commands are run in turn, or `action` with the log file; outputs are removed before a stage is made anew."""

    name: str
    outputs: tuple[str, ...]
    commands: tuple[tuple[str, ...], ...] = ()
    action: Callable[[Path], dict[str, Any]] | None = None
    depends_on: str = ""
    """What else it was made of, as text: a change makes it anew."""


@dataclass
class Memory:
    """Largest resident memory of this process and all below it, sampled in a thread."""

    peak: int = 0
    stop: threading.Event = field(default_factory=threading.Event)

    def sample(self) -> None:
        me = psutil.Process()
        while not self.stop.wait(0.3):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.peak = max(self.peak, total)

    @classmethod
    @contextmanager
    def watch(cls) -> Iterator["Memory"]:
        memory = cls()
        thread = threading.Thread(target=memory.sample)
        thread.start()
        try:
            yield memory
        finally:
            memory.stop.set()
            thread.join()


class Demo:
    """The stages over one output folder."""

    def __init__(self, out: Path) -> None:
        self.out, self.config = out, yaml.safe_load(CONFIG.read_text())
        self.run_folder = self._moved(self.config["output"])

    def _moved(self, path: str) -> Path:
        """A path of the example config, under this demo's folder."""
        return self.out / Path(path).relative_to("out/demo")

    def stages(self) -> list[Stage]:
        raw, shards, codecs, export = (self.out / name for name in ("raw", "shards", "tokenizers", "export"))
        raws = [str(raw / s) for s in SOURCES]
        sources = [str(shards / s) for s in SOURCES]
        codec_options = [o for m in ("text", "image") for o in ("--codec", f"{m}={codecs / m}")]
        evaluation = (str(export), *sources, "--run", str(self.run_folder), "--json", str(self.out / "eval.json"))
        return [
            Stage("fetch", (), (("data", "fetch", *SOURCES, "--to", str(raw)),)),
            Stage("build", ("shards",), (("data", "build", *raws, "--to", str(shards)),)),
            Stage("tokenizer-text", ("tokenizers/text",), (self._tokenizer("text", sources),)),
            Stage("tokenizer-image", ("tokenizers/image",), (self._tokenizer("image", sources),)),
            Stage("tokenize", (), (("data", "tokenize", *sources, *codec_options),)),
            Stage("train", ("run",), action=self._train, depends_on=CONFIG.read_text() + str(self.overrides())),
            Stage("export", ("export",), (("convert", "export", str(self.run_folder), str(export)),)),
            Stage("eval", ("eval.json",), (("eval", *evaluation),)),
            Stage("generate", ("heldout", "generated", "captions"), action=self._generate),
        ]

    def _tokenizer(self, modality: str, sources: list[str]) -> tuple[str, ...]:
        return (
            "tokenizer",
            "train",
            modality,
            *sources,
            "--to",
            str(self.out / "tokenizers" / modality),
            *SIZES[modality],
        )

    def overrides(self) -> list[str]:
        """The example config's paths moved to this demo's folder; nothing else is overridden."""
        sources = [s | {"path": str(self._moved(s["path"]))} for s in self.config["data"]["sources"]]
        paths = {f"tokenizers.{m}": str(self._moved(path)) for m, path in self.config["tokenizers"].items()}
        values = {"output": str(self.run_folder), "data.sources": sources, **paths}
        return [f"{key}={json.dumps(value)}" for key, value in values.items()]

    def command(self, log: Path, *arguments: str) -> str:
        """Run `megamm ARGUMENTS`, shown and logged; returns its output. DemoError if it fails."""
        process = self._start(*arguments)
        output = self._follow(process, log)
        if process.wait() != 0:
            last = (output.strip().splitlines() or ["no output"])[-1]
            raise DemoError(
                f"`megamm {' '.join(arguments[:3])} ...` ended with {process.returncode}: {last} (see {log})"
            )
        return output

    def _start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*MEGAMM, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def _follow(self, process: subprocess.Popen[str], log: Path) -> str:
        assert process.stdout is not None
        lines = []
        with log.open("a", buffering=1) as file:  # by line: whole even if the demo is killed
            for line in process.stdout:
                if not line.startswith("[rank"):  # the traceback of a rank that lost its peer: in the log
                    print(f"    {line}", end="", flush=True)
                file.write(line)
                lines.append(line)
        return "".join(lines)

    def _train(self, log: Path) -> dict[str, Any]:
        """Train on two ranks; kill one with SIGKILL half-way; the same command must go on from a checkpoint."""
        train = self.config["train"]
        every = train["checkpoint_every"]
        wanted = max(every, train["steps"] // 2 // every * every)
        arguments = ("train", str(CONFIG), *self.overrides(), "--nproc", "2")
        process = self._start(*arguments)
        follower = threading.Thread(target=self._follow, args=(process, log))
        follower.start()
        killed_at = self._kill_a_rank_after(process, wanted)
        follower.join()
        if process.wait() == 0:
            raise DemoError("a rank was killed, and the launcher ended with 0")
        print(f"  the launcher ended with {process.returncode}, details in {log}; the same command again:", flush=True)
        output = self.command(log, *arguments)
        resumed = re.search(r"resumed \S+ at step (\d+)", output)
        if resumed is None or not 0 < int(resumed[1]) <= killed_at:
            raise DemoError(f"the second start did not resume (see {log})")
        return {"killed_at_step": killed_at, "resumed_from_step": int(resumed[1])}

    def _kill_a_rank_after(self, process: subprocess.Popen[str], step: int) -> int:
        """Wait for a step past the checkpoint of `step`, then SIGKILL the last rank; returns the step reached."""
        while process.poll() is None:
            reached = max((line["step"] for line in metrics.read_lines(self.run_folder)), default=0)
            if reached > step and checkpoint.path_of(self.run_folder, step).exists():
                victim = max(_ranks(process.pid), key=lambda p: int(p.environ()["RANK"]))
                print(f"  kill -9 {victim.pid}, one of two ranks, after step {reached}", flush=True)
                victim.kill()
                return reached
            time.sleep(0.2)
        raise DemoError(f"training ended with {process.returncode} before the checkpoint of step {step}")

    def _generate(self, log: Path) -> dict[str, Any]:
        """Images from held-out captions, and captions of held-out images."""
        folder = self.out / "heldout"
        folder.mkdir()
        samples = [sample for source in SOURCES for sample in _choose(self.out / "shards" / source / "heldout")]
        captions, files = [], []
        for i, (caption, data, extension) in enumerate(samples):
            files.append(folder / f"{i:03d}.{extension}")
            files[-1].write_bytes(data)
            captions.append(caption)
        export = str(self.out / "export")
        prompts = [option for caption in captions for option in ("--prompt", caption)]
        images = [option for file in files for option in ("--from", str(file))]
        # Images at temperature 1: sharper draws favour the most frequent token, which is white.
        self.command(log, "generate", export, *prompts, "--to", "image", "--out", str(self.out / "generated"))
        greedy = ("--temperature", "0", "--max-tokens", "24")
        self.command(log, "generate", export, *images, "--to", "text", "--out", str(self.out / "captions"), *greedy)
        return {"captions": captions, "images": [str(file.relative_to(self.out)) for file in files]}

    def summary(self, marks: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """The figures of the whole demo."""
        evaluation = json.loads((self.out / "eval.json").read_text())
        codec = json.loads((self.out / "tokenizers" / "image" / "training.json").read_text())["heldout"][-1]
        lines = [line for line in metrics.read_lines(self.run_folder) if "tokens_per_s" in line]
        seconds = {name: mark["seconds"] for name, mark in marks.items()}
        return {
            "pair_gain": evaluation["pair_gain"],
            "loss": {m: {"first": lines[0][f"loss/{m}"], "last": lines[-1][f"loss/{m}"]} for m in evaluation["loss"]},
            "heldout_loss": evaluation["loss"],
            "psnr": codec["psnr_db"],
            "codebook_use": codec["codes_used"],
            "logits_max_abs_diff": evaluation["logits_max_abs_diff"],
            "tokens_per_s": statistics.median(line["tokens_per_s"] for line in lines),
            "seconds": seconds | {"total": round(sum(seconds.values()), 1)},
            "peak_rss_gib": max(mark["peak_rss_gib"] for mark in marks.values()),
            "resumed_from_step": marks["train"]["details"]["resumed_from_step"],
            "killed_at_step": marks["train"]["details"]["killed_at_step"],
        }


def _ranks(launcher: int) -> list[psutil.Process]:
    """The processes below the launcher that are ranks of the job."""
    children = psutil.Process(launcher).children(recursive=True)
    return [process for process in children if "RANK" in process.environ()]


def _choose(split: Path) -> list[tuple[str, bytes, str]]:
    """SHOWN (caption, image bytes, extension) of different nouns, spread evenly over a held-out split."""
    texts, images = ShardFolder(split / "text"), ShardFolder(split / "image")
    number = {key: i for i, key in enumerate(images.keys)}
    by_noun: dict[str, tuple[str, int]] = {}
    for i, key in enumerate(texts.keys):
        caption = texts.read(i).decode()
        by_noun.setdefault(normalise_noun(caption), (caption, number[key]))
    found = list(by_noun.values())
    chosen = found[:: max(1, len(found) // SHOWN)][:SHOWN]
    return [(caption, images.read(i), images.extensions[i]) for caption, i in chosen]


def run_stages(demo: Demo, stages: list[Stage]) -> dict[str, dict[str, Any]]:
    """Run what is not complete; the mark of every stage (seconds, peak_rss_gib, details), written when it is done."""
    marks: dict[str, dict[str, Any]] = {}
    folder = demo.out / "stages"
    folder.mkdir(parents=True, exist_ok=True)
    is_changed = False
    for number, stage in enumerate(stages, start=1):
        title, mark, log = f"[{number}/{len(stages)}] {stage.name}", folder / f"{stage.name}.json", None
        identity = hashlib.sha256(repr((stage.commands, stage.depends_on)).encode()).hexdigest()
        if not is_changed and mark.exists() and json.loads(mark.read_text())["identity"] == identity:
            marks[stage.name] = json.loads(mark.read_text())
            print(f"{title}: complete, kept ({marks[stage.name]['seconds']:.0f} s when it was made)", flush=True)
            continue
        is_changed = True
        print(title, flush=True)
        for path in [mark, *(demo.out / name for name in stage.outputs)]:
            _remove(path)
        log = folder / f"{stage.name}.log"
        log.unlink(missing_ok=True)
        began = time.monotonic()
        with Memory.watch() as memory:
            details = stage.action(log) if stage.action else {}
            for arguments in stage.commands:
                demo.command(log, *arguments)
        done = {"seconds": round(time.monotonic() - began, 1), "peak_rss_gib": round(memory.peak / 2**30, 2)}
        marks[stage.name] = done | {"identity": identity, "details": details}
        _write(mark, marks[stage.name])
        print(f"  {stage.name}: {done['seconds']} s, at most {done['peak_rss_gib']} GiB", flush=True)
    return marks


def check(summary: dict[str, Any]) -> None:
    """DemoError names the first promise that does not hold."""
    for modality, loss in summary["loss"].items():
        if not loss["last"] < loss["first"]:
            raise DemoError(f"the {modality} loss did not fall: {loss}")
    for direction in ("text_to_image", "image_to_text"):
        gain = summary["pair_gain"][direction]["mean"]
        if not gain > 0:
            raise DemoError(f"pair gain {direction} is {gain:.4f}, not above 0")
    if not summary["logits_max_abs_diff"] <= MAX_LOGITS_DIFFERENCE:
        raise DemoError(f"transformers' logits differ from ours by {summary['logits_max_abs_diff']:.1e}")


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _write(path: Path, value: dict[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for everything that is made")
    parser.add_argument("--fresh", action="store_true", help="make every stage anew")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    try:
        if out.is_dir() and any(out.iterdir()) and not (out / "stages").is_dir():
            raise DemoError(f"{out} holds something else; choose another --out")
        demo = Demo(out)
        if arguments.fresh:
            for name in ("stages", "raw", *(path for stage in demo.stages() for path in stage.outputs)):
                _remove(out / name)
        summary = demo.summary(run_stages(demo, demo.stages()))
        _write(out / "summary.json", summary)
        report = subprocess.run([sys.executable, str(ROOT / "tools" / "demo_report.py"), str(out)], check=False)
        if report.returncode:
            raise DemoError("the report could not be made")
        check(summary)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    print(f"done in {summary['seconds']['total']:.0f} s: {out / 'report.html'}, {out / 'summary.json'}")


if __name__ == "__main__":
    main()
