"""The weight formats that a request may use, by device and model."""

from dataclasses import replace

import pytest

from edgeprune.dialects import version_of
from edgeprune.errors import InputError
from edgeprune.model.decoder import Decoder, Experts, Layer, Mlp
from edgeprune.pipeline.formats import weight_choice, without_dequantised, without_formats
from edgeprune.precision import WEIGHT_FORMATS
from edgeprune.profiles import OfferedFormats, list_profiles, load_profile, with_tensorrt
from edgeprune.search.dequantised import Dequantised
from tests.support.shapes import SMOLLM2, uniform

CPU, ORIN, RTX = (load_profile(name) for name in ("cpu", "jetson-orin", "rtx-4090"))
MIXTURE = replace(SMOLLM2, layers=(Layer(SMOLLM2.layers[0].attention, Mlp(1536, experts=Experts(4, 2))),) * 2)
NARROW = uniform(48, 2, (4, 2, 12), 96, 200)  # no multiple of 32


def named(profile, asked="auto", decoder=SMOLLM2):
    return [form.name if form else "float" for form in weight_choice(asked, profile, decoder).layers]


def test_auto_is_what_the_device_runs_well():
    assert named(CPU) == ["float", "int8", "int4-32-asymmetric", "w8a8"]
    assert named(ORIN) == ["float", "int8", "int4-64", "w8a8"]
    assert named(RTX) == [*named(ORIN), "fp8"]
    assert "jetson-orin runs int8, int4-64 and w8a8 well" in weight_choice("auto", ORIN, SMOLLM2).reason


def test_what_nobody_timed_is_for_those_who_name_it():
    assert named(RTX, "int4-offset") == ["int4-offset"]
    assert named(ORIN, "int4,int4-offset") == ["int4-64", "int4-offset"]
    for profile in list_profiles():
        assert "int4-offset" not in named(profile)
        on_tensorrt = profile.engine != "onnxruntime"
        assert ("int4-offset" in profile.weights) == on_tensorrt
        reason = weight_choice("auto", profile, SMOLLM2).reason
        untimed = " or ".join(name for name, offer in profile.weights.items() if not offer.auto)
        assert reason.endswith(f"nobody timed {untimed}, which --weights names") == on_tensorrt
    assert RTX.untimed([None, *map(WEIGHT_FORMATS.get, ("int8", "int4-offset", "int4-64"))]) == ("int4-offset",)


def test_auto_leaves_out_groups_that_do_not_divide_and_says_so():
    choice = weight_choice("auto", ORIN, NARROW)
    assert [form and form.name for form in choice.layers] == [None, "int8", "w8a8"]
    assert "this model's matrices cannot be in int4" in choice.reason


def test_the_first_group_that_divides_is_taken():
    decoder = uniform(96, 2, (4, 2, 24), 192, 200)
    assert named(ORIN, "int4", decoder) == ["int4-32"]


@pytest.mark.parametrize("profile", list_profiles(), ids=lambda profile: profile.name)
def test_every_shipped_device_offers_formats_with_their_source(profile):
    assert named(profile)[:2] == ["float", "int8"]
    for offer in profile.weights.values():
        assert offer.source
        assert all(name in WEIGHT_FORMATS for name in offer.formats)


@pytest.mark.parametrize("profile", list_profiles(), ids=lambda profile: profile.name)
def test_floats_of_few_bits_are_offered_to_gpus_that_have_them(profile):
    """`auto` takes them where published figures are of them."""
    sm = profile.sm or 0
    assert ("fp8" in profile.weights) is (sm >= 89)
    assert ("nvfp4" in profile.weights) is (sm >= 100)
    for name in {"fp8", "nvfp4"} & profile.weights.keys():
        assert named(profile, name) == [name]
        figured = name in profile.formats or (name == "nvfp4" and sm == 110)  # Thor T4000 has those of AGX Thor
        assert profile.weights[name].auto is figured
        assert profile.prefill_factor(WEIGHT_FORMATS[name]) < (0.6 if name == "fp8" else 0.4)


def test_a_processor_and_a_gpu_without_them_refuse_floats_of_few_bits_by_name():
    for profile, name in ((CPU, "fp8"), (CPU, "nvfp4"), (ORIN, "fp8"), (RTX, "nvfp4")):
        with pytest.raises(InputError, match=f"does not run weights in {name} well") as caught:
            named(profile, name)
        assert "int8" in caught.value.remedy


def test_what_is_asked_for_is_all_that_may_be_used():
    assert named(CPU, "int8") == ["int8"]
    assert named(CPU, "float") == ["float"]
    assert named(ORIN, "float, int4") == ["float", "int4-64"]
    assert named(ORIN, "int4-128", uniform(256, 2, (2, 2, 128), 512, 200)) == ["int4-128"]
    assert weight_choice("float", CPU, SMOLLM2).tables == (None,)


