"""Compare parallel layouts with one rank: the same weights, the same batch, float32, real gloo processes.

    python tools/parity.py --fuzz 200 --seed 1 --max-ranks 8    random compositions
    python tools/parity.py --case 'world=4 parallel.tensor=2 mix=rank_without_images'
    python tools/parity.py --table docs/parallelism.md          the matrix of layouts and features
    python tools/parity.py --table /tmp/table.md --set train.attention=varlen    the matrix with this setting

The first composition that differs is reduced to the smallest one that still differs, explained, and printed as a --case
line that reproduces it. Exit code 0: all proven or refused; 1: one differs, crashes or hangs; 2: a wrong argument.
"""

import argparse
import sys
from pathlib import Path

from megamm.common.errors import UserError
from megamm.parity import campaign
from megamm.parity.case import Case


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--fuzz", type=int, metavar="N", help="test N random compositions")
    what.add_argument("--case", help="test one: world=2 mix=mixed seed=1, then config keys like parallel.tensor=2")
    what.add_argument("--table", type=Path, metavar="FILE", help="test the matrix and write its table")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="set this config key in each case"
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the random compositions")
    parser.add_argument("--max-ranks", type=int, default=8, help="most ranks of a random composition")
    parser.add_argument("--jobs", type=int, default=1, help="number of cases that run at once")
    arguments = parser.parse_args()
    try:
        fixed = Case.parse(" ".join(arguments.set)).settings
        if arguments.case:
            return campaign.one(Case.parse(arguments.case).with_settings(fixed))
        if arguments.table:
            return campaign.table(arguments.table, arguments.jobs, fixed)
        return campaign.fuzz(arguments.fuzz, arguments.seed, arguments.max_ranks, arguments.jobs, fixed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
