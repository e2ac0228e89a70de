"""Generation: exact ranges and lengths, the same results as an uncached loop, draws independent of the batch."""

import copy
import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from codec_data import as_bytes, shape_picture
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_export import IMAGE_TOKENS, make_export, open_tiny, with_model
from typer.testing import CliRunner

from megamm.cli import app
from megamm.common.errors import UserError
from megamm.inference.generate import GumbelNoise, Sampling, generate, generate_from

GREEDY = Sampling(temperature=0, max_tokens=8)
CAPTIONS = ["a red ellipse", "blue", "a long caption of a purple rectangle"]
PICTURES = [np.asarray(shape_picture(n)[0]) for n in range(3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_export(tmp_path_factory.mktemp("generate"))


@pytest.fixture(scope="module")
def export(folder):
    return open_tiny(folder)


def _plain_loop(export, prompt, allowed, steps, stop=None):
    """Return greedy ids after the prompt, recomputing the whole sequence each time; and how often the mask decided."""
    ids, corrections = list(prompt), 0
    for _ in range(steps):
        logits = export.model(torch.tensor([ids])).logits[0, -1].detach()
        best = max(allowed, key=lambda i: logits[i].item())
        corrections += int(logits.argmax()) != best
        if best == stop:
            break
        ids.append(best)
    return np.array(ids[len(prompt) :], dtype=np.int64), corrections


def test_text_to_image_is_the_plain_loop_over_image_ids(export):
    v, text, image = export.vocabulary, export.modalities["text"], export.modalities["image"]
    made = generate(export, CAPTIONS, "text", "image", GREEDY)
    allowed, corrections = range(v["image"].start, v["image"].stop), 0
    for caption, picture in zip(CAPTIONS, made, strict=True):
        prompt = [v.document_start, *text.encode([caption])[0].tolist(), v.begin("image")]
        ids, corrected = _plain_loop(export, prompt, allowed, IMAGE_TOKENS)
        assert np.array_equal(picture, image.decode(ids - v["image"].start))
        corrections += corrected
    assert corrections  # otherwise the constraint was not tested


def test_image_to_text_is_the_plain_loop_over_text_ids_and_the_end(export):
    v, text, image = export.vocabulary, export.modalities["text"], export.modalities["image"]
    made = generate(export, PICTURES, "image", "text", GREEDY)
    allowed = [*range(v["text"].start, v["text"].stop), v.document_end]
    for picture, caption in zip(PICTURES, made, strict=True):
        ids = (image.encode([picture])[0] + v["image"].start).tolist()
        prompt = [v.document_start, v.begin("image"), *ids, v.end("image")]
        assert caption == text.decode(_plain_loop(export, prompt, allowed, 8, stop=v.document_end)[0])


def test_text_ends_at_the_document_end_which_an_image_cannot_contain(export):
    v = export.vocabulary
    model = copy.deepcopy(export.model)
    ids = (export.modalities["image"].encode(PICTURES[:1])[0] + v["image"].start).tolist()
    prompt = torch.tensor([[v.document_start, v.begin("image"), *ids, v.end("image")]])
    with torch.no_grad():
        model.lm_head.weight[v.document_end] = 100 * model.model(prompt).last_hidden_state[0, -1]
    assert generate(with_model(export, model), PICTURES[:1], "image", "text", Sampling()) == [""]
    assert generate(export, PICTURES[:1], "image", "text", Sampling()) != [""]
    with torch.no_grad():  # at every position the end token is by far the most or the least likely
        model.lm_head.weight[v.document_end] *= 1e6
    for picture in generate(with_model(export, model), CAPTIONS, "text", "image", Sampling()):
        assert picture.shape == (32, 32, 3)  # the codec decodes IMAGE_TOKENS ids of its range only


def test_an_item_of_a_batch_is_drawn_as_if_alone(export):
    drawn = Sampling(temperature=1.2, top_k=40, top_p=0.95, seed=5)
    together = generate(export, CAPTIONS, "text", "image", drawn)
    torch.manual_seed(99)  # the global generator is not used
    for i, caption in enumerate(CAPTIONS):
        alone = generate(
            export, [caption], "text", "image", Sampling(temperature=1.2, top_k=40, top_p=0.95, seed=5 + i)
        )
        assert np.array_equal(alone[0], together[i])
    again = generate(export, CAPTIONS, "text", "image", drawn)
    assert all(np.array_equal(a, b) for a, b in zip(again, together, strict=True))
    other = generate(export, CAPTIONS, "text", "image", Sampling(temperature=1.2, top_k=40, top_p=0.95, seed=50))
    assert not any(np.array_equal(a, b) for a, b in zip(other, together, strict=True))


def test_top_k_1_and_tiny_top_p_are_greedy(export):
    greedy = generate(export, CAPTIONS, "text", "image", GREEDY)
    for sampling in (Sampling(top_k=1, seed=3), Sampling(top_p=1e-6, seed=3)):
        made = generate(export, CAPTIONS, "text", "image", sampling)
        assert all(np.array_equal(a, b) for a, b in zip(made, greedy, strict=True))


def test_gumbel_noise_draws_from_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, -torch.inf])
    rows = 20_000
    drawn = GumbelNoise(range(rows))(torch.empty(rows, 0), logits.expand(rows, -1)).argmax(1)
    observed, expected = torch.bincount(drawn, minlength=5), logits.softmax(0) * rows
    assert observed[4] == 0
    chi_square = ((observed[:4] - expected[:4]) ** 2 / expected[:4]).sum().item()
    assert chi_square < 16.3  # three degrees of freedom: 0.999 quantile


