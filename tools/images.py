"""The proof of docs/images.md: methods of pruning an image generator, by the pictures that it still draws.

    apt-get install dataset-fashion-mnist
    pip install -e ".[images]"
    python -m tools.train_image_model
    python -m tools.images

An hour or two on two cores. Every finished cell is one line of --cells: started again, it goes on with the missing
ones. The model has seen no test image. Pruning sees pictures alone that the dense model draws itself, of every class
and some of none; held-out training images choose the guidance scale.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgeprune.cache import cache_folder
from edgeprune.engine.onnx.codec import write_codec
from edgeprune.engine.onnx.graph import ONNXRUNTIME_GRAPH, write_graphs
from edgeprune.errors import EdgepruneError, InputError
from edgeprune.evaluate.agreement import wilson
from edgeprune.evaluate.distances import distances, kernel_difference, kernel_distance
from edgeprune.evaluate.features import features, load_network
from edgeprune.evaluate.perplexity import Losses, log_rise, text_losses
from edgeprune.generate.guidance import class_labels, documents_of
from edgeprune.generate.images import draw_codes, steps_of
from edgeprune.generate.pixels import CodecRunner, grid, to_images, to_pixels, write_picture
from edgeprune.model.checkpoint.llamagen import Hints
from edgeprune.model.codec.codec import check_codec, load_codec
from edgeprune.model.decoder import Decoder, ratio
from edgeprune.ondevice.guided_sampling import Sampling
from edgeprune.ondevice.onnxruntime import GRAPH_FILE, GraphRunner
from edgeprune.pipeline.comparison import DENSE_KEY, Comparison, Layout, WidthRule, generate_samples
from edgeprune.pipeline.imaging import Imaging
from edgeprune.pipeline.kind import Images as ImageKind
from edgeprune.pipeline.setup import load_dense
from edgeprune.progress import Progress, rich_progress
from edgeprune.pruning.methods import method_named
from edgeprune.pruning.prune import prune, result_of
from tools.fashion_images import DATASET, Images, read_images
from tools.images_page import DENSE, METHODS, RATIOS, REAL, SCALES, THROUGH_CODEC, Cell, Ledger, fill
from tools.train_image_model import HELD_OUT

if TYPE_CHECKING:
    from edgeprune.model.model import Weights

PICTURES, SCALE_PICTURES = 2000, 1000
SAMPLES = 256
HELD_OUT_CODES = 1000
AT_ONCE = 50
HEADS = 8
SHOWN = (DENSE.method, "default", "obs", "wanda", "flap", "magnitude")  # a row each in the page's pictures
COLUMNS, ENLARGED = 20, 2
PAGE = Path(__file__).parents[1] / "docs" / "images.md"


def pruned_cells() -> Iterator[Cell]:
    """Returns the cells of all methods at all ratios."""
    return (Cell(method, share) for share in RATIOS for method in METHODS)


@dataclass(frozen=True)
class Pruned:
    """A pruned model. seconds: of pruning alone; fell_back: modules where no update of the weights helped."""

    decoder: Decoder
    weights: Weights
    seconds: float
    fell_back: int


class Studio:
    """Model, codec, judges and real images.

    folder: of tools.train_image_model; pictures: of every model; samples: to calibrate on. Pictures and features are
    made once, and kept in the folder. Raises InputError for files that are missing.
    """

    def __init__(self, folder: Path, dataset: Path, pictures: int, samples: int, seed: int, progress: Progress) -> None:
        for name in ("gpt.pt", "codec.pt", "classifier.safetensors"):
            if not (folder / name).is_file():
                raise InputError(f"{folder / name} is missing", "Run: python -m tools.train_image_model")
        self.folder, self.dataset, self.seed, self.progress = folder, dataset, seed, progress
        self.pictures, self.samples = pictures, samples
        self.model = load_dense(str(folder / "gpt.pt"), Hints(num_heads=HEADS))
        self.codec = load_codec(folder / "codec.pt")
        check_codec(self.codec, self.model.decoder)
        self.network = load_network()
        self.labels = class_labels(self.model.decoder.picture, pictures, seed)
        self.work = folder / f"proof-{self.model.fingerprint[:8]}-{pictures}-{samples}-{seed}"
        self.work.mkdir(exist_ok=True)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Returns the settings that all rows of one table share."""
        return {
            "model": self.model.fingerprint,
            "codec": self.codec.fingerprint,
            "features": self.network.name,
            "pictures": self.pictures,
            "samples": self.samples,
            "seed": self.seed,
        }

    @functools.cached_property
    def codec_runner(self) -> CodecRunner:
        """Returns the codec's graph in ONNX Runtime, written first."""
        path = self.work / "codec.onnx"
        write_codec(self.codec, self.model.decoder.picture.side, path)
        return CodecRunner(path)

    @functools.cached_property
    def test_images(self) -> Images:
        """Returns the test images in a drawn order: those to compare with first, as many others behind them, those to
        encode last."""
        images = read_images(self.dataset, "t10k")
        return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed))]

    @property
    def other_test_images(self) -> Images:
        """Returns as many test images as those to compare with, none of which is among these."""
        return self.test_images[self.pictures : 2 * self.pictures]

    @functools.cached_property
    def held_out(self) -> list[np.ndarray]:
        """Returns codes of test images behind their class: documents of 1 + tokens ids."""
        images = self.test_images[-HELD_OUT_CODES:]
        codes = self.codec.encode(images.pixels).numpy()
        return [*documents_of(self.model.decoder, images.classes.tolist(), codes)]

    def guided(self, scale: float) -> dict[str, Any]:
        """Returns the figures of the dense model's pictures at a guidance scale, against held-out training images."""
        held_out = read_images(self.dataset, "train")[-HELD_OUT:]
        reference = self.features_of("held-out", lambda: to_pixels(held_out.pixels[: self.pictures].numpy()))
        model, count = self.model, min(SCALE_PICTURES, self.pictures)
        return self._judged(
            f"guidance-{scale:g}",
            lambda: self.drawn(model.decoder, model.weights, Sampling(scale), count),
            self.labels[:count],
            reference,
        )

    def begin(self, scale: float) -> None:
        """Draws the samples to calibrate on, at this guidance scale as in deployment."""
        self.sampling, picture = Sampling(scale), self.model.decoder.picture
        kind = ImageKind(Imaging(self.codec, self.sampling, self.pictures, None))
        drawn = generate_samples(self.model, kind, self.samples, picture.tokens + 1, self.seed, self.progress)
        fed = drawn[:, : self.model.decoder.most_fed]
        self.comparison = Comparison(
            self.model, fed, None, {"": self.held_out}, picture.tokens + 1, self.seed, self.progress
        )

    def judge(self, cell: Cell) -> dict[str, Any]:
        """Returns the figures of a cell, a line of the ledger."""
        if cell in (REAL, THROUGH_CODEC):
            images = self.other_test_images
            return self._judged(cell.name, lambda: self._real(cell), images.classes.tolist(), self._reference)
        dense, model = self._dense_losses, self.model
        if cell == DENSE:
            rows = {"perplexity": dense.perplexity, "parameters": model.decoder.parameters}
            draw = lambda: self.drawn(model.decoder, model.weights, self.sampling, self.pictures)  # noqa: E731
            return rows | self._judged(cell.name, draw, self.labels, self._reference)
        pruned = self.pruned(cell)
        losses = self._losses(pruned)
        figures = self._judged(cell.name, lambda: self._drawn(pruned), self.labels, self._reference)
        if cell != cell.default:
            theirs = self.features_of(cell.default.name, lambda: self._drawn(self.pruned(cell.default)))
            figures["over_default"] = kernel_difference(self._reference, theirs, self._features(cell), self.seed)
        return figures | {
            "perplexity": losses.perplexity,
            "rise": log_rise(dense, losses, self.seed),
            "realised": ratio(pruned.decoder, model.decoder),
            "parameters": pruned.decoder.parameters,
            "seconds": pruned.seconds,
            "fell_back": pruned.fell_back,
            "widths": [*pruned.decoder.layer_widths],
        }

    def judge_generator(self, cell: Cell) -> dict[str, Any]:
        """Returns the distances of a cell to test images through the codec, which changed these as it changes every
        picture. The cell's pictures must be there."""
        reference, own = self._features(THROUGH_CODEC), self._features(cell)
        figures: dict[str, Any] = {"kernel": kernel_distance(reference, own, self.seed)}
        if cell.ratio and cell != cell.default:
            theirs = self._features(cell.default)
            figures["over_default"] = kernel_difference(reference, theirs, own, self.seed)
        return figures

    def pruned(self, cell: Cell) -> Pruned:
        """Returns the model pruned by a cell's method to its ratio."""
        target = self.comparison.target(cell.ratio, Layout.UNIFORM, WidthRule.SENSITIVITY)
        method = method_named(cell.method)
        advance = self.progress.stage(f"prune: {cell.name}", 2 * len(target.layers))
        fell_back: list[bool] = []
        start = time.monotonic()
        weights = dict(
            prune(
                self.model,
                target,
                self.comparison.ids,
                method,
                self.seed,
                lambda record: (fell_back.append(record.fell_back), advance()),
            )
        )
        return Pruned(result_of(target, method), weights, time.monotonic() - start, sum(fell_back))

    def drawn(self, decoder: Decoder, weights: Weights, sampling: Sampling, count: int) -> np.ndarray:
        """Returns pixels (count, height, width, 3) uint8 of the first labels, drawn by the exported graph in ONNX
        Runtime from the same seeds for every model."""
        picture = decoder.picture
        advance = self.progress.stage("draw", steps_of(picture, count, AT_ONCE))
        with tempfile.TemporaryDirectory(prefix="edgeprune-") as name:
            write_graphs(decoder, weights, Path(name), "fp32", [ONNXRUNTIME_GRAPH], picture.tokens)
            runner = GraphRunner(Path(name) / GRAPH_FILE, AT_ONCE * sampling.streams, picture.tokens)
            codes = draw_codes(runner, picture, decoder.vocab_size, self.labels[:count], sampling, self.seed, advance)
        return self.codec_runner.pixels(codes)

    def features_of(self, name: str, pixels_of: Callable[[], np.ndarray]) -> np.ndarray:
        """Returns the features (n, d) fp32 of pictures; they are computed once and kept beside the pixels."""
        self._keep(name, pixels_of)
        return self._stored(name, "features")

    def pixels_of(self, cell: Cell) -> np.ndarray:
        """Returns the pixels of a cell's pictures, which must be there."""
        return self._stored(cell.name, "pixels")

    def _features(self, cell: Cell) -> np.ndarray:
        return self._stored(cell.name, "features")

    def _stored(self, name: str, key: str) -> np.ndarray:
        with np.load(self.work / f"{name}.npz") as stored:
            return stored[key]

    def _keep(self, name: str, pixels_of: Callable[[], np.ndarray]) -> None:
        """Writes pictures and their features into the folder, unless they are there."""
        path = self.work / f"{name}.npz"
        if path.is_file():
            return
        pixels = pixels_of()
        advance = self.progress.stage(f"features: {name}", len(pixels))
        computed = features(pixels, self.network, lambda count: [advance() for _ in range(count)])
        with path.with_suffix(".part").open("wb") as file:
            np.savez(file, pixels=pixels, features=computed)
        path.with_suffix(".part").replace(path)

    def _judged(
        self, name: str, pixels_of: Callable[[], np.ndarray], labels: Sequence[int], reference: np.ndarray
    ) -> dict[str, Any]:
        """Returns the distances of pictures to the reference, and how often the classifier recognises their class."""
        own = self.features_of(name, pixels_of)
        right = int((self._guesses(self._stored(name, "pixels")) == np.array(labels)).sum())
        self.progress.stage(f"distances: {name}")
        return {
            **asdict(distances(reference, own, self.network.name, self.seed)),
            "recognised": (right / len(labels), *wilson(right, len(labels))),
        }

    @torch.no_grad()
    def _guesses(self, pixels: np.ndarray) -> np.ndarray:
        """Returns the classifier's class (n,) of each picture."""
        from safetensors.torch import load_file

        from tools.image_networks import Classifier

        classifier = Classifier().eval()
        classifier.load_state_dict(load_file(self.folder / "classifier.safetensors"))
        parts = torch.from_numpy(to_images(pixels)).split(500)
        return torch.cat([classifier(part).argmax(-1) for part in parts]).numpy()

    def _real(self, cell: Cell) -> np.ndarray:
        pixels = self.other_test_images.pixels
        return (
            self.codec_runner.pixels(self.codec.encode(pixels).numpy())
            if cell == THROUGH_CODEC
            else to_pixels(pixels.numpy())
        )

    def _drawn(self, pruned: Pruned) -> np.ndarray:
        return self.drawn(pruned.decoder, pruned.weights, self.sampling, self.pictures)

    def _losses(self, pruned: Pruned) -> Losses:
        texts = {"": self.held_out}
        return text_losses(pruned.decoder, pruned.weights.items(), texts, self.comparison.window)[""]

    @functools.cached_property
    def _reference(self) -> np.ndarray:
        return self.features_of("reference", lambda: to_pixels(self.test_images.pixels[: self.pictures].numpy()))

    @functools.cached_property
    def _dense_losses(self) -> Losses:
        _ = self.comparison.dense
        return self.comparison.losses[DENSE_KEY][""]


