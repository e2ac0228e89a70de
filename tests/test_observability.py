"""Metrics and events of a run that is really killed and resumed: metrics, goodput, Prometheus, the report."""

import json
import re
import signal
import sys
import time
import urllib.request
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pytest
import warm
from faults import environment as with_faults
from ports import free_port
from prometheus_client.parser import text_string_to_metric_families
from tiny_run import environment, make_data, megamm, write_config

from megamm.common import events, redact
from megamm.common.errors import UserError
from megamm.config import MetricsConfig
from megamm.elastic import heartbeat
from megamm.observability import metrics
from megamm.observability.goodput import account
from megamm.observability.prometheus import TEXTFILE, Exporter
from megamm.observability.report.page import Series, number, plot, thin, ticks
from megamm.observability.report.run import write_report

STEPS = 24
DEVICES = metrics.Devices(1, None)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Run, killed after the line of step 14, then resumed; lines every 2 steps, checkpoints every 5."""
    folder = tmp_path_factory.mktemp("observed")
    make_data(folder)
    train = {"steps": STEPS, "global_batch_size": 4, "micro_batch_size": 1, "log_every": 2, "eval_every": 8}
    config = write_config(folder, folder / "run", train=train, checkpoint={"every": 5})
    output = folder / "run"
    env = with_faults("kill_command_once_saved@data:15:0:0", environment())
    killed = warm.run([sys.executable, "-m", "megamm", "train", str(config)], env=env)
    assert killed.returncode == -signal.SIGKILL
    done = megamm("train", config)
    assert done.returncode == 0, done.stderr
    return output


def test_lines_tell_where_the_time_went(run):
    lines = [line for line in metrics.read_lines(run) if "tokens_per_s" in line]
    for line in lines:
        assert line["tokens_per_s"] * line["step_seconds"] == pytest.approx(line["steps"] * 4 * 64)
        assert 0 <= line["data_wait_seconds"] <= line["step_seconds"]
        assert line["data_wait_seconds"] / line["step_seconds"] == pytest.approx(line["data_wait_share"])
        assert 0 < line["goodput"] <= 1
    assert [line["restarts"] for line in lines] == sorted(line["restarts"] for line in lines)
    assert lines[0]["restarts"] == 0 and lines[-1]["restarts"] == 1
    heldout = [line for line in metrics.read_lines(run) if "heldout/text" in line]
    assert [line["step"] for line in heldout] == [8, 16, 24]
    assert all(line["evaluation_seconds"] > 0 for line in heldout)
    # The checkpoint of step 5 was written between the lines of steps 4 and 6.
    stalls = {line["step"]: line["checkpoint_stall_seconds"] for line in lines}
    assert stalls[6] > 0 == stalls[4]


def test_lines_of_steps_made_again_are_kept_apart(run):
    kept, everything = metrics.read_lines(run), metrics.read_all_lines(run)
    dropped = [line for line in everything if line not in kept]
    assert [line["step"] for line in kept] == sorted(line["step"] for line in kept)
    resumed_at = next(line["step"] - line["steps"] for line in kept if line.get("restarts") == 1)
    assert dropped and all(line["step"] > resumed_at for line in dropped)
    # A kill between writing the dropped lines and the kept ones leaves them in both files: each counts once.
    with (run / metrics.DROPPED).open("a") as file:
        file.write(json.dumps(kept[-1]) + "\n")
    assert len(metrics.read_all_lines(run)) == len(everything)


def test_goodput_of_a_killed_run(run):
    lines = metrics.read_all_lines(run)
    result = account(events.read(run), lines)
    records = [r["time"] for r in lines + events.read(run)]
    assert result.wall == pytest.approx(max(records) - min(records), abs=0.2)
    assert result.attempts == 2
    # Reference: every second of every step, from the last attempt that ran it.
    seconds = {}
    for line in sorted(lines, key=lambda line: line["time"]):
        for step in range(line["step"] - line.get("steps", 0) + 1, line["step"] + 1):
            seconds[step] = (line["step_seconds"] - line["data_wait_seconds"]) / line["steps"]
    assert sorted(seconds) == list(range(1, STEPS + 1))
    assert result.seconds["productive"] == pytest.approx(sum(seconds.values()))
    assert result.seconds["repeated"] > 0 and result.seconds["start_up"] + result.seconds["down"] > 0
    last = max((line for line in lines if "goodput" in line), key=lambda line: line["time"])
    then = account(
        [e for e in events.read(run) if e["time"] <= last["time"]], [x for x in lines if x["time"] <= last["time"]]
    )
    assert last["goodput"] == pytest.approx(then.ratio, rel=0.02)


def test_going_back_and_restarts_in_one_process(tmp_path):
    """The loss guard's roll-back drops lines like a restart, but is not counted as one; only the launcher restarts."""
    values = {"loss/text": 2.0, "grad_norm": None, "lr": 0.1, "data_wait": 0.0}
    events.record(tmp_path, "launched", restart=0)
    writer = metrics.Metrics(tmp_path, 0, 10)
    events.record(tmp_path, "started", step=0)
    for step in (2, 4, 6):
        writer.report(step, values | {"model_flops": 1e6}, 64, DEVICES)
    writer.go_back(3)
    writer.report(5, values | {"model_flops": 1e6}, 64, DEVICES)
    writer.close()
    assert [(x["step"], x["steps"], x["restarts"]) for x in metrics.read_lines(tmp_path)] == [(2, 2, 0), (5, 2, 0)]
    dropped = [x for x in metrics.read_all_lines(tmp_path) if x not in metrics.read_lines(tmp_path)]
    assert [x["step"] for x in dropped] == [4, 6]
    seconds = {x["step"]: x["step_seconds"] for x in metrics.read_all_lines(tmp_path)}
    result = account(events.read(tmp_path), metrics.read_all_lines(tmp_path))
    assert result.seconds["productive"] == pytest.approx(seconds[2] + seconds[4] / 2 + seconds[5])
    events.record(tmp_path, "failed", rank=0, step=6, phase="step", cause="x")
    events.record(tmp_path, "restarting", restart=1, teardown=0.0, rendezvous=0.0)
    events.record(tmp_path, "resumed", step=4, seconds=0.0)
    again = metrics.Metrics(tmp_path, 4, 10)
    assert again.restarts == 1
    again.close()
    assert [x["step"] for x in metrics.read_lines(tmp_path)] == [2]


