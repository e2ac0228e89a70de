"""A tiny config for plans, the frozen shapes of two examples, and the end of a job in this process."""

from typing import Any

import torch
from tiny_run import ROOT

from megamm.config import RunConfig, config_from_dict

VOCABULARY = 301
DENSE_8B, MOE_200B = (ROOT / "tests" / "data" / "plan" / f"{name}.yaml" for name in ("dense_8b", "moe_200b"))


def tiny(parallel: dict[str, Any], model: dict[str, Any], **train: Any) -> RunConfig:
    """Return a config of 8 layers whose rows have 64 tokens."""
    shape = {"num_layers": 8, "hidden_size": 64, "ffn_hidden_size": 96, "head_dim": 8}
    heads = {"num_attention_heads": 8, "num_query_groups": 4}
    return config_from_dict(
        {
            "output": "unused",
            "model": shape | heads | model,
            "parallel": parallel,
            "data": {"seq_length": 64, "sources": [{"path": "unused"}]},
            "tokenizers": {},
            "optimizer": {"lr": 1e-3},
            "train": {"steps": 2, "global_batch_size": 64, "micro_batch_size": 1, "precision": "bf16"} | train,
        },
        "test",
    )


def leave_job() -> None:
    """Leave a job that another test of this process has joined: simulated worlds need the process for themselves."""
    from megamm.mcore import cpu

    cpu.install()
    from megamm.mcore import process_groups

    if torch.distributed.is_initialized():
        process_groups.destroy()
        process_groups.stop()
