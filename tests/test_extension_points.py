"""CONTRIBUTING.md's steps to add a modality and an operator are complete: followed in a copy of the package, they work.

tests/lib/toy_extension has the new files; the lines for existing files are below.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_run import ROOT, environment

TOY = ROOT / "tests" / "lib" / "toy_extension"
IMPORT_OF_MODALITY = "from megamm.modalities.scent import ScentModality\n"
COMMAND = '''

@train_app.command("scent")
def train_scent(sources: Sources, to: Target, steps: int = 100) -> None:
    """Train the tokenizer of scents."""
    from megamm.common.device import choose
    from megamm.tokenizers.scent.train import train_scent_codec
    from megamm.tokenizers.training_loop import Training

    report = train_scent_codec(sources, to, Training(steps, 16, 0.1, 0), choose("cpu"))
    print(f"restored {report['restored']:.3f}")
'''
EDITS = {  # file: (where, text to insert after it; None for the end of the file)
    "megamm/modalities/__init__.py": [
        ("from megamm.modalities.protocol import Modality\n", IMPORT_OF_MODALITY),
        ('    "points": PointsModality,\n', '    "scent": ScentModality,\n'),
    ],
    "megamm/cli/tokenizer.py": [(None, COMMAND)],
    "megamm/ops/registry.py": [
        ("from megamm.ops import cross_entropy, ", "double, "),
        ("OPS = {\n", '    "double": Op(double.double, double.double_torch, double.register),\n'),
    ],
    "megamm/ops/op_proofs.py": [
        (
            '    "swiglu": _draw_swiglu,\n',
            '    "double": lambda d, dtype, s: Inputs((d.leaf(s.tokens, dtype=dtype),)),\n',
        ),
    ],
}


def documented(heading: str, name: str) -> set[str]:
    """The files of the package and of csrc/ that the numbered steps under a heading name, for this NAME."""
    text = (ROOT / "CONTRIBUTING.md").read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    steps = re.findall(r"^\d+\. ((?:`[^`]+`(?:,| and| or)* *)+):", text, re.MULTILINE)
    paths = {path.replace("NAME", name) for step in steps for path in re.findall(r"`([^`]+)`", step)}
    return {path for path in paths if path.startswith(("megamm/", "csrc/"))}


def apply(files: set[str], copy: Path) -> None:
    """Add the toy's files and edit the existing ones, as documented."""
    for path in files:
        if path in EDITS:
            text = (copy / path).read_text()
            for after, new in EDITS[path]:
                assert after is None or text.count(after) == 1, f"{path} has no line {after}"
                text = text + new if after is None else text.replace(after, after + new)
            (copy / path).write_text(text)
        else:
            (copy / path).parent.mkdir(exist_ok=True)
            shutil.copy(TOY / path, copy / path)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package that has the toy modality and the toy operator."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "megamm", folder / "megamm", ignore=shutil.ignore_patterns("__pycache__", "_csrc*.so"))
    apply(documented("Add a modality", "scent"), folder)
    apply({p for p in documented("Add a fused operator", "double") if p.startswith("megamm/")}, folder)
    return folder


def run(copy: Path, code: str) -> str:
    """Run code with the copy of the package; return its output."""
    code = f"import megamm; assert megamm.__file__.startswith({str(copy)!r}), megamm.__file__\n" + code
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=copy, env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_steps_of_a_modality_name_these_six_files() -> None:
    new = {p.relative_to(TOY).as_posix() for p in TOY.rglob("*.py") if "ops" not in p.parts}
    assert documented("Add a modality", "scent") == new | {"megamm/modalities/__init__.py", "megamm/cli/tokenizer.py"}
    assert len(new) == 4


def test_the_steps_of_an_operator_name_all_files_that_know_one() -> None:
    """An operator that exists is named in these files, in those of its users, and nowhere else."""
    steps = documented("Add a fused operator", "swiglu")
    assert len(steps) == 6
    files = [*(ROOT / "csrc").rglob("*"), *(ROOT / "megamm" / "ops").rglob("*.py"), ROOT / "setup.py"]
    knowing = {
        path.relative_to(ROOT).as_posix()
        for path in files
        if path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h") and re.search(r"\bswiglu\b", path.read_text())
    }
    assert knowing - {"csrc/swiglu.h"} == steps, "csrc/swiglu.h is code that both kernels share"


def test_a_modality_with_a_trainable_tokenizer_needs_no_other_file(copy: Path) -> None:
    raw = copy / "raw" / "smelled"
    raw.mkdir(parents=True)
    lines = []
    for n in range(24):
        (raw / f"{n}.scent").write_text("".join("abcdefgh"[(n // 8 + n * k + k * k) % 8] for k in range(12 + n)))
        lines.append({"scent": f"{n}.scent", "caption": f"the scent of number {n}", "noun": f"n{n}"})
    (raw / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {
        "output": "run",
        "device": "cpu",
        "model": {"num_layers": 1, "hidden_size": 16, "ffn_hidden_size": 32}
        | {"num_attention_heads": 2, "num_query_groups": 1, "head_dim": 8},
        "data": {"seq_length": 64, "sources": [{"path": "shards/smelled"}]},
        "tokenizers": {"text": "tokenizers/text", "scent": "tokenizers/scent"},
        "optimizer": {"lr": 1e-2, "warmup_steps": 1},
        "train": {"steps": 3, "global_batch_size": 2, "micro_batch_size": 1, "log_every": 1},
        "resilience": {"max_restarts": 0},
    }
    (copy / "run.yaml").write_text(yaml.safe_dump(config))
    commands = [
        ["data", "build", "raw/smelled", "--to", "shards", "--heldout", "0.3"],
        ["tokenizer", "train", "text", "shards/smelled", "--to", "tokenizers/text", "--vocabulary", "280"],
        ["tokenizer", "train", "scent", "shards/smelled", "--to", "tokenizers/scent"],
        ["data", "tokenize", "shards/smelled", "--codec", "text=tokenizers/text", "--codec", "scent=tokenizers/scent"],
        ["train", "run.yaml"],
    ]
    code = "from megamm.cli import app\n" + "".join(f"app({c!r}, standalone_mode=False)\n" for c in commands)
    code += "from megamm.modalities.scent import ScentModality, Path\n"
    code += "scent = ScentModality.load(Path('tokenizers/scent'))\n"
    code += "print('again', scent.write_media(scent.decode(scent.encode([scent.read_media(b'abcd', 'scent')])[0])))\n"
    output = run(copy, code)
    assert "restored 1.000" in output  # the tokenizer was trained: untrained tables restore about one letter in eight
    assert "again b'abcd'" in output
    losses = [json.loads(line) for line in (copy / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any((line.get("loss/scent") or 0) > 0 for line in losses)


def test_an_operator_in_plain_torch_needs_its_file_and_a_line(copy: Path) -> None:
    code = "import torch\nfrom megamm import ops\nchosen, _ = ops.choose('torch', torch.device('cpu'))\n"
    assert (
        run(copy, code + "print(chosen.double(torch.tensor([1.5])).item(), ops.CSRC.double.__name__)") == "3.0 double\n"
    )
