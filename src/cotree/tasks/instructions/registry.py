"""Which function checks which instruction: one registry, filled by the modules beside it.

Invariant: a checker is `(response, **arguments) -> bool`; it is pure, raises for no text, and takes time nearly linear
in the text's length. An instruction's id is `family:name` (IFEval, Multi-IF), or that with a locale before it
(`fr:family:name`, M-IFEval); a checker that depends on the locale takes it as `locale`.
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

# The data's own words, in each language.
_RELATIONS: Mapping[str, Callable[[int, int], bool]] = {
    "at least": operator.ge,
    "less than": operator.lt,
    "al menos": operator.ge,
    "como máximo": operator.le,
    "au moins": operator.ge,
    "moins de": operator.lt,
    "以上": operator.ge,
    "未満": operator.lt,
}


def checks(name: str, *locales: str) -> Callable[[Checker], Checker]:
    """Register the decorated function as the checker of an instruction, for these locales (all by default)."""

    def register(checker: Checker) -> Checker:
        takes_locale = "locale" in inspect.signature(checker).parameters
        for locale in locales or LOCALES:
            instruction = f"{locale}:{name}" if locale else name
            CHECKERS[instruction] = partial(checker, locale=locale) if takes_locale else checker
        return checker

    return register


def count_fits(count: int, relation: str, threshold: int) -> bool:
    """Whether a count is "at least", "less than", ... a threshold; UsageError for an unknown relation."""
    if relation not in _RELATIONS:
        raise UsageError(f"unknown relation `{relation}`; known: {', '.join(_RELATIONS)}")
    return _RELATIONS[relation](count, threshold)


def check_arguments(instruction: str, arguments: Mapping[str, Any]) -> None:
    """Try an instruction's checker on an empty text; UsageError if there is none or it does not take the arguments."""
    if instruction not in CHECKERS:
        near = difflib.get_close_matches(instruction, CHECKERS, n=1, cutoff=0.0)
        raise UsageError(f"unknown instruction `{instruction}`; the nearest known is `{near[0]}`")
    try:
        CHECKERS[instruction]("", **arguments)
    except (TypeError, AttributeError) as error:
        raise UsageError(f"instruction `{instruction}` does not take {dict(arguments)}: {error}") from None