def _samples(text: str) -> dict[tuple[str, ...], float]:
    """Return (name, further labels' values ...) -> value, with Prometheus's own parser."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k != "run"}
            assert sample.labels["run"] == "run"
            found[(sample.name, *(labels[k] for k in sorted(labels)))] = sample.value
    return found


def test_textfile_is_read_back_by_prometheus(run):
    found = _samples((run / TEXTFILE).read_text())
    last = [line for line in metrics.read_lines(run) if "tokens_per_s" in line][-1]
    assert found[("megamm_step",)] == STEPS == found[("megamm_target_steps",)]
    assert found[("megamm_loss_nats", "text", "train")] == pytest.approx(last["loss/text"])
    assert found[("megamm_tokens_per_second",)] == pytest.approx(last["tokens_per_s"])
    assert found[("megamm_goodput_ratio",)] == pytest.approx(last["goodput"])
    assert found[("megamm_restarts",)] == 1
    assert found[("megamm_loss_nats", "text", "heldout")] > 0
    assert found[("megamm_report_timestamp_seconds",)] == pytest.approx(metrics.read_lines(run)[-1]["time"], abs=0.001)
    mine = [line for line in metrics.read_lines(run) if line["time"] > last["time"] - 1e9]
    stall = sum(line["checkpoint_stall_seconds"] for line in mine[-1:])
    assert found[("megamm_checkpoint_stall_seconds_total",)] >= stall
    assert not list(run.glob(f"{TEXTFILE}.*")), "a temporary file was left"


def _beat(run: Path, rank: int, seconds: float, attempt: int) -> None:
    (run / "heartbeats").mkdir(exist_ok=True)
    beat = heartbeat.Beat(rank, pid=1, host="node", phase="step", step=1, count=1, time=seconds, attempt=attempt)
    (run / "heartbeats" / f"node_{rank:05d}.json").write_text(json.dumps(asdict(beat)))


def test_endpoint_tells_of_a_hang(tmp_path):
    """While nothing is reported, the oldest heartbeat stays, and its age grows for a reader.

    Ranks of a larger, earlier world do not count, nor does a file that is being replaced.
    """
    folder = tmp_path / "run"
    folder.mkdir()
    killed = folder / f"{TEXTFILE}.1.2"  # a run was killed while writing it
    killed.touch()
    port = free_port()
    config = MetricsConfig(prometheus_port=port)
    exporter = Exporter(folder, total_steps=10, step=3, restarts=2, config=config)
    try:

        def scrape() -> dict[tuple[str, ...], float]:
            exporter.read_cost = 0.0  # so that the heartbeats are read again
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
                return _samples(page.read().decode())

        assert not killed.exists()
        assert str(scrape()[("megamm_heartbeat_oldest_timestamp_seconds",)]) == "nan"
        assert exporter.heartbeat_age() == {}
        now = time.time()
        for rank, (age, attempt) in enumerate([(2, 5), (90, 5), (1, 5), (5000, 4)]):
            _beat(folder, rank, now - age, attempt)
        (folder / "heartbeats" / "node_00009.json").write_text('{"rank"')
        found = scrape()
        assert found[("megamm_heartbeat_oldest_timestamp_seconds",)] == pytest.approx(now - 90, abs=0.001)
        assert (found[("megamm_step",)], found[("megamm_restarts",)]) == (3, 2)
        assert exporter.heartbeat_age()["heartbeat_age"] == pytest.approx(90, abs=30)
        exporter.update({"step": 4, "loss/image": None, "loss/text": 1.5, "grad_norm": None, "mfu": 0.4, "time": now})
        found = scrape()
        assert found[("megamm_model_flops_utilization_ratio",)] == 0.4
        assert str(found[("megamm_loss_nats", "image", "train")]) == "nan"
        with pytest.raises(UserError, match="prometheus_port"):
            Exporter(folder, 10, 3, 2, config)
    finally:
        exporter.close()
    Exporter(folder, 10, 3, 3, config).close()  # the port is free again: a restarted run uses it
    assert _samples((folder / TEXTFILE).read_text())[("megamm_restarts",)] == 3


class _Page(HTMLParser):
    """Checks that elements are closed in order, and collects everything that a page loads or runs."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.foreign, self.tags, self.text = [], [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.foreign += [value for key, value in attrs if key in ("src", "href", "xlink:href", "action", "onload")]
        if tag not in ("meta", "br", "line", "path", "circle", "rect", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if tag in ("line", "path", "rect"):
            return
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_report_of_a_killed_run(run, tmp_path):
    out = tmp_path / "page.html"
    done = megamm("report", run, "--out", out)
    assert done.returncode == 0 and done.stdout == f"report: {out}\n", done.stderr
    page = _Page(out.read_text())
    assert not page.foreign and not {"script", "img", "link", "iframe", "object"} & set(page.tags)
    assert "http:" not in out.read_text() and "https:" not in out.read_text() and "nan" not in out.read_text()
    plots = re.findall(r'aria-label="([^"]+)"', out.read_text())
    assert {"text (nats/token) over step", "image (nats/token) over step", "time line"} <= set(plots)
    assert {"Throughput (tokens/s) over step", "Gradient norm (before clipping) over step"} <= set(plots)
    setup = ("Configuration", "megatron-core", "global_batch_size: 4")
    for words in (f"{STEPS} / {STEPS}", "repeated", "data wait", *setup):
        assert words in page.text, words
    polylines = out.read_text().count("<polyline")
    assert polylines >= 6
    assert not list(tmp_path.glob(".*"))


def test_report_is_escaped_and_holds_no_secret(tmp_path, monkeypatch):
    """A failure's text may contain anything: markup, a URL with its password, a key of the environment."""
    monkeypatch.setenv("STORE_SECRET_KEY", "correct-horse-battery")
    cause = "<script>alert(1)</script> s3://me:hunter2@bucket/x?token=abc123&n=1 correct-horse-battery"
    events.record(tmp_path, "launched", restart=0)
    events.record(tmp_path, "started", step=0, world=2)
    events.record(tmp_path, "failed", rank=0, step=1, phase="<b>", cause=cause, detection=0.1)
    events.record(tmp_path, "loss_guard", step=1, action="skip", why=cause, password="hunter2")
    events.record(tmp_path, "straggler", step=1, rank=1, score=1.7)
    state = {"step": 1, "config": {"output": "/x", "token": "hunter2", "data": {"url": "https://u:hunter2@h/"}}}
    folder = tmp_path / "checkpoints" / "step_00000001"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps(state))
    text = write_report(tmp_path).read_text()
    page = _Page(text)
    assert "<script" not in text and "<script>alert(1)</script>" in page.text
    for secret in ("hunter2", "abc123", "correct-horse-battery"):
        assert secret not in text
    assert "s3://***@bucket/x?*** ***" in page.text
    with pytest.raises(UserError, match="no events and no metrics"):
        write_report(tmp_path / "checkpoints")


