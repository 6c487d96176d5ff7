"""Pictures from a model's exported graph: samples for calibration, for the report, and `edgeprune run`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgeprune.errors import InputError
from edgeprune.generate.guidance import checked_guidance, class_labels, documents_of, sample_labels
from edgeprune.generate.pixels import CodecRunner, grid, write_picture
from edgeprune.generate.runner import runner_of
from edgeprune.model.decoder import Decoder, Picture
from edgeprune.ondevice.bundle import CODEC, REPORT, open_chosen
from edgeprune.ondevice.guided_sampling import Sampling, draw_pictures, random_points
from edgeprune.ondevice.onnxruntime import GraphRunner
from edgeprune.ondevice.reference import StepRunner
from edgeprune.progress import Progress

AT_ONCE = 8  # pictures: the processor gains nothing from more
DESCRIPTION, CODEC_GRAPH = "picture.json", "codec.onnx"  # in the codec's folder of a bundle


@dataclass(frozen=True)
class Drawn:
    """What draws: the pictures' tokens, the vocabulary behind which their openings stand, and the guidance that the
    bundle was fitted with."""

    side: int
    num_classes: int
    has_null: bool
    vocab_size: int
    cfg: float

    @property
    def picture(self) -> Picture:
        return Picture(self.side, self.num_classes, self.has_null)


def draw_codes(
    runner: StepRunner,
    picture: Picture,
    vocab_size: int,
    labels: Sequence[int | None],
    sampling: Sampling,
    seed: int,
    advance: Callable[[], None],
) -> np.ndarray:
    """Codes (pictures, tokens) int64, as many at once as the runner holds; advance: called `steps_of` times."""
    at_once = runner.batch // sampling.streams
    null = picture.opening(vocab_size, None)
    drawn = []
    for first in range(0, len(labels), at_once):
        part = [*labels[first : first + at_once]]
        openings = [picture.opening(vocab_size, label) for label in part]
        openings += openings[-1:] * (at_once - len(part))  # the runner's batch is always full
        points = random_points(seed, first, at_once, picture.tokens)
        steps = []
        for codes in draw_pictures(runner, openings, null, sampling, points):
            steps.append(codes)
            advance()
        drawn.append(np.stack(steps, axis=1)[: len(part)])
    return np.concatenate(drawn)


def steps_of(picture: Picture, count: int, at_once: int = AT_ONCE) -> int:
    """How often draw_codes advances for so many pictures."""
    return picture.tokens * -(-count // at_once)


def codes_from(
    graph: Path,
    picture: Picture,
    vocab_size: int,
    labels: Sequence[int | None],
    sampling: Sampling,
    seed: int,
    advance: Callable[[], None],
) -> np.ndarray:
    """The same from a graph for ONNX Runtime, AT_ONCE pictures at once."""
    runner = GraphRunner(graph, AT_ONCE * sampling.streams, picture.tokens)
    return draw_codes(runner, picture, vocab_size, labels, sampling, seed, advance)


def draw_documents(
    graph: Path, decoder: Decoder, sampling: Sampling, count: int, seed: int, progress: Progress
) -> np.ndarray:
    """Returns token ids (count, 1 + tokens) int64 that a model draws: of every class in turn, and some of none."""
    picture = decoder.picture
    labels = sample_labels(picture, class_labels(picture, count, seed))
    advance = progress.stage("draw samples", steps_of(picture, count))
    codes = codes_from(graph, picture, decoder.vocab_size, labels, sampling, seed, advance)
    return documents_of(decoder, labels, codes)


def read_description(bundle: Path) -> Drawn:
    """Raises InputError for the bundle of a language model, or a damaged one."""
    path = bundle / CODEC / DESCRIPTION
    if not path.is_file():
        raise InputError(f"{bundle} holds a language model, which draws no pictures", 'Give it a text: --prompt "...".')
    try:
        return Drawn(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be read: {error}", "Copy the whole bundle again.") from None


@dataclass(frozen=True)
class Painter:
    """A bundle's engine, ready to draw."""

    drawn: Drawn
    runner: StepRunner
    sampling: Sampling
    codec: CodecRunner

    @property
    def at_once(self) -> int:
        return self.runner.batch // self.sampling.streams

    def pixels(self, classes: Sequence[int], count: int, seed: int, advance: Callable[[], None]) -> np.ndarray:
        """So many pictures (count, height, width, 3) uint8 of the classes in turn, of all where none is given."""
        picture = self.drawn.picture
        each: Sequence[int | None] = classes or range(picture.num_classes) or (None,)
        labels = [each[place % len(each)] for place in range(count)]
        codes = draw_codes(self.runner, picture, self.drawn.vocab_size, labels, self.sampling, seed, advance)
        return self.codec.pixels(codes)


def draw_grid(
    painter: Painter, classes: Sequence[int], count: int, seed: int, output: Path, progress: Progress
) -> float:
    """Write a grid of so many pictures; returns the seconds that drawing and decoding took."""
    advance = progress.stage("draw", steps_of(painter.drawn.picture, count, painter.at_once))
    start = time.monotonic()
    images = painter.pixels(classes, count, seed, advance)
    seconds = time.monotonic() - start
    write_picture(grid(images), output)
    return seconds


def painter_of(
    bundle: Path,
    classes: Sequence[int],
    count: int,
    cfg: float | None,
    temperature: float,
    top_k: int,
    top_p: float,
    note: Callable[[str], None],
) -> Painter:
    """cfg: None for the bundle's own guidance. note: told what draws, where it is not the engine.

    Raises InputError for a language model, an unknown class, or guidance that the model has not.
    """
    manifest = open_chosen(bundle)
    drawn = read_description(bundle)
    picture = drawn.picture
    for label in classes:
        if not 0 <= label < picture.num_classes:
            known = f"Give 0 to {picture.num_classes - 1}." if picture.num_classes else "Leave --class out."
            raise InputError(f"unknown class {label}: the model has {picture.num_classes}", known)
    guided = checked_guidance(picture, drawn.cfg if cfg is None else cfg)
    sampling = Sampling(guided, temperature, top_k, top_p)
    report = json.loads((bundle / REPORT).read_text(encoding="utf-8"))
    engine = (report.get("measurement") or manifest)["engine"]
    built_for = int(report["workload"]["batch"])
    runner = runner_of(
        bundle, engine, built_for, min(count, AT_ONCE) * sampling.streams, int(report["workload"]["context"]), note
    )
    if runner.batch < sampling.streams:
        raise InputError(
            f"the engine takes {runner.batch} sequence at once, guidance needs two",
            "Draw with --cfg 1, or fit again with --cfg.",
        )
    return Painter(drawn, runner, sampling, CodecRunner(bundle / CODEC / CODEC_GRAPH))
