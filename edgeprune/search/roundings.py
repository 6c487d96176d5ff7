"""The measurement of the loss that every weight format would cost in every module, and in embedding and head, and of
that of every format of the KV cache.

It does not know the budget, nor what a format saves. Weights are rounded to nearest here, on grids that the moments of
their inputs weigh; the share of the error that GPTQ leaves follows from the inputs without any rounding. What
compensation makes of modules is in the measured response (response.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf

import numpy as np
import torch
import torch.nn.functional as F

from edgeprune.model.attention import LayerWeights, Tables, attention_heads
from edgeprune.model.backward import ModuleStates
from edgeprune.model.cache import scales_of
from edgeprune.model.decoder import Decoder
from edgeprune.model.forward import (
    CHUNK_TOKENS,
    OUTPUT,
    head_logits,
    module_output,
    module_raw,
    module_states,
    normed,
    row_chunks,
)
from edgeprune.model.model import Model
from edgeprune.precision import CacheFormat, WeightFormat
from edgeprune.pruning.activations import rounded_module
from edgeprune.pruning.grids import choose_grid
from edgeprune.pruning.moments import gram, held_out_rows
from edgeprune.pruning.quantize import gptq_squares, probed_outputs
from edgeprune.pruning.score import Projection
from edgeprune.search.widths import CacheLosses, RoundingLosses

HEAD_POSITIONS = 512  # whose logits are compared: the loss of the head is about the same at all of them


def coarsest(formats: tuple[WeightFormat, ...]) -> WeightFormat:
    """Returns the format of the fewest bits a weight, scales included; of these one without offsets."""
    return min(formats, key=lambda form: (form.weight_bits, form.offset is not None))


class ModuleRoundings:
    """The losses of modules in weight formats, gathered module by module from the last to the first.

    ids: calibration samples (b, t) int64, the first ones of those that the modules are run on. A change dy_t of a
    module's output costs about 1/2 sum_t ||g_t||^2 ||dy_t||^2 / hidden_size / tokens nats, as in measure_sensitivities.
    Of what rounding to nearest costs, a module keeps the share that GPTQ leaves, which differs tenfold between modules:
    the mean of that of the matrices before the activation and that of the output projection. Most of dy comes from the
    former; yet with each part's own share, predictions of the parts of a real model were further apart.
    """

    def __init__(
        self, decoder: Decoder, ids: torch.Tensor, formats: Sequence[WeightFormat], caches: Sequence[CacheFormat] = ()
    ) -> None:
        self.decoder, self.formats, self.caches, self.samples = decoder, formats, caches, len(ids)
        self.share = 1 / (2 * decoder.hidden_size * ids.numel())
        self.tables = Tables(decoder, ids.shape[1])
        self.found: dict[str, dict[str, list[float]]] = {form.name: {"attention": [], "mlp": []} for form in formats}
        self.found_caches: dict[str, list[float]] = {form.name: [] for form in caches}

    @torch.inference_mode()
    def add(self, module: ModuleStates, projection: Projection) -> None:
        """Compares a module's output in every format with that of its floats.

        projection: the output projection, of experts the first one's, with inputs that are scaled by the square roots
        of the tokens' weights.
        """
        decoder, index, kind, weights = self.decoder, module.index, module.kind, module.weights
        source = module.source[: self.samples]  # (b, t, c)
        for form in self.caches if kind == "attention" else ():
            scales = self._scales(index, weights, source, form)
            loss = self._loss(decoder.with_cache(form), module, weights | scales)
            self.found_caches[form.name].append(loss)
        if not self.formats:
            return
        inputs = None if module.inputs is None else projection.inputs[: self.samples]
        # What GPTQ leaves; of experts, of the matrices of the first one, as if all tokens read them.
        shares = [GptqShares(self._before(module), module_states(decoder, kind, weights, module.source))]
        if inputs is not None:
            shares.append(GptqShares(projection.weight, projection.inputs, projection.gram))
        for form in self.formats:
            if form.activation_bits is None:
                changed = _rounded(decoder, kind, weights, source, inputs, form)
            else:
                plain = rounded_module(decoder, index, kind, weights, source, self.tables, form)
                changed = _rounded(decoder, kind, plain, source, None, form)
            # GPTQ makes up for the rounding of weights, which is the lesser part where activations are rounded too.
            left = 1.0 if form.activation_bits else np.mean([share.of(form) for share in shares])
            loss = self._loss(decoder.with_format(form), module, changed)
            self.found[form.name][kind].append(loss * float(left))

    def _loss(self, decoder: Decoder, module: ModuleStates, changed: LayerWeights) -> float:
        """Returns the loss in nats per token of a module with changed weights, or of a decoder with other formats."""
        source, raw = module.source[: self.samples], module.raw[: self.samples]  # (b, t, c) each
        energy = (module.energy[: self.samples] * self.share)[..., None]  # (b, t, 1)
        total = 0.0
        # Some samples at a time.
        parts = (row_chunks(states, CHUNK_TOKENS) for states in (source, raw, energy))
        for source_part, raw_part, energy_part in zip(*parts, strict=True):
            dense = module_output(decoder, module.kind, module.weights, raw_part)
            off = _output(decoder, module.index, module.kind, changed, source_part, self.tables) - dense
            total += float(off.square_().mul_(energy_part).sum())
        return total

    def _scales(self, index: int, weights: LayerWeights, source: torch.Tensor, form: CacheFormat) -> LayerWeights:
        """Returns the scales of a layer's KV cache, from what its attention reads (b, t, c)."""
        decoder = self.decoder
        states = module_states(decoder, "attention", weights, source)
        attention = decoder.layers[index].attention
        return scales_of(*attention_heads(states, weights, attention, self.tables, decoder.norm_eps)[1:], form)

    def _before(self, module: ModuleStates) -> torch.Tensor:
        """Returns the weights (out_features, c) of the matrices before the activation; of experts, the first one's."""
        prefix, names = f"{module.kind}.", ("q", "k", "v")
        if module.kind == "mlp":
            names = self.decoder.layers[module.index].mlp.inputs
            prefix += "experts.0." * (module.inputs is None)
        return torch.cat([module.weights[prefix + name] for name in names])

    def losses(self, of_tables: Mapping[str, tuple[float, float]]) -> dict[str, RoundingLosses]:
        """Returns the losses of each format in nats per token, by its name; of_tables: those of embedding and head, inf
        in formats that they may not have."""
        return {
            name: RoundingLosses(
                np.array(kinds["attention"][::-1]), np.array(kinds["mlp"][::-1]), *of_tables.get(name, (inf, inf))
            )
            for name, kinds in self.found.items()
        }

    def cache_losses(self) -> dict[str, CacheLosses]:
        """Returns the losses of each format of the KV cache in nats per token, by its name."""
        return {name: CacheLosses(np.array(found[::-1])) for name, found in self.found_caches.items()}