def test_redaction_leaves_what_is_no_secret():
    plain = {"tokens_per_s": 3.0, "tokenizers": {"text": "/a/b"}, "micro_batch_size": 1, "note": "the token of a word"}
    assert redact.values(plain) == plain
    assert redact.values({"api_key": "k", "list": [{"AWS_SECRET_ACCESS_KEY": "v"}]}) == {
        "api_key": "***",
        "list": [{"AWS_SECRET_ACCESS_KEY": "***"}],
    }
    assert redact.text("git@host:path a@b.c http://host/x@y") == "git@host:path a@b.c http://host/x@y"


def test_secrets_of_urls_and_of_the_environment_are_hidden(monkeypatch):
    monkeypatch.setenv("MY_SECRET_KEY_2", "hunter2hunter2")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "parallel")
    text = redact.text("parallel at https://a:b@c@host/x?sig=1234&n=1 with hunter2hunter2")
    assert text == "parallel at https://***@host/x?*** with ***"


def test_ticks_are_round_and_inside():
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.13, 0.58) == pytest.approx([0.2, 0.3, 0.4, 0.5])
    assert ticks(-3e6, 5e6) == [-2e6, 0, 2e6, 4e6]
    assert ticks(1, 1) == [1]


def test_numbers_are_short():
    shown = {0.0: "0", 0.0005: "0.0005", 12.5: "12.5", 3400.0: "3,400", 150e3: "150k", 2.4e6: "2.4M", 1e12: "1e+12"}
    assert {value: number(value) for value in shown} == shown


def test_a_long_line_keeps_its_spikes_and_gaps():
    points = [(float(i), 1.0) for i in range(100_000)]
    points[54_321] = (54_321.0, 9.0)
    points[12_345] = (12_345.0, float("nan"))
    kept = thin(points)
    assert len(kept) <= 800 and (54_321.0, 9.0) in kept and kept == sorted(kept)
    gap = plot(
        "t", [Series("s", [(0, 1), (1, 2), (2, float("nan")), (3, 1), (4, 2)], "#000")], x_label="x", y_label="y"
    )
    assert gap.count("<polyline") == 2
    only = plot("t", [Series("s", [(0, float("nan")), (1, 5.0)], "#000")], x_label="x", y_label="y")
    assert only.count("<circle") == 1 and "nan" not in only
    assert "nothing recorded" in plot("t", [Series("s", [], "#000")], x_label="x", y_label="y")
