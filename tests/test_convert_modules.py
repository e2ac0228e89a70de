"""The modules of an export: each alone equals its part of the whole, together they are the export; model cards."""

import filecmp
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hf_models import AUDIO, SIZES, make_folders, noise, pictures
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tiny_export import make_export, open_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from megamm.checkpoint import TrainState
from megamm.common.errors import UserError
from megamm.config import config_from_dict
from megamm.convert.extras import card
from megamm.convert.extras.modules import join, split
from megamm.convert.io.export_folder import check_digests, write_digests
from megamm.tokenizers.encoder_decoder import KINDS, load_module, save_module
from megamm.tokenizers.io import codec_id
from megamm.tokenizers.load import load_codec


@pytest.fixture(scope="module", params=["one file", "shards"])
def export(request, tmp_path_factory):
    folder = make_export(tmp_path_factory.mktemp("modules"), audio=True)
    if request.param == "shards":
        model = AutoModelForCausalLM.from_pretrained(folder)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="40kB")
        assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="module")
def parts(export, tmp_path_factory):
    out = tmp_path_factory.mktemp("parts") / "parts"
    assert split(export, out) == ["text_base", "multimodal_fusion", "image_decoder", "audio_encoder"]
    return out


def all_files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_text_base_has_the_logits_of_the_whole_model(export, parts):
    whole = AutoModelForCausalLM.from_pretrained(export).eval()
    base, found = AutoModelForCausalLM.from_pretrained(parts / "text_base", output_loading_info=True)
    assert not any(found.values())
    tokenizer = AutoTokenizer.from_pretrained(parts / "text_base")
    text = "a red box<|image_start|>"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert ids.tolist() == [AutoTokenizer.from_pretrained(export)(text)["input_ids"]]
    assert tokenizer.decode(ids[0]) == "<|document_start|>" + text and len(tokenizer) == base.config.vocab_size
    with torch.no_grad():
        expected, got = whole(ids).logits[..., : base.config.vocab_size], base(ids).logits
    assert got.shape == expected.shape and (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_text_base_is_an_export(parts):
    opened = open_tiny(parts / "text_base")
    assert list(opened.modalities) == ["text"] and [r.name for r in opened.vocabulary.ranges] == ["text", "control"]
    with pytest.raises(UserError, match="the vocabulary has no media ids"):
        split(parts / "text_base", parts.parent / "again")
    assert not (parts.parent / "again").exists()


def test_halves_of_the_codecs_do_what_the_codecs_do(export, parts):
    image, _ = load_codec(export / "codecs" / "visual", KINDS["visual"], "visual")
    ids = torch.randint(0, image.codebook_size, (3, 2 * image.grid_size**2))
    decoder = load_module(parts / "image_decoder")
    assert torch.equal(decoder.decode(ids), image.decode(ids))
    audio, _ = load_codec(export / "codecs" / "audio", KINDS["audio"], "audio")
    encoder = load_module(parts / "audio_encoder")
    clips = torch.stack([noise(3001, 1), noise(3001, 2)])
    for mine, theirs in zip(encoder.encode(clips, [3001, 77]), audio.encode(clips, [3001, 77]), strict=True):
        assert torch.equal(mine, theirs)
    assert not hasattr(decoder, "encoder") and not hasattr(encoder, "decoder")
    for name, whole in (("image_decoder", "visual"), ("audio_encoder", "audio")):
        size, of = ((at / "model.safetensors").stat().st_size for at in (parts / name, export / "codecs" / whole))
        assert size < of


@pytest.fixture(scope="module")
def codecs(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("hf"))


@pytest.mark.parametrize("name", SIZES)
def test_encoders_and_decoders_of_codecs_of_transformers(codecs, name, tmp_path):
    tokenizer = "audio" if name in AUDIO else "visual"
    if name == "chameleon":
        assert (
            not save_module(codecs[name], tokenizer, "decoder", tmp_path / "decoder")
            and not (tmp_path / "decoder").exists()
        )
        return
    whole, _ = load_codec(codecs[name], {}, tokenizer)
    assert save_module(codecs[name], tokenizer, "encoder", tmp_path / "encoder")
    assert save_module(codecs[name], tokenizer, "decoder", tmp_path / "decoder")
    encoder, decoder = load_module(tmp_path / "encoder"), load_module(tmp_path / "decoder")
    if tokenizer == "audio":
        (ids,) = whole.encode(noise(99)[None], [99])
        assert torch.equal(encoder.encode(noise(99)[None], [99])[0], ids)
    else:
        ids = whole.encode(pictures(2, 1))
        assert torch.equal(encoder.encode(pictures(2, 1)), ids)
    assert torch.equal(decoder.decode(ids), whole.decode(ids))
    with pytest.raises(UserError, match=r"lack|half"):
        load_codec(tmp_path / "decoder", {}, tokenizer)  # a decoder alone is rejected


def test_a_damaged_encoder_or_decoder_is_refused(parts, tmp_path):
    kept = load_file(parts / "image_decoder" / "model.safetensors")
    config = (parts / "image_decoder" / "config.json").read_text()
    for number, (tensors, text, what) in enumerate(
        [
            ({k: v for k, v in kept.items() if k != "decoder.stem.weight"}, config, "decoder.stem.weight is missing"),
            (kept | {"decoder.more": torch.zeros(1)}, config, "decoder.more is missing or unknown"),
            (kept, config.replace('"half": "decoder"', '"half": "both"'), "not the encoder or decoder of a tokenizer"),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(text)
        with pytest.raises(UserError, match=what):
            load_module(folder)


def test_the_parts_are_the_export_again(export, parts, tmp_path):
    write_digests(export)
    joined = join(parts, tmp_path / "joined")
    assert all_files(joined) == all_files(export)
    for name in all_files(export) - {"SHA256SUMS"}:
        if name.endswith(".safetensors"):
            ours, theirs = load_file(joined / name), load_file(export / name)
            assert ours.keys() == theirs.keys()
            for key, tensor in ours.items():
                assert tensor.dtype == theirs[key].dtype and torch.equal(tensor, theirs[key]), key
        elif name.endswith(".index.json"):
            assert json.loads((joined / name).read_text()) == json.loads((export / name).read_text())
        else:
            assert filecmp.cmp(joined / name, export / name, shallow=False), name
    for folder in (joined, parts / "text_base", parts / "multimodal_fusion", parts / "image_decoder"):
        subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=folder, check=True)


def test_parts_of_other_models_are_not_joined(parts, tmp_path):
    shutil.copytree(parts / "text_base", tmp_path / "text_base")
    shutil.copytree(parts / "multimodal_fusion", tmp_path / "multimodal_fusion")
    config = tmp_path / "text_base" / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(UserError, match=r"config.json does not match SHA256SUMS"):
        join(tmp_path, tmp_path / "out")
    write_digests(tmp_path / "text_base")
    with pytest.raises(UserError, match="different models"):
        join(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_digests_name_what_is_wrong(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(b"")
    write_digests(tmp_path)
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, of "abc"
    assert f"{known}  deep/a\n" in (tmp_path / "SHA256SUMS").read_text()
    check_digests(tmp_path)
    for change, what in (
        (lambda: (tmp_path / "c").write_bytes(b""), "does not list c"),
        (lambda: (tmp_path / "deep" / "a").write_bytes(b"abd"), "deep/a does not match"),
        (lambda: (tmp_path / "deep" / "a").unlink(), "deep/a is missing"),
        (lambda: (tmp_path / "SHA256SUMS").write_text("x"), "line 1 is not a digest"),
        (lambda: (tmp_path / "SHA256SUMS").unlink(), "no readable SHA256SUMS"),
    ):
        change()
        with pytest.raises(UserError, match=what):
            check_digests(tmp_path)


def test_the_card_tells_of_the_run(export, tmp_path):
    own = json.loads((export / "megamm.json").read_text())
    config = config_from_dict(own["config"], where="test")
    shards = config.data.sources[0].path
    (shards / "ATTRIBUTION.md").write_text("# shapes\n\nDrawn. Licence: CC-BY 4.0.\n\nBy A. N. Other\n")
    run = tmp_path / "run"
    (run / "checkpoints" / "step_00000004").mkdir(parents=True)
    lines = [{"step": 2, "heldout/text": 3.5}, {"step": 4, "heldout/text": 2.25}, {"step": 6, "heldout/text": 1.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    gone = {"sources": {"old": {"path": str(tmp_path / "old"), "documents": 1, "shards": "", "kind": "whole"}}}
    state = TrainState(
        4, 8, 1, {}, own["vocabulary"], own["config"], {"megamm": "1"}, mixture=gone, tokens={"text": 12345}
    )
    own |= {"step": 4, "training": card.record(run / "checkpoints" / "step_00000004", state, config)}
    card.copy_attribution(state, config, export)
    gain = {"mean": 0.5, "standard_error": 0.1, "samples": 9, "nouns": 3, "positive_share": 1.0}
    figures = {
        "step": 4,
        "samples": 9,
        "loss": {"text": 2.5},
        "tokens": {"text": 99},
        "pair_gain": {"text_to_image": gain},
    }
    (tmp_path / "eval.json").write_text(json.dumps(figures))
    card.write_card(export, own, card.read_evaluation(tmp_path / "eval.json"))
    read = ModelCard.load(export / "README.md")
    data = read.data.to_dict()
    assert (data["license"], data["license_link"]) == ("other", "ATTRIBUTION.md")
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "any-to-any")
    assert data["tags"] == ["megamm", "text", "image", "audio", "video"]
    (result,) = read.data.eval_results
    assert (result.metric_value, result.metric_name) == (2.5, "cross entropy of text in nats per token")
    for row in (
        "| shapes | 1 | CC-BY 4.0 |",
        "| old | removed | not recorded",
        "| text | 12,345 |",
        "| text | 2.2500 | 4 |",
    ):
        assert row in read.text, row
    for row in ("| text_to_image | +0.5000 | 9 |", "| hidden_size | 32 |", "| text | 0 | 269 |"):
        assert row in read.text, row
    assert "By A. N. Other" in (export / "ATTRIBUTION.md").read_text()
    check_digests(export)
    with pytest.raises(UserError, match="of step 4, but the export is of step 5"):
        card.write_card(export, own | {"step": 5}, figures)
    with pytest.raises(UserError, match="pair_gain is missing"):
        (tmp_path / "eval.json").write_text(json.dumps({k: v for k, v in figures.items() if k != "pair_gain"}))
        card.read_evaluation(tmp_path / "eval.json")


def test_the_card_of_an_unknown_past_says_so(export):
    own = json.loads((export / "megamm.json").read_text())
    (export / "ATTRIBUTION.md").unlink(missing_ok=True)
    card.write_card(export, own)
    read = ModelCard.load(export / "README.md")
    assert read.data.to_dict()["license"] == "unknown" and read.text.count("not recorded") == 3


def test_a_codec_in_an_export_keeps_its_id(export, parts):
    whole = parts / "multimodal_fusion" / "whole" / "codecs" / "audio"
    assert codec_id(whole) == codec_id(export / "codecs" / "audio")
