"""Pictures of the dense and of a fitted model from the same seeds: side by side, and how far they are off.

What belongs to the dense model and to the reference is drawn once for all candidates of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.errors import InputError
from edgeprune.evaluate.distances import FEWEST_IMAGES, distances, kernel_difference
from edgeprune.evaluate.features import Network, features, load_network
from edgeprune.evaluate.grids import data_uri
from edgeprune.generate.guidance import class_labels
from edgeprune.generate.images import codes_from, steps_of
from edgeprune.generate.pixels import CodecRunner, grid, read_pixels
from edgeprune.ondevice.onnxruntime import GRAPH_FILE
from edgeprune.pipeline.imaging import Imaging
from edgeprune.pipeline.journal import Journal
from edgeprune.pipeline.results import Candidate
from edgeprune.pipeline.setup import Setup
from edgeprune.progress import Progress

SHOWN = 16  # pictures of the grids
OTHERS = "the dense model's other samples"
MOST_REFERENCES = 5000  # pictures of a folder


@dataclass(frozen=True)
class Gallery:
    """Draws for a run. plain: the folder of the dense model's fp32 graphs."""

    setup: Setup
    journal: Journal
    progress: Progress
    plain: Path

    def compare(self, name: str, chosen: Candidate) -> dict[str, Any]:
        """Returns what results.Quality.pictures holds: the stage `pictures {name}`."""
        dense = self._folder("dense-pictures", self.plain / GRAPH_FILE, self._seed)
        fitted = self._folder(f"pictures-{name}", chosen.runnable_graph, self._seed)

        def compute() -> dict[str, Any]:
            # Grids of both models from the same seeds.
            imaging, labels = self._imaging, self._labels[:SHOWN]
            shown = [np.load(folder / "images.npy", mmap_mode="r")[:SHOWN] for folder in (dense, fitted)]
            uris = [data_uri(grid(images)) for images in shown]
            comparison: dict[str, Any] = {
                "images": imaging.count,
                "at_once": imaging.at_once(self.setup.workload.batch),
                "cfg": imaging.sampling.cfg,
                "temperature": imaging.sampling.temperature,
                "reference": self._reference_name,
                "dense": None,
                "fitted": None,
                "difference": None,
                "missing": self._missing,
                "dense_grid": uris[0],
                "fitted_grid": uris[1],
                "classes": [label for label in labels if label is not None],
                "side": shown[0].shape[1],
            }
            if self._network is None:
                return comparison
            # Distances, where there is a network to see the pictures through.
            reference = self._features(self._reference)
            sides = {"dense": self._features(dense), "fitted": self._features(fitted)}
            if len(reference) < FEWEST_IMAGES:
                return comparison | {
                    "missing": f"{self._reference_name} holds {len(reference)} pictures, fewer than "
                    f"{FEWEST_IMAGES}. Give more by --evaluate."
                }
            self.progress.stage("compare the pictures")
            for side, seen in sides.items():
                comparison[side] = asdict(distances(reference, seen, self._network.name, self._seed))
            comparison["difference"] = kernel_difference(reference, *sides.values(), self._seed)
            return comparison

        return self.journal.stage(f"pictures {name}", compute)

    @property
    def _imaging(self) -> Imaging:
        return self.setup.kind.imaging

    @property
    def _seed(self) -> int:
        return self.setup.request.seed

    @cached_property
    def _labels(self) -> list[int | None]:
        return class_labels(self.setup.model.decoder.picture, self._imaging.count, self._seed)

    @cached_property
    def _codec(self) -> CodecRunner:
        from edgeprune.generate.images import CODEC_GRAPH
        from edgeprune.pipeline.codec_folder import write_codec_folder

        decoder = self.setup.model.decoder
        folder = self.journal.folder_stage("codec", lambda folder: write_codec_folder(folder, decoder, self._imaging))
        return CodecRunner(folder / CODEC_GRAPH)

    @cached_property
    def _network_or_reason(self) -> tuple[Network | None, str]:
        try:
            return load_network(self._imaging.features), ""
        except InputError as error:
            if self._imaging.features is not None:
                raise
            return None, f"{error.message}. {error.remedy}"

    @property
    def _network(self) -> Network | None:
        return self._network_or_reason[0]

    @property
    def _missing(self) -> str:
        return self._network_or_reason[1]

    def _folder(self, name: str, graph: Path, seed: int) -> Path:
        """Returns a folder with pictures (count, height, width, 3) uint8 of a model, drawn in fp32 on this machine."""

        def fill(folder: Path) -> None:
            decoder, sampling = self.setup.model.decoder, self._imaging.sampling
            codec = self._codec
            advance = self.progress.stage(name.replace("-", " "), steps_of(decoder.picture, self._imaging.count))
            codes = codes_from(graph, decoder.picture, decoder.vocab_size, self._labels, sampling, seed, advance)
            np.save(folder / "images.npy", codec.pixels(codes))

        return self.journal.folder_stage(name, fill)

    @property
    def _evaluated(self) -> Sequence[Path]:
        return self.setup.request.evaluate

    @property
    def _reference_name(self) -> str:
        return " and ".join(path.stem for path in self._evaluated) or OTHERS

    @cached_property
    def _reference(self) -> Path:
        """Returns the folder of the pictures that both models are compared with: the user's, or of another seed."""
        if not self._evaluated:
            return self._folder("reference-pictures", self.plain / GRAPH_FILE, self._seed + 1)
        size = self._imaging.size(self.setup.model.decoder.picture)

        def fill(folder: Path) -> None:
            parts = [read_pixels(path, size, MOST_REFERENCES, self._seed).pixels for path in self._evaluated]
            np.save(folder / "images.npy", np.concatenate(parts))

        return self.journal.folder_stage("reference-pictures", fill)

    def _features(self, folder: Path) -> np.ndarray:
        path = folder / "features.npy"
        if not path.is_file():
            images = np.load(folder / "images.npy", mmap_mode="r")
            done = 0

            def advance(count: int) -> None:
                nonlocal done
                done += count
                self.progress.track(f"features of {folder.name}", done, len(images))

            seen = features(images, self._network, advance)
            with path.with_suffix(".part").open("wb") as file:
                np.save(file, seen)
            path.with_suffix(".part").replace(path)
        return np.load(path)
