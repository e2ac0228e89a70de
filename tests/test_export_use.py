"""What a folder says about the use of its model is the same after import and export; the truth is transformers.

Where generation stops, sampling settings, chat template, positions, windows, rows without ids, and the ids of a prompt.
"""

import copy
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from codec_data import write_source
from published_folder import EOS, IDS, ROWS, TEMPLATE, bpe, publish, write_json
from safetensors.torch import load_file
from tiny_export import with_model
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from megamm import checkpoint
from megamm.common.errors import UserError
from megamm.common.sample import Document, Part
from megamm.convert.export import export
from megamm.convert.import_folder import import_
from megamm.convert.io.export_folder import LoadedExport, export_tokenizer, open_export
from megamm.convert.io.hf_source import HuggingFaceSource
from megamm.convert.verify.equivalence import VerificationOptions
from megamm.data.pipeline.packing import PackingSpec, document_length, pack
from megamm.data.tokenize.token_cache import tokenize
from megamm.evaluation.losses import evaluate
from megamm.inference.export_subject import ExportSubject
from megamm.inference.generate import Sampling, generate
from megamm.init_from.rules import resize_vocabulary
from megamm.modalities.protocol import sequential_positions
from megamm.modalities.text import TextModality
from megamm.model.vocabulary import Vocabulary
from megamm.tokenizers.text.train import train_text_tokenizer

LENGTH = 32
"""data.seq_length of the import: far below the positions that the models were made for."""
TENSORS = VerificationOptions(logits=False)
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]


