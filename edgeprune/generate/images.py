"""Images from a model's exported graph: samples for calibration, for the report, and `edgeprune run`.

It knows no weights.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgeprune.errors import InputError
from edgeprune.files import checked, read_json
from edgeprune.generate.guidance import checked_guidance, class_labels, documents_of, sample_labels
from edgeprune.generate.pixels import CodecRunner, grid, write_picture
from edgeprune.model.decoder import Decoder, Picture
from edgeprune.ondevice.bundle import CODEC, OTHER_VERSION, open_to_run
from edgeprune.ondevice.bundle_runner import runner_of
from edgeprune.ondevice.guided_sampling import Sampling, draw_pictures, random_points
from edgeprune.ondevice.onnxruntime import GraphRunner
from edgeprune.ondevice.reference import StepRunner
from edgeprune.ondevice.sampling import check_sampling
from edgeprune.progress import Progress

AT_ONCE = 8  # images: the processor gains nothing from more
DESCRIPTION, CODEC_GRAPH = "picture.json", "codec.onnx"  # in the codec's folder of a bundle


@dataclass(frozen=True)
class Drawn:
    """A bundle's description of the images that it draws.

    side, num_classes, has_null: as in Picture. vocab_size: the codes, after which the tokens that begin an image stand.
    cfg: the guidance that the bundle was fitted with.
    """

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
    """Returns codes (images, tokens) int64, drawn for as many images at once as the runner holds.

    advance: called after every step, `steps_of` times in all.
    """
    # Guidance needs two sequences for each image.
    at_once = runner.batch // sampling.streams
    null = picture.opening(vocab_size, None)
    drawn = []
    # Draw batch by batch; the last one is filled up, since the runner's batch is always full.
    for start in range(0, len(labels), at_once):
        batch = [*labels[start : start + at_once]]
        openings = [picture.opening(vocab_size, label) for label in batch]
        openings += openings[-1:] * (at_once - len(batch))
        points = random_points(seed, start, at_once, picture.tokens)  # (at_once, tokens)
        steps = []
        for codes in draw_pictures(runner, openings, null, sampling, points):
            steps.append(codes)  # (at_once,)
            advance()
        drawn.append(np.stack(steps, axis=1)[: len(batch)])  # (images of the batch, tokens)
    return np.concatenate(drawn)


def steps_of(picture: Picture, count: int, at_once: int = AT_ONCE) -> int:
    """Returns how often draw_codes advances for so many images."""
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
    """Returns codes (images, tokens) int64 as draw_codes does, of a graph in ONNX Runtime, AT_ONCE images at once."""
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
    """Returns a bundle's description. Raises InputError for the bundle of a language model, and for a damaged one."""
    path = bundle / CODEC / DESCRIPTION
    if not path.is_file():
        raise InputError(
            f"{bundle} is the bundle of a language model, which draws no pictures",
            f"Give it a text: edgeprune run {shlex.quote(str(bundle))} --prompt 'What is edge computing?'",
        )
    form = {"side": int, "num_classes": int, "has_null": bool, "vocab_size": int, "cfg": float}
    return Drawn(**checked(read_json(path, remedy=OTHER_VERSION), form, str(path), OTHER_VERSION))


@dataclass(frozen=True)
class Painter:
    """A bundle's engine or graph and its codec, ready to draw."""

    drawn: Drawn
    runner: StepRunner
    sampling: Sampling
    codec: CodecRunner

    @property
    def at_once(self) -> int:
        return self.runner.batch // self.sampling.streams

    def pixels(self, classes: Sequence[int], count: int, seed: int, advance: Callable[[], None]) -> np.ndarray:
        """Returns images (count, height, width, 3) uint8 of the classes in turn; of all classes where none is given."""
        picture = self.drawn.picture
        in_turn: Sequence[int | None] = classes or range(picture.num_classes) or (None,)
        labels = [in_turn[place % len(in_turn)] for place in range(count)]
        codes = draw_codes(self.runner, picture, self.drawn.vocab_size, labels, self.sampling, seed, advance)
        return self.codec.pixels(codes)


def draw_grid(
    painter: Painter, classes: Sequence[int], count: int, seed: int, output: Path, progress: Progress
) -> float:
    """Writes a grid of so many images, and returns the seconds that drawing and decoding took."""
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
    """Returns a bundle that is ready to draw.

    cfg: None for the bundle's own guidance. note: called where the engine is not used. Raises InputError for a language
    model, an unknown class, or a sampling or guidance that the model does not support.
    """
    check_sampling(temperature, top_k, top_p)
    # Check the classes and the guidance against the model.
    chosen = open_to_run(bundle)
    drawn = read_description(bundle)
    picture = drawn.picture
    for label in classes:
        if not 0 <= label < picture.num_classes:
            known = f"Give 0 to {picture.num_classes - 1}." if picture.num_classes else "Leave --class out."
            raise InputError(f"unknown class {label}: the model has {picture.num_classes} classes", known)
    scale = checked_guidance(picture, drawn.cfg if cfg is None else cfg)
    sampling = Sampling(scale, temperature, top_k, top_p)
    # Run the engine for the batch and context that it was built for.
    chosen.check(bundle / CODEC)
    runner = runner_of(chosen, chosen.workload.batch, min(count, AT_ONCE) * sampling.streams, note)
    if runner.batch < sampling.streams:
        raise InputError(
            f"the engine takes {runner.batch} sequence at once, but guidance needs two",
            "Draw with --cfg 1, or fit again with --cfg.",
        )
    return Painter(drawn, runner, sampling, CodecRunner(bundle / CODEC / CODEC_GRAPH))
