"""The architecture of a decoder-only transformer, as plain data.

Pruning, costs and graphs share this one description: the dense model and every candidate are Decoders that differ
only in their numbers. It knows nothing about the weights' values, files or runtimes.

Weights are named by their place, in nn.Linear layout (out_features, in_features). Those in brackets exist only where
the Decoder asks for them:

    embedding                       (vocab_size, hidden_size); an image generator has input_vocab_size rows
    [positions]                     (max_position_embeddings, hidden_size)
    layers.{i}.attention.[norm]     (hidden_size,)
    layers.{i}.attention.q          (num_attention_heads * head_dim, hidden_size)
    layers.{i}.attention.k, .v      (num_key_value_heads * head_dim, hidden_size)
    layers.{i}.attention.[q_bias, k_bias, v_bias]
    layers.{i}.attention.[q_norm, k_norm]  (head_dim,), or as wide as all heads
    layers.{i}.attention.[sinks]    (num_attention_heads,)
    layers.{i}.attention.o          (hidden_size, num_attention_heads * head_dim)
    layers.{i}.attention.[o_bias, post_norm]  (hidden_size,)
    layers.{i}.attention.[key_scale, value_scale]  (1, num_key_value_heads, 1, head_dim), of a KV cache in codes
    layers.{i}.mlp.[norm]           (hidden_size,)
    layers.{i}.mlp.[gate], .up      (intermediate_size, hidden_size)
    layers.{i}.mlp.[gate_bias, up_bias]
    layers.{i}.mlp.[alpha_p, alpha_n]  (1,), and .[beta, eps] (), of xielu
    layers.{i}.mlp.down             (hidden_size, intermediate_size)
    layers.{i}.mlp.[down_bias, post_norm]  (hidden_size,)
    norm                            (hidden_size,)
    [head]                          (vocab_size, hidden_size), absent where tied to the embedding

A LayerNorm also has a bias, named like its weight with `_bias` appended. The matrices of a mixture of experts are
`mlp.router` (num_experts, hidden_size) and, for every expert e, `mlp.experts.{e}.gate`, `.up` and `.down`, with the
biases of an MLP; the router's bias is `mlp.router_bias` (num_experts,).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from edgeprune.precision import CacheFormat, WeightFormat


@dataclass(frozen=True)
class Grid:
    """The positions of a picture's tokens.

    The prefix has no place in the picture; behind it, token j stands in row j // side and column j % side.
    """

    prefix: int
    side: int

    @property
    def positions(self) -> int:
        """Returns the number of positions, the prefix included."""
        return self.prefix + self.side**2


@dataclass(frozen=True)
class Rotary:
    """Rotate-half position embedding: the angle of pair m at position p is p * inverse_frequencies[m].

    The first 2 * len(inverse_frequencies) dimensions of a head are rotated, the others stay as they are. cos and sin
    are multiplied by `scaling` (the attention factor of some rope scalings, otherwise 1). On a grid, the first half of
    the pairs is rotated by the row and the second half by the column; at the prefix cos and sin are both 0, so that
    queries and keys become zero vectors.
    """

    inverse_frequencies: tuple[float, ...]
    scaling: float = 1.0
    grid: Grid | None = None


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention: query head h reads the key/value head h // heads_per_group.

    rotary: None for attention without rotary positions. scale: of the scores; None for head_dim ** -0.5.
    window: how many positions a query sees, its own included; None for all. softcap: scores become
    softcap * tanh(score / softcap). qk_norm: RMS norm of queries and keys before the rotation, of each `head` or of
    `all` heads at once, or behind it of each head that was `turned`. input_bias: of q, k and v; output_bias: of the
    output projection. sinks: the softmax of each query head counts one more score, a weight of the head, for which
    there is no value. weight_format: of q, k, v and o; cache_format: of the keys and values that the KV cache holds;
    None for floats.
    """

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary: Rotary | None = None
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    qk_norm: Literal["head", "all", "turned"] | None = None
    input_bias: bool = False
    output_bias: bool = False
    sinks: bool = False
    weight_format: WeightFormat | None = None
    cache_format: CacheFormat | None = None

    @property
    def heads_per_group(self) -> int:
        """Returns the number of query heads that share a key/value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def query_size(self) -> int:
        """Returns the width of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Returns the width of all key heads together, which is also that of all value heads."""
        return self.num_key_value_heads * self.head_dim

    @property
    def score_scale(self) -> float:
        """Returns the factor of the scores."""
        return self.head_dim**-0.5 if self.scale is None else self.scale


Activation = Literal["silu", "gelu", "gelu_tanh", "gelu_quick", "relu", "xielu"]
XIELU: dict[str, tuple[int, ...]] = {"alpha_p": (1,), "alpha_n": (1,), "beta": (), "eps": ()}
"""The shapes of xielu's parameters, by name."""


