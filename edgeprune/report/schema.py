"""The schema of report.json, the document that a person decides from. Every figure carries its source.

It knows nothing about how a figure came about, and nothing about how it is shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from edgeprune.evaluate.grades import DEGRADED_PERCENT, SCALES, Grade, grade_of, rule_of
from edgeprune.ondevice.budget import BROKEN_PERCENT, OF_QUALITY
from edgeprune.report.base import Figure, Source, Strict, figure_of, keyed
from edgeprune.report.experience import Experience
from edgeprune.report.quality import Quality, Text
from edgeprune.report.robustness import Robustness

__all__ = [
    "BROKEN_PERCENT",
    "DEGRADED_PERCENT",
    "Figure",
    "Grade",
    "Quality",
    "Report",
    "Source",
    "Text",
    "figure_of",
    "grade_of",
    "schema_markdown",
]

SCHEMA_VERSION = 1

Status = Literal["met", "missed", "noisy"]
Outcome = Literal["met", "missed", "noisy", "uncertain", "out_of_reach"]
SideName = Literal["dense", "fitted"]
LayerWidths = Annotated[dict[str, int], keyed("query heads", "key/value heads", "MLP channels")]


class ModelCard(Strict):
    """The model that was fitted."""

    name: str
    family: str
    hidden_size: int
    layers: int
    vocab_size: int
    fingerprint: str = Field(description="sha256 over names, sizes and contents of configuration and weights")


class HardwareFigure(Strict):
    """A figure of the device profile, with how far it can be trusted."""

    value: float
    unit: str = Field(description="1 for a share")
    source: str = Field(description="where the figure comes from")
    confidence: Literal["high", "medium", "low"]


class Device(Strict):
    """The device profile."""

    name: str
    description: str
    figures: dict[str, HardwareFigure] = Field(description="what estimates rest on, by name")


class Workload(Strict):
    """The work that is measured: the prefill of `prompt` tokens, and decode at past = context - 1.

    A picture's context is all its codes; its prompt is the class, or what else begins it.
    """

    batch: int = Field(ge=1)
    prompt: int = Field(ge=1)
    context: int = Field(ge=1)


class Engine(Strict):
    """The engine that was chosen for the device."""

    name: str
    reason: str = Field(description="why it was chosen")
    version: str | None = Field(None, description="set where it is not among `versions`")


class Choice(Strict):
    """An automatic choice."""

    name: str
    value: str
    reason: str


def _headroom(fields: Mapping[str, Any]) -> float | None:
    """Returns the share of a constraint's limit that is left, in percent; None for a limit of 0."""
    fitted, limit = fields.get("fitted"), fields.get("limit")
    return 100 * (1 - fitted.value / limit) if fitted is not None and limit else None


class Constraint(Strict):
    """One limit against what was obtained; only limits on quality can be 0.

    quality: of perplexity; agreement: of the places where the models differ; tasks: of the task that loses most.
    """

    name: Literal["memory", "prefill", "decode", "quality", "agreement", "tasks"]
    asked: str = Field(description="as the user wrote it")
    limit: float
    unit: str = Field(description="bytes, ms, % of perplexity rise or of places, or points")
    in_parts: str | None = Field(
        None,
        description="how a relative limit was reckoned, with the source of the dense model's figure; of memory it is a "
        "share of all but the runtime's fixed part, which is added; none: an absolute limit",
    )
    dense: Figure | None
    fitted: Figure
    status: Status = Field(description="noisy: the interval of the figure contains the limit")
    headroom_percent: float | None = Field(
        default_factory=_headroom, description="of the limit that is left; negative: exceeded; none for a limit of 0"
    )
    gain: float | None = Field(
        None,
        description="predicted fall of log perplexity in nats per token if the limit were 5 % higher; 0: another "
        "constraint decides; none: nothing was searched within it",
    )

    @model_validator(mode="after")
    def _limit_is_above_zero(self) -> Constraint:
        """Raises ValueError for a limit that nothing can be a share of."""
        if not (self.limit > 0 or (self.name in OF_QUALITY and self.limit == 0)):
            raise ValueError(f"the limit of {self.name} is {self.limit:g}")
        return self


