"""`megamm doctor --kernels`: every kernel of this installation against plain torch on this machine's device.

Without a config, the kernels are those that runs of typical forms can choose from, of a small model in bfloat16 and in
FP8, with experts. Outcomes are kept for later runs of the same sizes (megamm/ops/proof_cache.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from megamm.common.device import DTYPES, Device, choose
from megamm.config import RunConfig, config_from_dict
from megamm.mcore import cpu
from megamm.model.attention_kernel import torch_has_varlen
from megamm.ops import library
from megamm.ops.op_proofs import op_proofs
from megamm.ops.proof import Outcome, Proof, Proven
from megamm.ops.proof_cache import ProofCache, prove_missing, summarise

if TYPE_CHECKING:
    from rich.table import Table

VOCABULARY = 32000
FUSION = "gradient_accumulation_fusion"
"""Megatron-core's field for weight gradients that products add to their sums."""
PATCH_OPS = ("patch_embed_3d", "unpatchify_3d")


@dataclass(frozen=True)
class KernelRow:
    """One candidate of one proof. chosen: whether `auto` takes it for a run with this proof alone."""

    kernel: str
    candidate: str
    form: str
    outcome: Outcome
    chosen: bool

    def to_json(self) -> dict[str, Any]:
        o = self.outcome
        return {
            "kernel": self.kernel,
            "candidate": self.candidate,
            "form": self.form,
            "agrees": o.agrees,
            "error": o.error,
            "bound": o.bound,
            "seconds": o.seconds,
            "chosen": self.chosen,
            "problem": o.problem,
        }


@dataclass(frozen=True)
class KernelReport:
    """The rows of all proofs, and what they were measured on."""

    identity: dict[str, str]
    rows: tuple[KernelRow, ...]

    @property
    def faults(self) -> list[str]:
        """One line for each kernel that disagrees."""
        return [f"{row.kernel}: {row.candidate} {row.outcome.problem}" for row in self.rows if row.outcome.problem]

    def to_json(self) -> dict[str, Any]:
        return {"identity": self.identity, "kernels": [row.to_json() for row in self.rows]}

    def table(self) -> "Table":
        from rich.table import Table
        from rich.text import Text

        table = Table("kernel", "candidate", "agrees", "error / bound", "time", "chosen", "form", box=None)
        for row in self.rows:
            o = row.outcome
            agrees = Text("yes", "green") if o.agrees else Text("no", "bold red")
            figures = f"{o.error:.1e} / {o.bound:.1e}" if o.bound else "-"
            chosen = "yes" if row.chosen else ""
            table.add_row(row.kernel, row.candidate, agrees, figures, o.time() if o.agrees else "-", chosen, row.form)
        return table


def survey(config: RunConfig | None, again: bool) -> KernelReport:
    """Return the outcomes of this device's kernels; again: compare also what is known."""
    device = choose("auto" if config is None else config.device)
    if not device.is_gpu:
        cpu.install()
    from megamm.mcore import kernel_proofs  # imports Megatron, which is adapted to the device by now

    proofs = list(_typical(device)) if config is None else kernel_proofs.run_proofs(config, VOCABULARY, device)
    proofs = list({proof.title: proof for proof in proofs}.values())
    cache = ProofCache(device)
    known = {} if again else cache.read()
    known = known | prove_missing(proofs, known, cache)
    rows = []
    for proof in proofs:
        proven = summarise([proof], known, device.is_gpu)
        chosen = _chosen(proof, proven)
        for candidate, outcome in proven.outcomes[proof.name].items():
            rows.append(KernelRow(proof.name, candidate, proof.form, outcome, candidate == chosen))
    return KernelReport(cache.identity, tuple(rows))


def _chosen(proof: Proof, proven: Proven) -> str | None:
    candidates = list(proof.candidates)
    if all(proven.problem(proof.name, candidate) for candidate in candidates):
        return None
    return proven.choose(proof.name, candidates)[0]


def _typical(device: Device) -> Iterator[Proof]:
    from megamm.mcore import kernel_proofs

    fp8 = [] if device.why_no_fp8 else [_config(device, "fp8", recipe) for recipe in ("tensorwise", "rowwise")]
    for config in fp8:
        yield from kernel_proofs.run_proofs(config, VOCABULARY, device)
    bf16 = _config(device, "bf16", "tensorwise")
    yield from kernel_proofs.run_proofs(bf16, VOCABULARY, device)
    if not device.is_gpu and torch_has_varlen():
        yield from kernel_proofs.attention_proofs(bf16, device, ["sdpa", "varlen"])
    if library.choose("auto", device.torch_device)[0] == "csrc":
        sizes = replace(kernel_proofs.sizes_of(bf16, VOCABULARY, device), hidden=64)
        yield from op_proofs(PATCH_OPS, DTYPES["bf16"], sizes)


def _config(device: Device, precision: str, recipe: str) -> RunConfig:
    """Return the config of a small model with experts; weight gradients are added in products on a CPU too."""
    hidden, width, heads = (4096, 14336, 32) if device.is_gpu else (256, 512, 8)
    model: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": hidden,
        "ffn_hidden_size": width,
        "num_attention_heads": heads,
        "num_query_groups": 8,
        "head_dim": hidden // heads,
        "moe": {"num_experts": 8, "ffn_hidden_size": width // 4},
        "megatron": {FUSION: True},
    }
    train: dict[str, Any] = {"precision": precision, "fp8": {"recipe": recipe}}
    train |= {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1}
    return config_from_dict(
        {
            "output": "unused",
            "model": model,
            "optimizer": {"lr": 1e-3},
            "train": train,
            "data": {"seq_length": 4096, "sources": [{"path": "unused"}]},
            "tokenizers": {"text": "unused"},
        },
        where="megamm doctor --kernels",
    )
