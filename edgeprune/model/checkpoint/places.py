"""Where the weights of decoder.py stand in a checkpoint: names, and tensors that hold several of them.

A checkpoint may stack q, k and v in one tensor, keep an embedding in two, keep matrices transposed, store a norm's
weight minus one, or turn other pairs of channels. Here that is undone on reading and done again on writing; everything
else sees the weights of decoder.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeprune.model.decoder import Decoder

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """A tensor of a checkpoint, and how weights stand in it.

    key: its name; {i} is the layer's number, {e} the expert's. holds: the weights that are stacked in it along their
    rows, by their names behind the layer, the weight itself where it is empty; by_head: head by head, not one after
    the other. transposed: (in, out). shift: what is added to the stored values. skip: rows before the weight's own.
    neighbours: of queries and keys channels 2m and 2m + 1 of a head turn together, not m and m + half. inputs: the
    tensor of an embedding's rows behind the vocabulary's.
    """

    key: str
    holds: tuple[str, ...] = ()
    by_head: bool = False
    transposed: bool = False
    shift: float = 0.0
    skip: int = 0
    neighbours: bool = False
    inputs: str = ""


Places = Mapping[str, Place]  # by the name of a weight, without `layers.{i}.`, and `experts.{e}` as it stands


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint: the weights in it by their full names, and its shape there.

    shapes: of what it holds of each weight: all of it, or so many of its rows from `first` on.
    """

    key: str
    place: Place
    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    head_dim: int = 0
    factor: float = 1.0  # by which its values are multiplied on reading
    first: int = 0

    @property
    def shape(self) -> Shape:
        rows = sum(shape[0] for shape in self.shapes) + self.place.skip
        shape = (rows, *self.shapes[0][1:])
        return shape[::-1] if self.place.transposed else shape

    def read(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """What it holds of one of its weights; fp32 where its values are changed, else in the tensor's own dtype."""
        place, which = self.place, self.names.index(name)
        if place.transposed:
            tensor = tensor.t()
        if place.by_head:
            parts = tensor.unflatten(0, (-1, len(self.names), self.head_dim))
            tensor = parts[:, which].flatten(0, 1)
        else:
            start = place.skip + sum(shape[0] for shape in self.shapes[:which])
            tensor = tensor[start : start + self.shapes[which][0]]
        if place.neighbours and _turns(name):
            tensor = tensor.unflatten(0, (-1, self.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
        if place.shift or self.factor != 1.0:
            tensor = tensor.float() * self.factor + place.shift
        return tensor.contiguous()

    def write(self, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The tensor of its weights: what `read` takes apart."""
        import torch

        place, parts = self.place, [self._own(name, weights[name]) for name in self.names]
        if place.by_head:
            tensor = torch.stack([part.unflatten(0, (-1, self.head_dim)) for part in parts], dim=1).flatten(0, 2)
        else:
            tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        if place.shift or self.factor != 1.0:
            tensor = (tensor.float() - place.shift) / self.factor
        if place.skip:
            tensor = torch.cat([tensor.new_zeros(place.skip, *tensor.shape[1:]), tensor])
        return tensor.t() if place.transposed else tensor

    def _own(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """What it holds of a weight, in its own order of channels."""
        if self.place.inputs:
            weight = weight[self.first :] if self.first else weight[: self.shapes[0][0]]
        if self.place.neighbours and _turns(name):
            weight = weight.unflatten(0, (-1, 2, self.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        return weight


def stored_tensors(decoder: Decoder, places: Places) -> dict[str, StoredTensor]:
    """The tensors of a decoder's checkpoint by key, each where the last of its weights stands in decoder.shapes()."""
    shapes, found = decoder.shapes(), {}
    for name in shapes:
        prefix, part, numbers = _taken_apart(name)
        place = places[part]
        key = place.key.format(**numbers)
        names = tuple(prefix + held for held in place.holds) or (name,)
        if name != names[-1]:
            continue
        if place.inputs:
            (rows, size), own = shapes[name], decoder.vocab_size
            found[key] = StoredTensor(key, place, names, ((own, size),))
            found[place.inputs] = StoredTensor(place.inputs, place, names, ((rows - own, size),), first=own)
            continue
        attention = decoder.layers[numbers["i"]].attention if "i" in numbers else None
        found[key] = StoredTensor(
            key,
            place,
            names,
            tuple(shapes[each] for each in names),
            attention.head_dim if attention else 0,
            decoder.residual_scale if _is_output(part) else 1.0,
        )
    return found


def _turns(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in ("q", "k")


def _is_output(part: str) -> bool:
    return part.rsplit(".", 1)[-1] in ("o", "o_bias", "down", "down_bias")


def _taken_apart(name: str) -> tuple[str, str, dict[str, int]]:
    """layers.3.mlp.experts.5.up -> `layers.3.`, `mlp.experts.up` and both numbers."""
    if not name.startswith("layers."):
        return "", name, {}
    _, index, part = name.split(".", 2)
    numbers = {"i": int(index)}
    if ".experts." in part:
        kind, _, expert, matrix = part.split(".")
        numbers["e"], part = int(expert), f"{kind}.experts.{matrix}"
    return f"layers.{index}.", part, numbers


def stored_stream(
    tensors: Mapping[str, StoredTensor], weights: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights in the order of decoder.shapes() -> tensors of the checkpoint; what waits for others is held."""
    needed: dict[str, list[StoredTensor]] = {}
    for tensor in tensors.values():
        for name in tensor.names:
            needed.setdefault(name, []).append(tensor)
    waiting: dict[str, torch.Tensor] = {}
    for name, weight in weights:
        if name not in needed:
            raise ValueError(f"{name} is no weight of this model")
        waiting[name] = weight
        complete = [tensor for tensor in needed[name] if name == tensor.names[-1]]
        for tensor in complete:
            yield tensor.key, tensor.write(waiting)
        for each in {each for tensor in complete for each in tensor.names}:
            del waiting[each]