class Performance(Strict):
    """Memory and latencies of one model on the engine."""

    memory: Annotated[dict[str, Figure], keyed("weights", "cache", "activations", "buffers", "runtime")] = Field(
        description="peak device bytes at full context: weights, cache, activations, buffers, runtime"
    )
    memory_total: Figure = Field(description="the five parts, of the weakest source among them")
    prefill: Figure = Field(
        description="ms from an empty cache to the logits of the last prompt token: p50, or where there is "
        "`prefill_ratio` the dense model's p50 times that ratio"
    )
    decode: Figure = Field(
        description="ms per step at full context: p50, or where there is `decode_ratio` the dense model's p50 times "
        "that ratio, so that a busy machine slows both models alike"
    )
    prefill_ratio: Figure | None = Field(description="to the dense model, interleaved in the same run")
    decode_ratio: Figure | None = Field(description="to the dense model, interleaved in the same run")
    percentiles: dict[str, dict[str, float]] = Field(
        description="ms: p50, p90, p99 and mad, of prefill and decode in the model's own run; its p50 is not `decode` "
        "where there is a ratio"
    )
    conditions: dict[str, str] = Field(
        default_factory=dict, description="power mode, clocks, temperatures and memory while it was measured"
    )


class Side(Strict):
    """The dense or the fitted model."""

    performance: Performance
    parameters: int
    layer_parameters: int = Field(description="in attention and MLP matrices: what the ratio counts")
    decode_bytes: float = Field(description="bytes that one decode step reads and writes, by the graph's arithmetic")
    latency_shares: Annotated[dict[str, float], keyed("layers", "head_and_embedding", "cache", "overhead")] = Field(
        description="estimated decode ms: layers, head_and_embedding, cache, overhead"
    )
    widths: list[LayerWidths] = Field(description="per layer: query heads, key/value heads, MLP channels")
    formats: dict[str, int] = Field(
        default_factory=dict,
        description="modules by weight format, embedding and head among them; empty: all weights are floats",
    )
    cache: str = Field("float", description="format of the KV cache")


class Candidate(Strict):
    """One step of the search: pruned, built and measured, or estimated where the device is out of reach.

    `obtained` has the source of the constraint's `fitted` figure: one engine served all candidates.
    """

    widths: dict[str, int] = Field(description="what stays of the layers, how wide, and the tokens of the vocabulary")
    cache: str = Field("float", description="format of the KV cache")
    predicted_loss: float = Field(description="nats per token over the dense model, by the sensitivities")
    predicted: dict[str, float] = Field(description="by constraint, before it was built")
    obtained: dict[str, float] = Field(description="by constraint, of the pruned candidate")
    status: Status
    chosen: bool = Field(
        description="whether it became the fitted model; false for all where the quality limit ended the run: see "
        "`quality_stop`"
    )
    seconds: float | None = Field(None, description="time to prune, build and measure it")


class Search(Strict):
    """The search for a model within the budget."""

    ending: Literal["close", "neighbour", "out_of_reach", "candidates", "dense"] = Field(
        description="close: little of a limit is left; neighbour: every better candidate on the width grid exceeds the "
        "budget; out_of_reach: the smallest candidate does; candidates: as many as allowed were tried; "
        "dense: the dense model already meets the budget"
    )
    reason: str
    candidates: list[Candidate] = Field(description="in the order in which they were tried")
    costs: str = Field("", description="where the costs of widths come from")
    cost_error: dict[str, float] = Field(
        default_factory=dict, description="largest relative distance of tested models from the cost model, by latency"
    )


