"""The groups of a compressed-tensors configuration: which of them a module is of. It knows no group's content."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from edgeprune.errors import InputError
from edgeprune.files import printable
from edgeprune.model.checkpoint.configuration import RESTORE

DETAILS = ("quantization_config", "compression_config")  # the field of config.json; the second in older files
Group = Mapping[str, Any]


def groups_by_module(details: Mapping[str, Any]) -> Callable[[str, str], Group | None]:
    """Returns what gives the group of a module by its name in the checkpoint and its class; None for none.

    As compressed-tensors reads them: a module's own name goes before a pattern, and that before its class; what is
    ignored is not quantised. Raises InputError for a pattern that is none.
    """
    targets = {target: group for group in details["config_groups"].values() for target in group["targets"]}
    patterns = {pattern_of(target): targets[target] for target in sorted(targets) if target.startswith("re:")}
    ignored = set(details["ignore"])
    ignored_patterns = [pattern_of(target) for target in ignored if target.startswith("re:")]

    def group_of(module: str, kind: str) -> Group | None:
        if {module, kind} & ignored or any(pattern.match(module) for pattern in ignored_patterns):
            return None
        if module in targets:
            return targets[module]
        return next((group for pattern, group in patterns.items() if pattern.match(module)), targets.get(kind))

    return group_of


def pattern_of(target: str) -> re.Pattern[str]:
    """Returns the regular expression of a target. Raises InputError where it is none."""
    try:
        return re.compile(target.removeprefix("re:"))
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"{DETAILS[0]}: {printable(target, 60)} is no pattern: {printable(error)}", RESTORE) from None
