"""`megamm doctor --preflight` of one node: every fault is found, with node, fault and remedy in one line.

Disks, limits and hangs are real ones. GPUs come from a library that replaces the driver's (stubs/nvml.c) under the real
binding; InfiniBand and control groups are folders like Linux's.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import ROOT, environment, megamm, write_config

from megamm.common import device
from megamm.config import load_config
from megamm.doctor import gpu, machine, node
from megamm.doctor.findings import Finding, Node
from megamm.doctor.probe import probe

GIB = 2**30


def faults(found: list[Finding]) -> list[Finding]:
    return [f for f in found if f.verdict == "wrong"]


def test_this_machine(tmp_path):
    """Every check of a node is there, the exit code follows from the verdicts, and a log has one line per bad node."""
    done = megamm("doctor", "--preflight", "--json", "--output", tmp_path / "run")
    told = json.loads(done.stdout)
    found = Node.from_json(told)
    checks = {"installation", "GPU", "memory", "limits", "InfiniBand", "output", "clock", "scratch", "shared memory"}
    assert {f.check for f in found.findings} == checks
    assert done.returncode == (1 if found.faults else 0) == (not told["fit"])
    assert done.stderr.splitlines() == ([found.line()] if found.faults else [])
    assert not list(tmp_path.iterdir()), "the files of the disk benchmark must be removed"


def test_faults_of_a_node_are_one_line_with_remedies(tmp_path):
    """A full disk, a limit on files and missing GPUs at once; the node has its own name."""
    if subprocess.run(["unshare", "-rmu", "true"], capture_output=True).returncode:
        pytest.skip("users cannot make mount namespaces here, so there is no small file system to fill")
    full = tmp_path / "full"
    full.mkdir()
    inside = f'hostname bad-node; mount -t tmpfs -o size=8m tmpfs {full} && ulimit -f 2097152 && exec "$@"'
    command = [sys.executable, "-m", "megamm", "doctor", "--preflight", "--output", str(full / "run")]
    done = subprocess.run(
        ["unshare", "-rmu", "sh", "-c", inside, "sh", *command, "--gpus", "8", "--scratch", "/proc"],
        env={k: v for k, v in environment().items() if k != "SLURMD_NODENAME"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("bad node bad-node: ")
    assert f"output: {full}/run: 0.0 GiB free: not writable (No space left on device); free space there" in line
    assert "limits: files limited to 1.00 GiB; ulimit -f unlimited" in line
    assert "scratch: /proc: " in line and "GPU: " in line
    assert "wrong" in done.stdout and "good" in done.stdout


def test_options_that_need_the_preflight_are_refused(tmp_path):
    for arguments in (["--gpus", "8"], ["--json"], ["train.steps=2"]):
        done = megamm("doctor", *arguments)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert "--preflight" in done.stderr


def test_a_config_says_where_and_how_much(tmp_path):
    model = {"num_layers": 40, "hidden_size": 4096, "ffn_hidden_size": 16384}
    config = load_config(write_config(tmp_path, tmp_path / "run", model=model), [])
    expected = node.Expected.by(config, {"gpus": 8, "output": None})
    assert (expected.output, expected.gpus, expected.scratch) == (tmp_path / "run", 8, None)
    # By hand: attention (4 query heads, 2 key-value heads of 8), gated MLP, norms; two checkpoints of 12 bytes each.
    weights = 40 * (2 * 4096 * (4 + 2) * 8 + 2 * 8 + 3 * 4096 * 16384 + 2 * 4096) + 4096
    assert expected.output_gib == pytest.approx(2 * 12 * weights / GIB, rel=1e-9)
    assert node.Expected.by(config, {"output": tmp_path}).output == tmp_path


# --- storage ---


def test_a_disk_is_measured_where_the_folder_will_be(tmp_path):
    found = machine.look_at_folder("output", str(tmp_path / "a" / "b"), 0.0, 0.0)
    assert [f.verdict for f in found] == ["good", "good"]
    speed = float(found[0].text.split("written at ")[1].split()[0])
    assert speed > 0
    (fault,) = faults(machine.look_at_folder("output", str(tmp_path), 0.0, 1e9))
    assert "below 1e+09 MB/s" in fault.text
    (fault,) = faults(machine.look_at_folder("output", str(tmp_path), 1e9, 0.0))
    assert "1e+09 GiB needed" in fault.text and "free space" in fault.remedy
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seconds", [-3600.0, -1.5, 0.5, 90.0])
def test_clock_against_the_file_system(tmp_path, monkeypatch, seconds):
    true = time.time
    monkeypatch.setattr(machine.time, "time", lambda: true() + seconds)
    found = next(f for f in machine.look_at_folder("output", str(tmp_path), 0.0, 0.0) if f.check == "clock")
    assert float(found.text.split(" s")[0]) == pytest.approx(seconds, abs=0.1)
    assert found.verdict == ("wrong" if abs(seconds) > 1 else "good")


def test_what_does_not_answer_is_left_behind(tmp_path):
    begin = time.monotonic()
    arguments = {"name": "x", "folder": str(tmp_path), "least_free": 0.0, "least_speed": 0.0}
    (found,) = probe("storage", "output", "look", limit=0.01, **arguments)
    assert (found.verdict, found.check, found.remedy) == ("wrong", "output", "look")
    assert "no answer within 0.01 s" in found.text and time.monotonic() - begin < 10
    (found,) = probe("storage", "output", "look", name="x")
    assert found.verdict == "wrong" and "check failed: TypeError" in found.text


# --- memory, limits, InfiniBand ---


def test_memory_of_a_container(tmp_path, monkeypatch):
    """A limit of the control group counts, minus used memory except reclaimable cache."""
    own = tmp_path / "cgroup"
    own.write_text("0::/job\n")
    group = tmp_path / "fs" / "job"
    group.mkdir(parents=True)
    monkeypatch.setattr(machine, "OWN_CGROUP", own)
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "fs")
    for used, cache, verdict, free in ((7 * GIB // 2, 0, "wrong", "0.5"), (7 * GIB // 2, GIB, "good", "1.5")):
        (group / "memory.max").write_text(f"{4 * GIB}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\n")
        found = machine._memory()
        assert (found.verdict, found.text.split(" GiB")[0]) == (verdict, f"{free} of 4.0")
    (group / "memory.max").write_text("max\n")
    assert machine._cgroup_memory() is None


def make_ports(folder: Path, states: dict[str, str]) -> None:
    """Create sysfs of HCAs: "mlx5_0:1" -> state."""
    for name, state in states.items():
        hca, port = name.split(":")
        place = folder / hca / "ports" / port
        place.mkdir(parents=True)
        (place / "state").write_text(state + "\n")
        (place / "rate").write_text("400 Gb/sec (4X NDR)\n")


PORTS = {"mlx5_0:1": "4: ACTIVE", "mlx5_1:1": "1: DOWN", "mlx5_2:1": "4: ACTIVE", "mlx5_2:2": "2: INIT"}


@pytest.mark.parametrize(
    ("setting", "verdict", "down", "active"),
    [
        ("", "warning", "mlx5_1:1 is DOWN, mlx5_2:2 is INIT", "2 of 4"),
        ("mlx5_0", "", "", "1 of 1"),
        ("=mlx5_0,mlx5_1", "wrong", "mlx5_1:1 is DOWN", "1 of 2"),
        ("mlx5", "wrong", "mlx5_1:1 is DOWN, mlx5_2:2 is INIT", "2 of 4"),
        ("mlx5_2:1", "", "", "1 of 1"),
        ("^mlx5_1,mlx5_2:2", "", "", "2 of 2"),
        ("^=mlx5_0", "wrong", "mlx5_1:1 is DOWN, mlx5_2:2 is INIT", "1 of 3"),
        ("mlx5_0,mlx5_7", "wrong", "mlx5_7 of NCCL_IB_HCA not found", "1 of 1"),
        ("=mlx5", "wrong", "mlx5 of NCCL_IB_HCA not found", "0 of 0"),
    ],
)
def test_infiniband_ports_that_nccl_uses(tmp_path, monkeypatch, setting, verdict, down, active):
    make_ports(tmp_path, PORTS)
    monkeypatch.setattr(machine, "INFINIBAND", tmp_path)
    monkeypatch.setenv(machine.HCAS, setting)
    *bad, summary = (f for f in machine.look() if f.check == "InfiniBand")
    assert [(f.verdict, f.text) for f in bad] == ([(verdict, down)] if verdict else [])
    assert all(f.remedy for f in bad) and summary.text.startswith(f"{active} ports active")


def test_all_ports_down_is_wrong_without_a_setting(tmp_path, monkeypatch):
    make_ports(tmp_path, {"mlx5_0:1": "1: DOWN"})
    monkeypatch.setattr(machine, "INFINIBAND", tmp_path)
    monkeypatch.delenv(machine.HCAS, raising=False)
    assert [f.text for f in faults(machine.look()) if f.check == "InfiniBand"] == ["mlx5_0:1 is DOWN"]


def test_limits_of_a_process():
    """ulimit belongs to a process, so the test uses a separate one."""
    code = "from megamm.doctor import machine; import json; from dataclasses import asdict; "
    code += "print(json.dumps([asdict(f) for f in machine._limits(has_infiniband=True)]))"
    for limits, expected in (
        ("ulimit -n 256", {"256 open files": "wrong"}),
        ("ulimit -n 1024; ulimit -l 64", {"1024 open files": "warning", "0 MiB of locked memory": "wrong"}),
    ):
        shell = ["bash", "-c", f'{limits}; exec "$@"', "sh", sys.executable, "-c", code]
        done = subprocess.run(shell, env=environment(), capture_output=True, text=True)
        found = {f["text"]: f["verdict"] for f in json.loads(done.stdout)}
        for text, verdict in expected.items():
            assert [v for told, v in found.items() if told.startswith(text)] == [verdict], done.stdout


# --- GPUs ---


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    pytest.importorskip("pynvml")
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("nvml")
    built = folder / "libnvidia-ml.so.1"
    source = ROOT / "tests" / "lib" / "stubs" / "nvml.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", built, source], check=True)
    return folder


def look(library: Path, monkeypatch, fault: str, expected: int | None = 8, visible=None, limit=60.0) -> list[Finding]:
    """Return the probe process's report on the stub's GPUs, without this machine's kernel log."""
    monkeypatch.setenv("LD_LIBRARY_PATH", str(library))
    monkeypatch.setenv("FAULT", fault)
    found = probe("gpu", "GPU", "reset it", limit=limit, expected=expected, visible=visible)
    return [f for f in found if f.check != "Xid"]


