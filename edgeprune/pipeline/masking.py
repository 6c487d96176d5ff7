"""Secrets and personal data in samples: what is found by rules, and what stands in its place.

Each rule is one that a reader can check. In doubt it masks: a word too many costs nothing in calibration data, one too
few is leaked. It knows no files and no model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.errors import InputError
from edgeprune.files import printable, read_text
from edgeprune.pipeline.chats import Chat
from edgeprune.pipeline.documents import Document

KINDS = ("keys", "emails", "accounts", "phones")  # in the order in which they are looked for
DEFAULT = ",".join(KINDS)
NONE = "none"
NAMES = "names"  # the kind of what a file lists
ASSIGNED = "assigned"  # the group of a pattern that is masked where a name stands before it
PLACEHOLDERS = {"keys": "[KEY]", "emails": "[EMAIL]", "accounts": "[ACCOUNT]", "phones": "[PHONE]", NAMES: "[NAME]"}
ONE_NAME = "Write a name on each line, in UTF-8."


def _any(match: re.Match[str]) -> bool:
    return True


def _is_mixed(match: re.Match[str]) -> bool:
    """Returns whether small and large letters and digits are in it, as in random strings and in few words."""
    return all(re.search(kind, match[0]) for kind in ("[a-z]", "[A-Z]", "[0-9]"))


def _is_card(match: re.Match[str]) -> bool:
    """Returns whether the last digit is the check digit of Luhn (ISO/IEC 7812-1)."""
    digits = [int(character) for character in match[0] if character.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return (sum(doubled) + sum(digits[-1::-2])) % 10 == 0 and len(set(digits)) > 1


def _is_iban(match: re.Match[str]) -> bool:
    """Returns whether the check digits are those of ISO 13616: the number behind them is 1 modulo 97."""
    text = match[0].replace(" ", "")
    return int("".join(str(int(character, 36)) for character in text[4:] + text[:4])) % 97 == 1


Check = Callable[[re.Match[str]], bool]
PATTERNS: dict[str, tuple[tuple[re.Pattern[str], Check], ...]] = {
    "keys": tuple(
        (re.compile(pattern), check)
        for pattern, check in (
            # A private key as PEM (RFC 7468), to its end or that of the text.
            (r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----(?s:.*?)(?:-----END [A-Z ]{0,40}PRIVATE KEY-----|\Z)", _any),
            # A JSON web token (RFC 7519).
            (r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*", _any),
            # Keys that say whose they are: AWS, GitHub, GitLab, OpenAI and alike, Slack, Google, Hugging Face, Stripe.
            (r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b", _any),
            (r"\bgh[pousr]_\w{30,}|\bgithub_pat_\w{22,}|\bglpat-[\w-]{20,}", _any),
            (r"\bsk-[\w-]{20,}|\b[srp]k_(?:live|test)_\w{16,}|\bxox[a-z]-[\w-]{10,}", _any),
            (r"\bAIza[\w-]{35}|\bhf_\w{30,}|\bnpm_\w{36}|\bpypi-[\w-]{40,}", _any),
            # User and password in an address, what an HTTP header authorises with, what is assigned to such a name.
            (r"(?<=://)[^\s/:@]{1,100}:[^\s/@]{1,100}(?=@)", _any),
            (rf"(?i:\b(?:bearer|basic)\s{{1,3}})(?P<{ASSIGNED}>(?=\S{{0,200}}\d)[\w.~+/-]{{16,}}=*)", _any),
            (
                r"(?i:(?:password|passwd|pwd|passphrase|secret|token|api[_-]?key|access[_-]?key|private[_-]?key|"
                rf"credential)[\w.-]{{0,30}}[\"']?\s{{0,3}}[:=]\s{{0,3}})[\"']?(?P<{ASSIGNED}>[^\s\"',;<>]{{6,}})",
                _any,
            ),
            # Long strings without a meaning, and the digests and keys that are written as hexadecimal digits.
            (r"(?i:\b[0-9a-f]{32,}\b)", _any),
            (r"(?<![\w+-])[\w+-]{32,}(?![\w+-])|(?<![\w+/])[A-Za-z0-9+/]{60,}={0,2}", _is_mixed),
        )
    ),
    "emails": ((re.compile(r"(?<![\w.+%-])[\w.+%-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}"), _any),),
    "accounts": (
        (re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"), _is_iban),
        (re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-])"), _is_card),
        (re.compile(r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])"), _any),  # of social security in the USA
    ),
    "phones": tuple(
        (re.compile(pattern), _any)
        for pattern in (
            # With the code of a country (ITU-T E.164: at most 15 digits).
            r"(?<![0-9A-Za-z+.])(?:\+|00)[1-9](?:[ .()/-]{0,2}\d){6,14}(?!\d)",
            # With a leading zero: an area and a number, five pairs, or ten digits and more in one.
            r"(?<![0-9A-Za-z.,/-])\(?0\d{1,4}\)?[ /-]{1,2}\d{3,8}(?:[ -]\d{2,8}){0,3}(?![\d-])",
            r"(?<![0-9A-Za-z.,/-])0\d(?:[ .-]\d{2}){4}(?!\d)",
            r"(?<![0-9A-Za-z.,/-])0\d{9,11}(?!\d)",
            # Of North America.
            r"(?<![0-9A-Za-z.,/-])(?:1[ .-])?(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}(?![\d-])",
        )
    ),
}


@dataclass(frozen=True)
class Masker:
    """The rules that a user chose. names: a pattern of the names that a file lists, if any."""

    kinds: tuple[str, ...]
    names: re.Pattern[str] | None = None

    def text(self, text: str) -> tuple[str, Counter[str]]:
        """Returns a text with a placeholder for all that the rules find, and how much of each kind that was."""
        counts: Counter[str] = Counter()
        rules = [(kind, pattern, check) for kind in self.kinds for pattern, check in PATTERNS[kind]]
        if self.names is not None:
            rules.append((NAMES, self.names, _any))
        for kind, pattern, check in rules:
            text = pattern.sub(lambda match: _replaced(match, kind, check, counts), text)  # noqa: B023
        return text, counts

    def document(self, document: Document) -> tuple[Document, Counter[str]]:
        """Returns a document as `text` does: of a chat all texts but the roles, those of its tools too."""
        if isinstance(document, str):
            return self.text(document)
        counts: Counter[str] = Counter()

        def masked(value: Any) -> Any:
            if isinstance(value, str):
                value, found = self.text(value)
                counts.update(found)
                return value
            if isinstance(value, list):
                return [masked(item) for item in value]
            if isinstance(value, dict):
                return {key: item if key == "role" else masked(item) for key, item in value.items()}
            return value

        return Chat(masked(list(document)), masked(document.tools), document.place), counts


def _replaced(match: re.Match[str], kind: str, check: Check, counts: Counter[str]) -> str:
    """Returns what stands in the place of a match: itself where the check finds that it is something else."""
    if not check(match):
        return match[0]
    group = ASSIGNED if ASSIGNED in match.re.groupindex else 0
    if match[group] in PLACEHOLDERS.values():  # of a rule before
        return match[0]
    counts[kind] += 1
    start, end = (place - match.start() for place in match.span(group))
    return match[0][:start] + PLACEHOLDERS[kind] + match[0][end:]


def masker_of(kinds: str | Iterable[str], names: Path | None) -> Masker:
    """Returns the rules of kinds with commas between, `none` for none, and of a file of names, one on each line.

    Raises InputError for an unknown kind, and for a file that lists no name.
    """
    given = kinds.split(",") if isinstance(kinds, str) else list(kinds)
    asked = [kind for part in given if (kind := str(part).strip().lower())]
    if NONE in asked:
        asked = [kind for kind in asked if kind != NONE]
        if asked:
            raise InputError(f"--mask names {asked[0]} and {NONE}", f"Write {NONE} alone, or leave it out.")
    if unknown := [kind for kind in asked if kind not in KINDS]:
        raise InputError(
            f"--mask {printable(unknown[0], 40)} is nothing that a rule finds",
            f"Write some of {DEFAULT}, or {NONE}; give people's names, or others, in a file with --names.",
        )
    ordered = tuple(kind for kind in KINDS if kind in asked)
    return Masker(ordered, None if names is None else _pattern(names))


def _pattern(path: Path) -> re.Pattern[str]:
    """Returns the pattern of the names in a file, long ones first. Raises InputError."""
    names = sorted({line.strip() for line in read_text(path, ONE_NAME).splitlines() if line.strip()}, key=len)
    if not names:
        raise InputError(f"{path} lists no name", ONE_NAME)
    return re.compile("|".join(map(_bounded, reversed(names))), re.IGNORECASE)


def _bounded(name: str) -> str:
    """Returns the pattern of a name as whole words; scripts without spaces have no ends of words."""
    before, after = (r"(?<!\w)", r"(?!\w)")
    escaped = re.sub(r"(?:\\\s)+", r"\\s+", re.escape(name))
    return (before if name[0].isascii() else "") + escaped + (after if name[-1].isascii() else "")
