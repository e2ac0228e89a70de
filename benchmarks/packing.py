"""Padding and balance of packed rows, computed from lengths alone, for the mixes of documents in MIXES.

Padding: the share of a window's tokens that are padding, as `packing.plan_rows` plans its rows, by first fit, by next
fit, and a lower bound for any packing. Balance: the cost of the slowest data rank over the mean, in an 8B model, with
rows dealt by `balance.assign` and in turn, for a step and for its slots (1 = even).
Run: `python benchmarks/packing.py [--json OUT]`.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megamm import __version__
from megamm.common.sample import IntArray
from megamm.config import ModelConfig
from megamm.data.pipeline.balance import assign, imbalance
from megamm.data.pipeline.mixture import BLOCK
from megamm.data.pipeline.packing import plan_rows
from megamm.model.flops import flops_of_row

Draw = Callable[[np.random.Generator, int], IntArray]


def _texts(mean: float, sigma: float) -> Draw:
    """Return log-normal lengths: similar to web crawls, with a few very long documents."""
    return lambda g, n: np.maximum(4, g.lognormal(np.log(mean) - sigma**2 / 2, sigma, n)).astype(np.int64)


def _between(low: int, high: int, more: int = 0) -> Draw:
    return lambda g, n: g.integers(low, high, n) + more


def _pages(g: np.random.Generator, n: int) -> IntArray:
    """Return interleaved pages: text and a few images of 256 tokens, as in OBELICS and MMC4."""
    return _texts(800, 1.0)(g, n) + 258 * np.maximum(1, g.poisson(3, n))


STARTER: list[tuple[float, Draw, bool]] = [
    (5, _between(2, 14, 40), False),  # caption and an image of 36 tokens
    (2, _between(62, 214, 4), False),  # prompt and its speech
    (1, _between(2, 14, 132), False),  # name and a point cloud of 128 tokens
    (1, _between(182, 183, 2), False),  # video
    (1, _texts(400, 1.0), True),
]
MIXES: dict[str, list[tuple[float, Draw, bool]]] = {
    "starter": STARTER,
    "web text (log-normal, mean 1000)": [(1, _texts(1000, 1.2), True)],
    "LLaVA, 576 image tokens": [(1, _between(50, 300, 580), False)],
    "LLaVA, 256 image tokens": [(1, _between(50, 300, 260), False)],
    "interleaved pages": [(1, _pages, True)],
    "web + LLaVA + pages + speech": [
        (3, _texts(1000, 1.2), True),
        (4, _between(50, 300, 580), False),
        (2, _pages, True),
        (1, _between(100, 1500), False),
    ],
}
"""Share of the documents, their lengths in tokens, and whether they are cut when a row is full."""
MODEL_8B = ModelConfig(
    num_layers=36, hidden_size=4096, ffn_hidden_size=12288, num_attention_heads=32, num_query_groups=8, head_dim=128
)
LAYOUTS = ((8, 4, 1), (4, 4, 2), (16, 1, 1))
"""Data ranks, microbatches, rows per microbatch."""


def draw(mix: list[tuple[float, Draw, bool]], row_length: int, generator: np.random.Generator) -> IntArray:
    """Return the lengths of a shuffle block's documents in order; splittable ones are cut to rows."""
    shares = np.array([share for share, _, _ in mix])
    which = generator.choice(len(mix), BLOCK, p=shares / shares.sum())
    lengths: list[int] = []
    for length, kind in zip(np.choose(which, [d(generator, BLOCK) for _, d, _ in mix]).tolist(), which, strict=True):
        while mix[kind][2] and length > row_length:
            lengths.append(row_length)
            length -= row_length - 2  # the rest is a new document with its marks
        lengths.append(min(length, row_length))
    return np.array(lengths, dtype=np.int64)


def next_fit(lengths: IntArray, row_length: int) -> int:
    """Return the rows if documents are put into rows in order, a new one if the next does not fit."""
    rows, space = 0, 0
    for length in lengths.tolist():
        if length > space:
            rows, space = rows + 1, row_length
        space -= length
    return rows


