"""The library used from Python: tiny captioned pictures, two tokenizers, a model, the step loop and a checkpoint.

python examples/train_loop.py [FOLDER]    # default: train_loop; 60 steps on one CPU core"""

import json
import sys
from functools import partial
from pathlib import Path

from PIL import Image

from megamm.common.device import Device, choose
from megamm.config.load import config_from_dict
from megamm.data.build.shards import BuildOptions, build
from megamm.data.pipeline.loader import Loader
from megamm.data.pipeline.run_data import open_run_data
from megamm.data.tokenize.token_cache import load_codecs, tokenize
from megamm.engine.build import build_engine
from megamm.mcore import process_groups
from megamm.model.flops import flops_of_row
from megamm.model.loss import overall, weight_tensor
from megamm.tokenizers.io import save_codec
from megamm.tokenizers.text.train import train_text_tokenizer
from megamm.tokenizers.visual.model import VisualCodec, VisualCodecConfig
from megamm.train.checkpoint_manager import CheckpointManager


def make_data(folder: Path, device: Device) -> None:
    """Write folder/shards/drawn, tokenized, and folder/tokenizers/{text,visual}."""
    raw, shards, tokenizers = folder / "raw/drawn", folder / "shards/drawn", folder / "tokenizers"
    raw.mkdir(parents=True)
    with (raw / "samples.jsonl").open("w") as lines:
        for n, noun in enumerate(("box", "ball", "house", "tree", "boat", "star", "fish", "lamp", "door", "bell")):
            for c, colour in enumerate(("red", "green", "blue", "black", "orange", "purple")):
                picture = Image.new("RGB", (16, 16), "white")
                picture.paste(colour, (n % 6, c, n % 6 + 8, c + 2 + n // 2))
                picture.save(raw / f"{n}_{c}.png")
                lines.write(json.dumps({"image": f"{n}_{c}.png", "caption": f"a {colour} {noun}", "noun": noun}) + "\n")
    build([raw], folder / "shards", BuildOptions(heldout=0.2, image_size=16), workers=1)
    train_text_tokenizer([shards], tokenizers / "text", vocabulary_size=300)
    (tokenizers / "visual").mkdir()  # left untrained for brevity; `megamm tokenizer train visual` trains one
    sizes = VisualCodecConfig(image_size=16, downsample=8, width=16, levels=(5, 5))
    save_codec(VisualCodec(sizes), tokenizers / "visual")
    tokenize([shards], load_codecs([f"{name}={tokenizers / name}" for name in ("text", "visual")], device.torch_device))


def train(folder: Path, device: Device) -> None:
    """Train on make_data's folder; the checkpoint in folder/run is one that `megamm` reads and resumes."""
    heads, rows = {"num_attention_heads": 4, "num_query_groups": 2}, 4
    settings = {  # keys as in a YAML file
        "output": str(folder / "run"),
        "model": {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "head_dim": 16, **heads},
        "data": {"seq_length": 64, "sources": [{"path": str(folder / "shards/drawn")}]},
        "tokenizers": {name: str(folder / "tokenizers" / name) for name in ("text", "visual")},
        "optimizer": {"lr": 3e-3, "warmup_steps": 5},
        "train": {"steps": 60, "global_batch_size": rows, "micro_batch_size": rows},
    }
    config = config_from_dict(settings, where="settings")  # a mistake raises UserError
    process_groups.start(device)  # torchrun's job, or a world of this process alone
    groups = process_groups.build(config.parallel, config.train.seed)  # tensor, pipeline, context, expert, data
    data = open_run_data(config)
    vocabulary, rank, size = data.vocabulary, groups.data_rank, groups.data_size
    cost = partial(flops_of_row, config.model, vocabulary.size, config.data.seq_length)  # to balance the ranks
    loader = Loader(data.stream, global_batch=rows, micro_batch=rows, data_rank=rank, data_size=size, cost=cost)
    model = build_engine(config, vocabulary.size, groups, device)  # with its optimizer and schedule
    weights = weight_tensor(config.loss_weights, vocabulary.modalities, device.torch_device)
    store = CheckpointManager(config, data, model, groups, device, while_waiting=lambda: None)
    for step in range(1, config.train.steps + 1):
        result = model.compute_gradients([batch.to(device.torch_device) for batch in loader.step()], weights)
        model.apply_update()
        if step % 10 == 0:
            print(f"step {step}: loss {overall(result.loss.mean, weights):.3f}", flush=True)
    store.save(step, loader.consumed_rows, tokens={}, loss_guard={}, heldout_loss=None, wait=True)
    store.close()


if __name__ == "__main__":  # data workers and the checkpoint writer are processes of their own
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "train_loop")
    make_data(target, choose("cpu"))
    train(target, choose("cpu"))