class Lever(Strict):
    """One way to make the model smaller, and what it contributes to the fitted one."""

    name: str = Field(description="pruning, vocabulary, a weight format, or `KV cache in` its format")
    saved_bytes: float = Field(description="of memory, estimated")
    nats: float = Field(description="predicted rise of the loss per token, by the sensitivities")


class Levers(Strict):
    """All levers of a fitted model, and the cost of the budget by one kind of lever alone."""

    parts: list[Lever]
    pruning_alone: float | None = Field(
        description="predicted nats per token of the best model within the budget in floats; none: none is within it"
    )
    precision_alone: float | None = Field(
        description="the same of the best model of the dense widths, in formats of weights and KV cache alone; none: "
        "none is within it"
    )


class Rival(Strict):
    """A candidate within the budget that was trained beside others, of which the best is the fitted model."""

    name: str
    before: float = Field(
        description="its worst loss by the report's quality metric, without the training: % or points"
    )
    after: float = Field(description="the same with it")


class Recovery(Strict):
    """The training of the fitted model toward the dense one, after pruning and rounding."""

    steps: int = Field(description="that were made, of the rows' tokens each")
    taken: int = Field(
        description="after how many of them the weights were taken; 0: none were better than before, which stayed"
    )
    before: Figure = Field(
        description="KL divergence from the dense model's distribution to the fitted one's on the held-out rows"
    )
    after: Figure = Field(description="the same of the weights that were taken")
    minutes: float
    rows: int = Field(description="of text that the steps read: the user's and the dense model's own, in turn")
    held_out: int = Field(description="rows of the dense model's own that no solve and no step has read, which chose")
    row_tokens: int
    memory_bytes: float = Field(description="estimated, that it held at its peak")
    rank: int | None = Field(
        None, description="of the products that matrices were changed by, for want of memory; none: trained whole"
    )
    rivals: list[Rival] = Field([], description="all candidates that were trained, the best first; none: it was one")


class QualityStop(Strict):
    """The candidate nearest to a budget beyond the quality limit; `fitted` is the smallest model within that limit."""

    widths: list[LayerWidths] = Field(description="per layer, as in `fitted`")
    performance: Performance
    status: Status = Field(description="of memory, prefill and decode")
    rise_percent: float = Field(description="of perplexity on the worst text")
    tried: int = Field(description="models that were built to find the smallest within the quality limit")


class Module(Strict):
    """The pruning and compensation of one module.

    Errors are how far the residual stream behind it is from the dense model's on held-out calibration samples,
    relative to what the module had to add.
    """

    layer: int
    kind: Literal["attention", "mlp"]
    kept: int
    of: int
    damping: float | None = Field(description="chosen for the closed-form update; none where there was no update")
    blend: float = Field(0.0, description="share of the dense model's stream in the update's target, 0 to 1")
    error_before: float | None = Field(description="without compensation")
    error_after: float | None = Field(description="with compensation")
    fell_back: bool = Field(description="no update lowered the error: the kept weights are as they were")
    few: list[int] = Field(
        default_factory=list,
        description="experts without an update: fewer tokens of the samples took them than they keep channels",
    )
    roundings: list[Literal["gptq", "nearest"]] = Field(
        default_factory=list,
        description="how the matrices before the activation and the output projection were rounded to the module's "
        "weight format; of experts two for each; nearest: GPTQ was no better on held-out samples; empty: floats",
    )
    rounding_errors: list[float | None] = Field(
        default_factory=list, description="of each of these, the squared error of its outputs relative to the outputs"
    )


class Step(Strict):
    """One thing to do on the way to the device; `command` is exact."""

    title: str
    command: str


def _tokens_per_second(fields: Mapping[str, Any]) -> dict[str, Figure]:
    """Returns tokens/s of the dense and the fitted model, from the fields of a report that were given."""
    if "workload" not in fields:
        return {}
    return {
        name: _rate(fields[name].performance.decode, fields["workload"].batch)
        for name in ("dense", "fitted")
        if name in fields and fields[name].performance.decode.value > 0
    }


