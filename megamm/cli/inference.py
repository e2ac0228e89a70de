"""`megamm generate`: generate with an export."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from megamm.cli.common import DeviceChoice, writable_file
from megamm.common.errors import UserError
from megamm.common.log import log_to_console

app = typer.Typer()


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
