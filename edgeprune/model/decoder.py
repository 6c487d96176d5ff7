"""The architecture of a decoder-only transformer as plain data.

Pruning, cost and graph share this one description; the dense model and every candidate are
Decoders and differ only in numbers. It knows nothing about weights, files or runtimes.

Weights are named by their place, in nn.Linear layout (out_features, in_features); those in brackets are
there where the description says so:

    embedding                       (vocab_size, hidden_size), of an image generator input_vocab_size rows
    [positions]                     (max_position_embeddings, hidden_size)
    layers.{i}.attention.[norm]     (hidden_size,)
    layers.{i}.attention.q          (num_attention_heads * head_dim, hidden_size)
    layers.{i}.attention.k, .v      (num_key_value_heads * head_dim, hidden_size)
    layers.{i}.attention.[q_bias, k_bias, v_bias]
    layers.{i}.attention.[q_norm, k_norm]  (head_dim,), or as wide as all heads
    layers.{i}.attention.o          (hidden_size, num_attention_heads * head_dim)
    layers.{i}.attention.[o_bias, post_norm]  (hidden_size,)
    layers.{i}.mlp.[norm]           (hidden_size,)
    layers.{i}.mlp.[gate], .up      (intermediate_size, hidden_size)
    layers.{i}.mlp.[gate_bias, up_bias]
    layers.{i}.mlp.down             (hidden_size, intermediate_size)
    layers.{i}.mlp.[down_bias, post_norm]  (hidden_size,)
    norm                            (hidden_size,)
    [head]                          (vocab_size, hidden_size), absent where tied to the embedding

A LayerNorm has a bias behind its weight, named `..norm_bias`. Of a mixture of experts the MLP's matrices are
`mlp.router` (num_experts, hidden_size) and, for every expert, `mlp.experts.{e}.gate`, `.up` and `.down`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal


@dataclass(frozen=True)
class Grid:
    """Positions on a picture: behind a prefix, which has no place there, token j stands in row j // side, column
    j % side."""

    prefix: int
    side: int

    @property
    def positions(self) -> int:
        return self.prefix + self.side**2


@dataclass(frozen=True)
class Rotary:
    """Rotate-half position embedding: angle of pair m at position p is p * inverse_frequencies[m].

    The first 2 * len(inverse_frequencies) dimensions of a head turn, the others stay as they are. cos and sin
    are multiplied by `scaling` (the attention factor of some rope scalings, else 1). On a grid the first half of the
    pairs turns by the row, the second by the column; at the prefix cos and sin are both 0: queries and keys become
    zero vectors.
    """

    inverse_frequencies: tuple[float, ...]
    scaling: float = 1.0
    grid: Grid | None = None


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention: query head h reads the key/value head h // heads_per_group.

    rotary: None for an attention without rotary positions. scale: of the scores, None for head_dim ** -0.5.
    window: a query sees this many positions, its own among them; softcap: scores become
    softcap * tanh(score / softcap). qk_norm: RMS norm of queries and keys before the rotation, of each head or
    of `all` heads at once. Biases: of q, k and v, and of the output projection.
    """

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary: Rotary | None = None
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    qk_norm: Literal["head", "all"] | None = None
    input_bias: bool = False
    output_bias: bool = False

    @property
    def heads_per_group(self) -> int:
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def score_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale


Activation = Literal["silu", "gelu", "gelu_tanh", "gelu_quick", "relu"]


@dataclass(frozen=True)
class Experts:
    """Of each token the num_experts_per_tok likeliest by softmax(router(x)); normalised: their weights sum to 1."""

    num_experts: int
    num_experts_per_tok: int
    normalised: bool = True


