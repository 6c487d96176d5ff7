"""Device profiles: one TOML file each, every hardware figure with its source and confidence.

It knows nothing about models. Estimates rest on these figures; the cpu profile ships none and is
measured on first use.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from edgeprune.dialects import IN_PLACE, Dialect, dialect_for, dialect_over
from edgeprune.errors import InputError
from edgeprune.files import printable, read_text
from edgeprune.precision import WEIGHT_FORMATS, CacheFormat, GraphPrecision, WeightFormat

PROCESSOR = "cpu"  # the profile of this machine's processor
GgmlWord = Literal["q3_k", "q4_0", "q4_1", "q4_k", "q5_0", "q5_1", "q5_k", "q6_k", "q8_0"]
Confidence = Literal["high", "medium", "low"]

_BYTES = {"B": 1.0, "MB": 1e6, "GB": 1e9, "MiB": 2.0**20, "GiB": 2.0**30}
_RATES = {"GFLOP/s": 1e9, "TFLOP/s": 1e12}
_SHARE = {"1": 1.0}
UNITS: dict[str, dict[str, float]] = {
    "memory": _BYTES,
    "system_reserve": _BYTES,
    "runtime_memory": _BYTES,
    "build_memory": _BYTES,
    "bandwidth": {"MB/s": 1e6, "GB/s": 1e9, "TB/s": 1e12},
    "fp16_compute": _RATES,
    "fp32_compute": _RATES,
    "int8_compute": {"TOP/s": 1e12},
    "decode_efficiency": _SHARE,
    "decode_overhead": {"ms": 1e-3, "s": 1.0},
    "layer_overhead": {"us": 1e-6},
    "prefill_efficiency": _SHARE,
    "prefill_overhead": {"ms": 1e-3, "s": 1.0},
    "token_overhead": {"ns": 1e-9},
}
"""The hardware figures of a profile, and the units that each may have, in bytes, seconds, FLOP and operations."""


# Bounds that keep every product of figures finite, and every text of a profile on a line or a page.
SMALLEST, LARGEST = 1e-9, 1e15  # of a figure in its own unit
MOST = 2**31 - 1  # sequences, tokens, channels
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]  # it becomes part of a path
Line = Annotated[str, Field(max_length=200)]
Count = Annotated[int, Field(ge=1, le=MOST)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class HardwareFigure(_Strict):
    """A figure with where it comes from and how sure it is."""

    value: float = Field(ge=SMALLEST, le=LARGEST)
    unit: Line
    source: str = Field(min_length=1, max_length=2000)
    confidence: Confidence

    @property
    def si(self) -> float:
        """Returns the value in bytes, bytes/s, FLOP/s, operations/s, seconds, or as a plain number."""
        return next(units[self.unit] for units in UNITS.values() if self.unit in units) * self.value


class FormatFigures(_Strict):
    """Shares that a device reaches with matrices of a weight format, where published points show them to differ.

    decode_efficiency: share of the bandwidth; prefill_efficiency: share of the fp16 rate, above 1 where products are of
    the format itself.
    """

    decode_efficiency: HardwareFigure | None = None
    prefill_efficiency: HardwareFigure | None = None

    @model_validator(mode="after")
    def _shares(self) -> FormatFigures:
        for name, figure in (("decode", self.decode_efficiency), ("prefill", self.prefill_efficiency)):
            if figure is not None and figure.unit not in _SHARE:
                raise ValueError(f"{name}_efficiency.unit: {figure.unit!r} is not one of {', '.join(_SHARE)}")
        if self.decode_efficiency is not None and self.decode_efficiency.value > 1:
            raise ValueError(f"decode_efficiency.value: {self.decode_efficiency.value:g} must be at most 1")
        return self


class OfferedFormats(_Strict):
    """Weight formats that the engine runs well, of one number of bits of weights and activations.

    formats: by preference: a model takes the first whose groups divide its sizes; prefill: time of a product of many
    tokens over that of floats; tables: embedding and head may have it too; tensorrt: the least version that runs it;
    auto: `--weights auto` may take it, since its speed rests on more than an assumption.
    """

    formats: tuple[Line, ...] = Field(min_length=1, max_length=16)
    prefill: float = Field(ge=0.01, le=100)
    tables: bool
    tensorrt: Line | None = None
    auto: bool = True
    source: str = Field(min_length=1, max_length=2000)
    confidence: Confidence

    @model_validator(mode="after")
    def _known(self) -> OfferedFormats:
        for name in self.formats:
            if name not in WEIGHT_FORMATS:
                raise ValueError(f"formats: {name!r} is not one of {', '.join(WEIGHT_FORMATS)}")
        return self


class OfferedCache(_Strict):
    """A format of the KV cache that the engine runs; prefill: time of a prefill's attention over that in floats.

    `auto` takes it where its confidence is not low: where its speed was measured.
    """

    prefill: float = Field(ge=0.01, le=100)
    source: str = Field(min_length=1, max_length=2000)
    confidence: Confidence


class DefaultWorkload(_Strict):
    batch: Count
    prompt: Count
    context: Count

    @model_validator(mode="after")
    def _prompt_fits(self) -> DefaultWorkload:
        if self.prompt >= self.context:
            raise ValueError(f"prompt {self.prompt} must be less than context {self.context}")
        return self


class DefaultBudget(_Strict):
    """Used where the user gives no budget; the same words as on the command line."""

    memory: Line
    prefill: Line
    decode: Line


class DeviceProfile(_Strict):
    """One device. A profile of a processor has all its hardware figures or none, to be measured."""

    name: Name
    description: Line
    engine: Literal["tensorrt", "tensorrt-rtx", "onnxruntime", "llama.cpp"]
    sm: int | None = Field(default=None, ge=50, le=200)  # CUDA compute capability x 10
    precision: GraphPrecision
    dialect: Dialect  # the operators that the engine's parser takes, over a KV cache of floats: see for_cache
    channel_multiple: Count  # of the MLP width; head structure needs none
    memory_shared_with_system: bool
    power_modes: tuple[Line, ...] = Field(default=(), max_length=64)
    tensorrt: Line | None = None  # the version that is assumed until the device says another
    weights: dict[Literal["int8", "int4", "int4-offset", "w8a8", "fp8", "nvfp4"] | GgmlWord, OfferedFormats] = Field(
        default_factory=dict
    )
    cache: dict[Literal["int8", "fp8"], OfferedCache] = Field(default_factory=dict)
    formats: dict[Literal["int8", "int4", "fp8", "nvfp4"], FormatFigures] = Field(default_factory=dict)
    memory: HardwareFigure | None = None
    system_reserve: HardwareFigure | None = None  # what the system keeps of a shared memory
    runtime_memory: HardwareFigure | None = None  # the runtime's fixed part, which no pruning changes
    build_memory: HardwareFigure | None = None  # limit while the engine is built
    bandwidth: HardwareFigure | None = None
    fp16_compute: HardwareFigure | None = None
    fp32_compute: HardwareFigure | None = None
    int8_compute: HardwareFigure | None = None
    decode_efficiency: HardwareFigure | None = None  # share of the bandwidth that decode reaches
    decode_overhead: HardwareFigure | None = None  # time of a step or a prefill that scales with nothing
    layer_overhead: HardwareFigure | None = None  # the same for each layer
    prefill_efficiency: HardwareFigure | None = None  # share of the compute rate that the products of a prefill reach
    prefill_overhead: HardwareFigure | None = None  # time of a prefill alone that scales with nothing
    token_overhead: HardwareFigure | None = None  # time of each token in each layer of a prefill, products apart
    workload: DefaultWorkload
    budget: DefaultBudget

    @model_validator(mode="after")
    def _consistent(self) -> DeviceProfile:
        present = self.hardware
        for name, figure in present.items():
            if figure.unit not in UNITS[name]:
                raise ValueError(f"{name}.unit: {figure.unit!r} is not one of {', '.join(UNITS[name])}")
            if name.endswith("efficiency") and figure.value > 1:
                raise ValueError(f"{name}.value: {figure.value:g} must be at most 1")
        needed = {"memory", "runtime_memory", "build_memory", "bandwidth", "decode_efficiency"}
        needed |= set() if self.layer_overhead else {"decode_overhead"}
        needed |= {"prefill_efficiency", "fp32_compute" if self.on_processor else "fp16_compute"}
        if self.memory_shared_with_system and not self.on_processor:
            needed.add("system_reserve")
        if (missing := sorted(needed - present.keys())) and (present or not self.on_processor):
            raise ValueError(f"missing {', '.join(missing)}")
        if not self.on_processor and self.sm is None:
            raise ValueError("sm is missing; it is the compute capability, 87 for an Orin")
        if present and self.available_bytes <= self.runtime_memory.si:
            raise ValueError("system_reserve and runtime_memory leave nothing of memory")
        in_blocks = {
            WEIGHT_FORMATS[name].storage == "gguf" for offer in self.weights.values() for name in offer.formats
        }
        if in_blocks - {self.engine == "llama.cpp"}:
            raise ValueError("weights: llama.cpp runs the formats of a GGUF file, and other engines all others")
        return self

    def figure_of(self, name: str, form: WeightFormat | None) -> HardwareFigure | None:
        """Returns the figure of this name that a weight format has of its own, or None."""
        figures = None if form is None else self.formats.get(form.name.split("-")[0])
        return None if figures is None else getattr(figures, name)

    def decode_factor(self, form: WeightFormat | None) -> float:
        """Returns the time of reading a byte of a matrix in a weight format over that in floats."""
        own = self.figure_of("decode_efficiency", form)
        return 1.0 if own is None else self.decode_efficiency.value / own.value

    def prefill_factor(self, form: WeightFormat | None) -> float:
        """Returns the time of a product of many tokens in a weight format over that in floats."""
        if (own := self.figure_of("prefill_efficiency", form)) is not None:
            return self.prefill_efficiency.value / own.value
        offers = (offer for offer in self.weights.values() if form is not None and form.name in offer.formats)
        return next((offer.prefill for offer in offers), 1.0)

    def untimed(self, forms: Iterable[WeightFormat | None]) -> tuple[str, ...]:
        """Returns the names of those formats whose speed on the device nobody timed."""
        names = dict.fromkeys(form.name for form in forms if form is not None)
        assumed = {name for offer in self.weights.values() if not offer.auto for name in offer.formats}
        return tuple(name for name in names if name in assumed)

    def cache_prefill_factor(self, form: CacheFormat | None) -> float:
        """Returns the time of a prefill's attention with a KV cache in a format over that in floats."""
        offer = None if form is None else self.cache.get(form.name)
        return 1.0 if offer is None else offer.prefill

    def for_cache(self, form: CacheFormat | None) -> DeviceProfile:
        """Returns the profile with the dialect of a model whose KV cache has a format: not all dialects have codes."""
        dialect = dialect_over(self.dialect, None if form is None else form.name)
        return self if dialect == self.dialect else self.model_copy(update={"dialect": dialect})

    @property
    def on_processor(self) -> bool:
        """Returns whether the engine computes on a processor: ONNX Runtime always, llama.cpp where there is no GPU."""
        return self.engine == "onnxruntime" or (self.engine == "llama.cpp" and self.sm is None)

    @property
    def in_place(self) -> bool:
        """Returns whether the engine appends to one buffer of the KV cache, so that none is copied."""
        return self.dialect in IN_PLACE

    @property
    def routes(self) -> bool:
        """Returns whether the engine reads and multiplies a token's own experts alone: TensorRT computes all."""
        return self.engine in ("onnxruntime", "llama.cpp")

    @property
    def hardware(self) -> dict[str, HardwareFigure]:
        """Returns the hardware figures that are there, by name."""
        return {name: figure for name in UNITS if (figure := getattr(self, name)) is not None}

    @property
    def figures(self) -> dict[str, HardwareFigure]:
        """Returns all that estimates rest on, by name: the hardware figures, and those of formats."""
        of_formats = {
            f"{name} of {form}": figure
            for form, own in self.formats.items()
            for name, figure in own
            if figure is not None
        }
        return self.hardware | of_formats

    @property
    def is_probed(self) -> bool:
        """Returns whether the hardware figures are there."""
        return bool(self.hardware)

    @property
    def available_bytes(self) -> float:
        """Returns the memory less the system's reserve: the most that a budget may be, the runtime's part included."""
        return self.memory.si - (self.system_reserve.si if self.system_reserve else 0.0)

    @property
    def usable_bytes(self) -> float:
        """Returns what is left for the model: memory less the system's reserve and the runtime's fixed part."""
        return self.available_bytes - self.runtime_memory.si


