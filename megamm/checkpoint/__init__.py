"""Checkpoints: staged in one memory copy, written and published by a helper process, verified before they are read.

    RUN/checkpoints/step_00001000/
        tensors/            model and optimizer shards in torch's distributed checkpoint format (index.py)
        rng_00000.safetensors   each rank's generator states
        state.json          step, consumed rows, config, vocabulary ranges, layout, versions (state.py)
        manifest.json       size and digest of every file; written last (manifest.py)

Save: staging.py copies the engine's shards into this rank's staged file, saver.py notifies the rank's writer
(writer.py, a process without torch), and rank 0's writer publishes the checkpoint when every rank's part is there.
Load: reader.py reads from the files only what a rank's shards need. A damaged checkpoint is logged and skipped
(folder.py). This module does not import torch, so that the writer starts at once.
"""

from megamm.checkpoint.folder import newest, path_of, verify
from megamm.checkpoint.manifest import STATE
from megamm.checkpoint.state import TrainState, check_same_data, check_same_model, code_version, read_rng, read_state

__all__ = [
    "STATE",
    "TrainState",
    "check_same_data",
    "check_same_model",
    "code_version",
    "newest",
    "path_of",
    "read_rng",
    "read_state",
    "verify",
]
