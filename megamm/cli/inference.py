"""`megamm eval` and `megamm generate`: evaluate an export and generate with it."""

import json
from pathlib import Path
from typing import Annotated

import typer

from megamm.cli.common import DeviceChoice, Sources, writable_file
from megamm.common.errors import UserError
from megamm.common.log import log_to_console

app = typer.Typer()


@app.command("eval")
def evaluate_export(
    export: Annotated[Path, typer.Argument(help="a folder made by `megamm convert export`")],
    sources: Sources,
    limit: Annotated[int | None, typer.Option(help="most held-out samples per source", min=1)] = None,
    seed: Annotated[int, typer.Option(help="seed of the shuffled partners")] = 0,
    run: Annotated[Path | None, typer.Option(help="also compare logits with this run's own model")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="write the results to this file", callback=writable_file)
    ] = None,
    device: DeviceChoice = "auto",
) -> None:
    """Evaluate an export in stock transformers: held-out loss, and pair gain (how much one part predicts the other)."""
    from megamm.common.device import choose
    from megamm.convert.io.export_folder import open_export
    from megamm.convert.verify.logits import logits_difference
    from megamm.inference.evaluate import evaluate, summary_lines

    log_to_console()
    if json_file is not None and json_file.exists():
        raise UserError("the output exists", where=json_file, remedy="remove it or choose another")
    chosen = choose(device)
    figures = evaluate(open_export(export, chosen.torch_device), sources, limit=limit, seed=seed).to_json()
    print(*summary_lines(figures), sep="\n")
    if run is not None:
        figures["logits_max_abs_diff"] = logits_difference(run, export, chosen)
        print(f"logits: at most {figures['logits_max_abs_diff']:.1e} from the run's own model")
    if json_file is not None:
        partial = json_file.with_name(f".{json_file.name}.partial")
        partial.write_text(json.dumps(figures, indent=1) + "\n")
        partial.rename(json_file)


@app.command()
def generate(
    export: Annotated[Path, typer.Argument(help="a folder made by `megamm convert export`")],
    to: Annotated[str | None, typer.Option(help="output modality: text, image, audio, video, points")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="text to start from; may be repeated")] = None,
    file: Annotated[list[Path] | None, typer.Option("--from", help="file to start from; may be repeated")] = None,
    out: Annotated[
        Path | None, typer.Option(help="file to write; a folder for several inputs", callback=writable_file)
    ] = None,
    requests: Annotated[
        Path | None, typer.Option(help='JSON lines {"prompt": TEXT or "from": FILE, "to": MODALITY, "out": FILE}')
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token")] = 1.0,
    top_k: Annotated[int, typer.Option(help="sample from this many tokens; 0 is off")] = 0,
    top_p: Annotated[float, typer.Option(help="sample from this share of the probability")] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="most tokens of generated text")] = 64,
    seed: Annotated[int, typer.Option(help="item i uses seed + i")] = 0,
    device: DeviceChoice = "auto",
) -> None:
    """Generate one modality from another: --prompt "a red heart" --to image --out heart.png."""
    from megamm.common.device import choose
    from megamm.inference.generate import Sampling
    from megamm.inference.generate_files import Medium, generate_files, generate_requests, modality_of, read_requests

    log_to_console()
    sampling = Sampling(temperature, top_k, top_p, seed, max_tokens)
    if requests is not None:
        if prompt or file or to is not None or out is not None:
            remedy = "give --requests alone; each of its lines names input, modality and output"
            raise UserError("--requests cannot be combined with --prompt, --from, --to or --out", remedy=remedy)
        asked = read_requests(requests)
        generate_requests(export, asked, sampling, choose(device).torch_device)
        print(f"{requests}: {len(asked)} generated")
        return
    if to is None:
        raise UserError("no output modality", remedy="give --to, or --requests")
    sources = {*(["text"] if prompt else []), *map(modality_of, file or [])}
    if len(sources) != 1:
        raise UserError("inputs must be of one modality", remedy="give --prompt, or --from with files of one modality")
    inputs = [Medium.of_prompt(p) for p in prompt or []] + [Medium.of_file(f) for f in file or []]
    source = sources.pop()
    made = generate_files(export, inputs, source, to, out, sampling, choose(device).torch_device)
    print(*(made if out is None else [f"{out}: {len(made)} {to}"]), sep="\n")
