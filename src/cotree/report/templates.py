"""Render this package's jinja templates: layouts, and sentences with numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from cotree.base import numbers
from cotree.base.statistics import wilson_interval

if TYPE_CHECKING:
    from jinja2 import Environment

# What cannot be seen, or turns the direction of the text around it; as in the viewer's page.
_HIDDEN = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u200b\\u200e\\u200f\\u2028-\\u202e\\u2060-\\u2069\\ufeff\\ud800-\\udfff]"
)


@cache
def _environment() -> Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cotree.report", "."),
        autoescape=jinja2.select_autoescape(("html.jinja", "svg.jinja")),
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    formats = (numbers.percent, numbers.number, numbers.signed, numbers.duration, share, listed, setting)
    environment.filters.update({function.__name__: function for function in formats})
    known = (numbers.counted, numbers.interval, numbers.paper_form, wilson_interval, sentence, lines)
    environment.globals.update({function.__name__: function for function in known})
    return environment


def rendered(template: str, **values: Any) -> str:
    """Render a template; HTML and SVG templates escape their values."""
    return _environment().get_template(template).render(values)


def sentence(macro: str, *values: Any) -> str:
    """Render a macro of `sentences.txt.jinja`."""
    return str(getattr(_environment().get_template("sentences.txt.jinja").module, macro)(*values))


def lines(macro: str, *values: Any) -> list[str]:
    """Render a macro of `sentences.txt.jinja` to its non-empty lines."""
    return [line.rstrip() for line in sentence(macro, *values).split("\n") if line.strip()]


def _visible(value: Any) -> Any:
    """A text with its hidden characters as ⟨U+202E⟩; drawings of our own and values of other types as they are."""
    if type(value) is not str:
        return value
    return _HIDDEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", value)


def share(values: tuple[float, float, float]) -> str:
    """Format a share with its 95% interval, in percent: "25.0% (4.6–69.9)"."""
    value, low, high = values
    return f"{numbers.percent(value)}% ({numbers.interval(low, high)})"


def listed(names: Sequence[str]) -> str:
    """Join names for a sentence: "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def setting(value: Any) -> str:
    """Format a setting as in a recipe."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
