"""The two kinds of models: the options that each refuses, what it measures, and how long its samples are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from edgeprune.errors import InputError
from edgeprune.model.decoder import Decoder, Picture
from edgeprune.ondevice.figures import Workload
from edgeprune.ondevice.guided_sampling import Sampling
from edgeprune.pipeline.imaging import Imaging
from edgeprune.pipeline.kind import Images, Language, kind_of
from edgeprune.pipeline.request import request_of
from edgeprune.pipeline.samples import LENGTH
from edgeprune.profiles import DefaultWorkload
from tests.support.runs import home
from tests.support.shapes import SMOLLM2

DEFAULT = DefaultWorkload(batch=2, prompt=512, context=2048)
LLAMAGEN = Decoder("llamagen", 32, 64, 17, 1e-5, False, (), picture=Picture(4, 10))


def test_a_model_that_draws_is_an_image_generator():
    assert isinstance(kind_of(SMOLLM2), Language)
    assert isinstance(kind_of(LLAMAGEN), Images)


@pytest.mark.parametrize("option", [{"codec": "x.pt"}, {"cfg": 2.0}, {"images": 8}, {"features": "x.onnx"}])
def test_a_language_model_refuses_options_of_pictures(option):
    (name,) = option
    with pytest.raises(InputError, match=f"--{name} is for image generators, my-model is a language") as caught:
        Language().check_options(request_of(model="my-model", **option), SMOLLM2)
    assert caught.value.remedy == f"Leave --{name} out."
    Images().check_options(request_of(model="my-model", **option), LLAMAGEN)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"prompt": 4}, "--prompt is for texts: my-model draws pictures, each of 16 tokens"),
        ({"context": 4}, "--context is for texts"),
        ({"length": 4}, "--length is for texts"),
        ({"vocabulary": "samples"}, "--vocabulary samples is for texts"),
    ],
)
def test_an_image_generator_refuses_options_of_texts(option, message):
    with pytest.raises(InputError, match=message) as caught:
        Images().check_options(request_of(model="my-model", **option), LLAMAGEN)
    assert caught.value.remedy == f"Leave --{next(iter(option))} out."
    Language().check_options(request_of(model="my-model", **option), SMOLLM2)


@pytest.mark.parametrize(
    ("option", "workload"),
    [
        ({}, Workload(2, 512, 2048)),
        ({"context": 100}, Workload(2, 50, 100)),  # half of it at most, where no prompt is asked for
        ({"context": 100, "prompt": 99, "batch": 1}, Workload(1, 99, 100)),
        ({"prompt": 1000}, Workload(2, 1000, 2048)),
    ],
)
def test_a_texts_prompt_leaves_room_for_its_answer(option, workload):
    assert Language().workload(request_of(**option), DEFAULT, SMOLLM2) == workload


def test_a_prompt_that_fills_the_context_is_refused():
    with pytest.raises(InputError, match="prompt 64 leaves no room for generated tokens in context 64") as caught:
        Language().workload(request_of(prompt=64, context=64), DEFAULT, SMOLLM2)
    assert "--context 128" in caught.value.remedy


def test_a_guided_picture_takes_two_sequences_of_all_its_codes():
    assert Images().workload(request_of(batch=3), DEFAULT, LLAMAGEN) == Workload(6, 1, 16)
    assert Images().workload(request_of(batch=3, cfg=1.0), DEFAULT, LLAMAGEN) == Workload(3, 1, 16)
    assert Images().workload(request_of(), DEFAULT, LLAMAGEN).batch == 2 * DEFAULT.batch


def test_a_sample_is_as_long_as_was_asked_or_a_whole_picture_behind_its_class():
    assert Language().sample_length(request_of(), SMOLLM2) == LENGTH
    assert Language().sample_length(request_of(length=9), SMOLLM2) == 9
    assert Images().sample_length(request_of(), LLAMAGEN) == 17


def test_the_rungs_of_a_text_model_share_its_tokenizer(tmp_path_factory, tmp_path):
    folder = home(tmp_path_factory) / "model"
    files = Language().shared_files(SimpleNamespace(), folder, tmp_path)
    assert files["tokenizer/tokenizer.json"] == folder / "tokenizer.json"
    assert all(path.is_file() and path.parent == folder for path in files.values())
    assert not [name for name in files if "safetensors" in name]
    assert Language().images_at_once(4) is None


def test_documents_of_pictures_are_read_with_the_model_and_texts_before_it(tmp_path):
    (tmp_path / "notes.txt").write_text("one\n\ntwo")
    request = request_of(calibration=tmp_path / "notes.txt", evaluate=tmp_path / "notes.txt")
    calibration, evaluation = Language().read_documents(request)
    assert calibration.documents == evaluation["notes"].documents == ["one\n\ntwo"]
    assert Images().read_documents(request_of(calibration=tmp_path / "none")) == (None, {})


@pytest.mark.parametrize(
    ("cfg", "classes", "said"),
    [
        (1.0, 0, "no pictures were given: the model generates its own samples"),
        (1.75, 10, "no pictures were given: the model generates its own samples, of every class, guided by 1.75 as in"),
    ],
)
def test_own_pictures_are_of_classes_and_guided_where_the_model_has_these(cfg, classes, said):
    imaging = Imaging(None, Sampling(cfg=cfg), 8, None)
    assert Images(imaging, classes).own_samples_reason.startswith(said)
    assert ("class" in Images(imaging, classes).own_samples_reason) == bool(classes)
