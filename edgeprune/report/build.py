"""Builds the report of a finished run from its results. It computes no figure of its own."""

from __future__ import annotations

from dataclasses import replace
from math import isnan
from typing import Any

from edgeprune import __version__
from edgeprune.engine.capacity import experience
from edgeprune.engine.estimate import latency_shares, low_confidence_notes
from edgeprune.engine.work import bytes_per_token, table_bytes
from edgeprune.evaluate.grades import PERPLEXITY, TASK, Loss, drop, losses, scale_of
from edgeprune.model.checkpoint.configuration import loadable, read_config
from edgeprune.model.checkpoint.nested import MERGED
from edgeprune.model.decoder import Decoder, ratio
from edgeprune.model.gguf.weights import is_in_blocks
from edgeprune.ondevice.budget import (
    Budget,
    format_bytes,
    format_ms,
    in_parts,
    judge,
    judge_quality,
    memory_total,
    reported,
)
from edgeprune.ondevice.figures import Performance
from edgeprune.ondevice.finish_report import NOT_MEASURED
from edgeprune.pipeline.provenance import now, versions
from edgeprune.pipeline.results import Fitted, has_checkpoint
from edgeprune.precision import CacheFormat
from edgeprune.report import schema
from edgeprune.report.deploy import deploy_steps
from edgeprune.report.experience import Experience, experience_part
from edgeprune.report.quality import quality_part
from edgeprune.report.robustness import robustness_part
from edgeprune.report.verdict import verdict

LARGE_TABLES = 0.1  # share of the weights in embedding and head from which a smaller vocabulary is worth a word


def build_report(fitted: Fitted, files: dict[str, int], command: str) -> schema.Report:
    """Returns the report of a finished run.

    files: bytes of the bundle's files, by path; command: the command line that makes the bundle again.
    """
    setup, judged = fitted.setup, fitted.verdict
    dense, small = setup.model.decoder, fitted.chosen.decoder
    # Estimate both models' decode step: bytes moved, and how its time divides.
    moved = []
    for decoder in (dense, small):
        profile = setup.profile.for_cache(decoder.cache_format)
        step = bytes_per_token(decoder, setup.precision, setup.workload, profile.in_place, routes=profile.routes)
        moved.append(step.total)
    shares = [latency_shares(d, setup.profile, setup.workload, setup.precision) for d in (dense, small)]
    # Describe the dense and the fitted model side by side.
    label = "agreement with the dense model" if fitted.samples.self_generated else "perplexity"
    sides = [
        schema.Side(
            performance=_performance(performance),
            parameters=decoder.parameters,
            layer_parameters=decoder.layer_parameters,
            decode_bytes=bytes_moved,
            latency_shares=share,
            widths=_widths(target),
            formats=_formats(decoder),
            cache=_cache_name(decoder.cache_format),
        )
        for performance, decoder, target, bytes_moved, share in zip(
            (fitted.dense, fitted.chosen.performance),
            (dense, small),
            (dense, fitted.chosen.target),
            moved,
            shares,
            strict=True,
        )
    ]
    # Fill in the document; the verdict in words and the deployment steps are derived from it and come last.
    report = schema.Report(
        edgeprune=__version__,
        created=now(),
        command=command,
        headline="",
        status=judged.status,
        rests_on=judged.source,
        quality_status=fitted.quality_status,
        model={
            "name": setup.model.name,
            "family": dense.family,
            "hidden_size": dense.hidden_size,
            "layers": len(dense.layers),
            "vocab_size": dense.vocab_size,
            "fingerprint": setup.model.fingerprint,
        },
        device={
            "name": setup.profile.name,
            "description": setup.profile.description,
            "figures": {name: figure.model_dump() for name, figure in setup.profile.figures.items()},
        },
        workload={"batch": setup.workload.batch, "prompt": setup.workload.prompt, "context": setup.workload.context},
        precision=setup.precision,
        engine={"name": setup.engine.name, "reason": setup.engine.reason},
        choices=[schema.Choice(**choice.__dict__) for choice in setup.choices],
        versions=versions(),
        seed=setup.request.seed,
        budget=_constraints(fitted),
        ratio=ratio(small, dense),
        total_ratio=1 - small.parameters / dense.parameters,
        decode_bytes_ratio=1 - moved[1] / moved[0],
        dense=sides[0],
        fitted=sides[1],
        unprunable=_unprunable(fitted, shares[0]),
        floor=setup.floor.values,
        search=_search(fitted),
        levers=_levers(fitted),
        recovery=_recovery(fitted),
        quality_stop=_quality_stop(fitted),
        quality=quality_part(label, metric=setup.request.quality_metric, **fitted.quality.__dict__),
        robustness=robustness_part(fitted.robustness),
        experience=_experience(fitted),
        modules=[schema.Module(**{key: _finite(value) for key, value in r.items()}) for r in fitted.chosen.records],
        cross_check=fitted.cross_check and {k: schema.figure_of(f) for k, f in fitted.cross_check.items()},
        deploy=[],
        stages=fitted.seconds,
        files=files,
        warnings=_warnings(fitted),
    )
    return report.model_copy(update={"headline": verdict(report), "deploy": _deploy(fitted, report, command)})


