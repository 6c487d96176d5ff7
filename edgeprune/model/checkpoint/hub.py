"""A model on the Hugging Face hub, or in its cache: data files alone, never code."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from edgeprune.errors import InputError

CONFIG = ("config.json",)
OTHERS = ("*.json", "*.model", "*.jinja", "merges.txt")
WEIGHTS = {"model.safetensors": "*.safetensors", "pytorch_model.bin": "pytorch_model*.bin"}  # the first that is there
NOT_NEEDED = ("*/*", "consolidated*")  # other formats of the same weights, in folders or beside
FILES = (".gguf", ".pt", ".pth", ".bin", ".safetensors")  # what ends so is no repository
SECONDS = 5.0  # to reach the hub; the client's own request has no limit
LOCAL = "give a local directory, a .gguf file or `demo`"
LOG_IN = "log in with `hf auth login` (or set HF_TOKEN)"


def fetch_config(spec: str) -> Path:
    """A folder with the config.json of a hub id. Raises InputError."""
    return _fetch(spec, weights=False)


def fetch_checkpoint(spec: str) -> Path:
    """A folder with config, tokenizer and weights of a hub id: safetensors, .bin files only where it has none.

    Without network, or with HF_HUB_OFFLINE set, it is that of the hub's cache. Raises InputError.
    """
    return _fetch(spec, weights=True)


def _fetch(spec: str, weights: bool) -> Path:
    if spec.count("/") != 1 or spec.startswith(("/", ".", "~")) or spec.endswith((*FILES, "/")):
        raise InputError(
            f"no such model: {spec}",
            f"{LOCAL.capitalize()}, or a hub id as OWNER/NAME (with network access the first time).",
        )
    from huggingface_hub import HfApi, snapshot_download

    try:
        files = [file.rfilename for file in HfApi().model_info(spec, timeout=SECONDS).siblings or ()]
        wanted = _checkpoint_files(spec, files) if weights else CONFIG
        return Path(snapshot_download(spec, allow_patterns=list(wanted), ignore_patterns=list(NOT_NEEDED)))
    except InputError:
        raise
    except Exception as error:  # the hub's client raises errors of many libraries
        folder = _cached(spec)
        if folder is not None and (not weights or _weights_in([file.name for file in folder.iterdir()])):
            logging.getLogger(__name__).warning("%s from the cache, %s", spec, _first_line(error))
            return folder
        raise _said(spec, error, "its weights are" if folder else "it is") from None


def _checkpoint_files(spec: str, files: Sequence[str]) -> tuple[str, ...]:
    weights = _weights_in(files)
    if weights is None:
        raise InputError(
            f"{spec} on the hub has neither safetensors nor pytorch_model.bin",
            "Choose a repository of the original checkpoint, or download a .gguf file and give its path.",
        )
    return (*OTHERS, weights)


def _weights_in(files: Sequence[str]) -> str | None:
    """The pattern of the weights that are there, in one file or with an index."""
    found = (pattern for name, pattern in WEIGHTS.items() if {name, f"{name}.index.json"} & set(files))
    return next(found, None)


def _cached(spec: str) -> Path | None:
    """The folder of the hub's cache with this model's main revision."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(spec, "config.json")
    except (OSError, ValueError):
        return None
    return Path(found).parent if isinstance(found, str) else None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _said(spec: str, error: Exception, what: str) -> InputError:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    if isinstance(error, HFValidationError):
        return InputError(f"no such model: {spec}", f"{LOCAL.capitalize()}, or a hub id as OWNER/NAME.")
    if isinstance(error, GatedRepoError):
        return InputError(
            f"{spec} is gated: its owner grants access to it",
            f"Ask for access at https://huggingface.co/{spec} and {LOG_IN}.",
        )
    if isinstance(error, RepositoryNotFoundError):
        return InputError(
            f"the hub has no model {spec}, or it is private", f"Check its name; for a private one {LOG_IN}; or {LOCAL}."
        )
    if isinstance(error, OfflineModeIsEnabled):
        return InputError(
            f"cannot get {spec}: {what} not in the hub's cache, and HF_HUB_OFFLINE is set", f"Unset it, or {LOCAL}."
        )
    if isinstance(error, HfHubHTTPError):
        refused = error.response.status_code in (401, 403)
        return InputError(
            f"the hub refuses {spec}: {_first_line(error)}",
            f"Check your token: {LOG_IN}." if refused else f"Try again later, or {LOCAL}.",
        )
    return InputError(
        f"cannot get {spec}: {what} not in the hub's cache, and the hub cannot be reached: {_first_line(error)}",
        f"Try again with network access, or {LOCAL}.",
    )
