"""The README.md of a bundle: its headline, the steps on the way to the device, and its files. It adds no figure."""

from __future__ import annotations

from edgeprune.model.export import FORMATS
from edgeprune.ondevice.finish import DEPLOYMENT
from edgeprune.report.deploy import FINISH, SERVE, in_blocks
from edgeprune.report.figures import number_text, rise_of
from edgeprune.report.frontier import Dense, Frontier, Rung, pick_command
from edgeprune.report.schema import Report


def readme(report: Report, of_embeddings: bool = False) -> str:
    """Returns README.md of a bundle whose model was chosen; of_embeddings: there are graphs that read embeddings."""
    # The headline and the way to the device, then the files.
    lines = [
        f"# {report.model.name} for {report.device.description}",
        "",
        report.headline,
        "",
        "`report.html` is the whole report, `report.json` the same for programs.",
        "",
    ]
    for step in report.deploy:
        lines += [f"## {step.title}", "", "```", step.command, "```", ""]
    lines += [
        "## Files",
        "",
        "| file | what it is |",
        "|---|---|",
        *GRAPHS,
        *(EMBEDDINGS if of_embeddings else ()),
        *(PICTURES if report.quality.pictures else (*TEXTS, BLOCKS if in_blocks(report) else CHECKPOINT)),
        "| `engine/` | the built engine, where one could be built; of llama.cpp `model.gguf` |",
        *(f"| `{name}/` | {form.purpose}, where `--export {name}` asked for it |" for name, form in FORMATS.items()),
        "| `rungs/` | `rungs/0` is the chosen model, further ones are smaller; the folders above lead to one |",
        f"| `{FINISH}` | `python3 {FINISH}` on the device builds the engine, checks, measures and judges it |",
        *([] if report.quality.pictures else [SERVING]),
        f"| `{DEPLOYMENT}` | what `{FINISH}` needs to know |",
        *RECORDS,
        "",
        f"Inputs and outputs are those of Optimum and onnxruntime-genai; context {report.workload.context} at most."
        + _cache_text(report.fitted.cache),
        "",
        *(HOW_TO_DRAW if report.quality.pictures else ()),
    ]
    return "\n".join(lines)


def frontier_readme(frontier: Frontier, bundle: str) -> str:
    """Returns README.md of a bundle of rungs, of which one is still to be picked."""
    # A table of the rungs, the dense model first.
    lines = [
        f"# {frontier.model.name} for {frontier.device.description}: rungs to pick from",
        "",
        f"{len(frontier.rungs)} sizes of one model, the largest first. `frontier.html` shows what each needs, "
        "reaches and costs; `frontier.json` is the same for programs.",
        "",
        "| rung | decode | prefill | memory | pruned | rise of perplexity, measured | quality |",
        "|---|---|---|---|---|---|---|",
        f"| dense |{_cells(frontier.dense)} | | |",
    ]
    lines += [
        f"| {rung.index} |{_cells(rung)} {100 * rung.ratio:.1f} % | {rise_of(rung)} | {rung.grade} |"
        for rung in frontier.rungs
    ]
    # How to pick, and the files.
    lines += [
        "",
        "## Pick one",
        "",
        "```",
        pick_command(bundle, "K"),
        "```",
        "",
        "K is the rung. That writes a bundle of its own, which can be deployed, measured and run; this one cannot.",
        "It needs nothing but the files in this folder.",
        "",
        "## Files",
        "",
        "| file | what it is |",
        "|---|---|",
        "| `rungs/K/onnx/`, `rungs/K/model/`, `rungs/K/engine/` | the graphs, a standard checkpoint, the engine |",
        "| `rungs/K/report.json` | the whole report of the rung |",
        *RECORDS,
        "",
    ]
    return "\n".join(lines)


def _cells(point: Dense | Rung) -> str:
    """Returns the cells of decode, prefill and memory, each figure with its source."""
    figures = (point.decode, point.prefill, point.memory)
    return "".join(f" {number_text(figure.value, figure.unit)} ({figure.source}) |" for figure in figures)


def _cache_text(cache: str) -> str:
    """Returns what a program that runs the graphs has to know of a KV cache that is not of floats."""
    if cache == "float":
        return ""
    return (
        f" Past and present are codes in {cache}, but for the graphs of opset 24 and those in operators of opset "
        "17; onnxruntime-genai does not run such a cache, so there is no `genai_config.json`."
    )


GRAPHS = (
    "| `onnx/model.onnx` | the model as ONNX, opset 23, all logits; its weights in the `.data` files beside it |",
    "| `onnx/model.opset24*.onnx` | the same, its cache updated in place; its capacity is this fit's context |",
    "| `onnx/model.primitive*.onnx` | the same in operators of opset 17, for older parsers |",
    "| `onnx/model.onnxruntime*.onnx` | the same for ONNX Runtime, its cache updated in place |",
    "| `onnx/*.last.onnx` | the same with the logits of the last position only: what engines are built from |",
)
EMBEDDINGS = (
    "| `onnx/*embeddings.last.onnx` | the same, reading `inputs_embeds` (batch, sequence, hidden_size) in place of "
    "`input_ids`: put an image's embeddings in the place of its tokens |",
    "| `onnx/embedding*.onnx` | `input_ids` to the `inputs_embeds` of tokens, on the same data files |",
)
TEXTS = (
    "| `onnx/genai_config.json` | lets onnxruntime-genai load the folder; the tokenizer's files are beside it |",
    "| `tokenizer/` | what `edgeprune run` reads and writes texts with |",
)
CHECKPOINT = "| `model/` | a standard checkpoint for `from_pretrained`; its `README.md` is the model card |"
BLOCKS = (
    "| `model/` | `model.gguf` holds the weights in ggml's formats, and llama.cpp runs it; transformers reads it as "
    'floats with `from_pretrained("model", gguf_file="model.gguf")`, which needs `accelerate` |'
)
SERVING = (
    f"| `{SERVE}` | `python3 {SERVE}` on the device puts it behind OpenAI's interface; it needs the engine's modules, "
    "numpy and `tokenizers` |"
)
PICTURES = (
    "| `codec/codec.onnx` | codes (batch, tokens) to pixels (batch, 3, height, width), about -1 to 1 |",
    "| `codec/picture.json` | side of the grid of codes, classes, vocabulary, guidance |",
    "| `model/` | the checkpoint, by the model's own names: `edgeprune` reads it again |",
)
HOW_TO_DRAW = (
    "To draw, feed `vocab_size + class` of `codec/picture.json`, then each code that was drawn, side * side codes row "
    "by row. `vocab_size + num_classes` is no class: with guidance run it as a second sequence of the batch, fed with "
    "the same codes, and draw from u + (c - u) * cfg of both logits.",
    "",
)
RECORDS = (
    "| `profile.toml` | the device profile that was used |",
    "| `run.toml` | the options of the run, for `--config` |",
    "| `manifest.json` | versions, seed, the command that reproduces it, sha256 of every file |",
)
