"""The weight formats that a search may choose from: what was asked for, what the engine runs packed, what fits.

It does not know what a format costs, nor what it loses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf

from edgeprune.dialects import version_of
from edgeprune.errors import InputError
from edgeprune.model.decoder import Decoder
from edgeprune.model.gguf.weights import refusal_in_blocks
from edgeprune.ondevice.budget import format_bytes
from edgeprune.ondevice.runtimes import LLAMA_CPP
from edgeprune.precision import WEIGHT_FORMATS, WeightFormat
from edgeprune.profiles import DeviceProfile, OfferedFormats
from edgeprune.search.dequantised import Dequantised
from edgeprune.search.widths import Format

AUTO, FLOAT = "auto", "float"
ASKED = "asked for"
FEW_BITS = 6  # embedding and head in fewer lose as much as all layers together


@dataclass(frozen=True)
class WeightChoice:
    """The formats of a search; of its modules, and of embedding and head; reason: in words."""

    layers: tuple[Format, ...]
    tables: tuple[Format, ...]
    reason: str

    @property
    def formats(self) -> tuple[Format, ...]:
        """Returns all of them, floats first."""
        return (None, *dict.fromkeys(form for form in (*self.layers, *self.tables) if form is not None))

    @property
    def quantised(self) -> tuple[WeightFormat, ...]:
        """Returns all but floats."""
        return tuple(form for form in self.formats if form is not None)

    @property
    def fewest_bits(self) -> Format:
        """Returns the format of fewest bits that embedding and head may have; None: floats."""
        return min(self.tables, key=lambda form: form.weight_bits if form else inf)

    @property
    def is_asked(self) -> bool:
        """Returns whether the formats are what was asked for, not what `auto` took."""
        return self.reason.startswith(ASKED)

    @property
    def names(self) -> str:
        """Returns the names of the modules' formats."""
        return ", ".join(form.name if form else FLOAT for form in self.layers)


def weight_choice(asked: str, profile: DeviceProfile, decoder: Decoder) -> WeightChoice:
    """Returns the formats that a request may use of a model on a device.

    asked: `auto`, or `float`, `int8`, `int4` and names of formats, separated by commas. Raises InputError for a word
    that is none of these, for a format that the device's engine does not run, and for one that the model's matrices
    cannot be in.
    """
    words = [word.strip() for word in asked.split(",")]
    offers = {word: offer for word, offer in profile.weights.items() if _runs(profile, offer)}
    # All that the device runs well, as far as the model has sizes for it.
    if words == [AUTO]:
        fitting = {word: _fitting(offer, decoder) for word, offer in offers.items() if offer.auto}
        layers = (None, *dict.fromkeys(form for form in fitting.values() if form is not None))
        untimed = [form.name for offer in offers.values() if not offer.auto and (form := _fitting(offer, decoder))]
        reason = _reason(profile, fitting, untimed) + _instead(fitting, decoder)
        return WeightChoice(layers, _tables(offers, decoder), reason)
    named = {word: _named(word, profile, offers, decoder) for word in words}
    layers = tuple(dict.fromkeys(named.values()))
    tables = (None,) if layers == (None,) else _tables(offers, decoder)
    return WeightChoice(layers, tables, ASKED + _instead(named, decoder))


def _instead(taken: dict[str, Format], decoder: Decoder) -> str:
    """Returns in words which formats stand in for those that were meant, whose blocks do not divide the sizes.

    taken: by the word; one that means whatever fits, as `int4`, is no format that was meant.
    """
    others = {
        word: form.name
        for word, form in taken.items()
        if form is not None and word in WEIGHT_FORMATS and refusal(WEIGHT_FORMATS[word], decoder) is not None
    }
    if not others:
        return ""
    stand_ins = ", ".join(f"{name} for {word}" for word, name in others.items())
    return f"; {refusal(WEIGHT_FORMATS[next(iter(others))], decoder)}: {stand_ins}"


def _reason(profile: DeviceProfile, fitting: dict[str, Format], untimed: Sequence[str]) -> str:
    """Returns what `auto` took, in words; untimed: what it left out because its speed is not known."""
    taken = list(dict.fromkeys(form.name for form in fitting.values() if form is not None))
    left_out = [word for word, form in fitting.items() if form is None]
    reason = (
        f"{profile.name} runs {', '.join(taken[:-1])}{' and ' * (len(taken) > 1)}{taken[-1]} well"
        if taken
        else f"{profile.name} runs floats alone well"
    )
    reason += f"; this model's matrices cannot be in {' or '.join(left_out)}" if left_out else ""
    return reason + (f"; nobody timed {' or '.join(untimed)}, which --weights names" if untimed else "")


def _runs(profile: DeviceProfile, offer: OfferedFormats) -> bool:
    """Returns whether the device's version of TensorRT is new enough."""
    if offer.tensorrt is None or profile.tensorrt is None:
        return True
    return version_of(profile.tensorrt) >= version_of(offer.tensorrt)