def test_tables_are_floats_or_lose_next_to_nothing():
    assert weight_choice("auto", CPU, SMOLLM2).tables == (None, WEIGHT_FORMATS["int8"])
    assert weight_choice("int4", CPU, SMOLLM2).tables == (None, WEIGHT_FORMATS["int8"])


@pytest.mark.parametrize(
    ("profile", "asked", "decoder", "message", "remedy"),
    [
        (CPU, "int4-64", SMOLLM2, "cpu does not run weights in int4-64 well", "float, int8, int4, w8a8, int4-32"),
        (CPU, "int4-offset", SMOLLM2, "cpu does not run weights in int4-offset well", "float, int8, int4"),
        (RTX, "int4-offset", MIXTURE, "no checkpoint holds experts so", "float, int8, int4-64"),
        (RTX, "int4-offset", NARROW, "int4-offset has groups of 64 inputs, which do not divide", "float, int8"),
        (CPU, "w8a8", MIXTURE, "each expert reads other tokens", "float, int8, int4-32-asymmetric"),
        (ORIN, "int4-32-asymmetric", SMOLLM2, "jetson-orin does not run weights in int4-32-asymmetric", "int4-64"),
        (
            ORIN,
            "int4-128",
            SMOLLM2,
            "int4-128 has groups of 128 inputs, which do not divide the hidden_size 576",
            "int8",
        ),
        (
            ORIN,
            "int4",
            NARROW,
            "int4-64 has groups of 64 inputs, which do not divide the hidden_size 48",
            "float, int8",
        ),
        (ORIN, "int5", SMOLLM2, "unknown weights 'int5'", "auto, or some of float, int8, int4"),
        (ORIN, "", SMOLLM2, "unknown weights ''", "auto"),
        (ORIN, "int8,", SMOLLM2, "unknown weights ''", "auto"),
    ],
)
def test_what_does_not_run_is_refused_with_what_does(profile, asked, decoder, message, remedy):
    with pytest.raises(InputError) as caught:
        weight_choice(asked, profile, decoder)
    assert message in caught.value.message
    assert remedy in caught.value.remedy


def test_int4_on_a_gpu_that_has_none():
    turing = RTX.model_copy(update={"sm": 75, "weights": {"int8": RTX.weights["int8"]}})
    with pytest.raises(InputError, match="does not run weights in int4 well") as caught:
        weight_choice("int4", turing, SMOLLM2)
    assert "float, int8" in caught.value.remedy


def test_an_older_tensorrt_parses_another_dialect_and_fewer_formats():
    older = with_tensorrt(ORIN, "10.3.0.30")
    assert (older.tensorrt, older.dialect) == ("10.3.0.30", "primitive")
    assert named(older) == ["float", "int8"]
    with pytest.raises(InputError, match="TensorRT 10.3.0.30 of jetson-orin does not run int4, which needs 10.15"):
        weight_choice("int4", older, SMOLLM2)
    assert with_tensorrt(older, "10.16").dialect == "opset24"
    assert with_tensorrt(ORIN, None) == ORIN


def offering(**formats: list[str]):
    """A device that runs formats of ggml, by word; those of 6 bits and more in the tables too."""
    offers = {
        word: OfferedFormats(formats=names, prefill=1, tables=word in ("q6_k", "q8_0"), source="x", confidence="low")
        for word, names in formats.items()
    }
    return CPU.model_copy(update={"weights": offers})


LLAMA_CPP = offering(q3_k=["q3_k", "q4_0"], q4_k=["q4_k", "q5_0"], q4_0=["q4_0"], q6_k=["q6_k", "q8_0"], q8_0=["q8_0"])
WIDE = uniform(2048, 2, (8, 2, 128), 8192, 200)


def test_blocks_of_256_are_taken_where_they_divide_all_sizes():
    assert named(LLAMA_CPP, "auto", WIDE) == ["float", "q3_k", "q4_k", "q4_0", "q6_k", "q8_0"]
    choice = weight_choice("q4_k", LLAMA_CPP, WIDE)
    assert (choice.names, choice.reason, choice.is_asked) == ("q4_k", "asked for", True)
    assert [form and form.name for form in choice.tables] == [None, "q6_k", "q8_0"]