def _output(
    decoder: Decoder, index: int, kind: str, weights: LayerWeights, states: torch.Tensor, tables: Tables
) -> torch.Tensor:
    return module_output(decoder, kind, weights, module_raw(decoder, index, kind, weights, states, tables))


def _rounded(
    decoder: Decoder,
    kind: str,
    weights: LayerWeights,
    source: torch.Tensor,
    inputs: torch.Tensor | None,
    form: WeightFormat,
) -> LayerWeights:
    """Returns the weights of a layer with the matrices of one module rounded.

    source: (b, t, c), what the module reads; inputs: (b, t, in_features), what its output projection does; None where
    that is not known.
    """
    # The mean squares of what the matrices read, on some samples.
    part = row_chunks(source, CHUNK_TOKENS)[0]
    of_states = module_states(decoder, kind, weights, part).flatten(0, 1).square().mean(dim=0)  # (c,)
    of_output = None if inputs is None else inputs[: len(part)].flatten(0, 1).square().mean(dim=0)  # (in_features,)
    changed = dict(weights)
    for name, weight in weights.items():
        if weight.dim() != 2 or not name.startswith(f"{kind}.") or name == "mlp.router":
            continue
        importance = of_output if name == OUTPUT[kind] else of_states
        if importance is None or len(importance) != weight.shape[1]:  # the output projection of an expert
            importance = torch.ones(weight.shape[1])
        changed[name] = choose_grid(weight, importance, form, "ends").nearest(weight).dequantised()
    return changed


