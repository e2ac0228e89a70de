"""Metrics of images, sounds, clouds and videos against other implementations, brute force and closed forms."""

import numpy as np
import pytest
import torch
from skimage import data as pictures
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from megamm.common.errors import UserError
from megamm.evaluation import media_metrics as media
from megamm.evaluation import set_metrics
from megamm.evaluation.extractors import LITE0, PIXELS, image_network
from megamm.evaluation.media_metrics import Measure
from megamm.evaluation.similarity import caption_similarity, clip_score, speaker_similarity
from megamm.evaluation.statistics import Unmeasurable

MEASURE = Measure()
RNG = np.random.default_rng(0)


def _image(size=32):
    return RNG.integers(0, 256, (size, size, 3), dtype=np.uint8)


def _speech(rate=16_000, seconds=2.0):
    """Return noise with the slow envelope of syllables, which PESQ and STOI take for speech."""
    t = np.arange(int(rate * seconds)) / rate
    tone = sum(np.sin(2 * np.pi * f * t) / k for k, f in enumerate((180, 400, 900, 2100), 1))
    return (0.3 * tone * (0.55 + 0.45 * np.sin(2 * np.pi * 4 * t))).astype(np.float32)


def test_psnr_and_ssim_equal_scikit_image():
    a, b = _image(), _image()
    b = (a.astype(int) * 3 // 4 + b // 4).astype(np.uint8)
    assert media.psnr(a, b, MEASURE) == pytest.approx(peak_signal_noise_ratio(a, b))
    luma = [image.astype(float) @ [0.299, 0.587, 0.114] for image in (a, b)]
    theirs = structural_similarity(
        *luma, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
    )[1]
    # scikit-image also averages positions at the border, where the window does not fit.
    assert media.ssim(a, b, MEASURE) == pytest.approx(theirs[5:-5, 5:-5].mean(), rel=1e-5)
    assert media.psnr(a, a, MEASURE) == pytest.approx(148.13, abs=0.01) and media.ssim(a, a, MEASURE) == 1.0


def test_psnr_and_ssim_of_videos_are_over_the_frames_of_the_shorter_one():
    a, b = np.stack([_image() for _ in range(3)]), np.stack([_image() for _ in range(2)])
    assert media.ssim(a, b, MEASURE) == pytest.approx(np.mean([media.ssim(a[i], b[i], MEASURE) for i in range(2)]))
    error = np.mean([(a[i].astype(float) - b[i]) ** 2 for i in range(2)])
    assert media.psnr(a, b, MEASURE) == pytest.approx(10 * np.log10(255**2 / error))


def test_pesq_and_stoi_equal_torchmetrics():
    from torchmetrics.functional.audio.pesq import perceptual_evaluation_speech_quality
    from torchmetrics.functional.audio.stoi import short_time_objective_intelligibility

    real = _speech()
    made = (real + 0.05 * RNG.standard_normal(len(real))).astype(np.float32)
    tensors = torch.from_numpy(made), torch.from_numpy(real)
    found = media.pesq(made, real, MEASURE)
    assert found == pytest.approx(float(perceptual_evaluation_speech_quality(*tensors, 16_000, "wb")), abs=1e-4)
    # STOI works at 10 kHz: given that rate, neither side resamples.
    at_10k = Measure(sample_rate=10_000)
    wanted = float(short_time_objective_intelligibility(*tensors, 10_000))
    assert media.stoi(made, real, at_10k) == pytest.approx(wanted, abs=1e-4)
    assert 0.3 < wanted < 0.999 and media.stoi(real, real, at_10k) == pytest.approx(1.0, abs=1e-6)


def test_si_sdr_equals_torchmetrics():
    from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

    real = _speech()
    made = 0.3 * real + 0.05 * RNG.standard_normal(len(real)).astype(np.float32)
    theirs = scale_invariant_signal_distortion_ratio(torch.from_numpy(made).double(), torch.from_numpy(real).double())
    assert media.si_sdr(made, real, MEASURE) == pytest.approx(float(theirs), abs=1e-3)
    assert media.si_sdr(7 * made, real, MEASURE) == pytest.approx(media.si_sdr(made, real, MEASURE), abs=1e-4)


@pytest.mark.parametrize("metric", [media.pesq, media.stoi, media.si_sdr])
def test_sounds_that_cannot_be_measured(metric):
    real, silent = _speech(), np.zeros(32_000, dtype=np.float32)
    broken = real.copy()
    broken[100] = np.nan
    for made, other, reason in (
        (silent, real, "generated sound is silent"),
        (real, silent, "real sound is silent"),
        (broken, real, "not finite"),
        (real[:0], real, "without samples"),
    ):
        with pytest.raises(Unmeasurable, match=reason):
            metric(made, other, MEASURE)
    if metric is not media.si_sdr:
        with pytest.raises(Unmeasurable):
            metric(real[:1000], real[:1000], MEASURE)


def _clouds():
    clouds = []
    for n in (40, 30):
        normals = RNG.standard_normal((n, 3))
        normals /= np.linalg.norm(normals, axis=1, keepdims=True)
        clouds.append(np.concatenate([RNG.uniform(-1, 1, (n, 3)), normals, RNG.random((n, 3))], 1).astype(np.float32))
    return clouds


def test_cloud_metrics_equal_brute_force():
    a, b = _clouds()
    distances = np.linalg.norm(a[:, None, :3].astype(float) - b[None, :, :3], axis=2)
    there, back = distances.min(1), distances.min(0)
    measure = Measure(tau=0.3, voxels=4)
    assert media.chamfer(a, b, measure) == pytest.approx((there**2).mean() + (back**2).mean())
    precision, recall = (there <= 0.3).mean(), (back <= 0.3).mean()
    assert media.f_score(a, b, measure) == pytest.approx(2 * precision * recall / (precision + recall))
    cosines = np.abs(a[:, 3:6].astype(float) @ b[:, 3:6].T)
    wanted = (
        cosines[np.arange(40), distances.argmin(1)].mean() + cosines[distances.argmin(0), np.arange(30)].mean()
    ) / 2
    assert media.normal_consistency(a, b, measure) == pytest.approx(wanted, rel=1e-5)
    grids = []
    for cloud in (a, b):
        grid = np.zeros((4, 4, 4), dtype=bool)
        for x, y, z in cloud[:, :3]:
            grid[tuple(min(int((v + 1) * 2), 3) for v in (x, y, z))] = True
        grids.append(grid)
    assert media.voxel_iou(a, b, measure) == (grids[0] & grids[1]).sum() / (grids[0] | grids[1]).sum()
    assert media.chamfer(a, a, measure) == 0 and media.f_score(a, a, measure) == media.voxel_iou(a, a, measure) == 1
    far = a + 100
    assert media.f_score(a, far, measure) == 0


@pytest.mark.parametrize("metric", [media.chamfer, media.f_score, media.normal_consistency, media.voxel_iou])
def test_clouds_that_cannot_be_measured(metric):
    a, b = _clouds()
    with pytest.raises(Unmeasurable, match="without points"):
        metric(a[:0], b, MEASURE)
    b[3, 1] = np.nan
    with pytest.raises(Unmeasurable, match="not finite"):
        metric(a, b, MEASURE)


def test_video_metrics_by_hand():
    video = np.zeros((4, 2, 2, 3), dtype=np.uint8)
    video[1], video[2], video[3] = 51, 102, 255  # a fifth, two fifths, one
    assert media.flicker(video, None, MEASURE) == pytest.approx(1 - (0.2 + 0.2 + 0.6) / 3)
    assert media.motion(video, None, MEASURE) == pytest.approx(1 - (0.0 + 0.2) / 2)
    still = np.repeat(_image()[None], 5, 0)
    assert media.flicker(still, None, MEASURE) == media.motion(still, None, MEASURE) == 1
    features = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    half = np.sqrt(0.5)
    assert media.consistency(features) == pytest.approx(((0 + 0) / 2 + (half + half) / 2) / 2)
    for metric, least in ((media.flicker, 2), (media.motion, 3)):
        with pytest.raises(Unmeasurable, match="fewer than"):
            metric(video[: least - 1], None, MEASURE)
    with pytest.raises(Unmeasurable, match="without features"):
        media.consistency(np.zeros((3, 2)))


class _Given(torch.nn.Module):
    """Gives torchmetrics the features that it should use: the first pixels of each picture."""

    num_features = 6

    def forward(self, images):
        return images[:, :, 0, :2].flatten(1).double()


def _sets():
    made = RNG.normal(0.4, 0.2, (60, 6))
    return made, RNG.normal(0.5, 0.25, (50, 6)) @ RNG.normal(0, 0.5, (6, 6))


def _as_pictures(features):
    images = np.zeros((len(features), 3, 4, 4))
    images[:, :, 0, :2] = features.reshape(-1, 3, 2)
    return torch.from_numpy(images)


def test_fid_and_kid_equal_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    made, real = _sets()
    theirs = FrechetInceptionDistance(feature=_Given(), normalize=True, input_img_size=(3, 4, 4)).set_dtype(
        torch.float64
    )
    theirs.update(_as_pictures(real), real=True)
    theirs.update(_as_pictures(made), real=False)
    assert set_metrics.fid(made, real) == pytest.approx(float(theirs.compute()), rel=1e-6)
    equal = made[:50]
    theirs = KernelInceptionDistance(feature=_Given(), subsets=1, subset_size=50, normalize=True)
    theirs.update(_as_pictures(real), real=True)
    theirs.update(_as_pictures(equal), real=False)
    assert set_metrics.kid(equal, real) == pytest.approx(float(theirs.compute()[0]), rel=1e-6)


def test_fid_of_gaussians_and_bad_sets():
    made, real = _sets()
    assert set_metrics.fid(made, made) == pytest.approx(0, abs=1e-9)
    assert set_metrics.fid(made, made + 1) == pytest.approx(6)  # only the means differ, by 1 in each of 6
    few = RNG.normal(size=(3, 40))  # fewer samples than features: the covariance has no inverse
    assert np.isfinite(set_metrics.fid(few, few + 0.1))
    from scipy.linalg import sqrtm

    a, b = np.cov(made.T), np.cov(real.T)
    wanted = ((made.mean(0) - real.mean(0)) ** 2).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert set_metrics.fid(made, real) == pytest.approx(wanted)
    made[3, 2] = np.nan
    for metric in (set_metrics.fid, set_metrics.kid):
        with pytest.raises(Unmeasurable, match="not finite"):
            metric(made, real)
        with pytest.raises(Unmeasurable, match="at least 2"):
            metric(made[:1], real)
    with pytest.raises(Unmeasurable, match="at least 2"):
        set_metrics.inception_score(real[:1])


def test_inception_score_equals_torchmetrics():
    from torchmetrics.image.inception import InceptionScore

    logits, _ = _sets()
    theirs = InceptionScore(feature=_Given(), splits=1)
    theirs.update(_as_pictures(4 * logits))
    assert set_metrics.inception_score(4 * logits) == pytest.approx(float(theirs.compute()[0]), rel=1e-5)
    assert set_metrics.inception_score(np.zeros((9, 5))) == pytest.approx(1)
    assert set_metrics.inception_score(1000 * np.eye(5)) == pytest.approx(5)


def test_efficientnet_lite0_knows_pictures():
    network = image_network(LITE0)
    features, logits = network([pictures.chelsea(), pictures.coffee()])
    assert features.shape == (2, 1280) and logits.shape == (2, 1000)
    assert logits[0].argmax() in range(281, 288)  # cats
    assert logits[1].argmax() in (967, 504, 968, 969, 925)  # espresso, mugs, cups
    assert network.identity["name"] == LITE0 and len(network.identity["digest"]) == 12


def test_pixels_are_features():
    features, logits = image_network(PIXELS)([_image(16), _image(16)])
    assert features.shape == (2, 768) and logits is None


def test_an_image_folder_gives_the_features_of_transformers(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32)
    model = ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "tiny-vit")
    (tmp_path / "tiny-vit" / "preprocessor_config.json").write_text(
        '{"size": {"height": 32, "width": 32}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
    )
    image = _image()
    features, logits = image_network(str(tmp_path / "tiny-vit"))([image])
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1
    wanted = model(pixels, output_hidden_states=True)
    assert np.allclose(logits, wanted.logits.detach().numpy(), atol=1e-5)
    assert np.allclose(features, wanted.hidden_states[-1][:, 0].detach().numpy(), atol=1e-5)
    with pytest.raises(UserError, match="no such extractor"):
        image_network("nowhere")


