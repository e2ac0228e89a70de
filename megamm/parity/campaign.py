"""Runs many cases, for tools/parity.py: prints progress and totals, returns an exit code."""

import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from megamm.parity import fuzz as random_cases
from megamm.parity import matrix
from megamm.parity.case import Case, CaseOutcome
from megamm.parity.harness import Harness

_GOOD = ("proven", "refused")


def one(case: Case) -> int:
    """Prove one case and print the full outcome."""
    with Harness() as harness:
        outcome = harness.prove(case)
    print(outcome.text())
    return int(outcome.verdict not in _GOOD)


Settings = Sequence[tuple[str, Any]]


def fuzz(number: int, seed: int, max_ranks: int, jobs: int, fixed: Settings = ()) -> int:
    """Prove random compositions, with the fixed settings, until one fails; minimise and explain the failing one."""
    begin = time.monotonic()
    verdicts, reasons = Counter[str](), Counter[str]()
    cases = [random_cases.draw(seed, i, max_ranks).with_settings(fixed) for i in range(number)]
    for outcome in prove_all(cases, jobs):
        verdicts[outcome.verdict] += 1
        if outcome.verdict == "refused":
            reasons[re.sub(r"\d+", "#", outcome.findings[0])] += 1
        else:
            print(outcome.text(), flush=True)
        if outcome.verdict not in _GOOD:
            print(_smallest(outcome), flush=True)
            break
    failed = sum(count for verdict, count in verdicts.items() if verdict not in _GOOD)
    print(f"seed {seed}: {verdicts['proven']} proven, {verdicts['refused']} refused, {failed} mismatches", end="")
    print(f", {time.monotonic() - begin:.0f} s")
    for reason, count in reasons.most_common():
        print(f"  refused {count:3}  {reason}")
    return int(failed > 0)


def table(file: Path, jobs: int, fixed: Settings = ()) -> int:
    """Prove the matrix, with the fixed settings, and write its table."""
    cases = list(dict.fromkeys(matrix.everything().values()))
    outcomes = {}
    for case, outcome in zip(cases, prove_all([case.with_settings(fixed) for case in cases], jobs), strict=True):
        print(outcome.text(), flush=True)
        outcomes[case] = outcome
    file.write_text(matrix.table(lambda case: outcomes[case]))
    verdicts = Counter(outcome.verdict for outcome in outcomes.values())
    print(f"{file}: " + ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items()))
    return int(any(verdict not in _GOOD for verdict in verdicts))


def prove_all(cases: Sequence[Case], jobs: int) -> Iterator[CaseOutcome]:
    """Yield the outcomes in the order of the cases; `jobs` cases run in parallel."""
    with ExitStack() as stack, ThreadPoolExecutor(jobs) as pool:
        # A harness runs one case at a time: each thread takes a free one.
        free: SimpleQueue[Harness] = SimpleQueue()
        for _ in range(jobs):
            free.put(stack.enter_context(Harness()))

        def prove(case: Case) -> CaseOutcome:
            harness = free.get()
            try:
                return harness.prove(case, explain=False)
            finally:
                free.put(harness)

        futures = [pool.submit(prove, case) for case in cases]
        try:
            for future in futures:
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _smallest(failed: CaseOutcome) -> str:
    """Return how to reproduce a failing case, minimised (it must still fail in the same way) and explained."""
    with Harness() as harness:

        def fails(candidate: Case) -> CaseOutcome | None:
            outcome = harness.prove(candidate, explain=False)
            return outcome if outcome.verdict == failed.verdict else None

        found = random_cases.minimise(Case.parse(failed.case), fails)
        explained = harness.prove(Case.parse(found.case))
    return f"reproduce: tools/parity.py --case '{found.case}'\n{explained.text()}"
