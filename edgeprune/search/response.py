"""The response: what small models really lose, over what the sensitivities predict, measured by probes.

A prediction is of each change alone, to second order; one factor corrects all that they lose together. On real models
it is about the same for groups, query heads and channels, so one pruning that cuts another of the three in each layer
measures it; a second one rounds modules to the coarsest format, one more to each that rounds activations too, and one
has the KV cache in each of its formats. All change the last fifth of the layers: the samples
pass the others once, and the factor of formats is within a fifth of that of all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from edgeprune.model.cache import cache_scales, with_cache
from edgeprune.model.decoder import Decoder
from edgeprune.model.forward import WeightStream, spread_logits, weight_stream
from edgeprune.model.model import Model
from edgeprune.model.tail import tail_of
from edgeprune.precision import CacheFormat, WeightFormat
from edgeprune.pruning.methods import Method
from edgeprune.pruning.prune import prune
from edgeprune.search.roundings import coarsest
from edgeprune.search.widths import Sensitivities, Widths, dense_widths

PROBE_SAMPLES = 12  # with fewer, the update of wide modules is under-determined, and their cuts seem to cost more
ROUNDED_SAMPLES = 8  # rounding determines no update of its own
PROBE_HELD_OUT = 4
POSITIONS = 1024  # at which the logits of both models are compared; a divergence is far less noisy than a rise
LOGIT_BYTES = 1 << 28  # of these logits, at most
LEAST = 1e-9  # nats per token
LEAST_PROBED = 6  # layers


def probed_layers(layers: int) -> range:
    """Returns the layers that probes change: the last fifth."""
    return range(max(0, layers - max(LEAST_PROBED, -(-layers // 5))), layers)


def probe_widths(dense: Widths, layers: int) -> list[Widths]:
    """Returns widths of so many layers with a quarter of the groups, query heads or channels removed, another kind in
    each."""

    def cut(size: int) -> int:
        return size - max(1, size // 4)

    groups, heads, channels = dense
    kinds = [dense._replace(num_key_value_heads=cut(groups))] * (groups > 1)
    kinds += [dense._replace(heads_per_group=cut(heads))] * (heads > 1)
    kinds.append(dense._replace(intermediate_size=cut(channels)))
    return [kinds[layer % len(kinds)] for layer in range(layers)]


def kinds_of(formats: Sequence[WeightFormat]) -> list[tuple[WeightFormat, ...]]:
    """Returns the formats that have a response in common: all that keep activations, and each of the others."""
    plain = tuple(form for form in formats if not form.activation_bits)
    return [plain] * bool(plain) + [(form,) for form in formats if form.activation_bits]


def probes_of(formats: Sequence[WeightFormat], caches: Sequence[CacheFormat]) -> int:
    """Returns the models of measure_response: the dense one, and the small ones."""
    return 2 + len(kinds_of(formats)) + len(caches)


@torch.inference_mode()
def measure_response(
    model: Model,
    ids: torch.Tensor,
    sensitivities: Sensitivities,
    method: Method,
    seed: int,
    formats: tuple[WeightFormat, ...] = (),
    caches: tuple[CacheFormat, ...] = (),
    on_probe: Callable[[], None] = lambda: None,
) -> Sensitivities:
    """Returns the sensitivities with their responses, those of widths and those of formats.

    ids: calibration samples (samples, tokens) int64. Each probe is made with the first samples of the first half;
    its loss is the divergence of its logits from the dense model's, on the last PROBE_HELD_OUT of the second
    half: to second order what a prediction is of. caches: formats of the KV cache. on_probe is called probes_of times.
    """
    half = max(1, len(ids) // 2)
    probed = probed_layers(len(model.decoder.layers))
    # All layers before are the dense model's: the samples pass them once.
    some = torch.cat([ids[: min(PROBE_SAMPLES, half)], ids[-min(PROBE_HELD_OUT, half) :]])
    tail, rows = tail_of(model, probed.start, some)
    samples, held_out = rows[: min(PROBE_SAMPLES, half)], rows[min(PROBE_SAMPLES, half) :]
    count = min(POSITIONS, max(1, LOGIT_BYTES // (4 * model.decoder.vocab_size)))
    expected = spread_logits(tail.decoder, weight_stream(tail), held_out, count).log_softmax(dim=-1)
    on_probe()

    def divergence(target: Decoder, samples: torch.Tensor) -> float:
        return divergence_of(target, prune(tail, target, samples, method, seed))

    def divergence_of(target: Decoder, weights: WeightStream) -> float:
        logits = spread_logits(target, weights, held_out, count).log_softmax(dim=-1)
        on_probe()
        return max(LEAST, float(F.kl_div(logits, expected, reduction="batchmean", log_target=True)))

    # One pruning that cuts another kind in each layer.
    widths = probe_widths(dense_widths(model.decoder), len(probed))
    predicted = sum(sensitivities.errors(layer, width).sum() for layer, width in zip(probed, widths, strict=True))
    factor = divergence(tail.decoder.with_layer_widths(widths), samples) / max(predicted, LEAST)
    sensitivities = replace(sensitivities, response=np.full(3, factor))
    # One with the KV cache in each format.
    of_caches = {}
    for form in caches:
        rounded, losses = with_cache(tail, form, cache_scales(tail, samples, form)), sensitivities.caches[form.name]
        predicted = float(losses.attention[probed.start :].sum())
        factor = divergence_of(rounded.decoder, weight_stream(rounded)) / max(predicted, LEAST)
        of_caches[form.name] = replace(losses, response=factor)
    # One that rounds modules, of the formats of each kind.
    roundings = dict(sensitivities.roundings)
    for kind in kinds_of(formats):
        form = coarsest(kind)
        losses = roundings[form.name]
        predicted = float(losses.attention[probed.start :].sum() + losses.mlp[probed.start :].sum())
        factor = divergence(tail.decoder.with_format(form), samples[:ROUNDED_SAMPLES]) / max(predicted, LEAST)
        roundings |= {one.name: replace(roundings[one.name], response=factor) for one in kind}
    return replace(sensitivities, roundings=roundings, caches=of_caches)