@pytest.mark.parametrize(
    ("fault", "check", "text", "remedy"),
    [
        ("gone", "GPU", "7 found: 8 expected", "nvidia-smi"),
        ("lost", "GPU", "NVML fails: GPU is lost", "restart the node"),
        ("ecc", "ECC", "GPU 1 has 3 uncorrected errors", "--gpu-reset"),
        ("pending", "ECC", "GPU 1 has rows of memory to remap", "--gpu-reset"),
        ("unmapped", "ECC", "GPU 1 could not remap a row of memory", "replace"),
        ("hot", "GPU clocks", "GPU 1 is slowed down by hardware, heat", "cooling"),
        ("held", "GPU memory", "GPU 1 has 20.0 GiB in use before the run starts", "nvidia-smi"),
        ("link", "NVLink", "GPU 1 has 17 active links, another GPU has 18", "nvlink"),
    ],
)
def test_fault_of_a_gpu_is_found(library, monkeypatch, fault, check, text, remedy):
    (found,) = faults(look(library, monkeypatch, fault))
    assert (found.check, found.text) == (check, text) and remedy in found.remedy


def test_gpus_without_fault(library, monkeypatch):
    found = look(library, monkeypatch, "none")
    assert all(f.verdict == "good" for f in found)
    assert [f.text for f in found if f.check == "NVLink"] == ["up to 18 active links per GPU"]
    (warning,) = [f for f in look(library, monkeypatch, "lazy") if f.verdict != "good"]
    assert (warning.verdict, warning.remedy) == ("warning", "nvidia-smi -pm 1")
    old = look(library, monkeypatch, "old")
    assert not faults(old) and "GPU 0 checked; it does not report TotalEccErrors, RemappedRows" in [f.text for f in old]