def _experience(fitted: Fitted) -> dict[str, Experience]:
    """Returns what a user notices of the dense and of the fitted model, by side."""
    setup, chosen = fitted.setup, fitted.chosen
    deployed = (setup.profile, setup.workload, setup.precision)
    sides = {"dense": (setup.model.decoder, fitted.dense), "fitted": (chosen.decoder, chosen.performance)}
    budget = setup.budget.absolute(fitted.dense)
    images = setup.kind.images_at_once(setup.workload.batch)
    return {
        name: experience_part(experience(decoder, *deployed, performance, budget, images))
        for name, (decoder, performance) in sides.items()
    }


def _finite(value: Any) -> Any:
    """Returns None for NaN, and any other value as it is."""
    return None if isinstance(value, float) and isnan(value) else value


def _performance(performance: Performance) -> schema.Performance:
    return schema.Performance(**reported(performance))


def _widths(decoder: Decoder) -> list[dict[str, int]]:
    """Returns the heads and channels of each layer; 0 for a module that was removed."""
    return [
        {
            "query heads": layer.attention.num_attention_heads if layer.attention else 0,
            "key/value heads": layer.attention.num_key_value_heads if layer.attention else 0,
            "MLP channels": layer.mlp.intermediate_size if layer.mlp else 0,
        }
        for layer in decoder.layers
    ]


def _constraints(fitted: Fitted) -> list[schema.Constraint]:
    """Returns the limits of the budget and of the quality, each with what was obtained."""
    # Memory and latencies come from the engine's performance.
    rows = []
    for check in fitted.verdict.checks:
        dense = memory_total(fitted.dense) if check.name == "memory" else getattr(fitted.dense, check.name)
        rows.append(
            schema.Constraint(
                name=check.name,
                asked=check.asked,
                limit=check.limit,
                unit=check.figure.unit,
                in_parts=in_parts(check.name, fitted.setup.budget.limits[check.name], fitted.dense),
                dense=schema.figure_of(dense),
                fitted=schema.figure_of(check.figure),
                status=check.status,
                gain=fitted.gains.get(check.name),
            )
        )
    # The limits on quality are judged on the text, and on the task, that fail them most.
    quality, budget, metric = fitted.quality, fitted.setup.budget, fitted.setup.request.quality_metric
    if budget.max_quality_loss is not None:
        found = losses(metric, quality.texts, quality.tasks)
        name = "tasks" if metric.startswith(TASK) else metric.replace(PERPLEXITY, "quality")
        rows.append(_of_quality(name, scale_of(metric).unit, budget.max_quality_loss, found))
    if budget.max_task_drop is not None and quality.tasks:
        found = [drop(name, task) for name, task in quality.tasks.items()]
        rows.append(_of_quality("tasks", "points", budget.max_task_drop, found))
    return rows


def _of_quality(name: str, unit: str, limit: float, losses: list[Loss]) -> schema.Constraint:
    """Returns a limit on quality with the loss that fails it most: beyond it, perhaps beyond it, within."""
    worst = max(losses, key=lambda one: (not one.low <= limit, not one.high <= limit, one.value))
    return schema.Constraint(
        name=name,
        asked=f"{limit:g}%" if unit == "%" else f"{limit:g} points on {worst.name}",
        limit=limit,
        unit=unit,
        dense=None,
        fitted=schema.Figure(
            value=worst.value,
            unit=unit,
            source="measured",
            device=f"the task {worst.name}" if name == "tasks" else "held-out text",
            low=worst.low,
            high=worst.high,
        ),
        status=judge_quality(Budget(max_quality_loss=limit), [(worst.low, worst.high)]),
    )


