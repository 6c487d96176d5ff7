"""The origin of a model, as its own files tell it: its name on the hub, its licence and its languages.

It reads no weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgeprune.files import at_home, printable

CARD = "README.md"
LICENCE = ("license", "license_name", "license_link")  # the fields of a card on the hub
_HUB = re.compile(r"(?:https://huggingface\.co/)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)/?")


@dataclass(frozen=True)
class Origin:
    """A model before it was changed, as far as it is known; licence: the fields of its card, by their names there."""

    base: str | None = None
    licence: Mapping[str, str] = field(default_factory=dict)
    languages: tuple[str, ...] = ()


def origin_of(spec: str, directory: Path) -> Origin:
    """Returns the origin of what `load_model` takes, as far as its files tell it; directory: of the loaded model."""
    from edgeprune.model.load import demo_file

    path = demo_file() if spec == "demo" else Path(at_home(spec))
    if path.suffix.lower() == ".gguf" and path.is_file():
        return _of_metadata(path)
    told = _of_card(directory / CARD)
    return told if path.exists() else replace(told, base=_hub_id(spec))


def _of_card(card: Path) -> Origin:
    """Returns the origin that a checkpoint's card tells."""
    from huggingface_hub import metadata_load

    try:
        fields = metadata_load(card) if card.is_file() else None
    except Exception:  # YAML of a stranger's: what cannot be read tells nothing
        fields = None
    return _origin(fields or {}, (fields or {}).get("base_model"), (fields or {}).get("language"))


def _of_metadata(path: Path) -> Origin:
    """Returns the origin that a GGUF file's metadata tells: the model itself rather than what it was made of."""
    from edgeprune.model.gguf.file import read_gguf

    fields = read_gguf(path).fields
    places = ("general.source.huggingface.repository", "general.source.repo_url", "general.repo_url")
    base = next((fields[place] for place in places if _hub_id(fields.get(place))), None)
    licence = {name: fields.get(f"general.{name.replace('_', '.')}") for name in LICENCE}
    return _origin(licence, base or fields.get("general.base_model.0.repo_url"), fields.get("general.languages"))


def _origin(fields: Mapping[str, Any], base: Any, languages: Any) -> Origin:
    """Returns the origin of what files hold, without what has not the form that the hub reads."""
    base = base[0] if isinstance(base, list) and base else base
    listed = languages if isinstance(languages, list) else [languages]
    return Origin(
        _hub_id(base),
        {name: printable(value, 200) for name in LICENCE if isinstance(value := fields.get(name), str) and value},
        tuple(one for one in listed if isinstance(one, str) and re.fullmatch(r"[A-Za-z-]{2,12}", one)),
    )


def _hub_id(value: Any) -> str | None:
    match = _HUB.fullmatch(value) if isinstance(value, str) else None
    return match and match[1]
