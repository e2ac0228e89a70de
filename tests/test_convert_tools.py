"""`megamm convert inspect|diff|verify`, the script, and malformed input: one line, exit code 2, nothing written.

Expected figures come from safetensors' and torch's own readers.
"""

import json
import os
import re
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
import warm
from checkpoint_folders import write_blocks, write_manifest
from native_folders import convert, edit, make_native, make_pair
from safetensors.torch import load_file, save_file
from tiny_export import make_export
from tiny_run import ROOT, environment
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import load as dcp_load

from megamm import checkpoint
from megamm.checkpoint.tensor_shards import TensorShard
from megamm.common.errors import UserError
from megamm.convert.io.export_folder import write_digests
from megamm.convert.io.tensor_sources import NativeTensors
from megamm.convert.verify import weights
from megamm.tokenizers.io import weight_files

INDEX = "model.safetensors.index.json"
NAN = float("nan")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """Return a run of two ranks' files, and a folder in shards: experts, layers, tables with padding."""
    return make_pair("mixtral", tmp_path_factory.mktemp("mixtral"))


@pytest.fixture
def hf(mixtral, tmp_path):
    return Path(shutil.copytree(mixtral[1], tmp_path / "hf"))


def whole(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


# --- inspect ---


def leaves(lines: list[str]) -> dict[str, str]:
    """Return the full names of a tree's tensors, with their descriptions."""
    found, path = {}, []
    for line in lines[1:-1]:
        depth = (len(line) - len(line.lstrip())) // 2
        first, *rest = line.strip().split("  ")
        if first.startswith("rank "):
            name = ".".join(path)
            found[name] = found[name] + "|" + first
            continue
        path = [*path[: depth - 1], first]
        if rest:
            found[".".join(path)] = "  ".join(rest)
    return found


def test_inspect_of_a_folder_is_what_safetensors_has(hf):
    lines = list(weights.tree(hf))
    tensors = whole(hf)
    said = leaves(lines)
    assert said.keys() == tensors.keys()
    for name, tensor in tensors.items():
        shape, kind, norm = said[name].split("  ")
        assert (shape, kind) == (str(list(tensor.shape)), "float32")
        assert float(norm.removeprefix("norm ")) == pytest.approx(float(tensor.norm()), rel=1e-5)
    values = sum(tensor.numel() for tensor in tensors.values())
    assert lines[-1] == f"{len(tensors)} tensors, {values:,} values, {4 * values / 1e6:,.1f} MB"
    assert list(said)[-1].startswith("model.norm") and [n for n in said if ".layers.2." in n]


def test_inspect_of_a_checkpoint_names_the_ranks(mixtral):
    """Rank 0 has the first of three layers and halves of the tables, as torch's own index confirms."""
    step = checkpoint.path_of(mixtral[0], 0)
    said = leaves(list(weights.tree(mixtral[0])))
    metadata = FileSystemReader(step / "tensors").read_metadata()
    name = "decoder.layers.mlp.router.weight"
    assert [chunk.sizes[0] for chunk in metadata.state_dict_metadata[name].chunks] == [1, 2]
    for layer, rank in ((0, 0), (1, 1), (2, 1)):
        for rest in ("mlp.router.weight", "mlp.experts.4.linear_fc1.weight"):
            assert said[f"decoder.layers.{layer}.{rest}"].endswith(f"  rank {rank}")
    table = said["embedding.word_embeddings.weight"]
    assert table.endswith("|rank 0 [0:152, 0:48]|rank 1 [152:304, 0:48]") and "[304, 48]" in table
    state = {k: torch.empty(v.size) for k, v in metadata.state_dict_metadata.items()}
    dcp_load(state, storage_reader=FileSystemReader(step / "tensors"), no_dist=True)
    norm = float(state["decoder.layers.mlp.experts.experts.linear_fc1.weight"][1, 4].norm())
    assert f"  norm {norm:.6g}"[:12] in said["decoder.layers.1.mlp.experts.4.linear_fc1.weight"]


def test_stacks_of_some_layers_are_named_by_the_layers_they_are_of(mixtral, tmp_path):
    """The model has one dense layer before two routed ones."""
    step = Path(shutil.copytree(checkpoint.path_of(mixtral[0], 0), tmp_path / "step_00000000"))
    shutil.rmtree(step / "tensors")
    sizes = {"mlp.linear_fc2": (1, 4, 2), "mlp.router": (2, 3), "mlp.experts.experts.linear_fc2": (2, 2, 4, 3)}
    stored = [TensorShard.whole(f"decoder.layers.{name}.weight", torch.rand(size)) for name, size in sizes.items()]
    write_blocks(step / "tensors", [stored])
    write_manifest(step)
    layers = {name.split(".", 2)[2].removesuffix(".weight") for name in NativeTensors(step).described}
    experts = {f"{layer}.mlp.experts.{e}.linear_fc2" for layer in (1, 2) for e in (0, 1)}
    assert layers == {"0.mlp.linear_fc2", "1.mlp.router", "2.mlp.router", *experts}


def test_inspect_counts_what_is_no_number(tmp_path):
    save_file({"a.weight": torch.tensor([1.0, NAN, float("inf")]), "b": torch.arange(3)}, tmp_path / "x.safetensors")
    lines = list(weights.tree(tmp_path / "x.safetensors"))
    assert lines[1:-1] == ["  a.weight  [3]  float32  norm nan  (2 NaN or Inf)", "  b  [3]  int64  norm 2.23607"]


# --- diff ---


def test_diff_across_formats(mixtral, hf, tmp_path):
    run, _ = mixtral
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    for one, other in ((run, hf), (hf, run), (run, run), (checkpoint.path_of(run, 0), hf)):
        found = weights.compare(one, other)
        assert not found.lines and found.same == (48 if one == other else 69), found.lines
    edit(hf, name, lambda tensor: tensor + torch.eye(48, 56))
    expected = [f"{name}: 48 of {48 * 56:,} differ, by 1 at most"]
    for one, other in ((run, hf), (hf, mixtral[1])):
        found = weights.compare(one, other)
        assert (found.lines, found.first_layer) == (expected, 1)
    done = convert("diff", run, hf)
    assert done.exit_code == 1
    assert done.stdout.splitlines()[1:] == [
        "the first layer that differs is layer 1",
        f"{found.same} tensors are bit-identical",
    ]
    assert convert("diff", run, mixtral[1]).exit_code == 0


def test_diff_of_native_checkpoints_names_the_layer(mixtral, tmp_path):
    def change(tensor):
        if tensor.ndim == 4 and tensor.shape[-1] == 56:  # experts' linear_fc2
            tensor[2, 1, 0, 0] += 2
        return tensor

    make_native(mixtral[1], tmp_path / "run", change)
    found = weights.compare(mixtral[0], tmp_path / "run")
    assert found.lines == [f"decoder.layers.2.mlp.experts.1.linear_fc2.weight: 1 of {48 * 56:,} differ, by 2 at most"]
    assert found.first_layer == 2


def test_diff_says_shapes_dtypes_and_what_only_one_has(hf, tmp_path):
    tensors = whole(hf)
    name, cast, kept = "model.layers.2.input_layernorm.weight", "model.norm.weight", "lm_head.weight"
    tensors[name] = tensors[name][:-1].clone()
    tensors[cast] = tensors[cast].bfloat16()
    tensors[kept] = tensors[kept].double()
    lost = "model.layers.0.input_layernorm.weight"
    del tensors[lost]
    save_file(tensors | {"new": torch.zeros(1)}, tmp_path / "one.safetensors")
    found = weights.compare(hf, tmp_path / "one.safetensors")
    rounding = (whole(hf)[cast] - tensors[cast].float()).abs()
    assert found.lines == [
        f"only in the first: {lost}",
        "only in the second: new",
        f"{name}: [48] -> [47]",
        f"{kept}: float32 -> float64, the same values",
        f"{cast}: float32 -> bfloat16, {int((rounding > 0).sum())} of 48 differ, by {rounding.max():.3g} at most",
    ]
    assert found.first_layer == 0


# --- verify ---


def test_verify_of_what_is_whole(mixtral, hf):
    report = weights.verify(mixtral[0])
    assert not report.problems and report.lines[1] == "names and shapes match MixtralForCausalLM"
    write_digests(hf)
    report = weights.verify(hf)
    assert not report.problems and report.lines[:2] == ["SHA256SUMS matches", "names and shapes match config.json"]
    done = convert("verify", hf)
    assert done.exit_code == 0 and done.stdout.splitlines()[-1].endswith("tensors, all values are finite")


def test_verify_of_what_is_not(mixtral, hf, tmp_path):
    name = "model.layers.1.self_attn.o_proj.weight"
    write_digests(hf)
    edit(hf, name, lambda tensor: tensor.index_fill(0, torch.tensor([3]), NAN))
    done = convert("verify", hf)
    assert done.exit_code == 1 and "problem: model-000" in done.stdout and "does not match SHA256SUMS" in done.stdout
    assert f"1 tensors contain NaN or Inf, the first is {name} (60 values)" in done.stdout
    (hf / "SHA256SUMS").unlink()
    assert convert("verify", hf).exit_code == 0
    assert convert("verify", hf, "--refuse-nan").exit_code == 1
    edit(hf, name, lambda tensor: None)
    assert f"problem: {name} is missing" in convert("verify", hf).stdout
    run = Path(shutil.copytree(mixtral[0], tmp_path / "run"))
    shard = checkpoint.path_of(run, 0) / "tensors" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    done = convert("verify", run)
    assert done.exit_code == 1 and "__0_0.distcp is missing or truncated" in done.stdout


# --- malformed input ---


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """Return an export with its weights in two shards."""
    folder = make_export(tmp_path_factory.mktemp("export"), train=4, heldout=2)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def export(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / "in" / "export"))


