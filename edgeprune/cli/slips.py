"""Lines that the parser refuses, answered with the command that was meant. It knows commands and options by name."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeprune.errors import InputError

MEANS_FIT = ("prune", "quantize", "quantise", "compress", "optimize", "optimise", "shrink", "convert")
ENDINGS = (".gguf", ".safetensors", ".pt", ".pth", ".bin", ".json")  # of what can be a model


def meant(error: Any, words: Sequence[str]) -> InputError | None:
    """Returns the error that names the command which a line was meant for; None where the parser's own says it all.

    error: the parser's; words: of the command line, without the program's name.
    """
    context, option = getattr(error, "ctx", None), getattr(error, "option_name", None)
    if context is None or not words:
        return None
    if option is not None and context.parent is None:
        return _options_first(context, option, words)
    if option == "--latency" and context.command.name == "fit":
        line = [word.replace(option, "--decode", 1) if word.startswith(option) else word for word in words]
        return InputError(
            "--latency of what: --decode is the time per token, --prefill the time to the first token",
            f"Give one of them or both: edgeprune {shlex.join(line)}",
        )
    if context.parent is None and error.message.startswith("No such command"):
        return _not_a_command(words)
    return None


def _options_first(context: Any, option: str, words: Sequence[str]) -> InputError | None:
    """Returns the error for options that stand before the command they are of; None where no command has them."""
    commands = context.command.commands
    if not any(option in parameter.opts for command in commands.values() for parameter in command.params):
        return None
    place = next((place for place, word in enumerate(words) if word in commands), None)
    before, command, after = (words, "fit", []) if place is None else (words[:place], words[place], words[place + 1 :])
    own = _own_words(before)
    line = [*before[:own], command, *after, *before[own:]]
    return InputError(
        f"{option} stands before the command", f"Options go after `{command}`: edgeprune {shlex.join(line)}"
    )


def _not_a_command(words: Sequence[str]) -> InputError | None:
    """Returns the error for a model, or for another word for fitting one, in the place of the command."""
    place = _own_words(words)
    own, word, rest = words[:place], words[place], words[place + 1 :]
    if word.lower() in MEANS_FIT:
        line = [*own, "fit", *rest]
    elif word == "demo" or "/" in word or word.lower().endswith(ENDINGS) or Path(word).exists():
        line = [*own, "fit", word, *rest]
    else:
        return None
    # A fit needs a device.
    is_complete = any(word.partition("=")[0] in ("--device", "--profile", "--config", "--from") for word in rest)
    missing = "" if is_complete else " --device NAME    (`edgeprune devices` lists the names)"
    return InputError(f"there is no command {word!r}", f"To fit a model: edgeprune {shlex.join(line)}{missing}")


def _own_words(words: Sequence[str]) -> int:
    """Returns how many words at the beginning are options of edgeprune itself, with their values."""
    place = 0
    while place < len(words) and words[place].partition("=")[0] in ("-v", "--verbose", "--log-file"):
        place += 2 if words[place] == "--log-file" else 1
    return min(place, len(words))
