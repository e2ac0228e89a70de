"""The FakeTensorMode of a simulated run: it also answers what a GPU would report to the host, and counts such waits.

A host wait is an operation whose result the host needs before it continues, so that it cannot queue work ahead of the
GPU: a value read from a tensor, a shape that depends on values, a copy between host and device that is not
asynchronous, a synchronisation. FakeTensors have no values: the answers are assumed (a number is 1, a condition is
false, a mask selects everything).
"""

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

_aten = torch.ops.aten
_ROOT = f"{Path(__file__).parents[2]}/"
"""The folder that megamm is in: a checkout or an environment's packages."""
_PACKAGES, _OWN = ("megamm/", "megatron/"), ("megamm/fakegpu/", "megamm/mcore/fake_")


def _source(path: str) -> str | None:
    """Return a file of megamm or Megatron-core as a path from its package on; None for others and the simulation's."""
    _, installed, rest = path.rpartition("/site-packages/")
    file = rest if installed else path.removeprefix(_ROOT)
    return file if file.startswith(_PACKAGES) and not file.startswith(_OWN) else None


@dataclass(frozen=True)
class HostWait:
    """Where the host waits: the innermost frame of megamm or Megatron-core."""

    kind: str
    file: str
    """Path from its package on, such as "megamm/model/loss.py"."""
    function: str
    line: int


class HostWaits:
    """Counts of host waits. scope: returns how often the running code runs, "microbatch" or "step"."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, HostWait]] = Counter()
        self.scope: Callable[[], str] = lambda: "step"

    def note(self, kind: str) -> None:
        """Count a wait of the code that is running now."""
        frame = sys._getframe(1)
        while frame.f_back is not None:
            file = _source(frame.f_code.co_filename)
            if file is not None:
                self.counts[self.scope(), HostWait(kind, file, frame.f_code.co_name, frame.f_lineno)] += 1
                return
            frame = frame.f_back
        self.counts[self.scope(), HostWait(kind, "?", "?", 0)] += 1


class FakeGpuMode(FakeTensorMode):
    """FakeTensors whose values are assumed. masked: number of elements that a mask of this shape selects."""

    def __init__(self, waits: HostWaits, masked: Callable[[torch.Size], int]) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.static_shapes = True
        self.waits, self.masked = waits, masked
        self._answers: dict[Any, Callable[..., Any]] = {
            _aten._local_scalar_dense.default: self._item,
            _aten.nonzero.default: self._nonzero,
            _aten.index.Tensor: self._index,
            _aten.masked_select.default: self._masked_select,
            _aten.bincount.default: self._bincount,
            _aten._to_copy.default: self._to_copy,
            _aten.copy_.default: self._copy,
        }

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = self._answers.get(func)
        if answer is not None:
            result = answer(*args, **(kwargs or {}))
            if result is not None:
                return result
        return super().dispatch(func, types, args, kwargs)

    def _item(self, tensor: torch.Tensor) -> bool | float | int | None:
        if not isinstance(tensor, FakeTensor) or tensor.constant is not None:
            return None
        if tensor.is_cuda:
            self.waits.note("value read")
        if tensor.dtype == torch.bool:
            return False
        return 1.0 if tensor.dtype.is_floating_point else 1

    def _nonzero(self, tensor: torch.Tensor) -> torch.Tensor | None:
        if not tensor.is_cuda:
            return None
        self.waits.note("nonzero")
        with self:
            return torch.empty(tensor.numel(), tensor.dim(), dtype=torch.int64, device=tensor.device)

    def _index(self, tensor: torch.Tensor, indices: list[torch.Tensor | None]) -> torch.Tensor | None:
        if not any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
            return None
        self.waits.note("boolean index")
        plain: list[torch.Tensor | None] = []
        with self:
            for i in indices:
                if i is not None and i.dtype in (torch.bool, torch.uint8):
                    empty = torch.empty(i.numel(), dtype=torch.int64, device=i.device)
                    plain += [empty] * i.dim()
                else:
                    plain.append(i)
            return _aten.index.Tensor(tensor, plain)

    def _masked_select(self, tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        self.waits.note("masked select")
        with self:
            return torch.empty(self.masked(mask.shape), dtype=tensor.dtype, device=tensor.device)

    def _bincount(self, tensor: torch.Tensor, weights: torch.Tensor | None = None, minlength: int = 0) -> torch.Tensor:
        self.waits.note("bincount")
        with self:
            dtype = torch.int64 if weights is None else torch.float64
            return torch.empty(max(minlength, 1), dtype=dtype, device=tensor.device)

    def _to_copy(self, tensor: torch.Tensor, **options: Any) -> None:
        device = options.get("device")
        if device is not None and not options.get("non_blocking", False):
            self._between(tensor.device, torch.device(device))

    def _copy(self, to: torch.Tensor, tensor: torch.Tensor, non_blocking: bool = False) -> None:
        if not non_blocking and isinstance(tensor, torch.Tensor):
            self._between(tensor.device, to.device)

    def _between(self, source: torch.device, target: torch.device) -> None:
        if source.type != target.type and "cuda" in (source.type, target.type):
            self.waits.note("copy to host" if target.type == "cpu" else "copy from host")
