"""Streaming conversion: bit-identical to conversion in memory; several processes, kills, bad disks, little memory.

Random tiny models of every family; `mapping` in memory is the reference.
"""

import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from checkpoint_folders import save_now
from family_models import MODELS, SEQUENCE, read_model, write_model
from safetensors.torch import save_file
from stream_models import add_tokenizer, equal, tensors_of, write_synthetic
from tiny_run import environment
from transformers import AutoModelForCausalLM

from megamm import checkpoint
from megamm.checkpoint import index, path_of
from megamm.checkpoint.reader import TensorReader
from megamm.checkpoint.tensor_shards import TensorShard
from megamm.common.device import choose
from megamm.common.errors import UserError
from megamm.config import config_from_dict
from megamm.convert.conversion import ConversionJob
from megamm.convert.export import export
from megamm.convert.families import mapping
from megamm.convert.import_folder import import_
from megamm.convert.io.safetensors_files import Weights
from megamm.convert.verify.equivalence import VerificationOptions
from megamm.mcore import process_groups
from megamm.parity.rows import VOCABULARY

LENGTH = [f"data.seq_length={SEQUENCE}"]


def stored_in(step: Path) -> dict[str, torch.Tensor]:
    """Return every stored tensor, whole, read as a run reads it."""
    from megamm.checkpoint import reader

    tensors = {n: torch.empty(s.shape, dtype=s.dtype) for n, s in index.read(step / "tensors").items()}
    reader.load(step / "tensors", [TensorShard.whole(name, tensor) for name, tensor in tensors.items()])
    return tensors


def make(name: str, folder: Path) -> Path:
    write_model(name, folder)
    add_tokenizer(folder, VOCABULARY)
    return folder


SIBLINGS = {"llama2", "llama-linear-tied", "mistral", "qwen2", "qwen2-window", "gemma2", "deepseek-v3"}
SIBLINGS |= {
    "llama3",
    "mistral-window",
    "qwen2-yarn",
    "ministral",
    "gemma",
    "seed-oss",
    "qwen3-moe-not-normed",
    "qwen3-yarn-factor",
    "mistral-yarn-mscale",
}
"""Of `make test-all`: another model whose tensors have the same rules always runs."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.everything if name in SIBLINGS else ()) for name in MODELS]
)
def test_both_ways_have_the_bits_of_the_conversion_in_memory(name: str, tmp_path: Path) -> None:
    folder = make(name, tmp_path / "hf")
    step = import_(folder, tmp_path / "run", nproc=1, shard_size=30_000, overrides=LENGTH)
    family, section, file = read_model(folder)
    state = checkpoint.read_state(step)
    checkpoint.verify(step)
    model = config_from_dict(state.config, where=step).model
    assert model.num_layers == section["num_layers"] and not state.has_optimizer
    assert equal(stored_in(step), mapping.from_transformers(family.rules, file, model))
    assert len(list((step / "tensors").glob("*.distcp"))) > 1
    out = export(tmp_path / "run", tmp_path / "out", nproc=1, shard_size=40_000)
    assert equal(tensors_of(out), file)
    assert len(list(out.glob("*.safetensors"))) > 1
    with Weights(out) as weights:  # by the index
        assert weights.keys() == file.keys()
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "run", "out"}
    assert {path.name for path in (tmp_path / "run").rglob("*") if path.name.startswith(".")} == {".metadata"}


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return hf: a folder of transformers; run: imported from it; out: exported again, in files of 20 kB."""
    folder = tmp_path_factory.mktemp("moe")
    make("qwen3-moe", folder / "hf")
    import_(folder / "hf", folder / "run", nproc=1, overrides=LENGTH)
    export(folder / "run", folder / "out", nproc=1, shard_size=20_000)
    return folder


def same_files(one: Path, other: Path) -> bool:
    files = {path.relative_to(one): path.read_bytes() for path in one.rglob("*") if path.is_file()}
    return files == {path.relative_to(other): path.read_bytes() for path in other.rglob("*") if path.is_file()}


def test_several_processes_write_the_same_bytes(moe: Path, tmp_path: Path) -> None:
    export(moe / "run", tmp_path / "out", nproc=2, shard_size=20_000)
    assert same_files(tmp_path / "out", moe / "out")
    ours, theirs = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (tmp_path / "out", moe / "hf"))
    assert equal(ours, theirs)


