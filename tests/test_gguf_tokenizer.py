"""The tokenizer of a GGUF file: llama.cpp's ids against those of tokenizer.json, special ids, chat template."""

import json
import logging
import re
import shutil

import pytest
from gguf import GGUFReader
from llama_cpp import llama_cpp, post, token_ids
from tiny_export import make_export
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from megamm.common.errors import UserError
from megamm.convert.extras.gguf import write_gguf

TEXTS = [
    "It's 12345 things\n\n  é!\t日本 🙂 WE'LL see 3.14159, isn't it?   \n x",
    "hello hello world 2024-01-02 ½ ² ٣٤",
    "tab\tand  spaces   end  ",
    "\r\n\r\nnew\nline '",
    "e\u0301 n\u0303 decomposed",
    "<s>hi</s> <tool>x</tool>",
    "don'T I'LL \u017f 한국어 텍스트 ไทย عربى",
    "…—“quotes” x\u00a0y\u3000z",
    "",
]
LLAMA3 = GGUF_PRE_TOKENIZER_SPLITS["llama-bpe"]
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"


def split(pattern, behavior="isolated"):
    steps = [pre_tokenizers.Split(Regex(pattern), behavior), pre_tokenizers.ByteLevel(False, use_regex=False)]
    return pre_tokenizers.Sequence(steps)


KINDS = {  # llama.cpp's name: pre_tokenizer, ignore_merges
    "gpt-2": (pre_tokenizers.ByteLevel(False), False),
    "llama-bpe": (split(LLAMA3), True),
    "smaug-bpe": (split(LLAMA3), False),
    "qwen2": (split(LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")), False),
    "smollm": (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]),
        False,
    ),
}
FORMS = {"plain": "$A", "bos": "<s> $A", "bos and eos": "<s> $A </s>"}


def write_tokenizer(export, kind, form="$A"):
    """Write a tokenizer of a kind; its last 15 words have no merges, so only ignore_merges finds them."""
    pre_tokenizer, ignore_merges = KINDS[kind]
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 9, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=form, pair="$A $B", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    values = json.loads(tokenizer.to_str())
    values["model"]["merges"] = values["model"]["merges"][:-15]
    (export / "tokenizer.json").write_text(json.dumps(values))
    own = {"tokenizer_class": "TokenizersBackend", "bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (export / "tokenizer_config.json").write_text(json.dumps(own))
    (export / "chat_template.jinja").unlink(missing_ok=True)
    return values


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_export(tmp_path_factory.mktemp("tokenizer"), train=2, heldout=1)


@pytest.fixture
def export(original, tmp_path):
    return shutil.copytree(original, tmp_path / "export")


def read(file):
    return {key: field.contents() for key, field in GGUFReader(file).fields.items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_gives_the_ids_of_every_accepted_kind(export, tmp_path, kind, form):
    write_tokenizer(export, kind, FORMS[form])
    write_gguf(export, tmp_path / "m.gguf")
    tokenizer = Tokenizer.from_file(str(export / "tokenizer.json"))
    server = llama_cpp(tmp_path / "m.gguf")
    for text in TEXTS:
        assert token_ids(server, text) == tokenizer.encode(text).ids, text
    values = read(tmp_path / "m.gguf")
    assert values["tokenizer.ggml.pre"] == kind
    flags = [values[f"tokenizer.ggml.add_{name}_token"] for name in ("bos", "eos")]
    assert flags == ["bos" in form, "eos" in form]
    if form != "plain":
        assert values["tokenizer.ggml.bos_token_id"] == 0
    if "eos" in form:
        assert values["tokenizer.ggml.eos_token_id"] == 1


def test_the_chat_template_is_llama_cpps(export, tmp_path):
    write_tokenizer(export, "gpt-2", FORMS["bos"])
    write_gguf(export, tmp_path / "m.gguf")
    assert read(tmp_path / "m.gguf")["tokenizer.chat_template"] == TEMPLATE
    messages = [{"role": "user", "content": "hello"}]
    expected = AutoTokenizer.from_pretrained(export).apply_chat_template(messages)["input_ids"]
    server = llama_cpp(tmp_path / "m.gguf")
    assert token_ids(server, post(server, "apply-template", {"messages": messages})["prompt"]) == expected
    (tmp_path / "m.gguf").unlink()
    config = json.loads((export / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "tools"}]
    (export / "tokenizer_config.json").write_text(json.dumps(config))
    assert AutoTokenizer.from_pretrained(export).chat_template == {"default": TEMPLATE, "tool_use": "tools"}
    write_gguf(export, tmp_path / "m.gguf")
    values = read(tmp_path / "m.gguf")
    assert values["tokenizer.chat_template"] == TEMPLATE
    assert values["tokenizer.chat_template.tool_use"] == "tools"


def test_all_ids_that_end_a_text_are_written(export, tmp_path):
    """As transformers' generate does, generation_config.json is used where it names them."""
    (export / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7, 9]}))
    write_gguf(export, tmp_path / "m.gguf")
    values = read(tmp_path / "m.gguf")
    assert [values[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")] == [5, 7, 9]
    (export / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7, 9, 11]}))
    with pytest.raises(UserError, match=r"4 ids end a text \(5, 7, 9, 11\), GGUF holds 3"):
        write_gguf(export, tmp_path / "n.gguf")
    (export / "generation_config.json").unlink()
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    with pytest.raises(UserError, match="no eos_token_id"):
        write_gguf(export, tmp_path / "n.gguf")


