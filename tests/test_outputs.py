"""Outputs that cannot be written: one line and exit code 2 before any work; the truth is what the kernel refuses."""

import errno
import os
import subprocess
import sys

import pytest
from tiny_run import environment, write_config

from megamm import cli
from megamm.common import outputs
from megamm.common.errors import UserError

MOUNT = 'mount -t tmpfs -o ro none "$0" && exec "$@"'


def read_only(folder, *command):
    """Run a command while the folder is a read-only file system for it, and for it alone."""
    if os.geteuid():
        pytest.skip("needs root to mount a file system")
    full = ["unshare", "--mount", "sh", "-c", MOUNT, folder, *command]
    return subprocess.run(list(map(str, full)), env=environment(), capture_output=True, text=True, timeout=120)


def one_line(code, text, *parts):
    assert code == 2, text
    assert len(text.splitlines()) == 1 and text.startswith("error: "), text
    for part in parts:
        assert part in text


@pytest.fixture
def refused(monkeypatch, capsys):
    """Run a command in this process: it must end with one line, which has these parts."""

    def run(command, *parts):
        monkeypatch.setattr(sys, "argv", ["megamm", *map(str, command)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        one_line(ended.value.code, capsys.readouterr().err, *parts)

    return run


def test_a_run_that_cannot_write_is_one_line(tmp_path, refused):
    """In a file's place, below a file, on a read-only file system, and beside an old file that cannot be changed."""
    (tmp_path / "file").write_text("")
    for name in ("file", "file/below"):
        config = write_config(tmp_path, tmp_path / "wanted")
        command = ["train", config, f"output={tmp_path / name}", "--nproc", 2]
        refused(command, "cannot write to output: Not a directory", str(tmp_path / "file"))
        assert (tmp_path / "file").is_file()
    (tmp_path / "mounted").mkdir()
    config = write_config(tmp_path, tmp_path / "wanted", resilience={"max_restarts": 0})
    command = [sys.executable, "-m", "megamm", "train", config, f"output={tmp_path / 'mounted/run'}"]
    done = read_only(tmp_path / "mounted", *command)
    one_line(done.returncode, done.stderr, "cannot write to output: Read-only file system", "not mounted")
    (tmp_path / "old" / "events.jsonl").mkdir(parents=True)  # in place of a file, as root can write to any file
    refused(["train", config, f"output={tmp_path / 'old'}"], "events.jsonl", "Is a directory")


def test_commands_check_their_output_before_their_inputs(tmp_path, refused):
    """None of these inputs exists, and no command looks at it: a wrong output is found before any work."""
    (tmp_path / "file").write_text("kept")
    out = tmp_path / "file" / "out"
    for command in (
        ["data", "build", "raw", "--to", out],
        ["data", "fetch", "nothing", "--to", out],
        ["tokenizer", "train", "text", "shards", "--to", out],
        ["convert", "export", "run", out],
        ["convert", "import", "export", out],
        ["convert", "gguf", "export", f"{out}.gguf"],
        ["convert", "quantize", "export", out, "--to", "int8"],
        ["convert", "modules", "export", out],
        ["convert", "join", "modules", out],
        ["generate", "export", "--to", "text", "--prompt", "x", "--out", f"{out}.txt"],
        ["eval", "export", "shards", "--json", f"{out}.json"],
        ["report", "run", "--out", f"{out}.html"],
    ):
        refused(command, "cannot write to ", "Not a directory", str(tmp_path / "file"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "kept"


def test_checks_create_nothing(tmp_path):
    outputs.check_folder(tmp_path / "a" / "b", "--to")
    outputs.check_file(tmp_path / "c" / "d.json", "--json")
    (tmp_path / "e").write_bytes(b"1")
    outputs.check_file(tmp_path / "e", "--json")
    assert [path.name for path in tmp_path.iterdir()] == ["e"] and (tmp_path / "e").read_bytes() == b"1"


def test_a_dangling_link_and_a_name_that_is_too_long(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="link"):
        outputs.check_folder(tmp_path / "link", "output")
    with pytest.raises(UserError, match=r"cannot write to output: File name too long.*choose a shorter path"):
        outputs.check_folder(tmp_path / ("n" * 300), "output")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EEXIST])
def test_errors_about_a_path_are_the_users(number):
    error = outputs.user_error(OSError(number, os.strerror(number), "/x/y"))
    assert error is not None and str(error).startswith(f"{os.strerror(number)} (/x/y); ")


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "?", "/x"), OSError(errno.ENOSPC, "?"), OSError("?")])
def test_other_errors_keep_their_traceback(error):
    assert outputs.user_error(error) is None
