"""A small random model for checks of a device: its graphs in every dialect and weight format, and its logits.

Its weights are drawn, so that nothing has to be downloaded and nothing of the user's is sent. It does not know the
device.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.engine.onnx.graph import GraphVariant, write_graphs
from edgeprune.engine.onnx.nodes import Dialect
from edgeprune.model.decoder import Attention, Decoder, Layer, Mlp, Rotary
from edgeprune.ondevice.figures import Workload
from edgeprune.ondevice.reference import PROMPT, STEPS, save_reference
from edgeprune.precision import GraphPrecision, WeightFormat

if TYPE_CHECKING:
    import torch

    from edgeprune.model.quantised import QuantisedWeight

WORKLOAD = Workload(batch=1, prompt=PROMPT, context=128)
DEVIATION = 0.05  # of the weights


def small_decoder(form: WeightFormat | None = None, tables: WeightFormat | None = None) -> Decoder:
    """Returns a decoder of two layers, the second one with a window, whose widths every format's groups divide."""
    rotary = Rotary(tuple(10000.0 ** (-pair / 32) for pair in range(32)))
    windows = (None, PROMPT // 2)
    layers = tuple(Layer(Attention(4, 2, 64, rotary, window=window), Mlp(512)) for window in windows)
    return Decoder("llama", 256, 512, 4096, 1e-5, True, layers).with_format(form, tables)


class RandomWeights(Mapping):
    """Weights of a Decoder in its formats, each drawn from its name when it is read; dtype: of those in floats."""

    def __init__(self, decoder: Decoder, dtype: str = "float32") -> None:
        self._shapes, self._formats, self._dtype = decoder.shapes(), decoder.weight_formats, dtype

    def __getitem__(self, name: str) -> torch.Tensor | QuantisedWeight:
        import torch

        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        form = self._formats.get(name)
        if form is None:
            return (DEVIATION * torch.randn(shape, generator=generator)).to(getattr(torch, self._dtype))
        return _codes(form, shape, generator)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def _codes(form: WeightFormat, shape: Sequence[int], generator: torch.Generator) -> QuantisedWeight:
    """Returns a matrix of codes (out_features, in_features) that are spread evenly, with scales of about one size."""
    import torch

    from edgeprune.model.levels import codes_of, nearest, nearest_e4m3
    from edgeprune.model.quantised import QuantisedWeight, storable

    def drawn(least: int, most: int, *size: int) -> torch.Tensor:
        return torch.randint(least, most + 1, size, generator=generator)

    rows, columns = shape
    groups = form.groups_of(columns)
    step = DEVIATION * 3**0.5 / form.most  # of numbers from -most to most, each as likely
    scales = storable(step * (0.75 + 0.5 * torch.rand(rows, groups, generator=generator)), form.offset is not None)
    zeros = drawn(-2, 2, rows, groups).to(torch.int8) if form.offset == "zero" else None
    minima = scales * drawn(-2, 2, rows, groups) if form.offset == "minimum" else None
    unit = torch.tensor(2.0**-12) if form.e4m3_scales else None
    if unit is not None:
        scales = nearest_e4m3(scales / unit) * unit
    # Fine: what lies beyond is cut off alike everywhere, and a code more or less, by which fp16 differs, matters less.
    of_inputs = torch.tensor(2.0**-7) if form.activation_bits else None
    levels = nearest(drawn(form.least, form.most, rows, columns).float(), form.levels, form.least, form.most)
    return QuantisedWeight(form, codes_of(levels, form.levels), scales, zeros, of_inputs, minima, scale_unit=unit)


@dataclass(frozen=True)
class SmallModel:
    """The files of the small model in one weight format: the graph of each dialect, and the expected logits."""

    decoder: Decoder
    graphs: dict[str, Path]
    reference: Path


def write_small_model(
    folder: Path,
    precision: GraphPrecision,
    dialects: Sequence[Dialect],
    form: WeightFormat | None,
    tables: WeightFormat | None,
) -> SmallModel:
    """Writes the graphs in a precision, and the logits of our own walk in fp32, which no engine computed."""
    decoder = small_decoder(form, tables)
    weights = RandomWeights(decoder, "bfloat16" if precision == "bf16" else "float32")
    variants = [GraphVariant(dialect, "last") for dialect in dialects]
    files = write_graphs(decoder, weights, folder, precision, variants)
    # The walk gives no logits of the last token.
    ids = np.random.default_rng(0).integers(0, decoder.vocab_size, (1, PROMPT + STEPS + 1))
    logits = _logits(decoder, weights, ids)[PROMPT - 1 :]
    save_reference(ids[:, :-1], logits, folder / "reference.npz", decoder.rounded_states)
    graphs = {variant.dialect: path for variant, path in files.graphs.items()}
    return SmallModel(decoder, graphs, folder / "reference.npz")


def updates_in_place(graph: Path) -> bool:
    """Returns whether a graph writes new keys and values into the buffer that it reads the past from."""
    import onnx

    nodes = onnx.load(graph, load_external_data=False).graph.node
    return any(node.op_type in ("TensorScatter", "GroupQueryAttention") for node in nodes)


def _logits(decoder: Decoder, weights: RandomWeights, ids: np.ndarray) -> np.ndarray:
    """Returns the logits (tokens - 1, vocabulary) of ids (1, tokens), those of the last token left out."""
    import torch

    from edgeprune.model.forward import token_logits

    with torch.inference_mode():
        return token_logits(decoder, weights.items(), torch.from_numpy(ids)).numpy()[0]