def test_a_prompt_that_leaves_no_room_is_a_user_error(export):
    with pytest.raises(UserError, match="leaves no room for image in 64"):
        generate(export, ["word " * 60], "text", "image", GREEDY)
    with pytest.raises(UserError, match=r"text of .* and image of 16 tokens leaves no room for image in 64"):
        generate_from(export, [(("text", "word " * 9), ("image", PICTURES[0]))], "image", GREEDY)
    with pytest.raises(UserError, match="no modality 'audio'"):
        generate(export, CAPTIONS, "text", "audio", GREEDY)


def _ids(export, *parts):
    """The ids of a prompt by hand: as docs/architecture.md says a document is rendered, without its end."""
    v, ids = export.vocabulary, [export.vocabulary.document_start]
    for part in parts:
        if isinstance(part, str):
            ids += export.modalities["text"].encode([part])[0].tolist()
        else:
            image = export.modalities["image"].encode([part])[0] + v["image"].start
            ids += [v.begin("image"), *image.tolist(), v.end("image")]
    return ids


MIXED = {
    "text": ("a red",),
    "text, text": ("a red", " ellip"),
    "text, image": ("this is", PICTURES[0]),
    "image, text": (PICTURES[0], "a red"),
    "text, image, text": ("this", PICTURES[1], " is a"),
    "image, text, image": (PICTURES[0], " and ", PICTURES[1]),
}


@pytest.mark.parametrize("parts", MIXED.values(), ids=MIXED)
def test_a_prompt_mixes_parts_in_any_order(export, parts):
    """Text continues text, and an image may follow an image: each as the plain loop over the hand-made prompt."""
    v, text, image = export.vocabulary, export.modalities["text"], export.modalities["image"]
    prompt = [("text" if isinstance(part, str) else "image", part) for part in parts]
    allowed = [*range(v["text"].start, v["text"].stop), v.document_end]
    made, _ = _plain_loop(export, _ids(export, *parts), allowed, 8, stop=v.document_end)
    assert generate_from(export, [prompt], "text", GREEDY) == [text.decode(made)]
    if sum(not isinstance(part, str) for part in parts) < 2:  # else too long for the model
        ids = [*_ids(export, *parts), v.begin("image")]
        made, _ = _plain_loop(export, ids, range(v["image"].start, v["image"].stop), IMAGE_TOKENS)
        assert np.array_equal(
            generate_from(export, [prompt], "image", GREEDY)[0], image.decode(made - v["image"].start)
        )


def test_no_token_is_generated_after_a_stop_string(export):
    lengths = []
    model = copy.copy(export.model)
    model.generate = lambda *a, **k: (
        lengths.append((out := export.model.generate(*a, **k)).shape[1] - a[0].shape[1]) or out
    )
    drawn = Sampling(seed=4, max_tokens=16)
    whole = generate(with_model(export, model), CAPTIONS[:1], "text", "text", drawn)[0]
    generate(with_model(export, model), CAPTIONS[:1], "text", "text", dataclasses.replace(drawn, stop=(whole[:1],)))
    assert lengths[1] < lengths[0]


