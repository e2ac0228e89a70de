"""Build and install megamm: `pip install --no-build-isolation -e .`, after requirements/torch.txt is installed.

Ranges are given here and exact versions in requirements/: a library may be used beside others,
a working environment is rebuilt pin by pin (`make venv`).
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    """The version in megamm/__init__.py, read as text so that building imports nothing of megamm."""
    found = re.search(r'^__version__ = "([^"]+)"$', (ROOT / "megamm/__init__.py").read_text(), re.MULTILINE)
    assert found, "megamm/__init__.py has no __version__"
    return found[1]


INSTALL_REQUIRES = [
    "torch>=2.11,<3",
    "numpy>=2.0,<3",
    # 0.16.1 is the newest for Python 3.11, 0.19.x needs 3.12: megamm runs on both (`make test-latest`).
    "megatron-core>=0.16.1,<0.20",
    # Megatron-core needs psutil without declaring it: saving a checkpoint hangs where it is missing.
    "psutil>=6",
    "transformers>=5.0,<6",
    "tokenizers>=0.22,<1",
    "safetensors>=0.6,<1",
    "pydantic>=2.7,<3",
    "PyYAML>=6,<7",
    "typer>=0.15,<1",
    "rich>=13,<16",
    "pillow>=11",
    "tensorboard>=2.18,<3",
    # The public starter data: emoji are read from a font, clip art from SVG.
    "resvg-py>=0.5,<1",
    "emoji>=2.14,<3",
    "fonttools>=4.50,<5",
]

# What a laptop run does not need. The drivers' versions decide on a cluster, so the ranges stay open.
EXTRAS_REQUIRE = {
    # Video decoding on the GPU; the kernels of megamm/ops need no package.
    "cuda": ["nvidia-dali-cuda130>=2.4,<3"],
    # Jobs sent from Python; launchers/slurm needs nothing.
    "slurm": ["submitit>=1.5,<2"],
    # Manifests as typed objects, and their check against the schemas of a Kubernetes version.
    "k8s": ["kubernetes>=37", "kubernetes-validate>=1.37"],
    # The second engine (megamm/zero), which reads names of this series inside of DeepSpeed's optimizers.
    "deepspeed": ["deepspeed>=0.19.8,<0.20"],
    "dev": [
        "pytest>=9,<10",
        "pytest-timeout>=2.4,<3",
        "ruff>=0.17,<0.18",
        "mypy>=2,<3",
        "types-PyYAML>=6",
        "pre-commit>=4,<5",
        # An independent reader, against which the shards are tested.
        "webdataset>=1,<2",
        # The figures of benchmarks/ and of the demo.
        "matplotlib>=3.10,<4",
    ],
}

setup(
    name="megamm",
    version=version(),
    description="Pretraining of any-to-any multimodal models on Megatron-core, from a laptop CPU to a cluster",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11",
    packages=find_packages(include=["megamm", "megamm.*"]),
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={"console_scripts": ["megamm = megamm.cli:main"]},
)
