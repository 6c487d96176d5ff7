"""The cost of every width and weight format of a module by the estimator's formulas: memory, and latencies of a device
that is not reachable.

It does not know a model's weights, nor what was measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from edgeprune.engine.estimate import estimate_performance, resource_times
from edgeprune.engine.overheads import fixed_times
from edgeprune.engine.work import activation_bytes
from edgeprune.errors import InputError
from edgeprune.model.decoder import Decoder
from edgeprune.ondevice.figures import Workload
from edgeprune.profiles import DeviceProfile
from edgeprune.search.latency_table import KINDS, LatencyCosts
from edgeprune.search.module_costs import ModuleCosts, additive, channel_options
from edgeprune.search.widths import Cache, Format


def estimated_costs(
    dense: Decoder,
    profile: DeviceProfile,
    workload: Workload,
    precision: str,
    formats: tuple[Format, ...] = (None,),
    caches: tuple[Cache, ...] = (None,),
) -> LatencyCosts:
    """Returns the table from the estimator, for a device that is not reachable.

    It holds the times of the resource that binds the dense model, and is exact as long as that resource binds.
    """
    resources = resource_times(dense, profile, workload, precision)
    bound = {kind: max(times, key=times.get) for kind, times in resources.items()}

    def costs(cache: Cache) -> dict[str, ModuleCosts]:
        of_cache = profile.for_cache(cache)  # for models without attention too

        def times(decoder: Decoder) -> np.ndarray:
            resources = resource_times(decoder, of_cache, workload, precision)
            return np.array([resources[kind][bound[kind]] for kind in KINDS])

        attention, mlp, tables = _by_difference(dense.with_cache(cache), profile.channel_multiple, formats, times)
        tables[..., 0, :] += np.array([fixed_times(profile)[kind] for kind in KINDS])
        return {kind: additive(attention[..., i], mlp[..., i], tables[..., i]) for i, kind in enumerate(KINDS)}

    cached = {cache: costs(cache) for cache in caches if cache is not None}
    return LatencyCosts(**costs(None), error={}, source=f"the estimator's formulas for {profile.name}", cached=cached)


def memory_costs(
    dense: Decoder, profile: DeviceProfile, workload: Workload, precision: str, formats: tuple[Format, ...] = (None,)
) -> ModuleCosts:
    """Returns the bytes of weights, KV cache and buffers by module, and the peaks of the activations, as estimated."""
    profile = profile.for_cache(dense.cache_format)  # for models without attention too
    # The activations that are there even without a module.
    empty = replace(dense, layers=dense.layers[:1]).with_layer_widths([(0, 1, 0)])
    floor = activation_bytes(empty, precision, workload, profile.dialect)

    def held(decoder: Decoder) -> np.ndarray:
        memory = estimate_performance(decoder, profile, workload, precision).memory
        return np.array([memory.total - memory.activations.value])

    def peak(widths: tuple[int, int, int]) -> float:
        one_layer = replace(dense, layers=dense.layers[:1]).with_layer_widths([widths])
        return activation_bytes(one_layer, precision, workload, profile.dialect) - floor

    # All else adds up over the modules.
    attention, mlp, tables = _by_difference(dense, profile.channel_multiple, formats, held)
    tables[..., 0, :] += floor
    groups, heads, channels = dense.layer_widths[0]
    # The peak of every width on top of these activations: (groups + 1, heads) and (channels + 1,).
    attention_peak = np.array([[peak((g, r, 0)) if g else 0.0 for r in range(1, heads + 1)] for g in range(groups + 1)])
    sizes = [0, *channel_options(channels, profile.channel_multiple)]
    mlp_peak = np.interp(np.arange(channels + 1), sizes, [peak((0, 1, k)) if k else 0.0 for k in sizes])
    return ModuleCosts(attention[..., 0], mlp[..., 0], attention_peak, mlp_peak, tables[..., 0])


def _by_difference(
    dense: Decoder, multiple: int, formats: tuple[Format, ...], costs: Callable[[Decoder], np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns what an attention, an MLP, and all else add to the costs (n,) of a Decoder.

    They are (formats, groups + 1, heads, n), (formats, channels + 1, n) and (formats, formats, 2, n), as in
    ModuleCosts. Each is the difference between models that differ in one kind of width or format in all layers. costs:
    returns the costs (n,) of a Decoder.
    """
    groups, heads, channels = dense.layer_widths[0]
    layers, vocabulary = len(dense.layers), dense.vocab_size
    without_attention, without_mlp = (costs(dense.with_widths(*w)) for w in ((0, 1, channels), (groups, heads, 0)))
    n = len(without_mlp)

    def added(widths: tuple[int, int, int], pair: tuple[Format, Format], without: np.ndarray) -> np.ndarray:
        """Returns what a module with these widths and formats adds; inf where it cannot have the format."""
        target = dense.with_widths(*widths).with_formats([pair] * layers, None, None)
        try:
            return (costs(target) - without) / layers
        except InputError:
            return np.full(n, np.inf)

    # The attentions, on top of models without any; the row of 0 groups is zero.
    attention = np.zeros((len(formats), groups + 1, heads, n))
    for place, form in enumerate(formats):
        for g in range(1, groups + 1):
            for r in range(1, heads + 1):
                attention[place, g, r - 1] = added((g, r, channels), (form, None), without_attention)
    # The MLPs, on top of models without any; between the possible sizes by interpolation.
    sizes, every = channel_options(channels, multiple), np.arange(channels + 1)
    mlp = np.zeros((len(formats), channels + 1, n))
    for place, form in enumerate(formats):
        at_sizes = np.array([0 * without_mlp, *(added((groups, heads, k), (None, form), without_mlp) for k in sizes)])
        for column in range(n):
            mlp[place, :, column] = interpolated(every, [0, *sizes], at_sizes[:, column], form)
    # All else, from half the vocabulary.
    tables = np.full((len(formats), len(formats), 2, n), np.inf)
    of_layers = layers * (attention[0, groups, heads - 1] + mlp[0, channels])
    for e, embedding in enumerate(formats):
        for h, head in enumerate(formats):
            if dense.tie_word_embeddings and e != h:
                continue
            target = dense.with_formats([(None, None)] * layers, embedding, head)
            try:
                whole, half = costs(target), costs(target.with_vocabulary(vocabulary // 2))
            except InputError:
                continue
            token = (whole - half) / (vocabulary - vocabulary // 2)
            tables[e, h] = whole - token * vocabulary - of_layers, token
    return attention, mlp, tables


def interpolated(every: np.ndarray, sizes: list[int], values: np.ndarray, form: Format) -> np.ndarray:
    """Returns the costs of all widths from those of some, inf where the groups of the format do not divide the width.

    every: (widths,); values: (sizes,), inf where unknown.
    """
    known = np.isfinite(values)
    costs = np.interp(every, np.array(sizes)[known], values[known])
    if form is not None:
        costs[every % form.multiple != 0] = np.inf
    return costs
