"""Runs from the command line in real processes: kill and resume bit for bit, reshard with optimizer state, export."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import warm
from faults import environment as with_faults
from run_folders import TRAIN, read_tensors, step_folder
from tiny_run import environment, make_data, megamm, numbers, write_config


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(data) -> Path:
    """Train eight steps on two data-parallel ranks, with a checkpoint every two and held-out losses at the end."""
    output = data / "baseline"
    config = write_config(data, output, train=TRAIN)
    done = megamm("train", config, "--nproc", 2)
    assert done.returncode == 0, done.stderr
    assert "held-out loss" in done.stdout
    assert "INFO megamm.mcore.backbone: ops: csrc, built for cpu" in done.stderr
    # Only rank 0 logs the installation, in the words of `megamm doctor`.
    assert done.stderr.count("INFO megamm.config.accelerators: apex: ") == 1
    return output


def test_loss_falls(undisturbed):
    lines = [line for line in numbers(undisturbed) if "loss/text" in line]
    assert len(lines) == 8
    for name in ("loss/text", "loss/image"):
        assert lines[-1][name] < lines[0][name] - 0.1


@pytest.mark.everything
def test_plain_torch_operators_train_alike(data, undisturbed):
    """The baseline run chose the compiled operators automatically."""
    config = write_config(data, data / "torch", train=TRAIN)
    done = megamm("train", config, "ops=torch", "--nproc", 2)
    assert "INFO megamm.mcore.backbone: ops: torch, requested" in done.stderr
    lines = list(zip(numbers(undisturbed), numbers(data / "torch"), strict=True))
    assert len(lines) == 9  # eight steps and the held-out losses
    for compiled, plain in lines:
        absent = {name for name, value in compiled.items() if value is None}  # the data have no video
        assert absent <= {"loss/video", "heldout/video"} and absent == {n for n, v in plain.items() if v is None}
        measured = {name: value for name, value in compiled.items() if value is not None}
        assert {name: plain[name] for name in measured} == pytest.approx(measured, rel=1e-5)


def test_metrics_are_read_back_by_tensorboard(undisturbed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(undisturbed / "tensorboard"))
    events.Reload()
    ours = [line["loss/image"] for line in numbers(undisturbed) if "loss/image" in line]
    assert [e.value for e in events.Scalars("loss/image")] == pytest.approx(ours, rel=1e-6)
    assert {"heldout/text", "grad_norm", "lr", "tokens_per_s"} <= set(events.Tags()["scalars"])


def test_kill_9_of_a_rank_then_resume_is_bit_identical(data, undisturbed):
    """The next command resumes it, not a restart in place; the killed run uses two workers, which changes nothing."""
    output = data / "killed"
    config = write_config(data, output, train=TRAIN, data={"workers": 2, "prefetch": 3})
    command = [sys.executable, "-m", "megamm", "train", str(config), "resilience.max_restarts=0", "--nproc", "2"]
    env = with_faults("sigkill_once_saved@step:6:1:0", environment())
    killed = warm.run(command, env=env, capture_output=True, text=True, timeout=180)
    assert killed.returncode == 1
    last = killed.stderr.splitlines()[-1]
    assert "error: gave up: rank 1: signal 9 (SIGKILL), at step " in last, killed.stderr
    assert step_folder(output, 2).exists() and not step_folder(output, 6).exists()

    resumed = megamm("train", config, "--nproc", 2)
    assert resumed.returncode == 0, resumed.stderr
    assert "saved by the same layout" in resumed.stdout
    assert numbers(output) == numbers(undisturbed)
    ours, theirs = read_tensors(step_folder(output, 8)), read_tensors(step_folder(undisturbed, 8))
    assert any(name.startswith("optimizer.state.exp_avg_sq") for name in ours)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_reshard_tp2_to_pp2_to_one_rank_with_optimizer_state(data, undisturbed):
    """Run two steps on each layout from step 2 on: losses and state equal the baseline run's to 1e-6."""
    output = data / "resharded"
    shutil.copytree(step_folder(undisturbed, 2), step_folder(output, 2))
    layouts = [(4, {"tensor": 2, "sequence": True}, 2), (6, {"pipeline": 2}, 2), (8, {}, 1)]
    for stop, parallel, processes in layouts:
        # The schedule is that of the whole run: it stops early by its limit, not by a shorter schedule.
        config = write_config(data, output, train=TRAIN | {"stop_after": stop}, parallel=parallel)
        done = megamm("train", config, "--nproc", processes)
        assert done.returncode == 0, done.stderr
        assert "saved by layout" in done.stdout
    wanted = {line["step"]: line for line in numbers(undisturbed) if "loss/text" in line}
    for line in numbers(output):
        if "loss/text" in line:
            for key in ("loss/text", "loss/image", "lr"):
                assert line[key] == pytest.approx(wanted[line["step"]][key], rel=1e-6)
    ours, theirs = read_tensors(step_folder(output, 8)), read_tensors(step_folder(undisturbed, 8))
    for name, tensor in theirs.items():
        error = (ours[name] - tensor).norm() / tensor.norm().clamp(min=1e-12)
        assert error <= 2e-5, f"{name}: {error:.1e}"


