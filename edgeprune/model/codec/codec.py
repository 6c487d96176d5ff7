"""The codecs between codes and images: LlamaGen's VQ model from its file, ImageGPT's colours from its preprocessor's.

Images are (b, 3, h, w) fp32, nominally in [-1, 1]; codes are (b, n) int64, n = side * side, row by row. A codec knows
no model that draws its codes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from edgeprune.errors import InputError, NumericalError
from edgeprune.files import is_pointer, pointer_error, printable, read_json
from edgeprune.model.checkpoint.torch_file import tensors_of
from edgeprune.model.codec.layers import CODEBOOK, COLOURS, GROUPS, Shape, VqLayout
from edgeprune.model.decoder import Decoder

if TYPE_CHECKING:
    import torch

UNUSED = "quantize.codebook_used"  # the codes that training used last
PIXELS_AT_ONCE = 1 << 18  # of the images that pass through the VQ model together: 4 images of 256 x 256
PREPROCESSOR = "preprocessor_config.json"
GIVE = "Give LlamaGen's codec, such as vq_ds16_c2i.pt; the generator's own checkpoint is the model, not the codec."
RESTORE = f"Restore the checkpoint's own {PREPROCESSOR}: it holds the colours (`clusters`) and the `size`."


@dataclass(frozen=True)
class VqCodec:
    """LlamaGen's VQ model.

    weights: by LlamaGen's names, fp32, without the codebook. codebook: (vocab_size, code_size) fp32, rows of length 1.
    has_encoder: whether the file holds the encoder; without it codes can only be decoded.
    """

    layout: VqLayout
    weights: Mapping[str, torch.Tensor]
    codebook: torch.Tensor
    has_encoder: bool
    fingerprint: str  # sha256 of the file

    side: ClassVar[None] = None  # tokens a side: any number

    @property
    def vocab_size(self) -> int:
        return self.layout.codebook_size

    @property
    def downsample(self) -> int:
        """Returns the pixels of a token in each direction."""
        return self.layout.downsample

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Returns images (b, 3, h, w) fp32 of codes (b, side * side) int64, where h = w = side * downsample."""
        from edgeprune.model.codec.forward import walk

        side = side_of(codes, self.vocab_size)
        steps = self.layout.decoding()

        def decoded(piece: torch.Tensor) -> torch.Tensor:
            rows = self.codebook[piece].transpose(1, 2)  # (b, code_size, n)
            return walk(steps, self.weights, rows.unflatten(2, (side, side)).contiguous())  # (b, 3, h, w)

        return _in_pieces(decoded, codes, (side * self.downsample) ** 2)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the codes (b, n) int64 of images (b, 3, h, w) fp32: the codebook rows of the largest cosine.

        h and w are multiples of downsample. Raises InputError for other images, and where the file has no encoder.
        """
        from edgeprune.model.codec.forward import nearest, walk

        if not self.has_encoder:
            raise InputError(
                "the codec's file has no encoder, which turns images into codes",
                "Give the whole codec, such as vq_ds16_c2i.pt, or leave out the images.",
            )
        _check_images(images, self.downsample)
        steps = self.layout.encoding()

        def encoded(piece: torch.Tensor) -> torch.Tensor:
            rows = walk(steps, self.weights, piece).flatten(2).transpose(1, 2)  # (b, n, code_size)
            # Of rows of length 1 the nearest is the one of the largest cosine.
            rows = rows / rows.norm(dim=2, keepdim=True).clamp_min(1e-12)
            return nearest(rows.flatten(0, 1), self.codebook).view(len(piece), -1)  # (b, n)

        return _in_pieces(encoded, images, images.shape[2] * images.shape[3])


@dataclass(frozen=True)
class ClusterCodec:
    """ImageGPT's codes: one colour each. clusters: (vocab_size, 3) fp32 in [-1, 1]."""

    clusters: torch.Tensor
    side: int  # tokens a side, each of which is one pixel
    fingerprint: str  # sha256 of clusters and side

    downsample: ClassVar[int] = 1
    has_encoder: ClassVar[bool] = True

    @property
    def vocab_size(self) -> int:
        return self.clusters.shape[0]

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Returns images (b, 3, side, side) fp32 of codes (b, side * side) int64."""
        side = side_of(codes, self.vocab_size)
        # (b, n, 3) -> (b, 3, side, side)
        return self.clusters[codes].transpose(1, 2).unflatten(2, (side, side)).contiguous()

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the codes (b, h * w) int64 of images (b, 3, h, w) fp32: the nearest colours."""
        from edgeprune.model.codec.forward import nearest

        _check_images(images, 1)
        rows = images.flatten(2).transpose(1, 2)  # (b, h * w, 3)
        return nearest(rows.flatten(0, 1), self.clusters).view(len(images), -1)


