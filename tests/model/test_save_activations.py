"""Checkpoints of weights and activations in 8 or 4 bits, as edgeprune and transformers load them."""

import pytest
import torch

from edgeprune.errors import InputError
from edgeprune.model.export import check_exports
from edgeprune.model.forward import token_logits, weight_stream
from edgeprune.model.gptq import export_gptq
from edgeprune.model.load import load_model
from edgeprune.precision import WEIGHT_FORMATS
from tests.support.families import save_family
from tests.support.quantised import assert_stored, in_transformers, logits_of, save_both
from tests.support.roundings import INT8, W8A8, numbers, rounded

INT4, FP8, NVFP4 = (WEIGHT_FORMATS[name] for name in ("int4-32", "fp8", "nvfp4"))
MIXED = {
    "w8a8": [(W8A8, INT8), (None, W8A8), (INT4, W8A8)],
    "fp8": [(FP8, INT8), (None, FP8), (W8A8, FP8)],
    "nvfp4": [(NVFP4, FP8), (None, NVFP4), (NVFP4, INT8)],
}
ALL = {form.name: [(form, form)] for form in (W8A8, FP8, NVFP4)}


def ids():
    return torch.randint(0, 257, (2, 20), generator=torch.Generator().manual_seed(0))


def saved(tmp_path, case, formats):
    save_family(tmp_path / "dense", case)
    dense = load_model(str(tmp_path / "dense"))
    decoder = dense.decoder.with_formats(
        [formats[i % len(formats)] for i in range(len(dense.decoder.layers))], None, None
    )
    # Floats that are numbers of bf16, which a model may be loaded in.
    weights = rounded(decoder, {name: dense.weights[name].bfloat16().float() for name in decoder.shapes()})
    codes, floats = save_both(decoder, weights, dense, tmp_path)
    return decoder, weights, codes, floats


@pytest.mark.parametrize("formats", MIXED.values(), ids=MIXED)
@pytest.mark.parametrize("case", ["llama", "qwen2", "phi3", "gemma3_text"])
def test_codes_and_scales_of_activations_are_read_as_they_were_written(tmp_path, case, formats):
    """Where a family stacks q, k and v in one tensor too, and beside other formats."""
    decoder, weights, codes, _ = saved(tmp_path, case, formats)
    model = load_model(str(codes))
    assert_stored(model, decoder, weights)
    wanted = token_logits(decoder, weights.items(), ids())
    assert torch.allclose(token_logits(model.decoder, weight_stream(model), ids()), wanted, atol=1e-4)
    # The values alone give others: what modules read is rounded.
    plain = token_logits(decoder.with_format(None), numbers(weights).items(), ids())
    assert float((plain - wanted).abs().max()) > 1e-3 * float(wanted.abs().max())


@pytest.mark.parametrize(
    "formats",
    [*ALL.values(), MIXED["w8a8"], MIXED["fp8"], [(NVFP4, None), (None, NVFP4)]],
    ids=[*ALL, "w8a8 mixed", "fp8 mixed", "nvfp4 and floats"],
)
def test_transformers_rounds_the_same_activations(tmp_path, formats):
    """Weights of 4 bits become numbers of bf16 there, exactly, whatever the model is loaded in, so that it is loaded in
    bf16 and widened once they are made. Other formats' scaled codes have more bits than bf16."""
    decoder, weights, codes, _ = saved(tmp_path, "llama", formats)
    half = NVFP4 in decoder.weight_formats.values()
    model = in_transformers(codes, dtype=torch.bfloat16 if half else torch.float32)
    logits_of(model, ids())
    found = logits_of(torch.nn.Module.float(model), ids())[:, :-1]
    wanted = token_logits(decoder, weights.items(), ids())
    assert float((found - wanted).abs().max()) < 1e-3 * float(wanted.abs().max())


def test_gptq_refuses_it_by_name(tmp_path):
    _, _, codes, _ = saved(tmp_path, "llama", [(W8A8, W8A8)])
    model = load_model(str(codes))
    with pytest.raises(InputError, match="no format w8a8"):
        export_gptq(model, tmp_path / "gptq")
    with pytest.raises(InputError, match="one weight format") as error:
        check_exports(["gptq"], model, "uniform", False, [W8A8])
    assert "w8a8" not in error.value.remedy
