"""Pixels: codes decoded by the codec's graph, grids, PNG files, and folders of images. It knows nothing about models.

Pixels are uint8 (n, height, width, 3); images are fp32 (n, 3, height, width), nominally in [-1, 1].
"""

from __future__ import annotations

import io
import math
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgeprune.errors import EngineError, InputError
from edgeprune.files import check_output_file, is_pointer, pointer_error, printable, write_bytes
from edgeprune.ondevice.onnxruntime import open_session

if TYPE_CHECKING:
    from PIL import Image

# The only readers of Pillow that are tried, whatever a file's name: others start programs, as that of EPS does.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
OF_SYSTEMS = ("__macosx", "thumbs.db", "desktop.ini")  # beside a user's files; hidden ones are passed over as well
# Decoded together: 4 images of 256 x 256, which take some 100 MB each.
PIXELS_AT_ONCE = 1 << 18
MARK = "Software\0edgeprune"  # in the PNG files that are written
GIVE = "Give a folder of png, jpg, webp, bmp, gif or tiff images; subfolders named by a number are classes."


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
    """Returns the bytes of a PNG file, which names the program that wrote it."""
    from PIL.PngImagePlugin import PngInfo

    told = PngInfo()
    told.add_text("Software", "edgeprune")
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=told)
    return buffer.getvalue()


def check_picture(path: Path, force: bool) -> None:
    """Raises InputError for a file that cannot be written, or that exists and may not be replaced."""
    if path.suffix.lower() != ".png":
        raise InputError(f"{path} must end in .png", f"Try --output {path.with_suffix('.png')}.")
    check_output_file(path, "--output", MARK, force)


def write_picture(image: Image.Image, path: Path) -> None:
    """Writes a PNG, complete or absent. Raises WriteError."""
    write_bytes(path, png(image))


class Pictures(NamedTuple):
    """Pictures of a folder, in an order drawn by seed.

    classes: for each, the number that names a folder on its way, else its folder's name, None for none; pixels: (n,
    size, size, 3); of: pictures in the folder; others: other files there, by suffix.
    """

    classes: list[int | str | None]
    pixels: np.ndarray
    of: int
    others: dict[str, int]


def read_pixels(folder: Path, size: int, most: int | None = None, seed: int = 0) -> Pictures:
    """Returns up to `most` images below a folder.

    Of each image the largest square in the middle is taken and resized (bicubic); what is transparent is white. Raises
    InputError for a folder without images, or a file that is not an image.
    """
    files, others = _files(folder)
    order = np.random.default_rng(seed).permutation(len(files))[:most]
    classes, pixels = [], np.empty((len(order), size, size, 3), np.uint8)
    for place, index in enumerate(order):
        path = files[index]
        classes.append(_class(path.relative_to(folder)))
        pixels[place] = _square(path, size)
    return Pictures(classes, pixels, len(files), others)


def _files(folder: Path) -> tuple[list[Path], dict[str, int]]:
    """Returns the images below a folder, and how many other files there are, by suffix."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder", GIVE)
    files: list[Path] = []
    others: Counter[str] = Counter()
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if any(part.startswith(".") or part.lower() in OF_SYSTEMS for part in parts):
            continue
        if path.is_symlink() and not path.exists():  # as data sets have them whose content was not copied
            others["broken links"] += 1
        elif not path.is_file():
            continue
        elif (suffix := path.suffix.lower()) in SUFFIXES:
            files.append(path)
        else:
            others[suffix or "no suffix"] += 1
    if not files:
        held = ", ".join(f"{count} of {suffix}" for suffix, count in others.most_common(5))
        raise InputError(f"{folder} holds no images{', only ' + held if held else ''}", GIVE)
    return files, dict(others)


def _class(path: Path) -> int | str | None:
    """Returns the class of an image by its path in the folder: the number among the names, else the last name."""
    names = path.parts[:-1]
    numbers = [name for name in names if name.isascii() and name.isdecimal()]
    return int(numbers[0]) if numbers else names[-1] if names else None


def _square(path: Path, size: int) -> np.ndarray:
    """Returns the pixels (size, size, 3) of the largest square in the middle of an image."""
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # of twice its size, it is an error
            with Image.open(path, formats=FORMATS) as opened:
                ImageOps.exif_transpose(opened, in_place=True)
                image = _in_colours(_of_8_bits(opened))
    except Exception as error:  # Pillow's readers raise various errors for a damaged file
        if is_pointer(path):
            raise pointer_error(path) from None
        raise InputError(
            f"cannot read the image {path}: {printable(error, 200) or type(error).__name__}",
            "Restore the file, or remove it.",
        ) from None
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))


def _of_8_bits(image: Image.Image) -> Image.Image:
    """Returns an image of at most 8 bits a colour; Pillow itself cuts larger values instead of scaling them.

    Raises ValueError for values without a range.
    """
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        bits = image.tag_v2.get(258, (16,))[0] if image.format == "TIFF" else 16  # 258: BitsPerSample
        scaled = np.asarray(image).astype(np.float32) * (255 / (2**bits - 1))
        return Image.fromarray((scaled + 0.5).clip(0, 255).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("its values are of 32 bits and have no range: save it with 8 or 16 bits")
    return image


def _in_colours(image: Image.Image) -> Image.Image:
    """Returns an image in RGB, on white where it is transparent."""
    from PIL import Image

    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
