"""The audio codec: spectrogram against another implementation, ids, real training on chirps, figures."""

import json
import logging

import jiwer
import numpy as np
import pytest
import scipy
import torch
from audio_data import RATE, as_bytes, chirp, write_source
from transformers.audio_utils import mel_filter_bank, spectrogram
from typer.testing import CliRunner

from megamm.cli import app
from megamm.common.device import choose
from megamm.common.errors import UserError
from megamm.modalities.audio import AudioModality
from megamm.shards.folder import ShardWriter
from megamm.tokenizers.audio import metrics
from megamm.tokenizers.audio.metrics import TranscribedClip, evaluate, evaluate_waveforms, stft_distance
from megamm.tokenizers.audio.model import FLOOR, AudioCodec, AudioCodecConfig, LogMel
from megamm.tokenizers.audio.train import Crops, read_clips, train_audio_codec
from megamm.tokenizers.fsq import ResidualFSQ
from megamm.tokenizers.training_loop import COLLAPSED, Training

SIZES = dict(mels=40, codebooks=3, levels=(5, 4, 4), width=48, encoder_depth=1, decoder_depth=1)
CONFIG = AudioCodecConfig(**SIZES)
TRAINING = Training(steps=300, batch_size=8, learning_rate=4e-3, seed=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("shards") / "chirps", train=60, heldout=12)


