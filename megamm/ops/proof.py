"""Comparison of kernels with plain torch on the same device, and their times: a kernel proves itself before it is used.

A `Proof` names one function, such as RMSNorm of 4096 channels in bfloat16, and the candidates that can compute it. All
of them get the same inputs. Results and gradients are compared with those of the plain function in float64. How far
they may be off follows from the plain function in the dtype of the inputs:

    error = |y - exact|,   bound = 2 |plain - exact| + slack |exact|

each as the maximum and as the root mean square over a tensor, relative to |exact|. slack is one more rounding of the
result, unless a proof states more, and what another order of float32 sums changes: 2 sqrt(n) units for n terms.
Sources: the tests of FlashAttention compare in this way (Dao 2023); Higham and Mary 2019 (rounding errors of sums).
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megamm.common.device import Device
from megamm.common.errors import UserError

Function = Callable[..., Any]
AGAIN = "`megamm doctor --kernels --again` compares once more"
MARGIN = 0.9
"""A candidate that is not the first is preferred only if it takes less than this part of the first one's time."""
_WARM_UP, _ROUNDS = 2, 5
"""Runs of a candidate on a GPU that are not timed, and that are."""


class Draw:
    """Draws the inputs of a proof: the same numbers on every device, without use of the run's generators."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.generator = device, torch.Generator().manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, dtype)

    def leaf(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return normal numbers that need a gradient."""
        return self.normal(*shape, dtype=dtype).requires_grad_()

    def below(self, limit: int, *shape: int) -> Tensor:
        """Return integers from 0 to limit - 1."""
        return torch.randint(limit, shape, generator=self.generator).to(self.device)


@dataclass(frozen=True)
class Inputs:
    """Arguments of all candidates. tensors: those that become float64 for the exact result; constants: the others."""

    tensors: tuple[Tensor, ...]
    constants: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Proof:
    """One function and its candidates, by name: `(*tensors, **constants)` -> a tensor or a tuple of tensors.

    form: what distinguishes it from other proofs of this name, such as dtype and sizes. slack: error relative to the
    exact result that is allowed beyond twice the plain function's; None: one rounding of the result. terms: of the
    longest sum, in results and gradients.
    """

    name: str
    form: str
    draw: Callable[[Draw], Inputs]
    plain: Function
    candidates: Mapping[str, Function]
    slack: float | None = None
    terms: int = 1

    def allowed(self, dtype: torch.dtype) -> float:
        """Return the slack of a result of this dtype."""
        if not dtype.is_floating_point:
            return 0.0
        rounding = torch.finfo(dtype).eps / 2 if self.slack is None else self.slack
        return rounding + 2 * math.sqrt(self.terms) * torch.finfo(torch.float32).eps / 2

    @property
    def title(self) -> str:
        return f"{self.name}, {self.form}"


@dataclass(frozen=True)
class Outcome:
    """What a candidate did. error and bound: of the result that used most of its bound, relative; seconds: of one call
    with its backward pass. problem: why the candidate cannot be used; empty if it agrees."""

    error: float
    bound: float
    seconds: float
    problem: str = ""

    @property
    def agrees(self) -> bool:
        return not self.problem

    def text(self) -> str:
        """Return it as a part of a log line."""
        return self.problem or f"{self.error / self.bound if self.bound else 0:.0%} of the error bound, {self.time()}"

    def time(self) -> str:
        return f"{1e3 * self.seconds:.3g} ms"


@dataclass(frozen=True)
class Proven:
    """Outcomes by proof and candidate, and what follows from them. A candidate without an outcome counts as agreeing.

    by_time: prefer the fastest candidate, as on a GPU. Times on a CPU depend on other programs, and a run that is
    resumed must choose the same again, so there the first candidate that agrees is chosen. earlier: what the run chose
    at its first start, by proof; it is chosen again while it agrees.
    """

    outcomes: Mapping[str, Mapping[str, Outcome]] = field(default_factory=dict)
    by_time: bool = False
    earlier: Mapping[str, str] = field(default_factory=dict)

    def problem(self, name: str, candidate: str) -> str:
        """Return why the candidate cannot be used, or ""."""
        outcome = self.outcomes.get(name, {}).get(candidate)
        return outcome.problem if outcome is not None else ""

    def choose(self, name: str, candidates: Sequence[str]) -> tuple[str, str]:
        """Return one of the candidates, which are in the order of preference, and the reason ("" if none is proven).

        UserError if none of them agrees with plain torch.
        """
        known = self.outcomes.get(name, {})
        left = [candidate for candidate in candidates if not self.problem(name, candidate)]
        if not left:
            problems = "; ".join(f"{candidate}: {known[candidate].problem}" for candidate in candidates)
            what = f"{name}: no kernel agrees with plain torch: {problems}"
            raise UserError(what, remedy=f"update the driver or the packages; {AGAIN}", on_all_ranks=True)
        chosen = left[0]
        if self.earlier.get(name) in left:
            chosen = self.earlier[name]
        elif self.by_time and all(candidate in known for candidate in left):
            fastest = min(left, key=lambda candidate: known[candidate].seconds)
            if known[fastest].seconds < MARGIN * known[chosen].seconds:
                chosen = fastest
        if chosen not in known:
            return chosen, ""
        others = [f"{other}: {known[other].text()}" for other in known if other != chosen]
        return chosen, "; ".join([f"agrees with plain torch: {known[chosen].text()}", *others])