@dataclass(frozen=True)
class Mlp:
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))) where it is not gated.

    experts: None, or how many MLPs of this width there are, and which of them a token takes.
    """

    intermediate_size: int
    activation: Activation = "silu"
    gated: bool = True
    input_bias: bool = False
    output_bias: bool = False
    experts: Experts | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """The projections before the activation."""
        return ("gate", "up") if self.gated else ("up",)


@dataclass(frozen=True)
class Layer:
    attention: Attention | None
    mlp: Mlp | None


@dataclass(frozen=True)
class Picture:
    """What an image generator draws: side * side tokens row by row, behind one token that says which class.

    Class c is begun by the token vocab_size + c, no class at all by vocab_size + num_classes (`null`), where the
    model has that: without it there is no guidance, without classes nothing else. No logit predicts these.
    """

    side: int
    num_classes: int
    has_null: bool = True

    @property
    def tokens(self) -> int:
        return self.side**2

    @property
    def is_guided(self) -> bool:
        """May the logits of no class guide those of a class?"""
        return self.has_null and self.num_classes > 0

    @property
    def inputs(self) -> int:
        """Tokens that are only read."""
        return self.num_classes + self.has_null

    def opening(self, vocab_size: int, label: int | None) -> int:
        """The token that a picture of this class, or of none, begins with."""
        return vocab_size + (self.num_classes if label is None else label)


@dataclass(frozen=True)
class Decoder:
    """picture: None for a language model. norms: of every module's input, of its output, or of both (weights `norm`
    and `post_norm`).

    parallel: attention and MLP of a layer both read what enters it. embedding_scale multiplies the embedding,
    logits_scale the logits, then logits_softcap limits them. learned_positions: a table is added to the embedding.
    residual_scale: of the output projections in the checkpoint, read with it (the weights here are final).
    """

    family: str
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    norm_eps: float
    tie_word_embeddings: bool
    layers: tuple[Layer, ...]
    norm: Literal["rms", "layer"] = "rms"
    norms: Literal["before", "after", "both"] = "before"
    parallel: bool = False
    learned_positions: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    logits_softcap: float | None = None
    picture: Picture | None = None

    @property
    def input_vocab_size(self) -> int:
        """Rows of the embedding: the vocabulary, and behind it what is only read."""
        return self.vocab_size + (self.picture.inputs if self.picture else 0)

    @property
    def most_fed(self) -> int | None:
        """Tokens of a picture that the model reads: with the one that begins it, without the last; None for texts."""
        return self.picture.tokens if self.picture else None

    @property
    def is_uniform(self) -> bool:
        """Every layer has the same widths, so that a plain configuration describes it."""
        return len(set(self.layer_widths)) <= 1

    @property
    def rotaries(self) -> tuple[Rotary, ...]:
        """The rotary embeddings of the layers, each once."""
        return tuple(
            dict.fromkeys(layer.attention.rotary for layer in self.layers if layer.attention and layer.attention.rotary)
        )

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The windows of the layers, each once."""
        return tuple(dict.fromkeys(layer.attention.window for layer in self.layers if layer.attention))

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

    def with_output_biases(self) -> Decoder:
        """The same model with a bias of every output projection."""
        layers = tuple(
            Layer(
                layer.attention and replace(layer.attention, output_bias=True),
                layer.mlp and replace(layer.mlp, output_bias=True),
            )
            for layer in self.layers
        )
        return replace(self, layers=layers)

    def compact(self) -> Decoder:
        """The same model without the layers that have neither attention nor MLP."""
        return replace(self, layers=tuple(layer for layer in self.layers if layer.attention or layer.mlp))

    def norm_shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """Shapes of the weight and, of a LayerNorm, the bias of a norm of the residual stream."""
        names = (name, f"{name}_bias") if self.norm == "layer" else (name,)
        return dict.fromkeys(names, (self.hidden_size,))

    def layer_shapes(self, index: int) -> dict[str, tuple[int, ...]]:
        """Shape of every weight of one layer, by its full name, in the order above."""
        layer, shapes = self.layers[index], {}
        parts = (("attention", layer.attention, _attention_shapes), ("mlp", layer.mlp, _mlp_shapes))
        for kind, part, inner in parts:
            if part is None:
                continue
            prefix = f"layers.{index}.{kind}."
            if self.norms != "after":
                shapes |= self.norm_shapes(prefix + "norm")
            shapes |= {prefix + name: shape for name, shape in inner(part, self.hidden_size).items()}
            if self.norms != "before":
                shapes |= self.norm_shapes(prefix + "post_norm")
        return shapes

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight of the model, by name, in the order in which they are used."""
        shapes: dict[str, tuple[int, ...]] = {"embedding": (self.input_vocab_size, self.hidden_size)}
        if self.learned_positions:
            shapes["positions"] = (self.max_position_embeddings, self.hidden_size)
        for index in range(len(self.layers)):
            shapes |= self.layer_shapes(index)
        shapes |= self.norm_shapes("norm")
        if not self.tie_word_embeddings:
            shapes["head"] = (self.vocab_size, self.hidden_size)
        return shapes

    @property
    def parameters(self) -> int:
        return sum(map(prod, self.shapes().values()))

    @property
    def table_parameters(self) -> int:
        """Parameters of embedding and head, a tied one counted once."""
        return self.hidden_size * (self.input_vocab_size + (0 if self.tie_word_embeddings else self.vocab_size))

    @property
    def layer_parameters(self) -> int:
        """Parameters of the attention and MLP matrices: what the pruning ratio counts."""
        return sum(
            prod(shape)
            for index in range(len(self.layers))
            for shape in self.layer_shapes(index).values()
            if len(shape) == 2
        )

    def cache_elements(self, batch: int, context: int, head_multiple: int = 1) -> int:
        """Elements of the key/value cache, keys and values of all layers, at `context` tokens, each head filled up to
        a multiple."""
        attentions = [layer.attention for layer in self.layers if layer.attention]
        width = sum(a.num_key_value_heads * -(-a.head_dim // head_multiple) * head_multiple for a in attentions)
        return 2 * batch * context * width


def _attention_shapes(attention: Attention, hidden: int) -> dict[str, tuple[int, ...]]:
    sizes = {"q": attention.query_size, "k": attention.key_value_size, "v": attention.key_value_size}
    shapes: dict[str, tuple[int, ...]] = {name: (size, hidden) for name, size in sizes.items()}
    if attention.input_bias:
        shapes |= {f"{name}_bias": (size,) for name, size in sizes.items()}
    if attention.qk_norm is not None:
        for name in ("q", "k"):
            shapes[f"{name}_norm"] = (sizes[name] if attention.qk_norm == "all" else attention.head_dim,)
    shapes["o"] = (hidden, attention.query_size)
    if attention.output_bias:
        shapes["o_bias"] = (hidden,)
    return shapes


def _mlp_shapes(mlp: Mlp, hidden: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(mlp.inputs, (mlp.intermediate_size, hidden))
    if mlp.experts is not None:
        one = shapes | {"down": (hidden, mlp.intermediate_size)}
        every = {f"experts.{e}.{name}": shape for e in range(mlp.experts.num_experts) for name, shape in one.items()}
        return {"router": (mlp.experts.num_experts, hidden)} | every
    if mlp.input_bias:
        shapes |= {f"{name}_bias": (mlp.intermediate_size,) for name in mlp.inputs}
    shapes["down"] = (hidden, mlp.intermediate_size)
    if mlp.output_bias:
        shapes["down_bias"] = (hidden,)
    return shapes


def _narrowed(attention: Attention, groups: int, heads_per_group: int) -> Attention:
    return replace(attention, num_attention_heads=groups * heads_per_group, num_key_value_heads=groups)


def ratio(candidate: Decoder, dense: Decoder) -> float:
    """Removed share of the parameters in attention and MLP matrices, 0 to 1."""
    return 1.0 - candidate.layer_parameters / dense.layer_parameters
