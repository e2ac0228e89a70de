"""Token caches: aligned with their media, readable by webdataset, deterministic, kept when complete."""

import io

import numpy as np
import pytest
import torch
import webdataset
from codec_data import shape_picture, write_source
from tokenizers import Tokenizer
from typer.testing import CliRunner

from megamm.cli import app
from megamm.common.errors import UserError
from megamm.data.tokenize.token_cache import cache_name, load_codecs, tokenize
from megamm.modalities.image import ImageModality
from megamm.modalities.text import TextModality
from megamm.shards.folder import ShardFolder, ShardWriter, tokens_from_bytes
from megamm.tokenizers.io import save_codec
from megamm.tokenizers.text.train import train_text_tokenizer
from megamm.tokenizers.visual.model import VisualCodec, VisualCodecConfig

TRAIN, HELDOUT, PER_SHARD = 300, 20, 128  # more samples than one batch, several shards, the last ones not full


@pytest.fixture
def source(tmp_path):
    return write_source(tmp_path / "shards" / "shapes", TRAIN, HELDOUT, PER_SHARD)


@pytest.fixture(scope="module")
def codecs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codecs")
    toy = write_source(folder / "toy", 20, 2)
    train_text_tokenizer([toy], folder / "text", vocabulary_size=270)
    (folder / "image").mkdir()
    torch.manual_seed(0)
    config = VisualCodecConfig(image_size=32, downsample=16, width=16, decoder_depth=0, encoder_depth=0)
    save_codec(VisualCodec(config), folder / "image")
    return {"text": TextModality.load(folder / "text"), "image": ImageModality.load(folder / "image")}, folder


def test_caches_are_aligned_with_their_media_tar_by_tar(source, codecs):
    caches = tokenize([source], list(codecs[0].values()))
    assert [(c.folder.parent.name, c.samples, c.kept) for c in caches] == [
        ("train", 300, False),
        ("heldout", 20, False),
    ] * 2
    for cache in caches:
        media = cache.folder.parent / cache.folder.name.partition(".")[0]
        tars = [p.name for p in sorted(media.glob("*.tar"))]
        assert tars == [p.name for p in sorted(cache.folder.glob("*.tar"))] and len(tars) in (1, 3)
        for tar in tars:
            both = [webdataset.WebDataset(str(f / tar), shardshuffle=False) for f in (media, cache.folder)]
            assert [s["__key__"] for s in both[0]] == [s["__key__"] for s in both[1]]


def test_the_cached_ids_are_those_of_the_codec(source, codecs):
    modalities, folder = codecs
    text, image = modalities["text"], modalities["image"]
    tokenize([source], [text, image])
    reference = Tokenizer.from_file(str(folder / "text" / "tokenizer.json"))
    cache = ShardFolder(source / "train" / cache_name(text))
    for i in (0, 127, 128, 255, 256, 299):
        ids = reference.encode(shape_picture(i)[1]).ids
        assert tokens_from_bytes(cache.read(i)).tolist() == ids and cache.tokens[i] == len(ids)
    tars = [str(p) for p in sorted((source / "train" / cache_name(image)).glob("*.tar"))]
    for sample in webdataset.WebDataset(tars, shardshuffle=False):
        number = int(sample["__key__"][1:])
        ids = np.load(io.BytesIO(sample["npy"]))
        assert ids.shape == (4,) and ids.dtype == np.uint16
        if number % 50 == 0:
            assert np.array_equal(ids, image.encode([np.asarray(shape_picture(number)[0])])[0])


def test_deterministic_and_kept_when_complete(source, codecs, tmp_path):
    modalities = list(codecs[0].values())
    first = tokenize([source], modalities)
    before = {p: p.stat().st_mtime_ns for c in first for p in c.folder.iterdir()}
    again = tokenize([source], modalities)
    assert all(c.kept for c in again) and [(c.folder, c.samples, c.tokens) for c in again] == [
        (c.folder, c.samples, c.tokens) for c in first
    ]
    assert before == {p: p.stat().st_mtime_ns for c in again for p in c.folder.iterdir()}
    twin = write_source(tmp_path / "twin", TRAIN, HELDOUT, PER_SHARD)
    tokenize([twin], modalities)
    for path in before:
        assert path.read_bytes() == (twin / path.relative_to(source)).read_bytes()


def test_a_cache_of_other_samples_is_named(source, codecs):
    text = codecs[0]["text"]
    with ShardWriter(source / "train" / cache_name(text)):
        pass
    with pytest.raises(UserError, match="does not match the samples"):
        tokenize([source], [text])


def test_an_unreadable_sample_is_named_and_no_cache_is_left(tmp_path, codecs):
    image, source = codecs[0]["image"], tmp_path / "bad"
    with ShardWriter(source / "train" / "image") as writer:
        writer.add("fine", "png", image.write_media(np.zeros((32, 32, 3), np.uint8)))
        writer.add("broken", "png", b"not an image")
    with pytest.raises(UserError, match="sample broken: not a PNG"):
        tokenize([source], [image])
    assert [p.name for p in (source / "train").iterdir()] == ["image"]


def test_a_source_without_a_modality_is_passed_over_but_not_all_of_them(source, codecs, tmp_path):
    with ShardWriter(tmp_path / "texts" / "train" / "text") as writer:
        writer.add("a", "txt", b"only text")
    modalities = list(codecs[0].values())
    caches = tokenize([source, tmp_path / "texts"], modalities)
    assert sum(c.folder.is_relative_to(tmp_path / "texts") for c in caches) == 1
    with pytest.raises(UserError, match="no visual shards"):
        tokenize([tmp_path / "texts"], modalities)


def test_the_command(source, codecs):
    folder = codecs[1]
    command = [
        "data",
        "tokenize",
        str(source),
        "--codec",
        f"text={folder / 'text'}",
        "--codec",
        f"visual={folder / 'image'}",
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert result.output.count("300 samples, 1200 tokens") == 1 and "(kept)" not in result.output
    assert CliRunner().invoke(app, command).output.count("(kept)") == 4


@pytest.mark.parametrize("codec", ["text", "smell=/tmp", "visual=/nowhere"])
def test_a_wrong_codec_argument_is_a_user_error(codec):
    with pytest.raises(UserError):
        load_codecs([codec], torch.device("cpu"))