UNPROVEN = Proven()
"""Nothing was compared: every choice is made by what is installed, as on the simulated GPU."""


@torch.inference_mode(False)
@torch.enable_grad()
def prove(proof: Proof, device: Device) -> dict[str, Outcome]:
    """Compare and time all candidates on the device.

    UserError if one of them leaves the device unusable, or if other programs have taken its memory.
    """
    try:
        return _outcomes(proof, device)
    except torch.OutOfMemoryError as error:
        what = f"{proof.title}: {device.torch_device} has too little free memory to compare kernels"
        raise UserError(what, remedy="end other programs on this device", is_transient=True) from error


def _outcomes(proof: Proof, device: Device) -> dict[str, Outcome]:
    inputs = proof.draw(Draw(device.torch_device))
    wide = Inputs(tuple(_widened(tensor) for tensor in inputs.tensors), inputs.constants)
    upstream = [Draw(device.torch_device).normal(*y.shape) for y in _outputs(proof.plain, wide)]
    exact = _results(proof.plain, wide, upstream)
    plain = _results(proof.plain, inputs, upstream)
    outcomes = {}
    for name, candidate in proof.candidates.items():
        try:
            found = _results(candidate, inputs, upstream)
            device.synchronize()
            outcome = _compared(found, plain, exact, proof.allowed)
            seconds = _seconds(candidate, inputs, upstream, device)
        except torch.OutOfMemoryError:
            raise
        # Whatever a package's kernel raises, plain torch can still compute the function.
        except Exception as error:
            if not _is_alive(device):
                remedy = "choose another kernel in the config (docs/performance.md), or update the driver"
                what = f"{proof.title}: {name} has left {device.torch_device} unusable: {_first_line(error)}"
                raise UserError(what, remedy=remedy) from error
            outcome, seconds = Outcome(0.0, 0.0, 0.0, f"fails: {_first_line(error)}"), 0.0
        outcomes[name] = Outcome(outcome.error, outcome.bound, seconds, outcome.problem)
    return outcomes


def _widened(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().to(torch.float64).requires_grad_(tensor.requires_grad)


def _outputs(function: Function, inputs: Inputs) -> tuple[Tensor, ...]:
    outputs = function(*inputs.tensors, **inputs.constants)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _results(function: Function, inputs: Inputs, upstream: Sequence[Tensor]) -> list[Tensor]:
    """Return the outputs, then the gradients of all inputs that need one."""
    outputs = _outputs(function, inputs)
    for at, (y, dy) in enumerate(zip(outputs, upstream, strict=True)):
        if y.shape != dy.shape:
            raise ValueError(f"result {at} is {list(y.shape)} and not {list(dy.shape)}")
    wanted = [tensor for tensor in inputs.tensors if tensor.requires_grad]
    if not wanted:
        return list(outputs)
    used = [(y, dy) for y, dy in zip(outputs, upstream, strict=True) if y.requires_grad]
    # Rounded to bfloat16 first, a gradient is the same number in every dtype.
    given = [dy.bfloat16().to(y.dtype) for y, dy in used]
    gradients = torch.autograd.grad([y for y, _ in used], wanted, given)
    return [*(y.detach() for y in outputs), *gradients]


def _compared(
    found: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor], allowed: Callable[[torch.dtype], float]
) -> Outcome:
    """Return the outcome of the result that used most of its bound; without a time."""
    worst, number = Outcome(0.0, 0.0, 0.0), -1
    for at, (y, usual, true) in enumerate(zip(found, plain, exact, strict=True)):
        if y.dtype != usual.dtype:
            return Outcome(0.0, 0.0, 0.0, f"result {at} is {y.dtype} and not {usual.dtype}")
        for error, bound in _errors(y, usual, true, allowed(usual.dtype)):
            if number < 0 or error * worst.bound > worst.error * bound:
                worst, number = Outcome(error, bound, 0.0), at
            if not math.isfinite(error):
                return Outcome(0.0, bound, 0.0, f"result {at} is not finite")
            if error > bound:
                return Outcome(error, bound, 0.0, f"result {at} is off by {error:.1e}, and {bound:.1e} is the bound")
    return worst


def _errors(y: Tensor, usual: Tensor, true: Tensor, allowed: float) -> Iterator[tuple[float, float]]:
    """Yield (error, bound), as maximum and as root mean square, relative to the exact result."""
    if not y.numel():
        return
    for norm in (torch.inf, 2.0):
        size, error, usually = (
            float(torch.linalg.vector_norm(x, norm)) for x in (true, y.double() - true, usual.double() - true)
        )
        size = size or 1.0
        yield error / size, 2 * usually / size + allowed


def _seconds(candidate: Function, inputs: Inputs, upstream: Sequence[Tensor], device: Device) -> float:
    """Return the least time of a call with its backward pass."""
    if not device.is_gpu:
        start = time.perf_counter()
        _results(candidate, inputs, upstream)
        return time.perf_counter() - start
    for _ in range(_WARM_UP):
        _results(candidate, inputs, upstream)
    events = [device.record_event()]
    for _ in range(_ROUNDS):
        _results(candidate, inputs, upstream)
        events.append(device.record_event())
    device.synchronize()
    return min(device.seconds_between(a, b) for a, b in itertools.pairwise(events))


def _is_alive(device: Device) -> bool:
    """Whether the device still computes: after some errors of a kernel, every further call of the process fails."""
    try:
        return float(torch.ones(2, device=device.torch_device).sum()) == 2
    except RuntimeError:
        return False


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
