"""Which function checks which instruction: one registry, filled by the modules beside it.

Invariant: a checker is `(response, **arguments) -> bool`, pure, total over all texts and near-linear in their length.
An id is `family:name` (IFEval, Multi-IF), or that with a locale before it (`fr:family:name`, M-IFEval); a checker that
depends on the locale takes it as `locale`.
"""

from __future__ import annotations

import difflib
import inspect
import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from cotree.base.errors import UsageError

Checker = Callable[..., bool]
LOCALES = ("", "en", "es", "fr", "ja")
CHECKERS: dict[str, Checker] = {}

_RELATIONS: Mapping[str, Callable[[int, int], bool]] = {
    "at least": operator.ge, "less than": operator.lt,
    "al menos": operator.ge, "como máximo": operator.le,
    "au moins": operator.ge, "moins de": operator.lt,
    "以上": operator.ge, "未満": operator.lt,
}  # fmt: skip


def checker(name: str, *locales: str) -> Callable[[Checker], Checker]:
    """Register a function under an instruction's name, for these locales (all by default)."""

    def register(function: Checker) -> Checker:
        takes_locale = "locale" in inspect.signature(function).parameters
        for locale in locales or LOCALES:
            id_ = f"{locale}:{name}" if locale else name
            CHECKERS[id_] = partial(function, locale=locale) if takes_locale else function
        return function

    return register


def holds(count: int, relation: str, threshold: int) -> bool:
    """Whether a count is as an instruction wants it; relations are the data's own words in each language."""
    if relation not in _RELATIONS:
        raise UsageError(f"unknown relation `{relation}`; known: {', '.join(_RELATIONS)}")
    return _RELATIONS[relation](count, threshold)


def check_arguments(instruction: str, arguments: Mapping[str, Any]) -> None:
    """That a checker of this id exists and takes these arguments, before any text is judged; else a UsageError."""
    if instruction not in CHECKERS:
        near = difflib.get_close_matches(instruction, CHECKERS, n=1, cutoff=0.0)
        raise UsageError(f"unknown instruction `{instruction}`; the nearest known is `{near[0]}`")
    try:
        CHECKERS[instruction]("", **arguments)
    except (TypeError, AttributeError) as error:
        raise UsageError(f"instruction `{instruction}` does not take {dict(arguments)}: {error}") from None
