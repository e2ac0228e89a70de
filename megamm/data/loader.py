"""This data rank's batches: the rows of each global batch that are its own.

    Loader   .step() -> list[Batch], the microbatches of the next global batch

Row r is the same at every world size (see `row_stream`), so the whole state is the number of rows consumed.
"""

from megamm.data.packing import padding_share
from megamm.data.row_stream import RowStream
from megamm.data.sample import Batch
from megamm.errors import UserError


class Loader:
    """This data rank's share of each global batch: rows consumed + (j * data_size + data_rank) * micro_batch ...

    for microbatch j. global_batch and micro_batch are in rows. UserError if they do not divide.
    """

    def __init__(
        self,
        stream: RowStream,
        *,
        global_batch: int,
        micro_batch: int,
        data_rank: int,
        data_size: int,
        consumed_rows: int = 0,
    ) -> None:
        if global_batch % (micro_batch * data_size):
            what = f"global batch {global_batch} is not a multiple of micro batch {micro_batch} x data size {data_size}"
            raise UserError(what, remedy=f"set it to a multiple of {micro_batch * data_size}")
        assert 0 <= data_rank < data_size
        self.stream, self.global_batch, self.micro_batch = stream, global_batch, micro_batch
        self.data_rank, self.data_size, self.consumed_rows = data_rank, data_size, consumed_rows
        self.padding_share = 0.0
        """Share of padding in the rows that this rank loaded in the last step."""

    def step(self) -> list[Batch]:
        """The microbatches of the next global batch."""
        batches, padding = [], 0.0
        for j in range(self.global_batch // (self.micro_batch * self.data_size)):
            first = self.consumed_rows + (j * self.data_size + self.data_rank) * self.micro_batch
            rows = [self.stream.row(r) for r in range(first, first + self.micro_batch)]
            padding += sum(padding_share(row) for row in rows)
            batches.append(Batch.stack(rows))
        self.consumed_rows += self.global_batch
        self.padding_share = padding * self.data_size / self.global_batch
        return batches

    def state(self) -> dict[str, int]:
        """All there is to save; pass it to a new Loader at any data size."""
        return {"consumed_rows": self.consumed_rows}
