"""Images as text that a journal and a page can hold. It knows no models."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

WIDEST = 1024  # pixels
LARGEST_PNG = 400_000  # bytes


def data_uri(image: Image.Image) -> str:
    """Returns an image as `data:image/png;base64,...`, at most WIDEST pixels wide; a large one becomes a JPEG.

    A PNG keeps every pixel, which a few small images need; a JPEG of large ones loses nothing that is visible.
    """
    from PIL import Image

    # Limit the width.
    image = image.convert("RGB")
    if image.width > WIDEST:
        height = max(1, round(image.height * WIDEST / image.width))
        image = image.resize((WIDEST, height), Image.Resampling.LANCZOS)
    # A PNG where it is small enough, else a JPEG.
    data = _encoded(image, "PNG")
    if len(data) <= LARGEST_PNG:
        return f"data:image/png;base64,{base64.b64encode(data).decode()}"
    data = _encoded(image, "JPEG", quality=90, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"


def _encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, optimize=True, **options)
    return buffer.getvalue()