def test_export_loads_in_transformers_and_imports_bit_for_bit(data, undisturbed):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, again, run = data / "export", data / "export2", data / "imported"
    assert megamm("convert", "export", undisturbed, out).returncode == 0
    model = AutoModelForCausalLM.from_pretrained(out)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("a red box<|image_start|><|visual_7|>")["input_ids"]
    own = json.loads((out / "megamm.json").read_text())["vocabulary"]
    start = {r["name"]: r["start"] for r in own}
    assert ids[-1] == start["visual"] + 7 and ids[-2] == start["control"] + 3
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a red box"
    assert megamm("convert", "import", out, run).returncode == 0
    assert megamm("convert", "export", run, again).returncode == 0
    assert (out / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    weights = load_file(out / "model.safetensors")
    stored = read_tensors(step_folder(run, 0))
    assert torch.equal(stored["decoder.final_layernorm.weight"], weights["model.norm.weight"])


@pytest.mark.everything
def test_imported_weights_start_a_run(data, undisturbed):
    """The first step of a run from imported weights has the loss of the trained weights."""
    run, out = data / "from_import", data / "export3"
    assert megamm("convert", "export", undisturbed, out).returncode == 0
    assert megamm("convert", "import", out, run).returncode == 0
    config = write_config(data, run, train=TRAIN | {"stop_after": 1})
    done = megamm("train", config)
    assert done.returncode == 0, done.stderr
    first = next(line for line in numbers(run) if "loss/text" in line)
    assert first["loss/text"] < numbers(undisturbed)[0]["loss/text"] - 0.1
    # The same at another layout.
    run = data / "from_import_2"
    assert megamm("convert", "import", out, run).returncode == 0
    done = megamm("train", write_config(data, run, train=TRAIN | {"stop_after": 1}), "parallel.tensor=2", "--nproc", 2)
    assert done.returncode == 0, done.stderr
    again = next(line for line in numbers(run) if "loss/text" in line)
    assert again["loss/text"] == pytest.approx(first["loss/text"], rel=1e-6)


def test_bf16_with_fp32_master_weights_and_recompute_trains(data):
    output = data / "bf16"
    train = TRAIN | {"precision": "bf16", "recompute": "full", "eval_every": 0}
    schedule, profile = {"schedule": "wsd", "decay_steps": 2}, {"profile": {"steps": [2, 2]}}
    config = write_config(data, output, train=train, optimizer=schedule, metrics=profile)
    assert megamm("train", config).returncode == 0
    assert [path.name for path in (output / "profile").iterdir()] == ["steps_00000002-00000002_rank_00000.json.gz"]
    lines = numbers(output)
    assert lines[-1]["loss/image"] < lines[0]["loss/image"] - 0.1
    assert [round(line["lr"] * 1e3, 3) for line in lines] == [1.5, 3, 3, 3, 3, 3, 1.5, 0]
    tensors = read_tensors(step_folder(output, 8))
    assert tensors["decoder.final_layernorm.weight"].dtype == torch.bfloat16
    assert tensors["optimizer.state.param.decoder.final_layernorm.weight"].dtype == torch.float32


@pytest.mark.everything
def test_an_mlp_that_is_not_plain_swiglu_stays_megatrons(data):
    config = write_config(data, data / "bias", train=TRAIN | {"stop_after": 1, "eval_every": 0})
    done = megamm("train", config, "model.megatron={add_bias_linear: true}", "export=off")
    assert done.returncode == 0, done.stderr
    assert "INFO megamm.mcore.backbone: using Megatron-core's MLP: fused SwiGLU needs no bias" in done.stderr
    assert any("mlp.linear_fc1.bias" in name for name in read_tensors(step_folder(data / "bias", 1)))


@pytest.mark.everything
def test_a_source_is_added_where_the_window_in_progress_ends(data, undisturbed):
    """Planned rows stay: the next steps have the losses of the run without the source; so do seed and row length."""
    output, copy = data / "added", data / "shards" / "copied"
    shutil.copytree(step_folder(undisturbed, 2), step_folder(output, 2))
    shutil.copytree(data / "shards" / "drawn", copy)
    sources = [{"path": str(data / "shards" / "drawn")}, {"path": str(copy), "weight": 3}]
    config = write_config(data, output, train=TRAIN | {"stop_after": 4}, data={"sources": sources})
    refused = megamm("train", config, "train.seed=2")
    assert refused.returncode == 2 and "the checkpoint has train.seed = 1, but the config has 2" in refused.stderr
    done = megamm("train", config, "--nproc", 2)
    assert done.returncode == 0, done.stderr
    state = json.loads((step_folder(output, 4) / "state.json").read_text())
    assert [s["window"] for s in state["mixture"]["segments"]] == [0, 1]
    assert state["mixture"]["segments"][1]["weights"] == {"drawn": 1.0, "copied": 3.0}
    assert "in step " in done.stderr and "drawn 1 -> 0.25, copied 0.75 (new)" in done.stderr
    wanted = {line["step"]: line for line in numbers(undisturbed) if "loss/text" in line}
    lines = [line for line in numbers(output) if "loss/text" in line]
    assert [line["step"] for line in lines] == [3, 4] and all(line == wanted[line["step"]] for line in lines)
