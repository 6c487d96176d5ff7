"""What a request says of pictures: the codec, how they are drawn, and folders of them as codes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.ondevice.guided_sampling import Sampling
from edgeprune.errors import InputError
from edgeprune.evaluate.distances import FEWEST_IMAGES
from edgeprune.evaluate.features import load_network
from edgeprune.model.decoder import Decoder, Picture
from edgeprune.model.load import read_config
from edgeprune.model.model import Model
from edgeprune.generate.pixels import read_images
from edgeprune.pipeline.documents import HELD_OUT_EVERY
from edgeprune.pipeline.request import Request

if TYPE_CHECKING:
    from edgeprune.model.codec.codec import Codec

GUIDANCE = {768: 2.0, 1024: 2.0, 1280: 1.75, 1536: 1.75, 3200: 1.65}  # LlamaGen's own for its FID, by hidden_size
OTHER_GUIDANCE = 2.0
DRAWN = 128  # pictures that quality is judged by: few, so that it says the interval and the bias with them
NULL_EVERY = 10  # one sample of so many has no class, as in LlamaGen's training: guidance runs half of each batch so
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
        """What makes two runs the same run."""
        features = self.features and hashlib.sha256(self.features.read_bytes()).hexdigest()
        return [self.codec.fingerprint, self.sampling.cfg, self.count, features]

    def at_once(self, batch: int) -> int:
        """Pictures in a batch of so many sequences."""
        return batch // self.sampling.streams

    def size(self, picture: Picture) -> int:
        """Pixels of a side."""
        return picture.side * self.codec.downsample


def checked_guidance(picture: Picture, cfg: float) -> float:
    """Raises InputError for guidance that is none, or that the model was not trained for."""
    if not 1 <= cfg < float("inf"):
        raise InputError(f"--cfg {cfg:g} is not 1 or more", "1 is no guidance; try 1.75.")
    if cfg > 1 and not picture.is_guided:
        what = "null class" if picture.num_classes else "classes"
        raise InputError(f"--cfg {cfg:g}, but this model has no {what} to guide with", "Leave --cfg out.")
    return cfg


def sampling_of(decoder: Decoder, cfg: float | None) -> Sampling:
    """How pictures are drawn in deployment; cfg: None where the user left it out. Raises InputError."""
    if cfg is None:
        guided = decoder.picture.is_guided
        cfg = GUIDANCE.get(decoder.hidden_size, OTHER_GUIDANCE) if guided else 1.0
    return Sampling(cfg=checked_guidance(decoder.picture, cfg))


def check_kind(request: Request, decoder: Decoder) -> None:
    """Raises InputError for an option that a model of this kind has no use for."""
    pictures = {"codec": request.codec, "cfg": request.cfg, "images": request.images, "features": request.features}
    texts = {"prompt": request.prompt, "context": request.context, "length": request.length}
    if decoder.picture is None:
        if given := [name for name, value in pictures.items() if value is not None]:
            raise InputError(
                f"--{given[0]} is for image generators, {request.model} is a language model", f"Leave --{given[0]} out."
            )
        return
    if given := [name for name, value in texts.items() if value is not None]:
        raise InputError(
            f"--{given[0]} is for texts: {request.model} draws pictures, each of {decoder.picture.tokens} tokens",
            f"Leave --{given[0]} out.",
        )
    if request.vocabulary != "full":
        raise InputError("--vocabulary samples is for texts: every code may be drawn", "Leave --vocabulary out.")


def imaging_of(request: Request, model: Model) -> Imaging:
    """Raises InputError for a codec that is missing or is not the model's."""
    from edgeprune.model.codec.codec import check_codec, clusters_of, load_codec

    codec, count, features = request.codec, request.images, request.features
    decoder = model.decoder
    if count is not None and count < FEWEST_IMAGES:
        raise InputError(
            f"--images {count} is less than {FEWEST_IMAGES}", f"Give {FEWEST_IMAGES} or more; hundreds say something."
        )
    if features is not None:
        load_network(features)  # before any long work
    if decoder.family == "imagegpt":
        if codec is not None:
            raise InputError("--codec with an ImageGPT, whose colours are its codec", "Leave --codec out.")
        found = clusters_of(model.directory)
    elif codec is None:
        raise InputError(
            f"{model.name} draws codes, and no codec is given to make pixels of them",
            "Give LlamaGen's: --codec vq_ds16_c2i.pt.",
        )
    else:
        found = load_codec(codec)
    check_codec(found, decoder)
    downsample = read_config(model.directory).get("downsample_size", found.downsample)
    if downsample != found.downsample:
        raise InputError(
            f"the codec makes {found.downsample} pixels a side of a code, {model.name} was trained on {downsample}",
            "Give the codec that the model was trained with.",
        )
    imaging = Imaging(found, sampling_of(decoder, request.cfg), count or DRAWN, features)
    size = imaging.size(decoder.picture)
    if request.image_size not in (None, size):
        raise InputError(
            f"--image-size {request.image_size}, but this codec makes {size} pixels of {decoder.picture.side} codes",
            "Give the codec that the model was trained with.",
        )
    return imaging


def class_labels(picture: Picture, count: int, seed: int) -> list[int | None]:
    """Classes in turn, in a drawn order; none where there are none."""
    if not picture.num_classes:
        return [None] * count
    generator = np.random.default_rng(seed)
    rounds = -(-count // picture.num_classes)
    return np.concatenate([generator.permutation(picture.num_classes) for _ in range(rounds)])[:count].tolist()


def sample_labels(picture: Picture, labels: Sequence[int | None]) -> list[int | None]:
    """The labels with none in every tenth place, where the model knows that: what the guided half of a batch sees."""
    if not picture.has_null:
        return [*labels]
    return [None if (place + 1) % NULL_EVERY == 0 else label for place, label in enumerate(labels)]


def documents_of(decoder: Decoder, labels: Sequence[int | None], codes: np.ndarray) -> np.ndarray:
    """codes (pictures, tokens) -> ids (pictures, 1 + tokens) int64: each behind the token that begins it."""
    openings = [decoder.picture.opening(decoder.vocab_size, label) for label in labels]
    return np.concatenate([np.array(openings, np.int64)[:, None], codes.astype(np.int64)], axis=1)


def read_codes(folder: Path, decoder: Decoder, imaging: Imaging, most: int, seed: int) -> np.ndarray:
    """Up to so many pictures of a folder, drawn by seed -> documents (pictures, 1 + tokens) int64.

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
    """Ids to calibrate on (samples, tokens), None where the model is to draw them; documents to evaluate on, by
    name; and where they are from. Raises InputError."""
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
