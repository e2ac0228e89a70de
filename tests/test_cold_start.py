"""What a cold start does not do: the launcher imports no torch, and adapted modules of Megatron-core compile once."""

import py_compile
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import make_data, write_config

from megamm.mcore import cpu

LAUNCHER = """
import sys
from megamm import cli
sys.argv = ["megamm", "train", sys.argv[1]]
try:
    cli.main()
finally:
    print("imported:", [name for name in ("torch", "numpy", "transformers") if name in sys.modules])
"""


def test_the_launcher_imports_no_torch_and_still_checks_the_data(tmp_path):
    """A token cache is missing: one line, exit code 2, and no launch is recorded."""
    make_data(tmp_path)
    config = write_config(tmp_path, tmp_path / "run")
    (index,) = (tmp_path / "shards/drawn/train").glob("image.tokens-*/index*")
    index.unlink()
    command = [sys.executable, "-c", LAUNCHER, str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: "), done.stderr
    assert done.stdout.splitlines()[-1] == "imported: []"
    assert not (tmp_path / "run" / "events.jsonl").exists()


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    """Return a function that loads a module through the adaptation, with its source, and says if it was compiled."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    path, compiled = tmp_path / "module.py", []
    original = cpu._Loader.source_to_code

    def compile_and_note(self, data, path, **options):
        compiled.append(path)
        return original(self, data, path, **options)

    monkeypatch.setattr(cpu._Loader, "source_to_code", compile_and_note)

    def load(source):
        path.write_text(source)
        compiled.clear()
        names = {}
        exec(cpu._Loader("megatron.core.module", str(path)).get_code("megatron.core.module"), names)
        return names, bool(compiled)

    return load


def _cache(folder: Path) -> Path:
    (path,) = [path for path in (folder / "__pycache__").iterdir() if "megamm" in path.name]
    return path


def test_bytecode_of_adapted_modules_is_kept_and_never_stale(loaded, tmp_path):
    one, two = "pinned = 'pin_memory=True'\n", "pinned = 'pin_memory=True'; two = 1\n"
    for is_first in (True, False):
        names, was_compiled = loaded(one)
        assert names["pinned"] == "pin_memory=False" and was_compiled == is_first
    assert loaded(two)[1] and not loaded(two)[1], "another source is compiled, once"
    ordinary = py_compile.compile(str(tmp_path / "module.py"))
    assert ordinary is not None and Path(ordinary) != _cache(tmp_path), "the module's own bytecode is another file"
    path = _cache(tmp_path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:10], b"1234" + whole[4:]):
        path.write_bytes(damaged)
        names, was_compiled = loaded(two)
        assert was_compiled and names["pinned"] == "pin_memory=False" and names["two"] == 1


def test_a_folder_that_cannot_be_written_to_is_no_error(loaded, tmp_path):
    (tmp_path / "__pycache__").write_text("a file in place of the folder")
    for _ in range(2):
        names, was_compiled = loaded("pinned = 'pin_memory=True'\n")
        assert was_compiled and names["pinned"] == "pin_memory=False"
