"""Guidance and class labels of image generators, and codes as documents. It knows no graph and no images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgeprune.errors import InputError
from edgeprune.model.decoder import Decoder, Picture
from edgeprune.ondevice.guided_sampling import Sampling

# LlamaGen's own scales for its FID, by hidden_size.
GUIDANCE = {768: 2.0, 1024: 2.0, 1280: 1.75, 1536: 1.75, 3200: 1.65}
OTHER_GUIDANCE = 2.0
# One sample in so many has no class, as in LlamaGen's training: guidance runs half of each batch that way.
NULL_EVERY = 10


def checked_guidance(picture: Picture, cfg: float) -> float:
    """Returns a scale of guidance. Raises InputError for one below 1, or one that the model was not trained for."""
    if not 1 <= cfg < float("inf"):
        raise InputError(f"--cfg {cfg:g} is not 1 or more", "1 is no guidance; try 1.75.")
    if cfg > 1 and not picture.is_guided:
        missing = "null class" if picture.num_classes else "classes"
        raise InputError(f"--cfg {cfg:g}, but this model has no {missing} to guide with", "Leave --cfg out.")
    return cfg


def sampling_of(decoder: Decoder, cfg: float | None) -> Sampling:
    """Returns how images are drawn in deployment. cfg: None where the user gave none. Raises InputError."""
    if cfg is None:
        is_guided = decoder.picture.is_guided
        cfg = GUIDANCE.get(decoder.hidden_size, OTHER_GUIDANCE) if is_guided else 1.0
    return Sampling(cfg=checked_guidance(decoder.picture, cfg))


def class_labels(picture: Picture, count: int, seed: int) -> list[int | None]:
    """Returns a class for each of so many images: all in turn, by rounds in a drawn order; None without classes."""
    if not picture.num_classes:
        return [None] * count
    # Every round has each class once.
    generator = np.random.default_rng(seed)
    rounds = -(-count // picture.num_classes)
    return np.concatenate([generator.permutation(picture.num_classes) for _ in range(rounds)])[:count].tolist()


def sample_labels(picture: Picture, labels: Sequence[int | None]) -> list[int | None]:
    """Returns the labels with None in every tenth place, where the model knows images without a class.

    These are what the guided half of a batch sees.
    """
    if not picture.has_null:
        return [*labels]
    return [None if (place + 1) % NULL_EVERY == 0 else label for place, label in enumerate(labels)]


def documents_of(decoder: Decoder, labels: Sequence[int | None], codes: np.ndarray) -> np.ndarray:
    """Returns ids (images, 1 + tokens) int64 of codes (images, tokens): each after the token that begins it."""
    openings = [decoder.picture.opening(decoder.vocab_size, label) for label in labels]
    return np.concatenate([np.array(openings, np.int64)[:, None], codes.astype(np.int64)], axis=1)
