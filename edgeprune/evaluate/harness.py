"""lm-evaluation-harness: its tasks, and a model of ours as one of its own. It is imported where tasks are asked for.

Questions, prompts, few-shot examples, normalisation and metrics are the harness's; the likelihoods are ours.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.task
import numpy as np
import yaml
from lm_eval.api.metrics import mean
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from edgeprune.chats import check_ids, encode
from edgeprune.errors import InputError
from edgeprune.evaluate.likelihoods import Continuation, Likelihood, Likelihoods
from edgeprune.evaluate.tasks import is_file, read_questions, title_of
from edgeprune.files import printable

METRICS = ("acc_norm", "acc", "exact_match")  # the first of them that a task has is its score
KINDS = ("multiple_choice", "loglikelihood")  # of tasks that likelihoods answer
FORMATS = ("json", "csv", "text", "parquet", "arrow", "pandas", "xml")  # of files that `datasets` reads
OFFLINE = "Download them where there is a connection (HF_HOME names the folder), or give a .jsonl file of your own."

FEWSHOT_SEED = 1234  # the harness's own: every model sees the same examples
SAMPLED = 16  # questions whose tokens are counted, of each part of a task

lm_eval.api.task.tqdm = partial(lm_eval.api.task.tqdm, disable=True)  # its bars have no other switch
logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it advises those who run it by itself
Begin = Callable[[int], Callable[[], None]]


@dataclass(frozen=True)
class Task:
    """One entry of --tasks. parts: the harness's tasks that it consists of, by name; metric: that is the score; digest:
    of its definition and its questions."""

    name: str
    parts: Mapping[str, Any]
    metric: str
    digest: str


def load(name: str, note: Callable[[str], None]) -> Task:
    """Returns a task by its name in the harness, or of a file; note: called before questions are downloaded.

    Raises InputError for a name that does not exist, questions that cannot be loaded, and a task without a score of
    each question that likelihoods decide.
    """
    path, title = Path(name), title_of(name)
    if path.suffix.lower() == ".jsonl":
        spec, manager = _own(path), _manager(False)
    elif is_file(name):
        spec, manager = name, _manager(False)
    else:
        spec, manager = name, _manager(True)
        if name not in manager.task_index:
            raise InputError(f"lm-evaluation-harness has no task {printable(name, 60)}", _near(name, manager))
    if sources := sorted(set(_hub_datasets(spec, manager))):
        shown = ", ".join(sources[:3]) + (", ..." if len(sources) > 3 else "")
        note(f"task {title}: its questions come from the Hugging Face hub ({shown}), if they are not there already")
    try:
        parts = manager.load([spec])["tasks"]
        metric = _metric(title, parts)
        for part in parts.values():
            part.build_all_requests(limit=1)  # what a definition has wrong shows at a question
    except InputError:
        raise
    except Exception as error:  # of the hub, of a dataset's own code, of a definition
        where = OFFLINE if sources else "Correct the file: docs/tasks.md shows the form of a task."
        raise InputError(f"task {title} cannot be loaded: {printable(error)}", where) from None
    return Task(title, parts, metric, _digest(name, parts))


def _digest(name: str, parts: Mapping[str, Any]) -> str:
    """Returns the sha256 of a task's definition and its questions."""
    digest = sha256(Path(name).read_bytes() if is_file(name) else name.encode())
    for title, part in sorted(parts.items()):
        digest.update(f"{title} {part.VERSION}".encode())
        for document in part.eval_docs:
            digest.update(json.dumps(document, sort_keys=True, default=str).encode())
    return digest.hexdigest()


@cache
def _manager(is_whole: bool) -> TaskManager:
    """Returns the index of the harness's own tasks, which takes seconds, or one without them."""
    return TaskManager(include_defaults=is_whole)


def _near(name: str, manager: TaskManager) -> str:
    import difflib

    near = difflib.get_close_matches(name, manager.all_tasks, 3)
    return f"Did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists them all."


def _own(path: Path) -> dict[str, Any]:
    """Returns the definition of a task of a file's questions: the text of each choice follows question and `Answer:`,
    as in the harness's arc_easy."""
    questions = read_questions(path)
    return {
        "task": path.stem,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(questions)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in METRICS[:2]],
    }


def _hub_datasets(spec: Any, manager: TaskManager) -> Iterator[str]:
    """Yields the datasets of a task, of a group's members or of a tag's tasks that are not files of this machine."""
    if isinstance(spec, dict):  # a member of a group, with settings of its own
        spec = spec.get("task", [])
    if not isinstance(spec, str):
        for member in spec:
            yield from _hub_datasets(member, manager)
        return
    entry = manager.task_index.get(spec)
    if entry is not None and entry.yaml_path is None:  # a tag
        yield from _hub_datasets(sorted(entry.tags), manager)
        return
    config = _definition(Path(spec) if entry is None else entry.yaml_path)
    if isinstance(members := config.get("task"), list):  # a group
        yield from _hub_datasets(members, manager)
    source, files = config.get("dataset_path"), (config.get("dataset_kwargs") or {}).get("data_files")
    is_local = source in FORMATS and files and "://" not in str(files)
    if source and not is_local and not Path(source).exists():
        yield source


