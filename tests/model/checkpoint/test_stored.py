"""Weights of few bits on the disk: every family's are read back as the codes, scales and zeros that were written."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, load_file, save_file

from edgeprune.errors import InputError
from edgeprune.model.checkpoint import safetensors_file
from edgeprune.model.checkpoint.quantization import can_be_packed
from edgeprune.model.checkpoint.values import SCALES_FILE
from edgeprune.model.load import load_model, load_outline, load_shape
from edgeprune.model.save import save_checkpoint
from edgeprune.precision import WEIGHT_FORMATS
from tests.support.checkpoints import save_llama
from tests.support.families import CASES, save_family
from tests.support.parity import distance, target_of, torch_logits, uneven_target
from tests.support.quantised import (
    ASYMMETRIC,
    INT4,
    INT8,
    assert_stored,
    in_transformers,
    logits_of,
    packable,
    random_weights,
)
from tests.support.roundings import NARROW_OFFSET, OFFSET, numbers, rounded

PACKED = [case for case in CASES if case.partition(",")[0] not in ("gpt2", "imagegpt")]
HEAD, DOWN = "lm_head.weight", "model.layers.0.mlp.down_proj.weight"


def saved(folder, decoder, source, **options):
    weights = rounded(decoder, random_weights(decoder))
    save_checkpoint(decoder, weights.items(), source, folder, **options)
    return weights


@pytest.mark.slow
@pytest.mark.parametrize("case", PACKED)
def test_every_family_gives_back_its_codes(tmp_path, case):
    """Formats differ between layers, and so do the widths of the second checkpoint."""
    save_family(tmp_path / "dense", case)
    dense = load_model(str(tmp_path / "dense"))
    assert can_be_packed(dense.decoder.family)
    for name, target in (("same", dense.decoder), ("uneven", uneven_target(dense.decoder))):
        decoder = packable(target, asymmetric=True)
        weights = saved(tmp_path / name, decoder, dense)
        decoder = replace(decoder, residual_scale=1.0)  # it is in the codes' scales
        model = load_model(str(tmp_path / name))
        assert_stored(model, decoder, weights)
        assert model.decoder == decoder
        assert load_shape(str(tmp_path / name)) == (name, decoder)
        assert load_outline(str(tmp_path / name)) == (name, decoder, ())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_family_gives_back_codes_of_which_it_holds_the_values(tmp_path, monkeypatch, case):
    """Stacked, turned and transposed tensors, heads of zeros and Granite's factor; others read the floats."""
    monkeypatch.setitem(WEIGHT_FORMATS, OFFSET.name, NARROW_OFFSET)  # whose groups divide the widths
    save_family(tmp_path / "dense", case)
    dense = load_model(str(tmp_path / "dense"))
    for name, target in (("same", dense.decoder), ("cut", target_of(dense.decoder))):
        attention, mlp = (
            None if target.hidden_size % 32 or width % 32 else NARROW_OFFSET
            for width in (target.layers[0].attention.query_size, target.layers[0].mlp.intermediate_size)
        )
        decoder = target.with_formats([(attention, mlp)] * len(target.layers), None, None)
        weights = saved(tmp_path / name, decoder, dense, dtype=torch.bfloat16 if name == "cut" else None)
        floats = {name: weight for name, weight in weights.items() if name in decoder.weight_formats}
        model = load_model(str(tmp_path / name))
        assert_stored(model, decoder, floats)
        assert model.decoder == replace(decoder, residual_scale=1.0, family=model.decoder.family)
        assert "quantization_config" not in json.loads((tmp_path / name / "config.json").read_text())


def test_others_read_the_values_of_offsets_beside_packed_codes(tmp_path):
    save_llama(tmp_path / "dense", hidden_size=128, num_attention_heads=8, intermediate_size=192)
    dense = load_model(str(tmp_path / "dense"))
    decoder = dense.decoder.with_formats([(OFFSET, INT8), (INT4, OFFSET)], INT8, INT8)
    weights = saved(tmp_path / "small", decoder, dense)
    assert_stored(load_model(str(tmp_path / "small")), decoder, weights)
    ids = torch.randint(2, 257, (2, 40), generator=torch.Generator().manual_seed(0))
    found = logits_of(in_transformers(tmp_path / "small"), ids)[:, :-1]
    assert distance(found.numpy(), torch_logits(decoder, numbers(weights), ids)) < 1e-5


