"""Adapters to visual codecs of transformers: the results of direct calls to transformers, images and videos."""

import numpy as np
import pytest
import torch
import transformers
from codec_data import as_bytes, shape_picture
from hf_models import SIDE, VISUAL, direct, load, make_folders, pictures

from megamm.common.errors import UserError
from megamm.modalities.image import ImageModality
from megamm.modalities.video import VideoModality
from megamm.tokenizers.hf.visual import VISUAL_ADAPTERS

GRID, TOKENS = 6, 36
"""Tokens of an image."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("hf"))


def direct_codes(model, name, clips):
    """Return codes [N, GRID, GRID] of clips uint8 [N, F, Y, X, 3], by the model's own call; an image is F = 1."""
    pixels = torch.from_numpy((clips.numpy().astype(np.float64) / 255 - 0.5) / 0.5).float().permute(0, 1, 4, 2, 3)
    if name != "emu3":
        return model.encode(pixels[:, 0]).image_tokens.view(-1, GRID, GRID)
    pixels = pixels[:, 0] if pixels.shape[1] == 1 else pixels
    return torch.stack(model.encode(pixels, [(SIDE, SIDE)] * len(pixels)).image_tokens).view(-1, GRID, GRID)


def as_uint8(pixels):
    """Convert pixels [N, 3, Y, X] in [-1, 1] to uint8 [N, Y, X, 3]."""
    return np.clip(np.rint((pixels.numpy() * 0.5 + 0.5) * 255), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def differ(made, expected):
    """Return the share of values that differ; none may differ by more than rounding a half."""
    difference = np.abs(made.numpy().astype(int) - expected.astype(int))
    assert difference.max() <= 1
    return (difference > 0).mean()


@pytest.mark.parametrize("name", VISUAL)
@torch.no_grad()
def test_images_are_those_of_transformers_called_directly(folders, name, caplog):
    codec, _ = load(folders, name)
    assert ("can only read images" in caplog.text) == (name == "chameleon")
    model = direct(folders, name)
    if name == "janus":  # a codebook of unit length, see below
        model.quantize.embedding.weight /= model.quantize.embedding.weight.norm(dim=1, keepdim=True)
    assert (codec.image_size, codec.grid_size, codec.codebook_size) == (SIDE, GRID, 64)
    images = pictures(11, 1)  # more than fit into one batch
    codes = torch.cat([direct_codes(model, name, image[None]) for image in images])
    ids = codec.encode(images)
    assert ids.shape == (11, TOKENS) and ids.dtype == torch.int64 and len(ids.unique()) > 20
    assert torch.equal(ids, codes.flatten(1))
    if name == "chameleon":
        with pytest.raises(UserError, match="cannot generate images"):
            codec.decode(ids)
        return
    pixels = model.decode(codes if name == "emu3" else ids)
    decoded = codec.decode(ids)
    assert decoded.shape == images.shape and decoded.dtype == torch.uint8 and decoded.float().std() > 5
    assert differ(decoded[:, 0], as_uint8(pixels)) < 1e-3


@pytest.mark.parametrize("name", VISUAL)
@torch.no_grad()
def test_videos_begin_with_an_image_and_never_depend_on_what_follows(folders, name):
    codec, _ = load(folders, name)
    step = 4 if name == "emu3" else 1
    assert (codec.frames_per_step, codec.frame_rate, codec.max_frames) == (step, 2 * step, 1 + 4 * step)
    videos = pictures(2, 1 + 3 * step)
    ids = codec.encode(videos)
    assert ids.shape == (2, 4 * TOKENS)
    assert torch.equal(ids[:, :TOKENS], codec.encode(videos[:, :1]))
    assert torch.equal(ids[:, : 2 * TOKENS], codec.encode(videos[:, : 1 + step]))
    model = direct(folders, name)
    if name != "janus":
        clips = videos[:, 1:].unflatten(1, (-1, step)).flatten(0, 1)
        assert torch.equal(ids[:, TOKENS:].flatten(), direct_codes(model, name, clips).flatten())
    if name != "chameleon":
        decoded = codec.decode(ids)
        assert decoded.shape == videos.shape
        assert torch.equal(decoded[:, : 1 + step], codec.decode(ids[:, : 2 * TOKENS]))
        assert torch.equal(decoded[:, :1], codec.decode(ids[:, :TOKENS]))
    if name == "emu3":
        last = model.decode(ids[:, 3 * TOKENS :].view(2, 1, GRID, GRID)).flatten(0, 1)
        assert differ(decoded[:, -4:].flatten(0, 1), as_uint8(last)) < 1e-3


@torch.no_grad()
def test_codes_of_janus_are_the_nearest_in_angle(folders):
    """The original normalises codes to unit length; transformers omits that when encoding."""
    codec, _ = load(folders, "janus")
    model, images = direct(folders, "janus"), pictures(3, 1)
    pixels = images[:, 0].permute(0, 3, 1, 2) / 127.5 - 1
    latents = model.quant_conv(model.encoder(pixels)).permute(0, 2, 3, 1).reshape(-1, 1, 4)
    nearest = torch.cosine_similarity(latents, model.quantize.embedding.weight[None], dim=2).argmax(1)
    assert torch.equal(codec.encode(images).flatten(), nearest)
    assert not torch.equal(direct_codes(model, "janus", images[:, 0, None]).flatten(), nearest)


@pytest.mark.parametrize("name", VISUAL)
def test_what_is_no_picture_is_refused(folders, name):
    codec, _ = load(folders, name)
    frames = [pictures(1, 1)[:, :0], pictures(1, 1)[:, :, :10], *([pictures(1, 3)] if name == "emu3" else [])]
    for wrong in frames:
        with pytest.raises(ValueError, match=r"are not 1 \+ n"):
            codec.encode(wrong)
    for ids in ([], [0] * (TOKENS - 1), [64] * TOKENS, [-1] * TOKENS):
        with pytest.raises(ValueError, match="ids"):
            codec.decode(torch.tensor([ids], dtype=torch.int64))


@pytest.mark.parametrize("name", VISUAL)
def test_both_modalities_take_the_folder(folders, name):
    image, video = ImageModality.load(folders[name]), VideoModality.load(folders[name])
    assert (image.vocabulary_size, image.tokens_per_item, image.stride, video.stride) == (64, TOKENS, TOKENS, TOKENS)
    assert image.codec_id == video.codec_id == load(folders, name)[1]
    picture = image.read_media(as_bytes(shape_picture(1)[0]), "png")
    (ids,) = image.encode([picture])
    clips = [np.stack([picture] * (1 + n * video.codec.frames_per_step)) for n in (2, 0)]
    longer, alone = video.encode(clips)
    assert longer.shape == (3 * TOKENS,) and alone.tolist() == longer[:TOKENS].tolist() == ids.tolist()
    if name != "chameleon":
        assert image.decode(ids).shape == (SIDE, SIDE, 3) and video.decode(longer).shape == clips[0].shape


def test_sizes_of_the_published_models():
    def sizes(config):
        found = VISUAL_ADAPTERS[config.model_type].sizes(config)
        return found.image_size, found.grid_size, found.codebook_size, found.frames_per_step

    assert sizes(transformers.Emu3VQVAEConfig()) == (512, 64, 32_768, 4)
    assert sizes(transformers.ChameleonVQVAEConfig()) == (512, 32, 8192, 1)
    assert sizes(transformers.JanusConfig().vq_config) == (384, 24, 16_384, 1)
