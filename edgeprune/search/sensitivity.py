"""The measurement of the loss that every possible cut and weight format would cost, by walks over the dense model.

It does not know the budget, nor what a cut saves. The results are kept in the cache.
"""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from edgeprune.cache import cache_folder, cached
from edgeprune.model.attention import Tables
from edgeprune.model.backward import ModuleStates, token_gradients
from edgeprune.model.decoder import Attention, Decoder
from edgeprune.model.forward import (
    BIAS,
    OUTPUT,
    embed,
    entering,
    has_experts,
    layer_weights,
    module_inputs,
    module_output,
    module_states,
    modules_of,
)
from edgeprune.model.mlp import experts_output
from edgeprune.model.model import Model
from edgeprune.precision import CacheFormat, WeightFormat
from edgeprune.progress import Progress
from edgeprune.pruning.compensate import nested_errors
from edgeprune.pruning.experts import expert_inputs, expert_projection
from edgeprune.pruning.methods import method_named
from edgeprune.pruning.moments import gram
from edgeprune.pruning.score import Projection, Score
from edgeprune.pruning.select import Rank, features_of, select_heads
from edgeprune.search.response import measure_response, probes_of
from edgeprune.search.roundings import ModuleRoundings, table_losses
from edgeprune.search.widths import CacheLosses, RoundingLosses, Sensitivities, dense_widths

VERSION = 15  # of the kept results; another number measures again
SAMPLES = 12  # on which cuts are measured: their moments need several times as many tokens as the widest module's width
ROUNDED_SAMPLES = 4  # of these, on which formats are measured, whose errors are averages over all tokens


def sensitivities_of(
    model: Model,
    ids: np.ndarray,
    method: str,
    seed: int,
    progress: Progress,
    formats: tuple[WeightFormat, ...] = (),
    table_formats: tuple[WeightFormat, ...] = (),
    caches: tuple[CacheFormat, ...] = (),
) -> Sensitivities:
    """Returns the sensitivities with their measured response, from the cache or measured now.

    ids: calibration samples (samples, tokens) int64; method: the name of the pruning method whose score and recovery
    are used; formats: that modules may be rounded to; table_formats: of these, that embedding and head may; caches:
    that the KV cache may have. Raises InputError for an unknown method, and NumericalError where activations are not
    finite.
    """
    # The key holds all that the result depends on.
    how = method_named(method)
    named = f"{VERSION} {model.fingerprint} {how.score.__name__} {how.recovery.value} {seed}"
    named += "".join(f" {form.name}{' table' * (form in table_formats)}" for form in formats)
    named += "".join(f" cache {form.name}" for form in caches)
    key = hashlib.sha256(named.encode() + ids.tobytes()).hexdigest()
    path = cache_folder() / "sensitivities" / f"{key}.npz"

    def measured() -> Sensitivities:
        samples = torch.from_numpy(ids)
        advance = progress.stage("measure sensitivities", 2 * len(model.decoder.layers))
        some = _spread(samples, SAMPLES)
        sensitivities = measure_sensitivities(model, some, how.score, seed, formats, table_formats, caches, advance)
        advance = progress.stage("probe the loss", probes_of(formats, caches))
        return measure_response(model, samples, sensitivities, how, seed, formats, caches, advance)

    return cached(path, lambda data: decoded(data, model.decoder, formats, caches), measured, encoded)


def _spread(samples: torch.Tensor, most: int) -> torch.Tensor:
    """Returns at most so many of the samples, evenly spread."""
    return samples[torch.linspace(0, len(samples) - 1, min(most, len(samples))).round().long()]


def encoded(sensitivities: Sensitivities) -> bytes:
    """Returns sensitivities as the bytes of an npz file."""
    file = io.BytesIO()
    arrays = {"attention": sensitivities.attention, "mlp": sensitivities.mlp, "response": sensitivities.response}
    for name, losses in sensitivities.roundings.items():
        tables = np.array([losses.embedding, losses.head, losses.response])
        arrays |= {f"{name} attention": losses.attention, f"{name} mlp": losses.mlp, f"{name} tables": tables}
    for name, of_cache in sensitivities.caches.items():
        arrays |= {f"{name} cache": of_cache.attention, f"{name} cache response": np.array([of_cache.response])}
    np.savez(file, **arrays)
    return file.getvalue()


