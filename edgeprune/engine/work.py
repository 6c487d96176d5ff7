"""The work and the memory of a Decoder: bytes and FLOPs of a decode step and of a prefill, and what an engine holds.

Pure counts of shapes: they are of no device, and nothing is measured. A weight format changes the bytes of a matrix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

from edgeprune.engine.onnx.nodes import HEAD_MULTIPLE, head_width
from edgeprune.model.decoder import Decoder, Layer
from edgeprune.ondevice.figures import Workload
from edgeprune.precision import PRECISIONS, GraphPrecision, WeightFormat

ID_BYTES = 8
EXPERTS = ".experts."  # in the names of their matrices
TENSORRT_WORKSPACE = 8 * 2**20  # for matrix products, as TensorRT for RTX's compiler reports it


@dataclass(frozen=True)
class TokenBytes:
    """The bytes that one decode step moves at past = context - 1, for the whole batch."""

    layers: float  # matrices and norms of all layers
    head: float  # final norm and head; the embedding's gathered rows are negligible
    cache: float  # keys and values that attention reads
    cache_copies: float  # the cache read and written once more where past and present are concatenated

    @property
    def total(self) -> float:
        """Returns the sum of all parts."""
        return self.layers + self.head + self.cache + self.cache_copies


FormatFactor = Callable[[WeightFormat | None], float]  # by which a matrix in a format counts more than in floats


def _once(form: WeightFormat | None) -> float:
    return 1.0


def bytes_per_token(
    decoder: Decoder,
    precision: GraphPrecision,
    workload: Workload,
    in_place: bool = False,
    factor: FormatFactor = _once,
    routes: bool = False,
) -> TokenBytes:
    """Returns the bytes that one decode step moves.

    in_place: the engine appends to one buffer of the KV cache, so that nothing is copied, as in profile.in_place.
    factor: by which the bytes of matrices in a format count more. routes: of a mixture the engine reads the experts
    alone that a token of the batch takes, as in profile.routes.
    """
    size = PRECISIONS[precision].element_bytes
    cache = cache_bytes(decoder, precision, workload, in_place)
    head = stored_bytes(decoder.vocab_size, decoder.hidden_size, decoder.head_format, size)
    head *= factor(decoder.head_format)
    return TokenBytes(
        layers=layer_bytes(decoder, size, factor, workload.batch if routes else None),
        head=head + size * decoder.hidden_size,
        cache=cache,
        cache_copies=0 if in_place else 2 * cache,
    )


def stored_bytes(out_features: int, in_features: int, form: WeightFormat | None, element_bytes: int) -> int:
    """Returns the bytes of a matrix in a weight format, or in floats; scales are floats too."""
    if form is None:
        return element_bytes * out_features * in_features
    return form.stored_bytes(out_features, in_features, element_bytes)


def table_bytes(decoder: Decoder, precision: GraphPrecision) -> int:
    """Returns the bytes of embedding and head, which are one where they are tied."""
    size, hidden = PRECISIONS[precision].element_bytes, decoder.hidden_size
    embedding = stored_bytes(decoder.input_vocab_size, hidden, decoder.embedding_format, size)
    if decoder.tie_word_embeddings:
        return embedding
    return embedding + stored_bytes(decoder.vocab_size, hidden, decoder.head_format, size)


def share_of_experts(layer: Layer, tokens: int) -> float:
    """Returns the share of a layer's experts that so many tokens take, if each takes k of n: 1 - (1 - k / n)^t.

    It is that of experts which are all taken alike, an upper bound. 1 where a layer has no experts.
    """
    experts = layer.mlp.experts if layer.mlp else None
    return 1.0 - (1.0 - experts.num_experts_per_tok / experts.num_experts) ** tokens if experts else 1.0


def layer_bytes(decoder: Decoder, element_bytes: int, factor: FormatFactor = _once, tokens: int | None = None) -> float:
    """Returns the bytes of the weights of all layers; factor: by which matrices in a format count more.

    tokens: of mixtures count the experts that these take; None: all.
    """
    total = 0
    for layer, count in Counter(decoder.layers).items():
        alone, share = replace(decoder, layers=(layer,)), 1.0 if tokens is None else share_of_experts(layer, tokens)
        formats = alone.weight_formats
        for name, shape in alone.layer_shapes(0).items():
            out_features, in_features = shape if len(shape) == 2 else (1, prod(shape))
            form = formats.get(name)
            read = count * (share if EXPERTS in name else 1.0)
            total += read * stored_bytes(out_features, in_features, form, element_bytes) * factor(form)
    return total


def cache_bytes(decoder: Decoder, precision: GraphPrecision, workload: Workload, padded: bool) -> int:
    """Returns the bytes of one buffer of the KV cache at full context.

    padded: as ONNX Runtime holds it, with zeros behind heads of other sizes than it takes.
    """
    multiple, element_bytes = HEAD_MULTIPLE if padded else 1, PRECISIONS[precision].element_bytes
    return decoder.cache_bytes(workload.batch, workload.context, element_bytes, multiple)


def prefill_flops(
    decoder: Decoder,
    workload: Workload,
    factor: FormatFactor = _once,
    dialect: str | None = None,
    attention_factor: float = 1.0,
    routes: bool = False,
) -> float:
    """Returns the FLOPs of a prefill, a multiply-add as two.

    They are those of the layers' matrices, of causal attention, and of the head at the last position. factor: by which
    the products of matrices in a format count more. dialect: in opset24 a prompt attends to the whole KV cache, free
    slots included. attention_factor: by which attention counts more, over a KV cache in a format.
    """
    tokens = workload.batch * workload.prompt
    query_size = sum(layer.attention.query_size for layer in decoder.layers if layer.attention)
    attention = 2.0 * tokens * workload.prompt * query_size  # scores and values, half of each masked
    if dialect == "opset24":
        attention = 4.0 * tokens * workload.context * query_size
    attention *= attention_factor
    head = 2.0 * workload.batch * decoder.vocab_size * decoder.hidden_size * factor(decoder.head_format)
    return 2.0 * tokens * _multiplications(decoder, factor, routes) + attention + head


def _multiplications(decoder: Decoder, factor: FormatFactor = _once, routes: bool = False) -> float:
    """Returns the multiply-adds of a token in the matrices of all layers, and in those of the minima beside them.

    routes: with the token's own experts alone.
    """
    total = 0.0
    for layer, count in Counter(decoder.layers).items():
        alone, share = replace(decoder, layers=(layer,)), share_of_experts(layer, 1) if routes else 1.0
        formats = alone.weight_formats
        for name, shape in alone.layer_shapes(0).items():
            if len(shape) == 2:
                form = formats.get(name)
                of_minima = 1 / form.group if form is not None and form.storage == "offset" else 0.0
                total += count * (share if EXPERTS in name else 1.0) * prod(shape) * (factor(form) + of_minima)
    return total


def decode_flops(decoder: Decoder, workload: Workload, routes: bool = False) -> float:
    """Returns the FLOPs of one decode step of the whole batch, a multiply-add as two.

    They are those of the matrices, of the head, and of attention over `context` keys. routes: as of prefill_flops.
    """
    query_size = sum(layer.attention.query_size for layer in decoder.layers if layer.attention)
    matrices = _multiplications(decoder, routes=routes) + decoder.vocab_size * decoder.hidden_size
    return 2.0 * workload.batch * (matrices + 2 * workload.context * query_size)


def activation_bytes(decoder: Decoder, precision: GraphPrecision, workload: Workload, dialect: str) -> int:
    """Returns the bytes of the largest set of tensors that is alive at once in a prefill of `prompt` tokens.

    With T = batch x prompt and `total` keys: the residual stream and its normed copy (2 T hidden), for
    TensorRT the mask (T total), and the largest of
        mlp          gate, up, product                            3 T intermediate + workspace
        opset24      q, k and the result, each twice, and, where
                     several tokens come at once, all keys and
                     values for each query head                   2 T (q + k) + 2 batch total q
        opset23      attention fused: packed q, k, v, rotated q, k
                     and the result, each twice                   2 T (3 q + 3 k) + workspace
        primitive    scores before and after the softmax,
                     q, k, v, and all keys transposed             T (2 heads total + q + 2 k) + batch total k
        onnxruntime  scores, softmax in place, q, k, v, result    T (heads total + 2 q + 2 k)
    TensorRT reserves memory for the longest past that its engine admits (total = context - 1 + prompt, in place the
    capacity, which is the context), ONNX Runtime allocates what it needs (total = prompt) and has no workspace. The
    logits are among the buffers.

    Against the `Total Activation Memory` of TensorRT for RTX's compiler (SM86, fp16), on 24 random shapes
    that these formulas were not fitted to: median error 6 %, 22 within 21 %, the worst 48 % low; that of opset24
    on 48 (SM86 and 89): median 3 %, 46 within 21 %, the worst 31 % low. Where each
    query head has its own key head, that compiler fuses a primitive graph too, and the result is 3 times too high.
    """
    tokens = workload.batch * workload.prompt
    total = _total_tokens(workload, dialect)
    size, on_processor = PRECISIONS[precision].element_bytes, dialect == "onnxruntime"
    workspace = 0 if on_processor else TENSORRT_WORKSPACE
    # The module that needs most.
    largest = 0
    for layer in decoder.layers:
        if (attention := layer.attention) is not None:
            heads, width = attention.num_attention_heads, head_width(attention.head_dim, dialect)
            query, key = heads * width, attention.num_key_value_heads * width
            if dialect == "opset24":
                expanded = 2 * workload.batch * total * query if workload.prompt > 1 else 0
                module_bytes = size * (2 * tokens * (query + key) + expanded)
            elif dialect == "opset23":
                module_bytes = size * 2 * tokens * (3 * query + 3 * key) + workspace
            elif dialect == "primitive":
                module_bytes = size * (tokens * (2 * heads * total + query + 2 * key) + workload.batch * total * key)
            else:
                module_bytes = size * tokens * (heads * total + 2 * query + 2 * key)
            largest = max(largest, module_bytes)
        if layer.mlp is not None:
            largest = max(largest, size * 3 * tokens * layer.mlp.intermediate_size + workspace)
    # The residual stream, its normed copy and the mask are alive beside it.
    return size * tokens * (2 * decoder.hidden_size + (0 if on_processor else total)) + largest


def buffer_bytes(decoder: Decoder, precision: GraphPrecision, workload: Workload, dialect: str) -> int:
    """Returns the bytes of inputs and outputs other than the KV cache: ids, positions, mask, the last logits.

    In opset 24 the index at which each sequence is written is one more.
    """
    more = 1 if dialect == "opset24" else 0
    ids = ID_BYTES * workload.batch * (2 * workload.prompt + _total_tokens(workload, dialect) + more)
    return ids + PRECISIONS[precision].logit_bytes * workload.batch * decoder.vocab_size


def _total_tokens(workload: Workload, dialect: str) -> int:
    """Returns the keys for which memory is reserved in a prefill: ONNX Runtime allocates only those of the prompt."""
    if dialect == "opset24":
        return workload.context
    return workload.prompt + (0 if dialect == "onnxruntime" else workload.context - 1)
