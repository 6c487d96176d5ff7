"""The folder of a checkpoint: its configuration, and a message that names what a folder is instead of one.

It does not know what is in the files of weights.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from edgeprune.errors import InputError
from edgeprune.files import printable, read_json
from edgeprune.model.checkpoint.configuration import read_whole_config

CONFIG = "config.json"
BUNDLE_FILE = "finish.pyz"  # that a bundle has, and no model
EXPORTED = (".onnx", ".engine", ".plan", ".trt", ".tflite", ".mlpackage", ".mlmodel", ".pte", ".xml", ".ort")
OTHER_WEIGHTS = (".h5", ".msgpack", ".ot", ".ckpt", ".ckpt.index", ".nemo", ".distcp", ".pth", ".npz")


def read_folder_config(folder: Path) -> dict[str, Any]:
    """Returns the content of a folder's config.json. Raises InputError, which names what the folder is instead."""
    if not (folder / CONFIG).is_file():
        _check_adapter(folder)
        _check_place(folder)
        raise _named(folder, f"{folder} has no {CONFIG}", "Give a directory that transformers can load.")
    return read_whole_config(folder)


def no_weights(folder: Path, expected: str) -> InputError:
    """Returns the error of a folder without weights, which names what is there. Raises InputError for an adapter."""
    _check_adapter(folder)
    return _named(
        folder, f"{folder} has no {expected}", "Give a directory with the weights that save_pretrained writes."
    )


def _check_adapter(folder: Path) -> None:
    """Raises InputError for the folder of an adapter, which has no weights of a whole model."""
    if not (folder / "adapter_config.json").is_file():
        return
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    raise InputError(
        f"{folder} is a PEFT adapter of {printable(base)}, not a whole model",
        f'Merge it: python -c "from peft import AutoPeftModelForCausalLM as Model; '
        f"Model.from_pretrained('{folder}').merge_and_unload().save_pretrained('MERGED')\", "
        "copy the tokenizer's files there, and give that folder.",
    )


def _check_place(folder: Path) -> None:
    """Raises InputError, with the folder to give, for one that holds the checkpoint's."""
    if (folder / BUNDLE_FILE).is_file():
        held = sorted(config.parent for config in folder.glob(f"rungs/*/model/{CONFIG}"))
        whole = folder / "model"
        models = [whole] if (whole / CONFIG).is_file() else held
        raise InputError(
            f"{folder} is a bundle, not a model",
            f"Use its model: {models[0]}" if models else "It holds no checkpoint: give the model that it was made of.",
        )
    if snapshot := _newest(folder / "snapshots"):
        raise InputError(
            f"{folder} is a model's folder in the hub's cache, which holds its snapshots",
            f"Give the snapshot: {snapshot}",
        )
    if cached := sorted(held.name for held in folder.glob("models--*--*")):
        owner, name = cached[0].split("--", 2)[1:]
        raise InputError(
            f"{folder} is the hub's cache, not a model",
            f"Give a model's id, such as {printable(owner, 60)}/{printable(name, 60)}.",
        )
    if held := _newest(folder):
        raise InputError(f"{folder} has no {CONFIG} itself, its folder {held.name} has one", f"Give {held}.")


def _newest(folder: Path) -> Path | None:
    """Returns the folder in this one with the newest configuration; None where none has one."""
    configurations = folder.glob(f"*/{CONFIG}")
    return max(
        (file.parent for file in configurations), key=lambda held: (held / CONFIG).lstat().st_mtime, default=None
    )


def _named(folder: Path, message: str, remedy: str) -> InputError:
    """Returns an error with what else the folder holds, and how to get from that to a checkpoint."""
    names: list[str] = []
    with contextlib.suppress(OSError):
        names = sorted(path.name for path in folder.iterdir())
    for endings, remedy_of in (
        ((".gguf",), "Give the file: {path}"),
        (EXPORTED, "It was exported: give the checkpoint that it was made of."),
        (OTHER_WEIGHTS, "Load it where it was made, and save it with transformers' save_pretrained."),
    ):
        if held := [name for name in names if name.lower().endswith(endings)]:
            return InputError(f"{message}; it holds {printable(held[0])}", remedy_of.format(path=folder / held[0]))
    return InputError(message if names else f"{message}: it is empty", remedy)
