"""Small collective operations of all ranks on Python values, which pass on one rank's UserError to all."""

import datetime
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megamm.common.errors import UserError

PATIENCE = datetime.timedelta(hours=6)
"""Time that ranks wait for each other here: a share of a large checkpoint may come over a slow network."""

Gather = Callable[[torch.Tensor], list[torch.Tensor]]
"""Takes this rank's tensor, returns the tensors of all ranks in rank order."""


class Collectives:
    """Collective operations without a short timeout; every rank calls every method.

    An error other than a UserError is not passed on: it ends its rank, and with it the job.
    """

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self.rank = dist.get_rank()

    def on_first(self, action: Callable[[], Any]) -> Any:
        """Run the action on rank 0; all ranks return its result or raise its UserError."""
        shared: list[Any] = [None, None]
        if self.rank == 0:
            try:
                shared[0] = action()
            except UserError as error:
                shared[1] = described(error)
        dist.broadcast_object_list(shared, src=0, group=self.group)
        result, problem = shared
        if problem is not None:
            raise UserError(**problem, on_all_ranks=True)
        return result

    def together(self, action: Callable[[], Any]) -> Any:
        """Run the action on every rank; return this rank's result. If one fails, all raise the first rank's error."""
        result, problem = None, None
        try:
            result = action()
        except UserError as error:
            problem = described(error)
        problems: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem, group=self.group)
        first = next((p for p in problems if p), None)
        if first is not None:
            raise UserError(**first, on_all_ranks=True)
        return result


def described(error: UserError) -> dict[str, Any]:
    """Return the arguments that make the same error on another rank."""
    return {"what": error.what, "where": error.where and str(error.where), "remedy": error.remedy}