def _rate(decode: Figure, batch: int) -> Figure:
    """Returns tokens/s from a decode step in ms; the interval's bounds change places."""

    def rate(milliseconds: float | None) -> float | None:
        return 1000 * batch / milliseconds if milliseconds else None

    return decode.model_copy(
        update={
            "value": rate(decode.value),
            "unit": "tokens/s",
            "low": rate(decode.high),
            "high": rate(decode.low),
            "basis": f"{batch} / decode",
        }
    )


class TriedRung(Strict):
    """One rung that was tried on the device; `figures` by constraint, in bytes and ms."""

    index: int
    status: Status | Literal["failed"] = Field(description="failed: no engine could be built or run")
    error: str
    figures: dict[str, float]
    sources: dict[str, Source] = Field(description="of the figures")


class Measurement(Strict):
    """The results of `edgeprune measure` or `finish.pyz` on the device, after the fit."""

    created: str = Field(description="UTC, ISO 8601")
    where: str
    machine: str
    gpu: str | None
    engine: str
    version: str
    rung: int = Field(description="the rung that was taken: the largest that meets the budget, else the last tried")
    status: Status
    rests_on: Source
    rungs: list[TriedRung]
    performance: dict[str, Any] = Field(description="of the rung that was taken, as the engine's figures travel")


class Report(Strict):
    """The whole document."""

    schema_version: Literal[1] = SCHEMA_VERSION
    edgeprune: str = Field(description="version")
    created: str = Field(description="UTC, ISO 8601")
    command: str = Field(description="the command line that makes this bundle again")
    headline: str = Field(description="the verdict in one sentence, with how it is known")
    status: Status = Field(description="the worst of memory, prefill and decode; quality apart, in `quality_status`")
    rests_on: Source = Field(description="the weakest source behind the verdict")
    quality_status: Status = Field(
        description="of the limits on quality and tasks, by every interval; met where there is none"
    )
    model: ModelCard
    device: Device
    workload: Workload
    precision: str
    engine: Engine
    choices: list[Choice]
    versions: dict[str, str]
    seed: int
    budget: list[Constraint]
    ratio: float = Field(description="share of attention and MLP parameters removed")
    total_ratio: float = Field(description="share of all parameters removed")
    decode_bytes_ratio: float = Field(description="share of decode bytes removed")
    dense: Side
    fitted: Side
    tokens_per_second: dict[SideName, Figure] = Field(
        default_factory=_tokens_per_second, description="batch / decode, of the dense and the fitted model"
    )
    experience: Annotated[dict[SideName, Experience], keyed("dense", "fitted")] = Field(
        description="what a user notices of the dense and the fitted model"
    )
    unprunable: str = Field(description="what of latency and weights no narrowing of layers removes, and formats leave")
    floor: dict[str, float] = Field(
        description="estimated, of the smallest model on the width grid: memory in bytes, prefill and decode in ms"
    )
    search: Search
    levers: Levers | None = Field(None, description="none: nothing was searched")
    recovery: Recovery | None = Field(None, description="of the fitted model; none: it was not asked for")
    quality_stop: QualityStop | None = Field(description="where the budget lies beyond the quality limit")
    quality: Quality
    robustness: Robustness | None = Field(
        None, description="none: an image generator, or nothing was removed or rounded"
    )
    modules: list[Module]
    cross_check: dict[str, Figure] | None = Field(
        description="prefill_ratio and decode_ratio, fitted / dense, on this machine's processor: not the device's"
    )
    deploy: list[Step]
    stages: dict[str, float] = Field(
        description="seconds of each, without those of a stage within it; with `all else` they add up to the run"
    )
    files: dict[str, int] = Field(description="bytes")
    warnings: list[str]
    measurement: Measurement | None = Field(None, description="on the device, after the fit; its figures are above")

    @model_validator(mode="after")
    def _parts_agree(self) -> Report:
        """Raises ValueError where one part of the document names what another part does not hold."""
        layers = {"dense": self.dense.widths, "fitted": self.fitted.widths}
        if self.quality_stop is not None:
            layers["quality_stop"] = self.quality_stop.widths
        for name, widths in layers.items():
            if len(widths) != self.model.layers:
                raise ValueError(f"{name} has widths of {len(widths)} layers, and the model {self.model.layers}")
        limited = {row.name for row in self.budget} - set(OF_QUALITY)
        for number, candidate in enumerate(self.search.candidates):
            if missing := limited - (candidate.predicted.keys() & candidate.obtained.keys()):
                raise ValueError(f"candidate {number} has no {', '.join(sorted(missing))}, which the budget limits")
        speed = "reading_speed" if self.quality.pictures is None else "seconds_per_image"
        for name, noticed in self.experience.items():
            if getattr(noticed, speed) is None:
                raise ValueError(f"experience of {name} has no {speed}")
        return self

    @property
    def outcome(self) -> Outcome:
        """Returns the verdict on the budget and the quality limit together, which stands first in the report."""
        if self.status != "met":
            return "out_of_reach" if (self.status, self.search.ending) == ("missed", "out_of_reach") else self.status
        return "uncertain" if self.quality_status == "noisy" else self.quality_status

    def exit_code(self, require_measured: bool = False) -> int:
        """Returns 0 where the budget is met, 3 where budget, or budget and quality together, are not shown to be met,
        and 4 where they are but rest on estimates and require_measured is set."""
        if self.outcome != "met":
            return 3
        return 4 if require_measured and self.rests_on == "estimated" else 0


