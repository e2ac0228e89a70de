"""The rendered Indexed Job in a real run: two pods train, one is killed, both are drained: identical results."""

import copy
import shutil
import sys
import time

import fault_matrix
import pods
import pytest
from faults import FOLDER
from faults import environment as with_faults
from manifests import K8S, container, job_spec, render
from pods import IndexedJob
from ports import free_port
from tiny_run import environment, write_config

from megamm.common import events

pytestmark = pytest.mark.skipif(bool(pods.why_not()), reason=pods.why_not())

WORK = "/mnt/work"
SECTIONS = {
    "train": fault_matrix.TRAIN,
    "checkpoint": fault_matrix.CHECKPOINT | {"local": "/mnt/local"},
    "resilience": {"hang_seconds": 60, "rendezvous": {"last_call_timeout": 1, "keep_alive_interval": 1}},
}


@pytest.fixture(scope="module")
def work(undisturbed, tmp_path_factory):
    """Return the volume: data and the baseline run. It is a copy, as pods change the owner."""
    folder = tmp_path_factory.mktemp("work")
    for name in ("shards", "tokenizers", "baseline", "baseline.records"):
        shutil.copytree(undisturbed / name, folder / name)
    return folder


@pytest.fixture
def job(work, tmp_path):
    """Return (name, faults) -> the Job of local-cpu with the tiny config of that name, a free port, the variables."""

    def make(name, faults):
        config = tmp_path / "config"
        config.mkdir()
        text = write_config(work, work / name, **SECTIONS).read_text()
        (config / "run.yaml").write_text(text.replace(str(work), WORK))
        (work / f"{name}.records").mkdir()
        for path in [work, *work.rglob("*")]:  # like fsGroup
            shutil.chown(path, user=10001, group=10001)
        spec = copy.deepcopy(job_spec(render(K8S / "overlays" / "local-cpu")))
        port = free_port()
        given = container(spec)
        given["args"] = [text.replace(":29400", f":{port}") for text in given["args"]]
        image = {key: environment()[key] for key in ("OMP_NUM_THREADS", "PYTHONPATH", "PYTHONWARNINGS")}
        image["PATH"] = f"{sys.prefix}/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        image = with_faults(faults, image) | {FOLDER: f"{WORK}/{name}.records"}
        labels = {"batch.kubernetes.io/job-name": "megamm"}
        return IndexedJob(spec, tmp_path / "pods", {"config": config, "work": work}, labels, image)

    return make


def of_kind(run, *kinds):
    return [event for event in events.read(run) if event["kind"] in kinds]


def injected(run, fault):
    return [event for event in of_kind(run, "injected") if event["fault"] == fault]


def test_pods_are_killed_and_drained(work, job, request):
    """The pod that hosts the store is cut off, then both are drained, one while the other writes its checkpoint.

    With `make test-all` another pod starts after the last step, and finds that all is done.
    """
    run, paused = work / "run", work / "run.records" / "paused"
    with job("run", "pause@step:3:0:0,until_asked@step:6:1:*,pause@save:6:0:*") as pods_of:
        pods_of.start(1)
        pods_of.start(0)
        pods_of.until(paused.exists)
        pods_of.pods[0].cut_power()
        paused.unlink()
        pods_of.until(lambda: injected(run, "until_asked"))
        assert pods_of.ended == [(0, 137, "Count")], pods_of.story()

        begin = time.monotonic()
        pods_of.pods[0].drain()
        pods_of.until(paused.exists)
        pods_of.pods[1].drain()
        pods_of.until(lambda: len(of_kind(run, "signal")) == 2)
        paused.unlink()
        pods_of.until(lambda: len(pods_of.ended) == 3)
        assert time.monotonic() - begin < pods_of.job["template"]["spec"]["terminationGracePeriodSeconds"]
        assert sorted(pods_of.ended[1:]) == [(0, 75, "Ignore"), (1, 75, "Ignore")], pods_of.story()

        pods_of.until(lambda: pods_of.state != "running")
        assert pods_of.state == "complete", pods_of.story()
        assert fault_matrix.differences(work, "run", 0) == [], pods_of.story()

        if not request.config.getoption("everything"):
            return
        late = pods_of.start(1)  # lost after the last step, before its exit code was seen
        pods_of.until(lambda: late.exit_code() is not None)
        assert late.exit_code() == 0, pods_of.story()