def first_fit(lengths: IntArray, row_length: int) -> int:
    """Return the rows if each document in order is put into the first row that has space."""
    spaces = np.full(len(lengths), row_length)
    for length in lengths.tolist():
        spaces[int(np.argmax(spaces >= length))] -= length
    return int((spaces < row_length).sum())


def least_rows(lengths: IntArray, row_length: int) -> int:
    """Return a lower bound: the best of dual feasible functions u_k (Fekete & Schepers 2001), k = 1 .. 9."""
    best = -(-int(lengths.sum()) // row_length)
    for k in range(1, 10):
        scaled = (k + 1) * lengths
        exact = scaled % row_length == 0
        weight = np.where(exact, k * lengths / row_length, scaled // row_length) / k
        best = max(best, int(np.ceil(weight.sum() - 1e-9)))
    return best


def padding_table() -> list[dict[str, Any]]:
    """Print the padding of one window, ours and simple methods."""
    table = []
    print(f"{'mix':<34} {'row':>5} {'ours':>7} {'first fit':>9} {'next fit':>9} {'at least':>9} {'rows/s':>9}")
    for name, mix in MIXES.items():
        for row_length in (2048, 4096, 8192):
            lengths = draw(mix, row_length, np.random.default_rng(0))
            start = time.perf_counter()
            ours = len(plan_rows(lengths, row_length))
            seconds = time.perf_counter() - start
            rows = {
                "ours": ours,
                "first_fit": first_fit(lengths, row_length),
                "next_fit": next_fit(lengths, row_length),
            }
            rows["at_least"] = least_rows(lengths, row_length)
            padding = {way: 1 - lengths.sum() / (n * row_length) for way, n in rows.items()}
            table.append({"mix": name, "row_length": row_length, "planned_rows_per_s": ours / seconds} | padding)
            shares = f"{padding['ours']:>7.2%} {padding['first_fit']:>9.2%} {padding['next_fit']:>9.2%}"
            print(f"{name:<34} {row_length:>5} {shares} {padding['at_least']:>9.2%} {ours / seconds:>9,.0f}")
    return table


def balance_table() -> list[dict[str, Any]]:
    """Print the cost of the slowest data rank over the mean in an 8B model: means over the steps of four windows."""
    table = []
    print(f"{'mix':<34} {'row':>5} {'ranks x microbatches x rows':>28} {'ours':>14} {'in turn':>14}  (step, slots)")
    for name, mix in MIXES.items():
        for row_length in (2048, 8192):
            generator, costs = np.random.default_rng(0), []
            for _ in range(4):
                lengths = draw(mix, row_length, generator)
                rows = plan_rows(lengths, row_length)
                costs += [flops_of_row(MODEL_8B, 150_000, row_length, lengths[row].tolist()) for row in rows]
            for ranks, microbatches, rows_each in LAYOUTS:
                size = ranks * microbatches * rows_each
                steps = [costs[i : i + size] for i in range(0, len(costs) - size + 1, size)]
                ours = [imbalance(step, assign(step, ranks, rows_each)) for step in steps]
                in_order = np.arange(size).reshape(microbatches, ranks, rows_each)
                in_turn = [imbalance(step, in_order) for step in steps]
                found = {"ours": np.mean(ours, axis=0).tolist(), "in_turn": np.mean(in_turn, axis=0).tolist()}
                layout = f"{ranks} x {microbatches} x {rows_each}"
                table.append({"mix": name, "row_length": row_length, "layout": layout} | found)
                shown = "  ".join(f"{a:6.3f} {b:6.3f}" for a, b in found.values())
                print(f"{name:<34} {row_length:>5} {layout:>28}  {shown}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "torch": torch.__version__}
    result |= {"megamm": __version__, "load_before": os.getloadavg()[0]}
    torch.set_num_threads(1)
    result |= {"padding": padding_table(), "balance": balance_table()}
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