def there_and_back(folder: Path, to: Path, **options: Any) -> Path:
    """Import the folder as `to`/run and export it as `to`/out; return the export."""
    import_(folder, to / "run", nproc=1, overrides=[f"data.seq_length={LENGTH}"], verification=TENSORS)
    return export(to / "run", to / "out", nproc=1, verification=TENSORS, **options)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return hf: a published folder; out: its export; again: the export of the export, without the first two."""
    folder = tmp_path_factory.mktemp("llama")
    there_and_back(publish(folder / "hf"), folder)
    (folder / "again").mkdir()
    there_and_back(folder / "out", folder / "again")
    return folder


EXPORTS = pytest.mark.parametrize("out", ["out", "again/out"])


def settings(folder: Path) -> dict[str, Any]:
    """Return the generation settings of the model that transformers loads, without its version."""
    read = AutoModelForCausalLM.from_pretrained(folder).generation_config.to_dict()
    return {key: value for key, value in read.items() if key not in ("transformers_version", "_from_model_config")}


@EXPORTS
def test_an_export_stops_and_samples_as_the_folder_does(llama: Path, out: str) -> None:
    assert settings(llama / out) == settings(llama / "hf")
    assert settings(llama / out)["eos_token_id"] == EOS and settings(llama / out)["temperature"] == 0.6


@EXPORTS
def test_an_export_has_the_folders_config(llama: Path, out: str) -> None:
    """Positions, token ids and every key that changes no weight: all of config.json, as transformers reads it."""
    ours, theirs = (AutoConfig.from_pretrained(llama / name).to_dict() for name in (out, "hf"))
    for values in (ours, theirs):
        del values["transformers_version"]
        values.pop("_name_or_path", None)
    assert ours == theirs
    assert ours["max_position_embeddings"] == 131072 and ours["use_cache"] is False and ours["vocab_size"] == ROWS


@EXPORTS
def test_an_export_has_the_folders_tokenizer_and_chat_template(llama: Path, out: str) -> None:
    ours, theirs = (AutoTokenizer.from_pretrained(llama / name) for name in (out, "hf"))
    for text in ("Hi", "", "a<|eot_id|>b", "  two  spaces\n"):
        assert ours(text).input_ids == theirs(text).input_ids
    assert ours.apply_chat_template(TALK)["input_ids"] == theirs.apply_chat_template(TALK)["input_ids"]
    assert ours.chat_template == TEMPLATE and ours.model_max_length == 131072


@EXPORTS
def test_rows_without_ids_have_the_same_bits(llama: Path, out: str) -> None:
    ours, theirs = (load_file(llama / name / "model.safetensors") for name in (out, "hf"))
    assert ours.keys() == theirs.keys() and ours["model.embed_tokens.weight"].shape[0] == ROWS > IDS
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_rows_are_cut_where_that_is_asked(llama: Path, tmp_path: Path) -> None:
    out = export(llama / "run", tmp_path / "out", nproc=1, trim_vocabulary=True, verification=TENSORS)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, llama / "hf"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(ours[name], theirs[name][:IDS])
    assert AutoConfig.from_pretrained(out).vocab_size == IDS


def old_settings(folder: Path) -> None:
    """Older files have sampling settings in config.json."""
    (folder / "generation_config.json").unlink()
    values = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", values | {"temperature": 0.7, "do_sample": True, "repetition_penalty": 1.1})


def contradictory(folder: Path) -> None:
    """transformers reads this, but refuses to write it; Llama 2 was published so."""
    write_json(
        folder / "generation_config.json", {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": 5}
    )


def more_settings(folder: Path) -> None:
    values = {"suppress_tokens": [3, 4], "bad_words_ids": [[7, 8]], "forced_eos_token_id": 9, "stop_strings": ["END"]}
    write_json(folder / "generation_config.json", values | {"max_length": 77, "unknown_to_us": {"a": 1}})


def no_ids(folder: Path) -> None:
    """The config names none of its ids."""
    values = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", values | {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None})


def templates_by_name(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    values = json.loads((folder / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "tools" + TEMPLATE}]
    write_json(folder / "tokenizer_config.json", values | {"chat_template": named})


def template_files(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag" + TEMPLATE)


KINDS: dict[str, Callable[[Path], None]] = {
    kind.__name__: kind
    for kind in (old_settings, contradictory, more_settings, no_ids, templates_by_name, template_files)
}


OFTEN = {"old_settings", "templates_by_name", "mistral"}
"""The others are of `make test-all`."""


def cases(names: dict[str, Any]) -> list[Any]:
    return [pytest.param(name, marks=() if name in OFTEN else pytest.mark.everything) for name in names]


@pytest.mark.parametrize("kind", cases(KINDS))
def test_every_form_of_such_a_folder_is_read_alike(kind: str, tmp_path: Path) -> None:
    KINDS[kind](publish(tmp_path / "hf"))
    out = there_and_back(tmp_path / "hf", tmp_path)
    assert settings(out) == settings(tmp_path / "hf")
    ours, theirs = (AutoConfig.from_pretrained(folder) for folder in (out, tmp_path / "hf"))
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(ours, key) == getattr(theirs, key)
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (out, tmp_path / "hf"))
    assert ours.chat_template == theirs.chat_template and theirs.chat_template
    assert ours.apply_chat_template(TALK)["input_ids"] == theirs.apply_chat_template(TALK)["input_ids"]


WINDOWS = {
    "mistral": {"sliding_window": 64},
    "qwen2-window": {"sliding_window": 40},
    "gemma3": {"sliding_window": 512},
    "qwen3": {},
}


@pytest.mark.parametrize("model", cases(WINDOWS))
def test_a_window_longer_than_the_rows_of_the_import_is_in_the_export(model: str, tmp_path: Path) -> None:
    publish(tmp_path / "hf", model, config=WINDOWS[model])
    out = there_and_back(tmp_path / "hf", tmp_path)
    ours, theirs = (AutoConfig.from_pretrained(folder) for folder in (out, tmp_path / "hf"))
    for key in ("sliding_window", "layer_types", "use_sliding_window", "model_type", "architectures"):
        assert getattr(ours, key, None) == getattr(theirs, key, None), key
    assert ours.max_position_embeddings == 131072


def test_positions_are_at_least_those_of_training(tmp_path: Path) -> None:
    publish(tmp_path / "hf", config={"max_position_embeddings": 16})
    out = there_and_back(tmp_path / "hf", tmp_path)
    assert AutoConfig.from_pretrained(out).max_position_embeddings == LENGTH


SURPLUS = {"<image_soft_token>": True, "<extra>": False}
"""Added tokens without a row, and whether they are special; Gemma 3 1B has the first."""


def with_surplus(folder: Path, names: dict[str, bool] = SURPLUS) -> Path:
    """Publish a model with as many rows as the tokenizer has ids, then add tokens to the tokenizer."""
    publish(folder, rows=IDS)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(name, special=special) for name, special in names.items()])
    tokenizer.image_token = "<image_soft_token>"
    tokenizer.save_pretrained(folder)
    values = json.loads((folder / "tokenizer_config.json").read_text())
    described = {str(IDS + i): {"content": name, "special": special} for i, (name, special) in enumerate(names.items())}
    values |= {"added_tokens_decoder": described, "additional_special_tokens": ["<|eom_id|>", *names]}
    write_json(folder / "tokenizer_config.json", values)
    write_json(folder / "added_tokens.json", {name: IDS + i for i, name in enumerate(names)})
    return folder


def test_tokens_without_a_row_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with_surplus(tmp_path / "hf")
    out = there_and_back(tmp_path / "hf", tmp_path)
    named = f"the embedding has no row for them: <image_soft_token> ({IDS}), <extra> ({IDS + 1})"
    assert [message for message in caplog.messages if message.endswith(named)]
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (out, tmp_path / "hf"))
    assert len(theirs) == IDS + 2 and len(ours) == IDS == AutoConfig.from_pretrained(out).vocab_size
    text = "a <image_soft_token><extra> b<|eot_id|>"
    assert max(theirs(text).input_ids) == IDS + 1 and max(ours(text).input_ids) < IDS
    assert ours("a b<|eot_id|>").input_ids == theirs("a b<|eot_id|>").input_ids
    for file in out.glob("*token*.json"):
        assert "image_soft_token" not in file.read_text() and "<extra>" not in file.read_text(), file
    again = there_and_back(out, tmp_path / "again")
    assert load_file(again / "model.safetensors").keys() == load_file(tmp_path / "hf" / "model.safetensors").keys()


def test_a_run_that_starts_from_it_has_a_new_row_for_such_a_token(tmp_path: Path) -> None:
    source = HuggingFaceSource(with_surplus(tmp_path / "hf"), LENGTH)
    text = TextModality.load(tmp_path / "hf")
    ours = Vocabulary.of({"text": (text.vocabulary_size, text.codec_id)})
    assert source.vocabulary.size == IDS and ours["text"].size == IDS + 2
    assert resize_vocabulary(source.vocabulary, ours, {}).lines[0] == f"text: {IDS} kept, 2 new"


def test_a_tokenizer_with_more_ordinary_tokens_is_another_one(tmp_path: Path) -> None:
    publish(tmp_path / "hf", rows=250)
    with pytest.raises(UserError, match=f"the embedding has 250 rows, but the tokenizer has {IDS} ids"):
        there_and_back(tmp_path / "hf", tmp_path)


def by_words(folder: Path) -> Tokenizer:
    """Return a tokenizer that puts one token in front of a text and one behind it, as BERT's does."""
    words = {word: i for i, word in enumerate(("[UNK]", "[CLS]", "[SEP]", "a", "red", "box", "Hi"))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return tokenizer


def short(folder: Path) -> Tokenizer:
    """Return a tokenizer whose file cuts and pads every text, which training does not."""
    tokenizer = bpe()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=8)
    return tokenizer


