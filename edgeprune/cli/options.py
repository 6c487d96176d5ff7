"""The options of the command line, each with one help text, and how a command takes those of a request."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from edgeprune.errors import InputError
from edgeprune.files import at_home
from edgeprune.model.export import FORMATS
from edgeprune.ondevice.runtimes import RUNTIMES
from edgeprune.pipeline.request import DEFAULTS, SEVERAL, unknown_option
from edgeprune.precision import CACHE_FORMATS, PRECISIONS, WEIGHT_FORMATS

MODEL, BUDGET, SEARCH = "Model and data", "Budget", "Search"
IMAGES, DEVICE, OUTPUT = "Image generators", "Device", "Output"


def _option(panel: str, help_: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=help_, rich_help_panel=panel, **settings)


Json = Annotated[bool, _option(OUTPUT, "Print one JSON document to standard output and nothing else.", "--json")]


def _path(text: str | Path) -> Path:
    return Path(at_home(text))


PATH: dict[str, Any] = {"parser": _path, "metavar": "PATH"}  # settings of an option
Bundle = Annotated[
    Path, typer.Argument(metavar="BUNDLE", parser=_path, help="The output directory of `edgeprune fit`.")
]
Draft = Annotated[
    Path | None,
    typer.Option(help="A bundle of `edgeprune draft`, which guesses tokens ahead.", metavar="BUNDLE", parser=_path),
]
Seed = Annotated[int, _option(SEARCH, "Seed of everything drawn.")]
KeepRemote = Annotated[bool, _option(DEVICE, "Leave the working folder on the device.", "--keep-remote")]
Cfg = Annotated[float | None, _option(IMAGES, "Guidance of images in deployment; 1: none. Default: the model's.")]
_TASKS = _option(
    MODEL,
    "Tasks of lm-evaluation-harness with commas between (`lm-eval ls tasks`), or files of your own: .yaml as the "
    "harness has them, .jsonl of question, choices, answer.",
    metavar="NAMES|FILE",
)
Tasks = Annotated[str, _TASKS]
Questions = Annotated[int | None, _option(MODEL, "Of each task, at most. Default: all.", metavar="N")]
Config = Annotated[
    Path | None,
    _option(
        OUTPUT,
        "Take options from this TOML file, such as a bundle's run.toml; the command line wins.",
        is_eager=True,
        **PATH,
        callback=lambda context, path: _take_config(context, path),
    ),
]

# By the names of a request's fields. `plan` and `run` take some of them too.
OPTIONS: dict[str, Any] = {
    "model": Annotated[
        str, typer.Argument(metavar="MODEL", help="Directory, hub id, .gguf file, LlamaGen's .pt, or `demo`.")
    ],
    "calibration": Annotated[
        str,
        _option(
            MODEL,
            "Calibration data: text, jsonl, a folder of them or of images; `self`: the model's own.",
            metavar="PATH|self",
        ),
    ],
    "evaluate": Annotated[
        list[str] | None, _option(MODEL, "Held-out text, or a folder of images; may be given again.", metavar="PATH")
    ],
    "tasks": Annotated[str | None, _TASKS],
    "questions": Questions,
    "samples": Annotated[int, _option(MODEL, "Calibration samples.")],
    "length": Annotated[int | None, _option(MODEL, "Tokens of a sample. Default: 256; an image has its own.")],
    "memory": Annotated[
        str | None,
        _option(
            BUDGET,
            "Peak device memory: 1.5GiB, 900MB, or 90% of the dense model's but the runtime's fixed part. "
            "Without any limit: the profile's budget.",
            metavar="SIZE|%",
        ),
    ],
    "decode": Annotated[
        str | None, _option(BUDGET, "Time per token: 25ms, or 70% of the dense model's.", metavar="MS|%")
    ],
    "prefill": Annotated[
        str | None, _option(BUDGET, "Time to first token: 0.5s, or 70% of the dense model's.", metavar="MS|%")
    ],
    "max_quality_loss": Annotated[
        str | None,
        _option(
            BUDGET,
            "Acceptable loss by --quality-metric. Default: a broken model's, for perplexity 30%.",
            metavar="%|POINTS|off",
        ),
    ],
    "max_task_drop": Annotated[
        str | None, _option(BUDGET, "Points of percent that the score of each of --tasks may fall.", metavar="POINTS")
    ],
    "quality_metric": Annotated[
        str,
        _option(
            BUDGET, "Decides whether a model is intact, degraded or broken.", metavar="perplexity|agreement|task:NAME"
        ),
    ],
    "method": Annotated[
        str, _option(SEARCH, "Of pruning; `edgeprune compare --list-methods` tells them all.", metavar="NAME")
    ],
    "layout": Annotated[
        str,
        _option(
            SEARCH, "The same widths in every layer, or free ones (ONNX and engine only).", metavar="uniform|per-layer"
        ),
    ],
    "vocabulary": Annotated[
        str,
        _option(
            SEARCH,
            "samples: tokens that no sample needs may go; all text can still be encoded.",
            metavar="full|samples",
        ),
    ],
    "weights": Annotated[
        str,
        _option(
            SEARCH,
            "Formats to choose from for each module's weights: auto (floats and what the device's engine runs well), "
            f"float, int8, int4, or several of {', '.join(('float', *WEIGHT_FORMATS))}.",
            metavar="NAME,NAME",
        ),
    ],
    "cache": Annotated[
        str,
        _option(
            SEARCH,
            "Formats to choose from for the KV cache: auto (floats and what the device's engine is known to run well), "
            f"or several of {', '.join(('float', *CACHE_FORMATS))}.",
            metavar="NAME,NAME",
        ),
    ],
    "rungs": Annotated[
        int, _option(SEARCH, "Models in the bundle; each further one is smaller, in case the device is slower.")
    ],
    "recover": Annotated[
        str,
        _option(
            SEARCH,
            "Train the pruned model toward the dense one, end to end: so many steps (240), or minutes (20min).",
            metavar="off|STEPS|MINUTES",
        ),
    ],
    "recover_candidates": Annotated[
        int,
        _option(
            SEARCH,
            "Candidates within the budget that --recover trains, the best of them afterwards being kept: the search's "
            "own, and the best by pruning alone and by formats alone.",
        ),
    ],
    "seed": Seed,
    "codec": Annotated[Path | None, _option(IMAGES, "LlamaGen's VQ file, which its generators need.", **PATH)],
    "image_size": Annotated[
        int | None, _option(IMAGES, "Side of LlamaGen's images, where the file does not hold it.", metavar="PIXELS")
    ],
    "num_heads": Annotated[int | None, _option(IMAGES, "Of a LlamaGen whose size was not published.")],
    "cfg": Cfg,
    "images": Annotated[int | None, _option(IMAGES, "Images drawn to judge quality by. Default: 128.")],
    "features": Annotated[
        Path | None,
        _option(IMAGES, "Network that images are compared through, ONNX. Default: EfficientNet-lite0.", **PATH),
    ],
    "device": Annotated[
        str | None,
        _option(DEVICE, "A name of `edgeprune devices`; fit and frontier need this or --profile.", metavar="NAME"),
    ],
    "profile": Annotated[Path | None, _option(DEVICE, "Your own device profile, a TOML file.", **PATH)],
    "precision": Annotated[
        str | None, _option(DEVICE, "Of floats and activations. Default: the profile's.", metavar="|".join(PRECISIONS))
    ],
    "tensorrt": Annotated[
        str | None, _option(DEVICE, "TensorRT on the device, such as 10.3. Default: the profile's.", metavar="VERSION")
    ],
    "batch": Annotated[int | None, _option(DEVICE, "Sequences, or images, at once. Default: the profile's.")],
    "prompt": Annotated[int | None, _option(DEVICE, "Tokens of the prompt. Default: the profile's.")],
    "context": Annotated[int | None, _option(DEVICE, "Prompt and generated tokens. Default: the profile's.")],
    "engine": Annotated[
        str,
        _option(
            DEVICE,
            f"What runs the model: auto (the device's own), or one of {', '.join(RUNTIMES)}; llama.cpp runs on all.",
            metavar="NAME",
        ),
    ],
    "target": Annotated[
        str | None,
        _option(
            DEVICE,
            "Build and measure on this device. Default: what this machine can build, and estimates.",
            metavar="ssh://USER@HOST[:PORT]",
        ),
    ],
    "keep_remote": KeepRemote,
    "require_measured": Annotated[
        bool, _option(DEVICE, "A verdict that rests on an estimate is a failure.", "--require-measured")
    ],
    "output": Annotated[
        Path | None, _option(OUTPUT, "The bundle. Default: MODEL-DEVICE, of a frontier MODEL-DEVICE-frontier.", **PATH)
    ],
    "export": Annotated[
        list[str] | None,
        _option(OUTPUT, "Also write the model in this format; may be given again.", metavar="|".join(FORMATS)),
    ],
    "checkpoint": Annotated[
        bool, _option(OUTPUT, "Write model/, a standard checkpoint, into the bundle.", "--checkpoint/--no-checkpoint")
    ],
    "mlflow": Annotated[
        str | None,
        _option(OUTPUT, "Log options, figures and report to this MLflow server.", metavar="http://HOST:PORT"),
    ],
    "resume": Annotated[bool, _option(OUTPUT, "Go on with an unfinished run.", "--resume")],
    "force": Annotated[bool, _option(OUTPUT, "Replace an older bundle or unfinished run.", "--force")],
}
Length = OPTIONS["length"]
PlanWeights = Annotated[
    str,
    _option(
        DEVICE,
        f"Format of the layers' weights: float, int8, int4, or one of {', '.join(WEIGHT_FORMATS)}; all else is floats.",
        metavar="NAME",
    ),
]
PlanCache = Annotated[str, _option(DEVICE, "Format of the KV cache.", metavar="|".join(("float", *CACHE_FORMATS)))]
IMAGES_OF_RUN = ("--class", "--count", "--cfg", "--output", "--force")


def takes(*names: str, **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Lets a command take the named options of a request; it gets them as keyword arguments, named or as **options.

    defaults: those that differ from the request's.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [
            parameter
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD and parameter.name not in names
        ]
        added = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=defaults.get(name, None if name in SEVERAL else DEFAULTS[name]),
                annotation=OPTIONS[name],
            )
            for name in names
        ]

        @functools.wraps(command)
        def wrapped(*words: Any, **options: Any) -> None:
            command(*words, **options)

        # In the order of the panels; the argument first.
        parameters = [*added, *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own)]
        wrapped.__signature__ = inspect.Signature(parameters)
        wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return wrapped

    return decorate


def _take_config(context: typer.Context, path: Path | None) -> Path | None:
    """Makes a file's options the defaults of this call, before any other option is read."""
    if path is None or context.resilient_parsing:
        return path
    from edgeprune.pipeline.run_file import read_run_file

    known = {parameter.name.rstrip("_"): parameter for parameter in context.command.params}
    options: dict[str, Any] = {}
    for name, value in read_run_file(path).items():
        if name.startswith("no_") and name.removeprefix("no_") in known and isinstance(value, bool):
            name, value = name.removeprefix("no_"), not value
        if name not in known or name == "config":
            raise unknown_option(name.replace("_", "-"), sorted(known))
        options[known[name].name] = _checked(path, name, value, known[name])
    context.default_map = options
    return path


def _checked(path: Path, name: str, value: Any, parameter: Any) -> Any:
    """Refuses a value of a kind that the option cannot have, which the parser itself would take for true."""
    is_flag = getattr(parameter, "is_flag", False)
    if is_flag != isinstance(value, bool):
        form = "true or false" if is_flag else "a number or a text"
        raise InputError(f"{path}: {name} = {value!r} is not {form}", "`edgeprune fit --help` shows its form.")
    if parameter.multiple and not isinstance(value, list):
        return [value]
    if isinstance(value, list) and not parameter.multiple:
        raise InputError(f"{path}: {name} can be given once", "Write one value.")
    return value


def given(context: typer.Context) -> list[str]:
    """Returns what the command line or its --config gives, as it is written there: `--device`, or `MODEL`."""
    names = []
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name)
        if source is not None and source.name in ("COMMANDLINE", "DEFAULT_MAP") and parameter.name != "config":
            is_option = parameter.param_type_name == "option"
            names.append(parameter.opts[0] if is_option else parameter.name.upper())
    return names
