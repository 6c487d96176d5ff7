"""The places of decoder.py's weights in a checkpoint: names, and tensors that hold several weights.

A checkpoint may stack q, k and v in one tensor, keep an embedding in two, keep matrices transposed, store a norm's
weight minus one, or rotate other pairs of channels. That is undone on reading and done again on writing; the rest of
the program sees the weights of decoder.py alone. Codes, scales and zeros of a weight have its rows, and go the same
way; weights whose codes no other loader takes are stored by their values. It knows no family: their tables are in
names.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeprune.model.decoder import Decoder
from edgeprune.precision import WeightFormat

if TYPE_CHECKING:
    import torch

    from edgeprune.model.model import Stored, StoredWeights

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """A tensor of a checkpoint, and how weights are stored in it.

    key: its name; {i} is the layer's number, {e} the expert's. holds: the weights that are stacked in it along their
    rows, by their names behind the layer's prefix; empty for the one weight itself. by_head: they are stacked head by
    head, not one after the other. transposed: stored as (in, out). shift: what is added to the stored values. skip:
    rows before the weight's own. neighbours: channels 2m and 2m + 1 of a query's or key's head are rotated together,
    not m and m + half. inputs: the name of another tensor with the embedding's rows behind the vocabulary's. stacked:
    the tensor has one part for each expert along its first axis, with the rows of the weights that it holds in turn.
    """

    key: str
    holds: tuple[str, ...] = ()
    by_head: bool = False
    transposed: bool = False
    shift: float = 0.0
    skip: int = 0
    neighbours: bool = False
    inputs: str = ""
    stacked: bool = False


Places = Mapping[str, Place]  # by the name of a weight without `layers.{i}.` and without an expert's number


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint: the weights in it, by their full names, and its shape there.

    names: of a stacked one those of each expert behind each other.
    shapes: of the part of each weight that it holds: all of the weight, or some of its rows from `first` on. form: the
    format of its codes, which all its weights have; None for floats. exact: the floats are the values of codes, so that
    the checkpoint's own type may be too short for them.
    """

    key: str
    place: Place
    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    head_dim: int = 0
    factor: float = 1.0  # by which its values are multiplied on reading
    first: int = 0
    form: WeightFormat | None = None
    exact: bool = False

    @property
    def shape(self) -> Shape:
        """Returns the tensor's shape in the checkpoint."""
        return self._experts + (self._part[::-1] if self.place.transposed else self._part)

    @property
    def matrix(self) -> Shape:
        """Returns the tensor's shape as (outputs, inputs), or (experts, outputs, inputs), however it is stored."""
        return self._experts + self._part

    @property
    def _in_turn(self) -> int:
        """Returns the number of weights that a stacked tensor holds of each expert."""
        return max(1, len(self.place.holds))

    @property
    def _experts(self) -> Shape:
        return (len(self.names) // self._in_turn,) if self.place.stacked else ()

    @property
    def _part(self) -> Shape:
        """Returns the shape of the tensor, or of its part for each expert, with the rows of the weights first."""
        shapes = self.shapes[: self._in_turn] if self.place.stacked else self.shapes
        if shapes == ((),):  # a number
            return ()
        return (sum(shape[0] for shape in shapes) + self.place.skip, *shapes[0][1:])

    def expert_of(self, name: str) -> int | None:
        """Returns the place of a weight's expert along the first axis; None where the tensor is not stacked."""
        return self.names.index(name) // self._in_turn if self.place.stacked else None

    def read(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """Returns what the stored tensor holds of one of its weights, in the layout of decoder.py.

        tensor: where it is stacked, the part of the weight's expert alone. The result is fp32 where values are changed,
        otherwise in the tensor's own dtype.
        """
        tensor = self.rows_of(tensor, name)
        if self.place.shift or self.factor != 1.0:
            tensor = tensor.float() * self.factor + self.place.shift
        return tensor.contiguous()

    def rows_of(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """Returns the rows of one of its weights in the order of decoder.py, with the values that are stored."""
        place, index = self.place, self.names.index(name)
        if not self._part:
            return tensor
        # Take the rows of the weight.
        if place.transposed:
            tensor = tensor.t()
        if place.stacked:
            tensor = tensor[index % self._in_turn :: self._in_turn]
        elif place.by_head:
            heads = tensor.unflatten(0, (-1, len(self.names), self.head_dim))  # (heads, weights, head_dim, ...)
            tensor = heads[:, index].flatten(0, 1)  # (heads * head_dim, ...)
        else:
            start = place.skip + sum(shape[0] for shape in self.shapes[:index])
            tensor = tensor[start : start + self.shapes[index][0]]
        # Put the channels of each head in the order of rotate-half.
        if place.neighbours and _turns(name):
            # (heads, pairs, 2, ...) -> (heads, 2, pairs, ...) -> (heads * head_dim, ...)
            tensor = tensor.unflatten(0, (-1, self.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
        return tensor

    def write(self, weights: StoredWeights) -> Stored:
        """Returns the stored tensor of its weights, from which `read` takes them again.

        Of weights of few bits, which have one format, it is the codes of its rows. Raises ValueError where their values
        would change or their inputs would not be rows.
        """
        import torch

        from edgeprune.model.quantised import QuantisedWeight, joined

        parts = [weights[name] for name in self.names]
        if all(isinstance(part, QuantisedWeight) for part in parts):
            if self.place.transposed or self.place.shift or self.place.skip or self.factor != 1.0:
                raise ValueError(f"{self.key} cannot be of few bits")
            # The order of the rows is that of their numbers.
            numbers = torch.arange(sum(len(part.codes) for part in parts)).split([len(part.codes) for part in parts])
            return joined(parts).rows(self._write(dict(zip(self.names, numbers, strict=True))))
        return self._write(weights)

    def _write(self, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns the stored tensor of weights in floats."""
        import torch

        place, stored_weights = self.place, [self._own(name, weights[name]) for name in self.names]
        if place.stacked:
            # (experts, rows of the weights in turn, ...)
            parts = torch.stack(
                [torch.stack(of_one, dim=1).flatten(0, 1) for of_one in self._by_expert(stored_weights)]
            )
            return parts.mT if place.transposed else parts
        if place.by_head:
            # (heads, weights, head_dim, ...) -> (heads * weights * head_dim, ...)
            tensor = torch.stack(
                [weight.unflatten(0, (-1, self.head_dim)) for weight in stored_weights], dim=1
            ).flatten(0, 2)
        else:
            tensor = stored_weights[0] if len(stored_weights) == 1 else torch.cat(stored_weights)
        if place.shift or self.factor != 1.0:
            tensor = (tensor.float() - place.shift) / self.factor
        if place.skip:
            tensor = torch.cat([tensor.new_zeros(place.skip, *tensor.shape[1:]), tensor])
        return tensor.t() if place.transposed else tensor

    def _by_expert(self, weights: list[torch.Tensor]) -> list[list[torch.Tensor]]:
        return [weights[start : start + self._in_turn] for start in range(0, len(weights), self._in_turn)]

    def _own(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Returns what the stored tensor holds of a weight, with the channels in its own order."""
        if self.place.inputs:
            weight = weight[self.first :] if self.first else weight[: self.shapes[0][0]]
        if self.place.neighbours and _turns(name):
            # (heads, 2, pairs, ...) -> (heads, pairs, 2, ...) -> (heads * head_dim, ...)
            weight = weight.unflatten(0, (-1, 2, self.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        return weight


def stored_tensors(decoder: Decoder, places: Places) -> dict[str, StoredTensor]:
    """Returns the tensors of a decoder's checkpoint by key.

    They come in the order in which the last of their weights comes in decoder.shapes().
    """
    shapes, formats, tensors = decoder.shapes(), decoder.weight_formats, {}
    by_value = formats_by_value(decoder, places)
    for name in shapes:
        prefix, part, numbers = _taken_apart(name)
        place = places[part]
        key = place.key.format(**numbers)
        names = tuple(prefix + held for held in place.holds) or (name,)
        if place.stacked:
            experts = range(decoder.layers[numbers["i"]].mlp.experts.num_experts)
            names = tuple(prefix + _of_expert(held, e) for e in experts for held in place.holds or (part,))
        # The last of its weights stands for the tensor.
        if name != names[-1]:
            continue
        # An embedding in two tensors.
        if place.inputs:
            (rows, size), vocabulary_rows = shapes[name], decoder.vocab_size
            parts = {key: (0, vocabulary_rows), place.inputs: (vocabulary_rows, rows - vocabulary_rows)}
            for part_key, (first, count) in parts.items():
                part_shapes = ((count, size),)
                tensors[part_key] = StoredTensor(
                    part_key, place, names, part_shapes, first=first, exact=name in by_value
                )
            continue
        # Any other tensor; output projections may have a factor.
        attention = decoder.layers[numbers["i"]].attention if "i" in numbers else None
        tensors[key] = StoredTensor(
            key,
            place,
            names,
            tuple(shapes[weight] for weight in names),
            attention.head_dim if attention else 0,
            decoder.residual_scale if _is_output(part) else 1.0,
            form=None if name in by_value else formats.get(name),
            exact=name in by_value,
        )
    return tensors


def formats_by_value(decoder: Decoder, places: Places) -> dict[str, WeightFormat]:
    """Returns the formats of the weights whose values are stored as floats, because no other loader takes their codes.

    transformers loads no packed embedding and no experts in one packed tensor, and compressed-tensors has no minima of
    floats.
    """
    return {
        name: form
        for name, form in decoder.weight_formats.items()
        if name == "embedding" or form.storage == "offset" or places[_taken_apart(name)[1]].stacked
    }


def _turns(name: str) -> bool:
    """Returns whether a weight is a projection to queries or keys, whose channels are rotated, or its bias."""
    return name.rsplit(".", 1)[-1].removesuffix("_bias") in ("q", "k")


def _is_output(part: str) -> bool:
    return part.rsplit(".", 1)[-1] in ("o", "o_bias", "down", "down_bias")


def _taken_apart(name: str) -> tuple[str, str, dict[str, int]]:
    """Returns the prefix of a weight's name, the rest without numbers, and the numbers by `i` and `e`.

    `layers.3.mlp.experts.5.up` gives `layers.3.`, `mlp.experts.up` and both numbers.
    """
    if not name.startswith("layers."):
        return "", name, {}
    _, index, part = name.split(".", 2)
    numbers = {"i": int(index)}
    if ".experts." in part:
        kind, _, expert, matrix = part.split(".")
        numbers["e"], part = int(expert), f"{kind}.experts.{matrix}"
    return f"layers.{index}.", part, numbers


def _of_expert(part: str, expert: int) -> str:
    """Returns the name of an expert's weight: `mlp.experts.up` becomes `mlp.experts.5.up`."""
    kind, matrix = part.rsplit(".", 1)
    return f"{kind}.{expert}.{matrix}"


def stored_stream(
    tensors: Mapping[str, StoredTensor], weights: Iterable[tuple[str, Stored]]
) -> Iterator[tuple[str, Stored]]:
    """Yields the tensors of the checkpoint for weights in the order of decoder.shapes().

    A weight is kept until the last of its tensor's weights has come. Raises ValueError for a weight that is not of the
    model.
    """
    needed: dict[str, list[StoredTensor]] = {}
    for tensor in tensors.values():
        for name in tensor.names:
            needed.setdefault(name, []).append(tensor)
    waiting: dict[str, Stored] = {}
    for name, weight in weights:
        if name not in needed:
            raise ValueError(f"{name} is not a weight of this model")
        waiting[name] = weight
        del weight  # freed once it is written, before the next one is made
        complete = [tensor for tensor in needed[name] if name == tensor.names[-1]]
        for tensor in complete:
            yield tensor.key, tensor.write(waiting)
        for held_name in {held_name for tensor in complete for held_name in tensor.names}:
            del waiting[held_name]
