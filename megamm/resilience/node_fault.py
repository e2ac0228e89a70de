"""The one exception for hardware that the run should go on without."""

from collections.abc import Sequence


class NodeFault(Exception):
    """These ranks compute wrongly or too slowly. Every rank raises it at the same step boundary, a checkpoint written;

    starting again without their nodes is up to the launcher.
    """

    def __init__(self, ranks: Sequence[int], why: str) -> None:
        self.ranks, self.why = list(ranks), why
        super().__init__(f"rank {', '.join(map(str, ranks))}: {why}")
