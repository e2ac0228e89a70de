"""The image codec: real training on tiny shapes, its reported figures recomputed, its folder loaded and damaged."""

import json
import logging

import numpy as np
import pytest
import torch
from codec_data import as_bytes, shape_picture, write_source
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from megamm.cli import app
from megamm.codecs.folders import save_codec
from megamm.codecs.image import ImageCodec, ImageCodecConfig, to_pixels
from megamm.codecs.train import ImageTraining, evaluate, read_images, train_image_codec
from megamm.data.shards import ShardWriter
from megamm.errors import UserError
from megamm.modalities.image import ImageModality

CPU = torch.device("cpu")
CODEC = ImageCodecConfig(image_size=32, downsample=8, width=32, encoder_depth=1, decoder_depth=1, levels=(5, 4, 4))
TRAINING = ImageTraining(CODEC, steps=80, batch_size=16, learning_rate=4e-3, seed=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("shards") / "shapes", train=150, heldout=30)


@pytest.fixture(scope="module")
def trained(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("codec") / "image"
    return folder, train_image_codec([source], folder, TRAINING, CPU)


def test_training_lowers_the_heldout_loss_and_raises_psnr(trained, source):
    folder, last = trained
    torch.manual_seed(TRAINING.seed)
    untrained = evaluate(ImageCodec(CODEC), read_images([source], "heldout", 32), 0, CPU)
    first = json.loads((folder / "training.json").read_text())["heldout"][0]
    assert last.loss < 0.8 * first["loss"] < 0.8 * untrained.loss
    assert last.psnr_db > first["psnr_db"] > untrained.psnr_db
    pixels = read_images([source], "heldout", 32).numpy().astype(float)
    mean_image = 10 * np.log10(255**2 / np.square(pixels - pixels.mean(axis=0)).mean())
    assert last.psnr_db > mean_image + 1  # it tells the pictures apart


def test_the_reported_figures_are_those_of_the_saved_codec(trained, source):
    """Through the modality, in numpy, from the media bytes: nothing of the training code is reused."""
    folder, report = trained
    image = ImageModality.load(folder)
    media = [image.read_media(as_bytes(shape_picture(n)[0]), "png") for n in range(10_000, 10_030)]
    ids = image.encode(media)
    errors = [np.square(image.decode(i).astype(float) - m).mean() for i, m in zip(ids, media, strict=True)]
    assert report.psnr_db == pytest.approx(10 * np.log10(255**2 / np.mean(errors)), abs=1e-3)
    counts = np.bincount(np.concatenate(ids), minlength=80)
    p = counts[counts > 0] / counts.sum()
    assert report.codes_used == pytest.approx((counts > 0).mean())
    assert report.perplexity == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)


def test_one_seed_one_codec_bit_for_bit_and_another_seed_another(source, tmp_path):
    short = TRAINING.__class__(CODEC, steps=6, batch_size=16, learning_rate=4e-3, seed=1)
    other = TRAINING.__class__(CODEC, steps=6, batch_size=16, learning_rate=4e-3, seed=2)
    for name, training in {"a": short, "b": short, "c": other}.items():
        train_image_codec([source], tmp_path / name, training, CPU)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c
    ids = [ImageModality.load(tmp_path / name).codec_id for name in "abc"]
    assert ids[0] == ids[1] != ids[2] and all(len(i) == 12 for i in ids)


def test_forward_and_encode_then_decode_agree(trained):
    codec, _ = load_image_codec(trained[0])
    images = torch.from_numpy(np.stack([np.asarray(shape_picture(n)[0]) for n in range(4)]))
    with torch.no_grad():
        reconstruction, ids = codec(to_pixels(images))
    assert torch.equal(ids, codec.encode(images))
    decoded = to_pixels(codec.decode(ids))
    assert (decoded - reconstruction.clamp(-1, 1)).abs().max() <= 0.5 / 127.5 + 1e-4


def test_gradients_reach_the_encoder_through_the_quantiser():
    codec = ImageCodec(CODEC)
    reconstruction, _ = codec(torch.rand(2, 3, 32, 32))
    reconstruction.square().mean().backward()
    assert codec.encoder[1].weight.grad.abs().sum() > 0


def test_bf16_computation_trains_too(source, tmp_path):
    training = ImageTraining(CODEC, steps=4, batch_size=8, learning_rate=1e-3, seed=0)
    train_image_codec([source], tmp_path / "codec", training, CPU, torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "codec" / "model.safetensors").values()} == {torch.float32}


def test_a_collapsed_codebook_is_warned_of(tmp_path, caplog):
    from PIL import Image

    for split in ("train", "heldout"):
        with ShardWriter(tmp_path / "white" / split / "image") as writer:
            for n in range(4):
                writer.add(f"s{n}", "png", as_bytes(Image.new("RGB", (32, 32), "white")))
    training = ImageTraining(CODEC, steps=2, batch_size=4, learning_rate=1e-3, seed=0)
    with caplog.at_level(logging.WARNING, logger="megamm"):
        train_image_codec([tmp_path / "white"], tmp_path / "codec", training, CPU)
    assert "collapsed" in caplog.text


@pytest.mark.parametrize("damage", ["cut weights", "other shapes", "missing tensor", "bad json", "other model", "size"])
def test_a_damaged_or_foreign_folder_is_a_user_error(tmp_path, damage):
    save_codec(ImageCodec(CODEC), tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    tensors, values = load_file(weights), json.loads(config.read_text())
    if damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "other shapes":
        config.write_text(json.dumps(values | {"width": 16}))
    elif damage == "missing tensor":
        save_file(dict(list(tensors.items())[1:]), weights)
    elif damage == "bad json":
        config.write_text("{")
    elif damage == "other model":
        config.write_text('{"model_type": "llama", "hidden_size": 64}')
    else:
        config.write_text(json.dumps(values | {"image_size": 33}))
    with pytest.raises(UserError, match=str(tmp_path)) as error:
        load_image_codec(tmp_path)
    assert "\n" not in str(error.value)


def test_wrong_use_is_refused_and_leaves_nothing(source, trained, tmp_path):
    with pytest.raises(UserError, match="exists already"):
        train_image_codec([source], trained[0], TRAINING, CPU)
    with pytest.raises(UserError, match="no image to read"):
        train_image_codec([tmp_path], tmp_path / "codec", TRAINING, CPU)
    with pytest.raises(UserError, match="steps is 0"):
        ImageTraining(CODEC, steps=0, batch_size=1, learning_rate=1e-3, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_the_command(source, tmp_path):
    sizes = ["--image-size", "32", "--width", "16", "--levels", "4,4", "--steps", "3", "--batch-size", "8"]
    command = ["tokenizer", "train", "image", str(source), "--to", str(tmp_path / "c"), "--device", "cpu", *sizes]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "16 tokens an image of 16 codes" in result.output
    assert ImageModality.load(tmp_path / "c").vocabulary_size == 16
    wrong = CliRunner().invoke(app, [*command[:-1], "8", "--image-size", "30"])
    assert isinstance(wrong.exception, UserError) and "multiple of downsample" in str(wrong.exception)
