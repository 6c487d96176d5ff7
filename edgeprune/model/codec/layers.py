"""LlamaGen's VQ model as a list of steps, and the shape of every tensor that the steps read.

The shapes, torch and the graph are all derived from this one list. It knows nothing about files, torch or operators.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

GROUPS, NORM_EPS = 32, 1e-6  # of every group norm
CODEBOOK = "quantize.embedding.weight"
COLOURS = 3

Shape = tuple[int, ...]
Kind = Literal["point", "conv", "residual", "attention", "upsample", "downsample", "activation"]


class CodecStep(NamedTuple):
    """One step on a feature map (b, inputs, h, w), which then has `outputs` channels.

    point       1x1 convolution
    conv        3x3 convolution, padding 1
    residual    x + conv2(swish(norm2(conv1(swish(norm1(x)))))), x through `nin_shortcut` where the channels change
    attention   x + proj_out(attention of one head over all h * w positions of norm(x))
    upsample    nearest neighbour to twice the height and width, then `conv`
    downsample  a row of zeros below and a column of zeros on the right, then `conv` with stride 2
    activation  swish of the group norm; swish(x) = x * sigmoid(x)
    """

    kind: Kind
    name: str
    inputs: int
    outputs: int

    def shapes(self) -> dict[str, Shape]:
        """Returns the shape of every tensor of this step, by LlamaGen's names."""
        name, inputs, outputs = self.name, self.inputs, self.outputs
        match self.kind:
            case "point":
                return _conv(name, inputs, outputs, 1)
            case "conv":
                return _conv(name, inputs, outputs, 3)
            case "upsample" | "downsample":
                return _conv(f"{name}.conv", inputs, outputs, 3)
            case "activation":
                return _norm(name, inputs)
            case "attention":
                points = (_conv(f"{name}.{part}", inputs, outputs, 1) for part in ("q", "k", "v", "proj_out"))
                return _norm(f"{name}.norm", inputs) | {key: shape for point in points for key, shape in point.items()}
        # The remaining kind is a residual step.
        shapes = _norm(f"{name}.norm1", inputs) | _conv(f"{name}.conv1", inputs, outputs, 3)
        shapes |= _norm(f"{name}.norm2", outputs) | _conv(f"{name}.conv2", outputs, outputs, 3)
        return shapes | (_conv(f"{name}.nin_shortcut", inputs, outputs, 1) if inputs != outputs else {})


def _conv(name: str, inputs: int, outputs: int, kernel: int) -> dict[str, Shape]:
    return {f"{name}.weight": (outputs, inputs, kernel, kernel), f"{name}.bias": (outputs,)}


def _norm(name: str, channels: int) -> dict[str, Shape]:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


@dataclass(frozen=True)
class VqLayout:
    """The sizes of a VQ model; by default those of VQ-16.

    widths: channels of every level, that of most pixels first; each further level has half the height and width, and
    the last one has attention. stem: channels after the encoder's first convolution. residual_blocks: in each level of
    the encoder; the decoder has one more. latent: channels between codes and decoder.
    """

    stem: int = 128
    widths: tuple[int, ...] = (128, 128, 256, 256, 512)
    residual_blocks: int = 2
    codebook_size: int = 16384
    code_size: int = 8
    latent: int = 256

    @property
    def downsample(self) -> int:
        """Returns the pixels of a token in each direction."""
        return 2 ** (len(self.widths) - 1)

    def decoding(self) -> list[CodecStep]:
        """Returns steps from codebook rows (b, code_size, h, w) to images (b, 3, h * downsample, w * downsample)."""
        # From codes to the level of fewest pixels.
        last = self.widths[-1]
        steps = [
            CodecStep("point", "post_quant_conv", self.code_size, self.latent),
            CodecStep("conv", "decoder.conv_in", self.latent, last),
            *_middle("decoder", last),
        ]
        # Levels, each followed by twice the height and width except the last.
        for block, width in enumerate(reversed(self.widths)):
            name = f"decoder.conv_blocks.{block}"
            steps += _level(name, steps[-1].outputs, width, self.residual_blocks + 1, attends=block == 0)
            if block + 1 < len(self.widths):
                steps.append(CodecStep("upsample", f"{name}.upsample", width, width))
        return [*steps, *_end("decoder", self.widths[0], COLOURS)]

    def encoding(self) -> list[CodecStep]:
        """Returns the steps from images (b, 3, h, w) to (b, code_size, h / downsample, w / downsample).

        The code of a position is the codebook row that is nearest to its values there.
        """
        steps = [CodecStep("conv", "encoder.conv_in", COLOURS, self.stem)]
        for block, width in enumerate(self.widths):
            name, is_last = f"encoder.conv_blocks.{block}", block + 1 == len(self.widths)
            steps += _level(name, steps[-1].outputs, width, self.residual_blocks, attends=is_last)
            if not is_last:
                steps.append(CodecStep("downsample", f"{name}.downsample", width, width))
        last = self.widths[-1]
        quantising = CodecStep("point", "quant_conv", self.latent, self.code_size)
        return [*steps, *_middle("encoder", last), *_end("encoder", last, self.latent), quantising]

    def shapes(self, encoder: bool = True) -> dict[str, Shape]:
        """Returns the shape of every tensor by LlamaGen's names, with or without those that only the encoder reads."""
        shapes: dict[str, Shape] = {CODEBOOK: (self.codebook_size, self.code_size)}
        for step in self.decoding() + (self.encoding() if encoder else []):
            shapes |= step.shapes()
        return shapes


def _level(name: str, inputs: int, width: int, blocks: int, attends: bool) -> Iterator[CodecStep]:
    for index in range(blocks):
        yield CodecStep("residual", f"{name}.res.{index}", width if index else inputs, width)
        if attends:
            yield CodecStep("attention", f"{name}.attn.{index}", width, width)


def _middle(part: str, width: int) -> list[CodecStep]:
    kinds: tuple[Kind, ...] = ("residual", "attention", "residual")
    return [CodecStep(kind, f"{part}.mid.{index}", width, width) for index, kind in enumerate(kinds)]


def _end(part: str, inputs: int, outputs: int) -> list[CodecStep]:
    return [
        CodecStep("activation", f"{part}.norm_out", inputs, inputs),
        CodecStep("conv", f"{part}.conv_out", inputs, outputs),
    ]