def _search(fitted: Fitted) -> schema.Search:
    """Returns how the search ended and the candidates that it tried."""
    outcome = fitted.outcome
    if outcome is None:
        return schema.Search(ending="dense", reason="the dense model already meets the budget", candidates=[])
    return schema.Search(
        ending=outcome.ending,
        reason=outcome.reason,
        candidates=[
            schema.Candidate(
                widths=trial.allocation.summary,
                cache=_cache_name(trial.allocation.cache),
                predicted_loss=trial.allocation.loss,
                predicted=trial.predicted,
                obtained={name: trial.obtained.values[name] for name in trial.predicted},
                status=trial.obtained.status,
                chosen=number == outcome.chosen and fitted.stop is None,
            )
            for number, trial in enumerate(outcome.trials)
        ],
        costs=fitted.costs.source,
        cost_error={kind: worst for kind, (_, worst) in fitted.costs.error.items()},
    )


def _levers(fitted: Fitted) -> schema.Levers | None:
    """Returns what each lever contributes to the fitted model; none where nothing was searched."""
    if (levers := fitted.levers) is None:
        return None
    parts = [schema.Lever(**vars(part)) for part in levers.parts]
    return schema.Levers(parts=parts, pruning_alone=levers.pruning_alone, precision_alone=levers.precision_alone)


def _recovery(fitted: Fitted) -> schema.Recovery | None:
    """Returns what the training of the fitted model did; none where there was none."""
    if (done := fitted.chosen.recovery) is None:
        return None
    before, after = (
        schema.Figure(value=done[name], unit="nats", source="measured", device="text of the dense model's own")
        for name in ("before", "after")
    )
    return schema.Recovery(
        **{name: done[name] for name in ("steps", "taken", "rows", "held_out", "row_tokens", "rank")},
        before=before,
        after=after,
        minutes=done["seconds"] / 60,
        memory_bytes=done["bytes"],
        rivals=[schema.Rival(name=one.name, before=one.before, after=one.after) for one in fitted.rivals],
    )


def _formats(decoder: Decoder) -> dict[str, int]:
    """Returns the number of modules of each weight format, embedding and head among them; nothing for floats."""
    if not decoder.weight_formats:
        return {}
    tables = [decoder.head_format] if decoder.tie_word_embeddings else [decoder.embedding_format, decoder.head_format]
    modules = [module for layer in decoder.layers for module in (layer.attention, layer.mlp) if module is not None]
    names = [form.name if form else "float" for form in [*(module.weight_format for module in modules), *tables]]
    return {name: names.count(name) for name in dict.fromkeys(names)}


def _cache_name(form: CacheFormat | None) -> str:
    return form.name if form else "float"


def _quality_stop(fitted: Fitted) -> schema.QualityStop | None:
    """Returns the candidate nearest to the budget where it lies beyond the quality limit."""
    if (stop := fitted.stop) is None:
        return None
    return schema.QualityStop(
        widths=_widths(stop.beyond.target),
        performance=_performance(stop.beyond.performance),
        status=judge(fitted.setup.budget, fitted.dense, stop.beyond.performance).status,
        rise_percent=stop.quality.worst_percent,
        tried=stop.tried,
    )