def decoded(
    data: bytes, decoder: Decoder, formats: tuple[WeightFormat, ...], caches: tuple[CacheFormat, ...] = ()
) -> Sensitivities:
    """Returns what encoded was given. Raises ValueError for arrays that are not those of this decoder."""
    groups, heads, channels = dense_widths(decoder)
    layers = len(decoder.layers)
    shapes = {"attention": (layers, groups + 1, heads), "mlp": (layers, channels + 1), "response": (3,)}
    for form in formats:
        shapes |= {f"{form.name} attention": (layers,), f"{form.name} mlp": (layers,), f"{form.name} tables": (3,)}
    for form in caches:
        shapes |= {f"{form.name} cache": (layers,), f"{form.name} cache response": (1,)}
    with np.load(io.BytesIO(data)) as stored:
        arrays = {name: stored[name] for name in shapes}
    for name, shape in shapes.items():
        is_known = ~np.isnan(arrays[name]) if "tables" in name else np.isfinite(arrays[name])
        if arrays[name].shape != shape or arrays[name].dtype != np.float64 or not is_known.all():
            raise ValueError(f"{name} is not an array of {shape} finite fp64")
    roundings = {}
    for form in formats:
        embedding, head, response = arrays.pop(f"{form.name} tables").tolist()
        modules = arrays.pop(f"{form.name} attention"), arrays.pop(f"{form.name} mlp")
        roundings[form.name] = RoundingLosses(*modules, embedding, head, response)
    of_caches = {
        form.name: CacheLosses(arrays.pop(f"{form.name} cache"), float(arrays.pop(f"{form.name} cache response")[0]))
        for form in caches
    }
    return Sensitivities(**arrays, roundings=roundings, caches=of_caches)


def attention_errors(weight: torch.Tensor, moments: torch.Tensor, attention: Attention, rank: Rank) -> np.ndarray:
    """Returns the errors (num_key_value_heads + 1, heads_per_group) fp64, at [g, r - 1] for g kept groups of r heads.

    weight: (out_features, query_size), of the output projection; moments: (query_size, query_size) fp64, of its
    inputs; rank: scores of the units of a size.
    """
    errors = np.zeros((attention.num_key_value_heads + 1, attention.heads_per_group))
    errors[0] = nested_errors(weight, moments, torch.arange(attention.query_size))[0]
    for groups in range(1, attention.num_key_value_heads + 1):
        for heads_per_group in range(1, attention.heads_per_group + 1):
            # Order the features as this cut would: the kept ones first.
            _, heads = select_heads(rank, attention, groups, heads_per_group)
            kept = features_of(heads, attention.head_dim)
            is_removed = torch.ones(attention.query_size, dtype=torch.bool)
            is_removed[kept] = False
            order = torch.cat([kept, is_removed.nonzero().squeeze(1)])
            errors[groups, heads_per_group - 1] = nested_errors(weight, moments, order, len(kept))[0]
    return errors


def measure_sensitivities(
    model: Model,
    ids: torch.Tensor,
    score: Score,
    seed: int,
    formats: tuple[WeightFormat, ...] = (),
    table_formats: tuple[WeightFormat, ...] = (),
    caches: tuple[CacheFormat, ...] = (),
    on_layer: Callable[[], None] = lambda: None,
) -> Sensitivities:
    """Returns the sensitivities of all modules on the calibration samples ids (samples, tokens) int64.

    A change dy_t of a module's output costs about 1/2 E[(g_t . dy_t)^2] nats, with g_t the gradient of the sampled
    loss behind the module. The direction of g_t is taken as independent of that of dy_t, which gives
    1/2 sum_t ||g_t||^2 ||dy_t||^2 / hidden_size / tokens: the least squares error of moments that are weighted by
    ||g_t||^2. on_layer is called twice for each layer. Raises NumericalError where activations are not finite.
    """
    decoder = model.decoder
    generator = torch.Generator().manual_seed(seed)
    share = 1 / (2 * decoder.hidden_size * ids.numel())
    roundings = ModuleRoundings(decoder, ids[:ROUNDED_SAMPLES], formats, caches)
    errors: dict[str, list[np.ndarray]] = {"attention": [], "mlp": []}

    def measure(module: ModuleStates) -> None:
        # The errors of all cuts, from the moments of inputs that are scaled by the square roots of their weights.
        projections = _weighted(decoder, module, (module.energy * share).sqrt()[..., None], generator)
        roundings.add(module, projections[0])
        if module.kind == "attention":
            (projection,) = projections
            rank = functools.cache(functools.partial(score, projection))
            attention = decoder.layers[module.index].attention
            errors["attention"].append(attention_errors(projection.weight, projection.gram, attention, rank))
        else:
            errors["mlp"].append(np.sum([_channel_errors(projection, score) for projection in projections], axis=0))

    ends = token_gradients(model, ids, seed, measure, on_layer)
    few = slice(ROUNDED_SAMPLES)
    tables = table_losses(model, ids[few], ends.last[few], ends.embedding_energy[few], table_formats)
    attention, mlp = (np.stack(errors[kind][::-1]) for kind in ("attention", "mlp"))
    return Sensitivities(attention, mlp, roundings=roundings.losses(tables), caches=roundings.cache_losses())


