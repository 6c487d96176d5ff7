"""Guidance and class labels of image generators, and codes as documents."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgeprune.errors import InputError
from edgeprune.model.decoder import Decoder, Picture
from edgeprune.ondevice.guided_sampling import Sampling

GUIDANCE = {768: 2.0, 1024: 2.0, 1280: 1.75, 1536: 1.75, 3200: 1.65}  # LlamaGen's own for its FID, by hidden_size
OTHER_GUIDANCE = 2.0
NULL_EVERY = 10  # one sample of so many has no class, as in LlamaGen's training: guidance runs half of each batch so


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
