"""Masking: what the rules find, what they leave alone, in texts and in every text of a chat."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.errors import InputError
from edgeprune.pipeline.chats import chat_of
from edgeprune.pipeline.masking import DEFAULT, KINDS, masker_of

ALL = masker_of(DEFAULT, None)
MIXED = "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8s9T0"
MASKED = {
    "write to bob.smith+news@mail.example.co.uk today": "write to [EMAIL] today",
    "連絡先:03-1234-5678まで、taro@example.jp": "連絡先:[PHONE]まで、[EMAIL]",
    "call +49 (0)30 1234-5678 now": "call [PHONE] now",
    "call +4917512345678, or 00441632960961": "call [PHONE], or [PHONE]",
    "030/1234567 or 0175 1234567 or 01.23.45.67.89 or 01751234567": "[PHONE] or [PHONE] or [PHONE] or [PHONE]",
    "555-123-4567 or (555) 123-4567 or 1 555 123 4567": "[PHONE] or [PHONE] or [PHONE]",
    "password = 'hunter22' and MY_API_KEY: abcdef12345": "password = '[KEY]' and MY_API_KEY: [KEY]",
    '{"client_secret": "qwerty-uiop"}': '{"client_secret": "[KEY]"}',
    "Authorization: Bearer abcdefghij1234567890==, next": "Authorization: Bearer [KEY], next",
    "git clone https://me:pa55@example.org/x": "git clone https://[KEY]@example.org/x",
    f"AKIAIOSFODNN7EXAMPLE ghp_{MIXED}": "[KEY] [KEY]",
    f"sk-{MIXED} hf_{MIXED} glpat-{MIXED}": "[KEY] [KEY] [KEY]",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmN": "[KEY]",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIE\nabc\n-----END RSA PRIVATE KEY----- after": "[KEY] after",
    "-----BEGIN PRIVATE KEY-----\nMIIE\nno end": "[KEY]",
    f"it is {MIXED}.": "it is [KEY].",
    "d41d8cd98f00b204e9800998ecf8427e": "[KEY]",
    "IBAN DE89 3704 0044 0532 0130 00, GB82WEST12345698765432": "IBAN [ACCOUNT], [ACCOUNT]",
    "card 4111 1111 1111 1111 or 378282246310005": "card [ACCOUNT] or [ACCOUNT]",
    "SSN 123-45-6789": "SSN [ACCOUNT]",
}
UNTOUCHED = [
    "on 01.02.2024, 2024-01-15, 01/02/2024 at 12:30 or 1990-2000",
    "version 1.2.3 at 10.0.0.1:8080, 0.123456789 and 1234567890 and -0.0012345678",
    "256 tokens, a secret of the house, the token was lost",
    "basic understanding-of-responsibilities is a must",
    "card 4111 1111 1111 1112, order 1111111111111111",
    "ISBN 978-3-16-148410-0",
    "incomprehensibilities-of-a-very-long-hyphenated-word",
    "@home, a@b and user at example dot org",
]


@pytest.mark.parametrize(("text", "masked"), MASKED.items(), ids=list(MASKED))
def test_what_is_found_is_masked_and_counted(text: str, masked: str) -> None:
    result, counts = ALL.text(text)
    assert result == masked
    assert counts.total() == masked.count("[")
    assert ALL.text(result) == (masked, {})  # nothing of a placeholder is found again


@pytest.mark.parametrize("text", UNTOUCHED)
def test_what_looks_alike_stays(text: str) -> None:
    assert ALL.text(text) == (text, {})


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_kinds_that_were_chosen_are_masked(kind: str) -> None:
    text = f"a@example.org +49 30 12345678 DE89370400440532013000 ghp_{MIXED}"
    _, counts = masker_of(kind, None).text(text)
    assert counts == {kind: 1}
    assert masker_of("none", None).text(text) == (text, {})


@given(st.text(alphabet="aB0 +-.@:/=(\n", max_size=300))
def test_any_text_is_masked_once_and_for_all(text: str) -> None:
    once, _ = ALL.text(text)
    assert ALL.text(once)[0] == once


@pytest.mark.parametrize("part", ["a-b_c ", "0 ", "+", "a@", "(0", "eyJ.", "token", "A1a"])
def test_a_long_text_comes_to_an_end(part: str) -> None:
    """No rule looks at a text again from each of its places: this would take hours."""
    text, _ = ALL.text(f"{part * (60_000 // len(part))}\nbob@example.org")
    assert text.endswith("\n[EMAIL]")


def test_all_texts_of_a_chat_are_masked_and_nothing_else_of_it() -> None:
    record = {
        "messages": [
            {"role": "user", "content": "I am bob@example.org", "name": "bob@example.org"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "mail", "arguments": {"to": ["bob@example.org"], "copies": 2}}}],
            },
        ],
        "tools": [{"function": {"name": "mail", "description": "Ask admin@example.org"}}],
    }
    chat, counts = ALL.document(chat_of(record, "a.jsonl, line 3"))
    assert "example.org" not in json.dumps([chat, chat.tools])
    assert counts == {"emails": 4}
    assert [message["role"] for message in chat] == ["user", "assistant"]
    assert chat[1]["tool_calls"][0]["function"] == {"name": "mail", "arguments": {"to": ["[EMAIL]"], "copies": 2}}
    assert chat.place == "a.jsonl, line 3"


def test_names_of_a_file_are_masked_as_whole_words(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("Ann\nAnn Marie Smith\n\n佐藤\nC++ Ltd. \n")
    names = masker_of("none", tmp_path / "names.txt")
    assert names.text("ANN met Ann  Marie\nSmith of C++ Ltd. in Annapolis; 佐藤さん")[0] == (
        "[NAME] met [NAME] of [NAME] in Annapolis; [NAME]さん"
    )


@pytest.mark.parametrize(
    ("kinds", "names", "message"),
    [
        ("emails,faces", None, "faces"),
        ("none,emails", None, "none"),
        ("emails", "", "lists no name"),
        ("names", None, "--names"),
    ],
)
def test_a_wrong_choice_is_refused_with_a_remedy(tmp_path: Path, kinds: str, names: str | None, message: str) -> None:
    path = None
    if names is not None:
        path = tmp_path / "names.txt"
        path.write_text(names)
    with pytest.raises(InputError) as error:
        masker_of(kinds, path)
    assert message in f"{error.value.message} {error.value.remedy}"
