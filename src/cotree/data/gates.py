"""Quality gates on chains: what must not become a row, and why.

Invariant: a gate removes whole chains, before any selection, and each one it removes is counted under its name.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

from cotree.data.chains import Chain
from cotree.experiment.recipe import Build
from cotree.tasks.diagnosis import LONG_TEXT, diagnose

# Letters of formulas belong to no language.
_FORMULAS = ("GREEK", "MATHEMATICAL", "SUPERSCRIPT", "SUBSCRIPT", "MODIFIER", "DOUBLE-STRUCK", "SCRIPT")
_MAX_FOREIGN = 0.2


def passes(chain: Chain, prompt: str, settings: Build, special: re.Pattern[str], removed: Counter[str]) -> bool:
    """Whether a judged chain may be selected; the first gate that says no is counted in `removed`.

    special: finds the names of the student's special tokens, which in a text would open turns that nobody took.
    """
    gates = settings.gates
    # A short text with an answer is no loop by any rule; one without an answer is there to be rejected.
    may_loop = gates.loops and len(chain.text) > LONG_TEXT and chain.verdict != "no_answer"
    if chain.prompt_tokens + len(chain.tokens) > settings.max_tokens:
        failed = "too_long"
    elif special.search(chain.text) or special.search(prompt):
        failed = "special_tokens"
    elif may_loop and diagnose(chain.text, answered=True).loop:
        failed = "loop"
    elif gates.language and foreign_share(chain.text, prompt) > _MAX_FOREIGN:
        failed = "language"
    else:
        return True
    removed[failed] += 1
    return False


def foreign_share(text: str, prompt: str) -> float:
    """The share of a text's letters in scripts that its prompt does not use; two languages of one script look alike."""
    if text.isascii() and prompt.isascii():
        return 0.0
    letters, asked = _scripts(text), _scripts(prompt)
    return sum(n for script, n in letters.items() if script not in asked) / max(letters.total(), 1)


def main_script(text: str) -> str:
    """The script of most of a text's first letters: "latin", "cjk", ...; "-" where it has none."""
    found = _scripts(text[:2_000]).most_common(1)
    return found[0][0].lower() if found else "-"


def _scripts(text: Iterable[str]) -> Counter[str]:
    found = Counter(_script(character) for character in text)
    del found[""]
    return found


@lru_cache(maxsize=65_536)
def _script(character: str) -> str:
    """LATIN, CJK, CYRILLIC, ...: the first word of a letter's name in Unicode; "" for what is no letter."""
    name = unicodedata.name(character, "").split(" ")[0] if character.isalpha() else ""
    return "" if name in _FORMULAS else {"HIRAGANA": "CJK", "KATAKANA": "CJK"}.get(name, name)
