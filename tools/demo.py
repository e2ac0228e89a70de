"""`make demo`: from nothing to a trained, exported, evaluated and sampled any-to-any model, on a CPU.

    python tools/demo.py --out out/demo [--fresh]

Text, images, audio, video and 3D, each as input and as output. Every stage runs the real command line and is timed.
A complete stage is kept if its command and all stages before it are unchanged; --fresh makes everything anew. In the
middle of training one rank is killed with SIGKILL, and the run must go on by itself. Out: report.html and
summary.json; the exit code is 0 only if what the demo promises holds (losses fell, parts of pairs tell of each
other, transformers gives the logits of our own model).
Units: losses and gains in nats per token, memory in GiB (summed over the process tree).
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from demo_samples import generation, write_heldout
from demo_stages import ROOT, DemoError, Stage, follow, remove, run_commands, run_stages, start, write

from megamm import checkpoint, metrics
from megamm.resilience import heartbeat

CONFIG = ROOT / "examples" / "cpu_tiny.yaml"
BUILD = ("--heldout", "0.2", "--max-seconds", "5")
"""A fifth of the nouns is held out: more than forty of the two hundred in 3D. Clips of sound fit into a row."""
CODECS = {
    "visual": ("--image-size", "48", "--steps", "750"),
    "audio": ("--steps", "1500"),
    "points": ("--steps", "500", "--cells", "8", "--levels", "8,8,8"),
    "text": ("--vocabulary", "2048"),
}
"""What differs from the defaults so that the demo ends within minutes on two cores. The longest first."""
RENDERED = ("sweethome", "blendswap")
"""Sources whose pictures and videos are made here."""
EVALUATED = "150"
"""Held-out samples of each source at most."""
MAX_LOGITS_DIFFERENCE = 1e-4
PROMISED = (("text", "image"), ("text", "audio"), ("text", "points"), ("image", "points"))
GAINS = tuple(f"{x}_to_{y}" for a, b in PROMISED for x, y in ((a, b), (b, a)))
"""Directions whose pair gain must be above zero. Of video it is shown with its standard error but not promised: there
are few videos, and after minutes of training their gain is not surely above zero."""


class Demo:
    """The stages over one output folder."""

    def __init__(self, out: Path) -> None:
        self.out, self.config = out, yaml.safe_load(CONFIG.read_text())
        self.run_folder = self._moved(self.config["output"])
        self.names = [Path(source["path"]).name for source in self.config["data"]["sources"]]
        self.shards = [out / "shards" / name for name in self.names]

    def _moved(self, path: str) -> Path:
        """A path of the example config, under this demo's folder."""
        return self.out / Path(path).relative_to("out/demo")

    def stages(self) -> list[Stage]:
        out, codecs, export = self.out, self.out / "tokenizers", str(self.out / "export")
        raws, sources = [str(out / "raw" / name) for name in self.names], [str(shard) for shard in self.shards]
        # Two at once: rendering the models takes two thirds of the time, and waits for its downloads.
        parts = [[name for name in self.names if (name in RENDERED) == rendered] for rendered in (True, False)]
        fetch = tuple(("data", "fetch", *part, "--to", str(out / "raw")) for part in parts)
        build = ("data", "build", *raws, "--to", str(out / "shards"), *BUILD)
        train = tuple(
            ("tokenizer", "train", name, *sources, "--to", str(codecs / name), *options)
            for name, options in CODECS.items()
        )
        options = [option for name in CODECS for option in ("--codec", f"{name}={codecs / name}")]
        figures = str(out / "eval.json")
        evaluate = ("eval", export, *sources, "--run", str(self.run_folder), "--json", figures, "--limit", EVALUATED)
        return [
            Stage("fetch", (), fetch, at_once=True),
            Stage("build", ("shards",), (build,)),
            Stage("tokenizers", ("tokenizers",), train, at_once=True),
            Stage("tokenize", (), (("data", "tokenize", *sources, *options),)),
            Stage("train", ("run",), action=self._train, depends_on=CONFIG.read_text() + str(self.overrides())),
            Stage("export", ("export",), (("convert", "export", str(self.run_folder), export),)),
            Stage("eval", ("eval.json",), (evaluate, ("convert", "card", export, figures))),
            Stage("generate", ("heldout", "generated"), action=self._generate),
        ]

    def overrides(self) -> list[str]:
        """The example config's paths moved to this demo's folder; nothing else is overridden."""
        sources = [s | {"path": str(self._moved(s["path"]))} for s in self.config["data"]["sources"]]
        paths = {f"tokenizers.{m}": str(self._moved(path)) for m, path in self.config["tokenizers"].items()}
        values = {"output": str(self.run_folder), "data.sources": sources, **paths}
        return [f"{key}={json.dumps(value)}" for key, value in values.items()]

    def _train(self, log: Path) -> dict[str, Any]:
        """Train on two ranks; kill one with SIGKILL half-way; the run must go on by itself from a checkpoint."""
        every = self.config["checkpoint"]["every"]
        wanted = max(every, self.config["train"]["steps"] // 2 // every * every)
        process = start("train", str(CONFIG), *self.overrides(), "--nproc", "2")
        with ThreadPoolExecutor(1) as follower:
            output = follower.submit(follow, process, log)
            killed_at = self._kill_a_rank_after(process, wanted)
        if process.wait() != 0:
            raise DemoError(f"training ended with {process.returncode} after a rank was killed (see {log})")
        resumed = re.search(r"resumed \S+ at step (\d+)", output.result())
        if resumed is None or not 0 < int(resumed[1]) <= killed_at:
            raise DemoError(f"the run did not resume after a rank was killed (see {log})")
        return {"killed_at_step": killed_at, "resumed_from_step": int(resumed[1])}

    def _kill_a_rank_after(self, process: subprocess.Popen[str], step: int) -> int:
        """Wait for a step past the checkpoint of `step`, then SIGKILL the last rank; returns the step reached."""
        while process.poll() is None:
            reached = max((line["step"] for line in metrics.read_lines(self.run_folder)), default=0)
            if reached > step and checkpoint.path_of(self.run_folder, step).exists():
                victim = max(heartbeat.read(self.run_folder), key=lambda beat: beat.rank)
                print(f"  kill -9 {victim.pid}, one of two ranks, after step {reached}", flush=True)
                os.kill(victim.pid, signal.SIGKILL)
                return reached
            time.sleep(0.2)
        raise DemoError(f"training ended with {process.returncode} before the checkpoint of step {step}")

    def _generate(self, log: Path) -> dict[str, Any]:
        """Every modality from every other that it comes in pairs with, on held-out samples."""
        shown = write_heldout(self.shards, self.out)
        commands = generation(self.out / "export", self.out, shown)
        run_commands(Stage("generate", (), commands, at_once=True), log)
        return shown

    def summary(self, marks: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """The figures of the whole demo."""
        evaluation = json.loads((self.out / "eval.json").read_text())
        lines = [line for line in metrics.read_lines(self.run_folder) if "tokens_per_s" in line]
        seconds = {name: mark["seconds"] for name, mark in marks.items()}
        return {
            "pair_gain": evaluation["pair_gain"],
            "loss": {name: _first_and_last(lines, f"loss/{name}") for name in evaluation["loss"]},
            "heldout_loss": evaluation["loss"],
            "codecs": dict(self._codecs()),
            "logits_max_abs_diff": evaluation["logits_max_abs_diff"],
            "tokens_per_s": statistics.median(line["tokens_per_s"] for line in lines),
            "padding_share": statistics.mean(line["padding_share"] for line in lines),
            "seconds": seconds | {"total": round(sum(seconds.values()), 1)},
            "peak_rss_gib": max(mark["peak_rss_gib"] for mark in marks.values()),
            "resumed_from_step": marks["train"]["details"]["resumed_from_step"],
            "killed_at_step": marks["train"]["details"]["killed_at_step"],
        }

    def _codecs(self) -> Iterator[tuple[str, dict[str, float]]]:
        """The last held-out report of every trained codec."""
        for name in CODECS:
            record = json.loads((self.out / "tokenizers" / name / "training.json").read_text())
            yield name, record["heldout"][-1] if "heldout" in record else record


def _first_and_last(lines: list[dict[str, Any]], key: str) -> dict[str, float]:
    """Means over the first and the last five reports that have the key: a step holds few tokens of some modality."""
    values = [line[key] for line in lines if line.get(key) is not None]
    return {"first": statistics.mean(values[:5]), "last": statistics.mean(values[-5:])}


def check(summary: dict[str, Any]) -> None:
    """DemoError names the first promise that does not hold."""
    for modality, loss in summary["loss"].items():
        if not loss["last"] < loss["first"]:
            raise DemoError(f"the {modality} loss did not fall: {loss}")
    for direction in GAINS:
        gain = summary["pair_gain"][direction]["mean"]
        if not gain > 0:
            raise DemoError(f"pair gain {direction} is {gain:.4f}, not above 0")
    if not summary["logits_max_abs_diff"] <= MAX_LOGITS_DIFFERENCE:
        raise DemoError(f"transformers' logits differ from ours by {summary['logits_max_abs_diff']:.1e}")


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
                remove(out / name)
        summary = demo.summary(run_stages(out, demo.stages()))
        write(out / "summary.json", summary)
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
