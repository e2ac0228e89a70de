"""A row of a stream, planned and read in one go."""

from megamm.common.sample import Row
from megamm.data.pipeline.row_stream import RowStream


def read_row(stream: RowStream, r: int) -> Row:
    """Return row r of the sequence."""
    return stream.reader.row(stream.row_spec(r))