@pytest.fixture(scope="module")
def trained(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("codec") / "audio"
    report = train_audio_codec(
        [source], folder, CONFIG, TRAINING, choose("cpu"), crop_seconds=0.4, heldout_seconds=99.0
    )
    return folder, report


@pytest.fixture(scope="module")
def codec():
    torch.manual_seed(0)
    return AudioCodec(CONFIG).eval()


# --- the spectrogram and its inverse ---


@pytest.mark.parametrize(("rate", "window", "hop", "mels"), [(16_000, 1024, 200, 80), (24_000, 600, 250, 33)])
def test_log_mel_agrees_with_transformers(rate, window, hop, mels):
    """Compare with its numpy spectrogram in float64, with its filters."""
    waveform = np.random.default_rng(3).uniform(-0.5, 0.5, 60 * hop).astype(np.float32)
    filters = mel_filter_bank(window // 2 + 1, mels, 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney")
    expected = spectrogram(
        waveform,
        scipy.signal.get_window("hann", window),
        frame_length=window,
        hop_length=hop,
        power=1.0,
        pad_mode="constant",
        mel_filters=filters,
        mel_floor=FLOOR,
        log_mel="log",
    )
    ours = LogMel(rate, window, hop, mels)(torch.from_numpy(waveform)[None])[0].numpy()
    assert ours.shape == (mels, 60) and np.abs(ours - expected[:, :60]).max() < 1e-3


def test_magnitudes_of_a_mel_have_that_mel():
    """Non-negative least squares agrees with scipy's exact solver."""
    from scipy.optimize import nnls

    mel = LogMel(RATE, 512, 128, 20)
    log_mel = mel(torch.from_numpy(chirp(4))[None, : 128 * 60])
    magnitude = mel.magnitude(log_mel)
    assert magnitude.min() >= 0
    target = log_mel.exp()[0].numpy().astype(np.float64)
    exact = sum(nnls(mel.filters.numpy().astype(np.float64), column)[1] ** 2 for column in target.T) ** 0.5
    clipped = (mel.inverse_filters @ log_mel.exp()).clamp(min=0)
    ours, start = ((mel.filters @ m[0] - log_mel[0].exp()).norm().item() for m in (magnitude, clipped))
    assert ours < exact + 0.06 * np.linalg.norm(target) and ours < 0.5 * start


def test_griffin_lim_finds_a_waveform_with_these_magnitudes():
    mel = LogMel(RATE, 1024, 200, 80)
    waveform = torch.from_numpy(chirp(5, 1.0))[None]
    magnitude = mel.spectrum(waveform).abs()
    made = mel.griffin_lim(magnitude)
    assert made.shape == waveform.shape

    def convergence(x):
        return ((mel.spectrum(x).abs() - magnitude).norm() / magnitude.norm()).item()

    random_phase = torch.polar(magnitude, 2 * torch.pi * torch.rand(magnitude.shape))
    start = torch.istft(random_phase, 1024, 200, window=mel.window, length=waveform.shape[1])
    assert convergence(made) < 0.1 < 0.5 < convergence(start)
    assert torch.equal(made, mel.griffin_lim(magnitude))  # with the same initial phases


def test_the_waveform_of_a_clip_is_the_same_in_any_batch():
    mel = LogMel(RATE, 1024, 200, 80)
    log_mel = mel(torch.from_numpy(np.stack([chirp(6), chirp(7)])))
    together = mel.waveform(log_mel)
    assert together.shape == (2, 8000) and together.abs().max() <= 1
    assert (together[1] - mel.waveform(log_mel[1:])[0]).abs().max() < 1e-3


# --- ids ---


@pytest.mark.parametrize("samples", [1, 799, 800, 801, 3997, 12_345])
def test_shapes_and_ranges_at_odd_lengths(codec, samples):
    waveform = torch.from_numpy(chirp(8, 1.0))[None, :samples]
    (ids,) = codec.encode(waveform, [samples])
    frames = -(-samples // 800)
    assert ids.shape == (3 * frames,) and ids.dtype == torch.int64
    level = ids.view(frames, 3) // 80
    assert (level == torch.arange(3)).all()  # id = level * K + code
    decoded = codec.decode(ids)
    assert decoded.shape == (800 * frames,) and decoded.dtype == torch.float32 and decoded.isfinite().all()
    assert torch.equal(decoded, codec.decode(ids)) and torch.equal(ids, codec.encode(waveform, [samples])[0])


def test_a_clip_has_the_same_ids_whatever_it_is_encoded_with(codec):
    """Ids are bit-identical next to longer clips and with anything behind the clip's end."""
    lengths = [805, 16_000, 4_000, 9_999]
    batch = torch.from_numpy(np.stack([chirp(n, 1.0) for n in range(4)]))
    together = codec.encode(batch, lengths)
    for row, length, ids in zip(batch, lengths, together, strict=True):
        assert torch.equal(ids, codec.encode(row[None, :length], [length])[0])


@pytest.mark.parametrize("lengths", [[0], [16_001], [5, 5]])
def test_lengths_that_do_not_fit_are_refused(codec, lengths):
    with pytest.raises(ValueError, match="lengths"):
        codec.encode(torch.zeros(1, 16_000), lengths)


def test_residual_fsq_is_its_definition_and_its_lookup():
    torch.manual_seed(0)
    residual = ResidualFSQ(16, (5, 4, 3), 3)
    hidden = torch.randn(2, 7, 16) * 5
    quantised, codes = residual(hidden)
    assert codes.shape == (2, 7, 3) and 0 <= codes.min() <= codes.max() < 60
    assert (quantised - residual.lookup(codes)).abs().max() < 1e-5
    left = hidden
    for level in range(3):
        normal = (left - left.mean(-1, keepdim=True)) / (left.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        digits = residual.quantiser(residual.down[level](normal))
        assert torch.equal(residual.quantiser.to_indices(digits), codes[..., level])
        left = left - residual.up[level](digits)


def test_every_level_gets_a_gradient(codec):
    fresh = AudioCodec(CONFIG)
    fresh(torch.from_numpy(chirp(9))[None]).backward()
    zero_at_first = {name for name, p in fresh.named_parameters() if p.grad is None or not p.grad.abs().sum()}
    assert not {name for name in zero_at_first if "mlp" not in name and "time" not in name and "norm" not in name}


@pytest.mark.parametrize("values", [{"hop": 600}, {"levels": (1, 5)}, {"levels": ()}, {"kind": "other"}, {"depth": 3}])
def test_impossible_sizes_are_refused(values):
    with pytest.raises(ValueError):
        AudioCodecConfig(**values)


# --- training ---


def test_crops_follow_from_number_and_epoch_and_reach_every_sample():
    long, short = np.arange(1, 3501, dtype=np.float32), np.arange(1, 301, dtype=np.float32)
    crops = Crops([long, short], 1000)
    assert len(crops) == 5  # four of the long clip, one of the short one
    assert torch.equal(crops.batch([2, 4], 3)[0], torch.cat([crops.batch([2], 3)[0], crops.batch([4], 3)[0]]))
    starts = {int(crops.batch([n], epoch)[0][0, 0]) for n in range(4) for epoch in range(50)}
    assert len(starts) > 150 and min(starts) < 100 and max(starts) > 2400
    assert crops.batch([4], 0)[0][0].tolist() == [*short.tolist(), *[0.0] * 700]


def test_training_lowers_the_heldout_loss_below_that_of_a_constant(trained, source):
    folder, last = trained
    reports = json.loads((folder / "training.json").read_text())["heldout"]
    clips = read_clips([source], "heldout", CONFIG)
    torch.manual_seed(TRAINING.seed)
    untrained = evaluate(AudioCodec(CONFIG).eval(), clips)
    assert last["loss"] < 0.8 * reports[0]["loss"] < 0.8 * untrained["loss"]
    mel = AudioCodec(CONFIG).mel
    spectra = torch.cat([mel(torch.from_numpy(clip.waveform)[None]) for clip in clips])
    median = spectra.permute(1, 0, 2).flatten(1).median(dim=1).values  # the best constant per band for this loss
    assert last["loss"] < 0.7 * (spectra - median[None, :, None]).abs().mean()  # it distinguishes the sounds
    assert last["mel_db"] == pytest.approx(last["loss"] * 8.685889638)
    assert all(last[f"codes_used_{level}"] > COLLAPSED and last[f"perplexity_{level}"] > 5 for level in range(3))


def test_the_reported_figures_are_those_of_the_saved_codec(trained):
    """Recompute the figures through the modality, from the media bytes, with the distance in numpy."""
    folder, report = trained
    audio = AudioModality.load(folder)
    media = [audio.read_media(as_bytes(chirp(n)), "flac") for n in range(10_000, 10_012)]
    ids = audio.encode(media)
    errors = []
    for waveform, tokens in zip(media, ids, strict=True):
        codes = torch.from_numpy(tokens).view(-1, 3) % 80
        with torch.no_grad():
            made = audio.codec.to_log_mel(audio.codec.quantiser.lookup(codes)[None])
            errors.append((made - audio.codec.mel(torch.from_numpy(waveform)[None])).abs().mean().item())
    assert report["loss"] == pytest.approx(np.mean(errors), rel=1e-4)
    counts = np.bincount(np.concatenate(ids), minlength=240)[80:160]
    p = counts[counts > 0] / counts.sum()
    assert report["codes_used_1"] == pytest.approx((counts > 0).mean())
    assert report["perplexity_1"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)


def test_decoding_the_ids_sounds_like_the_clip(trained):
    audio = AudioModality.load(trained[0])
    clips = [chirp(n) for n in range(10_000, 10_008)]
    made = [audio.decode(ids) for ids in audio.encode(clips)]
    matrix = np.array([[stft_distance(torch.from_numpy(m), torch.from_numpy(c)) for c in clips] for m in made])
    assert (matrix.argmin(axis=1) == np.arange(8)).all()  # each is nearest to its own original


def test_the_same_seed_gives_the_same_weights(source, tmp_path):
    short = Training(steps=3, batch_size=4, learning_rate=4e-3, seed=5)
    for name in ("a", "b"):
        train_audio_codec(
            [source], tmp_path / name, CONFIG, short, choose("cpu"), crop_seconds=0.2, heldout_seconds=1.0
        )
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_a_collapsed_level_is_named(source, tmp_path, caplog):
    idle = Training(steps=1, batch_size=1, learning_rate=1e-9, seed=0)
    flat = write_flat(tmp_path / "flat")
    with caplog.at_level(logging.WARNING):
        train_audio_codec([flat], tmp_path / "codec", CONFIG, idle, choose("cpu"), crop_seconds=1, heldout_seconds=9)
    assert "codebook 0 collapsed" in caplog.text and "codebook 2 collapsed" in caplog.text


def write_flat(folder):
    """Write one steady tone, which leaves nothing to code."""
    tone = 0.3 * np.sin(2 * np.pi * 400 * np.arange(8 * RATE) / RATE)
    for split in ("train", "heldout"):
        with ShardWriter(folder / split / "audio") as shards:
            shards.add("tone", "flac", as_bytes(tone))
    return folder


def test_an_unreadable_clip_is_a_user_error(tmp_path):
    with ShardWriter(tmp_path / "s/train/audio") as shards:
        shards.add("bad", "wav", b"RIFF")
    with pytest.raises(UserError, match="sample bad: not a sound file"):
        read_clips([tmp_path / "s"], "train", CONFIG)


def test_only_so_many_heldout_seconds_are_read(source):
    clips = read_clips([source], "heldout", CONFIG, seconds=1.2)
    assert len(clips) == 3 and not any(clip.said for clip in clips)


def test_a_text_belongs_to_the_sound_of_its_key_unless_that_is_cut(tmp_path):
    with ShardWriter(tmp_path / "heldout/audio") as audio, ShardWriter(tmp_path / "heldout/text") as text:
        for key, seconds in (("a", 0.5), ("b", 3.0), ("c", 0.5)):
            audio.add(key, "flac", as_bytes(chirp(1, seconds)))
        text.add("a", "txt", b"Press 1.")
        text.add("b", "txt", b"a long one")
    clips = read_clips([tmp_path], "heldout", AudioCodecConfig(**SIZES, max_seconds=2.0))
    assert sorted((len(clip.waveform), clip.said) for clip in clips) == [(8000, ""), (8000, "press one"), (32_000, "")]


def test_the_command_trains_and_reports(source, tmp_path):
    sizes = ["--width", "16", "--codebooks", "2", "--levels", "4,4", "--steps", "2", "--heldout-seconds", "1"]
    done = CliRunner().invoke(app, ["tokenizer", "train", "audio", str(source), "--to", str(tmp_path / "c"), *sizes])
    assert done.exit_code == 0, done.output
    assert "40 tokens per second, mel distance" in done.output and "word error not measured" in done.output


# --- word error ---


def test_transcripts_become_words():
    assert metrics.words("Press 1, or #! (beep) [tone] It's <break> 42.") == "press one or it's four two"


def test_speech_is_measured_beside_the_originals(codec, monkeypatch, caplog):
    clips = [
        TranscribedClip(chirp(1), "a rising tone"),
        TranscribedClip(chirp(2), ""),
        TranscribedClip(chirp(3), "un autre son"),
    ]
    monkeypatch.setattr(metrics, "recognise", lambda waveforms: ["a falling tone"] * len(waveforms))
    figures = evaluate_waveforms(codec, clips)
    assert figures["understood"] == 0.5  # of two with words; the recogniser does not support the language of one
    assert figures["word_error"] == figures["word_error_of_originals"] == pytest.approx(1 / 3)
    assert figures["word_error"] == pytest.approx(jiwer.wer("a rising tone", "a falling tone"))
    monkeypatch.setattr(metrics, "PACKAGES", ("pocketsphinx", "no_such_package"))
    with caplog.at_level(logging.INFO):
        assert "word_error" not in evaluate_waveforms(codec, clips)
    assert "not measured: no_such_package is not installed" in caplog.text


def test_the_recogniser_forgets_what_it_heard_before():
    click = np.zeros(RATE // 4, dtype=np.float32)
    click[1000] = 0.5
    heard = metrics.recognise([click, click])
    assert heard[0] == heard[1] == heard[0].lower()


def test_stft_distance_against_scipy():
    a, b = (torch.from_numpy(chirp(n)) for n in (11, 12))
    expected = 0.0
    for size in (512, 1024, 2048):
        window = scipy.signal.get_window("hann", size)
        stft = scipy.signal.ShortTimeFFT(window, size // 4, RATE)
        frames = 1 + len(a) // (size // 4)
        ours, theirs = (np.abs(stft.stft(x.numpy(), p0=0, p1=frames)) for x in (a, b))
        logs = np.log(np.maximum(ours, 1e-5)) - np.log(np.maximum(theirs, 1e-5))
        expected += np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) + np.abs(logs).mean()
    assert stft_distance(a, b) == pytest.approx(expected / 3, rel=1e-3)
    assert stft_distance(a, a) == 0