Codec = VqCodec | ClusterCodec


def load_codec(path: Path) -> VqCodec:
    """Reads LlamaGen's VQ model from its .pt or from safetensors; every size follows from the shapes.

    The file is mapped: what is not fp32 is converted, the rest is read where it is used. Raises InputError for a file
    that is not such a model, naming the first tensor that is missing, has another shape or does not belong to it;
    NumericalError for a codebook that is not finite.
    """
    import torch

    if not path.is_file():
        raise InputError(f"{path} is not a file", GIVE)
    # Sizes from the shapes, then the types.
    stored = _safetensors(path) if path.suffix == ".safetensors" else tensors_of(path)
    stored.pop(UNUSED, None)
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    layout, has_encoder = _checked(path, shapes)
    for name, tensor in stored.items():
        if not tensor.is_floating_point():
            raise InputError(f"tensor {name} of {path} is of type {tensor.dtype}", "Give the codec's own fp32 file.")
    # Rows of length 1, as training used them.
    codebook = stored.pop(CODEBOOK).float()
    if not torch.isfinite(codebook).all():
        raise NumericalError(f"{CODEBOOK} of {path} holds values that are not finite", "Download the codec again.")
    codebook = codebook / codebook.norm(dim=1, keepdim=True).clamp_min(1e-12)  # (codebook_size, code_size)
    weights = {name: tensor.float() for name, tensor in stored.items()}
    with path.open("rb") as file:
        fingerprint = hashlib.file_digest(file, "sha256").hexdigest()
    return VqCodec(layout, weights, codebook, has_encoder, fingerprint)


