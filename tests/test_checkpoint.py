"""Checkpoints with damage, a full disk, another vocabulary, a hostile index, or another megatron-core version."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import environment, make_data, megamm, write_config

from megamm import checkpoint
from megamm.checkpoint import index
from megamm.common.errors import UserError

TRAIN = {"steps": 8, "global_batch_size": 4, "micro_batch_size": 1, "log_every": 1, "stop_after": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    return folder


@pytest.fixture(scope="module")
def trained(data) -> Path:
    """Return checkpoints of steps 2 and 4, written by one rank."""
    output = data / "trained"
    done = megamm("train", write_config(data, output, train=TRAIN))
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """Return a copy to damage."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def _step(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step_{number:08d}"


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "truncated shard": lambda folder: _truncate(next((folder / "tensors").glob("*.distcp"))),
    "flipped bit in a shard": lambda folder: _flip_a_bit(next((folder / "tensors").glob("*.distcp"))),
    "flipped bit in the index": lambda folder: _flip_a_bit(folder / "tensors" / ".metadata"),
    "missing state": lambda folder: (folder / "state.json").unlink(),
    "missing generator states": lambda folder: (folder / "rng_00000.safetensors").unlink(),
    "empty manifest": lambda folder: (folder / "manifest.json").write_text(""),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_passed_over_and_named(run, damage, caplog):
    assert checkpoint.newest(run) == _step(run, 4)
    DAMAGE[damage](_step(run, 4))
    assert checkpoint.newest(run) == _step(run, 2)
    assert "damaged checkpoint" in caplog.text and "step_00000004" in caplog.text


def test_no_valid_checkpoint_stops_the_run_and_overwrites_nothing(data, run):
    """A run must not restart from step 0 over existing damaged checkpoints."""
    for number in (2, 4):
        _truncate(next((_step(run, number) / "tensors").glob("*.distcp")))
    before = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}
    done = megamm("train", write_config(data, run, train=TRAIN | {"stop_after": 8}))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: damaged checkpoint:")
    assert "Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()} == before


def test_resume_after_damage_sets_the_damaged_one_aside(data, run, trained):
    """The run resumes from step 2, writes its own step 4, and keeps the damaged folder under another name."""
    _flip_a_bit(next((_step(run, 4) / "tensors").glob("*.distcp")))
    done = megamm("train", write_config(data, run, train=TRAIN))
    assert done.returncode == 0, done.stderr
    assert "fails its checksum" in done.stderr
    checkpoint.verify(_step(run, 4))
    assert (run / "checkpoints" / "damaged-step_00000004-1").is_dir()
    # The same step again writes the same checkpoint, file by file.
    ours = json.loads((_step(run, 4) / "manifest.json").read_text())["files"]
    theirs = json.loads((_step(trained, 4) / "manifest.json").read_text())["files"]
    assert {k: v["xxh3_128"] for k, v in ours.items() if k.endswith(".distcp")} == {
        k: v["xxh3_128"] for k, v in theirs.items() if k.endswith(".distcp")
    }


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"tokenizers": {"visual": None}}, "another vocabulary"),
        ({"model": {"num_layers": 4}}, "model.num_layers = 2, but the config has 4"),
    ],
)
def test_checkpoint_of_another_model_is_refused(data, run, sections, message, tmp_path):
    config = write_config(data, run, train=TRAIN | {"stop_after": 8}, **sections)
    if "tokenizers" in sections:
        text_only = config.read_text().replace("  visual: null\n", "")
        config.write_text(text_only)
    done = megamm("train", config)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_full_disk_while_saving_is_one_line_and_leaves_earlier_checkpoints(data, tmp_path):
    """Two ranks write to a real file system that fills up at the second checkpoint."""
    small = tmp_path / "small"
    small.mkdir()
    config = write_config(data, small / "run", train=TRAIN, parallel={"tensor": 2})
    config = config.rename(tmp_path / "run.yaml")
    inside = f"""
        mount -t tmpfs -o size=1400k tmpfs {small} && "$@"
        code=$?; cp -r {small}/run/checkpoints {tmp_path}/left; exit $code
    """
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("users cannot make mount namespaces here, so there is no small file system to fill")
    done = subprocess.run(
        [
            "unshare",
            "-rm",
            "sh",
            "-c",
            inside,
            "sh",
            sys.executable,
            "-m",
            "megamm",
            "train",
            str(config),
            "--nproc",
            "2",
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith("error: the checkpoint could not be written"), done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in (tmp_path / "left").glob("step_*")) == ["step_00000002"]
    checkpoint.verify(tmp_path / "left" / "step_00000002")


class _Exploit:
    def __reduce__(self):
        return (os.system, ("touch exploited",))


def test_an_index_with_code_in_it_is_refused_unexecuted(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors = _step(run, 4) / "tensors"
    index.check_index(tensors)
    (tensors / ".metadata").write_bytes(pickle.dumps(_Exploit()))
    with pytest.raises(UserError, match=r"not safe to read: posix\.system is not part"):
        index.check_index(tensors)
    assert not (tmp_path / "exploited").exists()
