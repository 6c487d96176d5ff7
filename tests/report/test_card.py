"""The card of a checkpoint: what the hub reads of it, its figures, and nothing of the user's own."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard

from edgeprune.model.origin import Origin
from edgeprune.report.card import card
from edgeprune.report.schema import Report
from tests.support.sample_pictures import pictures_content
from tests.support.sample_reports import CONTENTS, broken_content, hostile, measured_content, report_of

ORIGIN = Origin("someone/large", {"license": "apache-2.0"}, ("en",))


def with_formats(**formats: int) -> Report:
    content = measured_content()
    return report_of(content | {"fitted": content["fitted"] | {"formats": formats}})


def test_the_hub_reads_what_it_is():
    data = ModelCard(card(with_formats(int8=30, float=1), ORIGIN)).data
    told = (data.base_model, data.license, data.language, data.pipeline_tag, data.library_name)
    assert told == ("someone/large", "apache-2.0", ["en"], "text-generation", "transformers")
    assert data.tags == ["edgeprune", "pruned", "int8"]
    assert data.base_model_relation == "finetune"


def test_weights_that_were_rounded_alone_are_a_quantised_model():
    report = with_formats(int4=30).model_copy(update={"ratio": 0.0})
    assert ModelCard(card(report, ORIGIN)).data.base_model_relation == "quantized"
    assert "were removed" not in card(report, ORIGIN)


def test_a_gguf_file_is_loaded_by_its_name():
    text = card(with_formats(q4_0=30), Origin())
    assert ModelCard(text).data.library_name == "gguf"
    assert 'gguf_file="model.gguf"' in text


def test_without_an_origin_no_field_is_invented():
    data = ModelCard(card(with_formats(), Origin())).data.to_dict()
    assert not {"base_model", "base_model_relation", "license", "language"} & set(data)


@pytest.mark.parametrize("content", [*CONTENTS, pictures_content])
def test_it_holds_every_text_and_the_grade(content):
    report = report_of(content())
    text = card(report, ORIGIN)
    assert f"**{report.quality.grade}**" in text
    for row in report.quality.texts:
        assert f"| {row.dense:.2f} | {row.fitted:.2f} |" in text
    assert f"{report.fitted.parameters / 1e6:,.1f} M" in text


def test_it_holds_no_text_prompt_path_or_command():
    """It may be published."""
    report = report_of(measured_content())
    secret = {"command": "edgeprune fit /home/me/secret", "headline": "/home/me/secret"}
    texts = [text.model_copy(update={"name": "/home/me/secret.txt"}) for text in report.quality.texts]
    samples = dict.fromkeys(("prompt", "dense_sample", "fitted_sample"), "a secret")
    quality = report.quality.model_copy(update={"texts": texts, **samples})
    assert "secret" not in card(report.model_copy(update={**secret, "quality": quality}), ORIGIN)


def test_a_name_that_a_stranger_chose_breaks_no_field():
    data = ModelCard(card(report_of(hostile(broken_content(), "---\nlicense: mit\n---")), ORIGIN)).data
    assert data.license == "apache-2.0"
