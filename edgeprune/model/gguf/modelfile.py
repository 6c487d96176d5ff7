"""The Modelfile beside a GGUF file, with which `ollama create` makes a model of Ollama's.

Its instructions are those of https://docs.ollama.com/modelfile: FROM names the file, relative to the Modelfile;
PARAMETER num_ctx the context, stop a text that ends an answer; SYSTEM what a chat without a system message begins with.
TEMPLATE is a Go template over .Messages with .Role and .Content (https://docs.ollama.com/template). Ollama since its
llama-server engine takes the Jinja template in the GGUF file itself where there is no TEMPLATE, or where that one also
calls tools (server/images.go); earlier ones know some templates by their text, and else send prompts as they are.
So TEMPLATE is written where a Go template says the same as the model's own on chats of all roles, and left out
elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.chats import Message, render
from edgeprune.errors import InputError
from edgeprune.model.tokens.generation import configured_ends
from edgeprune.model.tokens.tokenizer import load_tokenizer

MODELFILE = "Modelfile"
CONTENTS = {role: f"~{role}~" for role in ("system", "user", "assistant")}  # that no template has in its own texts
CHATS = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user", "assistant", "user"),
)


@dataclass(frozen=True)
class Turns:
    """A chat template whose messages stand one after the other, each between two texts of its role.

    around: by role, the texts before and behind; that behind a user's message opens the answer. default: what a chat
    without a system message begins with, as a message of the system; None: nothing.
    """

    around: dict[str, tuple[str, str]]
    default: str | None

    def rendered(self, roles: tuple[str, ...]) -> str:
        """Returns a chat of CONTENTS that ends with a user's message, and the opening of its answer."""
        text = ""
        if self.default is not None and roles[0] != "system":
            text = self.default.join(self.around["system"])
        return text + "".join(CONTENTS[role].join(self.around[role]) for role in roles)

    @property
    def template(self) -> str:
        """Returns the Go template. White space counts: the actions stand close to the texts."""
        actions = [
            f'{{{{ if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{behind}{{{{ end }}}}'
            for role, (before, behind) in self.around.items()
        ]
        return f"{{{{ range .Messages }}}}{''.join(actions)}{{{{ end }}}}"


def write_modelfile(directory: Path, file: Path, context: int) -> None:
    """Writes the Modelfile of a GGUF file into its folder. directory: of the checkpoint; context: tokens."""
    lines = [f"FROM ./{file.name}", f"PARAMETER num_ctx {context}"]
    tokenizer = load_tokenizer(directory)
    ends = dict.fromkeys((*configured_ends(directory), tokenizer.eos_token_id))
    texts = [tokenizer.convert_ids_to_tokens(index) for index in ends if index is not None]
    lines += [f"PARAMETER stop {quoted}" for text in texts if text and (quoted := _quoted(text))]
    if (turns := turns_of(tokenizer)) is not None:
        template, system = _quoted(turns.template), _quoted(turns.default or "")
        if template and (turns.default is None or system):
            lines += [f"TEMPLATE {template}"] + ([f"SYSTEM {system}"] if turns.default else [])
    (file.parent / MODELFILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def turns_of(tokenizer: Any) -> Turns | None:
    """Returns the chat template of a tokenizer as turns; None where it has none, or is more than these say.

    What llama.cpp puts at the beginning of every text itself is left out.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        texts = {roles: _text(tokenizer, roles) for roles in CHATS}
    except InputError:  # it refuses a system's message
        return None
    # The texts between the messages of the longest chat.
    parts, rest = [], texts[CHATS[-1]]
    for role in CHATS[-1]:
        before, found, rest = rest.partition(CONTENTS[role])
        if not found:
            return None
        parts.append(before)
    begin, to_user, to_answer, to_next_user = parts[:4]
    if "{{" in "".join((*parts, rest)):
        return None
    # What a chat begins with that has no system's message: the opening of the user's, or a system's message before it.
    opening, default = texts["user",].partition(CONTENTS["user"])[0], None
    if not (to_user.endswith(opening) and to_next_user.endswith(opening)):
        if not (opening.startswith(begin) and opening.endswith(to_user) and len(opening) > len(begin + to_user)):
            return None
        default = opening[len(begin) : len(opening) - len(to_user)]
        opening = _common_end(to_user, to_next_user)
    around = {
        "system": (begin, to_user.removesuffix(opening)),
        "user": (opening, to_answer),
        "assistant": ("", to_next_user.removesuffix(opening)),
    }
    turns = Turns(around, default)
    return turns if all(turns.rendered(roles) == text for roles, text in texts.items()) else None


def _text(tokenizer: Any, roles: tuple[str, ...]) -> str:
    """Returns a chat of CONTENTS as the model's own template writes it, without the token that begins every text."""
    messages: list[Message] = [{"role": role, "content": CONTENTS[role]} for role in roles]
    text, first = render(tokenizer, messages, prompted=True), tokenizer.bos_token
    begins_every_text = first and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return text.removeprefix(first) if begins_every_text else text


def _common_end(first: str, second: str) -> str:
    """Returns the longest text that both end with."""
    length = 0
    while length < min(len(first), len(second)) and first[-1 - length] == second[-1 - length]:
        length += 1
    return first[len(first) - length :]


def _quoted(text: str) -> str | None:
    """Returns an argument in the quotes of a Modelfile; None for a text that none can hold."""
    if '"' not in text:
        return f'"{text}"'
    return None if '"""' in text or text.endswith('"') else f'"""{text}"""'
