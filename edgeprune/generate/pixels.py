"""Pixels: codes decoded by the codec's graph, grids, PNG files, and folders of images. It knows nothing about models.

Pixels are uint8 (n, height, width, 3); images are fp32 (n, 3, height, width), nominally in [-1, 1].
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.errors import EngineError, InputError
from edgeprune.files import write_bytes
from edgeprune.ondevice.onnxruntime import open_session

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
# Decoded together: 4 images of 256 x 256, which take some 100 MB each.
PIXELS_AT_ONCE = 1 << 18
GIVE = "Give a folder of png, jpg or webp images; subfolders named by a number are classes."


class CodecRunner:
    """The codec's graph in ONNX Runtime on the processor."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        """Loads the graph. Raises EngineError where ONNX Runtime cannot load it."""
        self._session = open_session(path, threads)
        height, width = self._session.get_outputs()[0].shape[2:]
        self._at_once = max(1, PIXELS_AT_ONCE // (height * width))

    def pixels(self, codes: np.ndarray) -> np.ndarray:
        """Returns pixels (n, height, width, 3) of codes (n, tokens) of an integer type, n >= 1.

        They are decoded some images at a time.
        """
        codes = np.ascontiguousarray(codes, np.int64)
        starts = range(0, len(codes), self._at_once)
        return np.concatenate([self._decoded(codes[start : start + self._at_once]) for start in starts])

    def _decoded(self, codes: np.ndarray) -> np.ndarray:
        try:
            (images,) = self._session.run(["image"], {"codes": codes})
        except Exception as error:  # ONNX Runtime's own exceptions share no public base
            raise EngineError(
                f"ONNX Runtime failed to decode codes of shape {codes.shape}: {error}",
                "Export the codec again, or give codes that it knows.",
            ) from None
        return to_pixels(images)


def to_pixels(images: np.ndarray) -> np.ndarray:
    """Returns pixels (n, h, w, 3) of images (n, 3, h, w): 127.5 x + 128, truncated, which rounds."""
    scaled = (127.5 * images + 128).clip(0, 255).astype(np.uint8)  # (n, 3, h, w)
    return np.ascontiguousarray(scaled.transpose(0, 2, 3, 1))


def to_images(pixels: np.ndarray) -> np.ndarray:
    """Returns images (n, 3, h, w) in [-1, 1] of pixels (n, h, w, 3)."""
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32) / np.float32(127.5) - np.float32(1)


def grid(pixels: np.ndarray, columns: int | None = None) -> Image.Image:
    """Returns one image of pixels (n, h, w, 3), n >= 1, side by side in rows.

    By default there are as many columns as rows, or one more. Places that are left over are white.
    """
    from PIL import Image

    count, height, width, colours = pixels.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = -(-count // columns)
    places = np.full((rows * columns, height, width, colours), 255, np.uint8)  # (rows * columns, h, w, 3)
    places[:count] = pixels
    sheet = places.reshape(rows, columns, height, width, colours).swapaxes(1, 2)  # (rows, h, columns, w, 3)
    return Image.fromarray(sheet.reshape(rows * height, columns * width, colours))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def check_picture(path: Path, force: bool) -> None:
    """Raises InputError for a file that cannot be written, or that exists where `force` is not set."""
    if path.exists() and not (force and path.is_file()):
        raise InputError(f"{path} exists already", "Name another --output, or replace it with --force.")
    if path.suffix.lower() != ".png":
        raise InputError(f"{path} must end in .png", f"Try --output {path.with_suffix('.png')}.")
    if not path.absolute().parent.is_dir():
        raise InputError(f"the folder {path.absolute().parent} does not exist", "Create it, or name another --output.")


def write_picture(image: Image.Image, path: Path) -> None:
    """Writes a PNG, complete or absent. Raises WriteError."""
    write_bytes(path, png(image))


def read_images(folder: Path, size: int, most: int | None = None, seed: int = 0) -> tuple[list[int | None], np.ndarray]:
    """Returns what `read_pixels` does, but images (n, 3, size, size) in [-1, 1] instead of pixels."""
    classes, pixels = read_pixels(folder, size, most, seed)
    return classes, to_images(pixels)


def read_pixels(folder: Path, size: int, most: int | None = None, seed: int = 0) -> tuple[list[int | None], np.ndarray]:
    """Returns classes and pixels (n, size, size, 3) of up to `most` images below a folder, in an order drawn by seed.

    The class is the number that names the first subfolder, None for any other name. Of each image the largest square in
    the middle is taken and resized (bicubic). Raises InputError for a folder without images, or a file that is not an
    image.
    """
    files = _files(folder)
    order = np.random.default_rng(seed).permutation(len(files))[:most]
    classes, pixels = [], np.empty((len(order), size, size, 3), np.uint8)
    for place, index in enumerate(order):
        path = files[index]
        classes.append(_class(path.relative_to(folder)))
        pixels[place] = _square(path, size)
    return classes, pixels


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder", GIVE)
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise InputError(f"{folder} holds no images", GIVE)
    return files


def _class(path: Path) -> int | None:
    first = path.parts[0]
    return int(first) if len(path.parts) > 1 and first.isascii() and first.isdecimal() else None


def _square(path: Path, size: int) -> np.ndarray:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except Exception as error:  # Pillow's readers raise various errors for a damaged file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"cannot read the image {path}: {reason}", "Restore the file, or remove it.") from None
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))