def clusters_of(directory: Path) -> ClusterCodec:
    """Reads ImageGPT's colours and size from preprocessor_config.json. Raises InputError where they are missing."""
    import torch

    # The colours, (colours, 3) in [-1, 1].
    path = directory / PREPROCESSOR
    config = read_json(path, remedy=RESTORE)
    try:
        clusters = torch.tensor(config.get("clusters"), dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{path} has no table of colours in `clusters`", RESTORE) from None
    if clusters.ndim != 2 or clusters.shape[1] != COLOURS or not clusters.abs().le(1).all():
        shape = tuple(clusters.shape)
        raise InputError(f"`clusters` of {path} is not (colours, 3) in [-1, 1]: its shape is {shape}", RESTORE)
    # The side of the square image.
    side = _side(config.get("size"))
    if side is None:
        raise InputError(
            f"`size` of {path} is {printable(repr(config.get('size')))}, not that of a square image", RESTORE
        )
    digest = hashlib.sha256(clusters.numpy().tobytes() + str(side).encode())
    return ClusterCodec(clusters, side, digest.hexdigest())


def check_codec(codec: Codec, decoder: Decoder) -> None:
    """Raises InputError where the decoder draws other codes than the codec has, or images of another size."""
    if codec.vocab_size != decoder.vocab_size:
        raise InputError(
            f"the model draws {decoder.vocab_size} codes, the codec knows {codec.vocab_size}",
            "Give the codec that the model was trained with.",
        )
    if codec.side is not None and decoder.picture is not None and codec.side != decoder.picture.side:
        raise InputError(
            f"the model draws {decoder.picture.side} x {decoder.picture.side} codes, "
            f"`size` of {PREPROCESSOR} is {codec.side} x {codec.side}",
            RESTORE,
        )


def side_of(codes: torch.Tensor, vocab_size: int) -> int:
    """Returns the tokens a side of codes (b, side * side). Raises InputError where they are not a square of codes."""
    side = isqrt(codes.shape[1])
    if side * side != codes.shape[1] or side == 0:
        raise InputError(f"{codes.shape[1]} codes do not make a square image", "Give side * side codes of each image.")
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < vocab_size:
        raise InputError(
            f"codes reach from {int(codes.min())} to {int(codes.max())}, the codec knows 0 to {vocab_size - 1}",
            "Give the codec that the codes were made with.",
        )
    return side


def _check_images(images: torch.Tensor, downsample: int) -> None:
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[1] != COLOURS or 0 in shape[2:] or shape[2] % downsample or shape[3] % downsample:
        raise InputError(
            f"images of shape {shape} are not (images, 3, height, width) with sides that are multiples of {downsample}",
            "Read the images again with a size that the codec can divide.",
        )


def _in_pieces(convert: Callable[[torch.Tensor], torch.Tensor], values: torch.Tensor, pixels: int) -> torch.Tensor:
    """Returns `convert` of all values (b, ...), computed a few images at a time.

    The first and the last levels hold 128 channels of every pixel.
    """
    import torch

    return torch.cat([convert(piece) for piece in values.split(max(1, PIXELS_AT_ONCE // pixels))])


def _safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if is_pointer(path):
        raise pointer_error(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, OverflowError, MemoryError) as error:
        again = "Download the codec again."
        raise InputError(f"{path} is not a safetensors file or is truncated: {printable(error)}", again) from None


def _checked(path: Path, shapes: Mapping[str, Shape]) -> tuple[VqLayout, bool]:
    """Returns the sizes and whether there is an encoder, both from the shapes. Raises InputError naming a tensor."""
    has_encoder = any(name.startswith(("encoder.", "quant_conv.")) for name in shapes)
    layout = _layout(path, shapes, has_encoder)
    expected = layout.shapes(has_encoder)
    for name, shape in expected.items():
        if name not in shapes:
            raise InputError(f"{path} has no tensor {name}, which LlamaGen's codec has", GIVE)
        if shapes[name] != shape:
            raise InputError(f"tensor {name} of {path} has shape {shapes[name]}, LlamaGen's codec {shape}", GIVE)
    if unknown := sorted(shapes.keys() - expected.keys()):
        raise InputError(f"{path} has a tensor {unknown[0]}, which LlamaGen's codec does not have", GIVE)
    return layout, has_encoder


def _layout(path: Path, shapes: Mapping[str, Shape], has_encoder: bool) -> VqLayout:
    """Returns the sizes of the VQ model whose tensors have these shapes. Raises InputError."""

    def size(name: str, axis: int) -> int:
        if name not in shapes:
            raise InputError(f"{path} has no tensor {name}, which LlamaGen's codec has", GIVE)
        shape = shapes[name]
        if len(shape) <= axis or shape[axis] < 1:
            raise InputError(f"tensor {name} of {path} has shape {shape}", GIVE)
        return shape[axis]

    def count(prefix: str) -> int:
        return len({name.removeprefix(prefix).partition(".")[0] for name in shapes if name.startswith(prefix)})

    # The codebook, and the levels of the decoder, which stand there from few pixels to many.
    codebook_size, code_size = size(CODEBOOK, 0), size(CODEBOOK, 1)
    blocks = "decoder.conv_blocks."
    widths = [size(f"{blocks}{block}.res.0.conv1.weight", 0) for block in range(max(1, count(blocks)))]
    # The encoder's first convolution; without an encoder any width that the groups divide.
    stem = size("encoder.conv_in.weight", 0) if has_encoder else widths[-1]
    if odd := [width for width in (stem, *widths) if width % GROUPS]:
        raise InputError(f"{path} has levels of {odd[0]} channels, which {GROUPS} groups do not divide", GIVE)
    # The decoder has one residual block more in each level.
    residual_blocks = count(f"{blocks}0.res.") - 1
    latent = size("post_quant_conv.weight", 0)
    return VqLayout(stem, tuple(reversed(widths)), residual_blocks, codebook_size, code_size, latent)


def _side(size: Any) -> int | None:
    """Returns the side of a square image, else None.

    transformers writes {"height": 32, "width": 32}, older files have 32.
    """
    height, width = (size.get("height"), size.get("width")) if isinstance(size, dict) else (size, size)
    return height if type(height) is int and height > 0 and height == width else None
