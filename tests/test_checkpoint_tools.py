"""`megamm checkpoint …`, pointers, best and remote copies of real runs; hostile checkpoints; no leaked secrets."""

import contextlib
import errno
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
import warm
from checkpoint_folders import make_checkpoint, read_whole, write_manifest
from tiny_run import environment, make_data, megamm, write_config
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.api import CheckpointException
from typer.testing import CliRunner

from megamm import checkpoint, cli
from megamm.checkpoint import files, inspect, retention, whole_tensors
from megamm.checkpoint.storage.remote import RemoteCheckpoints
from megamm.common import events
from megamm.common.errors import UserError
from megamm.config import config_from_dict

TRAIN = {"steps": 8, "global_batch_size": 4, "micro_batch_size": 1, "log_every": 1, "eval_every": 2, "stop_after": 6}
SECRET = "zq7secretsecretsecretzq7"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Train 6 steps with checkpoints 2, 4, 6, copied to file://…/remote; secrets are in its environment."""
    folder = tmp_path_factory.mktemp("trained")
    make_data(folder)
    section = {"every": 2, "keep": 3, "keep_best": True, "remote": f"file://{folder}/remote"}
    config = write_config(folder, folder / "run", train=TRAIN, checkpoint=section)
    secrets = {"AWS_SECRET_ACCESS_KEY": SECRET, "MY_TOKEN": SECRET}
    command = [sys.executable, "-m", "megamm", "train", str(config)]
    done = warm.run(command, env=environment() | secrets, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (folder / "printed").write_text(done.stdout + done.stderr)
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """Return a copy to damage."""
    return Path(shutil.copytree(trained / "run", tmp_path / "run"))


def checkpoint_command(*arguments):
    """Return exit code and lines."""
    done = CliRunner().invoke(cli.app, ["checkpoint", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout.splitlines()


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step_{number:08d}"


def heldout(folder: Path) -> float:
    return json.loads((folder / "state.json").read_text())["heldout_loss"]


def test_run_is_copied_pointed_at_and_measured(trained):
    run, remote = trained / "run", trained / "remote"
    names = [f"step_{n:08d}" for n in (2, 4, 6)]
    assert retention.complete(run) == names
    assert RemoteCheckpoints(f"file://{remote}").complete()[-1] == names[-1]
    losses = {name: heldout(run / "checkpoints" / name) for name in names}
    lowest = min(names, key=lambda name: losses[name])
    for folder in (run / "checkpoints", remote):
        assert (folder / "latest").read_text() == names[-1] + "\n"
        assert (folder / "best").read_text() == lowest + "\n"
    # Independent reference: the run's report of the held-out losses at step 6, weights 1.
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row.get("step") == 6 and any(k.startswith("heldout/") for k in row)][-1]
    known = [value for key, value in last.items() if key.startswith("heldout/") and value is not None]
    assert losses[names[-1]] == pytest.approx(sum(known) / len(known), rel=1e-6)


def test_no_secret_of_the_environment_is_in_a_run(trained):
    files = [
        p for p in trained.rglob("*") if p.is_file() and (p.parts[len(trained.parts)] in ("run", "remote", "printed"))
    ]
    assert len(files) > 10
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


@pytest.mark.parametrize("url", ["s3://me:hunter2hunter2@bucket/x", "s3://bucket/x?token=hunter2hunter2"])
def test_config_refuses_secrets_without_repeating_them(trained, url):
    import yaml

    config = yaml.safe_load((trained / "run.yaml").read_text())
    config["checkpoint"]["remote"] = url
    with pytest.raises(UserError) as caught:
        config_from_dict(config, "run.yaml")
    assert "hunter2" not in str(caught.value)


def test_best_needs_a_measurement(trained):
    import yaml

    config = yaml.safe_load((trained / "run.yaml").read_text())
    config["train"]["eval_every"] = 0
    with pytest.raises(UserError, match="no held-out loss is ever measured"):
        config_from_dict(config, "run.yaml")


def test_resume_from_remote_storage_is_the_same_run(trained, tmp_path):
    """Without RUN/checkpoints, steps 7 and 8 have the losses of a run that resumed from its own folder."""
    lost, own = (Path(shutil.copytree(trained / "run", tmp_path / name)) for name in ("lost", "own"))
    shutil.rmtree(lost / "checkpoints")
    told = []
    for output, remote in ((lost, f"file://{trained}/remote"), (own, None)):
        section = {"every": 0, "keep": 3, "keep_best": True} | ({"remote": remote} if remote else {})
        done = megamm("train", write_config(trained, output, train=TRAIN | {"stop_after": 8}, checkpoint=section))
        assert done.returncode == 0, done.stderr
        told.append([e["tier"] for e in events.read(output) if e["kind"] == "resumed"])
    assert told == [["remote"], ["run"]]
    assert checkpoint_command("diff", lost, own)[1][-1].endswith("tensors are bit-identical")
    names = whole_tensors.described(step(own, 8))
    assert not list(whole_tensors.differences(step(lost, 8), step(own, 8), names))


def test_list_and_verify(run, trained):
    code, lines = checkpoint_command("list", run, f"file://{trained}/remote")
    assert code == 0 and [line.split()[0] for line in lines][:3] == ["2", "4", "6"]
    assert all("valid" in line for line in lines) and "remote " in lines[-1] and "newest" in lines[2]
    assert sum("best" in line.split() for line in lines[:3]) == 1
    assert checkpoint_command("verify", run, f"file://{trained}/remote")[0] == 0
    shard = next((step(run, 4) / "tensors").glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    code, lines = checkpoint_command("verify", run)
    assert code == 1 and f"damaged: tensors/{shard.name} fails its checksum" in lines[1]
    assert lines[0].endswith(": valid") and lines[2].endswith(": valid")
    (step(run, 6) / "state.json").unlink()
    assert "damaged: state.json is missing or truncated" in checkpoint_command("list", run)[1][2]


def test_show(run):
    code, lines = checkpoint_command("show", run)
    assert code == 0 and "step: 6" in lines
    metadata = FileSystemReader(step(run, 6) / "tensors").read_metadata().state_dict_metadata
    for name, entry in metadata.items():
        if hasattr(entry, "properties"):
            assert f"{name}  {list(entry.size)}  {str(entry.properties.dtype).removeprefix('torch.')}" in lines
    assert checkpoint_command("show", "--config", step(run, 4))[1].count("train.steps = 8") == 1


def test_diff_finds_every_difference(run):
    """Compare with whole tensors read by torch's own loader."""
    code, lines = checkpoint_command("diff", step(run, 2), step(run, 6))
    assert code == 1 and "step: 2 -> 6" in lines
    both = []
    for number in (2, 6):
        entries = whole_tensors.described(step(run, number))
        state = {name: torch.empty(e.shape, dtype=getattr(torch, e.dtype)) for name, e in entries.items()}
        load(state, storage_reader=FileSystemReader(step(run, number) / "tensors"), no_dist=True)
        both.append(state)
    differing = {name for name in both[0] if not torch.equal(both[0][name], both[1][name])}
    assert differing
    for name in differing:
        difference = (both[0][name] - both[1][name]).abs().max()
        count = int((both[0][name] != both[1][name]).sum())
        (line,) = [text for text in lines if text.startswith(f"{name}: ")]
        assert line == f"{name}: {count:,} of {both[0][name].numel():,} differ, by {difference:.3g} at most"
    assert lines[-1] == f"{len(both[0]) - len(differing)} tensors are bit-identical"
    assert checkpoint_command("diff", step(run, 6), run) == (0, [f"{len(both[0])} tensors are bit-identical"])


def test_a_full_disk_gets_room_before_the_pointers_and_they_stay_valid(tmp_path, monkeypatch):
    run, fits = tmp_path / "run", 2
    for step in (2, 4, 6):
        make_checkpoint(run, step)
    retention.apply(run, keep=3, keep_best=False)
    make_checkpoint(run, 8)
    plain = files.write

    def write(path, pieces):
        if len(retention.complete(run)) > fits:
            raise OSError(errno.ENOSPC, "no space")
        return plain(path, pieces)

    monkeypatch.setattr(files, "write", write)
    latest = run / "checkpoints" / "latest"
    assert retention.apply(run, keep=2, keep_best=False) == ["step_00000002", "step_00000004"]
    assert retention.complete(run) == ["step_00000006", "step_00000008"] and latest.read_text() == "step_00000008\n"
    make_checkpoint(run, 10)
    fits = 0
    with pytest.raises(OSError, match="no space"):
        retention.apply(run, keep=1, keep_best=False)
    assert retention.complete(run) == ["step_00000008", "step_00000010"] and latest.read_text() == "step_00000008\n"


def test_prune_says_first_and_keeps_the_valid_and_the_best(tmp_path):
    run = tmp_path / "run"
    for number, loss in ((1, 2.0), (2, 1.0), (3, 3.0), (4, 4.0), (5, 5.0)):
        make_checkpoint(run, number, heldout_loss=loss)
    (step(run, 5) / "tensors" / "__0_0.distcp").write_bytes(bytes(1000))
    code, lines = checkpoint_command("prune", run, "--keep", 1)
    assert code == 0 and [line.split("_")[-1] for line in lines[:-1]] == ["00000001", "00000003"]
    assert len(retention.complete(run)) == 5
    assert checkpoint_command("prune", run, "--keep", 1, "--delete")[0] == 0
    assert retention.complete(run) == [f"step_{n:08d}" for n in (2, 4, 5)]
    retention.set_uploading(run, "step_00000002")
    assert retention.apply(run, keep=1, keep_best=False) == ["step_00000004"]
    assert retention.complete(run) == ["step_00000002", "step_00000005"]


def test_prune_without_a_valid_one_removes_nothing(tmp_path):
    for number in (1, 2, 3):
        (make_checkpoint(tmp_path, number) / "state.json").write_text("{}")
    with pytest.raises(UserError, match="no valid checkpoint"):
        checkpoint_command("prune", tmp_path, "--keep", 1, "--delete")
    assert len(retention.complete(tmp_path)) == 3


def test_best_ignores_what_is_not_a_number():
    assert retention.best_of({"step_00000001": None, "step_00000002": 1.0, "step_00000003": 1.0}) == "step_00000003"
    assert retention.best_of({}) is None
    for state in (b"", b"[]", b'{"heldout_loss": NaN}', b'{"heldout_loss": "1"}', b'{"heldout_loss": Infinity}'):
        assert retention.heldout_loss(state) is None


def test_nothing_there_is_one_line(tmp_path):
    for place in (tmp_path, tmp_path / "absent", f"file://{tmp_path}"):
        with pytest.raises(UserError, match="no checkpoint found"):
            inspect.find(str(place))


# --- hostile checkpoints ---


class _Exploit:
    def __reduce__(self):
        return (os.system, ("touch exploited",))


HOSTILE = {
    "index": lambda folder: (folder / "tensors" / ".metadata").write_bytes(pickle.dumps(_Exploit())),
    "common.pt": lambda folder: (folder / "tensors" / "common.pt").write_bytes(pickle.dumps(_Exploit())),
    "common.pt as torch saves it": lambda folder: torch.save(_Exploit(), folder / "tensors" / "common.pt"),
    "a shard": lambda folder: [torch.save(_Exploit(), path) for path in (folder / "tensors").glob("*.distcp")],
    "generators": lambda folder: torch.save(_Exploit(), folder / "rng_00000.safetensors"),
}


@pytest.mark.parametrize("place", HOSTILE)
def test_code_in_a_checkpoint_is_never_executed(run, place, tmp_path, monkeypatch):
    """Its manifest is valid; a resuming run, an export and the tools execute nothing of it."""
    monkeypatch.chdir(tmp_path)
    folder = step(run, 6)
    HOSTILE[place](folder)
    write_manifest(folder)
    checkpoint.verify(folder)
    readers = [lambda: read_whole(folder / "tensors"), lambda: checkpoint.read_rng(folder, 0)]
    readers += [lambda: checkpoint_command("show", folder), lambda: checkpoint_command("diff", folder, step(run, 4))]
    for read in readers:
        with contextlib.suppress(Exception, CheckpointException):  # that it is rejected, and how, is not tested here
            read()
    assert not list(tmp_path.rglob("exploited"))
    if place == "index":
        pickle.loads((folder / "tensors" / ".metadata").read_bytes())
        assert (tmp_path / "exploited").exists(), "the exploit must work, or the test cannot fail"


def test_an_index_that_leaves_its_folder_is_refused(run):
    """A stored item's file is named relative to the folder and must not point outside it."""
    path = step(run, 6) / "tensors" / ".metadata"
    metadata = FileSystemReader(path.parent).read_metadata()
    for stored in metadata.storage_data.values():
        stored.relative_path = "../../step_00000004/tensors/__0_0.distcp"
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"not safe to read: .*is not a file in the folder"):
        whole_tensors.described(step(run, 6))


def test_a_manifest_that_leaves_its_folder_is_refused(tmp_path):
    folder = make_checkpoint(tmp_path / "run", 1)
    (tmp_path / "secret").write_bytes(b"")
    write_manifest(folder, evil="../../../secret")
    assert "which is not a file of a checkpoint" in inspect.find_one(str(folder)).problem()
    tier = RemoteCheckpoints(f"file://{tmp_path}/remote")
    with pytest.raises(UserError, match="which is not a file of a checkpoint"):
        tier.upload(folder, tmp_path / "journal")
    shutil.copytree(folder, tmp_path / "remote" / folder.name)
    assert tier.complete() == []
    with pytest.raises(UserError, match="which is not a file of a checkpoint"):
        tier.download(folder.name, tmp_path / "back", ["../../../secret"])