class _Loader(yaml.SafeLoader):
    """A reader of definitions that runs nothing: a function in them is its name."""


_Loader.add_multi_constructor("!", lambda loader, tag, node: node.value)


def _definition(path: Path) -> dict[str, Any]:
    """Returns the definition of a task or a group with what it includes; empty for what is no definition.

    The harness itself says what is wrong with that.
    """
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, OSError, ValueError):
        return {}
    if not isinstance(config, dict):
        return {}
    others = config.pop("include", None) or []
    merged: dict[str, Any] = {}
    for other in [others] if isinstance(others, str) else others:
        merged |= _definition(path.parent / other)
    return merged | config


def _metric(title: str, parts: Mapping[str, Any]) -> str:
    """Returns the metric that is the score of a task: a mean over its questions. Raises InputError where none is."""
    common: set[str] | None = None
    for part in parts.values():
        if part.OUTPUT_TYPE not in KINDS:
            raise InputError(
                f"task {title} is of the kind {part.OUTPUT_TYPE}: scores here are of likelihoods",
                f"Take tasks of the kind {' or '.join(KINDS)}, such as arc_easy, hellaswag or mmlu.",
            )
        means = {name for name, how in part.aggregation().items() if how is mean}
        common = means if common is None else common & means
    if metric := next((name for name in METRICS if name in (common or ())), None):
        return metric
    raise InputError(
        f"task {title} has no score of each question that a mean is made of",
        f"Take a task with one of {', '.join(METRICS)}.",
    )


def scores(task: Task, model: HarnessModel, questions: int | None) -> np.ndarray:
    """Returns the score of a model for each question of a task, 0 to 1: (questions,) fp64, part by part.

    questions: of each part, at most; None: all.
    """
    for part in task.parts.values():
        part.set_fewshot_seed(FEWSHOT_SEED)
    results = evaluate(model, {"tasks": dict(task.parts)}, limit=questions, bootstrap_iters=0, log_samples=True)
    values: list[float] = []
    for name in sorted(task.parts):
        samples = results["samples"][name]
        rows = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
        values += [float(row[task.metric]) for row in sorted(rows, key=lambda row: row["doc_id"])]
    return np.array(values)


def read_tokens(task: Task, tokenizer: Any, questions: int | None) -> int:
    """Returns about how many tokens a model reads for a task, by some of its questions.

    The context of a question is read once, and each of its answers. questions: as of scores.
    """
    total = 0.0
    for part in task.parts.values():
        part.set_fewshot_seed(FEWSHOT_SEED)
        part.build_all_requests(limit=SAMPLED)
        contexts = {request.doc_id: request.args[0] for request in part.instances}
        read = [*contexts.values(), *(request.args[1] for request in part.instances)]
        asked = len(part.eval_docs) if questions is None else min(len(part.eval_docs), questions)
        total += asked / len(contexts) * sum(len(encode(tokenizer, text)) for text in read)
    return round(total)


class HarnessModel(TemplateLM):
    """A model of ours as the harness sees one: a tokenizer, and likelihoods of continuations.

    Contexts that do not fit are cut on the left, as the harness's own models do; `cut` counts them. begin: called with
    the number of likelihoods that are asked for, returns what is called after each.
    """

    def __init__(self, likelihoods: Likelihoods, tokenizer: Any, begin: Begin = lambda _: lambda: None) -> None:
        super().__init__()
        self.tokenizer, self.cut = tokenizer, 0
        self._likelihoods, self._begin = likelihoods, begin

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Returns what stands before a text without a context: the begin token, or the end token."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Returns the tokens of a text, with the tokenizer's own begin token unless the text has it already."""
        begin = self.tokenizer.decode(self.prefix_token_id)
        is_special = not string.startswith(begin) if add_special_tokens is None else add_special_tokens
        return encode(self.tokenizer, string, special=is_special)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[Likelihood]:
        """Returns the likelihoods of continuations after their contexts."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[Likelihood]:
        """Returns the likelihoods of requests (texts, context ids, continuation ids)."""
        capacity, asked = self._likelihoods.capacity, []
        for _, context, continuation in requests:
            ids = np.array([*context, *continuation], np.int64)
            if len(continuation) > capacity:
                raise InputError(
                    f"an answer of {len(continuation)} tokens exceeds the context of {capacity}",
                    "Give a longer --context, or leave this task out.",
                )
            self.cut += len(ids) > capacity + 1
            ids = ids[-(capacity + 1) :]
            asked.append(Continuation(ids, len(ids) - len(continuation)))
        check_ids([one.ids for one in asked], self._likelihoods.vocab_size, self.tokenizer, "a question")
        return self._likelihoods.of(asked, self._begin(len(asked)))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Returns the likelihoods of whole texts, in windows of the capacity."""
        sums = []
        for request in requests:
            windows = map(
                make_disjoint_window,
                get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.prefix_token_id, self._likelihoods.capacity, 1
                ),
            )
            sums.append(sum(nats for nats, _ in self._loglikelihood_tokens([(None, *window) for window in windows])))
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Refuses: tasks that need it are refused when they are loaded."""
        raise NotImplementedError
