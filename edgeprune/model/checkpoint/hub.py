"""A model on the Hugging Face hub, or in the hub's cache: its data files alone, never code.

It does not know what is in the files.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from edgeprune.errors import InputError
from edgeprune.model.checkpoint.values import SCALES_FILE

CONFIG = ("config.json",)
OTHERS = ("*.json", "*.model", "*.jinja", "merges.txt", "README.md", SCALES_FILE)
WEIGHTS = {"model.safetensors": "*.safetensors", "pytorch_model.bin": "pytorch_model*.bin"}  # the first that is there
NOT_NEEDED = ("*/*", "consolidated*")  # other formats of the same weights, in folders or beside
FILES = (".gguf", ".pt", ".pth", ".bin", ".safetensors")  # endings that no repository has
SECONDS = 5.0  # to reach the hub; the client's own request has no limit
LOCAL = "give a local directory, a .gguf file or `demo`"
LOG_IN = "log in with `hf auth login` (or set HF_TOKEN)"


def fetch_config(spec: str) -> Path:
    """Returns a folder with the config.json of a hub id. Raises InputError."""
    return _fetch(spec, weights=False)


def fetch_checkpoint(spec: str) -> Path:
    """Returns a folder with config, tokenizer and weights of a hub id: .bin files only where it has no safetensors.

    Without network, or with HF_HUB_OFFLINE set, it is the folder in the hub's cache. Raises InputError.
    """
    return _fetch(spec, weights=True)


def _fetch(spec: str, weights: bool) -> Path:
    """Returns the folder of a hub id in the hub's cache, with the weights or with config.json alone."""
    if spec.count("/") != 1 or spec.startswith(("/", ".", "~")) or spec.endswith((*FILES, "/")):
        raise InputError(
            f"no such model: {spec}",
            f"{LOCAL.capitalize()}, or a hub id as OWNER/NAME (with network access the first time).",
        )
    from huggingface_hub import HfApi, snapshot_download

    # Ask the hub which files there are, and download those that are needed.
    try:
        files = [file.rfilename for file in HfApi().model_info(spec, timeout=SECONDS).siblings or ()]
        wanted = _checkpoint_files(spec, files) if weights else CONFIG
        return Path(snapshot_download(spec, allow_patterns=list(wanted), ignore_patterns=list(NOT_NEEDED)))
    except InputError:
        raise
    except Exception as error:  # the hub's client raises errors of many libraries
        # Fall back on the cache.
        folder = _cached(spec)
        if folder is not None and (not weights or _weights_in([file.name for file in folder.iterdir()])):
            logging.getLogger(__name__).warning("%s from the cache, %s", spec, _first_line(error))
            return folder
        raise _explained(spec, error, "its weights are" if folder else "it is") from None


def _checkpoint_files(spec: str, files: Sequence[str]) -> tuple[str, ...]:
    """Returns the patterns of a checkpoint's files. Raises InputError where there are no weights."""
    weights = _weights_in(files)
    if weights is None:
        raise InputError(
            f"{spec} on the hub has neither safetensors nor pytorch_model.bin",
            "Choose a repository of the original checkpoint, or download a .gguf file and give its path.",
        )
    return (*OTHERS, weights)


def _weights_in(files: Sequence[str]) -> str | None:
    """Returns the pattern of the weights among these files, in one file or with an index; None: there are none."""
    patterns = (pattern for name, pattern in WEIGHTS.items() if {name, f"{name}.index.json"} & set(files))
    return next(patterns, None)


def _cached(spec: str) -> Path | None:
    """Returns the folder with this model's main revision in the hub's cache; None where it is not there."""
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(spec, "config.json")
    except (OSError, ValueError):
        return None
    return Path(config).parent if isinstance(config, str) else None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _explained(spec: str, error: Exception, what: str) -> InputError:
    """Returns the error of the hub's client as an InputError with a remedy.

    what: subject and verb for a message that it is not in the cache.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    # What the user can change: the name, or access to it.
    if isinstance(error, HFValidationError):
        return InputError(f"no such model: {spec}", f"{LOCAL.capitalize()}, or a hub id as OWNER/NAME.")
    if isinstance(error, GatedRepoError):
        return InputError(
            f"{spec} is gated: its owner must grant access",
            f"Ask for access at https://huggingface.co/{spec} and {LOG_IN}.",
        )
    if isinstance(error, RepositoryNotFoundError):
        return InputError(
            f"the hub has no model {spec}, or it is private", f"Check its name; for a private one {LOG_IN}; or {LOCAL}."
        )
    # What the network or the hub does.
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
