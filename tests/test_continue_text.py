"""Text to text: stop strings, streaming and split characters. The truth is transformers' `generate` on the export."""

import io
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published_folder import EOS, publish
from tiny_export import CPU, make_export, open_tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from megamm.cli import main
from megamm.cli.inference import print_at_once
from megamm.common.errors import UnreadableMedia, UserError
from megamm.common.sample import IntArray, Part
from megamm.convert.export import export as export_run
from megamm.convert.import_folder import import_
from megamm.convert.io.export_folder import LoadedExport, open_export
from megamm.convert.verify.equivalence import VerificationOptions
from megamm.inference.continuation import Continuation, TextFollower
from megamm.inference.generate import Sampling, generate, generate_from
from megamm.inference.generate_files import Medium
from megamm.media.text_file import to_text
from megamm.modalities.text import TextModality

LENGTH = 32
"""data.seq_length of the imported model."""
MOST = 16
PROMPTS = ["a red ellipse", "blue", *"abcdefghijklmnopqrstuvwxyz"]


@pytest.fixture(scope="module", params=["trained", "imported"])
def export(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedExport:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "trained":
        return open_tiny(make_export(folder))
    tensors = VerificationOptions(logits=False)
    import_(
        publish(folder / "hf"), folder / "run", nproc=1, overrides=[f"data.seq_length={LENGTH}"], verification=tensors
    )
    return open_export(export_run(folder / "run", folder / "out", nproc=1, verification=tensors), CPU)


def theirs(export: LoadedExport, prompt: str, stops: list[str], most: int = MOST) -> list[int]:
    """Return transformers' greedy ids of text, without an end."""
    start, text = export.prompt_form.start, export.vocabulary["text"]
    ids = [*start, *export.modalities["text"].encode([prompt])[0].tolist()]
    ends = list(export.prompt_form.ends)
    rows = export.model.config.vocab_size
    other = [i for i in range(rows) if not text.start <= i < text.stop and i not in ends]
    stopping: dict[str, Any] = {}
    if stops:
        stopping = {"stop_strings": stops, "tokenizer": AutoTokenizer.from_pretrained(export.folder)}
    made = export.model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        max_new_tokens=most,
        do_sample=False,
        suppress_tokens=other or None,
        eos_token_id=ends,
        pad_token_id=export.prompt_form.padding,
        **stopping,
    )
    return [i for i in made[0, len(ids) :].tolist() if i not in ends]


def test_text_ends_where_that_of_transformers_does(export: LoadedExport) -> None:
    """A stop string over two tokens, in a batch with an item that has none; no id is generated after it."""
    codec, greedy = export.modalities["text"], Sampling(temperature=0, max_tokens=MOST)
    for prompt in PROMPTS:
        pieces = [codec.decode(np.array([i])) for i in theirs(export, prompt, [])]
        pairs = itertools.pairwise(pieces[2:])
        stop = next((a + b for a, b in pairs if (a + b).isascii() and (a + b).isprintable() and a and b), None)
        if stop is not None and stop not in prompt:
            break
    assert stop is not None
    expected = codec.decode(np.array(theirs(export, prompt, [stop])))
    assert expected.endswith(stop)  # else transformers did not stop there
    cut = Sampling(temperature=0, max_tokens=MOST, stop=(stop, "never there"))
    other = generate(export, [PROMPTS[0]], "text", "text", cut)
    made = generate(export, [prompt, PROMPTS[0]], "text", "text", cut)
    assert made == [expected[: expected.index(stop)], *other]
    pieces = []
    assert generate_from(export, [[("text", prompt)]], "text", cut, pieces.append) == made[:1]
    assert "".join(pieces) == made[0] and all(pieces)
    assert generate(export, [prompt], "text", "text", greedy)[0].startswith(made[0] + stop)


@pytest.mark.parametrize("stop", [(), (" ",), ("e", "zz")])
def test_streamed_text_is_the_text_and_the_decoded_ids(export: LoadedExport, stop: tuple[str, ...]) -> None:
    """In pieces that never need to be taken back: no half character, no beginning of a stop string."""
    for prompt in PROMPTS[:2]:
        pieces: list[str] = []
        greedy = Sampling(temperature=0, max_tokens=MOST, stop=stop)
        made = generate_from(export, [[("text", prompt)]], "text", greedy, pieces.append)
        assert "".join(pieces) == made[0] and all(pieces)
        whole = export.modalities["text"].decode(np.array(theirs(export, prompt, []), dtype=np.int64))
        assert made[0] == whole[: min((whole.index(s) for s in stop if s in whole), default=len(whole))]


