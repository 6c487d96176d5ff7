"""A request is made of options as people write them; what cannot be one is refused by name."""

from pathlib import Path

import pytest

from edgeprune.errors import InputError
from edgeprune.pipeline.request import Request, check_samples, request_of


def test_options_are_taken_as_people_write_them():
    request = request_of(
        model=Path("my-model"),
        device="jetson-orin",
        memory=1.5 * 2**30,
        decode=25,
        prefill="0.5s",
        evaluate="held-out.txt",
        export="gguf",
        output="out",
        samples="64",
        max_quality_loss=10,
        precision=None,
    )
    assert request == Request(
        model="my-model",
        device="jetson-orin",
        memory="1610612736B",
        decode="25ms",
        prefill="0.5s",
        evaluate=(Path("held-out.txt"),),
        export=("gguf",),
        output=Path("out"),
        samples=64,
        max_quality_loss="10%",
    )
    assert request_of(evaluate=["a", Path("b")]).evaluate == (Path("a"), Path("b"))
    assert request_of() == Request()


def test_what_is_given_twice_is_taken_once():
    request = request_of(evaluate=["b", Path("a"), Path("b")], export=["gguf", "gguf"])
    assert (request.evaluate, request.export) == ((Path("b"), Path("a")), ("gguf",))


@pytest.mark.parametrize(
    ("options", "message", "remedy"),
    [
        ({"memroy": "90%"}, "there is no option 'memroy'", "Did you mean memory?"),
        ({"nothing_like_it": 1}, "there is no option 'nothing_like_it'", "Options are: model, "),
        ({"samples": "many"}, "samples 'many'", "edgeprune fit --help"),
        ({"samples": 2.5}, "samples 2.5", "edgeprune fit --help"),
        ({"force": "perhaps"}, "force 'perhaps'", "edgeprune fit --help"),
        ({"evaluate": ""}, "--evaluate is empty", "Leave it out"),
        ({"export": ["gguf", ""]}, "--export is empty", "Leave it out"),
        ({"evaluate": 3}, "evaluate 3", "edgeprune fit --help"),
        ({"memory": ["90%"]}, "memory ['90%']", "edgeprune fit --help"),
    ],
)
def test_what_cannot_be_an_option_is_refused_by_name(options, message, remedy):
    with pytest.raises(InputError) as caught:
        request_of(**options)
    assert message in caught.value.message
    assert remedy in caught.value.remedy


@pytest.mark.parametrize("name", ["model", "output", "calibration", "evaluate", "features"])
@pytest.mark.parametrize("text", ["caf\udce9", "a\0b"], ids=["no UTF-8", "NUL"])
def test_a_name_that_no_file_or_report_can_hold_is_refused(name, text):
    for value in (text, Path(text)):
        with pytest.raises(InputError, match="is not UTF-8 text") as caught:
            request_of(**{name: value})
        assert caught.value.message.isascii()


@pytest.mark.parametrize("seed", [-1, 2**63, 2**70])
def test_a_seed_that_not_all_generators_take_is_refused(seed):
    with pytest.raises(InputError, match=f"--seed {seed} is not 0 to 9223372036854775807"):
        check_samples(request_of(seed=seed))
    check_samples(request_of(seed=2**63 - 1))