@dataclass(frozen=True)
class Experts:
    """The experts of a mixture; a token takes the num_experts_per_tok likeliest by softmax(router(x)).

    normalised: whether the shares of a token's experts are scaled so that they sum to 1. bias: of the router.
    """

    num_experts: int
    num_experts_per_tok: int
    normalised: bool = True
    bias: bool = False


@dataclass(frozen=True)
class Mlp:
    """A gated MLP, down(activation(gate(x)) * (up(x) + up_shift)), or a plain one, down(activation(up(x))).

    limit: before that, gate(x) is cut off above it, and up(x) beyond it on both sides; None: neither is. experts: None,
    or how many MLPs of this width there are and how many of them a token takes. weight_format: of all matrices but the
    router; None for floats.
    """

    intermediate_size: int
    activation: Activation = "silu"
    gated: bool = True
    input_bias: bool = False
    output_bias: bool = False
    limit: float | None = None
    up_shift: float = 0.0
    experts: Experts | None = None
    weight_format: WeightFormat | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Returns the names of the projections before the activation."""
        return ("gate", "up") if self.gated else ("up",)


@dataclass(frozen=True)
class Layer:
    """One layer; None stands for a module that was pruned away."""

    attention: Attention | None
    mlp: Mlp | None


@dataclass(frozen=True)
class Picture:
    """The picture of an image generator: side * side tokens, row by row, behind one token that names its class.

    A picture of class c begins with the token vocab_size + c. The null token, vocab_size + num_classes, begins a
    picture of no class, where the model has that token: without it there is no guidance, and without classes it is
    the only one. No logit predicts these tokens.
    """

    side: int
    num_classes: int
    has_null: bool = True

    @property
    def tokens(self) -> int:
        """Returns the number of tokens, without the one that it begins with."""
        return self.side**2

    @property
    def is_guided(self) -> bool:
        """Returns whether the logits of no class can guide those of a class."""
        return self.has_null and self.num_classes > 0

    @property
    def inputs(self) -> int:
        """Returns the number of tokens that are only read, never predicted."""
        return self.num_classes + self.has_null

    def opening(self, vocab_size: int, label: int | None) -> int:
        """Returns the token that a picture begins with. label: its class; None: no class."""
        return vocab_size + (self.num_classes if label is None else label)


@dataclass(frozen=True)
class Decoder:
    """A decoder-only transformer: its sizes, its layers, and the conventions of its family.

    norms: whether the input of every module is normed, its output, or both (weights `norm` and `post_norm`).
    parallel: attention and MLP of a layer both read the stream that enters the layer. learned_positions: a table of
    positions is added to the embedding. embedding_scale multiplies the embedding; logits_scale multiplies the logits,
    which logits_softcap then limits. residual_scale: a factor of the output projections, multiplied in when the
    checkpoint is read (the weights here are final). picture: None for a language model. embedding_format, head_format:
    of these tables, the same where they are tied; None for floats.
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
    embedding_format: WeightFormat | None = None
    head_format: WeightFormat | None = None

    @property
    def input_vocab_size(self) -> int:
        """Returns the rows of the embedding: the vocabulary and, behind it, the tokens that are only read."""
        return self.vocab_size + (self.picture.inputs if self.picture else 0)

    @property
    def most_fed(self) -> int | None:
        """Returns the number of tokens of a picture that the model reads; None for texts.

        The token that begins the picture is read, the picture's last token is not.
        """
        return self.picture.tokens if self.picture else None

    @property
    def first_attention(self) -> Attention:
        """Returns the attention of the first layer that has one. Raises ValueError where none has."""
        for layer in self.layers:
            if layer.attention is not None:
                return layer.attention
        raise ValueError("no layer has an attention")

    @property
    def is_uniform(self) -> bool:
        """Returns whether all layers have the same widths, so that a standard configuration describes them."""
        return len(set(self.layer_widths)) <= 1

    @property
    def rotaries(self) -> tuple[Rotary, ...]:
        """Returns the rotary embeddings of the layers, without repetitions."""
        return tuple(
            dict.fromkeys(layer.attention.rotary for layer in self.layers if layer.attention and layer.attention.rotary)
        )

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Returns the attention windows of the layers, without repetitions."""
        return tuple(dict.fromkeys(layer.attention.window for layer in self.layers if layer.attention))

    def with_widths(self, num_key_value_heads: int, heads_per_group: int, intermediate_size: int) -> Decoder:
        """Returns the same model with these widths in every layer (layout `uniform`)."""
        return self.with_layer_widths([(num_key_value_heads, heads_per_group, intermediate_size)] * len(self.layers))

    def with_layer_widths(self, widths: Sequence[tuple[int, int, int]]) -> Decoder:
        """Returns the same model with other widths.

        widths: for each layer its key/value heads, query heads per group and MLP channels; 0 key/value heads or
        0 channels leave the layer without that module.
        """
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
        """Returns the widths that `with_layer_widths` takes to make this model from a wider one."""
        return [
            (
                layer.attention.num_key_value_heads if layer.attention else 0,
                layer.attention.heads_per_group if layer.attention else 1,
                layer.mlp.intermediate_size if layer.mlp else 0,
            )
            for layer in self.layers
        ]

    def with_formats(
        self,
        layers: Sequence[tuple[WeightFormat | None, WeightFormat | None]],
        embedding: WeightFormat | None,
        head: WeightFormat | None,
    ) -> Decoder:
        """Returns the same model with other weight formats.

        layers: for each layer the format of its attention and of its MLP; None for floats. A tied table has one format:
        that of the head.
        """
        new = tuple(
            Layer(
                layer.attention and replace(layer.attention, weight_format=attention),
                layer.mlp and replace(layer.mlp, weight_format=mlp),
            )
            for layer, (attention, mlp) in zip(self.layers, layers, strict=True)
        )
        embedding = head if self.tie_word_embeddings else embedding
        return replace(self, layers=new, embedding_format=embedding, head_format=head)

    def with_format(self, layers: WeightFormat | None, tables: WeightFormat | None = None) -> Decoder:
        """Returns the same model with one weight format in all layers, and one in embedding and head."""
        return self.with_formats([(layers, layers)] * len(self.layers), tables, tables)

    def with_cache(self, form: CacheFormat | None) -> Decoder:
        """Returns the same model with its KV cache in a format."""
        layers = (
            replace(layer, attention=layer.attention and replace(layer.attention, cache_format=form))
            for layer in self.layers
        )
        return replace(self, layers=tuple(layers))

    @property
    def cache_format(self) -> CacheFormat | None:
        """Returns the format of the KV cache, which is that of all layers."""
        return next((layer.attention.cache_format for layer in self.layers if layer.attention), None)

    @property
    def rounded_states(self) -> str:
        """Returns which states the model rounds to codes, activations or those of its KV cache, in words; else ""."""
        rounding = [form for form in self.weight_formats.values() if form.activation_bits]
        coarsest = min(rounding, key=lambda form: (form.activation_bits, form.levels == "whole"), default=None)
        activations = f"activations in {coarsest.activations}" if coarsest else ""
        cache = f"a KV cache in {form.name}" if (form := self.cache_format) else ""
        return " and ".join(filter(None, (activations, cache)))

    @property
    def weight_formats(self) -> dict[str, WeightFormat]:
        """Returns the format of every weight that is not stored in floats, by name, in the order of `shapes`."""
        formats = {"embedding": self.embedding_format}
        for index, layer in enumerate(self.layers):
            for kind, module in (("attention", layer.attention), ("mlp", layer.mlp)):
                if module is not None and module.weight_format is not None:
                    prefix = f"layers.{index}.{kind}."
                    formats |= {
                        name: module.weight_format
                        for name, shape in self.layer_shapes(index).items()
                        if name.startswith(prefix) and len(shape) == 2 and name != f"{prefix}router"
                    }
        if not self.tie_word_embeddings:
            formats["head"] = self.head_format
        return {name: form for name, form in formats.items() if form is not None}

    def with_vocabulary(self, size: int) -> Decoder:
        """Returns the same model with this many rows in embedding and head."""
        return replace(self, vocab_size=size)

    def with_output_biases(self) -> Decoder:
        """Returns the same model with a bias on every output projection but those of experts."""
        layers = tuple(
            Layer(
                layer.attention and replace(layer.attention, output_bias=True),
                layer.mlp and (layer.mlp if layer.mlp.experts else replace(layer.mlp, output_bias=True)),
            )
            for layer in self.layers
        )
        return replace(self, layers=layers)

    def compact(self) -> Decoder:
        """Returns the same model without the layers that have neither attention nor MLP."""
        return replace(self, layers=tuple(layer for layer in self.layers if layer.attention or layer.mlp))

    def norm_shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of a norm of the residual stream, by name: its weight and, of a LayerNorm, its bias."""
        names = (name, f"{name}_bias") if self.norm == "layer" else (name,)
        return dict.fromkeys(names, (self.hidden_size,))

    def layer_shapes(self, index: int) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every weight of one layer, by its full name, in the order of the list above."""
        layer, shapes = self.layers[index], {}
        modules = (("attention", layer.attention, _attention_shapes), ("mlp", layer.mlp, _mlp_shapes))
        for kind, module, shapes_of in modules:
            if module is None:
                continue
            prefix = f"layers.{index}.{kind}."
            if self.norms != "after":
                shapes |= self.norm_shapes(prefix + "norm")
            shapes |= {prefix + name: shape for name, shape in shapes_of(module, self.hidden_size).items()}
            if self.norms != "before":
                shapes |= self.norm_shapes(prefix + "post_norm")
        return shapes

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every weight of the model, by name, in the order in which the weights are used."""
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
        """Returns the number of all parameters."""
        return sum(map(prod, self.with_cache(None).shapes().values()))

    @property
    def table_parameters(self) -> int:
        """Returns the number of parameters of embedding and head; a tied table counts once."""
        return self.hidden_size * (self.input_vocab_size + (0 if self.tie_word_embeddings else self.vocab_size))

    @property
    def layer_parameters(self) -> int:
        """Returns the number of parameters of the attention and MLP matrices, which the pruning ratio counts."""
        return sum(
            prod(shape)
            for index in range(len(self.layers))
            for shape in self.layer_shapes(index).values()
            if len(shape) == 2
        )

    def cache_bytes(self, batch: int, context: int, element_bytes: int, head_multiple: int = 1) -> int:
        """Returns the bytes of the KV cache: keys and values of all layers.

        batch: sequences; context: tokens of each; element_bytes: of a float; head_multiple: every head is filled up to
        a multiple of this width.
        """
        width = 0
        for attention in (layer.attention for layer in self.layers if layer.attention):
            form = attention.cache_format
            head = -(-attention.head_dim // head_multiple) * head_multiple
            width += attention.num_key_value_heads * head * (form.element_bytes if form else element_bytes)
        return 2 * batch * context * width


def _attention_shapes(attention: Attention, hidden: int) -> dict[str, tuple[int, ...]]:
    sizes = {"q": attention.query_size, "k": attention.key_value_size, "v": attention.key_value_size}
    shapes: dict[str, tuple[int, ...]] = {name: (size, hidden) for name, size in sizes.items()}
    if attention.input_bias:
        shapes |= {f"{name}_bias": (size,) for name, size in sizes.items()}
    if attention.qk_norm is not None:
        for name in ("q", "k"):
            shapes[f"{name}_norm"] = (sizes[name] if attention.qk_norm == "all" else attention.head_dim,)
    if attention.sinks:
        shapes["sinks"] = (attention.num_attention_heads,)
    shapes["o"] = (hidden, attention.query_size)
    if attention.output_bias:
        shapes["o_bias"] = (hidden,)
    if attention.cache_format is not None:
        of_heads = (1, attention.num_key_value_heads, 1, attention.head_dim)
        shapes |= {"key_scale": of_heads, "value_scale": of_heads}
    return shapes


def _mlp_shapes(mlp: Mlp, hidden: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(mlp.inputs, (mlp.intermediate_size, hidden))
    if mlp.input_bias:
        shapes |= {f"{name}_bias": (mlp.intermediate_size,) for name in mlp.inputs}
    if mlp.activation == "xielu":
        shapes |= XIELU
    shapes["down"] = (hidden, mlp.intermediate_size)
    if mlp.output_bias:
        shapes["down_bias"] = (hidden,)
    if (experts := mlp.experts) is None:
        return shapes
    router: dict[str, tuple[int, ...]] = {"router": (experts.num_experts, hidden)}
    if experts.bias:
        router["router_bias"] = (experts.num_experts,)
    numbered = range(experts.num_experts)
    return router | {f"experts.{expert}.{name}": shape for expert in numbered for name, shape in shapes.items()}


def _narrowed(attention: Attention, groups: int, heads_per_group: int) -> Attention:
    return replace(attention, num_attention_heads=groups * heads_per_group, num_key_value_heads=groups)


def ratio(candidate: Decoder, dense: Decoder) -> float:
    """Returns the share of the parameters in attention and MLP matrices that was removed, 0 to 1."""
    return 1.0 - candidate.layer_parameters / dense.layer_parameters
