from types import SimpleNamespace

import pytest

from edgeprune.errors import InputError
from edgeprune.model.tokens.generation import FILE, configured_ends, end_ids


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("{}", []),
        ('{"eos_token_id": null}', []),
        ('{"eos_token_id": 3}', [3]),
        ('\ufeff{"eos_token_id": [3, 2]}', [3, 2]),
    ],
)
def test_the_ends_of_a_generation(tmp_path, text, ends):
    assert configured_ends(tmp_path) == []
    (tmp_path / FILE).write_text(text, encoding="utf-8")
    assert configured_ends(tmp_path) == ends
    assert end_ids(SimpleNamespace(eos_token_id=7), tmp_path) == {7, *ends}
    assert end_ids(SimpleNamespace(eos_token_id=None), tmp_path) == set(ends)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"eos_token_id": 2,}',
        *(f'{{"eos_token_id": {ends}}}' for ends in ('"</s>"', "[[2]]", "-1", "2.0", "true")),
    ],
)
def test_what_names_no_tokens_is_refused_with_the_files_name(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(InputError, match=FILE):
        configured_ends(tmp_path)
