"""The guesses of a draft, judged on answers of its target, and timed beside it. Both run in ONNX Runtime here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from edgeprune.generate.text import CHAT_SAMPLING
from edgeprune.ondevice.onnxruntime import GraphRunner
from edgeprune.ondevice.sampling import Drawing, draw, generate
from edgeprune.ondevice.speculation import SpeculativeRunner
from edgeprune.ondevice.timing import interleave, stopwatch

READ = (2, 3, 4, 5, 7, 9)  # tokens of a step of the target that are timed beside one
MODES = {"greedy": Drawing(), "drawn": Drawing(*CHAT_SAMPLING)}


@dataclass(frozen=True)
class Answer:
    """An answer of the target: the prompt, the way in which it was drawn, and its tokens."""

    prompt: Sequence[int]
    drawing: Drawing
    tokens: list[int]

    @property
    def mode(self) -> str:
        return "drawn" if self.drawing.temperature else "greedy"


def answers_of(target: GraphRunner, prompts: Sequence[Sequence[int]], tokens: int, seed: int) -> Iterator[Answer]:
    """Yields the target's answers to each prompt, greedy and drawn as a chat is."""
    for index, prompt in enumerate(prompts):
        for mode in MODES.values():
            drawing = Drawing(mode.temperature, mode.top_p, mode.top_k, seed + index)
            yield Answer(prompt, drawing, _answered(target, prompt, drawing, tokens))


def _answered(
    runner: GraphRunner | SpeculativeRunner, prompt: Sequence[int], drawing: Drawing, tokens: int
) -> list[int]:
    steps = generate(runner, [prompt], tokens, drawing.temperature, drawing.top_p, drawing.seed, (), drawing.top_k)
    return [int(step[0]) for step in steps]


def matches_of(draft: GraphRunner, answer: Answer) -> np.ndarray:
    """Returns whether the draft guesses each token of an answer but the first, (tokens - 1,) bool, behind those before
    it; draft: on a graph with the logits of all positions."""
    draft.reset()
    ids = np.array([[*answer.prompt, *answer.tokens]])
    logits = draft.logits(ids)[0, len(answer.prompt) - 1 :]  # (tokens + 1, vocabulary)
    points = np.random.default_rng(answer.drawing.seed).random(len(answer.tokens))
    guesses = [draw(*of, point) for *of, point in zip(logits, [answer.drawing] * len(points), points, strict=False)]
    return np.array(guesses[1:]) == answer.tokens[1:]


def steps_of(target: GraphRunner, draft: GraphRunner | None, seconds: float) -> dict[str, float]:
    """Returns the times of steps over that of the target's on one token, timed in turns in the middle of the context:
    of the target on more tokens, by their number of READ, or of a draft as `draft`."""
    past = target.capacity // 2

    def step(runner: GraphRunner, read: int) -> Callable[[], float]:
        ids = np.random.default_rng(0).integers(0, runner.vocab_size, (1, read))

        def run() -> None:
            runner.reset(past)
            runner.logits(ids)

        return stopwatch(run)

    more = [read for read in READ if past + read <= target.capacity]
    others = {str(read): step(target, read) for read in more} if draft is None else {"draft": step(draft, 1)}
    timings = interleave({"1": step(target, 1)} | others, seconds)
    return {name: timings.ratio(name, "1").value for name in others}


@dataclass(frozen=True)
class Trial:
    """The target with a draft against the target alone, on one answer: both times in seconds, and the share of tokens
    up to the first that differs."""

    mode: str
    alone: float
    drafted: float
    same: float


def trials_of(runner: SpeculativeRunner, answers: Sequence[Answer], clock: Callable[[], float]) -> Iterator[Trial]:
    """Yields a trial of each answer, alone and drafted in turn, the other first every time. clock: in seconds."""
    for index, answer in enumerate(answers):
        times, tokens = {}, {}
        for one in (runner, runner.target) if index % 2 else (runner.target, runner):
            start = clock()
            tokens[one] = _answered(one, answer.prompt, answer.drawing, len(answer.tokens))
            times[one] = clock() - start
        pairs = zip(tokens[runner], tokens[runner.target], strict=True)
        same = next((place for place, (own, other) in enumerate(pairs) if own != other), len(answer.tokens))
        yield Trial(answer.mode, times[runner.target], times[runner], same / len(answer.tokens))
