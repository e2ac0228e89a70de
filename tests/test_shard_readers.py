"""Other readers read our shards unchanged, and ours reads tars written by others."""

import io
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image
from shard_checks import read_all

from megamm.common.errors import UserError
from megamm.data.build.shards import BuildOptions, build
from megamm.data.raw.samples import RawPart, RawSample, write_samples
from megamm.shards.folder import ShardFolder, ShardWriter
from megamm.shards.indexing import write_index


def picture(number):
    pixels = np.random.default_rng(number).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Write shards/<mine>/train of seven pairs and one page of four parts."""
    raw = tmp_path_factory.mktemp("readers") / "mine"
    raw.mkdir()
    for number in range(9):
        (raw / f"{number}.png").write_bytes(picture(number))
    samples = [
        RawSample(f"s{n}", f"n{n}", (RawPart("text", f"caption {n}"), RawPart("image", f"{n}.png"))) for n in range(7)
    ]
    page = (RawPart("text", "first"), RawPart("image", "7.png"), RawPart("text", "then"), RawPart("image", "8.png"))
    write_samples(raw, [*samples, RawSample("page", "page", page, ordered=True)])
    build([raw], raw.parent / "shards", BuildOptions(heldout=0))
    return raw.parent / "shards" / "mine" / "train"


def expected(extension):
    """Return key -> {extension: data} of one modality."""
    text = {"page": {"0.txt": b"first", "2.txt": b"then"}} | {
        f"s{n}": {"txt": f"caption {n}".encode()} for n in range(7)
    }
    image = {"page": {"1.png": picture(7), "3.png": picture(8)}} | {f"s{n}": {"png": picture(n)} for n in range(7)}
    return {"txt": text, "png": image}[extension]


@pytest.mark.parametrize(("modality", "extension"), [("text", "txt"), ("image", "png")])
def test_webdataset_reads_them(shards, modality, extension):
    urls = [str(tar) for tar in sorted((shards / modality).glob("*.tar"))]
    found = {}
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        found[sample["__key__"]] = {name: data for name, data in sample.items() if not name.startswith("__")}
    assert found == expected(extension)


def test_dali_reads_them(shards):
    """It reads them without its own index files; parts of pages are components with the number in their name."""
    dali = pytest.importorskip("nvidia.dali")
    paths = [str(tar) for tar in sorted((shards / "image").glob("*.tar"))]

    def read(extension):
        pipeline = dali.Pipeline(batch_size=1, num_threads=1, device_id=None)
        with pipeline:
            data = dali.fn.readers.webdataset(paths=paths, ext=[extension], missing_component_behavior="skip")
            pipeline.set_outputs(data)
        pipeline.build()
        (meta,) = pipeline.reader_meta().values()
        return [pipeline.run()[0].at(0).tobytes() for _ in range(meta["epoch_size"])]

    order = [key for key in ShardFolder(shards / "image").keys if key != "page"]
    assert read("png") == [picture(int(key.removeprefix("s"))) for key in order]
    assert read("3.png") == [picture(8)]


ENERGON = """
import sys
from megatron.energon import Cooker, DefaultTaskEncoder, WorkerConfig, get_savable_loader, get_train_dataset, stateless

@stateless
def cook(sample):
    return sample

class Encoder(DefaultTaskEncoder):
    cookers = [Cooker(cook)]
    decoder = None

    @stateless
    def batch(self, samples):
        return samples[0]

worker = WorkerConfig(rank=0, world_size=1, num_workers=0)
dataset = get_train_dataset(sys.argv[1], worker_config=worker, batch_size=1, shuffle_buffer_size=None,
                            max_samples_per_sequence=None, repeat=False, task_encoder=Encoder())
for sample in get_savable_loader(dataset):
    for name in sorted(name for name in sample if not name.startswith("__")):
        print("READ", sample["__key__"].rpartition("/")[2], name, bytes(sample[name]).hex())
"""


def test_energon_reads_them(shards, tmp_path):
    """It reads them after its own `energon prepare`, whose files next to ours do not affect ours."""
    pytest.importorskip("megatron.energon", reason="megatron-energon is not installed")
    folder = tmp_path / "image"
    shutil.copytree(shards / "image", folder)
    prepare = ["-m", "megatron.energon.cli.main", "prepare", "--non-interactive", "--split-parts", "train:.*"]
    prepare += ["--sample-type", "CrudeWebdataset", "--num-workers", "1", str(folder)]
    subprocess.run([sys.executable, *prepare], check=True, capture_output=True, timeout=120)
    command = [sys.executable, "-c", ENERGON, str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    found = {}
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("READ")]  # among its own
    for _, key, name, data in lines:
        found.setdefault(key, {})[name] = bytes.fromhex(data)
    assert found == expected("png")
    assert len(ShardFolder(folder)) == 9


def test_a_page_is_not_split_over_two_tars(tmp_path):
    """Readers group the members of a key that are in the same tar."""
    with ShardWriter(tmp_path / "text", samples_per_shard=3) as writer:
        for key in ("a", "b", "c", "d"):
            for number in range(2):
                writer.add(key, f"{number}.txt", key.encode())
    tars = sorted((tmp_path / "text").glob("*.tar"))
    names = []
    for tar in tars:
        with tarfile.open(tar) as file:
            names.append(file.getnames())
    assert names == [["a.0.txt", "a.1.txt", "b.0.txt", "b.1.txt"], ["c.0.txt", "c.1.txt", "d.0.txt", "d.1.txt"]]
    folder = ShardFolder(tmp_path / "text")
    read_all(folder)
    assert folder.keys == list("aabbccdd")


def test_ours_reads_what_webdataset_writes(tmp_path):
    """Read ShardWriter's tars, one modality per folder, parts numbered or not, after `megamm data index`."""
    names = [f"k{n}" for n in range(5)]
    with webdataset.ShardWriter(str(tmp_path / "%06d.tar"), maxcount=2, verbose=0) as writer:
        for number, key in enumerate(names):
            writer.write({"__key__": key, "txt": f"text {number}"})
        writer.write({"__key__": "page", "0.txt": "first", "2.txt": "then"})
    assert write_index(tmp_path).members == 7
    folder = ShardFolder(tmp_path)
    assert folder.keys == [*names, "page", "page"] and folder.parts.tolist() == [-1] * 5 + [0, 2]
    assert [folder.read(i).decode() for i in range(7)] == [*(f"text {n}" for n in range(5)), "first", "then"]


def test_what_is_no_sample_is_not_indexed(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "000000.tar")) as writer:
        writer.write({"__key__": "folder/key", "txt": "text"})
    with pytest.raises(UserError, match=r"'folder/key\.txt' is neither"):
        write_index(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["000000.tar"]
