"""A dataset's card: README.md as the hub wants it, with its figures as SVG beside it; `*.jinja` have their layout.

Invariant: every number in it was counted while the rows were written, and text of models is escaped: a chain cannot
break out of the page. The same dataset gives the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import islice, product
from pathlib import Path
from typing import Any

import yaml

from cotree.base.atomic import write_text
from cotree.data.counts import REASONS, ColumnStatistics
from cotree.data.gates import Rules

_FIGURES = {
    "length_tokens": "Tokens of a completion",
    "chosen_tokens": "Tokens of a chosen completion",
    "rejected_tokens": "Tokens of a rejected completion",
    "value": "Mean of v/n along a chain",
    "pass_rate": "Share of a tree's answers that are correct",
}
_BARS = 20
_SAMPLES = 3
# The hub's names for numbers of rows, by the number that is too large for each.
_SIZES = {10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M", float("inf"): "1M<n<10M"}


def write_card(
    folder: Path, name: str, rules: Rules, *, statistics: ColumnStatistics, about: Mapping[str, Any]
) -> None:
    """Write `folder/README.md` and `folder/figures/*.svg`.

    about: `name` of the run, `recipe` (YAML), `models` ({name: where it comes from and its licence}); each may be
    missing.
    """
    counts, settings = rules.counts, rules.settings
    figures = {column: title for column, title in _FIGURES.items() if column in statistics.values}
    for column, title in figures.items():
        write_text(folder / "figures" / f"{column}.svg", histogram(statistics.values[column], title))
    columns = {"sft": ("completion",), "stepwise": ("completions",)}.get(counts.kind, ("chosen", "rejected"))
    samples = list(islice(product(statistics.first.values(), columns), _SAMPLES))
    size = next(size for limit, size in _SIZES.items() if counts.rows < limit)
    own_recipe = {name: settings.model_dump(mode="json", exclude_defaults=True, exclude={"file"})}
    values = {"name": name, "about": about, "counts": counts, "reasons": REASONS, "figures": figures}
    values |= {"samples": samples, "size": size, "license": settings.license, "own_recipe": yaml.safe_dump(own_recipe)}
    write_text(folder / "README.md", _rendered("card.md.jinja", **values))


def histogram(values: Mapping[float, int], title: str) -> str:
    """Counted values as an SVG of at most 20 bars, a title and the ends of both axes."""
    import numpy as np

    bars, _ = np.histogram([*values], bins=_BARS, weights=[*values.values()])
    return _rendered("figure.svg.jinja", bars=bars.tolist(), low=min(values), high=max(values), title=title)


def _rendered(template: str, **values: Any) -> str:
    """A template with its values filled in; all text is escaped."""
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup, escape

    def cell(value: object) -> Markup:
        """In one line, and without a link: a licence is whatever a model's file says."""
        return Markup(re.sub(r"([|\[\]`\\])", r"\\\1", escape(" ".join(str(value).split()))))  # noqa: S704

    def block(text: str) -> Markup:
        """Preformatted text that neither Markdown nor HTML reads."""
        return Markup(f"<pre>{escape(text.rstrip())}</pre>".replace("\n", "&#10;"))  # noqa: S704

    environment = Environment(
        loader=PackageLoader("cotree.data", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"cell": cell, "block": block}
    return environment.get_template(template).render(values) + "\n"