def test_blocks_of_32_stand_in_for_those_that_do_not_and_words_say_so():
    assert named(LLAMA_CPP) == ["float", "q4_0", "q5_0", "q8_0"]
    reason = weight_choice("auto", LLAMA_CPP, SMOLLM2).reason
    assert reason.startswith(
        "cpu runs q4_0, q5_0 and q8_0 well; q3_k has blocks of 256 inputs, which do not divide the"
    )
    assert "hidden_size 576: q4_0 for q3_k, q5_0 for q4_k, q8_0 for q6_k" in reason
    choice = weight_choice("q4_k", LLAMA_CPP, SMOLLM2)
    assert (choice.names, choice.is_asked) == ("q5_0", True)
    assert choice.reason.endswith(
        "q4_k has blocks of 256 inputs, which do not divide the hidden_size 576: q5_0 for q4_k"
    )
    assert [form and form.name for form in choice.tables] == [None, "q8_0"]


def test_a_word_for_a_number_of_bits_needs_no_words():
    assert weight_choice("int8", offering(int8=["q8_0"]), SMOLLM2).reason == "asked for"
    assert weight_choice("auto", offering(int8=["q8_0"]), SMOLLM2).reason == "cpu runs q8_0 well"


def test_widths_in_between_decide_too():
    narrow_mlp = uniform(2048, 2, (8, 2, 128), 8192 + 32, 200)
    assert named(LLAMA_CPP, "q6_k", narrow_mlp) == ["q8_0"]
    with pytest.raises(InputError, match="q4_0 has groups of 32 inputs, which do not divide the hidden_size 48"):
        weight_choice("q4_0", LLAMA_CPP, NARROW)


def with_family(decoder: Decoder, family: str, **attention: object) -> Decoder:
    layers = tuple(Layer(replace(layer.attention, **attention), layer.mlp) for layer in decoder.layers)
    return replace(decoder, family=family, layers=layers)


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        (with_family(WIDE, "opt"), "llama.cpp has no architecture for the family opt"),
        (with_family(WIDE, "olmo2", qk_norm="all"), "a norm over all heads, which changes weights of few bits"),
    ],
)
def test_a_model_that_no_gguf_file_holds_in_few_bits_stays_in_floats(decoder, message):
    assert named(LLAMA_CPP, "auto", decoder) == ["float"]
    with pytest.raises(InputError) as caught:
        weight_choice("q4_0", LLAMA_CPP, decoder)
    assert message in caught.value.message
    assert caught.value.remedy == "This model takes float."


def test_heads_of_zeros_have_to_be_whole_blocks():
    """Those that stand for removed ones where the file must have as many as fill the hidden size."""
    assert named(LLAMA_CPP, "q4_k", with_family(WIDE, "starcoder2")) == ["q5_0"]
    assert named(LLAMA_CPP, "q4_k", with_family(WIDE, "qwen2")) == ["q4_k"]


def test_versions_are_compared_by_number():
    assert version_of("10.3") < version_of("10.15") < version_of("10.16.1") < version_of("11")
    for text in ("", "x", "ten.3", "-1"):
        with pytest.raises(InputError, match="is not a version of TensorRT"):
            version_of(text)
    with pytest.raises(InputError, match="does not run TensorRT of a version of its own"):
        with_tensorrt(CPU, "10.3")


def test_a_model_that_no_file_holds_in_few_bits_stays_floats():
    auto = without_formats(weight_choice("auto", CPU, SMOLLM2), "gpt2 has transposed matrices")
    assert auto.quantised == ()
    with pytest.raises(InputError, match="gpt2 has transposed matrices, so its weights stay floats"):
        without_formats(weight_choice("int8", CPU, SMOLLM2), "gpt2 has transposed matrices")
    assert without_formats(weight_choice("float", CPU, SMOLLM2), "x").layers == (None,)


@pytest.mark.parametrize(
    ("in_layers", "left"),
    [(True, ([None, "int4-64", "w8a8"], [None, "int8"])), (False, ([None, "int8", "int4-64", "w8a8"], [None]))],
)
def test_auto_goes_on_without_what_a_builder_dequantises_and_what_was_asked_for_stays(in_layers, left):
    found = [Dequantised("int8", in_layers, 9 * 2**20, 5 * 2**20)]
    auto, asked = (weight_choice(words, ORIN, SMOLLM2) for words in ("auto", "int8"))
    packed = without_dequantised(auto, "tensorrt-rtx", found)
    assert tuple([form and form.name for form in forms] for forms in (packed.layers, packed.tables)) == left
    place = "layers" if in_layers else "embedding and head"
    figures = f"int8 of {place} (9.0 MiB of activations in a small model, 5.0 MiB in floats)"
    shown = f"tensorrt-rtx dequantises into copies at each step: {figures}"
    assert packed.reason == f"{auto.reason}; left out is what {shown}"
    stays = without_dequantised(asked, "tensorrt-rtx", found)
    assert (stays.layers, stays.tables, stays.reason) == (asked.layers, asked.tables, f"asked for, though {shown}")
    assert without_dequantised(auto, "tensorrt-rtx", []) is auto
