"""fit by the Python interface, on a Jetson's estimates: a bundle within the budget, or one that needs no pruning."""

from __future__ import annotations

import pytest
import torch

from edgeprune.commands.fit import fit
from edgeprune.commands.load_bundle import load_bundle
from edgeprune.errors import InputError
from edgeprune.model.load import load_model
from edgeprune.model.save import save_checkpoint
from edgeprune.precision import WEIGHT_FORMATS
from tests.support.foreign import gptq, requantised
from tests.support.roundings import rounded
from tests.support.runs import home, options, short_durations


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return home(tmp_path_factory)


@pytest.mark.slow
def test_a_bundle_is_within_the_budget_and_the_work_is_gone(small, tmp_path):
    stages = []
    with short_durations():
        result = fit(**options(small, tmp_path / "out"), progress=lambda stage, *steps: stages.append(stage))
    assert result.met
    row, quality = result.report.budget
    assert (quality.name, quality.limit) == ("quality", 30.0)
    assert row.fitted.value <= row.limit < row.dense.value
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert load_bundle(result.bundle).report == result.report
    assert {"prune and compensate", "cross-check on this machine"} <= set(stages)
    with pytest.raises(InputError, match="is not empty"):
        fit(**options(small, tmp_path / "out"))


@pytest.mark.slow
def test_a_model_that_fits_as_it_is_is_not_pruned(small, tmp_path):
    report = fit(**options(small, tmp_path / "out", memory="1GiB")).report
    assert report.search.ending == "dense"
    assert (report.ratio, report.modules, report.cross_check) == (0, [], None)
    assert report.fitted.widths == report.dense.widths
    assert " as it is; it was not yet tried on the device." in report.headline


@pytest.mark.slow
def test_a_bundles_own_quantised_checkpoint_is_fitted_again_from_its_floats(small, tmp_path):
    """In the type of its floats, which its embedding's values are not stored in."""
    dense = load_model(str(small / "model"))
    decoder = dense.decoder.with_format(WEIGHT_FORMATS["int4-64"], WEIGHT_FORMATS["int8"])
    weights = rounded(decoder, {name: dense.weights[name] for name in decoder.shapes()})
    save_checkpoint(decoder, weights.items(), dense, tmp_path / "small", dtype=torch.bfloat16)
    with short_durations():
        result = fit(**options(small, tmp_path / "out", model=tmp_path / "small", weights="float"))
    choices = {choice.name: choice for choice in result.report.choices}
    assert choices["checkpoint"].value == "dequantised"
    assert choices["checkpoint"].reason.startswith("edgeprune's own, int8, int4-64: its quality is what the rises")
    fitted = load_model(str(tmp_path / "out" / "model"))
    assert not fitted.decoder.weight_formats
    assert {weight.dtype for weight in fitted.weights.values()} == {torch.bfloat16}


@pytest.mark.slow
def test_a_format_with_minima_is_fitted_stored_and_named(small, tmp_path):
    with short_durations():
        result = fit(**options(small, tmp_path / "out", weights="int4-offset", memory="99.95%"))
    report = result.report
    assert report.fitted.formats["int4-offset"] == 4
    assert [part.name for part in report.levers.parts] == ["int4-offset"]
    assert any(warning.startswith("the speed of int4-offset is estimated") for warning in report.warnings)
    fitted = load_model(str(tmp_path / "out" / "model"))
    offset = [weight for weight in fitted.quantised.values() if weight.form.name == "int4-offset"]
    assert len(offset) == 2 * 7
    assert all(weight.minima is not None for weight in offset)


@pytest.mark.slow
def test_a_checkpoint_that_others_quantised_is_fitted(small, tmp_path):
    details = {"quant_method": "gptq", "bits": 8, "group_size": 128, "desc_act": False}
    requantised(
        small / "model", tmp_path / "small", details, lambda name, w: gptq(w, 8, 128) if "layers" in name else None
    )
    with short_durations():
        result = fit(**options(small, tmp_path / "out", model=tmp_path / "small", weights="auto"))
    choices = {choice.name: choice for choice in result.report.choices}
    reason = "GPTQ, 8 bits in groups of 128: its quality is what the rises refer to"
    assert (choices["checkpoint"].value, choices["checkpoint"].reason) == ("dequantised", reason)
    assert result.met
