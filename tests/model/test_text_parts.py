"""The text part of models of images and text: it computes what the whole does with text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from edgeprune.errors import InputError
from edgeprune.model.export import check_exports
from edgeprune.model.load import load_model, load_shape
from edgeprune.model.whole import export_whole
from edgeprune.precision import WEIGHT_FORMATS
from tests.support.gguf_models import narrowed
from tests.support.parity import distance, torch_logits
from tests.support.wholes import WHOLES, save_whole

LIMIT = 1e-5


@pytest.mark.parametrize("kind", WHOLES)
def test_the_whole_is_as_it_was_but_for_its_text_part(kind, tmp_path):
    save_whole(tmp_path / "whole", kind)
    source = load_model(str(tmp_path / "whole"))
    small = narrowed(source, tmp_path / "small", (2, 1, 64))
    export_whole(small, source, tmp_path / "again")
    before, after = (AutoModelForImageTextToText.from_pretrained(tmp_path / name) for name in ("whole", "again"))
    with torch.inference_mode():
        theirs = after.eval()(ids()).logits[:, :-1].numpy()
    assert distance(torch_logits(small.decoder, small.weights, ids()), theirs) < LIMIT
    others = [name for name in before.state_dict() if "vision" in name or "visual" in name or "connector" in name]
    assert others
    assert all(torch.equal(before.state_dict()[name], after.state_dict()[name]) for name in others)
    again = load_model(str(tmp_path / "again"))
    assert (again.decoder, again.part_of) == (small.decoder, kind)


def test_what_no_whole_can_hold_is_refused(tmp_path):
    save_whole(tmp_path / "whole", "gemma3")
    model = load_model(str(tmp_path / "whole"))
    check_exports(["whole"], model, "uniform", reduced=False)
    form = WEIGHT_FORMATS["int8"]
    for reason, arguments in (
        ("layers of different widths", ("per-layer", False)),
        ("the whole vocabulary", ("uniform", True)),
        ("holds floats", ("uniform", False, [None, form])),
    ):
        with pytest.raises(InputError, match=reason):
            check_exports(["whole"], model, *arguments)
    with pytest.raises(InputError, match="small is no text part of a model of images and text"):
        check_exports(["whole"], narrowed(model, tmp_path / "small", (2, 1, 64)), "uniform", reduced=False)


def ids() -> torch.Tensor:
    return torch.randint(20, 257, (2, 24), generator=torch.Generator().manual_seed(0))


def rewrite(folder: Path, renamed, **more: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    tensors = {renamed(name): tensor for name, tensor in load_file(path).items()} | more
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("kind", WHOLES)
def test_it_computes_what_the_whole_does_with_text_and_is_saved_by_itself(kind, tmp_path):
    whole = save_whole(tmp_path / "whole", kind)
    model = load_model(str(tmp_path / "whole"))
    assert (model.decoder.family, model.part_of) == (WHOLES[kind][0], kind)
    assert load_shape(str(tmp_path / "whole"))[1] == model.decoder
    with torch.inference_mode():
        theirs = whole(ids()).logits[:, :-1].numpy()
    assert distance(torch_logits(model.decoder, model.weights, ids()), theirs) < LIMIT
    # Cut, it is a text model of its own, which transformers loads.
    small = narrowed(model, tmp_path / "small", (2, 1, 64))
    assert small.part_of == ""
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32).eval()
    with torch.inference_mode():
        theirs = loaded(ids()).logits[:, :-1].numpy()
    assert distance(torch_logits(small.decoder, small.weights, ids()), theirs) < LIMIT


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("gemma3", "language_model.model.", "model.language_model."),
        ("mistral3", "language_model.model.", "model.language_model."),
        ("qwen2_5_vl", "model.", "model.language_model."),
        ("smolvlm", "model.text_model.", "model.language_model."),
    ],
)
def test_its_names_are_those_of_any_version(kind, before, after, tmp_path):
    save_whole(tmp_path / "whole", kind)
    expected = torch_logits(*parts(tmp_path / "whole"), ids())
    rewrite(tmp_path / "whole", lambda name: after + name.removeprefix(before) if name.startswith(before) else name)
    assert (torch_logits(*parts(tmp_path / "whole"), ids()) == expected).all()


def parts(folder: Path):
    model = load_model(str(folder))
    return model.decoder, model.weights


def test_an_older_configuration_has_the_fields_of_the_text_outside(tmp_path):
    save_whole(tmp_path / "whole", "qwen2_5_vl")
    decoder, path = load_model(str(tmp_path / "whole")).decoder, tmp_path / "whole" / "config.json"
    config = json.loads(path.read_text())
    text = config.pop("text_config")
    text |= {"rope_theta": 10000.0, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    del text["rope_parameters"]
    path.write_text(json.dumps(text | config))
    assert load_model(str(tmp_path / "whole")).decoder == decoder


def test_only_what_stands_beside_the_text_is_left_out(tmp_path):
    save_whole(tmp_path / "whole", "gemma3")
    rewrite(tmp_path / "whole", str, **{"vision_tower.more.weight": torch.zeros(2)})
    load_model(str(tmp_path / "whole"))
    rewrite(tmp_path / "whole", str, **{"language_model.model.layers.0.more.weight": torch.zeros(2)})
    with pytest.raises(InputError, match=r"layers\.0\.more\.weight"):
        load_model(str(tmp_path / "whole"))
