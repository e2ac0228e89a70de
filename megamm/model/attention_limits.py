"""What attention kernels require of a model, by its config alone: `layout.check` needs this before torch is imported.

attention_kernel.py chooses among those that are possible.
"""

from collections.abc import Iterator
from typing import Literal

from megamm.common.errors import UserError
from megamm.config import ModelConfig, RunConfig

Kernel = Literal["varlen", "flash", "flex", "sdpa"]
BY_LENGTHS: tuple[Kernel, ...] = ("varlen", "flash")
"""The kernels that take the lengths of documents."""
LARGEST_HEAD = 256
"""The largest head of FlashAttention's kernels, which both torch and flash-attn have."""


def check(config: RunConfig) -> None:
    """Raise UserError if no device can run this model with train.attention."""
    setting, model = config.train.attention, config.model
    if setting not in BY_LENGTHS:
        return
    if config.spans:
        raise UserError(
            f"train.attention={setting} does not support modalities.{min(config.spans)}.attention = span",
            remedy="set train.attention=auto",
        )
    if model.attention_softcap:
        raise UserError(
            f"train.attention={setting} does not support model.attention_softcap = {model.attention_softcap:g}",
            remedy="set train.attention=auto, or model.attention_softcap=0",
        )
    largest = max(head_sizes(model))
    if largest > LARGEST_HEAD:
        raise UserError(
            f"train.attention={setting} supports heads of at most {LARGEST_HEAD} channels, not {largest}",
            remedy="set train.attention=auto",
        )


def head_sizes(model: ModelConfig) -> tuple[int, int]:
    """Return the channels of a query or key head, and of a value head; they differ with latent attention."""
    if model.mla.kv_lora_rank:
        return model.mla.qk_head_dim + model.mla.qk_rope_head_dim, model.mla.v_head_dim
    return model.head_dim, model.head_dim


def against_lengths(config: RunConfig) -> Iterator[str]:
    """Yield why the model should not run, or cannot run, with the kernels of BY_LENGTHS on a GPU."""
    query, value = head_sizes(config.model)
    if config.train.precision == "fp32":
        yield "its kernels do not compute in float32"
    if config.model.attention_softcap:
        yield "it has no cap of the scores"
    if config.spans:
        yield "it has no bidirectional spans"
    if max(query, value) > LARGEST_HEAD:
        yield f"its heads have at most {LARGEST_HEAD} channels"
    if query != value:
        yield f"it would pad values from {value} to {query} channels"
