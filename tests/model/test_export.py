"""Exports by name, and what they cannot hold."""

import pytest
import torch

from edgeprune.errors import InputError
from edgeprune.model.export import check_exports, write_exports
from edgeprune.model.gguf.file import read_gguf
from edgeprune.model.load import load_model
from edgeprune.model.save import save_checkpoint
from edgeprune.precision import WEIGHT_FORMATS
from edgeprune.pruning.grids import choose_grid
from tests.support.families import PICTURES, save_family
from tests.support.gguf_models import saved
from tests.support.rounded_models import rounded


@pytest.mark.parametrize("case", PICTURES)
def test_image_generators_are_refused(tmp_path, case):
    save_family(tmp_path / case, case)
    with pytest.raises(InputError, match=f"no architecture for the family {case}"):
        check_exports(["gguf"], load_model(str(tmp_path / case)), "uniform", reduced=False)


@pytest.fixture
def model(tmp_path):
    return saved(tmp_path / "dense", "llama")


@pytest.mark.parametrize(
    ("names", "layout", "reason", "remedy"),
    [
        (["gguf", "onnx2"], "uniform", "unknown export 'onnx2'", "Give one of: gguf, gptq, whole."),
        (["gptq"], "per-layer", "a GPTQ checkpoint cannot hold layers of different widths", "Use --layout uniform."),
    ],
)
def test_an_export_that_cannot_be_is_refused_before_any_work(model, names, layout, reason, remedy):
    with pytest.raises(InputError) as caught:
        check_exports(names, model, layout, reduced=False)
    assert reason in caught.value.message
    assert caught.value.remedy == remedy


def test_of_most_families_a_gguf_file_has_one_width_for_all_layers(tmp_path):
    with pytest.raises(InputError, match="cannot hold layers of different widths of the family gemma2") as caught:
        check_exports(["gguf"], saved(tmp_path / "gemma2", "gemma2"), "per-layer", reduced=False)
    assert "llama.cpp takes them of llama, mistral" in caught.value.remedy


def test_a_format_is_written_once_into_a_folder_of_its_name(model, tmp_path):
    check_exports(["gguf"], model, "uniform", reduced=False)
    check_exports([], model, "per-layer", reduced=False)
    check_exports(["gguf"], model, "per-layer", reduced=False)
    (tmp_path / "out").mkdir()
    write_exports(["gguf", "gguf"], model, model, tmp_path / "out", "small", 128)
    (path,) = (tmp_path / "out").rglob("*.gguf")
    assert path == tmp_path / "out" / "gguf" / "small.gguf"
    assert read_gguf(path).fields["general.architecture"] == "llama"
    assert (path.parent / "Modelfile").read_text().startswith("FROM ./small.gguf\nPARAMETER num_ctx 128\n")


def test_a_model_in_blocks_is_exported_as_the_file_that_it_is(model, tmp_path):
    q4_0 = WEIGHT_FORMATS["q4_0"]
    decoder = model.decoder.with_format(q4_0)
    weights = dict(model.weights) | {
        name: choose_grid(model.weights[name], torch.ones(decoder.shapes()[name][1]), form, "starts").nearest(
            model.weights[name]
        )
        for name, form in decoder.weight_formats.items()
    }
    save_checkpoint(decoder, ((name, weights[name]) for name in decoder.shapes()), model, tmp_path / "blocks")
    (tmp_path / "out").mkdir()
    write_exports(["gguf"], load_model(str(tmp_path / "blocks")), model, tmp_path / "out", "small", 128)
    path = tmp_path / "out" / "gguf" / "small.gguf"
    assert path.samefile(tmp_path / "blocks" / "model.gguf")
    assert (path.parent / "Modelfile").is_file()
    with pytest.raises(InputError, match="a GPTQ checkpoint has no format q4_0, which a GGUF file holds alone"):
        check_exports(["gptq"], model, "uniform", reduced=False, formats=[None, q4_0])


@pytest.mark.parametrize("export", ["gguf", "gptq"])
def test_minima_of_floats_are_refused_before_any_work(model, export):
    with pytest.raises(InputError, match="int4-offset|one weight format") as caught:
        check_exports([export], model, "uniform", reduced=False, formats=[WEIGHT_FORMATS["int4-offset"]])
    assert "int4" in caught.value.remedy


def test_a_checkpoint_of_gptq_is_a_folder_of_its_own(model, tmp_path):
    check_exports(["gptq"], model, "uniform", reduced=False, formats=[WEIGHT_FORMATS["int8"]])
    for formats in ([None], [None, WEIGHT_FORMATS["int8"]], [WEIGHT_FORMATS["int4-32-asymmetric"]]):
        with pytest.raises(InputError, match="--export gptq holds the layers in one weight format") as caught:
            check_exports(["gptq"], model, "uniform", reduced=False, formats=formats)
        assert "--weights int8|int4-32" in caught.value.remedy
    with pytest.raises(InputError, match="no format float"):
        write_exports(["gptq"], model, model, tmp_path, "small", 128)
    few_bits = rounded(model, model.decoder.with_format(WEIGHT_FORMATS["int4-32"]), tmp_path / "rounded")
    write_exports(["gptq"], few_bits, model, tmp_path, "small", 128)
    assert {path.name for path in (tmp_path / "gptq").iterdir()} >= {"config.json", "model.safetensors"}
