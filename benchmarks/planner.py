"""Predicted against published step times: every row of tests/data/published_speeds.csv, and mean errors.

Each row is predicted with constants fitted to the dense rows of other models (tests/lib/published_speeds.py).
Run: `python benchmarks/planner.py [--json OUT]`; `--table` prints the table of docs/planning.md.
"""

import argparse
import json
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests" / "lib"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--table", action="store_true", help="print the mean errors as a table of Markdown")
    arguments = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    import published_speeds as published

    rows = published.rows()
    errors, constants = published.leave_one_out(rows), published.fitted(rows)
    groups = {
        "dense, by which the planner is judged": [r for r in rows if r.role == "target" and not r.has_experts],
        "further dense": [r for r in rows if r.role == "further" and not r.has_experts],
        "dense on B200, nothing fitted": [r for r in rows if r.role == "transfer"],
        "experts, by which it is judged": [r for r in rows if r.role == "target" and r.has_experts],
        "further with experts": [r for r in rows if r.role == "further" and r.has_experts],
        "later with experts, not used in the design": [r for r in rows if r.role == "later"],
    }
    if arguments.table:
        print("| rows | number | mean error | largest |\n| --- | --- | --- | --- |")
        for name, group in groups.items():
            largest = max((errors[row.name] for row in group), key=abs)
            print(f"| {name} | {len(group)} | {published.mean_error(errors, group):.1%} | {largest:+.1%} |")
        return
    for name, group in groups.items():
        print(f"{name}: mean error {published.mean_error(errors, group):.1%} of {len(group)} rows")
        for row in group:
            predicted = row.seconds * (1 + errors[row.name])
            print(
                f"  {row.name:28} published {row.seconds:8.2f} s, predicted {predicted:8.2f} s {errors[row.name]:+7.1%}"
            )
    print(f"{len(constants)} fitted constants:", *(f"{g} {c} {v:.3f}" for (g, c), v in constants.items()), sep="\n  ")
    if arguments.json:
        found = [{"name": r.name, "published_s": r.seconds, "error": errors[r.name]} for r in rows]
        arguments.json.write_text(json.dumps({"rows": found, "constants": len(constants)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
