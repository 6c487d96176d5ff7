"""Writes the folder of an image generator's codec: its graph, and how pictures are sampled."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from edgeprune.generate.images import CODEC_GRAPH, DESCRIPTION, Drawn
from edgeprune.model.decoder import Decoder
from edgeprune.pipeline.imaging import Imaging


def write_codec_folder(folder: Path, decoder: Decoder, imaging: Imaging) -> Path:
    """Writes a bundle's folder with the codec's graph and how codes are description; returns the folder."""
    from edgeprune.engine.onnx.codec import write_codec

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_codec(imaging.codec, decoder.picture.side, folder / CODEC_GRAPH)
    description = Drawn(**asdict(decoder.picture), vocab_size=decoder.vocab_size, cfg=imaging.sampling.cfg)
    (folder / DESCRIPTION).write_text(json.dumps(asdict(description), indent=2) + "\n", encoding="utf-8")
    return folder
