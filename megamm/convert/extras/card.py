"""The model card of an export: README.md in the format of the Hub, made from the files of the export.

`record` and `copy_attribution` store what the card reports about the run and its shards: training tokens by modality,
held-out loss (nats per token), sources with their licences. `write_card` needs the export folder alone, so the card
can be rewritten later with the figures of `megamm eval`.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megamm import checkpoint
from megamm.common.errors import UserError
from megamm.config import RunConfig
from megamm.convert.io.export_folder import DIGESTS, write_digests
from megamm.data.pipeline.mixture import source_names
from megamm.data.sources.media import ATTRIBUTION
from megamm.model.vocabulary import Vocabulary
from megamm.observability import metrics
from megamm.tokenizers.io import weight_files

CARD = "README.md"
_LICENCE = re.compile(r"\bLicen[cs]e: (.+?)\.?$", re.MULTILINE)
_EVALUATE = "evaluate this export with `megamm eval EXPORT ... --json FILE`"
_UNKNOWN = f"not recorded: no {ATTRIBUTION} beside its shards"


def record(folder: Path, state: checkpoint.TrainState, config: RunConfig) -> dict[str, Any]:
    """The run's data for the card, from the checkpoint `folder`; JSON."""
    lines = [line for line in _metrics(folder) if line["step"] <= state.step]
    heldout = {
        key.removeprefix("heldout/"): {"loss": value, "step": line["step"]}
        for line in lines
        for key, value in line.items()
        if key.startswith("heldout/") and value is not None
    }
    sources = [
        {"name": name, "weight": weight, "licence": _licence(shards)}
        for name, shards, weight in _sources(state, config)
    ]
    return {"tokens": state.tokens, "heldout": heldout, "sources": sources}


def _metrics(folder: Path) -> list[dict[str, Any]]:
    """Metrics of the run that holds the checkpoint, RUN/checkpoints/step_...; empty if it was copied elsewhere."""
    run = folder.absolute().parent.parent
    return metrics.read_lines(run) if (run / metrics.METRICS).is_file() else []


def _sources(state: checkpoint.TrainState, config: RunConfig) -> Iterator[tuple[str, Path, float | None]]:
    """Name, shards and weight of every source trained on; a source removed from the mixture has the weight None."""
    sources = config.data.sources
    now = dict(zip(source_names([source.path for source in sources]), sources, strict=True))
    for name, source in now.items():
        yield name, source.path, source.weight
    # The checkpoint's mixture knows sources that the config no longer names: the model has seen them all the same.
    paths = {str(source.path) for source in sources}
    for name, entry in (state.mixture or {}).get("sources", {}).items():
        if name not in now and entry["path"] not in paths:
            yield name, Path(entry["path"]), None


def _licence(shards: Path) -> str | None:
    """The first licence that ATTRIBUTION.md names; None without that file."""
    file = shards / ATTRIBUTION
    if not file.is_file():
        return None
    found = _LICENCE.search(file.read_text(encoding="utf-8", errors="replace"))
    return found[1] if found else f"see {ATTRIBUTION}"


def copy_attribution(state: checkpoint.TrainState, config: RunConfig, folder: Path) -> None:
    """Write folder/ATTRIBUTION.md: the attributions of all sources, which their licences require to be passed on."""
    files = [shards / ATTRIBUTION for _, shards, _ in _sources(state, config)]
    if texts := [file.read_bytes() for file in files if file.is_file()]:
        (folder / ATTRIBUTION).write_bytes(b"\n".join(texts))


def write_card(folder: Path, metadata: dict[str, Any], evaluation: dict[str, Any] | None = None) -> None:
    """Write README.md, then SHA256SUMS.

    metadata: the export's megamm.json; evaluation: the output of `megamm eval --json`. Raises UserError if the figures
    belong to another step.
    """
    if evaluation is not None and evaluation.get("step") != metadata["step"]:
        what = f"the evaluation is of step {evaluation.get('step')}, but the export is of step {metadata['step']}"
        raise UserError(what, where=folder, remedy=_EVALUATE)
    theirs = json.loads((folder / "config.json").read_text())
    text = _front_matter(folder, metadata, evaluation) + "\n".join(_body(folder, metadata, theirs, evaluation)) + "\n"
    (folder / CARD).write_text(text, encoding="utf-8")
    write_digests(folder)


def read_evaluation(file: Path) -> dict[str, Any]:
    """Figures that `megamm eval` wrote, with --json or as the eval.json of a suite. UserError for another file."""
    try:
        values = dict(json.loads(file.read_text()))
        of_a_suite = {"step", "figures"}
        missing = (
            of_a_suite if "figures" in values else {"step", "samples", "loss", "tokens", "pair_gain"}
        ) - values.keys()
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"not an evaluation file: {error}", where=file, remedy=_EVALUATE) from None
    if missing:
        raise UserError(f"not an evaluation file: {sorted(missing)[0]} is missing", where=file, remedy=_EVALUATE)
    return values


