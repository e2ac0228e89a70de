"""`megamm eval` and `megamm generate`: evaluate an export and generate with it."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

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


class InputsInOrder(TyperCommand):
    """A command that keeps the order in which options were given: `ctx.meta["order"]` has their names."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as any command does, after noting the order."""
        ctx.meta["order"] = [parameter.name for parameter in self.make_parser(ctx).parse_args(args=list(args))[2]]
        return super().parse_args(ctx, args)


@app.command(cls=InputsInOrder)
def generate(
    ctx: typer.Context,
    export: Annotated[Path, typer.Argument(help="a folder made by `megamm convert export`")],
    to: Annotated[str | None, typer.Option(help="output modality: text, image, audio, video, points")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="text to continue or start from; may be repeated")] = None,
    file: Annotated[list[Path] | None, typer.Option("--from", help="file to start from; may be repeated")] = None,
    together: Annotated[
        bool, typer.Option("--together", help="all inputs are one prompt; always so if they are of several modalities")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="file to write; a folder for several prompts", callback=writable_file)
    ] = None,
    requests: Annotated[
        Path | None, typer.Option(help='JSON lines {"prompt": TEXT or "from": FILE, "to": MODALITY, "out": FILE}')
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token")] = 1.0,
    top_k: Annotated[int, typer.Option(help="sample from this many tokens; 0 is off")] = 0,
    top_p: Annotated[float, typer.Option(help="sample from this share of the probability")] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="most tokens of generated text")] = 64,
    stop: Annotated[list[str] | None, typer.Option(help="end text before this string; may be repeated")] = None,
    seed: Annotated[int, typer.Option(help="item i uses seed + i")] = 0,
    device: DeviceChoice = "auto",
) -> None:
    """Generate one modality from a prompt: --prompt "a red heart" --to image --out heart.png.

    A prompt has text and files in the order of the options: --prompt "This" --from heart.png --prompt "is" --to text.
    Text after text continues it. One text without --out is printed as it is generated.
    """
    from megamm.common.device import choose
    from megamm.inference.generate import Sampling
    from megamm.inference.generate_files import Medium, generate_files, generate_requests, read_requests

    log_to_console()
    sampling = Sampling(temperature, top_k, top_p, seed, max_tokens, tuple(stop or ()))
    if requests is not None:
        if prompt or file or together or to is not None or out is not None:
            remedy = "give --requests alone; each of its lines names input, modality and output"
            what = "--requests cannot be combined with --prompt, --from, --together, --to or --out"
            raise UserError(what, remedy=remedy)
        asked = read_requests(requests)
        generate_requests(export, asked, sampling, choose(device).torch_device)
        print(f"{requests}: {len(asked)} generated")
        return
    if to is None:
        raise UserError("no output modality", remedy="give --to, or --requests")
    texts, files = iter(prompt or []), iter(file or [])
    inputs = [
        Medium.of_prompt(next(texts)) if name == "prompt" else Medium.of_file(next(files))
        for name in ctx.meta["order"]
        if name in ("prompt", "file")
    ]
    if not inputs:
        raise UserError("no input", remedy="give --prompt, or --from")
    is_one = together or len({medium.modality for medium in inputs}) > 1
    prompts: list[tuple[Medium, ...]] = [tuple(inputs)] if is_one else [(medium,) for medium in inputs]
    is_streamed = to == "text" and out is None and len(prompts) == 1
    on_text = print_at_once if is_streamed else None
    made = generate_files(export, prompts, to, out, sampling, choose(device).torch_device, on_text)
    if is_streamed:
        print()
    else:
        print(*(made if out is None else [f"{out}: {len(made)} {to}"]), sep="\n")


def print_at_once(text: str) -> None:
    """Show a piece of text as it is generated."""
    sys.stdout.write(text)
    sys.stdout.flush()