def test_an_id_of_minus_1_is_none(export, tmp_path):
    """Configs of the first Llamas have pad_token_id -1."""
    config = json.loads((export / "config.json").read_text())
    ids = {"pad_token_id": -1, "bos_token_id": -1, "eos_token_id": [-1, 5]}
    (export / "config.json").write_text(json.dumps(config | ids))
    (export / "generation_config.json").unlink()
    write_tokenizer(export, "gpt-2")
    write_gguf(export, tmp_path / "m.gguf")
    values = read(tmp_path / "m.gguf")
    assert values["tokenizer.ggml.eos_token_id"] == 5
    assert not values.keys() & {f"tokenizer.ggml.{name}_token_id" for name in ("bos", "padding", "eot")}


def test_tokens_without_a_row_are_named(export, tmp_path, caplog):
    values = write_tokenizer(export, "gpt-2")
    rows = json.loads((export / "config.json").read_text())["vocab_size"]
    more = {"id": rows, "content": "<surplus>", "special": True, "normalized": False}
    values["added_tokens"].append(more | dict.fromkeys(("single_word", "lstrip", "rstrip"), False))
    (export / "tokenizer.json").write_text(json.dumps(values))
    with caplog.at_level(logging.WARNING):
        write_gguf(export, tmp_path / "m.gguf")
    assert "left out of the GGUF vocabulary: <surplus>" in caplog.text
    assert len(read(tmp_path / "m.gguf")["tokenizer.ggml.tokens"]) == rows
    values["added_tokens"].pop()
    values["model"]["vocab"]["beyond"] = rows + 1
    (export / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=f"the model has {rows} rows, but 'beyond' is token {rows + 1}"):
        write_gguf(export, tmp_path / "n.gguf")


def change(values, path, value):
    """Set a value below a dotted path, a copy of all others."""
    values = json.loads(json.dumps(values))
    part = values
    *above, last = path.split(".")
    for key in above:
        part = part[int(key) if key.isdigit() else key]
    part[last] = value
    return values


SENTENCEPIECE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]}
BYTES = json.loads(pre_tokenizers.ByteLevel(True).__getstate__())


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("model", UNIGRAM, "Unigram instead of BPE"),
        ("model.byte_fallback", True, r"BPE of SentencePiece \(byte_fallback\)"),
        ("model.continuing_subword_prefix", "##", "continuing_subword_prefix = '##'"),
        ("model.dropout", 0.1, r"dropout = 0\.1"),
        ("model.ignore_merges", True, "ignore_merges = True with the split of GPT-2"),
        ("pre_tokenizer", None, "pre_tokenizer None"),
        ("pre_tokenizer", SENTENCEPIECE, "pre_tokenizer Metaspace"),
        ("pre_tokenizer", BYTES, "pre_tokenizer ByteLevel"),  # with add_prefix_space
        ("pre_tokenizer", json.loads(split(LLAMA3, "removed").__getstate__()), "pre_tokenizer Split, ByteLevel"),
        ("normalizer", {"type": "Lowercase"}, r"normalises text \(Lowercase\)"),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFC"}]}, r"\(NFC\).*add --without-normalizer"),
        ("added_tokens.0.lstrip", True, "lstrip of the token '<s>'"),
    ],
)  # fmt: skip
def test_other_tokenizers_are_refused_by_name(export, tmp_path, path, value, named):
    values = write_tokenizer(export, "gpt-2")
    (export / "tokenizer.json").write_text(json.dumps(change(values, path, value)))
    with pytest.raises(UserError) as raised:
        write_gguf(export, tmp_path / "m.gguf")
    message = f"{raised.value} {raised.value.remedy}"
    assert re.search(named, message), message
    assert "\n" not in message and not (tmp_path / "m.gguf").exists()


def test_a_tokenizer_of_sentencepiece_alone_is_one_line(export, tmp_path):
    (export / "tokenizer.json").unlink()
    (export / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    with pytest.raises(UserError, match=r"SentencePiece cannot be written as GGUF.*tokenizer\.model"):
        write_gguf(export, tmp_path / "m.gguf")


def test_without_normalizer_composed_text_has_the_same_ids(export, tmp_path):
    values = write_tokenizer(export, "qwen2")
    (export / "tokenizer.json").write_text(json.dumps(values | {"normalizer": {"type": "NFC"}}))
    write_gguf(export, tmp_path / "m.gguf", without_normalizer=True)
    tokenizer = Tokenizer.from_file(str(export / "tokenizer.json"))
    server = llama_cpp(tmp_path / "m.gguf")
    assert token_ids(server, TEXTS[0]) == tokenizer.encode(TEXTS[0]).ids
    assert token_ids(server, TEXTS[4]) != tokenizer.encode(TEXTS[4]).ids  # decomposed: why it is refused


def test_two_tokens_before_a_text_are_refused(export, tmp_path):
    write_tokenizer(export, "gpt-2", "<s> <s> $A")
    with pytest.raises(UserError, match="adds 2 tokens before a text and 0 after it"):
        write_gguf(export, tmp_path / "m.gguf")


def test_training_reads_tokenizer_json_and_so_does_the_file(tmp_path, caplog):
    """For model_type qwen2, transformers puts Qwen's split in place of the one in tokenizer.json."""
    export = make_export(tmp_path, train=2, heldout=1, qk_norm=False, qkv_bias=True)
    write_tokenizer(export, "gpt-2")
    with caplog.at_level(logging.WARNING):
        write_gguf(export, tmp_path / "m.gguf")
    assert "transformers reads it as Qwen2Tokenizer" in caplog.text
    tokenizer = Tokenizer.from_file(str(export / "tokenizer.json"))
    server = llama_cpp(tmp_path / "m.gguf")
    for text in TEXTS:
        assert token_ids(server, text) == tokenizer.encode(text).ids, text
