"""The visual codec: causality in time, real training on tiny shapes, recomputed figures, damaged folders."""

import json
import logging

import numpy as np
import pytest
import torch
from codec_data import as_bytes, shape_picture, shape_video, write_source, write_videos
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage.metrics import structural_similarity
from tiny_run import megamm
from typer.testing import CliRunner

from megamm.cli import app
from megamm.common.device import Device
from megamm.common.errors import UserError
from megamm.modalities.image import ImageModality
from megamm.modalities.video import VideoModality
from megamm.shards.folder import ShardWriter
from megamm.tokenizers.io import save_codec
from megamm.tokenizers.load import load_visual_codec
from megamm.tokenizers.training_loop import Training
from megamm.tokenizers.visual.model import VisualCodec, VisualCodecConfig, to_pixels
from megamm.tokenizers.visual.train import LUMA, ClipMix, VisualData, evaluate, read_samples, ssim, train_visual_codec

CPU = Device(torch.device("cpu"), "gloo")
CONFIG = VisualCodecConfig(image_size=32, width=32, decoder_depth=1, levels=(5, 4, 4), max_frames=9)
TRAINING = Training(steps=80, batch_size=16, learning_rate=4e-3, seed=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = write_source(tmp_path_factory.mktemp("shards") / "shapes", train=150, heldout=30)
    return write_videos(folder, train=20, heldout=5)


@pytest.fixture(scope="module")
def trained(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("codec") / "visual"
    return folder, train_visual_codec([source], folder, CONFIG, TRAINING, CPU)


def random_codec(**sizes):
    """Return a codec whose every weight matters: none is zero, as some are before training."""
    torch.manual_seed(0)
    codec = VisualCodec(VisualCodecConfig(**{"image_size": 16, "width": 16, "levels": (7, 5, 5), **sizes}))
    for weight in codec.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return codec


def random_frames(*shape, seed=0):
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_no_id_depends_on_a_later_frame(steps):
    codec, frames = random_codec(frames_per_step=steps), random_frames(2, 1 + 4 * steps, 16, 16)
    ids = codec.encode(frames).unflatten(1, (5, -1))
    for changed in range(frames.shape[1]):
        other = frames.clone()
        other[:, changed] = 255 - other[:, changed]
        latent = -(-changed // steps)
        found = codec.encode(other).unflatten(1, (5, -1))
        assert torch.equal(found[:, :latent], ids[:, :latent])
        assert not torch.equal(found[:, latent], ids[:, latent])
    assert not torch.equal(found[:, latent], ids[:, latent])


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_no_decoded_frame_depends_on_a_later_id(steps):
    codec = random_codec(frames_per_step=steps)
    ids = torch.randint(0, codec.codebook_size, (2, 5, 4), generator=torch.Generator().manual_seed(1))
    frames = codec.decode(ids.flatten(1))
    assert frames.shape == (2, 1 + 4 * steps, 16, 16, 3)
    for changed in range(5):
        other = ids.clone()
        other[:, changed] = (other[:, changed] + 1) % codec.codebook_size
        first = 0 if changed == 0 else 1 + (changed - 1) * steps
        found = codec.decode(other.flatten(1))
        assert torch.equal(found[:, :first], frames[:, :first])
        for frame in range(first, first + (steps if changed else 1)):
            assert not torch.equal(found[:, frame], frames[:, frame])


def test_earlier_frames_matter_through_the_temporal_convolutions():
    codec, frames = random_codec(frames_per_step=2), random_frames(1, 9, 16, 16)
    other = frames.clone()
    other[:, 2] = 255 - other[:, 2]  # of latent frame 1, of 0 to 4
    with torch.no_grad():
        differs = (codec.encoder(frames) != codec.encoder(other)).flatten(2).any(2)[0]
    assert differs.tolist() == [False, True, True, True, False]


def test_a_video_read_as_it_comes_gives_the_ids_and_frames_of_the_whole():
    codec, frames = random_codec(), random_frames(3, 17, 16, 16)
    ids = codec.encode(frames)
    decoded = codec.decode(ids)
    for latent in range(1, 6):
        length, tokens = 1 + 4 * (latent - 1), 4 * latent
        assert torch.equal(codec.encode(frames[:, :length]), ids[:, :tokens])  # length 1: an image
        close = codec.decode(ids[:, :tokens]).int() - decoded[:, :length].int()
        assert close.abs().max() <= 1  # where a value is on the edge between two codes


def test_the_first_patch_is_the_first_frame_repeated_by_plain_arithmetic():
    codec, frames = random_codec(), random_frames(2, 5, 16, 16)
    encoder = codec.encoder
    long = torch.cat([frames[:, :1]] * 3 + [frames], 1).numpy().astype(float) / 127.5 - 1
    patches = long.reshape(2, 2, 4, 2, 8, 2, 8, 3).transpose(0, 1, 3, 5, 7, 2, 4, 6).reshape(2, 2, 2, 2, -1)
    expected = patches @ encoder.embed.weight.detach().numpy().T + encoder.embed.bias.detach().numpy()
    encoder.spatial, encoder.temporal, encoder.head = torch.nn.ModuleList(), torch.nn.ModuleList(), torch.nn.Identity()
    np.testing.assert_allclose(encoder(frames).detach().numpy(), expected, rtol=1e-4, atol=1e-4)


def test_training_lowers_the_heldout_loss_and_raises_psnr(trained, source):
    folder, last = trained
    torch.manual_seed(TRAINING.seed)
    images, videos = read_samples([source], "heldout", CONFIG)
    untrained = evaluate(VisualCodec(CONFIG), images, videos, CPU.torch_device)
    record = json.loads((folder / "training.json").read_text())
    first = record["heldout"][0]
    assert (record["train_images"], record["train_videos"], record["heldout_videos"]) == (150, 20, 5)
    for kind, samples in (("image", images), ("video", videos)):
        assert last[f"{kind}_loss"] < 0.8 * first[f"{kind}_loss"] < 0.8 * untrained[f"{kind}_loss"]
        assert last[f"{kind}_psnr_db"] > first[f"{kind}_psnr_db"] > untrained[f"{kind}_psnr_db"]
        assert last[f"{kind}_ssim"] > untrained[f"{kind}_ssim"]
        pixels = np.stack(samples).astype(float)
        mean = 10 * np.log10(255**2 / np.square(pixels - pixels.mean(axis=0)).mean())
        assert last[f"{kind}_psnr_db"] > mean + 0.5  # it distinguishes the samples


def test_the_reported_figures_are_those_of_the_saved_codec(trained, source):
    """Recompute the figures with numpy and scikit-image, without the training code."""
    folder, report = trained
    image, video = ImageModality.load(folder), VideoModality.load(folder)
    pictures = [image.read_media(as_bytes(shape_picture(n)[0]), "png") for n in range(10_000, 10_030)]
    shards = read_samples([source], "heldout", CONFIG)[1]
    counts = np.zeros(80)
    for name, modality, media in (("image", image, pictures), ("video", video, shards)):
        ids = modality.encode(media)
        pairs = [(m, modality.decode(i)) for m, i in zip(media, ids, strict=True)]
        mse = np.mean([np.square(made.astype(float) - m).mean() for m, made in pairs])
        assert report[f"{name}_psnr_db"] == pytest.approx(10 * np.log10(255**2 / mse), abs=1e-3)
        frames = [
            p for m, made in pairs for p in zip(m.reshape(-1, 32, 32, 3), made.reshape(-1, 32, 32, 3), strict=True)
        ]
        assert report[f"{name}_ssim"] == pytest.approx(np.mean([reference_ssim(*p) for p in frames]), abs=1e-6)
        counts += np.bincount(np.concatenate(ids), minlength=80)
    p = counts[counts > 0] / counts.sum()
    assert report["codes_used"] == pytest.approx((counts > 0).mean())
    assert report["perplexity"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)


def reference_ssim(a, b):
    """Call scikit-image with the settings of the paper."""
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    return structural_similarity(a @ np.array(LUMA), b @ np.array(LUMA), **options)


@pytest.mark.parametrize("shape", [(11, 11), (16, 33), (48, 48)])
def test_ssim_is_that_of_scikit_image(shape):
    clean = random_frames(3, *shape)
    noisy = (clean.int() + torch.randint(-40, 40, clean.shape)).clamp(0, 255).to(torch.uint8)
    pairs = [(clean, noisy), (clean, clean), (clean, 255 - clean), (clean, torch.zeros_like(clean))]
    for a, b in pairs:
        expected = [reference_ssim(x, y) for x, y in zip(a.numpy(), b.numpy(), strict=True)]
        np.testing.assert_allclose(ssim(a, b).numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.everything
def test_one_seed_one_codec_bit_for_bit_and_another_seed_another(source, tmp_path):
    for name, seed in {"a": 1, "b": 1, "c": 2}.items():
        training = Training(steps=6, batch_size=16, learning_rate=4e-3, seed=seed)
        train_visual_codec([source], tmp_path / name, CONFIG, training, CPU)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c
    ids = [ImageModality.load(tmp_path / name).codec_id for name in "abc"]
    assert ids[0] == ids[1] != ids[2] and all(len(i) == 12 for i in ids)


def test_a_batch_mixes_images_and_clips_by_number_and_epoch_alone():
    images = [np.full((16, 16, 3), n, np.uint8) for n in range(30)]
    videos = [np.stack([np.full((16, 16, 3), 100 + 20 * v + f, np.uint8) for f in range(13)]) for v in range(4)]
    videos.append(videos[0][:5])
    data = VisualData(images, videos, CONFIG.model_copy(update={"max_frames": 17}), ClipMix(0.25, 11))
    assert len(data) == 40
    seen = set()
    for epoch in range(3):
        ones, fives, nines = data.batch(list(range(40)), epoch)
        assert (len(ones), len(fives), len(nines)) == (30, 2, 8) and nines.shape[1:] == (9, 16, 16, 3)
        again = data.batch(list(range(40)), epoch)
        assert all(torch.equal(a, b) for a, b in zip((ones, fives, nines), again, strict=True))
        assert torch.equal(nines[:, :, 0, 0, 0].diff(dim=1), torch.ones(8, 8))  # consecutive frames
        seen |= set(nines[:, 0, 0, 0, 0].tolist())
    assert len(seen) > 8  # other parts of the videos in other epochs
    one_a_time = VisualData(images[:3], videos[:4], CONFIG, ClipMix(0.25, 1))
    clips = [one_a_time.batch([3], epoch)[0][0, 0, 0, 0, 0].item() for epoch in range(8)]
    assert [(c - 100) // 20 for c in clips] == [0, 1, 2, 3, 0, 1, 2, 3]  # all the videos, epoch by epoch
    assert len(VisualData([], videos, CONFIG, ClipMix())) == 5
    assert len(VisualData(images, [], CONFIG, ClipMix())) == 30


def test_the_loss_is_the_mean_over_images_and_clips_alike():
    codec = random_codec()
    image, clips = random_frames(3, 1, 16, 16), random_frames(2, 5, 16, 16, seed=1)
    each = [codec(frames[i : i + 1]) for frames in (image, clips) for i in range(len(frames))]
    assert torch.allclose(codec(image, clips), torch.stack(each).mean(), rtol=1e-5)
    for frames, loss in ((image, codec(image)), (clips, codec(clips))):
        pixels, _ = codec.reconstruct(frames)
        assert torch.allclose(loss, (pixels - to_pixels(frames)).square().mean())


def test_forward_and_encode_then_decode_agree(trained):
    codec, _ = load_visual_codec(trained[0])
    frames = torch.from_numpy(np.stack([shape_video(n) for n in range(4)]))
    for part in (frames, frames[:, :1]):
        with torch.no_grad():
            reconstruction, ids = codec.reconstruct(part)
        assert torch.equal(ids, codec.encode(part))
        decoded = to_pixels(codec.decode(ids))
        assert (decoded - reconstruction.clamp(-1, 1)).abs().max() <= 0.5 / 127.5 + 1e-4


def test_gradients_reach_every_weight_from_images_and_from_clips():
    """Batches of images only, too: ranks whose share of a batch has no clip must not wait for a gradient."""
    for length in (1, 5):
        codec = random_codec()
        codec(random_frames(2, length, 16, 16)).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in codec.parameters())
        is_seen = codec.encoder.embed.weight.grad.abs().sum(0) > 0
        assert is_seen.all()


def test_videos_alone_and_bf16_computation_train_too(tmp_path):
    write_videos(tmp_path / "films", train=6, heldout=2)
    training = Training(steps=3, batch_size=4, learning_rate=1e-3, seed=0)
    report = train_visual_codec([tmp_path / "films"], tmp_path / "codec", CONFIG, training, CPU, torch.bfloat16)
    assert "image_psnr_db" not in report and report["video_psnr_db"] > 0
    assert {t.dtype for t in load_file(tmp_path / "codec" / "model.safetensors").values()} == {torch.float32}


def test_a_collapsed_codebook_is_warned_of(tmp_path, caplog):
    for split in ("train", "heldout"):
        with ShardWriter(tmp_path / "white" / split / "image") as writer:
            for n in range(4):
                writer.add(f"s{n}", "png", as_bytes(Image.new("RGB", (32, 32), "white")))
    training = Training(steps=2, batch_size=4, learning_rate=1e-3, seed=0)
    with caplog.at_level(logging.WARNING, logger="megamm"):
        train_visual_codec([tmp_path / "white"], tmp_path / "codec", CONFIG, training, CPU)
    assert "collapsed" in caplog.text


@pytest.mark.parametrize("damage", ["cut weights", "other shapes", "missing tensor", "bad json", "other model", "size"])
def test_a_damaged_or_foreign_folder_is_a_user_error(tmp_path, damage):
    save_codec(VisualCodec(CONFIG), tmp_path)
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
        load_visual_codec(tmp_path)
    assert "\n" not in str(error.value)


def test_two_ranks_that_share_images_and_clips_unevenly_train_the_codec_of_one(source, tmp_path):
    options = ["--image-size", "32", "--width", "16", "--encoder-depth", "0", "--decoder-depth", "0", "--device", "cpu"]
    options += ["--steps", "3", "--batch-size", "4", "--seed", "1", "--learning-rate", "1e-3", "--clip-share", "0.4"]
    for ranks in (1, 2):
        done = megamm("tokenizer", "train", "visual", source, "--to", tmp_path / f"{ranks}", *options, "--nproc", ranks)
        assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in "12")
    for name, weights in one.items():
        assert torch.allclose(weights, two[name], rtol=0, atol=1e-5), name


def test_wrong_use_is_refused_and_leaves_nothing(source, trained, tmp_path):
    with pytest.raises(UserError, match="already exists"):
        train_visual_codec([source], trained[0], CONFIG, TRAINING, CPU)
    with pytest.raises(UserError, match="no image data found"):
        train_visual_codec([tmp_path], tmp_path / "codec", CONFIG, TRAINING, CPU)
    with pytest.raises(UserError, match="share between 0 and 1"):
        ClipMix(share=1.0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ids", [np.zeros((1, 15)), np.zeros((1, 0)), np.full((1, 16), 80), np.full((1, 16), -1)])
def test_ids_that_are_no_frames_are_refused(ids):
    with pytest.raises(ValueError, match="ids"):
        VisualCodec(CONFIG).decode(torch.from_numpy(ids).long())


def test_frames_that_the_codec_cannot_take_are_refused():
    with pytest.raises(ValueError, match=r"T = 1 \+ a multiple"):
        VisualCodec(CONFIG).encode(random_frames(1, 4, 32, 32))


def test_the_command(source, tmp_path):
    sizes = ["--image-size", "32", "--width", "16", "--levels", "4,4", "--steps", "3", "--batch-size", "8"]
    command = ["tokenizer", "train", "visual", str(source), "--to", str(tmp_path / "c"), "--device", "cpu", *sizes]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "16 tokens per image or latent frame, 16 codes" in result.output and "video_ssim" in result.output
    assert ImageModality.load(tmp_path / "c").vocabulary_size == 16
    wrong = CliRunner().invoke(app, [*command[:-1], "8", "--image-size", "30"])
    assert isinstance(wrong.exception, UserError) and "multiple of downsample" in str(wrong.exception)