def _front_matter(folder: Path, metadata: dict[str, Any], evaluation: dict[str, Any] | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData  # comes with transformers

    known = (folder / ATTRIBUTION).is_file()
    results = [_eval_result(figure) for figure in (evaluation or {}).get("figures", []) if figure["value"] is not None]
    results += [
        EvalResult(
            task_type="any-to-any",
            dataset_type="held-out",
            dataset_name="held-out samples of the sources",
            metric_type="cross-entropy",
            metric_name=f"cross entropy of {name} in nats per token",
            metric_value=loss,
        )
        for name, loss in (evaluation or {}).get("loss", {}).items()
    ]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="any-to-any",
        license="other" if known else "unknown",
        license_name="as-the-sources-allow" if known else None,
        license_link=ATTRIBUTION if known else None,
        tags=["megamm", *Vocabulary.from_json(metadata["vocabulary"]).modalities],
        model_name=_title(metadata) if results else None,  # required with results
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _eval_result(figure: dict[str, Any]) -> Any:
    """Return a figure of a suite for the header, in which a metric has a value."""
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type="any-to-any",
        dataset_type="held-out",
        dataset_name=f"held-out samples of {figure.get('source', 'its tasks')}",
        metric_type=figure["metric"],
        metric_name=" ".join(word for word in (figure["metric"], figure.get("direction")) if word),
        metric_value=figure["value"],
    )


def _title(metadata: dict[str, Any]) -> str:
    return f"{Path(metadata['config']['output']).name}, step {metadata['step']}"


def _body(
    folder: Path, metadata: dict[str, Any], theirs: dict[str, Any], evaluation: dict[str, Any] | None
) -> list[str]:
    vocabulary, training = Vocabulary.from_json(metadata["vocabulary"]), metadata.get("training", {})
    tokens, sources, heldout = (
        training.get("tokens") or {},
        training.get("sources") or [],
        training.get("heldout") or {},
    )
    size = sum(file.stat().st_size for file in weight_files(folder))
    lines = [
        f"# {_title(metadata)}",
        "",
        f"One model of {', '.join(vocabulary.modalities)}: all of them are tokens of one vocabulary, read and written "
        f"by one decoder. `transformers` loads it as {theirs['architectures'][0]}. codecs/ holds the codecs that turn "
        f"media into tokens and back (megamm). megamm.json holds the whole configuration of the run.",
        "",
        f"Weights: {size / 2**20:,.1f} MiB. Check all files: `sha256sum -c {DIGESTS}`.",
    ]
    if spans := sorted(
        name for name, m in metadata["config"].get("modalities", {}).items() if m["attention"] == "span"
    ):
        lines += [
            "",
            f"Bidirectional spans: {', '.join(spans)}. The tokens of such a part attend to each other in both "
            "directions: a program that runs the weights needs a mask for it, as `megamm generate` has.",
        ]
    architecture = {key: value for key, value in theirs.items() if isinstance(value, int | float | str)}
    lines += ["", "## Configuration", "", *_table(("of config.json", ""), sorted(architecture.items()))]
    ranges = [(r.name, r.start, r.stop - 1, r.codec_id or "-") for r in vocabulary.ranges]
    lines += ["", "## Vocabulary", "", *_table(("range", "first id", "last id", "codec"), ranges)]
    rows = [
        (s["name"], "removed" if s["weight"] is None else f"{s['weight']:g}", s["licence"] or _UNKNOWN) for s in sources
    ]
    lines += ["", "## Training data", "", *_table(("source", "weight", "licence"), rows)]
    lines += ["", f"Full list of origins and licences: {ATTRIBUTION}."] * (folder / ATTRIBUTION).is_file()
    seen = [(name, f"{count:,}") for name, count in tokens.items()]
    lines += ["", f"## Training tokens up to step {metadata['step']}", "", *_table(("modality", "tokens"), seen)]
    lines += ["", "## Evaluation", "", *_evaluation(heldout, evaluation)]
    made_by = [f"{name} {version}" for name, version in sorted(metadata["versions"].items())]
    return [*lines, "", f"Made with {', '.join(made_by)}."] if made_by else lines


def _evaluation(heldout: dict[str, Any], evaluation: dict[str, Any] | None) -> Iterator[str]:
    rows = [(name, f"{found['loss']:.4f}", found["step"]) for name, found in heldout.items()]
    yield from _table(("held-out loss in training, nats per token", "", "step"), rows)
    if evaluation is not None and "figures" in evaluation:
        yield from ("", "Measured with a suite of `megamm eval`:", "")
        head = ("metric", "direction", "source", "value", "standard error", "samples")
        yield from _table(head, [_suite_row(figure) for figure in evaluation["figures"]])
    elif evaluation is not None:
        yield from ("", f"Measured with `megamm eval` on {evaluation['samples']} held-out samples:", "")
        losses = [(name, f"{loss:.4f}", evaluation["tokens"][name]) for name, loss in evaluation["loss"].items()]
        yield from _table(("modality", "cross entropy, nats per token", "tokens"), losses)
        gains = [(name, f"{g['mean']:+.4f}", g["samples"]) for name, g in evaluation["pair_gain"].items()]
        yield from ("", *_table(("direction", "pair gain, nats per token", "samples"), gains))


def _suite_row(figure: dict[str, Any]) -> list[str]:
    numbers = ("-" if figure[key] is None else f"{figure[key]:.4g}" for key in ("value", "standard_error"))
    return [figure["metric"], figure.get("direction", ""), figure.get("source", ""), *numbers, str(figure["n"])]


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """A Markdown table; without rows, a line that says that nothing is recorded."""
    if not rows:
        return [f"({head[0]}: not recorded.)"]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return [lines[0], "|" + " --- |" * len(head), *lines[1:]]
