"""FLEET.toml: the cells that it makes, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edgeprune.errors import InputError
from edgeprune.pipeline.fleet_file import Cell, read_fleet

PRODUCT = """
[defaults]
samples = 8
memory = "60%"

[[models]]
model = "demo"

[[models]]
name = "other"
model = "someone/model"
max-quality-loss = "5%"

[[targets]]
device = "jetson-orin"

[[targets]]
device = "rtx-4090"
memory = "2 GiB"
samples = 4
"""


def read(folder: Path, text: str) -> list[Cell]:
    (folder / "fleet.toml").write_text(text)
    return read_fleet(folder / "fleet.toml")


def test_the_cells_are_the_product_and_a_target_wins_over_a_model_and_the_defaults(tmp_path):
    cells = read(tmp_path, PRODUCT)
    orin, rtx = "jetson-orin-memory-60%", "rtx-4090-memory-2GiB"
    assert [(cell.model, cell.target) for cell in cells] == [
        ("demo", orin),
        ("other", orin),
        ("demo", rtx),
        ("other", rtx),
    ]
    assert cells[3].options == {
        "samples": 4,
        "memory": "2 GiB",
        "model": "someone/model",
        "max_quality_loss": "5%",
        "device": "rtx-4090",
    }
    assert cells[0].folder == Path("demo") / orin


def test_cells_may_be_listed_one_by_one(tmp_path):
    text = '[defaults]\nmodel = "demo"\n[[cells]]\ndevice = "cpu"\ndecode = "80%"\n'
    text += '[[cells]]\ndevice = "cpu"\nmodel_name = "small"\ntarget_name = "desk"\n'
    cells = read(tmp_path, text)
    assert [(cell.model, cell.target) for cell in cells] == [("demo", "cpu-decode-80%"), ("small", "desk")]
    assert cells[1].options == {"model": "demo", "device": "cpu"}


def test_paths_lead_there_from_any_folder_and_hub_ids_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("model", "texts"):
        (tmp_path / name).mkdir()
    target = 'device = "cpu"\ncalibration = "texts"\nevaluate = ["a.txt", "b.txt"]\n'
    text = f'[[models]]\nmodel = "model"\n[[models]]\nmodel = "hub/model"\nname = "hub"\n[[targets]]\n{target}'
    local, hub = read(tmp_path, text)
    assert local.options["model"] == str(tmp_path / "model")
    assert local.options["calibration"] == str(tmp_path / "texts")
    assert local.options["evaluate"] == [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    assert hub.options["model"] == "hub/model"


MODEL, TARGET = '[[models]]\nmodel = "demo"\n', '[[targets]]\ndevice = "cpu"\n'


@pytest.mark.parametrize(
    ("text", "message", "remedy"),
    [
        ("", "has no \\[\\[models\\]\\]", "Write"),
        (MODEL, "has no \\[\\[targets\\]\\]", "Write"),
        ("[[model]]\n", "'model', which no fleet has", "Write"),
        ("models = 3\n", "models is not a list of tables", "\\[\\[models\\]\\]"),
        (MODEL + TARGET + '[[cells]]\ndevice = "cpu"\n', "beside", "one or the other"),
        (MODEL + TARGET + 'memry = "1GiB"\n', "no option 'memry'", "memory"),
        (MODEL + TARGET + 'output = "x"\n', "output is the fleet's own", "Leave it out"),
        (MODEL + TARGET * 2, "2 targets are named cpu", "name"),
        (MODEL * 2 + TARGET, "2 models are named demo", "name"),
        (MODEL + TARGET + 'name = "../up"\n', "'../up' is none for a folder", "letters"),
        (MODEL + TARGET + "name = 3\n", "'3' is none for a folder", "letters"),
        (MODEL + "[[targets]]\n", "demo on no-device: give one of device and profile", "devices"),
        (MODEL + '[[targets]]\ndevice = "toaster"\n', "demo on toaster: .*toaster", "devices"),
        (MODEL + TARGET + 'samples = "many"\n', "demo on cpu: samples 'many'", "fit --help"),
        ('[[cells]]\nmodel = "demo"\ndevice = "cpu"\n' * 2, "two cells are demo on cpu", "name"),
        ("[[[", "is not TOML", "Write"),
    ],
)
def test_what_no_fleet_can_be_is_refused_with_what_to_write(tmp_path, text, message, remedy):
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path, text)
    assert re.search(remedy, caught.value.remedy)