@pytest.mark.parametrize("values", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 2}, {"max_tokens": 0}])
def test_unfit_sampling_is_a_user_error(values):
    with pytest.raises(UserError, match="invalid sampling settings"):
        Sampling(**values)


# --- the command ---


def _run(*arguments):
    return CliRunner().invoke(app, ["generate", *map(str, arguments)])


def test_the_command_writes_one_file_or_a_folder(folder, tmp_path):
    done = _run(folder, "--prompt", "a heart", "--to", "image", "--out", tmp_path / "new" / "heart.png")
    assert done.exit_code == 0, done.output
    assert Image.open(tmp_path / "new" / "heart.png").size == (32, 32)
    pictures = []
    for n in range(2):
        (tmp_path / f"{n}.png").write_bytes(as_bytes(shape_picture(n)[0]))
        pictures += ["--from", tmp_path / f"{n}.png"]
    done = _run(folder, *pictures, "--to", "text", "--out", tmp_path / "captions", "--max-tokens", 5)
    assert done.exit_code == 0, done.output
    captions = [(tmp_path / "captions" / f"00{n}.txt").read_text() for n in range(2)]
    printed = _run(folder, *pictures, "--to", "text", "--max-tokens", 5)
    assert printed.stdout == "".join(caption + "\n" for caption in captions)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.png", "1.png", "captions", "new"]


def test_the_command_keeps_the_order_of_parts(folder, export, tmp_path):
    file = tmp_path / "0.png"
    file.write_bytes(as_bytes(shape_picture(0)[0]))
    end = ["--to", "text", "--max-tokens", 5, "--temperature", 0]
    orders = [
        ("--prompt", "this", "--from", file, "--prompt", " is"),
        ("--from", file, "--prompt=this", "--prompt", " is"),
    ]
    for order, parts in zip(orders, [("this", PICTURES[0], " is"), (PICTURES[0], "this", " is")], strict=True):
        prompt = [("text" if isinstance(part, str) else "image", part) for part in parts]
        made = generate_from(export, [prompt], "text", Sampling(temperature=0, max_tokens=5))
        done = _run(folder, *order, *end)
        assert done.exit_code == 0 and done.stdout == made[0] + "\n", done.output
    several = _run(folder, "--prompt", "a", "--prompt", "b", *end).stdout
    assert several == "".join(_run(folder, "--prompt", text, *end).stdout for text in "ab")
    together = generate(export, ["a b"], "text", "text", Sampling(temperature=0, max_tokens=5))[0]
    assert _run(folder, "--prompt", "a", "--prompt", " b", "--together", *end).stdout == together + "\n"
    requests = tmp_path / "requests.jsonl"
    line = {"parts": [{"from": "0.png"}, {"prompt": "this"}, {"prompt": " is"}], "to": "text", "out": "a.txt"}
    requests.write_text(json.dumps(line))
    assert _run(folder, "--requests", requests, "--max-tokens", 5, "--temperature", 0).exit_code == 0
    assert (tmp_path / "a.txt").read_text() == made[0]


def test_options_that_requests_do_not_take_are_named(folder, tmp_path):
    requests = tmp_path / "requests.jsonl"
    requests.write_text(json.dumps({"prompt": "a", "to": "image", "out": "a.png"}))
    for option, message in (
        (("--together",), "combined with .*--together"),
        (("--stop", "b"), "no request is for text"),
    ):
        done = _run(folder, "--requests", requests, *option)
        assert isinstance(done.exception, UserError)
        with pytest.raises(UserError, match=message):
            raise done.exception
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("ending", ["jpeg", "JPG", "tif", "jfif"])
def test_other_extensions_of_a_format_are_read(ending, folder, tmp_path):
    """As from a folder of raw files; the truth is the same picture under the first extension of its format."""
    same = tmp_path / ("a.tiff" if ending == "tif" else "a.jpg")
    shape_picture(0)[0].save(same)
    shutil.copy(same, tmp_path / f"b.{ending}")
    asked = ["--to", "text", "--max-tokens", 5, "--temperature", 0]
    texts = [_run(folder, "--from", file, *asked) for file in (same, tmp_path / f"b.{ending}")]
    assert texts[0].exit_code == 0 and texts[0].stdout == texts[1].stdout, texts[1].output