def test_a_process_that_is_killed_is_told(moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, parent = os.pwrite, os.getpid()

    def dies(descriptor: int, data: Any, place: int) -> int:
        if place > 0:
            assert os.getpid() != parent
            os.kill(os.getpid(), signal.SIGKILL)
        return pwrite(descriptor, data, place)

    with (
        monkeypatch.context() as patched,
        pytest.raises(UserError, match=r"was killed .*run the command again to resume"),
    ):
        patched.setattr(os, "pwrite", dies)
        export(moe / "run", tmp_path / "out", nproc=2, shard_size=20_000)
    export(moe / "run", tmp_path / "out", nproc=2, shard_size=20_000)
    assert same_files(tmp_path / "out", moe / "out")


def test_a_problem_of_another_process_is_told(moe: Path, tmp_path: Path) -> None:
    """1e6 is out of range for fp16: the process that finds it reports the name; no output is created."""
    folder = tmp_path / "hf"
    shutil.copytree(moe / "hf", folder)
    tensors = tensors_of(folder)
    tensors["model.layers.1.mlp.experts.3.up_proj.weight"][1, 2] = 1e6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"model.layers.1.mlp.experts.3.gate_proj.weight.* 1e\+06, which is out of range for float16"
    ):
        import_(folder, tmp_path / "run", nproc=2, dtype=torch.float16, shard_size=20_000, overrides=LENGTH)
    assert not path_of(tmp_path / "run", 0).exists()


def test_dtypes_are_converted_and_told(moe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="megamm"):
        export(moe / "run", tmp_path / "out", nproc=1, dtype=torch.bfloat16)
    theirs = {name: tensor.bfloat16() for name, tensor in tensors_of(moe / "hf").items()}
    assert equal(tensors_of(tmp_path / "out"), theirs)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert f"export: {len(theirs)} tensors float32 -> bfloat16" in caplog.text
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    step = import_(moe / "hf", tmp_path / "run", nproc=1, dtype=torch.bfloat16, overrides=LENGTH)
    assert all(tensor.dtype == torch.bfloat16 for tensor in stored_in(step).values())
    export(tmp_path / "run", tmp_path / "again", nproc=1)
    assert equal(tensors_of(tmp_path / "again"), theirs)


def test_boxes_of_blocks_that_lie_anywhere(tmp_path: Path) -> None:
    """Tensors stored in random boxes are read by other random boxes, also into non-contiguous memory."""
    draw = random.Random(3)
    tensors = {
        "a": torch.randn(5, 3, 7, 4),
        "b": torch.randn(23, 6).bfloat16(),
        "c": torch.randn(9),
        "d": torch.randn(()),
    }

    def boxes(shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        found: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())]
        for n in shape:
            cuts = sorted({0, n, *draw.sample(range(n), min(2, n))})
            pairs = list(itertools.pairwise(cuts))
            found = [((*o, a), (*s, b - a)) for o, s in found for a, b in pairs]
        return found

    blocks = [
        TensorShard(
            key, tuple(t.shape), o, s, t[tuple(slice(a, a + n) for a, n in zip(o, s, strict=True))].contiguous()
        )
        for key, t in tensors.items()
        for o, s in boxes(tuple(t.shape))
    ]
    process_groups.start(choose("cpu"))
    state = checkpoint.TrainState(0, 0, 1, layout={}, vocabulary=[], config={}, versions={})
    save_now(tmp_path, state, blocks, {"torch": torch.get_rng_state()}, choose("cpu"))
    process_groups.destroy()
    reader = TensorReader(path_of(tmp_path, 0) / "tensors")
    for key, tensor in tensors.items():
        for _ in range(20):
            offset = tuple(draw.randrange(n) for n in tensor.shape)
            size = tuple(draw.randint(1, n - o) for n, o in zip(tensor.shape, offset, strict=True))
            data = torch.empty(size, dtype=tensor.dtype)
            reader.read(TensorShard(key, tuple(tensor.shape), offset, size, data))
            box = tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))
            assert torch.equal(data, tensor[box])
    reader.close()


