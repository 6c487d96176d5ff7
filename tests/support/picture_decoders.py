"""A decoder of pictures without layers: what guidance and samples are tested on."""

from __future__ import annotations

from edgeprune.model.decoder import Decoder, Picture

CODES, SIDE = 64, 4


def decoder(classes: int = 10, has_null: bool = True, hidden: int = 32) -> Decoder:
    return Decoder("llamagen", hidden, CODES, 17, 1e-5, False, (), picture=Picture(SIDE, classes, has_null))
