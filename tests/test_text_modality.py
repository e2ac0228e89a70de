"""The text tokenizer: lossless, trained on the train split only, and identical in transformers."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer
from typer.testing import CliRunner

from megamm.cli import app
from megamm.common.errors import UnreadableMedia, UserError
from megamm.modalities.text import TextModality
from megamm.shards.folder import ShardWriter
from megamm.tokenizers.text.train import train_text_tokenizer

NOUNS = ["red circle", "blue fish", "old house", "green tree with apples", "smiling face", "dog"]
HELDOUT_WORD = "zyzzyva"
STRINGS = [
    "",
    "a red circle",
    "  leading, double  spaces and a tail ",
    "line\nbreak\ttab\r\n",
    "Überraschung – naïve façade",
    "漢字かな交じり文",
    "عربى مع أرقام 123",
    "👩🏽‍🚀 family: 👨‍👩‍👧‍👦 flag: 🇳🇱",
    "e\u0301 is not \u00e9",
    "\u0001\u200b\ufeff\U0010ffff",
    "<|document_start|> <|endoftext|> [CLS]",
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "toy"
    for split, texts in (("train", NOUNS * 20), ("heldout", [HELDOUT_WORD] * 40)):
        with ShardWriter(folder / split / "text") as writer:
            for i, text in enumerate(texts):
                writer.add(f"{split}-{i}", "txt", f"a picture of a {text}".encode())
    return folder


@pytest.fixture(scope="module")
def trained(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("codec") / "text"
    train_text_tokenizer([source], folder, vocabulary_size=300)
    return folder


@pytest.mark.parametrize("string", STRINGS)
def test_every_string_survives_the_round_trip(trained, string):
    text = TextModality.load(trained)
    (ids,) = text.encode([string])
    assert ids.dtype == np.int64 and ids.ndim == 1
    assert ids.size == 0 or (ids.min() >= 0 and ids.max() < text.vocabulary_size)
    assert text.decode(ids) == string


def test_random_unicode_survives_and_transformers_agrees(trained):
    text, other = TextModality.load(trained), AutoTokenizer.from_pretrained(trained, local_files_only=True)
    rng = np.random.default_rng(0)
    points = rng.integers(1, 0x110000, (50, 40))
    strings = ["".join(chr(p) for p in row if not 0xD800 <= p < 0xE000) for row in points] + STRINGS
    for string, ids in zip(strings, text.encode(strings), strict=True):
        assert text.decode(ids) == string
        assert other(string, add_special_tokens=False)["input_ids"] == ids.tolist()
        assert other.decode(ids.tolist()) == string


def test_learns_from_the_train_split_and_never_from_the_heldout_one(trained):
    text = TextModality.load(trained)
    known, unknown = text.encode([" picture", f" {HELDOUT_WORD}"])
    assert len(known) == 1 and len(unknown) >= len(HELDOUT_WORD)


def test_training_is_deterministic_and_codec_id_follows_the_content(trained, source, tmp_path):
    train_text_tokenizer([source], tmp_path / "same", vocabulary_size=300)
    train_text_tokenizer([source], tmp_path / "smaller", vocabulary_size=280)
    ids = {name: TextModality.load(p).codec_id for name, p in {"same": tmp_path / "same", "first": trained}.items()}
    assert ids["same"] == ids["first"] and len(ids["same"]) == 12
    assert TextModality.load(tmp_path / "smaller").codec_id != ids["same"]
    assert TextModality.load(tmp_path / "smaller").vocabulary_size == 280


def test_special_tokens_of_a_foreign_tokenizer_cannot_be_injected_by_text(tmp_path):
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.enable_truncation(4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = TextModality.load(tmp_path)
    (ids,) = text.encode(["x<|endoftext|>"])
    assert len(ids) == len("x<|endoftext|>") and 256 not in ids and text.vocabulary_size == 257


def test_a_folder_without_tokenizer_json_is_loaded_through_transformers(tmp_path):
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "dog"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    text = TextModality.load(tmp_path)
    assert text.encode(["a red dog"])[0].tolist() == [5, 6, 7] and text.vocabulary_size == 8


def test_positions_count_up_together():
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    assert TextModality(tokenizer, "").positions(3).tolist() == [[0, 1, 2]] * 3


@pytest.mark.parametrize("data", [b"", b"  \n", b"\xff\xfe\x00", b"abc\xc3", b"PK\x03\x04\x00\x00"])
def test_bad_text_is_named(data):
    with pytest.raises(UnreadableMedia):
        TextModality.check_media(data, "txt")


def test_user_errors_name_the_place_and_leave_nothing(source, trained, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{}")
    for folder in (tmp_path / "missing", tmp_path / "broken", source):
        with pytest.raises(UserError, match=str(folder)):
            TextModality.load(folder)
    with pytest.raises(UserError, match="already exists"):
        train_text_tokenizer([source], trained)
    with pytest.raises(UserError, match="no text data found"):
        train_text_tokenizer([tmp_path / "nowhere"], tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken"]


def test_the_command(source, tmp_path):
    arguments = ["tokenizer", "train", "text", str(source), "--to", str(tmp_path / "t"), "--vocabulary", "280"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert TextModality.load(tmp_path / "t").vocabulary_size == 280