def run(studio: Studio, ledger: Ledger, cells: Sequence[Cell]) -> None:
    """Computes the lines that are missing. Raises InputError where those that are there are of another model."""
    ledger.begin(studio.fingerprint, studio.folder / "training.jsonl")
    scales = {scale: ledger.once(f"guidance {scale:g}", lambda: studio.guided(scale)) for scale in SCALES}  # noqa: B023
    studio.begin(min(SCALES, key=lambda scale: scales[scale]["kernel"][0]))
    for number, cell in enumerate(cells):
        row = ledger.once(cell.name, lambda: studio.judge(cell))  # noqa: B023
        studio.progress.note(f"{number + 1}/{len(cells)} {cell.name}: kernel distance {row['kernel'][0]:.4f}")
    for cell in cells:
        if cell not in (REAL, THROUGH_CODEC):
            ledger.once(cell.generator_name, lambda: studio.judge_generator(cell))  # noqa: B023


def show(studio: Studio, folder: Path) -> None:
    """Writes one PNG for each ratio: the same seeds and classes below each other, a row for each method."""
    order = np.argsort(np.array(studio.labels), kind="stable").reshape(-1, len(studio.labels) // COLUMNS)[:, 0]
    folder.mkdir(exist_ok=True)
    for share in RATIOS:
        cells = [DENSE if method == DENSE.method else Cell(method, share) for method in SHOWN]
        if all((studio.work / f"{cell.name}.npz").is_file() for cell in cells):
            rows = np.concatenate([studio.pixels_of(cell)[order] for cell in cells])
            large = rows.repeat(ENLARGED, axis=1).repeat(ENLARGED, axis=2)
            write_picture(grid(large, COLUMNS), folder / f"{100 * share:.0f}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=cache_folder() / "fashion-mnist")
    parser.add_argument("--dataset", type=Path, default=DATASET)
    parser.add_argument("--cells", type=Path, default=PAGE.with_suffix(".jsonl"))
    parser.add_argument("--write", type=Path, default=PAGE, help="the page; its pictures stand in a folder beside it")
    parser.add_argument("--pictures", type=int, default=PICTURES, help="of every model")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="pictures to calibrate on")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        with rich_progress() as progress:
            ledger = Ledger(options.cells)
            studio = Studio(options.model, options.dataset, options.pictures, options.samples, options.seed, progress)
            run(studio, ledger, [REAL, THROUGH_CODEC, DENSE, *pruned_cells()])
            show(studio, options.write.with_suffix(""))
            options.write.write_text(fill(options.write.read_text(encoding="utf-8"), ledger.rows), encoding="utf-8")
    except EdgepruneError as error:
        sys.exit(f"{error.message}\n{error.remedy}")


if __name__ == "__main__":
    main()