def test_requests_are_made_as_by_single_commands(folder, tmp_path):
    """Lines of both directions, in any order: each direction's items are drawn as one command would draw them."""
    for n in range(2):
        (tmp_path / f"{n}.png").write_bytes(as_bytes(shape_picture(n)[0]))
    lines = [
        {"prompt": "a heart", "to": "image", "out": "made/a.png"},
        {"from": "0.png", "to": "text", "out": "b.txt"},
        {"prompt": "a long red heart", "to": "image", "out": "made/c.png"},
        {"from": "1.png", "to": "text", "out": "d.txt"},
    ]
    requests = tmp_path / "requests.jsonl"
    requests.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    done = _run(folder, "--requests", requests, "--seed", 3, "--max-tokens", 5)
    assert done.exit_code == 0 and done.stdout == f"{requests}: 4 generated\n", done.output
    options = ["--seed", 3, "--max-tokens", 5, "--out", tmp_path / "single"]
    done = _run(folder, "--prompt", "a heart", "--prompt", "a long red heart", "--to", "image", *options)
    assert done.exit_code == 0, done.output
    for name, single in (("made/a.png", "000.png"), ("made/c.png", "001.png")):
        assert (tmp_path / name).read_bytes() == (tmp_path / "single" / single).read_bytes()
    shutil.rmtree(tmp_path / "single")
    done = _run(folder, "--from", tmp_path / "0.png", "--from", tmp_path / "1.png", "--to", "text", *options)
    assert done.exit_code == 0, done.output
    for name, single in (("b.txt", "000.txt"), ("d.txt", "001.txt")):
        assert (tmp_path / name).read_text() == (tmp_path / "single" / single).read_text()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no request"),
        (["{"], "not JSON"),
        (["[]"], "not a JSON object of strings"),
        ([{"prompt": "a", "to": "image"}], "wrong keys: prompt, to"),
        ([{"prompt": "a", "from": "b.png", "to": "image", "out": "c.png"}], "wrong keys: from, out, prompt, to"),
        ([{"prompt": "a", "to": "smell", "out": "c.png"}], "unknown modality 'smell'"),
        ([{"prompt": "a", "to": "image", "out": "c.gif"}], "written as .png"),
        ([{"prompt": "a", "to": "image", "out": "taken.png"}], "the output exists"),
        ([{"prompt": "a", "to": "image", "out": "c.png"}] * 2, "2 requests write the same file"),
        ([{"from": "gone.png", "to": "text", "out": "c.txt"}], "cannot read: No such file"),
        ([{"prompt": " ", "to": "image", "out": "c.png"}], "contains no text"),
        ([{"parts": [], "to": "image", "out": "c.png"}], "wrong parts"),
        ([{"parts": [{"prompt": "a", "from": "b.png"}], "to": "image", "out": "c.png"}], "wrong parts"),
        ([{"parts": [{"prompt": "a"}, {"from": "gone.png"}], "to": "text", "out": "c.txt"}], "No such file"),
    ],
)
def test_a_wrong_request_is_named_and_nothing_written(folder, tmp_path, lines, message):
    (tmp_path / "taken.png").write_bytes(b"x")
    requests = tmp_path / "requests.jsonl"
    requests.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    done = _run(folder, "--requests", requests)
    assert isinstance(done.exception, UserError) and message in str(done.exception)
    assert len(list(tmp_path.iterdir())) == 2
    done = _run(folder, "--requests", requests, "--to", "text")
    assert isinstance(done.exception, UserError) and "give --requests alone" in done.exception.remedy


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", " ", "--to", "image", "--out", "a.png"], "contains no text"),
        (["--prompt", "a", "--to", "smell", "--out", "a.png"], "unknown modality 'smell'"),
        (["--prompt", "a", "--to", "image"], "no output given"),
        (["--prompt", "a", "--to", "image", "--out", "a.jpg"], "written as .png"),
        (["--prompt", "a", "--to", "image", "--out", "taken.png"], "the output exists"),
        (["--from", "gone.png", "--to", "text"], "cannot read: No such file"),
        (["--from", "broken.png", "--to", "text"], "unusable image: not a PNG"),
        (["--from", "a.tga", "--to", "text"], "no modality reads .tga files"),
        (["--to", "text"], "give --prompt, or --from"),
        (["--prompt", "a", "--from", "broken.png", "--to", "text"], "unusable image: not a PNG"),
        (["--prompt", "a", "--to", "text", "--stop", ""], "an empty stop string"),
        (["--prompt", "a", "--to", "image", "--out", "a.png", "--stop", "b"], "stop strings end text, not image"),
    ],
)
def test_what_a_user_can_mend_is_named(folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name in ("taken.png", "broken.png", "a.tga"):
        (tmp_path / name).write_bytes(b"not an image")
    done = _run(folder, *arguments)
    assert isinstance(done.exception, UserError) and message in str(done.exception)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_damaged_export_is_named(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "export")
    (copied / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="transformers cannot load it"):
        _ = open_tiny(copied).model
    config = copied / "codecs" / "visual" / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(UserError, match="codecs do not match the model's vocabulary"):
        open_tiny(copied)


def test_a_missing_tensor_is_no_random_tensor(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "export")
    tensors = load_file(copied / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors are missing or unknown.*up_proj"):
        _ = open_tiny(copied).model


def _many(tmp_path, count):
    """Write a file of requests: captions to pictures, and every fifth a text to continue."""
    lines = [
        {
            "prompt": f"a red {n}",
            "to": "text" if n % 5 == 0 else "image",
            "out": f"made/{n}.{'txt' if n % 5 == 0 else 'png'}",
        }
        for n in range(count)
    ]
    requests = tmp_path / "requests.jsonl"
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return requests, [tmp_path / line["out"] for line in lines]


def test_an_interrupted_file_of_requests_is_resumed(folder, tmp_path):
    requests, outputs = _many(tmp_path, 11)
    options = ["--requests", requests, "--seed", 3, "--max-tokens", 5]
    assert _run(folder, *options).exit_code == 0
    whole = {out: out.read_bytes() for out in outputs}
    for out in outputs[2:9:2]:
        out.unlink()
    kept = {out: out.stat().st_mtime_ns for out in outputs if out.exists()}
    again = _run(folder, *options)
    assert isinstance(again.exception, UserError) and "the output exists" in str(again.exception)
    sheet = tmp_path / "sheet.html"
    done = _run(folder, *options, "--resume", "--sheet", sheet)
    assert done.exit_code == 0 and done.stdout == f"{requests}: 4 generated\n", done.output
    assert {out: out.read_bytes() for out in outputs} == whole
    assert {out: out.stat().st_mtime_ns for out in kept} == kept
    page = sheet.read_text()
    assert page.count("<figure>") == 11 and page.count('src="made/') == 8 and "a red 7 &rarr; image" in page
    other = _run(folder, *options[:-1], 6, "--resume")
    assert isinstance(other.exception, UserError) and "other settings" in str(other.exception)
    alone = _run(folder, "--prompt", "a", "--to", "text", "--resume")
    assert isinstance(alone.exception, UserError) and "need --requests" in str(alone.exception)


@pytest.mark.everything
def test_kill_9_in_a_file_of_200_requests_loses_one_batch(folder, tmp_path):
    requests, outputs = _many(tmp_path, 200)
    command = [sys.executable, "-m", "megamm", "generate", str(folder), "--requests", str(requests), "--device", "cpu"]
    with subprocess.Popen([*command, "--max-tokens", "5"], stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if "72 of 200 requests are complete" in line:
                process.kill()
    before = {out: out.stat().st_mtime_ns for out in outputs if out.exists()}
    assert 72 <= len(before) < 200
    done = subprocess.run([*command, "--max-tokens", "5", "--resume"], capture_output=True, text=True, check=True)
    assert done.stdout == f"{requests}: {200 - len(before)} generated\n"
    assert all(out.exists() for out in outputs)
    assert {out: out.stat().st_mtime_ns for out in before} == before
