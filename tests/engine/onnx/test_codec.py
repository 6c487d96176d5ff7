"""The codec's graph against torch in ONNX Runtime; TensorRT for RTX compiles it for SM86 without a GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from edgeprune.engine.onnx.codec import INSIDE_BYTES, write_codec
from edgeprune.errors import NumericalError
from edgeprune.generate.pixels import to_pixels
from edgeprune.model.codec.codec import ClusterCodec, VqCodec, load_codec
from tests.support.vq import small_vq


def small_codec(folder: Path, **sizes) -> VqCodec:
    torch.save(small_vq(**sizes).state_dict(), folder / "vq.pt")
    return load_codec(folder / "vq.pt")


def decoded(path: Path, codes: torch.Tensor) -> np.ndarray:
    return onnxruntime.InferenceSession(str(path)).run(["image"], {"codes": codes.numpy()})[0]


@pytest.mark.parametrize(
    ("sizes", "side"),
    [({}, 5), ({"multipliers": (1,), "latent": 8, "blocks": 1}, 3), ({"multipliers": (2, 3), "size": 4}, 2)],
)
def test_the_graph_decodes_as_torch_does_in_any_batch(tmp_path, sizes, side):
    codec, path = small_codec(tmp_path, **sizes), tmp_path / "codec.onnx"
    write_codec(codec, side, path)
    onnx.checker.check_model(str(path), full_check=True)
    for batch in (1, 3):
        codes = torch.randint(0, codec.vocab_size, (batch, side * side))
        expected, image = codec.decode(codes).numpy(), decoded(path, codes)
        assert image.shape == (batch, 3, side * codec.downsample, side * codec.downsample)
        np.testing.assert_allclose(image, expected, atol=1e-4)
        differing = to_pixels(image) != to_pixels(expected)
        scaled = (127.5 * expected + 128).transpose(0, 2, 3, 1)[differing]
        assert (np.abs(scaled - scaled.round()) < 0.02).all()  # ties of the rounding alone


def test_weights_stand_beside_the_graph_where_they_are_large_and_bytes_repeat(tmp_path):
    for name, sizes in (("large", {}), ("small", {"multipliers": (1,), "latent": 8, "blocks": 1})):
        codec, path = small_codec(tmp_path, **sizes), tmp_path / f"{name}.onnx"
        write_codec(codec, 2, path)
        data = path.with_name(f"{name}.onnx.data")
        held = sum(codec.weights[tensor].nbytes for step in codec.layout.decoding() for tensor in step.shapes())
        assert data.is_file() == (held > INSIDE_BYTES) == (name == "large")
        files = [file for file in (path, data) if file.is_file()]
        assert held < sum(file.stat().st_size for file in files) < held + 100_000
        before = [file.read_bytes() for file in files]
        write_codec(codec, 2, path)
        assert [file.read_bytes() for file in files] == before


def test_clusters_are_a_graph_in_the_same_contract(tmp_path):
    codec = ClusterCodec(torch.rand(512, 3) * 2 - 1, 6, "")
    write_codec(codec, 6, tmp_path / "codec.onnx")
    onnx.checker.check_model(str(tmp_path / "codec.onnx"), full_check=True)
    codes = torch.randint(0, 512, (4, 36))
    assert np.array_equal(decoded(tmp_path / "codec.onnx", codes), codec.decode(codes).numpy())
    assert [file.name for file in tmp_path.iterdir()] == ["codec.onnx"]


def test_a_weight_that_is_not_finite_is_named(tmp_path):
    codec = small_codec(tmp_path)
    codec.weights["decoder.mid.0.conv1.bias"][3] = torch.inf
    with pytest.raises(NumericalError, match=r"decoder\.mid\.0\.conv1\.bias holds values that are not finite"):
        write_codec(codec, 2, tmp_path / "codec.onnx")


@pytest.mark.parametrize("kind", ["vq", "clusters"])
def test_tensorrt_for_rtx_builds_it(tmp_path, kind):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    from tests.support.rtx import build, trt

    codec = small_codec(tmp_path) if kind == "vq" else ClusterCodec(torch.rand(512, 3), 4, "")
    write_codec(codec, 4, tmp_path / "codec.onnx")
    log = build(tmp_path / "codec.onnx", lambda tensor, batch, sequence, past: (batch, 16))
    assert not [line for severity, line in log.lines if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)]
