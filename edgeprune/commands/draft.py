"""draft(): the pruned, quantised form of a bundle's own model that makes its speculative decoding fastest.

A ladder of forms is made as `frontier` makes it; each is judged by what it guesses right of the target's own answers
and by what its steps take; the best one becomes a bundle.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.bundle.pick import pick
from edgeprune.bundle.store import write_more
from edgeprune.bundle.write import as_json
from edgeprune.commands.frontier import frontier
from edgeprune.commands.result import Result
from edgeprune.errors import InputError
from edgeprune.generate.guesses import Answer, Trial, answers_of, matches_of, steps_of, trials_of
from edgeprune.model.export import GGUF, check_exports, write_exports
from edgeprune.model.load import load_model
from edgeprune.ondevice.bundle import CHECKPOINT, CODEC, Chosen, open_to_run, point_to_rung, rung_folder
from edgeprune.ondevice.bundle_runner import DRAFT_FILE
from edgeprune.ondevice.durations import timing
from edgeprune.ondevice.machine import processor
from edgeprune.ondevice.onnxruntime import GRAPH_FILE, GRAPH_OF_ALL, GraphRunner
from edgeprune.ondevice.speculation import SpeculativeRunner
from edgeprune.pipeline.output import check_output
from edgeprune.pipeline.ownership import remove_ours
from edgeprune.pipeline.request import FRONTIER_OPTIONS, request_of
from edgeprune.pipeline.run_file import RUN_FILE, read_run_file
from edgeprune.pipeline.setup import Setup, prepare
from edgeprune.progress import OnProgress, Progress, progress_of
from edgeprune.report.base import Figure
from edgeprune.report.draft import Candidate, DraftReport
from edgeprune.search.drafts import LEAST_GAIN, Plan, best_plan

RUNGS, PROMPTS, PROMPT_TOKENS, TOKENS = 4, 8, 48, 64
NOT_TAKEN = ("output", "resume", "force", "rungs", "target", "keep_remote", "tasks", "questions", "recover")


def draft(
    bundle: str | Path,
    *,
    rungs: int = RUNGS,
    output: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    progress: Progress | OnProgress | None = None,
) -> Result[DraftReport]:
    """Makes `rungs` smaller forms of a bundle's model, and writes the best draft among them as a bundle.

    output: by default BUNDLE-draft in the current folder. Where no draft makes the target faster by
    LEAST_GAIN, none is written, and the report says so. Raises InputError for a bundle that ONNX Runtime does not run
    here, or whose run cannot be made again; and as frontier.
    """
    folder, shown = Path(bundle), progress_of(progress)
    chosen = open_to_run(folder)
    if (folder / CODEC).is_dir():
        raise InputError(f"{folder} draws pictures: drafts are for texts", "Give the bundle of a language model.")
    graph = chosen.folder / "onnx" / GRAPH_OF_ALL
    if chosen.engine != "onnxruntime" or not graph.is_file():
        raise InputError(
            f"{folder} was fitted for {chosen.engine}: drafts work in ONNX Runtime",
            "Fit for a device whose engine it is, such as --device cpu.",
        )
    written = Path(output) if output is not None else Path(f"{folder.resolve().name}-draft")
    check_output(written.absolute(), force)
    ladder = written.with_name(f"{written.name}.ladder")
    options = _options(chosen) | {"output": ladder, "rungs": rungs}
    setup = prepare(request_of(**options, resume=True), ladder=True)
    if setup.model.fingerprint != chosen.manifest.get("fingerprint", {}).get("model"):
        raise InputError(f"{setup.request.model} is no longer the model of {folder}", "Fit it again.")
    frontier(options.pop("model"), progress=shown, **options, resume=resume, force=force)
    report, best = _judged(chosen, setup, ladder, shown)
    if best is not None:
        pick(ladder, best, written, force, shown)
        write_more(written, lambda staged: _finish(staged, written, report, setup, shown))
        point_to_rung(written, best)
    remove_ours(ladder)
    return Result(written if best is not None else None, report)


def _finish(staged: Path, bundle: Path, report: DraftReport, setup: Setup, progress: Progress) -> None:
    """Writes the report beside a draft, and its GGUF file, with which llama.cpp takes it, where there can be one."""
    (staged / DRAFT_FILE).write_text(as_json(report), encoding="utf-8")
    folder = rung_folder(Path(), report.rung)
    model = load_model(str(bundle / folder / CHECKPOINT)) if (bundle / folder / CHECKPOINT).is_dir() else None
    try:
        if model is None:
            raise InputError("layers of different widths have no checkpoint", "Fit with --layout uniform.")
        check_exports((GGUF,), model, "uniform", False, tuple(model.decoder.weight_formats.values()))
    except InputError as error:
        progress.note(f"no GGUF file of the draft: {error.message}")
        return
    (staged / folder).mkdir(parents=True)
    write_exports((GGUF,), model, setup.model, staged / folder, bundle.name, setup.workload.context)


def _options(chosen: Chosen) -> dict[str, Any]:
    """Returns the options of the run that made a bundle, as a ladder takes them. Raises InputError."""
    path = chosen.bundle / RUN_FILE
    options = read_run_file(path) if path.is_file() else {}
    if "from" in options:
        return _options(Chosen(Path(options["from"]), chosen.manifest, 0, chosen.engine, chosen.workload))
    if "model" not in options:
        raise InputError(f"{path} does not tell of which model the bundle was made", "Fit it again.")
    if options.get("vocabulary", "full") != "full":
        raise InputError(
            f"{chosen.bundle} has a vocabulary of its own: its tokens are not those of a draft", "Fit without it."
        )
    return {name: value for name, value in options.items() if name in FRONTIER_OPTIONS and name not in NOT_TAKEN}


@dataclass(frozen=True)
class _Judged:
    """A rung with what it guesses right, by mode, and the plan that is best for it."""

    candidate: Candidate
    plan: Plan


def _judged(chosen: Chosen, setup: Setup, ladder: Path, progress: Progress) -> tuple[DraftReport, int | None]:
    """Returns the report of a ladder's rungs as drafts, and the index of the one that is worth it."""
    from edgeprune.bundle.read import read_frontier

    context = chosen.workload.context
    tokens = min(TOKENS, context // 2)
    target = GraphRunner(chosen.folder / "onnx" / GRAPH_OF_ALL, 1, context)
    prompts = _prompts(setup, chosen, min(PROMPT_TOKENS, context - tokens), progress)
    advance, answers = progress.stage("answers of the target", 2 * len(prompts)), []
    for answer in answers_of(target, prompts, tokens, setup.request.seed):
        answers.append(answer)
        advance()
    rows = read_frontier(ladder).rungs
    advance, seconds = progress.stage("drafts", 1 + len(rows)), timing().measure_seconds
    steps = steps_of(target, None, seconds)
    advance()
    judged = []
    for row in rows:
        graphs = rung_folder(ladder, row.index) / "onnx"
        reader = GraphRunner(graphs / GRAPH_OF_ALL, 1, context)
        matches = [matches_of(reader, answer) for answer in answers]
        own = steps_of(target, GraphRunner(graphs / GRAPH_FILE, 1, context), seconds)["draft"]
        plan = best_plan(matches, own, {1: 1.0} | {int(read): step for read, step in steps.items()})
        judged.append(_Judged(_candidate(row, own, answers, matches, plan), plan))
        advance()
    best = max(judged, key=lambda one: one.plan.speed)
    found = {
        "bundle": chosen.bundle.resolve().name,
        "device": processor(),
        "prompts": len(prompts),
        "tokens": tokens,
        "target_steps": {"1": 1.0} | steps,
        "candidates": [one.candidate for one in judged],
    }
    nothing = {"guesses": 0, "rung": None, "greedy": None, "drawn": None, "same": None}
    if best.plan.speed < LEAST_GAIN:
        return DraftReport(**found, **nothing), None
    # What was reckoned, measured.
    index = best.candidate.rung
    small = GraphRunner(rung_folder(ladder, index) / "onnx" / GRAPH_FILE, 1, context)
    advance, trials = progress.stage("both together", len(answers)), []
    for trial in trials_of(SpeculativeRunner(target, small, best.plan.count), answers, time.perf_counter):
        trials.append(trial)
        advance()
    figures = {mode: _speed([one for one in trials if one.mode == mode]) for mode in ("greedy", "drawn")}
    if max(figure.value for figure in figures.values()) < LEAST_GAIN:
        return DraftReport(**found, **nothing), None
    same = float(np.mean([trial.same for trial in trials]))
    return DraftReport(**found, guesses=best.plan.count, rung=index, **figures, same=same), index


def _candidate(
    row: Any, step: float, answers: Sequence[Answer], matches: Sequence[np.ndarray], plan: Plan
) -> Candidate:
    """Returns a rung as the report has it."""
    shares = {
        mode: float(np.concatenate([of for of, one in zip(matches, answers, strict=True) if one.mode == mode]).mean())
        for mode in ("greedy", "drawn")
    }
    return Candidate(
        rung=row.index,
        ratio=row.ratio,
        step=step,
        accepted_greedy=shares["greedy"],
        accepted_drawn=shares["drawn"],
        guesses=plan.count,
        tokens_per_round=plan.tokens_per_round,
        speed=plan.speed,
    )


def _prompts(setup: Setup, chosen: Chosen, length: int, progress: Progress) -> list[list[int]]:
    """Returns beginnings of the held-out documents; of texts of the target's own where the user gave none."""
    texts = [text for documents in setup.samples.evaluation.values() for text in documents if len(text) >= 2]
    if not texts:
        graph = chosen.folder / "onnx" / GRAPH_FILE
        texts = setup.kind.draw_samples(graph, setup.model, PROMPTS, length, setup.request.seed, progress)
    picks = np.linspace(0, len(texts) - 1, min(PROMPTS, len(texts))).round().astype(int)
    return [[int(token) for token in texts[pick][:length]] for pick in picks]


def _speed(trials: Sequence[Trial]) -> Figure:
    """Returns how much faster all answers of a mode came, with the interval of a bootstrap over them."""
    alone, drafted = (np.array([getattr(one, name) for one in trials]) for name in ("alone", "drafted"))
    picks = np.random.default_rng(0).integers(len(trials), size=(2000, len(trials)))
    ratios = alone[picks].sum(axis=1) / drafted[picks].sum(axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    value = float(alone.sum() / drafted.sum())
    return Figure(value=value, unit="1", source="measured", device=processor(), low=float(low), high=float(high))
