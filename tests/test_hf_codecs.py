"""Folders saved by transformers as codecs: copies, shards, rejected ones with the reason, foreign token caches."""

import shutil

import pytest
import torch
import transformers
from hf_models import AUDIO, SIZES, direct, edited, load, make_folders, noise, pictures

from megamm.common.errors import UserError
from megamm.data.pipeline.token_dataset import TokenDataset
from megamm.data.tokenize.token_cache import cache_name
from megamm.modalities.image import ImageModality
from megamm.shards.folder import ShardWriter, tokens_to_bytes
from megamm.tokenizers.load import load_codec


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("hf"))


@pytest.mark.parametrize("name", SIZES)
def test_copies_and_shards_give_the_same_codec(folders, name, tmp_path):
    codec, codec_id = load(folders, name)
    shutil.copytree(folders[name], tmp_path / "export" / "codecs" / "any")  # as megamm/convert/export.py does
    copied, copied_id = load_codec(tmp_path / "export" / "codecs" / "any", {}, "audio" if name in AUDIO else "visual")
    direct(folders, name).save_pretrained(tmp_path / "shards", max_shard_size="20kB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    sharded, sharded_id = load_codec(tmp_path / "shards", {}, "audio" if name in AUDIO else "visual")
    assert copied_id == codec_id != sharded_id and len(codec_id) == len(sharded_id) == 12
    for other in (copied, sharded):
        assert not other.training and other.config == codec.config
        for mine, theirs in zip(codec.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(mine, theirs)
    shard = sorted((tmp_path / "shards").glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    assert load_codec(tmp_path / "shards", {}, "audio" if name in AUDIO else "visual")[1] != sharded_id
    shard.unlink()
    with pytest.raises(UserError, match="no file 'model-"):
        load_codec(tmp_path / "shards", {}, "audio" if name in AUDIO else "visual")


def test_weights_in_half_precision_are_computed_in_single(folders, tmp_path):
    direct(folders, "janus").to(torch.bfloat16).save_pretrained(tmp_path / "half")
    codec, _ = load_codec(tmp_path / "half", {}, "visual")
    assert {p.dtype for p in codec.parameters()} == {torch.float32}


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_config_names_no_code_to_fetch(folders, tmp_path, key):
    codec, _ = load_codec(edited(folders, "mimi", tmp_path / "kernel", **{key: "someone/kernel"}), {}, "audio")
    assert torch.equal(
        codec.encode(noise(99)[None], [99])[0], load(folders, "mimi")[0].encode(noise(99)[None], [99])[0]
    )


def refused(folder, family_name, match):
    with pytest.raises(UserError, match=match) as error:
        load_codec(folder, {"megamm-x": None}, family_name)
    assert "\n" not in str(error.value)


def test_other_models_are_refused(folders, tmp_path):
    refused(
        folders["dac"], "visual", "'dac' is not a tokenizer for visual.*emu3_vqgan or chameleon_vqgan or janus_vqgan"
    )
    refused(folders["emu3"], "audio", "'emu3_vqgan' is not a tokenizer for audio.*mimi or encodec or dac")
    refused(folders["emu3"], "points", "'emu3_vqgan' is not a tokenizer for points.*tokenizer train points`$")
    refused(edited(folders, "dac", tmp_path / "a", model_type="bert"), "audio", "'bert' is not a tokenizer for audio")
    refused(edited(folders, "dac", tmp_path / "k", kind="megamm-y"), "audio", "kind 'megamm-y' is not one for audio")
    refused(edited(folders, "mimi", tmp_path / "b", audio_channels=2), "audio", "2 channels; only mono")
    refused(edited(folders, "encodec", tmp_path / "c", audio_channels=2), "audio", "2 channels; only mono")
    refused(edited(folders, "encodec", tmp_path / "d", normalize=True), "audio", "scale for each chunk")
    refused(edited(folders, "encodec", tmp_path / "e", chunk_length_s=1.0), "audio", "scale for each chunk")
    refused(edited(folders, "mimi", tmp_path / "f", decoder_config=None), "audio", "without its encoder or its decoder")
    refused(edited(folders, "emu3", tmp_path / "g", resolution=21), "visual", "21 is not a multiple of 2")
    refused(edited(folders, "janus", tmp_path / "h", in_channels=1), "visual", "1 channels; only RGB")


def test_damage_is_named(folders, tmp_path):
    refused(tmp_path / "none", "audio", "not a tokenizer for audio")
    refused(edited(folders, "dac", tmp_path / "a", codebook_size="many"), "audio", "DacModel cannot be used: .*many")
    refused(
        edited(folders, "dac", tmp_path / "b", n_codebooks=4), "audio", "lack .* tensors of DacModel, such as quant"
    )
    refused(edited(folders, "dac", tmp_path / "c", codebook_size=64), "audio", "DacModel cannot be used: .*ismatch")
    cut = edited(folders, "dac", tmp_path / "d")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-4])
    refused(cut, "audio", "unreadable weights")
    pickled = edited(folders, "dac", tmp_path / "e")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    refused(pickled, "audio", "pickle, which can run code.*save_pretrained")
    for number, index in enumerate(
        ("{}", "[1", '{"weight_map": {"a": "../d/model.safetensors"}}', '{"weight_map": {}}')
    ):
        outside = edited(folders, "dac", tmp_path / f"f{number}")
        (outside / "model.safetensors").unlink()
        (outside / "model.safetensors.index.json").write_text(index)
        refused(outside, "audio", "index of weights|no file '../d/model|the index names no weights")


def test_the_remedy_for_a_whole_model_works(folders, tmp_path):
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.ChameleonConfig(
        **text, num_key_value_heads=2, vocab_size=99, vq_config=SIZES["chameleon"], vocabulary_map={"<image>": 3}
    )
    torch.manual_seed(0)
    model = transformers.ChameleonForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "whole")
    refused(tmp_path / "whole", "visual", r"ChameleonModel.from_pretrained\(FOLDER\).vqmodel.save_pretrained\(NEW\)")
    transformers.ChameleonModel.from_pretrained(tmp_path / "whole").vqmodel.save_pretrained(tmp_path / "codec")
    codec, _ = load_codec(tmp_path / "codec", {}, "visual")
    pixels = pictures(2, 1)[:, 0].permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        expected = model.model.vqmodel.encode(pixels).image_tokens
    assert torch.equal(codec.encode(pictures(2, 1)).flatten(), expected)


def test_tokens_of_another_codec_are_refused(folders, tmp_path):
    mine, other = ImageModality.load(folders["chameleon"]), ImageModality.load(folders["janus"])
    (tmp_path / "train" / "image").mkdir(parents=True)
    ids = mine.codec.encode(pictures(1, 1))[0].numpy()
    with ShardWriter(tmp_path / "train" / cache_name(mine)) as writer:
        writer.add("a", "npy", tokens_to_bytes(ids, 64), tokens=36)
    read = TokenDataset(tmp_path / "train", {"image": mine.codec_id})
    assert read.whole(0).parts[0].ids.tolist() == ids.tolist()
    with pytest.raises(UserError, match=f"no image tokens of codec {other.codec_id}.*megamm data tokenize.*--codec"):
        TokenDataset(tmp_path / "train", {"image": other.codec_id})
