"""Guidance by default and on demand, and the classes of samples."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from edgeprune.errors import InputError
from edgeprune.generate.guidance import checked_guidance, class_labels, documents_of, sample_labels, sampling_of
from edgeprune.model.decoder import Picture
from tests.support.picture_decoders import CODES, SIDE, decoder


def test_every_class_is_drawn_as_often_and_every_tenth_picture_has_none() -> None:
    labels = class_labels(Picture(SIDE, 10), 40, 0)
    assert Counter(labels) == dict.fromkeys(range(10), 4)
    assert labels[:10] != labels[10:20]  # the order is drawn
    assert labels == class_labels(Picture(SIDE, 10), 40, 0) != class_labels(Picture(SIDE, 10), 40, 1)
    with_none = sample_labels(Picture(SIDE, 10), labels)
    assert [place for place, label in enumerate(with_none) if label is None] == [9, 19, 29, 39]
    assert all(new in (None, old) for new, old in zip(with_none, labels, strict=True))
    assert sample_labels(Picture(SIDE, 10, has_null=False), labels) == labels
    assert class_labels(Picture(SIDE, 0), 3, 0) == [None] * 3


def test_guidance_is_the_published_one_or_what_was_asked_for() -> None:
    assert sampling_of(decoder(hidden=3200), None).cfg == 1.65
    assert sampling_of(decoder(), None).cfg == 2.0
    assert sampling_of(decoder(), 3.5).streams == 2
    assert sampling_of(decoder(), 1.0).streams == 1
    assert sampling_of(decoder(classes=0), None).cfg == 1.0
    for picture, cfg in ((Picture(SIDE, 10), 0.5), (Picture(SIDE, 10, has_null=False), 2.0), (Picture(SIDE, 0), 2.0)):
        with pytest.raises(InputError, match="--cfg"):
            checked_guidance(picture, cfg)


def test_a_document_is_the_token_of_its_class_and_its_codes() -> None:
    codes = np.arange(3 * SIDE**2, dtype=np.int32).reshape(3, -1)
    ids = documents_of(decoder(), [7, None, 0], codes)
    assert (ids.dtype, ids.shape) == (np.int64, (3, 1 + SIDE**2))
    assert ids[:, 0].tolist() == [CODES + 7, CODES + 10, CODES]
    assert (ids[:, 1:] == codes).all()
    assert documents_of(decoder(classes=0), [None], codes[:1])[0, 0] == CODES
