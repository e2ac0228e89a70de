"""Adapters to audio codecs of transformers: the results of direct calls to transformers, clip by clip."""

import pytest
import torch
import transformers
from hf_models import AUDIO, RATE, direct, edited, load, make_folders, noise

from megamm.modalities.audio import AudioModality
from megamm.tokenizers.hf.audio import AUDIO_ADAPTERS
from megamm.tokenizers.load import load_codec

CODEBOOKS = {"mimi": (4, 16), "encodec": (3, 8), "dac": (3, 10)}
"""Codebooks, and samples of a latent frame."""
LENGTHS = (1, 7, 160, 333)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("hf"))


@torch.no_grad()
def direct_audio(model, name, clip):
    """Return (codes [Q, frames], waveform) of one clip, with the calls that transformers documents."""
    if name == "dac":
        extractor = transformers.DacFeatureExtractor(sampling_rate=RATE, hop_length=10)
        inputs = extractor(clip.numpy(), sampling_rate=RATE, return_tensors="pt")["input_values"]
        codes = model.encode(inputs).audio_codes
        return codes[0], model.decode(audio_codes=codes).audio_values[0]
    if name == "encodec":
        out = model(clip[None, None], bandwidth=3.0)
        codes, padding = out.audio_codes, -(-len(clip) // 8) * 8
        decoded = model.decode(codes, [None], torch.ones(1, padding)).audio_values
        assert torch.equal(out.audio_values[0, 0], decoded[0, 0, : len(clip)])
        return codes[0, 0], decoded[0, 0]
    codes = model.encode(clip[None, None]).audio_codes
    return codes[0], model.decode(codes).audio_values[0, 0]


@pytest.mark.parametrize("name", AUDIO)
def test_audio_is_that_of_transformers_called_directly(folders, name):
    codec, _ = load(folders, name)
    model, (codebooks, frame) = direct(folders, name), CODEBOOKS[name]
    assert (codec.sample_rate, codec.codebooks, codec.codebook_size) == (RATE, codebooks, 32)
    assert codec.frame_samples == codec.config.frame_samples == frame and codec.config.kind == name
    seen = set()
    for length in LENGTHS:
        clip = noise(length, length)
        codes, waveform = direct_audio(model, name, clip)
        (ids,) = codec.encode(clip[None], [length])
        assert ids.shape == (codebooks * -(-length // frame),) and ids.dtype == torch.int64
        assert ids.tolist() == [q * 32 + int(codes[q, t]) for t in range(codes.shape[1]) for q in range(codebooks)]
        decoded = codec.decode(ids)
        assert decoded.shape == (codes.shape[1] * frame,) and decoded.dtype == torch.float32
        assert 0 <= len(decoded) - len(waveform) < frame  # DAC with an odd stride returns some samples fewer
        assert torch.equal(decoded[: len(waveform)], waveform.clamp(-1, 1)) and decoded.std() > 1e-4
        seen |= set(ids.tolist())
    assert len(seen) > 10 * codebooks


@pytest.mark.parametrize("name", AUDIO)
def test_the_company_of_a_clip_changes_none_of_its_ids(folders, name):
    codec, _ = load(folders, name)
    batch = torch.stack([noise(400, seed) for seed in range(3)])
    together = codec.encode(batch, [400, 77, 250])
    for clip, length, ids in zip(batch, (400, 77, 250), together, strict=True):
        assert torch.equal(codec.encode(clip[None, :length], [length])[0], ids)


@pytest.mark.parametrize("name", AUDIO)
def test_ids_of_no_sound_are_refused(folders, name):
    codec, _ = load(folders, name)
    for ids in ([], [0], [32] * codec.codebooks, [-1, 32, 64, 96][: codec.codebooks]):
        with pytest.raises(ValueError, match=r"ids are not a multiple of|ids of level q"):
            codec.decode(torch.tensor(ids, dtype=torch.int64))
    for lengths in ([0], [11], [5, 5]):
        with pytest.raises(ValueError, match="lengths"):
            codec.encode(noise(10)[None], lengths)


@pytest.mark.parametrize(
    ("name", "change"),
    [("mimi", {"num_quantizers": 2}), ("encodec", {"target_bandwidths": [2.0]}), ("dac", {"n_codebooks": 2})],
)
def test_fewer_codebooks_are_the_first_ones(folders, name, change, tmp_path):
    codec, full_id = load(folders, name)
    fewer, fewer_id = load_codec(edited(folders, name, tmp_path / "fewer", **change), {}, "audio")
    assert fewer_id != full_id and fewer.codebooks == 2
    (ids,), (all_ids,) = fewer.encode(noise(333)[None], [333]), codec.encode(noise(333)[None], [333])
    assert torch.equal(ids.view(-1, 2), all_ids.view(-1, codec.codebooks)[:, :2])


@pytest.mark.parametrize("name", AUDIO)
def test_the_audio_modality_takes_the_folder(folders, name):
    modality, clips = AudioModality.load(folders[name]), [noise(333).numpy(), noise(40, 1).numpy()]
    assert modality.codec_id == load(folders, name)[1] and modality.stride == CODEBOOKS[name][0]
    for clip, ids in zip(clips, modality.encode(clips), strict=True):
        assert all(number in modality.valid_token_ids(place) for place, number in enumerate(ids.tolist()))
        assert 0 <= len(modality.decode(ids)) - len(clip) < CODEBOOKS[name][1]


def test_sizes_of_the_published_models():
    def sizes(model_type, config):
        found = AUDIO_ADAPTERS[model_type].sizes(config)
        return found.sample_rate, found.codebooks, found.codebook_size, found.frame_samples

    assert sizes("mimi", transformers.MimiConfig()) == (24_000, 32, 2048, 1920)
    assert sizes("mimi", transformers.MimiConfig(frame_rate=12.5)) == (24_000, 32, 2048, 1920)
    assert sizes("encodec", transformers.EncodecConfig()) == (24_000, 32, 1024, 320)
    music = {"target_bandwidths": [2.2], "sampling_rate": 32_000, "upsampling_ratios": [8, 5, 4, 4]}
    assert sizes("encodec", transformers.EncodecConfig(**music, codebook_size=2048)) == (32_000, 4, 2048, 640)
    assert sizes("dac", transformers.DacConfig()) == (16_000, 9, 1024, 512)
    dac24 = {"sampling_rate": 24_000, "n_codebooks": 32, "downsampling_ratios": [2, 4, 5, 8]}
    assert sizes("dac", transformers.DacConfig(**dac24)) == (24_000, 32, 1024, 320)