@pytest.mark.parametrize("case", ["gpt2", "imagegpt"])
def test_a_family_that_has_no_linear_layers_is_refused(tmp_path, case):
    save_family(tmp_path / "dense", case)
    dense = load_model(str(tmp_path / "dense"))
    with pytest.raises(InputError, match=f"family {case} cannot hold weights of few bits"):
        saved(tmp_path / "small", dense.decoder.with_format(INT8), dense)
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("embedding", [None, INT8, ASYMMETRIC])
@pytest.mark.parametrize("head", [None, INT4])
@pytest.mark.parametrize("layers", [None, INT8])
def test_tables_have_formats_of_their_own(tmp_path, tied, embedding, head, layers):
    save_llama(tmp_path / "dense", tie_word_embeddings=tied)
    dense = load_model(str(tmp_path / "dense"))
    head = embedding if tied else head
    decoder = dense.decoder.with_formats([(layers, None)] * 2, embedding, head)
    weights = saved(tmp_path / "small", decoder, dense, dtype=torch.bfloat16)
    model = load_model(str(tmp_path / "small"))
    assert model.decoder.embedding_format == embedding
    assert model.decoder.head_format == head
    floats = {name: weight.bfloat16() for name, weight in weights.items() if name not in decoder.weight_formats}
    assert_stored(model, decoder, weights | floats)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert ("quantization_config" in config) == bool(layers or (head and not tied))
    assert (tmp_path / "small" / SCALES_FILE).exists() == (embedding is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_codes_do_not_depend_on_the_type_of_the_floats(tmp_path, dtype):
    """Granite's factor of the residuals is in the scales already, and 1 in the configuration."""
    save_family(tmp_path / "dense", "granite")
    dense = load_model(str(tmp_path / "dense"))
    assert dense.decoder.residual_scale == 0.22
    decoder = packable(dense.decoder, asymmetric=True)
    weights = rounded(decoder, {name: dense.weights[name] for name in decoder.shapes()})
    save_checkpoint(decoder, weights.items(), dense, tmp_path / "small", dtype=dtype)
    model = load_model(str(tmp_path / "small"))
    for name, weight in weights.items():
        if name in decoder.weight_formats:
            assert torch.equal(model.quantised[name].scales, weight.scales)
            assert torch.equal(model.weights[name], weight.dequantised())
    assert model.weights["norm"].dtype == dtype
    # What is pruned of this one has its type again, and no formats unless it asks for them.
    assert model.decoder.residual_scale == 1.0
    floats = model.decoder.with_format(None)
    save_checkpoint(floats, ((name, model.weights[name]) for name in weights), model, tmp_path / "again")
    again = load_model(str(tmp_path / "again"))
    assert not again.quantised
    assert again.weights["embedding"].dtype == dtype


PADDED = {
    "opt": (2, 1, 64),
    "gpt_neox": (1, 1, 64),
    "llama, multi-head": (2, 1, 64),
    "llama, llama3 rope, biases, untied": (1, 2, 64),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", [INT8, INT4, ASYMMETRIC], ids=lambda form: form.name)
@pytest.mark.parametrize(("case", "widths"), PADDED.items(), ids=PADDED)
def test_heads_of_zeros_are_added_to_codes_and_taken_off(tmp_path, case, widths, form):
    save_family(tmp_path / "dense", case)
    dense = load_model(str(tmp_path / "dense"))
    decoder = dense.decoder.with_widths(*widths).with_format(form)
    weights = saved(tmp_path / "small", decoder, dense)
    model = load_model(str(tmp_path / "small"))
    assert model.decoder == decoder
    assert_stored(model, decoder, weights)


def test_shards_count_the_bytes_of_the_codes(tmp_path, monkeypatch):
    save_llama(tmp_path / "dense", tie_word_embeddings=False)
    dense = load_model(str(tmp_path / "dense"))
    decoder = packable(dense.decoder, asymmetric=True)
    monkeypatch.setattr(safetensors_file, "SHARD_BYTES", 40_000)
    weights = saved(tmp_path / "small", decoder, dense)
    assert_stored(load_model(str(tmp_path / "small")), decoder, weights)
    files = sorted((tmp_path / "small").glob("*.safetensors"))
    tensors = [load_file(file) for file in files]
    sizes = [sum(tensor.nbytes for tensor in held.values()) for held in tensors]
    assert len(files) > 2
    assert all(size <= 40_000 or len(held) == 1 for size, held in zip(sizes, tensors, strict=True))
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["weight_map"] == {n: f.name for f, held in zip(files, tensors, strict=True) for n in held}


def test_codes_are_read_at_each_access(tmp_path):
    save_llama(tmp_path / "dense")
    dense = load_model(str(tmp_path / "dense"))
    decoder = dense.decoder.with_format(INT8, INT8)
    saved(tmp_path / "small", decoder, dense)
    model = load_model(str(tmp_path / "small"))
    path = tmp_path / "small" / "model.safetensors"
    save_file({name: torch.zeros_like(values) for name, values in load_file(path).items()}, path)
    assert (model.quantised["layers.0.mlp.down"].codes == -128).all()  # 0 is the least code
    assert not model.weights["layers.0.mlp.down"].any()


def test_the_codes_of_another_writer_are_floats(tmp_path):
    """The same file without the field of ours."""
    save_llama(tmp_path / "dense", tie_word_embeddings=False)
    dense = load_model(str(tmp_path / "dense"))
    decoder = packable(dense.decoder, asymmetric=True)
    saved(tmp_path / "small", decoder, dense)
    ours = load_model(str(tmp_path / "small"))
    expected = dict(ours.weights)
    assert ours.as_floats.decoder == dense.decoder
    path = tmp_path / "small" / "config.json"
    path.write_text(path.read_text().replace("edgeprune_embedding_format", "embedding_format"))
    model = load_model(str(tmp_path / "small"))
    assert model.decoder == dense.decoder
    assert "8 bits with a scale for each output and 4 bits in groups of 32" in model.dequantised
    assert model.weights.keys() == expected.keys()
    assert all(torch.equal(model.weights[name], weight) for name, weight in expected.items())


def edit(file, change):
    def damage(folder):
        tensors = load((folder / file).read_bytes())
        change(tensors)
        save_file(tensors, folder / file)

    return damage


def tensors(change):
    return edit("model.safetensors", change)


def put(name, values):
    return tensors(lambda held: held.update({name: values}))


def configured(**changes):
    def damage(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


BAD = {
    "no scales": (tensors(lambda held: held.pop(DOWN + "_scale")), f"has no tensor {DOWN}_scale"),
    "no codes": (tensors(lambda held: held.pop(DOWN + "_packed")), f"has no tensor {DOWN}_packed"),
    "no zeros": (tensors(lambda held: held.pop(DOWN + "_zero_point")), f"has no tensor {DOWN}_zero_point"),
    "no shape": (tensors(lambda held: held.pop(DOWN + "_shape")), f"has no tensor {DOWN}_shape"),
    "codes of another width": (put(DOWN + "_packed", torch.zeros(96, 4, dtype=torch.int32)), "has shape (96, 4)"),
    "codes of another type": (put(DOWN + "_packed", torch.zeros(96, 8)), "is of type F32"),
    "scales of another type": (put(DOWN + "_scale", torch.zeros(96, 2, dtype=torch.int8)), "is of type I8"),
    "scales for each output": (put(DOWN + "_scale", torch.zeros(96, 1)), "has shape (96, 1)"),
    "zeros that are not packed": (put(DOWN + "_zero_point", torch.zeros(96, 2, dtype=torch.int8)), "has shape (96, 2)"),
    "another shape": (put(DOWN + "_shape", torch.tensor([96, 63])), "says (96, 63)"),
    "floats beside codes": (put(DOWN, torch.zeros(96, 64)), "does not have: model.layers.0.mlp.down_proj.weight"),
    "codes without a configuration": (configured(quantization_config=None), "is quantised: it has"),
    "widths that no group divides": (configured(intermediate_size=80), "do not divide 80 inputs"),
    "no scales of the embedding": (lambda folder: (folder / SCALES_FILE).unlink(), f"has no {SCALES_FILE}"),
    "scales of another embedding": (
        edit(SCALES_FILE, lambda held: held.update({"embedding.scales": torch.ones(256, 1)})),
        "(256, 1)",
    ),
    "scales that are cut": (
        lambda folder: (folder / SCALES_FILE).write_bytes((folder / SCALES_FILE).read_bytes()[:-9]),
        "is not a safetensors file or is truncated",
    ),
    "an embedding of another format": (configured(edgeprune_embedding_format="int4-32"), "config.json asks for"),
    "scales of no weight": (
        edit(SCALES_FILE, lambda held: held.update({"head.scales": torch.ones(3)})),
        "as head.scales, but config.json asks for nothing",
    ),
    "a table without scales": (configured(edgeprune_embedding_format=8), "is not a weight format"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised")
    save_llama(folder / "dense", tie_word_embeddings=False)
    dense = load_model(str(folder / "dense"))
    saved(folder / "small", dense.decoder.with_formats([(INT8, ASYMMETRIC)] * 2, INT8, INT4), dense)
    return folder / "small"


@pytest.mark.parametrize(("damage", "reason"), BAD.values(), ids=BAD)
def test_a_damaged_checkpoint_is_refused_with_the_reason(tmp_path, whole, damage, reason):
    import shutil

    shutil.copytree(whole, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(InputError) as caught:
        load_model(str(tmp_path / "model"))
    assert reason in caught.value.message


def test_the_scales_of_the_embedding_belong_to_the_fingerprint(tmp_path, whole):
    import shutil

    for name in ("a", "b"):
        shutil.copytree(whole, tmp_path / name)
    edit(SCALES_FILE, lambda held: held["embedding.scales"].mul_(2))(tmp_path / "b")
    first, second = (load_model(str(tmp_path / name)).fingerprint for name in ("a", "b"))
    assert first != second == load_model(str(tmp_path / "b")).fingerprint


def test_a_stream_of_other_formats_is_a_bug(tmp_path):
    save_llama(tmp_path / "dense")
    dense = load_model(str(tmp_path / "dense"))
    decoder = dense.decoder.with_format(INT8)
    floats, codes = random_weights(decoder), rounded(decoder, random_weights(decoder))
    for number, (target, stream) in enumerate(((decoder, floats), (dense.decoder, codes))):
        with pytest.raises(ValueError, match="got model.layers.0.self_attn.q_proj.weight|has codes"):
            save_checkpoint(target, stream.items(), dense, tmp_path / str(number))
    assert replace(decoder, head_format=INT4) != decoder
