"""Lengths of the documents that a run will read, from the plan of its first rows; no token is read."""

from megamm.data.pipeline.run_data import RunData
from megamm.plan.job import Documents

ROWS = 128
"""Rows of the sample: tens of thousands of documents of short ones, and enough rows of long ones."""


def of_data(data: RunData) -> Documents:
    """Return the lengths in the first rows of the run's mixture."""
    lengths = [n for row in range(ROWS) for n in data.stream.row_spec(row).lengths]
    return Documents(tuple(lengths), ROWS, True)
