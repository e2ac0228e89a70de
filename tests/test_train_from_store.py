"""Runs on shards at a URL: bit for bit those on local shards, over faults, kills, a small cache and a resume."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from faults import environment as with_faults
from run_folders import read_tensors, step_folder
from shard_store import Request, serve
from tiny_run import environment, make_data, megamm, numbers, write_config

TRAIN = {"steps": 40, "global_batch_size": 4, "eval_every": 20, "log_every": 5}
"""Two epochs of the 58 samples that are trained on."""
CHECKPOINT = {"every": 6, "keep": 9}


def of_training(run: Path) -> list[dict[str, Any]]:
    """The values of a run that do not depend on where its shards are."""
    return [{k: v for k, v in line.items() if not k.startswith(("store", "cache"))} for line in numbers(run)]


def of_store(run: Path) -> dict[str, Any]:
    """The last line of a run that has figures of the store."""
    return [line for line in numbers(run) if "store_bytes" in line][-1]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return shards, tokenizers and a run of two ranks on the local shards."""
    folder = tmp_path_factory.mktemp("made")
    make_data(folder)
    done = megamm("train", config(folder, "local", str(folder / "shards" / "drawn")), "--nproc", 2)
    assert done.returncode == 0, done.stderr
    return folder


def config(made: Path, name: str, source: str, **cache: object) -> Path:
    """Write the config of a run on that source."""
    data = {
        "sources": [{"path": source}],
        "workers": 2,
        "cache": {"folder": str(made / f"{name}-cache"), "patience": 30} | cache,
    }
    if "://" not in source:
        del data["cache"]
    return write_config(made, made / name, train=TRAIN, checkpoint=CHECKPOINT, data=data)


def needed(made: Path) -> int:
    """Bytes of all token caches, with their indexes."""
    return sum(file.stat().st_size for file in (made / "shards" / "drawn").glob("*/*.tokens-*/*"))


def same(made: Path, name: str) -> None:
    """Assert that this run has the numbers and the tensors of the local one."""
    assert of_training(made / name) == of_training(made / "local")
    ours, theirs = (read_tensors(step_folder(made / run, TRAIN["steps"])) for run in (name, "local"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[tensor], theirs[tensor]) for tensor in theirs)


@pytest.mark.everything
def test_a_run_of_two_ranks_is_the_local_one_over_faults_a_kill_and_a_resume(made: Path) -> None:
    def fault(request: Request) -> str | int | None:
        return {3: "cut", 5: 503, 9: "damage", 11: "cut"}.get(request.number)

    with serve(made / "shards") as store:
        store.fault = fault
        path = config(made, "killed", f"{store.url}/drawn")
        command = [sys.executable, "-m", "megamm", "train", str(path), "resilience.max_restarts=0", "--nproc", "2"]
        env = with_faults("sigkill_once_saved@step:12:1:0", environment())
        died = warm.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert died.returncode == 1 and not step_folder(made / "killed", TRAIN["steps"]).exists(), died.stderr
        resumed = megamm("train", path, "--nproc", 2)
        assert resumed.returncode == 0, resumed.stderr
        failed = sum(r.stop - r.start for r in store.requests if fault(r) == "damage")
        assert store.sent - failed <= 1.05 * needed(made)
    same(made, "killed")
    last = of_store(made / "killed")
    assert last["store_bytes"] <= store.sent and last["store_failures"] == 4 and last["store_wait"] >= 0


@pytest.mark.everything
def test_a_cache_smaller_than_the_source_holds_its_limit(made: Path) -> None:
    limit = 90_000
    with serve(made / "shards") as store:
        done = megamm("train", config(made, "small", f"{store.url}/drawn", gb=limit / 1e9, ahead=2), "--nproc", 2)
        assert done.returncode == 0, done.stderr
    same(made, "small")
    assert sum(path.lstat().st_blocks * 512 for path in (made / "small-cache").rglob("*")) <= limit
    assert of_store(made / "small")["cache_evicted_bytes"] > 0


@pytest.mark.everything
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (503, "the store failed for 2 seconds"),
        (403, "the store refuses to read it"),
        (404, "the store has no such file"),
        ("hang", "the store failed for 2 seconds"),
    ],
)
def test_a_store_that_fails_during_a_run_ends_it_in_one_line(made: Path, fault: str | int, message: str) -> None:
    with serve(made / "shards") as store:
        store.fault = lambda request: (
            fault if request.name.startswith("drawn/train/") and "tar" in request.name else None
        )
        path = config(made, f"fails-{fault}", f"{store.url}/drawn", patience=2)
        done = megamm("train", path, "--nproc", 2)
    lines = [line for line in done.stderr.splitlines() if message in line and "trying again" not in line]
    assert done.returncode == 2 and len(lines) == 1 and "http://127.0.0.1" in lines[0], done.stderr


@pytest.mark.everything
def test_s3_and_a_dry_run(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boto3, moto = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        address = "http://{}:{}".format(*server.get_host_and_port())
        for name, value in {
            "AWS_ACCESS_KEY_ID": "AKIATESTTESTTESTTEST",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": address,
        }.items():
            monkeypatch.setenv(name, value)
        bucket = boto3.resource("s3", endpoint_url=address).create_bucket(Bucket="shards")
        root = made / "shards"
        for file in root.glob("drawn/*/*.tokens-*/*"):
            bucket.upload_file(str(file), f"my/{file.relative_to(root)}")
        path = config(made, "s3", "s3://shards/my/drawn")
        checked = megamm("train", path, "--dry-run")
        assert checked.returncode == 0, checked.stderr
        done = megamm("train", path, "--nproc", 2)
        assert done.returncode == 0, done.stderr
        missing = megamm("train", path, "data.sources=[{path: s3://shards/no/drawn}]", "--dry-run")
        assert missing.returncode == 2 and "s3://shards/no/drawn" in missing.stderr, missing.stderr
    finally:
        server.stop()
    same(made, "s3")
