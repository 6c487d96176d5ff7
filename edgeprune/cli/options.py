"""Options and arguments that several commands of the command line share, each with one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document to standard output and nothing else.")]
Bundle = Annotated[Path, typer.Argument(metavar="BUNDLE", help="The output directory of `edgeprune fit`.")]
Seed = Annotated[int, typer.Option(help="Seed of everything drawn.")]
Model = Annotated[
    str, typer.Argument(metavar="[MODEL]", help="Directory, hub id, .gguf file, LlamaGen's .pt, or `demo`.")
]
Device = Annotated[str | None, typer.Option(help="Device profile; `edgeprune devices` lists them.")]
Profile = Annotated[Path | None, typer.Option(help="Your own profile, a TOML file.")]
Calibration = Annotated[
    str, typer.Option(metavar="PATH|self", help="Text, jsonl, folder, or one of pictures; `self`: the model's own.")
]
Evaluate = Annotated[
    list[Path] | None, typer.Option(help="Held-out text, or a folder of pictures; may be given again.")
]
Samples = Annotated[int, typer.Option(help="Calibration samples.")]
Length = Annotated[int | None, typer.Option(help="Tokens of a sample. Default: 256; a picture has its own.")]
Method = Annotated[str, typer.Option(help="default, or a baseline: wanda+ls, magnitude, random, ...")]
Layout = Annotated[
    str,
    typer.Option(
        metavar="uniform|per-layer", help="The same widths in every layer, or free ones (ONNX and engine only)."
    ),
]
Export = Annotated[
    list[str] | None, typer.Option(metavar="gguf", help="Also write the model in this format; may be given again.")
]
Vocabulary = Annotated[
    str,
    typer.Option(metavar="full|samples", help="samples: tokens that no sample needs may go; all text stays spelled."),
]
Precision = Annotated[str | None, typer.Option(metavar="fp32|fp16|bf16", help="Default: the profile's.")]
Batch = Annotated[int | None, typer.Option(help="Sequences, or pictures, at once. Default: the profile's.")]
Prompt = Annotated[int | None, typer.Option(help="Tokens of the prompt. Default: the profile's.")]
Context = Annotated[int | None, typer.Option(help="Prompt and generated tokens. Default: the profile's.")]
EngineName = Annotated[
    str, typer.Option(metavar="auto|tensorrt|tensorrt-rtx|onnxruntime", help="Engine to build with.")
]
Target = Annotated[str | None, typer.Option(metavar="ssh://USER@HOST[:PORT]", help="Build and measure on this device.")]
KeepRemote = Annotated[bool, typer.Option("--keep-remote", help="Leave the working folder on the device.")]
Codec = Annotated[Path | None, typer.Option(help="Of an image generator: LlamaGen's VQ file.")]
ImageSize = Annotated[
    int | None, typer.Option(metavar="PIXELS", help="Of LlamaGen's pictures, where the file does not say.")
]
NumHeads = Annotated[int | None, typer.Option(help="Of a LlamaGen whose size was not published.")]
Cfg = Annotated[float | None, typer.Option(help="Guidance of pictures in deployment; 1: none. Default: the model's.")]
Images = Annotated[int | None, typer.Option(help="Pictures drawn to judge quality by. Default: 128.")]
Features = Annotated[
    Path | None, typer.Option(help="Network that pictures are compared through, ONNX. Default: EfficientNet-lite0.")
]
PICTURES = ("--class", "--count", "--cfg", "--output", "--force")  # of run: what draws
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an older bundle or unfinished run.")]


def console() -> Any:
    from rich.console import Console

    return Console()


def given(context: typer.Context) -> list[str]:
    """What the command line gives, as it is written there: `--device`, or `MODEL` for an argument."""
    found = []
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name)
        if source is not None and source.name == "COMMANDLINE":
            is_option = parameter.param_type_name == "option"
            found.append(parameter.opts[0] if is_option else parameter.name.upper())
    return found


def note(text: str) -> None:
    """Prints a line to standard error, apart from what a command returns."""
    typer.echo(text, err=True)