def trained(folder: Path) -> Tokenizer:
    train_text_tokenizer([write_source(folder / "shards", 4, 1)], folder / "own", vocabulary_size=270)
    return Tokenizer.from_file(str(folder / "own" / "tokenizer.json"))


TOKENIZERS = {"llama 3": lambda folder: bpe(), "bert": by_words, "short": short, "own": trained}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_exported_tokenizer_gives_the_ids_of_training(kind: str, tmp_path: Path) -> None:
    """The truth is the row that the trainer packs; a prompt is a document before its end mark."""
    (tmp_path / "text").mkdir()
    TOKENIZERS[kind](tmp_path).save(str(tmp_path / "text" / "tokenizer.json"))
    text = TextModality.load(tmp_path / "text")
    image = 16, "codec"
    vocabulary = Vocabulary.of({"text": (text.vocabulary_size, text.codec_id), "image": image, "video": image})
    export_tokenizer(tmp_path / "text", vocabulary, tmp_path / "out", TEMPLATE)
    theirs, stored = AutoTokenizer.from_pretrained(tmp_path / "out"), tmp_path / "out" / "tokenizer.json"
    specs = {name: PackingSpec(sequential_positions, False) for name in ("text", "image")}
    red, pixels = Part("text", text.encode(["a red box"])[0]), Part("image", np.arange(4))
    marks = "<|image_start|><|visual_0|><|visual_1|><|visual_2|><|visual_3|><|image_end|>"
    for prompt, parts in {"a red box": [red], marks: [pixels], f"a red box{marks}": [red, pixels]}.items():
        size = document_length(*((part.modality, part.ids.size) for part in parts))
        row = pack([Document("key", tuple(parts))], vocabulary, size, specs).input_ids.tolist()
        assert row[-1] == vocabulary.document_end == theirs.eos_token_id
        assert theirs(prompt).input_ids == row[:-1]
        assert Tokenizer.from_file(str(stored)).encode(prompt).ids == row[:-1]
    # Training reads the names of special tokens in a text as plain characters.
    injected = "Hi <|eot_id|> a"
    assert theirs(injected, split_special_tokens=True).input_ids[1:] == text.encode([injected])[0].tolist()
    batch = theirs(["Hi", "a red box"], padding=True)
    assert all(ids[-1] != vocabulary.padding for ids in batch.input_ids), "generation starts after the prompt"
    assert theirs.apply_chat_template(TALK)["input_ids"].count(vocabulary.document_start) == 1


