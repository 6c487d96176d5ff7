"""The card of a fitted checkpoint: README.md in its folder, with the YAML that the hub reads. It adds no figure.

It holds no path, no prompt and no text of the user's, so that it can be published as it is.
"""

from __future__ import annotations

from collections.abc import Iterator

from edgeprune.model.origin import Origin
from edgeprune.report.deploy import LOADERS, in_blocks
from edgeprune.report.figures import formats_text, number_text, rise_of, widths_text
from edgeprune.report.schema import Report
from edgeprune.report.tasks import task_text

PIPELINES = {True: "text-generation", False: "unconditional-image-generation"}


def card(report: Report, origin: Origin) -> str:
    """Returns the card of a report's fitted model."""
    lines = [f"# {report.model.name}, fitted to {report.device.description}", "", *_made(report, origin), ""]
    lines += ["## Quality", "", *_quality(report), "", "## Limits", "", *(f"- {line}" for line in _limits(report)), ""]
    if (loader := LOADERS.get(report.model.family, "AutoModelForCausalLM")) is not None:
        file = ', gguf_file="model.gguf"' if in_blocks(report) else ""
        lines += ["## Load it", "", "```python", f"from transformers import {loader}", ""]
        lines += [f'model = {loader}.from_pretrained("PATH OR REPOSITORY"{file})', "```", ""]
    return f"---\n{_metadata(report, origin)}\n---\n\n" + "\n".join(lines)


def _metadata(report: Report, origin: Origin) -> str:
    """Returns the YAML that the hub reads."""
    from huggingface_hub import ModelCardData

    formats = [name for name in report.fitted.formats if name != "float"]
    tags = ["edgeprune", *(["pruned"] if report.ratio > 0 else []), *formats]
    fields = {
        "base_model": origin.base,
        "language": list(origin.languages) or None,
        "library_name": "gguf" if in_blocks(report) else "transformers",
        "pipeline_tag": PIPELINES[report.quality.pictures is None],
        "tags": tags,
    }
    if origin.base:
        fields["base_model_relation"] = "finetune" if report.ratio > 0 or not formats else "quantized"
    return ModelCardData(**fields, **origin.licence).to_yaml()


def _made(report: Report, origin: Origin) -> Iterator[str]:
    """Yields what was made of which model."""
    base = f"[{origin.base}](https://huggingface.co/{origin.base})" if origin.base else report.model.name
    sides = (report.dense, report.fitted)
    yield f"Made of {base} by edgeprune {report.edgeprune}, without the training that made that model."
    yield ""
    yield "| | before | here |"
    yield "|---|---|---|"
    yield f"| parameters | {' | '.join(f'{side.parameters / 1e6:,.1f} M' for side in sides)} |"
    yield f"| layers: query heads, key/value heads, MLP channels | {' | '.join(map(widths_text, sides))} |"
    yield f"| modules by weight format | {' | '.join(map(formats_text, sides))} |"
    if report.ratio > 0:
        yield ""
        yield (
            f"{100 * report.ratio:.1f} % of the attention and MLP parameters were removed as whole heads, channels or "
            "layers; what is left was fitted to the original model's outputs by least squares, on a few samples."
        )
    if (done := report.recovery) is not None and done.taken:
        yield f"Then {done.taken} steps of training toward the original model's distribution."


def _quality(report: Report) -> Iterator[str]:
    """Yields the quality against the model before, all of it measured."""
    quality = report.quality
    yield f"Grade: **{quality.grade}**, by {quality.metric}. Rise of perplexity over the model before, measured, with"
    yield "its 95 % interval over documents:"
    yield ""
    yield "| held-out text | tokens | before | here | rise | same likeliest token |"
    yield "|---|---|---|---|---|---|"
    for number, text in enumerate(quality.texts, 1):
        same = f"{text.agreement.percent:.1f} %" if text.agreement else ""
        figures = f"{text.dense:.2f} | {text.fitted:.2f} | {rise_of(text)} | {same}"
        yield f"| {number} | {text.tokens:,} | {figures} |"
    for task in quality.tasks:
        yield ""
        yield task_text(task)
    if report.robustness is not None:
        yield ""
        yield "On the same text changed:"
        yield ""
        yield "| variant | rise |"
        yield "|---|---|"
        for variant in report.robustness.variants[1:]:
            yield f"| {variant.words} | {rise_of(variant)} |"


def _limits(report: Report) -> Iterator[str]:
    """Yields what the figures do not show."""
    if report.quality.label != "perplexity":
        yield "The held-out text was written by the original model itself: the figures show agreement, not quality."
    yield "The figures hold for text like the held-out one; on other languages and subjects more may be lost."
    if report.robustness is not None and report.robustness.finding:
        yield "On odd input it is far worse than on the same text as it is: see the table of changes."
    yield f"It was judged up to {number_text(report.workload.context, 'tokens')} of context."
    yield "What the original model gets wrong, and its licence, hold for this one too."
