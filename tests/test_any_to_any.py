"""All modalities at once, with a toy sixth one: from raw files to every output from every input."""

import json
import sys
from itertools import permutations
from pathlib import Path

import pytest
import warm
import yaml
from media_samples import example, make_codecs
from tiny_run import ROOT, environment
from toy_modality import SmellModality

from megamm.convert.io.export_folder import check_digests
from megamm.modalities import REGISTRY
from megamm.observability import metrics

MODALITIES = REGISTRY | {"smell": SmellModality}
NAMES = list(MODALITIES)
PARTS = ["audio_encoder", "image_decoder", "multimodal_fusion", "text_base"]
FIELDS = {"text": "caption"}
"""Fields of samples.jsonl that differ from the modality's name."""


def write_raw(folder: Path) -> list[str]:
    """Write raw/all (samples of all modalities) and raw/pages (documents of eight parts); return both folders."""
    lines: dict[str, list[dict]] = {"all": [], "pages": []}
    for name in lines:
        (folder / name).mkdir(parents=True)

    def part(source: str, modality: str, number: int) -> str:
        data, ending = example(modality, number)
        if modality == "text":
            return data.decode()
        (folder / source / f"{modality}{number}.{ending}").write_bytes(data)
        return f"{modality}{number}.{ending}"

    for n in range(14):
        lines["all"].append({FIELDS.get(m, m): part("all", m, n) for m in NAMES} | {"key": f"s{n}", "noun": f"n{n}"})
        order = [NAMES[(n + k) % len(NAMES)] for k in range(8)]
        parts = [{m: part("pages", m, 100 + 10 * n + k)} for k, m in enumerate(order)]
        lines["pages"].append({"parts": parts, "key": f"p{n}", "noun": f"n{n}"})
    for name, samples in lines.items():
        (folder / name / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return [str(folder / name) for name in lines]


def write_config(folder: Path, codecs: dict[str, Path], sources: list[dict]) -> Path:
    heads = {"num_attention_heads": 4, "num_query_groups": 2, "head_dim": 8}
    config = {
        "output": str(folder / "run"),
        "device": "cpu",
        "model": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, **heads},
        "data": {"seq_length": 160, "sources": sources},
        "tokenizers": {name: str(path) for name, path in codecs.items()},
        "optimizer": {"lr": 3e-3, "warmup_steps": 2},
        "train": {"steps": 12, "global_batch_size": 4, "micro_batch_size": 2, "log_every": 1, "eval_every": 12},
        "resilience": {"max_restarts": 0},  # in the process in which the toy modality is registered
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def commands_of(folder: Path) -> list[list[str]]:
    """Write raw files, codecs and config; return the commands from build to generation in every direction."""
    codecs, raws = make_codecs(folder / "codecs"), write_raw(folder / "raw")
    shards, export = [str(folder / "shards" / name) for name in ("all", "pages")], str(folder / "export")
    sources = [{"path": shards[0], "documents": "pairs", "weight": 2.0}, {"path": shards[1]}]
    config = str(write_config(folder, codecs, sources))
    options = [option for name, path in codecs.items() for option in ("--codec", f"{name}={path}")]
    commands = [
        ["data", "build", *raws, "--to", str(folder / "shards"), "--heldout", "0.3"],
        ["data", "tokenize", *shards, *options],
        ["train", config],
        ["convert", "export", str(folder / "run"), export],
        ["eval", export, *shards, "--run", str(folder / "run"), "--json", str(folder / "eval.json")],
        ["convert", "card", export, str(folder / "eval.json")],
        ["convert", "modules", export, str(folder / "parts")],
        ["convert", "join", str(folder / "parts"), str(folder / "joined")],
        ["convert", "quantize", export, str(folder / "quantised"), "--to", "int8"],
        ["convert", "gguf", export, str(folder / "model.gguf")],
    ]
    for a, b in permutations(NAMES, 2):
        data, ending = example(a, 50)
        (folder / f"given.{ending}").write_bytes(data)
        given = ["--prompt", data.decode()] if a == "text" else ["--from", str(folder / f"given.{ending}")]
        out = folder / "generated" / f"{a}_to_{b}.{MODALITIES[b].extensions[0]}"
        commands.append(["generate", export, *given, "--to", b, "--out", str(out), "--max-tokens", "5"])
    return commands


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return the folder after all commands, run in one process in which the toy modality is registered."""
    folder = tmp_path_factory.mktemp("any")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(REGISTRY, "smell", SmellModality)
        (folder / "commands.json").write_text(json.dumps(commands_of(folder)))
    command = [sys.executable, str(ROOT / "tests" / "lib" / "any_to_any.py"), str(folder / "commands.json")]
    done = warm.run(command, env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def test_the_export_tells_of_itself_and_comes_apart(made):
    """The model card has the run's tokens and the figures of `megamm eval`; its parts join to the same export."""
    state = json.loads(sorted((made / "run" / "checkpoints").glob("*/state.json"))[-1].read_text())
    losses = json.loads((made / "eval.json").read_text())["loss"]
    text = (made / "export" / "README.md").read_text()
    for name in NAMES:
        assert f"| {name} | {state['tokens'][name]:,} |" in text and f"| {name} | {losses[name]:.4f} |" in text
    assert sorted(part.name for part in (made / "parts").iterdir()) == PARTS
    for folder in (made / "export", made / "joined", made / "quantised", *(made / "parts").iterdir()):
        check_digests(folder)
    assert (made / "model.gguf").read_bytes()[:4] == b"GGUF"
    sums = [(made / name / "SHA256SUMS").read_text() for name in ("export", "joined")]
    assert sums[0] == sums[1]


def test_every_modality_is_trained_and_its_loss_falls(made):
    lines = [line for line in metrics.read_lines(made / "run") if "grad_norm" in line]
    assert len(lines) == 12
    (heldout,) = (line for line in metrics.read_lines(made / "run") if "heldout/text" in line)
    assert all(heldout[f"heldout/{name}"] > 0 for name in NAMES)  # rows of every source
    for name in NAMES:
        losses = [line[f"loss/{name}"] for line in lines if line[f"loss/{name}"] is not None]
        assert len(losses) > 6 and losses[-1] < losses[0]


def test_every_modality_is_evaluated_and_every_direction_has_a_pair_gain(made):
    figures = json.loads((made / "eval.json").read_text())
    assert set(figures["loss"]) == set(figures["tokens"]) == set(NAMES)
    assert set(figures["pair_gain"]) == {f"{a}_to_{b}" for a, b in permutations(NAMES, 2)}
    assert figures["logits_max_abs_diff"] < 1e-4


@pytest.mark.parametrize(("a", "b"), list(permutations(NAMES, 2)))
def test_every_modality_is_made_from_every_other(made, a, b):
    modality = MODALITIES[b]
    (file,) = (made / "generated").glob(f"{a}_to_{b}.*")
    if b == "text" and not file.read_text().strip():
        return  # an untrained model may generate the end token at once
    if b != "audio":  # untrained sound may be silent, which the check rejects
        assert len(modality.check_media(file.read_bytes(), file.suffix[1:])) == 64
    else:
        import soundfile

        samples, rate = soundfile.read(file)
        assert rate == 16_000 and len(samples) > 0


def test_pages_keep_their_order_in_the_shards(made):
    from megamm.shards.folder import ShardFolder

    parts: dict[str, dict[int, str]] = {}
    for name in NAMES:
        folder = ShardFolder(made / "shards" / "pages" / "train" / name)
        for key, number in zip(folder.keys, folder.parts.tolist(), strict=True):
            parts.setdefault(key, {})[number] = name
    assert len(parts) >= 6
    for key, names in parts.items():
        assert [names[k] for k in range(8)] == [NAMES[(int(key[1:]) + k) % len(NAMES)] for k in range(8)]