def shard(folder: Path, number: int = 1) -> Path:
    return folder / f"model-0000{number}-of-00002.safetensors"


def point(folder: Path, value: object, name: str = "model.norm.weight") -> None:
    """Make the index name another shard for a tensor."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][name] = value
    (folder / INDEX).write_text(json.dumps(index))


def truncated(folder: Path) -> None:
    shard(folder).write_bytes(shard(folder).read_bytes()[:-5])


def no_header(folder: Path) -> None:
    shard(folder).write_bytes(b"\x08")


def huge_header(folder: Path) -> None:
    data = shard(folder).read_bytes()
    shard(folder).write_bytes(struct.pack("<Q", 1 << 62) + data[8:])


def large_header(folder: Path) -> None:
    """Write a header size that is allowed but past the file's end."""
    data = shard(folder).read_bytes()
    shard(folder).write_bytes(struct.pack("<Q", 90_000_000) + data[8:])


def lying_offsets(folder: Path) -> None:
    data = shard(folder).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    name = next(name for name in header if name != "__metadata__")
    header[name]["data_offsets"][1] += 1 << 40
    text = json.dumps(header).encode()
    shard(folder).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def linked(folder: Path) -> None:
    """Replace a shard by a link to a valid file elsewhere."""
    elsewhere = folder.parent / "elsewhere.safetensors"
    shutil.move(shard(folder), elsewhere)
    shard(folder).symlink_to(elsewhere)


