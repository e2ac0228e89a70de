"""`make demo`: trains, exports, evaluates and samples an any-to-any model from scratch, on a CPU.

    python tools/demo.py --out out/demo [--seed N] [--set train.steps=100 ...] [--fresh]

Text, images, audio, video and 3D, each as input and as output. Every stage runs the real command line and is timed.
A complete stage is kept if its command and all stages before it are unchanged; --fresh repeats every stage. In the
middle of training one rank is killed with SIGKILL, and the run must continue automatically. Out: report.html and
summary.json with the figures of tools/demo_figures.py; the exit code is 0 only if the demo's promises hold (losses
fell, the pair gains of PROMISED are significant, transformers gives the logits of our own model).
TARGETS are reported as reached or not. --seed changes the order of the data, the initial weights and the sampling.
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
from demo_figures import figures
from demo_samples import PAIRS, REQUESTS, write_heldout, write_requests
from demo_stages import ROOT, DemoError, Stage, follow, remove, run_commands, run_stages, start, write

from megamm import checkpoint
from megamm.config import load_config
from megamm.data.build.heldout import words
from megamm.elastic import heartbeat
from megamm.evaluation.losses import heldout_rules
from megamm.observability import metrics
from megamm.shards.folder import ShardFolder

CONFIG = ROOT / "examples" / "cpu_tiny.yaml"
BUILD = ("--heldout", "0.04", "--heldout-combinations", "0.2")
"""Few subjects are held out, and more of the other captions, whose every word occurs in training."""
CODECS = {
    "visual": ("--image-size", "24", "--downsample", "4", "--levels", "6,6,6", "--steps", "500", "--batch-size", "24"),
    "audio": ("--steps", "300", "--codebooks", "1", "--levels", "8,8,8"),
    "points": (
        *("--steps", "500", "--points", "1024", "--patches", "16", "--cells", "5", "--levels", "6,6,6"),
        *("--encoder-depth", "0", "--colour-weight", "4"),
    ),
    "text": ("--vocabulary", "600"),
}
"""Options that differ from the defaults so that the demo ends within minutes on two cores. The longest first."""
RENDERED = ("things",)
"""Sources whose pictures and videos are made here."""
EVALUATED = "150"
"""Maximum held-out samples of each source."""
MAX_LOGITS_DIFFERENCE = 1e-4
GAINS = tuple(f"{x}_to_{y}" for a, b in PAIRS for x, y in ((a, b), (b, a)))
"""Directions whose target is a pair gain above twice its standard error on new combinations."""
TARGETS = (
    ("image_to_text", ("exact",), 0.40),
    ("image_to_text", ("attributes",), 0.85),
    ("text_to_image", ("retrieval", "r5"), 0.50),
    ("audio_to_text", ("exact",), 0.50),
    ("points_to_text", ("exact",), 0.40),
)
"""(direction, figure, minimum share) on new combinations; applies to each attribute. Reported as reached or not."""
PROMISED = tuple(f"{x}_to_{y}" for a, b in (("text", "image"), ("text", "audio")) for x, y in ((a, b), (b, a)))
"""Directions whose pair gain on new combinations must be significant, or the demo fails."""


class Demo:
    """The stages over one output folder."""

    def __init__(self, out: Path, seed: int = 1, changes: tuple[str, ...] = ()) -> None:
        self.out, self.seed, self.changes = out, seed, changes
        self.config = yaml.safe_load(CONFIG.read_text())
        resolved = load_config(CONFIG, list(changes))
        self.steps, self.saved_every = resolved.train.steps, resolved.checkpoint.every
        self.run_folder = self._moved(self.config["output"])
        self.names = [Path(source["path"]).name for source in self.config["data"]["sources"]]
        self.shards = [out / "shards" / name for name in self.names]

    def _moved(self, path: str) -> Path:
        """Return a path of the example config, under this demo's folder."""
        return self.out / Path(path).relative_to("out/demo")

    def stages(self) -> list[Stage]:
        out, codecs, export = self.out, self.out / "tokenizers", str(self.out / "export")
        raws, sources = [str(out / "raw" / name) for name in self.names], [str(shard) for shard in self.shards]
        # Two at once: rendering takes as long as everything else.
        parts = [[name for name in self.names if (name in RENDERED) == rendered] for rendered in (True, False)]
        fetch = tuple(("data", "fetch", *part, "--to", str(out / "raw")) for part in parts)
        build = ("data", "build", *raws, "--to", str(out / "shards"), *BUILD)
        train = tuple(
            ("tokenizer", "train", name, *sources, "--to", str(codecs / name), *options)
            for name, options in CODECS.items()
        )
        options = [option for name in CODECS for option in ("--codec", f"{name}={codecs / name}")]
        evaluation = str(out / "eval.json")
        evaluate = ("eval", export, *sources, "--run", str(self.run_folder), "--json", evaluation, "--limit", EVALUATED)
        made = ("heldout", "generated", *(f"requests-{name}.jsonl" for name in REQUESTS))
        return [
            Stage("fetch", (), fetch, at_once=True),
            Stage("build", ("shards",), (build,)),
            Stage("tokenizers", ("tokenizers",), train, at_once=True),
            Stage("tokenize", (), (("data", "tokenize", *sources, *options),)),
            Stage("train", ("run",), action=self._train, depends_on=CONFIG.read_text() + str(self.overrides())),
            Stage("export", ("export",), (("convert", "export", str(self.run_folder), export),)),
            Stage("eval", ("eval.json",), (evaluate, ("convert", "card", export, evaluation))),
            Stage("generate", made, action=self._generate, depends_on=str(self.seed)),
            Stage("figures", (), action=self._figures),
        ]

    def overrides(self) -> list[str]:
        """Return the example config's paths moved to this demo's folder, the seed, and the changes of --set."""
        sources = [s | {"path": str(self._moved(s["path"]))} for s in self.config["data"]["sources"]]
        paths = {f"tokenizers.{m}": str(self._moved(path)) for m, path in self.config["tokenizers"].items()}
        values = {"output": str(self.run_folder), "data.sources": sources, **paths, "train.seed": self.seed}
        return [*(f"{key}={json.dumps(value)}" for key, value in values.items()), *self.changes]

    def _train(self, log: Path) -> dict[str, Any]:
        """Train on two ranks; kill one with SIGKILL half-way; the run must continue automatically from a checkpoint."""
        wanted = max(self.saved_every, self.steps // 2 // self.saved_every * self.saved_every)
        process = start("train", str(CONFIG), *self.overrides(), "--nproc", "2")
        with ThreadPoolExecutor(1) as follower:
            output = follower.submit(follow, process, log)
            killed_at = self._kill_a_rank_after(process, wanted)
        if process.wait() != 0:
            raise DemoError(f"training exited with code {process.returncode} after a rank was killed (see {log})")
        resumed = re.search(r"resumed \S+ at step (\d+)", output.result())
        if resumed is None or not 0 < int(resumed[1]) <= killed_at:
            raise DemoError(f"the run did not resume after a rank was killed (see {log})")
        return {"killed_at_step": killed_at, "resumed_from_step": int(resumed[1])}

    def _kill_a_rank_after(self, process: subprocess.Popen[str], step: int) -> int:
        """Wait for a step past the checkpoint of `step`, then SIGKILL the last rank; return the step reached."""
        while process.poll() is None:
            reached = max((line["step"] for line in metrics.read_lines(self.run_folder)), default=0)
            if reached > step and checkpoint.path_of(self.run_folder, step).exists():
                victim = max(heartbeat.read(self.run_folder), key=lambda beat: beat.rank)
                print(f"  kill -9 {victim.pid}, one of two ranks, after step {reached}", flush=True)
                os.kill(victim.pid, signal.SIGKILL)
                return reached
            time.sleep(0.2)
        raise DemoError(f"training exited with code {process.returncode} before the checkpoint of step {step}")

    def _generate(self, log: Path) -> dict[str, Any]:
        """Generate every modality from every other in a pair with it, on held-out samples of both rules."""
        named = write_heldout(self.shards, self.out)
        check_words(self.shards)
        commands = write_requests(self.out / "export", self.out, named, 1000 * self.seed)
        run_commands(Stage("generate", (), commands, at_once=True), log)
        return named

    def _figures(self, log: Path) -> dict[str, Any]:
        """Return the shares of correct samples."""
        named = json.loads((self.out / "stages" / "generate.json").read_text())["details"]
        return figures(self.out, self.shards, named)

    def summary(self, marks: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Return the figures of the whole demo."""
        evaluation = json.loads((self.out / "eval.json").read_text())
        lines = [line for line in metrics.read_lines(self.run_folder) if "tokens_per_s" in line]
        seconds = {name: mark["seconds"] for name, mark in marks.items()}
        found = marks["figures"]["details"]
        return {
            "seed": self.seed,
            "pair_gain": evaluation["pair_gain"],
            "pair_gain_by_rule": evaluation["pair_gain_by_rule"],
            "figures": found,
            "targets": list(targets(found["combination"], evaluation["pair_gain_by_rule"]["combination"])),
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
        """Return the last held-out report of every trained codec."""
        for name in CODECS:
            record = json.loads((self.out / "tokenizers" / name / "training.json").read_text())
            yield name, record["heldout"][-1] if "heldout" in record else record


def _first_and_last(lines: list[dict[str, Any]], key: str) -> dict[str, float]:
    """Return means over the first and last five reports with the key, as a step may have few tokens of a modality."""
    values = [line[key] for line in lines if line.get(key) is not None]
    return {"first": statistics.mean(values[:5]), "last": statistics.mean(values[-5:])}


def reached(found: dict[str, Any], direction: str, figure: tuple[str, ...]) -> dict[str, Any]:
    """Return the figure with its interval; for attributes, the one with the lowest share."""
    value = found[direction]
    for name in figure:
        value = value[name]
    if figure == ("attributes",):
        worst = min(value, key=lambda name: value[name]["share"])
        return value[worst] | {"attribute": worst}
    return value


def targets(found: dict[str, Any], gains: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Return every target with the result."""
    for direction, figure, least in TARGETS:
        value = reached(found, direction, figure)
        name = f"{direction}: {' '.join(figure)}"
        yield {"target": name, "least": least, "value": value, "reached": value["share"] >= least}
    for direction in GAINS:
        gain = gains[direction]
        yield {
            "target": f"{direction}: pair gain above twice its standard error",
            "value": gain,
            "reached": _is_sure(gain),
        }


def _line(target: dict[str, Any]) -> str:
    """Return one target as text."""
    value = target["value"]
    if "mean" in value:
        return f"{target['target']}: {value['mean']:+.3f} ({value['standard_error']:.3f})"
    attribute = f" ({value['attribute']})" if "attribute" in value else ""
    low, high = value["interval"]
    counts = f"{value['right']} of {value['n']}, 95 % interval {low:.0%} to {high:.0%}"
    return f"{target['target']}{attribute} at least {target['least']:.0%}: {value['share']:.0%} ({counts})"


def _is_sure(gain: dict[str, Any]) -> bool:
    return gain["standard_error"] is not None and gain["mean"] > 2 * gain["standard_error"]


def check_words(shards: list[Path]) -> None:
    """Raise DemoError if a text held out as a combination has a word that is in no training text of its source."""
    for shard in shards:
        train, heldout = (ShardFolder(shard / split / "text") for split in ("train", "heldout"))
        seen = {word for i in range(len(train)) for word in words(train.read(i).decode())}
        rules = heldout_rules(shard)
        for i, key in enumerate(heldout.keys):
            unseen = words(heldout.read(i).decode()) - seen
            if rules[key] == "combination" and unseen:
                raise DemoError(f"{key} of {shard.name} is held out as a combination, but {min(unseen)!r} is unseen")


def check(summary: dict[str, Any]) -> None:
    """Raise DemoError with the first promise that does not hold."""
    for modality, loss in summary["loss"].items():
        if not loss["last"] < loss["first"]:
            raise DemoError(f"the {modality} loss did not fall: {loss}")
    for direction in PROMISED:
        gain = summary["pair_gain_by_rule"]["combination"][direction]
        if not _is_sure(gain):
            error = gain["standard_error"]
            raise DemoError(f"pair gain {direction} is {gain['mean']:.4f}, not above twice its standard error {error}")
    if not summary["logits_max_abs_diff"] <= MAX_LOGITS_DIFFERENCE:
        raise DemoError(f"transformers' logits differ from ours by {summary['logits_max_abs_diff']:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="output folder")
    parser.add_argument("--seed", type=int, default=1, help="seed of data order, initial weights and sampling")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of the run config")
    parser.add_argument("--fresh", action="store_true", help="repeat every stage")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    try:
        if out.is_dir() and any(out.iterdir()) and not (out / "stages").is_dir():
            raise DemoError(f"{out} is not a demo output folder; choose another --out")
        demo = Demo(out, arguments.seed, tuple(arguments.set))
        if arguments.fresh:
            for name in ("stages", "raw", *(path for stage in demo.stages() for path in stage.outputs)):
                remove(out / name)
        summary = demo.summary(run_stages(out, demo.stages()))
        write(out / "summary.json", summary)
        report = subprocess.run([sys.executable, str(ROOT / "tools" / "demo_report.py"), str(out)], check=False)
        if report.returncode:
            raise DemoError("writing the report failed")
        for target in summary["targets"]:
            print(f"  {'reached' if target['reached'] else 'NOT reached'}: {_line(target)}")
        check(summary)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    print(f"done in {summary['seconds']['total']:.0f} s: {out / 'report.html'}, {out / 'summary.json'}")


if __name__ == "__main__":
    main()