def test_only_the_gpus_of_this_job_are_looked_at(library, monkeypatch):
    """A scheduler that shares the node passes indices or UUIDs."""
    assert not faults(look(library, monkeypatch, "ecc", expected=2, visible=["0", "2"]))
    assert faults(look(library, monkeypatch, "ecc", expected=2, visible=["0", "GPU-00000001"]))


def test_a_gpu_that_does_not_answer(library, monkeypatch):
    (found,) = look(library, monkeypatch, "stuck", limit=2.0)
    assert (found.verdict, found.text, found.remedy) == ("wrong", "no answer within 2 s", "reset it")


def test_xid_messages_of_the_hardware_within_a_day(tmp_path, monkeypatch):
    """Lines as in /dev/kmsg, in microseconds since boot: a program's fault (31) and an old one do not count."""
    log, up = tmp_path / "kmsg", tmp_path / "uptime"
    now = 200_000.0
    up.write_text(f"{now} 1.0\n")
    messages = [
        (now - 90_000, "NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus."),
        (now - 50, "NVRM: Xid (PCI:0000:5e:00): 31, pid=2, name=python, MMU Fault"),
        (now - 40, "NVRM: Xid (PCI:0000:86:00): 74, pid=3, NVLink: fatal error detected on link 4"),
        (now - 30, "usb 1-1: new device"),
    ]
    lines = [f"4,{i},{int(at * 1e6)},-;{text}\n KEY=value\n" for i, (at, text) in enumerate(messages)]
    log.write_text("".join(lines))
    monkeypatch.setattr(gpu, "KERNEL_LOG", log)
    monkeypatch.setattr(gpu, "UPTIME", up)
    (found,) = gpu._kernel_log()
    assert (found.verdict, found.text) == ("wrong", "74 (NVLink error) of the GPU at 0000:86:00 within a day")
    log.write_text("".join(lines[:2]))
    assert [f.verdict for f in gpu._kernel_log()] == ["good"]
    monkeypatch.setattr(gpu, "KERNEL_LOG", tmp_path / "none")
    assert [f.verdict for f in gpu._kernel_log()] == ["unknown"]


@pytest.mark.gpu
@pytest.mark.skipif(not device.gpus(), reason="needs a GPU")
def test_real_gpus_answer():
    found = probe("gpu", "GPU", "reset it", expected=len(device.gpus()), visible=device.visible())
    assert not [
        f for f in found if "fails" in f.text or "failed" in f.text or "could not" in f.text or "no answer" in f.text
    ], found