@pytest.mark.parametrize(
    ("kind", "source", "nproc"),
    [("export", "run", "1"), pytest.param("import", "hf", "2", marks=pytest.mark.everything)],
)
def test_killed_at_any_time_it_goes_on_and_nothing_half_has_the_name(
    kind: str, source: str, nproc: str, moe: Path
) -> None:
    """Run in memory where possible: a shared disk takes minutes for so many small files."""
    script, memory = Path(__file__).parent / "lib" / "convert_kills.py", Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        command = [sys.executable, script, kind, moe / source, Path(folder, "out"), "10", "--nproc", nproc]
        done = warm.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == 10 and found["resumed"] > 2, found


class _Killed(BaseException):
    pass


def _stopped(moe: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Path:
    """Interrupt it after all chunks are written; return the temporary folder."""

    def stop(*_: object) -> None:
        raise _Killed

    with monkeypatch.context() as patched, pytest.raises(_Killed):
        patched.setattr(ConversionJob, "_verify", stop)
        export(moe / "run", out, nproc=1, shard_size=20_000, **options)
    return out.with_name(f".tmp-{out.name}")


def test_what_the_disk_lost_is_made_again(
    moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place = _stopped(moe, tmp_path / "out", monkeypatch)
    file = sorted(place.glob("folder/*.safetensors"))[2]
    damaged = bytearray(file.read_bytes())
    damaged[-3] ^= 4
    file.write_bytes(damaged)
    with caplog.at_level("INFO", logger="megamm"):
        export(moe / "run", tmp_path / "out", nproc=1, shard_size=20_000)
    assert "resuming" in caplog.text and same_files(tmp_path / "out", moe / "out")


def test_what_was_begun_with_other_options_is_removed(
    moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _stopped(moe, tmp_path / "out", monkeypatch, dtype=torch.bfloat16)
    with caplog.at_level("INFO", logger="megamm"):
        export(moe / "run", tmp_path / "out", nproc=1, shard_size=20_000)
    assert "discarding partial output of different inputs" in caplog.text and same_files(tmp_path / "out", moe / "out")


@pytest.fixture
def damaged(moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a copy of the run with 3e38 in a large file; call it to restore the file."""
    monkeypatch.setattr("megamm.convert.export._VERIFIED_FIRST", 4096)
    shutil.copytree(moe / "run", tmp_path / "run")
    (file,) = path_of(tmp_path / "run", 0).glob("tensors/*.distcp")
    whole, state = file.read_bytes(), file.stat()
    assert len(whole) > 4096
    here = whole.index(tensors_of(moe / "hf")["model.layers.1.self_attn.o_proj.weight"].numpy().tobytes())
    file.write_bytes(whole[:here] + b"\x7f\x7f\x7f\x7f" + whole[here + 4 :])

    def restore() -> None:
        file.write_bytes(whole)
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))

    return restore


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=["damage alone", "a value out of range for fp16"])
def test_of_a_damaged_checkpoint_nothing_is_kept(
    damaged: Callable[[], None], moe: Path, tmp_path: Path, dtype: torch.dtype | None
) -> None:
    """Large files are compared with their digests when they are read; output of damaged input is removed."""
    with pytest.raises(UserError, match=r"damaged checkpoint: tensors/\S+ fails its checksum"):
        export(
            tmp_path / "run",
            tmp_path / "out",
            nproc=1,
            dtype=dtype,
            shard_size=20_000,
            verification=VerificationOptions(compare=False),
        )
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_was_made_of_damage_before_a_kill_is_removed(
    damaged: Callable[[], None], moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The restored file has its old size, digest and time; a killed export's output of damaged bytes is not used."""
    place = _stopped(tmp_path, tmp_path / "out", monkeypatch)
    assert b"\x7f\x7f\x7f\x7f" in b"".join(file.read_bytes() for file in place.glob("folder/*.safetensors"))
    damaged()
    export(
        tmp_path / "run", tmp_path / "out", nproc=1, shard_size=20_000, verification=VerificationOptions(compare=False)
    )
    shards = [file.name for file in (moe / "out").glob("*.safetensors")]
    assert shards and all((tmp_path / "out" / s).read_bytes() == (moe / "out" / s).read_bytes() for s in shards)


def test_a_checkpoint_that_is_cut_off_is_passed_over(
    damaged: Callable[[], None], moe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damaged()
    shutil.copytree(path_of(tmp_path / "run", 0), path_of(tmp_path / "run", 7))
    file = max(path_of(tmp_path / "run", 7).glob("tensors/*.distcp"), key=lambda file: file.stat().st_size)
    os.truncate(file, file.stat().st_size - 1)
    export(
        tmp_path / "run", tmp_path / "out", nproc=1, shard_size=20_000, verification=VerificationOptions(logits=False)
    )
    assert same_files(tmp_path / "out", moe / "out") and "skipped: damaged checkpoint" in caplog.text


def converted(kind: str, folder: Path, out: Path) -> None:
    if kind == "export":
        export(folder / "run", out, nproc=1, shard_size=20_000)
    else:
        import_(folder / "hf", out, nproc=1, shard_size=20_000, overrides=LENGTH)


def test_two_at_once_are_refused(moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def second(job: ConversionJob) -> None:
        export(moe / "run", tmp_path / "out", nproc=1)

    monkeypatch.setattr(ConversionJob, "fill", second)
    with pytest.raises(UserError, match="another process is converting to this folder"):
        export(moe / "run", tmp_path / "out", nproc=1)


@pytest.mark.parametrize("kind", ["export", "import"])
def test_a_full_disk_is_told_before_and_while(
    kind: str, moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        usage = shutil.disk_usage(tmp_path)
        patched.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
        with pytest.raises(UserError, match=r"[\d,]{7,} bytes needed, 100,000 bytes free"):
            converted(kind, moe, tmp_path / "out")
    written, pwrite = 0, os.pwrite

    def fills(descriptor: int, data: Any, place: int) -> int:
        nonlocal written
        written += len(data)
        if written > 100_000:
            raise OSError(28, "No space left on device")
        return pwrite(descriptor, data, place)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", fills)
        with pytest.raises(UserError, match=r"cannot write: .*No space left .*run the command again to resume"):
            converted(kind, moe, tmp_path / "out")
    assert not list(tmp_path.glob("out/checkpoints/step*")) and not (tmp_path / "out" / "config.json").exists()
    converted(kind, moe, tmp_path / "out")


def test_a_codec_that_is_gone_is_told_before_anything_is_written(moe: Path, tmp_path: Path) -> None:
    shutil.copytree(moe / "hf", tmp_path / "hf")
    import_(tmp_path / "hf", tmp_path / "run", nproc=1, overrides=LENGTH)
    shutil.rmtree(tmp_path / "hf")
    with pytest.raises(UserError, match=r"tokenizers\.text: no such folder"):
        export(tmp_path / "run", tmp_path / "out", nproc=1)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


@pytest.mark.parametrize("given", ["model.num_layers=2", "model={}"])
def test_the_model_is_not_overridden(moe: Path, tmp_path: Path, given: str) -> None:
    with pytest.raises(UserError, match=r"the folder's config.json defines the model"):
        import_(moe / "hf", tmp_path / "run", overrides=[*LENGTH, given])


LARGEST_RSS = """
import sys
from pathlib import Path
from megamm.convert.export import export
from megamm.convert.import_folder import import_
from megamm.convert.verify.equivalence import VerificationOptions
convert = import_ if sys.argv[1] == "import" else export
checks = VerificationOptions(logits=False)
convert(Path(sys.argv[2]), Path(sys.argv[3]), nproc=1, shard_size=200_000_000, verification=checks)
print(1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.everything
def test_memory_is_a_group_and_half_a_gigabyte(tmp_path: Path) -> None:
    """Both directions and the comparison of all tensors, of a larger model; zeros in sparse files."""
    group = write_synthetic(tmp_path / "hf", layers=28, shards=3, fill=False)
    size = sum(file.stat().st_size for file in (tmp_path / "hf").glob("*.safetensors"))
    assert size > group + 500_000_000
    for kind, source, out in (("import", "hf", "run"), ("export", "run", "out")):
        command = [sys.executable, "-c", LARGEST_RSS, kind, str(tmp_path / source), str(tmp_path / out)]
        done = warm.run(command, env=environment(), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        peak = int(done.stdout.split()[-1])
        assert peak <= group + 500_000_000, f"{kind}: {peak:,}"
    shutil.rmtree(tmp_path / "out")