_GRADES = "\n".join(f"- `{name}{'NAME' if name.endswith(':') else ''}`: {rule_of(name)}" for name in SCALES)
_INTRODUCTION = f"""# report.json

Written into every bundle, and printed by `edgeprune fit --json`. Its version is `schema_version`; an unknown field
is an error. Every figure is an object that carries its source, so that an estimate never passes for a measurement.
A number beyond floating point, such as the perplexity of a destroyed model, is the text `Infinity` or `NaN`.

**Verdict.** The budget is met where `status` and `quality_status` are `met`: exit code 0. It is missed where
either is, and out of reach where `search.ending` is `out_of_reach` as well: exit code 3, the best candidate is kept.
`noisy` means that the interval of a measurement contains the limit (exit code 3): run again on an idle machine, or,
where it is `quality_status`, evaluate on more text. With `--require-measured` a met budget whose `rests_on` is
`estimated` ends with exit code 4.

**Grade.** `--quality-metric` decides it; docs/tasks.md shows what the grades meant on the demo model. `broken` is the
first line of the report, whatever the budget says.

{_GRADES}
"""


def schema_markdown() -> str:
    """Returns docs/report.md: every field of report.json, by the model that holds it."""
    schema = Report.model_json_schema()
    lines = [_INTRODUCTION]
    for name, model in {"Report": schema, **schema["$defs"]}.items():
        lines += [f"## {name}", ""]
        if "description" in model:
            lines += [" ".join(model["description"].split()), ""]
        lines += ["| field | type | meaning |", "|---|---|---|"]
        lines += [
            f"| `{field}` | {_type(entry)} | {entry.get('description', '')} |"
            for field, entry in model["properties"].items()
        ]
        lines.append("")
    return "\n".join(lines)


def _type(entry: Mapping[str, Any]) -> str:
    """Returns the type of a property of a JSON schema in words."""
    if "$ref" in entry:
        name = entry["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in entry:
        return " or ".join(_type(option) for option in entry["anyOf"])
    if "enum" in entry:
        return ", ".join(f"`{value}`" for value in entry["enum"])
    if "const" in entry:
        return f"`{entry['const']}`"
    if entry["type"] == "array":
        return f"list of {_type(entry['items'])}"
    if entry["type"] == "object":
        values = entry["additionalProperties"]
        return "map" if values is True else f"map of {_type(values)}"
    return entry["type"]