def _named(word: str, profile: DeviceProfile, offers: dict[str, OfferedFormats], decoder: Decoder) -> Format:
    """Returns the format of a word. Raises InputError."""
    if word == FLOAT:
        return None
    known = [FLOAT, *profile.weights, *(name for offer in offers.values() for name in offer.formats)]
    if word in offers:
        form = _fitting(offers[word], decoder)
        if form is None:
            raise _refused(WEIGHT_FORMATS[offers[word].formats[0]], decoder, offers)
        return form
    if word in profile.weights:
        offer = profile.weights[word]
        raise InputError(
            f"TensorRT {profile.tensorrt} of {profile.name} does not run {word}, which needs {offer.tensorrt}",
            f"It runs {', '.join((FLOAT, *offers))}; --tensorrt names another version.",
        )
    if word in WEIGHT_FORMATS or word in ("int8", "int4"):
        if not any(word in offer.formats for offer in offers.values()):
            who = f"llama.cpp on {profile.name}" if profile.engine == LLAMA_CPP else profile.name
            runs = dict.fromkeys((FLOAT, *offers, *(name for offer in offers.values() for name in offer.formats)))
            raise InputError(
                f"{who} does not run weights in {word} well", f"It runs {', '.join(runs)}: --weights auto."
            )
        if refusal(WEIGHT_FORMATS[word], decoder) is not None:
            raise _refused(WEIGHT_FORMATS[word], decoder, offers)
        return WEIGHT_FORMATS[word]
    raise InputError(f"unknown weights {word[:60]!r}", f"Give auto, or some of {', '.join(dict.fromkeys(known))}.")


def _fitting(offer: OfferedFormats, decoder: Decoder) -> Format:
    """Returns the first format of an offer that the model's matrices can be in; None where there is none."""
    return next(
        (WEIGHT_FORMATS[name] for name in offer.formats if refusal(WEIGHT_FORMATS[name], decoder) is None), None
    )


def _sizes(decoder: Decoder) -> dict[str, int]:
    """Returns the numbers of inputs that a model's matrices have, by name."""
    layer = decoder.layers[0]
    sizes = {"hidden_size": decoder.hidden_size}
    if layer.attention is not None:
        sizes["width of all query heads"] = layer.attention.query_size
    if layer.mlp is not None:
        sizes["intermediate_size"] = layer.mlp.intermediate_size
    return sizes


def refusal(form: WeightFormat, decoder: Decoder) -> str | None:
    """Returns why a model's matrices cannot all be in a format, in words; None where they can."""
    kind = "groups" if form.block is None else "blocks"
    for name, size in _sizes(decoder).items():
        if size % form.multiple:
            return f"{form.name} has {kind} of {form.multiple} inputs, which do not divide the {name} {size}"
    if form.storage == "gguf":
        return refusal_in_blocks(form, decoder)
    has_experts = any(layer.mlp and layer.mlp.experts for layer in decoder.layers)
    if form.activation_bits is not None and has_experts:
        return f"{form.name} has one scale for all that a matrix reads, and each expert reads other tokens"
    if form.storage == "offset" and has_experts:
        return f"{form.name} is stored by values, and no checkpoint holds experts so beside attention of few bits"
    return None


def _refused(form: WeightFormat, decoder: Decoder, offers: dict[str, OfferedFormats]) -> InputError:
    """Returns the error for a format that the model's matrices cannot be in."""
    fitting = [FLOAT, *(fit.name for offer in offers.values() if (fit := _fitting(offer, decoder)) is not None)]
    return InputError(refusal(form, decoder), f"This model takes {', '.join(fitting)}.")


def _tables(offers: dict[str, OfferedFormats], decoder: Decoder) -> tuple[Format, ...]:
    """Returns the formats of embedding and head: floats, and those that lose next to nothing there."""
    formats = (_fitting(offer, decoder) for offer in offers.values() if offer.tables)
    return (None, *dict.fromkeys(form for form in formats if form is not None and form.bits >= FEW_BITS))


def without_formats(choice: WeightChoice, reason: str) -> WeightChoice:
    """Returns floats alone, for a model whose weights cannot be stored otherwise. Raises InputError where formats were
    asked for."""
    if choice.is_asked and choice.quantised:
        raise InputError(f"{reason}, so its weights stay floats", "Give --weights float, or leave it out.")
    return replace(choice, layers=(None,), tables=(None,), reason=reason)


def without_dequantised(choice: WeightChoice, engine: str, dequantised: Sequence[Dequantised]) -> WeightChoice:
    """Returns the formats without those of which an engine's builder makes copies, unless they were asked for.

    The reason names them, and the memory that shows it. engine: in words.
    """
    if not dequantised:
        return choice
    shown = "; ".join(
        f"{one.form} of {'layers' if one.in_layers else 'embedding and head'} ({format_bytes(one.context_bytes)} of "
        f"activations in a small model, {format_bytes(one.float_context_bytes)} in floats)"
        for one in dequantised
    )
    copies = f"{engine} dequantises into copies at each step: {shown}"
    if choice.is_asked:
        return replace(choice, reason=f"{choice.reason}, though {copies}")
    in_layers, in_tables = ({one.form for one in dequantised if one.in_layers is place} for place in (True, False))
    return WeightChoice(
        tuple(form for form in choice.layers if form is None or form.name not in in_layers),
        tuple(form for form in choice.tables if form is None or form.name not in in_tables),
        f"{choice.reason}; left out is what {copies}",
    )