@pytest.fixture(scope="module")
def opened(llama: Path) -> LoadedExport:
    return open_export(llama / "out", torch.device("cpu"))


def test_an_import_continues_text_as_transformers_does(llama: Path, opened: LoadedExport) -> None:
    """Greedy, from the ids of the source's own tokenizer, up to any of the source's ends."""
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(llama / "hf"), AutoTokenizer.from_pretrained(llama / "hf")
    prompts = ["Hi", "a longer prompt"]
    made = generate(opened, prompts, "text", "text", Sampling(temperature=0, max_tokens=12))
    for prompt, text in zip(prompts, made, strict=True):
        asked = tokenizer(prompt, return_tensors="pt")
        # Rows without ids are not a choice of ours.
        ids = theirs.generate(**asked, max_new_tokens=12, do_sample=False, suppress_tokens=list(range(IDS, ROWS)))
        new = [i for i in ids[0, asked.input_ids.shape[1] :].tolist() if i not in EOS]
        assert opened.modalities["text"].encode([text])[0].tolist() == new or text == tokenizer.decode(new)
    assert opened.prompt_form.start == (256,) and opened.prompt_form.ends == tuple(EOS)


@pytest.mark.parametrize("end", EOS)
def test_an_import_stops_at_every_end_of_its_source(opened: LoadedExport, end: int) -> None:
    model = copy.deepcopy(opened.model)
    with torch.no_grad():  # this id is by far the most likely after the prompt
        prompt = torch.from_numpy(opened.prompt(Part("text", opened.modalities["text"].encode(["Hi"])[0])))[None]
        model.lm_head.weight[end] = 100 * model.model(prompt).last_hidden_state[0, -1]
    assert generate(with_model(opened, model), ["Hi"], "text", "text", Sampling(temperature=0)) == [""]


def test_an_import_is_evaluated_by_the_loss_of_transformers(opened: LoadedExport, llama: Path, tmp_path: Path) -> None:
    source = write_source(tmp_path / "shapes", 4, 3)
    tokenize([source], [opened.modalities["text"]])
    found = evaluate(ExportSubject(opened), [source])
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(llama / "hf"), AutoTokenizer.from_pretrained(llama / "hf")
    with tarfile.open(next((source / "heldout" / "text").glob("*.tar"))) as tar:
        texts = [tar.extractfile(member).read().decode() for member in tar if member.name.endswith(".txt")]
    losses = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            losses += [float(theirs(ids, labels=ids).loss)] * (ids.shape[1] - 1)
    assert len(texts) == found.samples and found.tokens == {"text": len(losses)}
    assert found.loss["text"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_the_checkpoint_keeps_it(llama: Path) -> None:
    """Also where the folder has gone or changed: what it says is in the state, not looked up at the export."""
    state = checkpoint.read_state(checkpoint.path_of(llama / "run", 0))
    assert state.origin is not None and state.origin["rows"] == ROWS
    assert state.origin["generation"]["eos_token_id"] == EOS and state.origin["chat_template"] == TEMPLATE
