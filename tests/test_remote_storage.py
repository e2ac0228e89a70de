"""Remote storage over a real local S3 server: dropped connections, a failing or slow server, kill -9."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from checkpoint_folders import contents, make_checkpoint

from megamm.checkpoint import retention
from megamm.checkpoint.storage import remote
from megamm.checkpoint.storage.remote import STREAMS, RemoteCheckpoints, RemoteError
from megamm.checkpoint.storage.uploader import Uploader
from megamm.common import events
from megamm.common.errors import UserError

boto3 = pytest.importorskip("boto3")
ThreadedMotoServer = pytest.importorskip("moto.server").ThreadedMotoServer
KEY, SECRET = "AKIATESTTESTTESTTEST", "zq7secretsecretsecretzq7"
MEBIBYTE = 1 << 20


@pytest.fixture(scope="module")
def server():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()
    server.stop()


@pytest.fixture
def store(server, monkeypatch):
    """Return (URL of a prefix, boto3's view of the bucket) of a fresh bucket, without any proxy."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{server[0]}:{server[1]}",
    }.items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{time.monotonic_ns()}"
    # An independent client sees what is really stored.
    bucket = boto3.resource("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).create_bucket(Bucket=name)
    yield f"s3://{name}/runs/one", bucket
    remote.fsspec.get_filesystem_class("s3").clear_instance_cache()


class Proxy:
    """TCP between a client and the server; `cut` connections are closed after that many bytes to the server.

    rate: total bytes a second from all connections to the server.
    """

    def __init__(self, server, cuts=0, after=0, rate=None):
        self.server, self.cuts, self.after, self.connections = server, cuts, after, 0
        self.rate, self.line, self.passed = rate, threading.Lock(), 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def _accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            upstream = socket.create_connection(self.server)
            threading.Thread(target=self._pump, args=(client, upstream, True), daemon=True).start()
            threading.Thread(target=self._pump, args=(upstream, client, False), daemon=True).start()

    def _pump(self, source, sink, to_server):
        passed = 0
        try:
            while data := source.recv(65536):
                passed += len(data)
                if to_server and self.cuts and passed > self.after:
                    self.cuts -= 1
                    break
                if to_server and self.rate:
                    with self.line:
                        time.sleep(len(data) / self.rate)
                        self.passed += len(data)
                sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class Answering:
    """A failing HTTP server: it answers every request with one status, after a while."""

    def __init__(self, status, delay=0.0):
        self.status, self.delay, self.requests = status, delay, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def _accept(self):
        while True:
            client, _ = self.listener.accept()
            client.recv(65536)
            self.requests += 1
            time.sleep(self.delay)
            client.sendall(f"HTTP/1.1 {self.status} Ill\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
            client.close()


def stored(bucket, prefix):
    return {o.key.removeprefix(prefix): o.get()["Body"].read() for o in bucket.objects.filter(Prefix=prefix)}


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def test_what_is_uploaded_is_the_folder_and_comes_back(store, tmp_path):
    url, bucket = store
    folder = make_checkpoint(tmp_path / "run", 7)
    tier = RemoteCheckpoints(url)
    assert tier.complete() == []
    copied = tier.upload(folder, tmp_path / "journal")
    assert copied.files == 4 and stored(bucket, "runs/one/step_00000007/") == contents(folder)
    assert tier.complete() == ["step_00000007"]
    assert tier.upload(folder, tmp_path / "journal").files == 0
    tier.download("step_00000007", tmp_path / "back", tier.listed("step_00000007"))
    assert contents(tmp_path / "back") == {k: v for k, v in contents(folder).items() if k != "manifest.json"}


def test_a_connection_that_drops_goes_on_where_it_stopped(server, store, tmp_path, monkeypatch):
    """Every attempt loses its connections within the large file; the small files are not sent again."""
    url, bucket = store
    proxy = Proxy(server, cuts=1000, after=3 * MEBIBYTE)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    folder = make_checkpoint(tmp_path / "run", 7, size=5 * MEBIBYTE)
    tier, journal = RemoteCheckpoints(url), tmp_path / "journal"
    with pytest.raises(RemoteError):
        tier.upload(folder, journal)
    assert proxy.cuts < 1000
    assert tier.complete() == [] and "runs/one/step_00000007/manifest.json" not in {o.key for o in bucket.objects.all()}
    proxy.cuts = 0
    copied = tier.upload(folder, journal)
    assert copied.kept >= 1 and copied.files + copied.kept == 4
    assert stored(bucket, "runs/one/step_00000007/") == contents(folder)


def test_the_uploader_outlasts_a_server_that_fails(server, store, tmp_path, monkeypatch):
    """The server returns status 500 while training continues: failures are reported, then the copy is completed."""
    url, _ = store
    run = tmp_path / "run"
    ill = Answering(500)
    switch = Proxy(server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", switch.url)
    uploader = Uploader(run, url, 2, False)
    try:
        switch.server = tuple(ill.listener.getsockname())
        make_checkpoint(run, 1)
        wait_for(lambda: any(e["kind"] == "upload_failed" for e in events.read(run)), 60)
        switch.server = server
        assert uploader.finish(60)
    finally:
        uploader.stop()
    kinds = [e["kind"] for e in events.read(run)]
    assert kinds.count("saved") == 1 and kinds[-1] == "saved"
    assert RemoteCheckpoints(url).complete() == ["step_00000001"]


def test_a_slow_line_holds_up_no_step_and_takes_no_more_memory(server, store, tmp_path, monkeypatch):
    """2 MB/s, checkpoints of 6 MB twelve times as fast: intermediate ones are skipped, the end waits as configured."""
    url, _ = store
    run, slow = tmp_path / "run", Proxy(server, rate=2e6)
    monkeypatch.setenv("AWS_ENDPOINT_URL", slow.url)
    uploader, looks, memory = Uploader(run, url, 2, False), [], []
    try:
        make_checkpoint(run, 1, size=4 * MEBIBYTE)
        wait_for(lambda: slow.passed > MEBIBYTE, 60)
        for step in range(2, 14):
            make_checkpoint(run, step, size=4 * MEBIBYTE)
            begin = time.monotonic()
            uploader.check()  # all that the run does between its steps
            looks.append(time.monotonic() - begin)
            retention.apply(run, keep=2, keep_best=False)
            memory.append(psutil.Process(uploader.pid).memory_info().rss)
            time.sleep(0.25)
        begin = time.monotonic()
        assert not uploader.finish(0.2) and time.monotonic() - begin < 5, "pending files stay"
        assert slow.passed < 11 * 6 * MEBIBYTE, "the connection was not slow"
        uploader.start()
        assert uploader.finish(60)
    finally:
        uploader.stop()
    assert max(looks) < 1 and max(memory) - memory[0] < 16 * MEBIBYTE, (looks, memory)
    sent = [event["step"] for event in events.read(run) if event["kind"] == "saved"]
    assert sent[-1] == 13 and len(sent) < 8, sent
    there = RemoteCheckpoints(url)
    there.download("step_00000013", tmp_path / "back", there.listed("step_00000013"))
    assert there.store.fs.max_concurrency * STREAMS * 50 * MEBIBYTE < 1 << 30, "large files have parts of 50 MiB"


def test_an_upload_killed_at_any_time_never_counts_and_is_taken_up(server, store, tmp_path, monkeypatch):
    url, bucket = store
    run = tmp_path / "run"
    folder = make_checkpoint(run, 3, size=16 * MEBIBYTE)
    whole, tier = contents(folder), RemoteCheckpoints(url)
    cut_short = 0
    for delay in (0.0, 0.1):
        uploader = Uploader(run, url, 2, False)
        before = {o.key for o in bucket.objects.all()}
        wait_for(lambda before=before: {o.key for o in bucket.objects.all()} != before or tier.complete())
        time.sleep(delay)
        os.kill(uploader.pid, signal.SIGKILL)
        uploader.stop()
        if tier.complete():
            assert stored(bucket, "runs/one/step_00000003/") == whole
            tier.remove("step_00000003")
        else:
            cut_short += 1
    assert cut_short, "every kill was too late"
    uploader = Uploader(run, url, 2, False)
    assert uploader.finish(30)
    assert stored(bucket, "runs/one/step_00000003/") == whole


def test_the_uploader_ends_with_its_run(store, tmp_path):
    """kill -9 of rank 0 leaves no process behind."""
    url, _ = store
    code = f"import time; from pathlib import Path; from megamm.checkpoint.storage.uploader import Uploader; \
        print(Uploader(Path({str(tmp_path)!r}), {url!r}, 1, False).pid, flush=True); time.sleep(60)"
    rank = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(rank.stdout.readline())
    rank.kill()
    rank.wait()

    def ended():
        status = Path(f"/proc/{pid}/status")
        return not status.exists() or "State:\tZ" in status.read_text()

    wait_for(ended)


def test_retention_keeps_the_newest_and_the_best(store, tmp_path):
    url, bucket = store
    tier = RemoteCheckpoints(url)
    for step, loss in ((1, 3.0), (2, 1.5), (3, 2.0), (4, 2.5)):
        tier.upload(make_checkpoint(tmp_path / "run", step, heldout_loss=loss), tmp_path / "journal")
    # An old partial copy is removed, too.
    bucket.put_object(Key="runs/one/step_00000000/tensors/__0_0.distcp", Body=b"half")
    assert tier.apply_retention(1, keep_best=True) == ["step_00000001", "step_00000003"]
    assert tier.complete() == ["step_00000002", "step_00000004"]
    assert stored(bucket, "runs/one/latest")[""] == b"step_00000004\n"
    assert stored(bucket, "runs/one/best")[""] == b"step_00000002\n"
    assert not list(bucket.objects.filter(Prefix="runs/one/step_00000000"))


def test_a_step_saved_again_replaces_the_copy(store, tmp_path):
    url, bucket = store
    tier = RemoteCheckpoints(url)
    tier.upload(make_checkpoint(tmp_path / "one", 5, seed=1), tmp_path / "journal")
    again = make_checkpoint(tmp_path / "two", 5, seed=2)
    tier.upload(again, tmp_path / "journal")
    assert stored(bucket, "runs/one/step_00000005/") == contents(again)


def test_damage_is_not_uploaded_and_not_downloaded(store, tmp_path):
    url, bucket = store
    tier = RemoteCheckpoints(url)
    folder = make_checkpoint(tmp_path / "run", 5)
    tier.upload(folder, tmp_path / "journal")
    bucket.put_object(Key="runs/one/step_00000005/tensors/__0_0.distcp", Body=bytes(1000))
    with pytest.raises(UserError, match=r"__0_0[.]distcp fails its checksum"):
        tier.download("step_00000005", tmp_path / "back", tier.listed("step_00000005"))
    damaged = make_checkpoint(tmp_path / "run", 6)
    (damaged / "tensors" / "__1_0.distcp").write_bytes(bytes(501))
    with pytest.raises(UserError, match=r"__1_0[.]distcp fails its checksum"):
        tier.upload(damaged, tmp_path / "journal")
    assert tier.complete() == ["step_00000005"]


def test_a_store_that_cannot_be_written_is_refused_before_training(store, tmp_path):
    with pytest.raises(UserError, match="bucket does not exist"):
        Uploader(tmp_path, "s3://no-such-bucket-here/x", 1, False)
    with pytest.raises(UserError, match="is not a URL"):
        RemoteCheckpoints("/plain/path")
    with pytest.raises(UserError, match="protocol"):
        RemoteCheckpoints("nonsense://x/y")


@pytest.mark.parametrize("url", ["s3://me:hunter2hunter2@bucket/x", "s3://bucket/x?token=hunter2hunter2"])
def test_secrets_in_a_url_are_refused_and_not_repeated(url):
    with pytest.raises(UserError) as caught:
        RemoteCheckpoints(url)
    assert "hunter2" not in str(caught.value) and "environment" in str(caught.value)