def with_tensorrt(profile: DeviceProfile, version: str | None) -> DeviceProfile:
    """Returns the profile for a version of TensorRT: older ones have other operators. None: as the profile says.

    Raises InputError for a device without TensorRT, and for what is no version.
    """
    if version is None:
        return profile
    if profile.tensorrt is None:
        raise InputError(f"{profile.name} does not run TensorRT of a version of its own", "Leave --tensorrt out.")
    return profile.model_copy(update={"tensorrt": version, "dialect": dialect_for(version, profile.dialect)})


def in_precision(profile: DeviceProfile, precision: str) -> DeviceProfile:
    """Returns the profile for a precision: TensorRT for RTX has no fp32 kernel for the operator Attention."""
    if precision != "fp32" or profile.dialect not in ("opset24", "opset23"):
        return profile
    return profile.model_copy(update={"dialect": "primitive"})


def profiles_folder() -> Path:
    """Returns `_profiles` inside an installed wheel, `profiles` at the root of a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "_profiles"
    return installed if installed.is_dir() else package.parent / "profiles"


def list_profiles() -> list[DeviceProfile]:
    """Returns every shipped profile, ordered by name."""
    return [load_profile_file(path) for path in sorted(profiles_folder().glob("*.toml"))]


def profile_of(name: str | None, file: Path | None) -> DeviceProfile:
    """Returns the named or the given profile, by default that of this machine's processor.

    Raises InputError for a bad name or file, or both at once.
    """
    if name is not None and file is not None:
        raise InputError(f"both the device {name!r} and the profile {file} are given", "Give one of them.")
    return load_profile_file(file) if file is not None else load_profile(name or PROCESSOR)


def load_profile(name: str) -> DeviceProfile:
    """Returns a shipped profile, its name in any case. Raises InputError that tells those apart which are meant."""
    known = {path.stem: path for path in sorted(profiles_folder().glob("*.toml"))}
    if (path := known.get(name.lower())) is None:
        raise _unknown_device(name, known)
    return load_profile_file(path)


def _unknown_device(name: str, known: dict[str, Path]) -> InputError:
    """Returns the error for a name that no profile has: those with it as a part of theirs, else the nearest."""
    own_file = "or your own profile: --profile FILE."
    parts = set(re.split(r"[^a-z0-9]+", name.lower())) - {""}
    named = [stem for stem in known if parts and parts <= set(stem.split("-"))]
    if named:
        lines = "".join(f"\n  {stem:28} {load_profile_file(known[stem]).description}" for stem in named)
        return InputError(
            f"unknown device {printable(name, 64)!r}: it may be any of {len(named)}",
            f"Give one of these, {own_file}{lines}",
        )
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    return InputError(
        f"unknown device {printable(name, 64)!r}", f"{hint}`edgeprune devices` lists them; give one, {own_file}"
    )


def load_profile_file(path: Path) -> DeviceProfile:
    """Returns a profile from a TOML file. Raises InputError that names the line, or the field and the reason."""
    remedy = "`edgeprune devices jetson-orin --toml` prints a complete profile to compare with."
    data = read_toml(path, remedy)
    try:
        return DeviceProfile.model_validate(data)
    except ValidationError as error:
        reasons = "; ".join(_readable(item["loc"], item["type"], item["msg"]) for item in error.errors())
        raise InputError(f"the profile {path}: {reasons}", remedy) from None


def read_toml(path: Path, remedy: str) -> dict[str, Any]:
    """Returns the content of a TOML file. Raises InputError that names the file."""
    text = read_text(path, remedy)
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise InputError(f"{path} is not TOML that can be read: it is nested too deeply", remedy) from None
    except ValueError as error:
        raise InputError(f"{path} is not TOML: {error}", remedy) from None


def _readable(place: tuple[str | int, ...], kind: str, message: str) -> str:
    """Returns pydantic's error as `bandwidth.value: must be greater than 0`."""
    reason = {
        "missing": "is missing",
        "extra_forbidden": "is not a field of a profile",
        "string_pattern_mismatch": "must be of letters, digits, dots, dashes and underscores, the first no sign",
    }.get(kind)
    reason = reason or message.removeprefix("Value error, ").replace("Input should be", "must be")
    return f"{'.'.join(map(str, place))}: {reason}" if place else reason


def profile_toml(profile: DeviceProfile) -> str:
    """Returns the profile as TOML that `load_profile_file` reads back equal, measured figures included."""
    data = profile.model_dump(exclude_none=True)
    formats = data.pop("formats")
    offers = {name: data.pop(name) for name in ("weights", "cache")}
    plain = {key: value for key, value in data.items() if not isinstance(value, dict)}
    lines = [f"{key} = {toml_value(value)}" for key, value in plain.items()]
    tables = {name: table for name, table in data.items() if isinstance(table, dict)}
    tables |= {f"{kind}.{name}": offer for kind, of_kind in offers.items() for name, offer in of_kind.items()}
    tables |= {f"formats.{form}.{name}": figure for form, own in formats.items() for name, figure in own.items()}
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(f"{key} = {toml_value(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def toml_value(value: str | float | bool | tuple[str, ...]) -> str:
    """Returns a value as TOML: for these types as in JSON, but that DEL must be escaped too."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
