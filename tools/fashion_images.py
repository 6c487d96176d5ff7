"""Fashion-MNIST from the files of the package dataset-fashion-mnist."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgeprune.errors import InputError

DATASET = Path("/usr/share/datasets/fashion-mnist")
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
MIRRORED = (0, 1, 2, 3, 4, 6, 8)  # classes whose mirror image is as likely; every shoe points to the left
SIDE = 28  # pixels


@dataclass(frozen=True)
class Images:
    """Images with their classes.

    pixels: (n, 3, 28, 28) fp32 in [-1, 1], grey in three channels; classes: (n) int64.
    """

    pixels: Tensor
    classes: Tensor

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, rows: slice | Tensor) -> Images:
        return Images(self.pixels[rows], self.classes[rows])


def read_images(folder: Path, part: str) -> Images:
    """Returns the images of a part: `train` (60000 images) or `t10k` (10000).

    Raises InputError where a file is missing, broken or of another length.
    """
    arrays = []  # the bytes of the images, then those of the classes
    for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
        path = folder / f"{part}-{kind}-ubyte.gz"
        if not path.is_file():
            raise InputError(
                f"{path} is missing", "Run `apt-get install dataset-fashion-mnist`, or give --dataset FOLDER."
            )
        try:
            arrays.append(np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header))
        except (OSError, EOFError, ValueError) as error:
            raise InputError(f"{path} cannot be read: {error}", "Install or download the data set again.") from error
    pixels, classes = arrays  # (n * 784,), (n,)
    if len(pixels) != len(classes) * SIDE**2:
        raise InputError(f"{folder}: {len(pixels)} pixels for {len(classes)} classes", "Install the data set again.")
    grey = torch.from_numpy(pixels.reshape(-1, 1, SIDE, SIDE).astype(np.float32) / 127.5 - 1)
    return Images(grey.expand(-1, 3, -1, -1), torch.from_numpy(classes.astype(np.int64)))


def mirrored(images: Images) -> Images:
    """Returns the images, and behind them the mirror images of the classes that have them."""
    rows = torch.isin(images.classes, torch.tensor(MIRRORED))
    grey = images.pixels[:, :1]  # one channel is held, three are seen
    pixels = torch.cat([grey, grey[rows].flip(-1)]).expand(-1, 3, -1, -1)
    return Images(pixels, torch.cat([images.classes, images.classes[rows]]))
