"""Bidirectional spans: rows, bad settings, Gemma 3's own class, exports in transformers, and a run from end to end."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from checkpoint_folders import generator_states, save_now, whole_blocks
from codec_data import shape_picture
from family_models import COMMON, MODELS, SEQUENCE, read_model
from tiny_export import make_export, open_tiny
from tiny_run import make_data, megamm, numbers, write_config
from typer.testing import CliRunner

from megamm.checkpoint import TrainState, path_of
from megamm.cli import app
from megamm.common.device import choose
from megamm.common.errors import UserError
from megamm.common.sample import IGNORE_LABEL, Batch, Document, Part, Row
from megamm.config import config_from_dict, load_config
from megamm.config.suite import TaskConfig
from megamm.convert.export import export
from megamm.convert.families import mapping
from megamm.convert.families.family import leaves
from megamm.convert.import_folder import import_
from megamm.convert.io.export_folder import LoadedExport
from megamm.convert.verify.logits import logits_difference
from megamm.data.pipeline.packing import PackingSpec, pack
from megamm.data.pipeline.run_data import open_run_data
from megamm.evaluation.losses import evaluate
from megamm.evaluation.tasks import PairGainTask, RecallTask
from megamm.inference.export_subject import ExportSubject
from megamm.inference.generate import Sampling, generate, generate_from
from megamm.mcore import cpu, process_groups
from megamm.modalities.protocol import sequential_positions
from megamm.model import layout
from megamm.model.vocabulary import Vocabulary
from megamm.parity.case import BASE, Case
from megamm.parity.rows import VOCABULARY

SPAN = {"image": {"attention": "span"}}
WINDOW = {"window": {"size": 9, "full_layers": [1]}}


# --- rows ---


def test_a_row_with_spans_token_by_token() -> None:
    vocabulary = Vocabulary.of({"text": (100, "t"), "image": (50, "i"), "audio": (20, "a")})
    packing = {
        "text": PackingSpec(sequential_positions, False),
        "image": PackingSpec(sequential_positions, False, is_span=True),
        "audio": PackingSpec(sequential_positions, False),
    }
    parts = [("text", 2), ("image", 3), ("audio", 2), ("image", 2), ("image", 0)]
    document = Document("a", tuple(Part(name, np.arange(size)) for name, size in parts))
    row = pack([document, Document("b", document.parts[1:2])], vocabulary, 32, packing)
    #       <d> 1  2  <i> i  i  i  </i> <a> a  a  </a> <i> i  i  </i> <i> </i> </d> | <d> <i> i  i  i  </i> </d>
    span = [-1, -1, -1, -1, 4, 4, 4, -1, -1, -1, -1, -1, -1, 13, 13, -1, -1, -1, -1]
    assert row.span.tolist() == [*span, -1, -1, 21, 21, 21, -1, -1, *[-1] * 6]
    # As labels: nothing of an image counts, neither its tokens nor its marks.
    counts = [0, 0, -1, -1, -1, -1, -1, 0, 2, 2, 2, -1, -1, -1, -1, -1, -1, 0, -1]
    assert row.modality.tolist() == [*counts, -1, -1, -1, -1, -1, 0, -1, *[-1] * 6]
    assert (row.labels[: len(span) - 1] == row.input_ids[1 : len(span)]).all() and row.labels[18] == IGNORE_LABEL
    batch = Batch.stack([row])
    assert (
        batch.packed_seq_metadata.shape == (1, 5, 32) and batch.packed_seq_metadata[0, 4].tolist() == row.span.tolist()
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modalities.text.attention": "span"}, "modalities.text.attention = span: text is generated token by token"),
        ({"train.attention": "varlen"}, "train.attention=varlen does not support modalities.image.attention = span"),
        ({"model.mtp.num_layers": 1}, "multi-token prediction does not support modalities.image.attention = span"),
        (
            {"loss_weights.image": 0.5},
            "loss_weights.image with modalities.image.attention = span: the tokens of a span",
        ),
    ],
)
def test_what_spans_do_not_support_is_named(changes: dict[str, Any], message: str) -> None:
    config = Case.of(1, {"modalities.image.attention": "span"} | changes).config
    with pytest.raises(UserError) as error:
        layout.check(config, 1)
    assert error.value.what.startswith(message)
    assert error.value.remedy


@pytest.mark.parametrize(
    ("modalities", "message"),
    [
        ({"image": {"attend": "span"}}, "unknown key modalities.image.attend"),
        ({"image": {"attention": "both"}}, "modalities.image.attention: Input should be 'causal' or 'span'"),
        ({"image": "span"}, "modalities.image: Input should be a valid dictionary"),
    ],
)
def test_a_wrong_key_of_a_modality_is_named(modalities: dict[str, Any], message: str) -> None:
    config: dict[str, Any] = {"modalities": modalities}
    for key, value in BASE.items():
        section, _, name = key.rpartition(".")
        if section:
            config.setdefault(section, {})[name] = value
        else:
            config[name] = value
    with pytest.raises(UserError) as error:
        config_from_dict(config, where="test")
    assert error.value.what.startswith(message)


def test_generation_in_training_refuses_spans() -> None:
    cpu.install()
    from megamm.mcore.paged_decoder import check_supported

    with pytest.raises(UserError, match="generation does not support modalities with attention = span"):
        check_supported(Case.of(1, {"modalities.image.attention": "span"}).config)


# --- Gemma 3's own class ---


def gemma3(folder: Path, layers: list[str]) -> Any:
    """Save a random Gemma 3 text model, and return the image-and-text model of transformers around it."""
    values = COMMON | MODELS["gemma3"][1] | {"layer_types": layers, "final_logit_softcapping": None}
    torch.manual_seed(1)
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**values).to_dict(),
        vision_config=vision | {"image_size": 8, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_index=VOCABULARY - 1,
    )
    model = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    text = transformers.Gemma3ForCausalLM(config.text_config).eval()
    with torch.no_grad():
        for key, tensor in model.model.language_model.state_dict().items():
            if "norm" in key:
                tensor.uniform_(0.5, 1.5)
    text.model.load_state_dict(model.model.language_model.state_dict())
    text.save_pretrained(folder)
    return model


def test_logits_equal_gemma_3_with_token_types(tmp_path: Path) -> None:
    """Two spans of 16 and 19 tokens over windows of 5, and one of one token: as its images of `token_type_ids` 1."""
    theirs = gemma3(tmp_path / "hf", ["sliding_attention", "full_attention", "sliding_attention"])
    family, section, file = read_model(tmp_path / "hf")
    settings = {f"model.{key}": value for key, value in leaves(section)}
    config = Case.of(1, settings | {"modalities.image.attention": "span", "data.seq_length": SEQUENCE}).config
    stored, device = mapping.from_transformers(family.rules, file, config.model), choose("cpu")
    ids = np.random.default_rng(0).integers(0, VOCABULARY - 1, SEQUENCE)
    span = np.full(SEQUENCE, -1)
    for first, stop in ((3, 19), (20, 21), (24, 43)):
        span[first:stop] = first
    zeros = np.zeros_like(ids)
    row = Row(ids, ids, zeros.astype(np.float32), zeros, np.stack([np.arange(SEQUENCE)] * 3), zeros, span)
    process_groups.start(device)
    from megamm.engine.native import NativeEngine

    try:
        groups = process_groups.build(config.parallel, seed=3)
        engine = NativeEngine(config, VOCABULARY, groups, device)
        state = TrainState(0, 0, 1, layout={}, vocabulary=[], config={}, versions={}, has_optimizer=False)
        save_now(tmp_path, state, whole_blocks(stored), generator_states(), device)
        engine.load(path_of(tmp_path, 0) / "tensors", 0, with_optimizer=False)
        batch = Batch.stack([row])
        with torch.inference_mode():
            ours = engine.chunks[0].module(batch.input_ids, None, batch.packed_seq_metadata)
            wanted = theirs(batch.input_ids, token_type_ids=(batch.span >= 0).long()).logits
            causal = theirs(batch.input_ids, token_type_ids=torch.zeros_like(batch.span)).logits
    finally:
        process_groups.destroy()
    assert (ours - wanted).abs().max() / wanted.abs().max() <= 1e-5
    assert (ours - causal).abs().max() / wanted.abs().max() > 0.05


# --- exports ---


@pytest.fixture(scope="module", params=[{}, WINDOW], ids=["full", "windows"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_export(tmp_path_factory.mktemp("spans"), heldout=4, **request.param)
    metadata = json.loads((made / "megamm.json").read_text())
    metadata["config"]["modalities"] = SPAN
    (made / "megamm.json").write_text(json.dumps(metadata))
    return made


def plain_logits(opened: LoadedExport, ids: list[int], span: list[int]) -> torch.Tensor:
    """Return logits `[T, V]` of a document, with masks that are written token by token."""
    size, window = len(ids), opened.config.model.window.size
    seen = {(q, k) for q in range(size) for k in range(size) if k <= q or (span[q] == span[k] >= 0)}
    masks = {}
    for kind, farthest in (("full_attention", size), ("sliding_attention", window)):
        mask = torch.full((1, 1, size, size), -1e30)
        for q, k in seen:
            if q - k < farthest:
                mask[0, 0, q, k] = 0.0
        masks[kind] = mask
    with torch.inference_mode():
        return opened.model(torch.tensor([ids]), attention_mask=masks if window else masks["full_attention"]).logits[0]


def test_loss_of_an_export_is_that_of_the_plain_masks(folder: Path) -> None:
    opened, source = open_tiny(folder), folder.parent / "shards" / "shapes"
    result = evaluate(ExportSubject(opened), [source])
    assert set(result.loss) == {"text"} and set(result.pair_gain) == {"image_to_text"}
    image, text = (Part("image", np.arange(16) + 3), Part("text", np.array([7, 8, 9])))
    v = opened.vocabulary
    for parts in ((image, text), (text, image)):
        ((_, row, losses),) = ExportSubject(opened).token_losses([Document("a", parts)])
        ids = row.input_ids.tolist()
        span = [0 if v["image"].start <= i < v["image"].stop else -1 for i in ids]
        wanted = -plain_logits(opened, ids, span).log_softmax(-1)[np.arange(len(ids) - 1), ids[1:]]
        assert np.allclose(losses[:-1], wanted, rtol=1e-4, atol=1e-4)


def test_a_caption_is_that_of_the_plain_loop(folder: Path) -> None:
    """In a batch of prompts of other lengths, with the image in front and in the middle."""
    opened = open_tiny(folder)
    v, text, image = opened.vocabulary, opened.modalities["text"], opened.modalities["image"]
    pictures = [np.asarray(shape_picture(n)[0]) for n in range(2)]
    prompts = [(("image", pictures[0]),), (("text", "a red"), ("image", pictures[1]))]
    made = generate_from(opened, prompts, "text", Sampling(temperature=0, max_tokens=6))
    allowed = [*range(v["text"].start, v["text"].stop), v.document_end]
    for parts, caption in zip(prompts, made, strict=True):
        ids, span = [v.document_start], [-1]
        for name, medium in parts:
            new = (opened.modalities[name].encode([medium])[0] + v[name].start).tolist()
            is_image = name == "image"
            ids += [v.begin("image"), *new, v.end("image")] if is_image else new
            span += [-1, *[len(ids)] * len(new), -1] if is_image else [-1] * len(new)
        before = len(ids)
        for _ in range(6):
            logits = plain_logits(opened, ids, span)[-1]
            best = max(allowed, key=lambda i: logits[i].item())
            if best == v.document_end:
                break
            ids, span = [*ids, best], [*span, -1]
        assert caption == text.decode(np.array(ids[before:], dtype=np.int64))
    assert image.tokens_per_item == 16


def test_an_export_does_not_write_what_it_reads_as_spans(folder: Path) -> None:
    with pytest.raises(UserError, match="reads image as bidirectional spans"):
        generate(open_tiny(folder), ["a"], "text", "image", Sampling())


def test_tasks_of_a_suite_score_no_spans(folder: Path) -> None:
    subject, source = ExportSubject(open_tiny(folder)), folder.parent / "shards" / "shapes"
    with pytest.raises(UserError, match="the model reads image as bidirectional spans"):
        RecallTask(subject, TaskConfig(metrics=["recall"], source=source, direction="text_to_image"))
    task = PairGainTask(subject, TaskConfig(metrics=["pair_gain"], source=source, n=4))
    figures = list(task.figures(task.compute(subject, range(task.count), folder)))
    assert [figure.direction for figure in figures] == ["image_to_text"]


def test_logits_of_the_run_equal_those_of_the_export(folder: Path, tmp_path: Path) -> None:
    import_(folder, tmp_path / "run")
    assert 0 < logits_difference(tmp_path / "run", folder, choose("cpu"), rows=3) <= 2e-4


# --- a run ---


def test_a_run_trains_exports_and_captions(tmp_path: Path) -> None:
    make_data(tmp_path)
    config = write_config(tmp_path, tmp_path / "run", modalities=SPAN, train={"steps": 3, "global_batch_size": 2})
    megamm("train", config, "--nproc", 2, "parallel.context=2")
    last = [line for line in numbers(tmp_path / "run") if "loss/text" in line][-1]
    assert last["loss/text"] > 0 and last["loss/image"] is None
    made = export(tmp_path / "run", tmp_path / "out", nproc=1)
    assert "Bidirectional spans: image." in (made / "README.md").read_text()
    arguments = ["generate", str(made), "--from", str(tmp_path / "raw" / "drawn" / "0_0.png"), "--to", "text"]
    said = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "said.txt")])
    assert said.exit_code == 0, said.output
    wrong = yaml.safe_load(config.read_text()) | {"modalities": {"picture": {"attention": "span"}}}
    config.write_text(yaml.safe_dump(wrong))
    with pytest.raises(UserError, match=r"modalities\.picture has no tokenizer"):
        open_run_data(load_config(config))
