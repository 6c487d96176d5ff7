"""Decoders of equal layers, without weights."""

from edgeprune.model.decoder import Attention, Decoder, Layer, Mlp, Rotary


def uniform(hidden: int, layers: int, heads: tuple[int, int, int], intermediate: int, vocabulary: int) -> Decoder:
    """heads: query heads, key/value heads, head_dim. Tied."""
    layer = Layer(Attention(*heads, Rotary((1.0,) * (heads[2] // 2))), Mlp(intermediate))
    return Decoder("llama", hidden, vocabulary, 8192, 1e-5, True, (layer,) * layers)


SMOLLM2 = uniform(576, 30, (9, 3, 64), 1536, 49152)
