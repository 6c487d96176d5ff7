"""task_scores(): the scores of a bundle or a model on tasks, paired with those of the dense model."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune import __version__
from edgeprune.bundle.read import read_report
from edgeprune.cache import cache_folder, cached
from edgeprune.commands.result import Result
from edgeprune.engine.onnx.graph import GraphVariant
from edgeprune.errors import InputError
from edgeprune.evaluate.tasks import check_questions, names_of
from edgeprune.files import at_home
from edgeprune.model.load import load_model, load_shape
from edgeprune.ondevice.bundle import CODEC, MANIFEST, open_to_run
from edgeprune.pipeline.ownership import is_bundle
from edgeprune.pipeline.provenance import now
from edgeprune.pipeline.run_file import RUN_FILE, read_run_file
from edgeprune.pipeline.task_scores import compared, load_tasks
from edgeprune.pipeline.task_scores import task_scores as scores_of
from edgeprune.progress import OnProgress, Progress, progress_of
from edgeprune.report.tasks import TaskScores, task_score

if TYPE_CHECKING:
    from edgeprune.evaluate.harness import Task
    from edgeprune.evaluate.likelihoods import Likelihoods

MOST_CONTEXT = 2048  # tokens of a question, where no bundle has a context of its own
GRAPH = GraphVariant("onnxruntime", "all").filename


@dataclass(frozen=True)
class _Side:
    """A model that answers. key: of all that decides its scores."""

    name: str
    likelihoods: Likelihoods
    tokenizer: Path
    judged: str
    key: str


def task_scores(
    model: str | Path,
    *,
    tasks: str,
    dense: str | Path | None = None,
    questions: int | None = None,
    progress: Progress | OnProgress | None = None,
) -> Result[TaskScores]:
    """Scores a bundle's graph as it is deployed, or a model's weights, on tasks of lm-evaluation-harness.

    tasks: names with commas between, or .yaml and .jsonl files; dense: the model to pair with, by default the one that
    a bundle was made of; questions: of each task, at most. Scores are kept in the cache: the same call goes on where it
    ended. Raises InputError and EngineError.
    """
    progress, name = progress_of(progress), at_home(model)
    # What can be refused before the questions are loaded.
    names_of(tasks)
    check_questions(questions)
    bundle = Path(name) if is_bundle(Path(name)) else None
    if bundle is not None:
        before = _origin(bundle) if dense is None else at_home(dense)
    else:
        before = None if dense is None else at_home(dense)
    for spec in (None if bundle else name, before):
        if spec is not None and load_shape(spec)[1].picture is not None:
            raise InputError(f"{spec} is an image generator, which answers no questions", "Give a language model.")
    loaded = load_tasks(tasks, progress.note)
    # Both models, with the same room for a question.
    fitted = _of_model(name, MOST_CONTEXT) if bundle is None else _of_bundle(bundle)
    other = None if before is None else _of_model(before, fitted.likelihoods.capacity)
    if bundle is not None and dense is None:
        _check_origin(bundle, other)
    if other is not None and other.likelihoods.capacity < fitted.likelihoods.capacity:
        fitted = replace(fitted, likelihoods=replace(fitted.likelihoods, capacity=other.likelihoods.capacity))
    sides = [side for side in (other, fitted) if side is not None]
    results = []
    for task in loaded:
        values = [_scores(side, task, questions, progress) for side in sides]
        results.append(task_score(task.name, compared(task, values[0] if other else None, values[-1])))
    report = TaskScores(
        edgeprune=__version__,
        created=now(),
        model=fitted.name,
        dense=None if other is None else other.name,
        judged=fitted.judged,
        context=fitted.likelihoods.capacity,
        tasks=results,
    )
    return Result(bundle, report)


def _scores(side: _Side, task: Task, questions: int | None, progress: Progress) -> list[float]:
    """Returns the scores of a model on a task, from the cache where it has answered these questions before."""
    from importlib.metadata import version

    parts = [__version__, version("lm_eval"), side.key, side.likelihoods.capacity, task.digest, task.metric, questions]
    path = cache_folder() / "tasks" / f"{sha256(json.dumps(parts).encode()).hexdigest()}.json"
    return cached(
        path,
        lambda data: [float(value) for value in json.loads(data)],
        lambda: scores_of(task, side.likelihoods, side.tokenizer, questions, side.name, progress),
        lambda values: json.dumps(values).encode(),
    )


def _of_model(spec: str, most: int) -> _Side:
    """Returns a model whose weights answer in fp32, with a context of so many tokens at most."""
    from edgeprune.evaluate.likelihoods import ModelLikelihoods

    model = load_model(spec, is_checked=True)
    likelihoods = ModelLikelihoods(model, min(most, model.decoder.max_position_embeddings))
    return _Side(model.name, likelihoods, model.directory, "the weights in fp32", model.fingerprint)


def _of_bundle(bundle: Path) -> _Side:
    """Returns the chosen rung of a bundle, whose graph answers as it is deployed.

    Where another engine is deployed, matrices of few bits are dequantised: it rounds no activations. Raises InputError.
    """
    from edgeprune.evaluate.likelihoods import GraphLikelihoods

    chosen = open_to_run(bundle)
    if (bundle / CODEC).is_dir():
        raise InputError(f"{bundle} is the bundle of an image generator, which answers no questions", "Give another.")
    graph = chosen.folder / "onnx" / GRAPH
    if not graph.is_file():
        raise InputError(f"{bundle} has no graph for ONNX Runtime", "Give its checkpoint: the folder model/ in it.")
    chosen.check(graph.parent, chosen.tokenizer)
    hashes = {name: digest for name, digest in chosen.manifest["sha256"].items() if name.startswith("rungs/")}
    exact = chosen.engine != "onnxruntime"
    key = sha256(json.dumps([hashes, chosen.rung, exact], sort_keys=True).encode()).hexdigest()
    how = "dequantised, " if exact else "as it is deployed, "
    return _Side(
        bundle.resolve().name,
        GraphLikelihoods(graph, chosen.workload.context, exact),
        chosen.tokenizer,
        f"the graph {how}in ONNX Runtime",
        key,
    )


def _origin(bundle: Path) -> str:
    """Returns the model that a bundle was made of. Raises InputError where it is not there any more."""
    open_to_run(bundle)
    spec = str(read_run_file(bundle / RUN_FILE).get("model", "demo")) if (bundle / RUN_FILE).is_file() else ""
    if spec and (spec == "demo" or Path(spec).exists() or not Path(spec).is_absolute()):
        return spec
    raise InputError(
        f"the model that {bundle} was made of is not at {spec}" if spec else f"{bundle} has no {RUN_FILE}",
        "Name the dense model: --dense MODEL",
    )


def _check_origin(bundle: Path, dense: Any) -> None:
    """Raises InputError where the dense model is not the one that a bundle was made of."""
    if dense.key != read_report(bundle).model.fingerprint:
        raise InputError(
            f"{dense.name} is not the model that {bundle} was made of: its fingerprint differs",
            f"Name the dense model: --dense MODEL ({MANIFEST} has the command that made the bundle).",
        )
