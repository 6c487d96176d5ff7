"""The architecture of a decoder-only transformer as plain data.

Pruning, cost and graph share this one description; the dense model and every candidate are
Decoders and differ only in numbers. It knows nothing about weights, files or runtimes.

Weights are named by their place, in nn.Linear layout (out_features, in_features):

    embedding                   (vocab_size, hidden_size)
    layers.{i}.attention.norm   (hidden_size,)
    layers.{i}.attention.q      (num_attention_heads * head_dim, hidden_size)
    layers.{i}.attention.k      (num_key_value_heads * head_dim, hidden_size)
    layers.{i}.attention.v      (num_key_value_heads * head_dim, hidden_size)
    layers.{i}.attention.o      (hidden_size, num_attention_heads * head_dim)
    layers.{i}.attention.o_bias (hidden_size,), where output_bias is set
    layers.{i}.mlp.norm         (hidden_size,)
    layers.{i}.mlp.gate, .up    (intermediate_size, hidden_size)
    layers.{i}.mlp.down         (hidden_size, intermediate_size)
    layers.{i}.mlp.down_bias    (hidden_size,), where output_bias is set
    norm                        (hidden_size,)
    head                        (vocab_size, hidden_size), absent where tied to the embedding
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention: query head h reads the key/value head h // heads_per_group."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int

    @property
    def heads_per_group(self) -> int:
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        return self.num_key_value_heads * self.head_dim


@dataclass(frozen=True)
class Mlp:
    """Gated MLP: down(silu(gate(x)) * up(x))."""

    intermediate_size: int


@dataclass(frozen=True)
class Layer:
    attention: Attention | None
    mlp: Mlp | None


@dataclass(frozen=True)
class Rotary:
    """Rotate-half position embedding: angle of pair m at position p is p * inverse_frequencies[m].

    cos and sin are multiplied by `scaling` (the attention factor of some rope scalings, else 1).
    """

    inverse_frequencies: tuple[float, ...]
    scaling: float = 1.0


@dataclass(frozen=True)
class Decoder:
    family: str
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    norm_eps: float
    tie_word_embeddings: bool
    rotary: Rotary
    layers: tuple[Layer, ...]
    output_bias: bool = False  # of both output projections: what FLAP's compensation leaves

    @property
    def is_uniform(self) -> bool:
        """Every layer has the same widths, so that a plain configuration describes it."""
        return len(set(self.layers)) <= 1

    def with_widths(self, num_key_value_heads: int, heads_per_group: int, intermediate_size: int) -> Decoder:
        """The same model with these widths in every layer (layout `uniform`)."""
        return self.with_layer_widths([(num_key_value_heads, heads_per_group, intermediate_size)] * len(self.layers))

    def with_layer_widths(self, widths: Sequence[tuple[int, int, int]]) -> Decoder:
        """The same model with these key/value heads, query heads in each group and MLP channels of every
        layer; 0 key/value heads or 0 channels leave the layer without that module."""
        layers = tuple(
            Layer(
                layer.attention and _narrowed(layer.attention, groups, heads) if groups else None,
                layer.mlp and replace(layer.mlp, intermediate_size=channels) if channels else None,
            )
            for layer, (groups, heads, channels) in zip(self.layers, widths, strict=True)
        )
        return replace(self, layers=layers)

    @property
    def layer_widths(self) -> list[tuple[int, int, int]]:
        """What `with_layer_widths` takes to make this model from a wider one."""
        return [
            (
                layer.attention.num_key_value_heads if layer.attention else 0,
                layer.attention.heads_per_group if layer.attention else 1,
                layer.mlp.intermediate_size if layer.mlp else 0,
            )
            for layer in self.layers
        ]

    def with_vocabulary(self, size: int) -> Decoder:
        """The same model with this many rows in embedding and head."""
        return replace(self, vocab_size=size)

    def compact(self) -> Decoder:
        """The same model without the layers that have neither attention nor MLP."""
        return replace(self, layers=tuple(layer for layer in self.layers if layer.attention or layer.mlp))

    def layer_shapes(self, index: int) -> dict[str, tuple[int, ...]]:
        """Shape of every weight of one layer, by its full name, in the order above."""
        hidden, layer, prefix = self.hidden_size, self.layers[index], f"layers.{index}."
        shapes: dict[str, tuple[int, ...]] = {}
        if (attention := layer.attention) is not None:
            shapes |= {
                prefix + "attention.norm": (hidden,),
                prefix + "attention.q": (attention.query_size, hidden),
                prefix + "attention.k": (attention.key_value_size, hidden),
                prefix + "attention.v": (attention.key_value_size, hidden),
                prefix + "attention.o": (hidden, attention.query_size),
            }
            if self.output_bias:
                shapes[prefix + "attention.o_bias"] = (hidden,)
        if (mlp := layer.mlp) is not None:
            shapes |= {
                prefix + "mlp.norm": (hidden,),
                prefix + "mlp.gate": (mlp.intermediate_size, hidden),
                prefix + "mlp.up": (mlp.intermediate_size, hidden),
                prefix + "mlp.down": (hidden, mlp.intermediate_size),
            }
            if self.output_bias:
                shapes[prefix + "mlp.down_bias"] = (hidden,)
        return shapes

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight of the model, by name, in the order in which they are used."""
        shapes: dict[str, tuple[int, ...]] = {"embedding": (self.vocab_size, self.hidden_size)}
        for index in range(len(self.layers)):
            shapes |= self.layer_shapes(index)
        shapes["norm"] = (self.hidden_size,)
        if not self.tie_word_embeddings:
            shapes["head"] = (self.vocab_size, self.hidden_size)
        return shapes

    @property
    def parameters(self) -> int:
        return sum(map(prod, self.shapes().values()))

    @property
    def layer_parameters(self) -> int:
        """Parameters of the attention and MLP matrices: what the pruning ratio counts."""
        return sum(
            prod(shape)
            for index in range(len(self.layers))
            for shape in self.layer_shapes(index).values()
            if len(shape) == 2
        )

    def cache_elements(self, batch: int, context: int) -> int:
        """Elements of the key/value cache, keys and values of all layers, at `context` tokens."""
        width = sum(layer.attention.key_value_size for layer in self.layers if layer.attention)
        return 2 * batch * context * width


def _narrowed(attention: Attention, groups: int, heads_per_group: int) -> Attention:
    return replace(attention, num_attention_heads=groups * heads_per_group, num_key_value_heads=groups)


def ratio(candidate: Decoder, dense: Decoder) -> float:
    """Removed share of the parameters in attention and MLP matrices, 0 to 1."""
    return 1.0 - candidate.layer_parameters / dense.layer_parameters