def traversal(folder: Path) -> None:
    shutil.copy(shard(folder), folder.parent / "evil.safetensors")
    point(folder, "../evil.safetensors")


def absolute(folder: Path) -> None:
    shutil.copy(shard(folder), folder.parent / "evil.safetensors")
    point(folder, str(folder.parent / "evil.safetensors"))


def twice(folder: Path) -> None:
    save_file(load_file(shard(folder)) | {"model.norm.weight": torch.ones(32)}, shard(folder))
    save_file(load_file(shard(folder, 2)) | {"model.norm.weight": torch.ones(32)}, shard(folder, 2))


def pickled(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    torch.save({"model.norm.weight": torch.ones(32)}, folder / "pytorch_model.bin")


def config(folder: Path, **changes: object) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


NORM, DOWN = "model.norm.weight", "model.layers.0.mlp.down_proj.weight"
MALFORMED = {
    "truncated shard": (truncated, "unreadable weights"),
    "a file of one byte": (no_header, "unreadable weights"),
    "a huge header": (huge_header, "unreadable weights"),
    "a header beyond the end": (large_header, "unreadable weights"),
    "offsets beyond the end": (lying_offsets, "unreadable weights"),
    "a shard that is not there": (lambda folder: shard(folder).unlink(), "no file 'model-00001-of-00002.safetensors'"),
    "an index of a wrong file": (
        lambda folder: point(folder, shard(folder, 1).name, DOWN),
        f"the index places {DOWN} in model-00001-of-00002.safetensors, but it is in model-00002",
    ),
    "an index of an unknown tensor": (
        lambda folder: point(folder, shard(folder).name, "model.ghost"),
        "the index places model.ghost in model-00001-of-00002.safetensors, but it is in no file",
    ),
    "an index that leaves one out": (
        lambda folder: (folder / INDEX).write_text(
            json.dumps({"weight_map": dict(list(json.loads((folder / INDEX).read_text())["weight_map"].items())[1:])})
        ),
        "in no file, but it is in model-0000",
    ),
    "an index that leaves the folder": (traversal, "no file '../evil.safetensors' in this folder"),
    "an index of an absolute path": (absolute, "evil.safetensors' in this folder"),
    "an index of a number": (lambda folder: point(folder, 5), "unreadable index of weights"),
    "an index of a list": (lambda folder: point(folder, ["model"]), "unreadable index of weights"),
    "an index that is a list": (lambda folder: (folder / INDEX).write_text("[1]"), "unreadable index of weights"),
    "an index that never ends": (
        lambda folder: (folder / INDEX).write_text("[" * 10**6),
        "unreadable index of weights",
    ),
    "an index that is not text": (lambda folder: (folder / INDEX).write_bytes(b"\xff\xfe\x00"), "unreadable index"),
    "a shard that is a link": (linked, "model-00001-of-00002.safetensors is a link to outside the folder"),
    "a tensor in two shards": (twice, f"{NORM} is both in model-00001"),
    "a missing tensor": (lambda folder: edit(folder, DOWN, lambda tensor: None), f"config.json: {DOWN} is missing"),
    "a pickle": (pickled, "pytorch_model.bin is a pickle, which can run code"),
    "no weights": (lambda folder: [file.unlink() for file in folder.glob("model*")], "no model.safetensors"),
    "heads that are not there": (
        lambda folder: config(folder, num_attention_heads=8),
        r"has the shape \[32, 32\], the config requires",
    ),
    "groups that are not there": (
        lambda folder: config(folder, num_key_value_heads=4),
        r"k_proj.weight has the shape \[16, 32\]",
    ),
    "layers that are not there": (
        lambda folder: config(folder, num_hidden_layers=3, layer_types=["full_attention"] * 3),
        r"layers\.2\..* is missing",
    ),
    "heads that are not a number": (
        lambda folder: config(folder, num_attention_heads="many"),
        "transformers cannot build this model",
    ),
    "no heads": (
        lambda folder: config(folder, num_attention_heads=0, head_dim=None),
        "transformers cannot build this model",
    ),
    "a config that is a list": (
        lambda folder: (folder / "config.json").write_text("[1]"),
        "transformers cannot build this model",
    ),
    "a config cut off": (
        lambda folder: (folder / "config.json").write_text('{"model_ty'),
        "transformers cannot build this model",
    ),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_input_is_one_line_and_nothing_is_written(kind, export, tmp_path):
    damage, message = MALFORMED[kind]
    damage(export)
    before = sorted(path for path in tmp_path.rglob("*"))
    for command in (["import", export, tmp_path / "run"], ["verify", export]):
        try:
            done = convert(*command)
        except UserError as error:  # which `main` prints before it exits with code 2
            assert re.search(message, str(error)) and "\n" not in str(error)
        else:
            assert command[0] == "verify" and done.exit_code == 1, (command, done.stdout)
            assert "problem: " in done.stdout
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_the_script_is_the_command_and_ends_with_2(export, tmp_path):
    pickled(export)
    script = [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py")]
    command = [*script, "import", str(export), str(tmp_path / "run")]
    done = warm.run(command, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "pytorch_model.bin is a pickle" in line and "save_pretrained" in line


def test_a_pickle_is_never_opened(export, tmp_path):
    class Exploit:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'exploited'}",))

    pickled(export)
    torch.save(Exploit(), export / "pytorch_model.bin")
    for command in (["import", export, tmp_path / "run"], ["verify", export], ["inspect", export]):
        with pytest.raises(UserError, match="is a pickle"):
            convert(*command)
    assert not (tmp_path / "exploited").exists()
    torch.load(export / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "exploited").exists(), "the exploit must work, or the test cannot fail"


def test_not_a_number_is_reported_and_by_choice_refused(export, tmp_path, caplog):
    edit(export, DOWN, lambda tensor: tensor.index_fill(0, torch.tensor([0]), NAN))
    with pytest.raises(UserError, match=rf"1 tensors contain NaN or Inf, the first is {DOWN} \(64 values\)"):
        convert("import", export, tmp_path / "run", "--refuse-nan")
    assert not list(tmp_path.glob("*run*"))
    assert convert("import", export, tmp_path / "run").exit_code == 0
    assert f"tensors: 1 contain NaN or Inf, the first is {DOWN}" in caplog.messages
    with pytest.raises(
        UserError, match=r"1 tensors contain NaN or Inf, the first is decoder\.layers\.0\.mlp\.linear_fc2"
    ):
        convert("export", tmp_path / "run", tmp_path / "out", "--refuse-nan")
    assert not list(tmp_path.glob("*out*"))


def test_a_hub_cache_links_to_its_blobs(export, tmp_path):
    """A snapshot's files may link to ../../blobs, and to nothing else."""
    cache = tmp_path / "models--x--y"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(export.glob("*.*"))):
        shutil.copy(path, cache / "blobs" / f"{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert len(weight_files(snapshot)) == 2
    shard(snapshot).unlink()
    shard(snapshot).symlink_to(shard(export))
    with pytest.raises(UserError, match="is a link to outside the folder"):
        weight_files(snapshot)
