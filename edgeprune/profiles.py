"""Device profiles: one TOML file each, every hardware figure with its source and confidence."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from edgeprune.errors import InputError

Confidence = Literal["high", "medium", "low"]
EngineName = Literal["tensorrt", "tensorrt-rtx", "onnxruntime"]

HARDWARE = ("memory", "system_reserve", "runtime_memory", "bandwidth", "fp16_compute", "int8_compute",
            "decode_efficiency", "decode_overhead", "prefill_efficiency")
"""The figures of a device that estimates rest on; a profile has all of them or, to be probed, none."""

UNITS = {"B": 1.0, "MB": 1e6, "GB": 1e9, "MiB": 2.0**20, "GiB": 2.0**30, "MB/s": 1e6, "GB/s": 1e9, "TB/s": 1e12,
         "GFLOP/s": 1e9, "TFLOP/s": 1e12, "TOP/s": 1e12, "ms": 1e-3, "s": 1.0, "1": 1.0}


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)


class Rated(_Strict):
    """A figure that was not measured by us in this run: where it comes from and how sure it is."""

    value: float = Field(ge=0)
    unit: str
    source: str = Field(min_length=1)
    confidence: Confidence

    @model_validator(mode="after")
    def _known_unit(self) -> Rated:
        if self.unit not in UNITS:
            raise ValueError(f"unknown unit {self.unit!r}; units are {', '.join(UNITS)}")
        return self

    @property
    def si(self) -> float:
        """The value in bytes, bytes/s, FLOP/s, seconds or as a plain number."""
        return self.value * UNITS[self.unit]


class DefaultWorkload(_Strict):
    batch: int = Field(ge=1)
    prompt: int = Field(ge=1)
    context: int = Field(ge=2)

    @model_validator(mode="after")
    def _prompt_fits(self) -> DefaultWorkload:
        if self.prompt >= self.context:
            raise ValueError(f"prompt {self.prompt} must be less than context {self.context}")
        return self


class DefaultBudget(_Strict):
    """Used where the user gives no budget; the same words as on the command line."""

    memory: str
    prefill: str
    decode: str


class DeviceProfile(_Strict):
    name: str = Field(min_length=1)
    description: str
    engine: EngineName
    sm: int | None = Field(default=None, ge=50, le=200)
    precision: Literal["fp32", "fp16"]
    dialect: Literal["opset23", "primitive", "onnxruntime"]  # what the device's parser takes
    channel_multiple: int = Field(ge=1)
    memory_shared_with_system: bool
    power_modes: tuple[str, ...] = ()
    memory: Rated | None = None
    system_reserve: Rated | None = None
    runtime_memory: Rated | None = None
    bandwidth: Rated | None = None
    fp16_compute: Rated | None = None
    int8_compute: Rated | None = None
    fp32_compute: Rated | None = None
    decode_efficiency: Rated | None = None
    decode_overhead: Rated | None = None
    prefill_efficiency: Rated | None = None
    workload: DefaultWorkload
    budget: DefaultBudget

    @model_validator(mode="after")
    def _complete(self) -> DeviceProfile:
        if self.engine != "onnxruntime":
            missing = [name for name in ("sm", *HARDWARE) if getattr(self, name) is None]
            if missing:
                raise ValueError(f"missing {', '.join(missing)}")
        for name in ("memory", "bandwidth", "decode_efficiency", "prefill_efficiency"):
            if (figure := getattr(self, name)) is not None and figure.value == 0:
                raise ValueError(f"{name}.value must be greater than 0")
        return self

    @property
    def is_probed(self) -> bool:
        """Whether the hardware figures are there."""
        return self.bandwidth is not None

    @property
    def hardware(self) -> dict[str, Rated]:
        names = (*HARDWARE, "fp32_compute")
        return {name: figure for name in names if (figure := getattr(self, name)) is not None}


def profiles_folder() -> Path:
    """`_profiles` inside an installed wheel, `profiles` at the root of a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "_profiles"
    return installed if installed.is_dir() else package.parent / "profiles"


def list_profiles() -> list[DeviceProfile]:
    return [load_profile_file(path) for path in sorted(profiles_folder().glob("*.toml"))]


def load_profile(name: str) -> DeviceProfile:
    """A shipped profile. Raises InputError that names the nearest ones."""
    known = {path.stem: path for path in sorted(profiles_folder().glob("*.toml"))}
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.4)
        hint = f"Did you mean {', '.join(near)}? " if near else ""
        raise InputError(
            f"unknown device {name!r}", f"{hint}`edgeprune devices` lists all; --profile FILE takes your own."
        )
    return load_profile_file(known[name])


def load_profile_file(path: Path) -> DeviceProfile:
    """A profile from a TOML file. Raises InputError that names the line, or the field and the reason."""
    remedy = "`edgeprune devices jetson-orin --toml` prints a complete profile to start from."
    try:
        data: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the profile {path}: {error.strerror}", remedy) from None
    except UnicodeDecodeError:
        raise InputError(f"the profile {path} is not UTF-8 text", remedy) from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"the profile {path} is not TOML: {error}", remedy) from None
    try:
        return DeviceProfile.model_validate(data)
    except ValidationError as error:
        reasons = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'profile'}: {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors()
        )
        raise InputError(f"the profile {path}: {reasons}", remedy) from None


def resolve_profile(name: str | None, file: Path | None) -> DeviceProfile:
    """The named or given profile, its hardware figures probed where the file ships none."""
    profile = load_profile_file(file) if file is not None else load_profile(name or "cpu")
    if profile.is_probed:
        return profile
    from edgeprune.engine.probe import probed

    return probed(profile)


def profile_source(name: str) -> str:
    """The text of a shipped profile's file, to copy and change."""
    load_profile(name)
    return (profiles_folder() / f"{name}.toml").read_text(encoding="utf-8")