@torch.inference_mode()
def table_losses(
    model: Model, ids: torch.Tensor, hidden: torch.Tensor, energy: torch.Tensor, formats: Sequence[WeightFormat]
) -> dict[str, tuple[float, float]]:
    """Returns the losses of embedding and head by the name of a format; that of a tied table is all in the second.

    ids: (b, t) int64; hidden: (b, t, c), the stream behind the last layer; energy: (b, t), ||dL/dh_t||^2 with h the
    stream behind the embedding.
    """
    decoder = model.decoder
    energy = energy * (1 / (2 * decoder.hidden_size * ids.numel()))
    embedding = model.weights["embedding"].float()
    head = embedding[: decoder.vocab_size] if decoder.tie_word_embeddings else model.weights["head"].float()
    norm = {name: model.weights[name].float() for name in decoder.norm_shapes("norm")}
    read = normed(decoder, hidden, norm, "norm")  # (b, t, c)
    states = read.flatten(0, 1)[:: max(1, ids.numel() // HEAD_POSITIONS)]  # (positions, c)
    expected = head_logits(decoder, states, head).log_softmax(dim=-1)  # (positions, vocab_size)
    moments, likely = states.square().mean(dim=0), expected.exp()
    losses, shares = {}, None
    if formats and not decoder.tie_word_embeddings:
        shares = GptqShares(head, read)
    for form in formats:
        # The rows that the samples read; the embedding is multiplied by a scale in some models.
        alike = torch.ones(embedding.shape[1])
        rows = embedding[ids.flatten()]  # (b * t, c)
        used, places = ids.flatten().unique(return_inverse=True)
        off = choose_grid(embedding[used], alike, form, "ends").nearest(embedding[used]).dequantised()[places] - rows
        of_embedding = float((off.mul_(decoder.embedding_scale).square().sum(dim=1) * energy.flatten()).sum())
        # A tied table has no say about the moments of what it reads.
        importance = alike if decoder.tie_word_embeddings else moments
        changed = choose_grid(head, importance, form, "ends").nearest(head).dequantised()
        logits = head_logits(decoder, states, changed).log_softmax(dim=-1)
        of_head = float(F.kl_div(logits, likely, reduction="sum")) / len(states)
        if decoder.tie_word_embeddings:
            losses[form.name] = (0.0, of_head + of_embedding)
        else:
            losses[form.name] = (of_embedding, of_head * shares.of(form))
    return losses


class GptqShares:
    """The shares that GPTQ leaves of the squared errors of rounding a weight to nearest, by format.

    weight: (out_features, in_features) fp32, some of whose outputs are rounded; inputs: (b, t, in_features) fp32, what
    it reads; total: their moments (in_features, in_features) fp64, where they are known.
    """

    def __init__(self, weight: torch.Tensor, inputs: torch.Tensor, total: torch.Tensor | None = None) -> None:
        self.rows = weight[probed_outputs(weight)]  # (outputs, in_features)
        held, rows = held_out_rows(*inputs.shape[:2]), inputs.flatten(0, 1)
        self.held_out = rows[held]  # (n, in_features)
        others = gram(rows[~held]) if total is None else total - gram(self.held_out)
        self.importance = others.diagonal()
        # Of fewer tokens than features the walk does not try GPTQ either.
        self.left = gptq_squares(others, self.held_out) if len(rows) >= rows.shape[1] else None  # (in_features,)

    def of(self, form: WeightFormat) -> float:
        """Returns the share in a format, on held-out inputs, 1 at most."""
        if self.left is None:
            return 1.0
        grid = choose_grid(self.rows, self.importance, form, "ends")
        off = self.rows - grid.nearest(self.rows).dequantised()
        by_nearest = float((self.held_out @ off.T).square_().sum())
        # By GPTQ each weight is off by up to half a step, evenly: those before have moved it anywhere.
        steps = (grid.scales.square().sum(dim=0) / 12).repeat_interleave(self.rows.shape[1] // grid.scales.shape[1])
        by_gptq = float(steps.double() @ self.left)
        return by_gptq / by_nearest if by_gptq < by_nearest else 1.0