def _tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "red": 1, "box": 2, "blue": 3, "?": 4}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", eos_token="?").save_pretrained(folder)


def test_caption_similarity_is_the_cosine_of_mean_states(tmp_path):
    from transformers import BertConfig, BertModel

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertModel(BertConfig(vocab_size=5, max_position_embeddings=8, **size)).eval()
    model.save_pretrained(tmp_path)
    _tokenizer(tmp_path)
    similarity = caption_similarity(tmp_path)
    a, b = (model(torch.tensor([ids])).last_hidden_state.mean(1) for ids in ([0, 1, 2], [0, 3, 2]))
    wanted = float(torch.nn.functional.cosine_similarity(a, b))
    assert similarity("a red box", "a blue box", "", MEASURE) == pytest.approx(wanted, abs=1e-5)
    assert similarity("a box", "a box", "", MEASURE) == pytest.approx(1)
    assert np.isfinite(similarity("a box " * 50, "a box", "", MEASURE))
    with pytest.raises(Unmeasurable, match="empty text"):
        similarity(" ", "a box", "", MEASURE)


def test_clip_score_is_that_of_the_model(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = CLIPConfig(
        text_config=size | {"vocab_size": 5, "max_position_embeddings": 8, "eos_token_id": 4, "bos_token_id": 0},
        vision_config=size | {"image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    model = CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    _tokenizer(tmp_path)
    found = clip_score(tmp_path)
    image = _image()
    mean, std = (np.float32(v) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = torch.from_numpy((image.astype(np.float32) / 255 - mean) / std).permute(2, 0, 1)[None]
    output = model(input_ids=torch.tensor([[0, 1, 2]]), pixel_values=pixels)
    cosine = float((output.logits_per_image / model.logit_scale.exp()).item())
    assert found(image, None, "a red box", MEASURE) == pytest.approx(100 * max(cosine, 0), abs=1e-3)
    with pytest.raises(Unmeasurable, match="no text"):
        found(image, None, "", MEASURE)


def test_speaker_similarity_is_one_of_a_sound_with_itself(tmp_path):
    from transformers import WavLMConfig, WavLMForXVector

    config = WavLMConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, xvector_output_dim=8,
        conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2, tdnn_dim=(8, 8, 8),
        tdnn_kernel=(5, 3, 1), tdnn_dilation=(1, 2, 1), num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    WavLMForXVector(config).save_pretrained(tmp_path)
    similarity = speaker_similarity(tmp_path)
    sound = _speech(seconds=0.6)
    assert similarity(sound, sound, "", MEASURE) == pytest.approx(1, abs=1e-6)
    assert similarity(3 * sound, sound, "", MEASURE) == pytest.approx(1, abs=1e-4)  # loudness does not count
    with pytest.raises(Unmeasurable, match="silent"):
        similarity(np.zeros_like(sound), sound, "", MEASURE)
    with pytest.raises(Unmeasurable, match="half a second"):
        similarity(sound[:100], sound, "", MEASURE)


def test_pictures_too_small_for_ssim():
    with pytest.raises(Unmeasurable, match="smaller than"):
        media.ssim(_image(8), _image(8), MEASURE)
    with pytest.raises(Unmeasurable, match="different sizes"):
        media.psnr(_image(8), _image(16), MEASURE)
