"""Methods side by side by the Python interface: rows in order, and what is refused before any work."""

from __future__ import annotations

import shutil

import pytest

from edgeprune.commands.compare import compare
from edgeprune.errors import InputError
from edgeprune.pruning.methods import METHODS
from tests.support.checkpoints import save_llama
from tests.support.runs import home


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A tiny model of many channels, with texts to calibrate on."""
    folder = tmp_path_factory.mktemp("compared")
    save_llama(folder / "model", intermediate_size=512)
    shutil.copyfile(home(tmp_path_factory) / "notes.txt", folder / "notes.txt")
    return {"model": folder / "model", "calibration": folder / "notes.txt", "samples": 4, "length": 16}


def test_a_row_for_each_layout_ratio_and_method_the_default_first(given, monkeypatch):
    monkeypatch.setattr("edgeprune.pipeline.packing.GENERATED", 2)
    result = compare(**given, ratios=[20, 40, 20.0], methods="random, default,dense,random", layout="both")
    assert result.bundle is None
    assert [row.key for row in result.report] == [("dense", "", "0")] + [
        (method, layout, ratio)
        for layout in ("uniform", "per-layer")
        for ratio in ("0.2", "0.4")
        for method in ("default", "random")
    ]
    for row in result.report[1:]:
        assert row.ratio == pytest.approx(row.asked, abs=0.005)
        assert bool(row.over_default) == (row.method == "random")
        assert set(row.rise) == {"notes (held out)"}


@pytest.mark.parametrize(
    ("changes", "message", "remedy"),
    [
        ({"ratios": "20,many"}, "malformed ratios '20,many'", "--ratios 20,30,50"),
        ({"ratios": [100]}, "the ratio 100 is not between 0 and 100 percent", "--ratios"),
        ({"ratios": "0"}, "the ratio 0 is not between", "--ratios"),
        ({"ratios": ""}, "malformed ratios ''", "--ratios 20,30,50"),
        ({"ratios": []}, "malformed ratios []", "--ratios 20,30,50"),
        ({"ratios": 100.0}, "the ratio 100 is not between", "--ratios"),
        ({"ratios": "nan"}, "the ratio nan is not between", "--ratios"),
        ({"methods": ""}, "--methods '' names nothing to compare", "wanda"),
        ({"methods": " , "}, "names nothing to compare", "or all."),
        ({"methods": "dense"}, "--methods 'dense' names nothing to compare", "or all."),
        ({"layout": "diagonal"}, "unknown layout 'diagonal'", "uniform, per-layer, both"),
        ({"methods": "magic"}, "unknown method 'magic'", ""),
        ({"calibration": "self"}, "compare needs real text to calibrate on", "--calibration PATH"),
        ({"samples": 0}, "--samples 0 is less than 1", "at least 1"),
        ({"cfg": 2.0}, "--cfg is for image generators", "Leave --cfg out."),
    ],
)
def test_what_cannot_be_compared_is_refused(given, changes, message, remedy):
    with pytest.raises(InputError) as caught:
        compare(**given | changes)
    assert message in caught.value.message
    assert remedy in caught.value.remedy


@pytest.mark.parametrize("methods", ["all", "wanda,all", ["all"]])
def test_all_is_every_method_wherever_it_stands(given, monkeypatch, methods):
    asked = []

    class Asked(Exception):
        pass

    def comparison(request, progress):
        raise Asked

    monkeypatch.setattr("edgeprune.commands.compare._comparison", comparison)
    monkeypatch.setattr("edgeprune.pruning.methods.method_named", asked.append)
    with pytest.raises(Asked):
        compare(**given, methods=methods)
    assert sorted(asked) == sorted(METHODS)
