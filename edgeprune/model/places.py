"""Where the weights of decoder.py stand in a checkpoint: names, and tensors that hold several of them.

A checkpoint may stack q, k and v in one tensor, keep matrices transposed, or store a norm's weight minus one. Here
that is undone on reading and done again on writing; everything else sees the weights of decoder.py.
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
    """

    key: str
    holds: tuple[str, ...] = ()
    by_head: bool = False
    transposed: bool = False
    shift: float = 0.0
    skip: int = 0


Places = Mapping[str, Place]  # by the name of a weight, without `layers.{i}.`, and `experts.{e}` as it stands


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint: the weights in it by their full names, and its shape there."""

    key: str
    place: Place
    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    head_dim: int
    factor: float  # by which its values are multiplied on reading

    @property
    def shape(self) -> Shape:
        rows = sum(shape[0] for shape in self.shapes) + self.place.skip
        shape = (rows, *self.shapes[0][1:])
        return shape[::-1] if self.place.transposed else shape

    def read(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """One of its weights; fp32 where its values are changed, else in the tensor's own dtype."""
        place, which = self.place, self.names.index(name)
        if place.transposed:
            tensor = tensor.t()
        if place.by_head:
            parts = tensor.unflatten(0, (-1, len(self.names), self.head_dim))
            tensor = parts[:, which].flatten(0, 1)
        else:
            start = place.skip + sum(shape[0] for shape in self.shapes[:which])
            tensor = tensor[start : start + self.shapes[which][0]]
        if place.shift or self.factor != 1.0:
            tensor = tensor.float() * self.factor + place.shift
        return tensor.contiguous()

    def write(self, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The tensor of its weights: what `read` takes apart."""
        import torch

        place, parts = self.place, [weights[name] for name in self.names]
        if place.by_head:
            tensor = torch.stack([part.unflatten(0, (-1, self.head_dim)) for part in parts], dim=1).flatten(0, 2)
        else:
            tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        if place.shift or self.factor != 1.0:
            tensor = (tensor.float() - place.shift) / self.factor
        if place.skip:
            tensor = torch.cat([tensor.new_zeros(place.skip, *tensor.shape[1:]), tensor])
        return tensor.t() if place.transposed else tensor


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
        attention = decoder.layers[numbers["i"]].attention if "i" in numbers else None
        found[key] = StoredTensor(
            key, place, names, tuple(shapes[each] for each in names), attention.head_dim if attention else 0,
            decoder.residual_scale if _is_output(part) else 1.0,
        )  # fmt: skip
    return found


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
    needed = {name: tensor for tensor in tensors.values() for name in tensor.names}
    waiting: dict[str, torch.Tensor] = {}
    for name, weight in weights:
        if name not in needed:
            raise ValueError(f"{name} is no weight of this model")
        waiting[name] = weight
        tensor = needed[name]
        if name == tensor.names[-1]:
            yield tensor.key, tensor.write(waiting)
            for each in tensor.names:
                del waiting[each]
