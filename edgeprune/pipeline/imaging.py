"""Pictures in a request: the codec, how they are drawn, and folders of them as codes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.errors import InputError
from edgeprune.evaluate.distances import FEWEST_IMAGES
from edgeprune.evaluate.features import load_network
from edgeprune.files import printable
from edgeprune.generate.guidance import documents_of, sample_labels, sampling_of
from edgeprune.generate.pixels import Pictures, read_pixels, to_images
from edgeprune.model.checkpoint.configuration import read_config
from edgeprune.model.decoder import Decoder, Picture
from edgeprune.model.model import Model
from edgeprune.ondevice.guided_sampling import Sampling
from edgeprune.pipeline.packing import HELD_OUT_EVERY
from edgeprune.pipeline.request import Request
from edgeprune.pipeline.samples import Source, UserSamples

if TYPE_CHECKING:
    from edgeprune.model.codec.codec import Codec

DRAWN = 128  # pictures that quality is judged by: few, so their interval and bias stand beside them
MOST_DOCUMENTS = 128  # pictures of a folder whose codes are evaluated
ENCODED = 8  # at once
SHOWN = 5  # names in a message
WORDNET_ID = re.compile(r"n\d{8}")  # ImageNet's name of a class


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


def read_codes(folder: Path, decoder: Decoder, imaging: Imaging, most: int, seed: int) -> tuple[np.ndarray, str, str]:
    """Returns up to so many pictures of a folder, drawn by seed, as documents (pictures, 1 + tokens) int64, and in
    words what was taken and what was left out.

    A picture below a folder named by a number is of that class, but for every tenth. Raises InputError.
    """
    import torch

    if not getattr(imaging.codec, "has_encoder", True):
        raise InputError(
            f"the codec has no encoder, which {folder} needs to become codes",
            "Give the whole codec, or let the model draw its own samples: --calibration self.",
        )
    pictures = read_pixels(folder, imaging.size(decoder.picture), most, seed)
    classes = _classes(folder, pictures, decoder.picture.num_classes)
    images = torch.from_numpy(to_images(pictures.pixels))
    parts = [imaging.codec.encode(part) for part in images.split(ENCODED)]
    documents = documents_of(decoder, sample_labels(decoder.picture, classes), torch.cat(parts).numpy())
    return documents, _taken(pictures, classes), _left_out(pictures, classes, decoder.picture.num_classes)


def _classes(folder: Path, pictures: Pictures, count: int) -> list[int | None]:
    """Returns the class of each picture, of `count` that the model has. Raises InputError for one that it has not."""
    if count and (ids := [name for name in pictures.classes if isinstance(name, str) and WORDNET_ID.fullmatch(name)]):
        raise InputError(
            f"{folder} has folders named by WordNet ids ({ids[0]}), which do not tell the model's classes",
            f"Name each by its class, 0 to {count - 1}: those of ImageNet in order are its 1000 ids, sorted.",
        )
    classes = [label if isinstance(label, int) else None for label in pictures.classes]
    if unknown := sorted({label for label in classes if label is not None and label >= count}):
        raise InputError(
            f"{folder} holds class {unknown[0]}, the model has {count} classes",
            f"Name the subfolders 0 to {count - 1}." if count else "Put the pictures into one folder.",
        )
    return classes


def _taken(pictures: Pictures, classes: list[int | None]) -> str:
    known = len({label for label in classes if label is not None})
    of = f" of {known:,} class{'' if known == 1 else 'es'}" if known else ""
    return f"{len(classes):,} of {pictures.of:,} pictures{of}"


def _left_out(pictures: Pictures, classes: list[int | None], count: int) -> str:
    """Returns in words which pictures are of no class of a model that has classes, and which files were not read."""
    parts = []
    if count and (without := classes.count(None)):
        names = sorted({name for name in pictures.classes if isinstance(name, str)})
        where = (
            f", their folders are no numbers: {', '.join(names[:SHOWN])}" if names else ", they are in no folder of one"
        )
        parts.append(f"{without:,} of no class{where}")
    if pictures.others:
        parts.append(f"not read: {', '.join(f'{n:,} of {suffix}' for suffix, n in pictures.others.items())}")
    return printable("; ".join(parts)) or "nothing was left out"


def picture_samples(
    decoder: Decoder, imaging: Imaging, calibration: Path | None, evaluate: Sequence[Path], samples: int, seed: int
) -> UserSamples:
    """Returns pictures as ids to calibrate on, none where the model is to draw them, and to evaluate on by name.

    Raises InputError.
    """
    evaluation, sources = {}, []
    for path in evaluate:
        documents, taken, left_out = read_codes(path, decoder, imaging, MOST_DOCUMENTS, seed)
        evaluation[path.stem] = list(documents)
        sources.append(Source(f"read {path.name}", f"{taken} to evaluate on", left_out))
    if calibration is None:
        return UserSamples(None, evaluation, "drawn by the model itself", tuple(sources))
    held_out = 0 if evaluation else max(1, samples // (HELD_OUT_EVERY - 1))
    documents, taken, left_out = read_codes(calibration, decoder, imaging, samples + held_out, seed)
    if not evaluation:
        held_out = min(held_out, len(documents) // HELD_OUT_EVERY)
        if not held_out:
            raise InputError(
                f"{calibration} holds {len(documents)} pictures: none can be held out for evaluation",
                f"Give at least {HELD_OUT_EVERY} pictures, or another folder by --evaluate.",
            )
        evaluation = {f"{calibration.stem} (held out)": list(documents[-held_out:])}
        documents = documents[:-held_out]
        taken += f"; {held_out:,} held out to evaluate on"
    sources.insert(0, Source(f"read {calibration.name}", taken, left_out))
    origin = f"{len(documents)} pictures of {calibration.name}"
    return UserSamples(documents[:, :-1], evaluation, origin, tuple(sources))
