import gguf.quants
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.errors import InputError
from edgeprune.model.gguf.file import read_gguf

INTEGERS = {"UINT8": 8, "UINT16": 16, "UINT32": 32, "UINT64": 64}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Every type of metadata, and tensors of several types and sizes."""
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    writer = GGUFWriter(path, "llama")
    for name, bits in INTEGERS.items():
        writer.add_key_value(f"u.{bits}", 2**bits - 1, GGUFValueType[name])
        writer.add_key_value(f"i.{bits}", -(2 ** (bits - 1)), GGUFValueType[name.removeprefix("U")])
    writer.add_float32("f.32", 1e-5)
    writer.add_float64("f.64", 1e-300)
    writer.add_bool("yes", True)
    writer.add_bool("no", False)
    writer.add_string("text", "héllo 日本")
    writer.add_array("strings", ["", "a", "🙂"])
    writer.add_array("integers", [1, -2, 3])
    writer.add_array("floats", [0.5, -1.5])
    writer.add_array("truths", [True, False, True])
    values = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    writer.add_tensor("vector", values[0])
    writer.add_tensor("half", values.astype(np.float16))
    for kind in (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0, GGMLQuantizationType.BF16):
        writer.add_tensor(kind.name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_it_reads_what_the_gguf_package_reads(file):
    ours, theirs = read_gguf(file), GGUFReader(file)
    expected = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert ours.fields == expected
    assert {name: type(value) for name, value in ours.fields.items()} == {n: type(v) for n, v in expected.items()}
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        stored = ours.tensors[tensor.name]
        assert stored.shape == tuple(int(size) for size in reversed(tensor.shape))
        assert (stored.type, stored.data.tobytes()) == (tensor.tensor_type, tensor.data.tobytes())


@pytest.mark.parametrize("kind", gguf.quants._type_traits, ids=lambda kind: kind.name)
def test_every_type_that_the_package_knows_is_read_by_rows(tmp_path, kind):
    block, size = GGML_QUANT_SIZES[kind]
    stored = np.random.default_rng(0).integers(0, 255, (2, 3, 2 * size), np.uint8)
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("experts", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = read_gguf(tmp_path / "m.gguf").tensors["experts"]
    with np.errstate(all="ignore"):
        assert tensor.shape == (2, 3, 2 * block)
        assert np.array_equal(tensor.rows(2, 5), tensor.values().reshape(6, -1)[2:5], equal_nan=True)


@pytest.mark.parametrize(("name", "tolerance"), [("half", 2e-3), ("BF16", 2e-2), ("Q8_0", 2e-2), ("Q4_0", 0.4)])
def test_values_are_those_that_were_stored(file, name, tolerance):
    expected = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    values = read_gguf(file).tensors[name].values()
    assert (values.dtype, values.shape) == (np.float32, (3, 64))
    assert np.abs(values - expected).max() < tolerance


def test_a_type_that_cannot_be_dequantised_is_named(file):
    tensor = read_gguf(file).tensors["half"]
    other = type(tensor)("odd", tensor.shape, GGMLQuantizationType.I64, tensor.data)
    with pytest.raises(InputError, match="tensor odd of type I64"):
        other.values()


@settings(max_examples=300)
@given(data=st.data())
def test_every_cut_is_refused(file, tmp_path_factory, data):
    content = file.read_bytes()
    size = data.draw(st.integers(0, len(content) - 64))  # the last tensor is padded to 32 bytes
    path = tmp_path_factory.getbasetemp() / "cut.gguf"
    path.write_bytes(content[:size])
    with pytest.raises(InputError):
        read_gguf(path)


@settings(max_examples=300)
@given(data=st.data())
def test_altered_bytes_are_read_or_refused(file, tmp_path_factory, data):
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "altered.gguf"
    path.write_bytes(content)
    try:
        read_gguf(path)
    except InputError as error:
        assert str(path) in error.message