def _unprunable(fitted: Fitted, shares: dict[str, float]) -> str:
    """Returns how much of the dense model's time and weights no narrowing of layers removes, and what of it is left
    where embedding and head have the fewest bits that the search may take.

    shares: estimated decode ms of the dense model by part, as latency_shares returns them.
    """
    setup, dense = fitted.setup, fitted.setup.model.decoder
    total = sum(shares.values())
    fixed = shares["overhead"] + shares["head_and_embedding"]
    tables = dense.table_parameters
    text = (
        f"{100 * fixed / total:.0f} % of the dense model's time per token ({format_ms(fixed)} of {format_ms(total)}, "
        f"estimated) is overhead, embedding and head; so are {100 * tables / dense.parameters:.0f} % of its weights: "
        "no narrowing of layers removes them."
    )
    if few := setup.weights.fewest_bits:
        small = replace(dense, embedding_format=few, head_format=few)
        left = latency_shares(small, setup.profile, setup.workload, setup.precision)
        before, after = (format_bytes(table_bytes(decoder, setup.precision)) for decoder in (dense, small))
        text += (
            f" With embedding and head in {few.name}, which the search may take, "
            f"{format_ms(left['overhead'] + left['head_and_embedding'])} a token are left of that time, and {after} of "
            f"the {before} of both."
        )
    if setup.kind.writes_text and setup.request.vocabulary == "full" and tables >= LARGE_TABLES * dense.parameters:
        text += " A smaller vocabulary helps: --vocabulary samples."
    return text


def _warnings(fitted: Fitted) -> list[str]:
    """Returns what a reader of the report has to mind, the weightiest first."""
    # Whether the figures are those of the device and of real text.
    warnings: list[str] = []
    if fitted.chosen.performance.decode.source != "measured":
        warnings.append(NOT_MEASURED)
    if fitted.samples.self_generated:
        own = fitted.setup.kind.own_evaluation
        warnings.append(
            f"Quality was measured on {fitted.setup.kind.noun} {own}: agreement with the dense model, not quality."
        )
    if whole := fitted.setup.model.part_of:
        graphs = (
            "Graphs named `embeddings` take those of images among those of tokens."
            if whole in MERGED
            else f"Its graphs take tokens alone: {whole} gives images more than embeddings in their place."
        )
        warnings.append(
            f"This is the text part of {whole}: images are left out, quality with them was not measured. {graphs}"
        )
    # Which files hold the fitted model's widths and which cannot.
    if not fitted.chosen.model.decoder.is_uniform:
        warnings.append(
            "Layers differ in width: ONNX graphs, engine and GGUF carry that, a standard checkpoint cannot."
        )
    elif has_checkpoint(fitted) and not is_in_blocks(fitted.chosen.model.decoder):
        model = fitted.chosen.model
        if loadable(model.decoder, read_config(model.directory)) != model.decoder:
            warnings.append(
                "The checkpoint holds removed heads as zeros, since no configuration of this family can give their "
                "number: graphs and engine are smaller than it."
            )
    forms = fitted.chosen.model.decoder.weight_formats.values()
    if has_checkpoint(fitted) and any(form.offset == "zero" for form in forms):
        warnings.append(
            "The checkpoint has asymmetric weights, which transformers reads with compressed-tensors up to 0.17.1; "
            "0.18 to 0.20 fail on them. Graphs, engine and GGUF are not affected."
        )
    if (cache := fitted.chosen.decoder.cache_format) and not fitted.chosen.decoder.picture:
        warnings.append(
            f"onnxruntime-genai does not run the KV cache in {cache.name}, `edgeprune run` does. For genai give "
            "--cache float."
        )
    # What went wrong in measuring and in compensating.
    assumed = low_confidence_notes(fitted.setup.profile)
    notes = fitted.chosen.performance.notes
    if names := [note.partition(" of ")[0].replace("_", " ") for note in notes if note in assumed]:
        warnings.append(f"Estimates rest on figures of the device that are hardly known: {', '.join(names)}.")
    warnings += [note for note in notes if note not in assumed]
    fell_back = [f"layer {r['layer']} {r['kind']}" for r in fitted.chosen.records if r["fell_back"]]
    if fell_back:
        warnings.append(f"Compensation did not help and was left out in: {', '.join(fell_back)}.")
    for record in fitted.chosen.records:
        if few := record["few"]:
            warnings.append(
                f"Layer {record['layer']}: experts {', '.join(map(str, few))} saw fewer calibration tokens than they "
                "keep channels and were not compensated; give more or other samples."
            )
    return warnings


def _deploy(fitted: Fitted, report: schema.Report, command: str) -> list[schema.Step]:
    """Returns the deployment steps for the device, given the engine files that were built."""
    setup = fitted.setup
    plans = sorted(path.name for path in fitted.chosen.exported.engine.glob("*.engine"))
    return deploy_steps(
        report, setup.output.name, setup.profile.engine, plans, has_checkpoint(fitted), f"{command} --force"
    )
