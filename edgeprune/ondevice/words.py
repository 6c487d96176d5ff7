"""Tokenizers as the service needs them, and one that needs the module `tokenizers` alone, with chat templates.

This file also runs on the device: Python 3.10, numpy, tokenizers and jinja2, which serve.pyz brings along.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.chats import check_ids, encode, render_whole
from edgeprune.errors import InputError
from edgeprune.files import read_json, read_text

if TYPE_CHECKING:
    from jinja2 import Template

CONFIG, TEMPLATE, GENERATION = "tokenizer_config.json", "chat_template.jinja", "generation_config.json"
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
COPY_AGAIN = "Copy the whole bundle again."


class TokenizerWords:
    """A tokenizer with its chat template, as answering.Words. tokenizer: of transformers, or a DeviceTokenizer."""

    def __init__(self, tokenizer: Any, ends: Collection[int], vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self.ends = frozenset(ends)

    def chat_ids(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any]) -> list[int]:
        """Returns the token ids of a chat with the opening of an answer.

        Raises InputError where there is no template, or where it refuses the chat.
        """
        if self._tokenizer.chat_template is None:
            raise InputError("the model has no chat template", "Ask for /v1/completions instead.")
        text = render_whole(self._tokenizer, messages, tools, prompted=True)
        ids = encode(self._tokenizer, text, special=False)
        check_ids([ids], self._vocab_size, self._tokenizer, "the chat")
        return ids

    def ids(self, text: str) -> list[int]:
        """Returns the token ids of a text. Raises InputError."""
        ids = encode(self._tokenizer, text)
        check_ids([ids], self._vocab_size, self._tokenizer, "the prompt")
        return ids

    def text(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids, without special tokens."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)


class DeviceTokenizer:
    """A bundle's tokenizer without transformers, with the functions of transformers' that chats.py calls.

    ends: ids that end an answer, by the tokenizer's configuration and generation_config.json. Raises InputError where
    the folder has no tokenizer.json, or a damaged file.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise InputError(f"{folder} has no tokenizer.json", "Serve the bundle with `edgeprune serve`.")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # of the tokenizers package, whose exceptions have no class of their own
            raise InputError(f"{path} cannot be read: {error}", COPY_AGAIN) from None
        config = read_json(folder / CONFIG, remedy=COPY_AGAIN) if (folder / CONFIG).is_file() else {}
        self._special = {name: _content(config.get(name)) for name in SPECIAL}
        self.chat_template = _template_of(folder, config)
        generation = folder / GENERATION
        ends = read_json(generation, remedy=COPY_AGAIN).get("eos_token_id") if generation.is_file() else None
        own = self._tokenizer.token_to_id(self._special["eos_token"] or "")
        self.ends = {*(ends if isinstance(ends, list) else [ends]), own} - {None}

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """Returns the token ids of a text, as `input_ids`."""
        return {"input_ids": self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Returns the text of token ids."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str | None]:
        """Returns the tokens of ids."""
        return [self._tokenizer.id_to_token(one) for one in ids]

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
    ) -> str:
        """Returns a chat as the template writes it. Raises what the template raises."""
        named = self.chat_template
        if isinstance(named, dict):
            named = named["tool_use"] if tools and "tool_use" in named else named["default"]
        special = {name: text for name, text in self._special.items() if text is not None}
        return _compiled(named).render(
            messages=messages, tools=tools, documents=None, add_generation_prompt=add_generation_prompt, **special
        )


def _content(token: Any) -> str | None:
    """Returns the text of a special token, which a configuration may hold as an object."""
    return token.get("content") if isinstance(token, dict) else token


def _template_of(folder: Path, config: Mapping[str, Any]) -> str | dict[str, str] | None:
    """Returns the chat template, or several by their names; None where there is none."""
    if (folder / TEMPLATE).is_file():
        return read_text(folder / TEMPLATE, COPY_AGAIN)
    template = config.get("chat_template")
    if isinstance(template, list):
        return {one["name"]: one["template"] for one in template}
    return template


def _compiled(template: str) -> Template:
    """Returns a template in the environment that transformers gives it: sandboxed, with its functions and filters."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Node
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The block that marks what an assistant says, which changes no text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)