def test_an_imported_model_has_room_for_what_its_config_says(export: LoadedExport) -> None:
    """Rows of training had 32 tokens, but the source was made for 131072; a trained model has its rows."""
    if export.vocabulary.has_control:
        with pytest.raises(UserError, match="leaves no room for text in 64"):
            generate(export, ["b" * 64], "text", "text", Sampling())
        return
    assert export.longest == 131072
    prompt = "b" * 2 * LENGTH
    made = generate(export, [prompt], "text", "text", Sampling(temperature=0, max_tokens=4))
    assert made == [export.modalities["text"].decode(np.array(theirs(export, prompt, [], 4), dtype=np.int64))]
    two = generate_from(export, [[("text", "b" * LENGTH)] * 2], "text", Sampling(temperature=0, max_tokens=4))
    assert two == made
    with pytest.raises(UserError, match="no modality 'image'"):
        generate(export, ["b"], "text", "image", Sampling())


def test_an_end_among_the_ids_of_text_is_no_text(export: LoadedExport) -> None:
    """After the end come ids of padding, which can be ids of text too."""
    ends, text = export.prompt_form.ends, export.vocabulary["text"]
    if not export.vocabulary.has_control:
        assert set(ends) == set(EOS) and max(ends) < text.stop
    items = [Continuation(export.modalities["text"], np.zeros(0, np.int64), (), 9) for _ in range(2)]
    seen: list[str] = []
    follower = TextFollower(items, text.start, ends, seen.append)
    letters = [text.start + int(i) for i in export.modalities["text"].encode(["ab"])[0]]
    for row in ([letters[0], letters[0]], [ends[0], letters[1]], [letters[0], ends[-1]]):
        done = follower(torch.tensor([row]).T, torch.empty(0))
    assert [item.text for item in items] == ["a", "ab"] and seen == ["a"] and done.all()


class Bytes:
    """A tokenizer whose ids are the bytes of UTF-8."""

    def decode(self, ids: IntArray) -> str:
        return bytes(ids.tolist()).decode("utf-8", "replace")


def test_half_characters_and_the_beginning_of_a_stop_string_wait() -> None:
    item, seen = Continuation(Bytes(), np.zeros(0, np.int64), ("STOP",), most=99), []  # type: ignore[arg-type]
    for id_ in "été STOP".encode():
        assert not item.is_complete
        item.add(id_)
        seen.append(item.certain)
    assert seen == ["", "é", "ét", "ét", "été", *["été "] * 5] and item.is_complete and item.text == "été "


def test_any_ids_are_decoded_as_if_all_at_once() -> None:
    """The truth is Python's own decoder: valid and broken UTF-8, with prompts of several lengths."""
    draw, valid = np.random.default_rng(0), np.frombuffer("a€😀é �b".encode(), np.uint8)
    for n in range(200):
        ids = draw.choice(valid, 40) if n % 2 else draw.integers(0, 256, 40)
        before = np.frombuffer(("a€é" * n).encode(), np.uint8)[: 8 * n].astype(np.int64)
        item = Continuation(Bytes(), before, (), most=99)  # type: ignore[arg-type]
        shown = ""
        for id_ in ids.tolist():
            item.add(id_)
            assert item.certain.startswith(shown)
            shown = item.certain
        assert item.text == bytes(ids.tolist()).decode("utf-8", "replace")


def test_the_prompt_is_the_document_before_its_end(export: LoadedExport) -> None:
    parts = [Part("text", ids) for ids in export.modalities["text"].encode(["a red", " box"])]
    joined = np.concatenate([np.array(export.prompt_form.start), *(part.ids for part in parts)])
    assert np.array_equal(
        export.prompt(*parts), joined + np.r_[0, [export.vocabulary["text"].start] * (len(joined) - 1)]
    )


def test_a_word_tokenizer_keeps_the_space_behind_the_prompt(tmp_path: Path) -> None:
    """Metaspace drops a text's first space, but not that of a continuation."""
    tokenizer = Tokenizer(models.WordLevel({"▁a": 0, "▁red": 1, "▁box": 2}, unk_token="▁a"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    codec = TextModality.load(tmp_path)
    for before, expected in (([0], " red box"), ([], "red box")):
        item = Continuation(codec, np.array(before, np.int64), (), most=9)
        item.add(1)
        item.add(2)
        assert item.text == expected


@pytest.mark.parametrize("prompt", ["a \ud800", "a \udcff"], ids=["half of a pair in JSON", "a byte of the shell"])
def test_a_prompt_that_is_not_utf_8_is_rejected(prompt: str) -> None:
    with pytest.raises(UnreadableMedia, match="not UTF-8"):
        to_text(Medium.of_prompt(prompt).data)


def test_characters_that_the_terminal_lacks_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "argv", ["megamm", "--help"])
    with pytest.raises(SystemExit):
        main()
    print_at_once("caf\xe9 \U0001f600")
    assert out.buffer.getvalue().endswith(b"caf\\xe9 \\U0001f600")  # type: ignore[attr-defined]
