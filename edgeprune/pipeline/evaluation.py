"""Quality: the dense and a fitted model on the held-out texts, their answers, and one of them in full.

What belongs to the dense model is computed once for all candidates of a run. Texts are cut into windows of the
dense model's tokens; a fitted model with a vocabulary of its own gets the same windows, in its own tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.model.model import Model
from edgeprune.ondevice.onnxruntime import GRAPH_FILE
from edgeprune.pipeline.journal import Journal
from edgeprune.pipeline.results import EVALUATED, Candidate, Quality, Samples
from edgeprune.pipeline.setup import Setup
from edgeprune.pipeline.sharing import Dependencies
from edgeprune.pipeline.store import Parts
from edgeprune.progress import Progress

if TYPE_CHECKING:
    from edgeprune.evaluate.perplexity import Losses
    from edgeprune.model.tokens.vocabulary import Vocabulary

WINDOW = 256  # tokens, at least, that a held-out document is cut into
SAMPLE_PROMPT = "Explain in a few sentences why the sky is blue."
SAMPLE_TOKENS = 80
PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 16, 32, 32  # whose answers are compared, at most


def windows_in_tokens_of(
    fitted: Model, windows: Mapping[str, Sequence[Sequence[np.ndarray]]], dense: Model
) -> dict[str, list[list[np.ndarray]]]:
    """Returns windows of the dense model's tokens, by text and document, in those of a model with a vocabulary of its
    own."""
    from edgeprune.model.tokens.vocabulary import retokenized

    flat = [window for documents in windows.values() for document in documents for window in document]
    renewed = iter(retokenized(flat, dense.directory, fitted.directory))
    return {
        name: [list(islice(renewed, len(document))) for document in documents] for name, documents in windows.items()
    }


def compared(
    dense: Losses,
    fitted: Losses,
    seed: int,
    dense_windows: Sequence[Sequence[np.ndarray]],
    fitted_windows: Sequence[Sequence[np.ndarray]],
    vocabulary: Vocabulary | None,
) -> dict[str, Any]:
    """Returns what results.Quality holds of a text, by the losses of both models on its windows, in their own tokens.

    vocabulary: the fitted model's, where it has one of its own.
    """
    from edgeprune.evaluate.agreement import agreement, common_tokens
    from edgeprune.evaluate.perplexity import rise

    kept = common = None
    if vocabulary is not None:
        kept = vocabulary.kept
        common = common_tokens(dense_windows, fitted_windows, kept)
    agreed = agreement(dense, fitted, seed, common, kept)
    return {
        "dense": dense.perplexity,
        "fitted": fitted.perplexity_per(dense),
        "documents": len(dense.tokens),
        "tokens": int(dense.tokens.sum()),
        **asdict(rise(dense, fitted, seed)),
        "agreement": agreed and asdict(agreed),
    }


def kept_losses(
    journal: Journal,
    stage: str,
    windows: dict[str, list[list[np.ndarray]]],
    compute: Callable[[], dict[str, Losses]],
    parts: Parts,
) -> dict[str, Losses]:
    """Returns the losses on texts, by name, from a folder stage, or computed now. parts: as of Journal.stage."""
    from edgeprune.evaluate.perplexity import Losses

    def fill(folder: Path) -> None:
        for index, losses in enumerate(compute().values()):
            likeliest = np.concatenate([window for document in losses.likeliest for window in document])
            np.savez(folder / f"{index}.npz", nats=losses.nats, tokens=losses.tokens, likeliest=likeliest)

    folder = journal.folder_stage(stage, fill, parts)
    kept = {}
    for index, (name, documents) in enumerate(windows.items()):
        with np.load(folder / f"{index}.npz") as stored:
            ends = np.cumsum([len(window) - 1 for windows in documents for window in windows])
            pieces = iter(np.split(stored["likeliest"], ends[:-1]))
            likeliest = [list(islice(pieces, len(windows))) for windows in documents]
            kept[name] = Losses(stored["nats"], stored["tokens"], likeliest)
    return kept


@dataclass(frozen=True)
class Evaluator:
    """Compares candidates of a run with its dense model.

    plain: the folder of the dense model's fp32 graphs; parts: what stages depend on that other runs may share.
    """

    setup: Setup
    journal: Journal
    progress: Progress
    samples: Samples
    plain: Path
    parts: Dependencies

    def quality(self, name: str, chosen: Candidate) -> Quality:
        """Returns perplexity and agreement on the held-out texts or pictures' codes, and answers of both models to
        texts: the stage `evaluation {name}`."""
        losses = self._dense_losses()
        kind = self.setup.kind
        answers = None
        if kind.writes_text:
            answers = self.journal.stage("dense answers", self._dense_answers, self.parts.evaluation)

        def compute() -> dict[str, Any]:
            from edgeprune.model.tokens.vocabulary import read_vocabulary

            # Perplexity and agreement, by text.
            vocabulary = read_vocabulary(chosen.model.directory)
            texts = self._texts(losses, chosen, vocabulary)
            if answers is None:
                return {"texts": texts, **dict.fromkeys(("answers", "prompt", "dense_sample", "fitted_sample"))}
            # Answers, which only a language model gives.
            graph = chosen.runnable_graph
            return {
                "texts": texts,
                "prompt": SAMPLE_PROMPT,
                "dense_sample": answers["sample"],
                "answers": self._identical(answers, chosen.model, graph, vocabulary),
                "fitted_sample": self._sample(chosen.model, graph),
            }

        return Quality(**self.journal.stage(f"evaluation {name}", compute), tasks=self._tasks(name, chosen))

    def qualities(self, rungs: Sequence[Candidate]) -> list[Quality]:
        """Returns the quality of every rung of a bundle."""
        return [self.quality(str(index), rung) for index, rung in enumerate(rungs)]

    def _tasks(self, name: str, chosen: Candidate) -> dict[str, Any] | None:
        """Returns the scores of both models on the tasks that were asked for: a stage for each model and task."""
        if not self.setup.tasks:
            return None
        from edgeprune.evaluate.likelihoods import GraphLikelihoods, ModelLikelihoods
        from edgeprune.pipeline.task_scores import compared, task_scores

        context, asked = self.setup.workload.context, self.setup.request.questions
        exact = self.setup.profile.engine != "onnxruntime"  # which alone rounds activations too
        dense = GraphLikelihoods(self.plain / EVALUATED, context, exact)
        fitted = GraphLikelihoods(chosen.evaluated_graph, context, exact)
        if (form := chosen.decoder.cache_format) and form.name == "fp8":  # which ONNX Runtime has no cache in
            fitted = ModelLikelihoods(chosen.deployed, context)
        sides = (("dense", self.setup.model, dense), (name, chosen.model, fitted))
        results = {}
        for task in self.setup.tasks:
            before, after = (
                self.journal.stage(
                    f"task {task.name} of {side}",
                    lambda: task_scores(task, of, model.directory, asked, side, self.progress),  # noqa: B023
                )
                for side, model, of in sides
            )
            results[task.name] = compared(task, before, after)
        return results

    def with_pictures(self, name: str, chosen: Candidate, quality: Quality) -> Quality:
        """Returns the quality of an image generator with pictures of both models: the stage `pictures {name}`."""
        if self.setup.kind.imaging is None:
            return quality
        from edgeprune.pipeline.gallery import Gallery

        gallery = Gallery(self.setup, self.journal, self.progress, self.plain)
        return replace(quality, pictures=gallery.compare(name, chosen))

    @cached_property
    def _windows(self) -> dict[str, list[list[np.ndarray]]]:
        from edgeprune.evaluate.perplexity import cut

        length = max(self.setup.length, WINDOW)
        if self.setup.profile.engine == "onnxruntime":  # whose graphs, which judge, have so many positions
            length = min(length, self.setup.workload.context + 1)
        return {name: cut(documents, length) for name, documents in self.samples.evaluation.items()}

    def _losses(self, model: Model, windows: dict[str, list[list[np.ndarray]]]) -> dict[str, Losses]:
        from edgeprune.evaluate.perplexity import window_losses

        advance = self.progress.stage("evaluate", len(windows) * len(model.decoder.layers))
        return {name: window_losses(model, of, advance) for name, of in windows.items()}

    def _dense_losses(self) -> dict[str, Losses]:
        """Returns the dense model's losses on every text: the folder stage `dense-evaluation`."""

        def compute() -> dict[str, Losses]:
            return self._losses(self.setup.model, self._windows)

        return kept_losses(self.journal, "dense-evaluation", self._windows, compute, self.parts.evaluation)

    def _deployed_losses(self, chosen: Candidate, windows: dict[str, list[list[np.ndarray]]]) -> dict[str, Losses]:
        """Returns a candidate's losses on every text: where ONNX Runtime deploys weights or a KV cache of few bits, its
        own, because it rounds activations too; else those of the weights in fp32, over the cache as it is deployed."""
        decoder = chosen.decoder
        if self.setup.profile.engine != "onnxruntime" or not (decoder.weight_formats or decoder.cache_format):
            return self._losses(chosen.deployed, windows)
        from edgeprune.evaluate.perplexity import graph_losses

        count = sum(len(document) for documents in windows.values() for document in documents)
        advance = self.progress.stage("evaluate", count)
        return {name: graph_losses(chosen.evaluated_graph, of, advance) for name, of in windows.items()}

    def _texts(
        self, dense: dict[str, Losses], chosen: Candidate, vocabulary: Vocabulary | None
    ) -> dict[str, dict[str, Any]]:
        """Returns what results.Quality holds of every text."""
        windows, seed = self._windows, self.setup.request.seed
        if vocabulary is not None:
            windows = windows_in_tokens_of(chosen.model, windows, self.setup.model)
        fitted = self._deployed_losses(chosen, windows)
        return {
            name: compared(dense[name], fitted[name], seed, self._windows[name], windows[name], vocabulary)
            for name in windows
        }

    def _sample(self, model: Model, graph: Path) -> str:
        from edgeprune.generate.text import sample_text

        self.progress.stage("generate a sample")
        context, seed = self.setup.workload.context, self.setup.request.seed
        return sample_text(graph, model.directory, SAMPLE_PROMPT, context, SAMPLE_TOKENS, seed)

    def _dense_answers(self) -> dict[str, Any]:
        """Returns a sample, the prompts and the tokens that the dense model answers to them."""
        model, graph = self.setup.model, self.plain / GRAPH_FILE
        prompts = self._prompts()
        return {
            "sample": self._sample(model, graph),
            "prompts": [prompt.tolist() for prompt in prompts],
            "answers": self._answers(model, graph, prompts).tolist(),
        }

    def _prompts(self) -> list[np.ndarray]:
        """Returns beginnings of the held-out documents, of one length that at least half of them have; of their windows
        where documents are few."""
        texts = [document for held_out in self.samples.evaluation.values() for document in held_out if len(document)]
        if len(texts) < PROMPTS:
            texts = [w for documents in self._windows.values() for windows in documents for w in windows]
        room = self.setup.workload.context - self._answer_tokens
        length = min(PROMPT_TOKENS, room, int(np.median([len(text) for text in texts])))
        long_enough = [text[:length] for text in texts if len(text) >= length]
        picks = np.linspace(0, len(long_enough) - 1, min(PROMPTS, len(long_enough))).round().astype(int)
        return [long_enough[pick] for pick in picks]

    @property
    def _answer_tokens(self) -> int:
        """Returns the tokens of an answer: the graphs are written for as many positions as the context has."""
        return min(ANSWER_TOKENS, self.setup.workload.context // 2)

    def _answers(self, model: Model, graph: Path, prompts: Sequence[np.ndarray]) -> np.ndarray:
        """Returns greedy answers (prompts, tokens) int64 in fp32 on this machine's processor; an end is repeated."""
        from edgeprune.model.tokens.generation import end_ids
        from edgeprune.model.tokens.tokenizer import load_tokenizer
        from edgeprune.ondevice.onnxruntime import GraphRunner
        from edgeprune.ondevice.sampling import generate

        self.progress.stage(f"answer {len(prompts)} prompts")
        tokens = self._answer_tokens
        is_exact = self.setup.profile.engine != "onnxruntime"  # which alone rounds activations too
        runner = GraphRunner(graph, len(prompts), max(map(len, prompts)) + tokens, exact=is_exact)
        ends = end_ids(load_tokenizer(model.directory), model.directory)
        answers = np.stack(list(generate(runner, prompts, tokens, end_ids=ends)), axis=1)  # (prompts, until all ended)
        return np.pad(answers, ((0, 0), (0, tokens - answers.shape[1])), mode="edge")

    def _identical(
        self, dense: dict[str, Any], model: Model, graph: Path, vocabulary: Vocabulary | None
    ) -> dict[str, Any] | None:
        """Returns how long answers stay the same; None where no prompt fits into the context in the new vocabulary."""
        from edgeprune.evaluate.agreement import identical_answers
        from edgeprune.model.tokens.vocabulary import retokenized
        from edgeprune.ondevice.machine import processor

        # The dense model's prompts and answers, in the tokens of the fitted one.
        prompts, expected = [np.array(prompt) for prompt in dense["prompts"]], np.array(dense["answers"])
        length = len(prompts[0])
        if vocabulary is not None:
            prompts = retokenized(prompts, self.setup.model.directory, model.directory)
            room = self.setup.workload.context - self._answer_tokens
            fits = [row for row, prompt in enumerate(prompts) if 0 < len(prompt) <= room]
            prompts, expected = [prompts[row] for row in fits], expected[fits]
        if not prompts:
            return None
        answers = self._answers(model, graph, prompts)
        if vocabulary is not None:
            answers = vocabulary.restore(answers)
        return {
            "device": f"{processor()}, fp32",
            "prompt_tokens": length,
            "identical": [asdict(of) for of in identical_answers(expected, answers)],
        }
