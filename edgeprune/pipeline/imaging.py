"""Pictures in a request: the codec, how they are drawn, and folders of them as codes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.errors import InputError
from edgeprune.evaluate.distances import FEWEST_IMAGES
from edgeprune.evaluate.features import load_network
from edgeprune.generate.guidance import documents_of, sample_labels, sampling_of
from edgeprune.generate.pixels import read_images
from edgeprune.model.checkpoint.configuration import read_config
from edgeprune.model.decoder import Decoder, Picture
from edgeprune.model.model import Model
from edgeprune.ondevice.guided_sampling import Sampling
from edgeprune.pipeline.packing import HELD_OUT_EVERY
from edgeprune.pipeline.request import Request

if TYPE_CHECKING:
    from edgeprune.model.codec.codec import Codec

DRAWN = 128  # pictures that quality is judged by: few, so their interval and bias stand beside them
MOST_DOCUMENTS = 128  # pictures of a folder whose codes are evaluated
ENCODED = 8  # at once


@dataclass(frozen=True)
class Imaging:
    """codec: between codes and pixels; sampling: as in deployment; count: pictures to judge quality by; features:
    the network that they are compared through, None for the default."""

    codec: Codec
    sampling: Sampling
    count: int
    features: Path | None

    @property
    def fingerprint(self) -> list[Any]:
        """Returns what makes two runs the same run."""
        features = self.features and hashlib.sha256(self.features.read_bytes()).hexdigest()
        return [self.codec.fingerprint, self.sampling.cfg, self.count, features]

    def at_once(self, batch: int) -> int:
        """Returns the pictures in a batch of so many sequences."""
        return batch // self.sampling.streams

    def size(self, picture: Picture) -> int:
        """Returns the pixels of a side."""
        return picture.side * self.codec.downsample


def imaging_of(request: Request, model: Model) -> Imaging:
    """Returns the codec and how pictures are drawn. Raises InputError for a codec that is not the model's."""
    from edgeprune.model.codec.codec import check_codec, clusters_of, load_codec

    codec, count, features = request.codec, request.images, request.features
    decoder = model.decoder
    if count is not None and count < FEWEST_IMAGES:
        raise InputError(
            f"--images {count} is less than {FEWEST_IMAGES}",
            f"Give {FEWEST_IMAGES} or more; hundreds give a figure worth reading.",
        )
    if features is not None:
        load_network(features)  # before any long work
    # The codec: LlamaGen's is a file of its own, ImageGPT's are the colours in its folder.
    if decoder.family == "imagegpt":
        if codec is not None:
            raise InputError("--codec with an ImageGPT, whose colours are its codec", "Leave --codec out.")
        loaded = clusters_of(model.directory)
    elif codec is None:
        raise InputError(
            f"{model.name} draws codes, and no codec is given to make pixels of them",
            "Give LlamaGen's: --codec vq_ds16_c2i.pt.",
        )
    else:
        loaded = load_codec(codec)
    # It must make the pixels that the model was trained for.
    check_codec(loaded, decoder)
    downsample = read_config(model.directory).get("downsample_size", loaded.downsample)
    if downsample != loaded.downsample:
        raise InputError(
            f"the codec makes {loaded.downsample} pixels a side of a code, {model.name} was trained on {downsample}",
            "Give the codec that the model was trained with.",
        )
    imaging = Imaging(loaded, sampling_of(decoder, request.cfg), count or DRAWN, features)
    size = imaging.size(decoder.picture)
    if request.image_size not in (None, size):
        raise InputError(
            f"--image-size {request.image_size}, but this codec makes {size} pixels of {decoder.picture.side} codes",
            "Give the codec that the model was trained with.",
        )
    return imaging


def read_codes(folder: Path, decoder: Decoder, imaging: Imaging, most: int, seed: int) -> np.ndarray:
    """Returns up to so many pictures of a folder, drawn by seed, as documents (pictures, 1 + tokens) int64.

    A picture in a subfolder named by a number is of that class, but for every tenth. Raises InputError.
    """
    import torch

    if not getattr(imaging.codec, "has_encoder", True):
        raise InputError(
            f"the codec has no encoder, which {folder} needs to become codes",
            "Give the whole codec, or let the model draw its own samples: --calibration self.",
        )
    labels, images = read_images(folder, imaging.size(decoder.picture), most, seed)
    count = decoder.picture.num_classes
    if unknown := sorted({label for label in labels if label is not None and label >= count}):
        raise InputError(
            f"{folder} holds class {unknown[0]}, the model has {count} classes",
            f"Name the subfolders 0 to {count - 1}." if count else "Put the pictures into one folder.",
        )
    labels = sample_labels(decoder.picture, labels)
    parts = [imaging.codec.encode(part) for part in torch.from_numpy(images).split(ENCODED)]
    return documents_of(decoder, labels, torch.cat(parts).numpy())


def picture_samples(
    decoder: Decoder, imaging: Imaging, calibration: Path | None, evaluate: Sequence[Path], samples: int, seed: int
) -> tuple[np.ndarray | None, dict[str, list[np.ndarray]], str]:
    """Returns ids to calibrate on (samples, tokens), None where the model is to draw them; documents to evaluate on,
    by name; and where they are from. Raises InputError."""
    evaluation = {path.stem: list(read_codes(path, decoder, imaging, MOST_DOCUMENTS, seed)) for path in evaluate}
    if calibration is None:
        return None, evaluation, "drawn by the model itself"
    held_out = 0 if evaluation else max(1, samples // (HELD_OUT_EVERY - 1))
    documents = read_codes(calibration, decoder, imaging, samples + held_out, seed)
    if not evaluation:
        held_out = min(held_out, len(documents) // HELD_OUT_EVERY)
        if not held_out:
            raise InputError(
                f"{calibration} holds {len(documents)} pictures: none can be held out for evaluation",
                f"Give at least {HELD_OUT_EVERY} pictures, or another folder by --evaluate.",
            )
        evaluation = {f"{calibration.stem} (held out)": list(documents[-held_out:])}
        documents = documents[:-held_out]
    return documents[:, :-1], evaluation, f"{len(documents)} pictures of {calibration.name}"