def _weighted(
    decoder: Decoder, module: ModuleStates, scale: torch.Tensor, generator: torch.Generator
) -> list[Projection]:
    """Returns a module's output projections, one or those of all its experts, whose inputs are scaled.

    scale: (b, t, 1). A norm behind the output projection is taken as a division by the output's length, as if a cut did
    not change that length. The module's inputs are scaled in place.
    """
    weights, kind = module.weights, module.kind
    if module.inputs is None:
        states, mlp = module_states(decoder, kind, weights, module.source), decoder.layers[module.index].mlp
        experts = expert_inputs(states, weights, mlp, scale)
        return [expert_projection(expert, weights, generator) for expert in experts]
    weight, inputs = weights[OUTPUT[kind]], module.inputs.mul_(scale)  # (c, in_features), (b, t, in_features)
    if decoder.norms != "before":
        weight = weight * weights[f"{kind}.post_norm"][:, None]
        inputs /= module.raw.square().mean(dim=-1, keepdim=True).sqrt_().clamp_min_(decoder.norm_eps**0.5)
    return [Projection(weight, gram(inputs.flatten(0, 1)), inputs, generator)]


def _channel_errors(projection: Projection, score: Score) -> np.ndarray:
    """Returns the errors (intermediate_size + 1,) fp64, at [k] for k kept channels; zeros where no tokens came."""
    if not projection.inputs.numel():
        return np.zeros(projection.weight.shape[1] + 1)
    order = torch.sort(score(projection, 1, 1), descending=True, stable=True).indices
    return nested_errors(projection.weight, projection.gram, order).numpy()


@torch.inference_mode()
def measure_scores(
    model: Model, ids: torch.Tensor, score: Score, seed: int, on_layer: Callable[[], None] = lambda: None
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns the scores of every layer's key/value groups and of its channels, on the dense stream.

    They are (num_key_value_heads,) and (intermediate_size,) fp64 for each layer; of a layer with experts, the mean of
    the sorted scores of its experts. ids: calibration samples (samples, tokens) int64.
    """
    decoder = model.decoder
    generator = torch.Generator().manual_seed(seed)
    tables = Tables(decoder, ids.shape[1])
    scores: dict[str, list[np.ndarray]] = {"attention": [], "mlp": []}
    hidden = embed(model, ids)  # (b, t, c)
    for index, layer in enumerate(decoder.layers):
        weights = layer_weights(model, index)
        source = entering(decoder, hidden)
        for kind in modules_of(decoder, index):
            unit = layer.attention.head_dim * layer.attention.heads_per_group if kind == "attention" else 1
            # Of a module with experts, every expert's projection on its own tokens.
            if has_experts(decoder, index, kind):
                states = module_states(decoder, kind, weights, source)
                experts = expert_inputs(states, weights, layer.mlp, torch.ones(1, 1, 1))
                projections = [expert_projection(expert, weights, generator) for expert in experts]
                with_tokens = [projection for projection in projections if projection.inputs.numel()]
                of_experts = [np.sort(score(projection, unit, 1).numpy()) for projection in with_tokens]
                scores[kind].append(np.mean(of_experts, axis=0))
                raw = experts_output(states, weights, layer.mlp)
            else:
                inputs = module_inputs(decoder, index, kind, weights, source, tables)  # (b, t, in_features)
                projection = Projection(weights[OUTPUT[kind]], gram(inputs.flatten(0, 1)), inputs, generator)
                scores[kind].append(score(projection, unit, 1).numpy())
                raw = F.linear(inputs, weights[OUTPUT[kind]], weights.get(BIAS[kind]))  # (b, t, c)
            hidden += module_output(decoder, kind, weights, raw)
        on_layer()
    return scores["attention"], scores["mlp"]
