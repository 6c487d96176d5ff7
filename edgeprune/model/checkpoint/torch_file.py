"""PyTorch's own checkpoint files (.bin, .pt): a zip archive of one pickle and the bytes of each tensor.

The pickle is read by torch.load(weights_only=True), which builds tensors and plain containers and calls nothing
else. The file is mapped, so that bytes are read where a tensor is used. It knows no family's names.
"""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.errors import InputError
from edgeprune.files import is_pointer, pointer_error, printable

if TYPE_CHECKING:
    import torch

ZIP_MAGIC = b"PK\x03\x04"
OLD_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"  # of files before PyTorch 1.6, pickles one after the other
KEPT_BYTES = 1 << 26  # that are read of a file before it is mapped anew
CONTAINERS = ("model", "module", "state_dict")  # where training scripts put the weights, beside an optimizer's
NAMES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}
AGAIN = "Download the checkpoint again."


class TorchFiles:
    """Tensors of .bin files; the file read last stays mapped until KEPT_BYTES of it were read.

    Unpickling takes tens of milliseconds, but what was read of a mapped file counts as memory of this process until the
    file is unmapped.
    """

    def __init__(self) -> None:
        self._file: Path | None = None
        self._tensors: dict[str, torch.Tensor] = {}
        self._left = 0

    def read(self, file: Path, key: str) -> torch.Tensor:
        """Returns a tensor of a file. Raises InputError where the file was changed and no longer has it."""
        if file != self._file or self._left <= 0:
            self._file, self._tensors = None, {}
            self._tensors = tensors_of(file)
            self._file, self._left = file, KEPT_BYTES
        if key not in self._tensors:
            raise InputError(f"{file} no longer has the tensor {key}", AGAIN)
        tensor = self._tensors[key]
        self._left -= tensor.nbytes
        return tensor


def tensors_of(file: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a .bin or .pt file by name, mapped; whatever else the file holds is left out.

    The tensors are in the file itself or in one of CONTAINERS. Raises InputError for a file that is truncated, of
    another format, or whose pickle asks for anything but tensors, plain containers and an argparse.Namespace; nothing
    in it is called.
    """
    import torch

    content = _content(file)
    inner = next((content[key] for key in CONTAINERS if isinstance(content.get(key), dict)), content)
    tensors = {name: value.detach() for name, value in inner.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise InputError(f"{file} holds no tensors by name", "Give a checkpoint whose .bin is a plain state_dict.")
    return tensors


def training_arguments(file: Path) -> dict[str, Any]:
    """Returns the command line that a training script stored beside the weights (`args`), by name; often empty.

    Raises InputError as `tensors_of` does.
    """
    arguments = _content(file).get("args")
    if isinstance(arguments, argparse.Namespace):
        return vars(arguments)
    return arguments if isinstance(arguments, dict) else {}


def _content(file: Path) -> dict[str, Any]:
    """Returns the content of a file's pickle, empty for anything but a dict. Raises InputError as `tensors_of` does."""
    import torch

    archive_members(file)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, weights_only=True, mmap=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        requested = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"its pickle asks for {requested.group(1)}" if requested else "its pickle holds something else"
        raise InputError(
            f"{file} does not hold tensors alone: {printable(reason)}, and nothing of it was executed",
            "Take the checkpoint from a source you trust, as safetensors or as a plain state_dict.",
        ) from None
    except Exception as error:  # whatever a damaged pickle or archive makes of torch's reader
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{file} is not a PyTorch checkpoint: {printable(reason)}", AGAIN) from None
    return content if isinstance(content, dict) else {}


def torch_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns dtype, by its name in safetensors, and shape of every tensor, by the tensor's name.

    Raises InputError as `tensors_of` does.
    """
    return {name: (_kind(tensor), tuple(tensor.shape)) for name, tensor in tensors_of(file).items()}


def _kind(tensor: torch.Tensor) -> str:
    """Returns a tensor's dtype by its name in safetensors where it has one; the layout of a sparse tensor."""
    import torch

    dtype = str(tensor.dtype if tensor.layout is torch.strided else tensor.layout)
    return NAMES.get(dtype, dtype.removeprefix("torch."))


def archive_members(file: Path) -> list[tuple[str, int, int]]:
    """Returns name, size and checksum of every member of the archive.

    The bytes of the members must stand in the file as they are, so that the file can be mapped. Raises InputError for
    any other file.
    """
    # Only zip archives of today's format can be mapped.
    try:
        if is_pointer(file):
            raise pointer_error(file)
        with file.open("rb") as stream:
            magic = stream.read(len(OLD_MAGIC))
        if magic == OLD_MAGIC:
            raise InputError(
                f"{file} was written before PyTorch 1.6, or in that format, and cannot be mapped",
                "Write it again: python -c \"import torch; f='FILE.bin'; "
                "torch.save(torch.load(f, map_location='cpu', weights_only=True), f)\"",
            )
        if not magic.startswith(ZIP_MAGIC):
            raise InputError(f"{file} is not a PyTorch checkpoint", AGAIN)
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror or error}", "Check its permissions.") from None
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise InputError(f"{file} is not a PyTorch checkpoint or is truncated: {error}", AGAIN) from None
    # An archive must hold weights alone, not compressed.
    if any(member.filename.endswith("/constants.pkl") for member in members):
        raise InputError(f"{file} is a TorchScript module, which is code", "Give a checkpoint of weights alone.")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise InputError(f"{file} is compressed and cannot be mapped", "Write it again with torch.save.")
    return [(member.filename, member.file_size, member.CRC) for member in members]
