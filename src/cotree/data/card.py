"""Dataset cards: a README.md for the hub with SVG figures, from the `*.jinja` templates.

Invariant: all numbers are computed from the rows in the file, and model output is escaped, so a chain cannot break out
of the page. The same dataset gives the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cotree.base.atomic import write_text
from cotree.base.progress import one_line, terminal_safe
from cotree.base.rows import Row, read_rows
from cotree.data.gates import REASONS, Rules, annotated_chains, shortened
from cotree.data.kinds import read_columns

if TYPE_CHECKING:
    from markupsafe import Markup

_FIGURES = {
    "length_tokens": "Tokens of a completion",
    "chosen_tokens": "Tokens of a chosen completion",
    "rejected_tokens": "Tokens of a rejected completion",
    "value": "Mean of v/n along a chain",
    "pass_rate": "Share of a tree's answers that are correct",
}
_BARS = 20
_SAMPLES = 3


def write_card(folder: Path, name: str, rules: Rules, about: Mapping[str, Any]) -> None:
    """Write `README.md` and `figures/*.svg` beside a folder's `train.parquet`; an existing card that differs is renamed
    to `README.before.md`.

    about: optional `name` of the run, `recipe` (YAML), `models` ({name: source and licence}).
    """
    settings, rows = rules.settings, folder / "train.parquet"
    columns = {name: [value for value in values if value is not None] for name, values in read_columns(rows).items()}
    figures = {column: title for column, title in _FIGURES.items() if columns.get(column)}
    for column, title in figures.items():
        write_text(folder / "figures" / f"{column}.svg", histogram(columns[column], title))
    first_of_task: dict[str, Row] = {}
    for row in read_rows(rows):
        first_of_task.setdefault(row["task"], row)
        if len(first_of_task) == len(rules.counts.tasks):
            break
    sides = {"sft": ("completion",), "stepwise": ("completions",)}.get(settings.rows, ("chosen", "rejected"))
    own_recipe = {name: settings.model_dump(mode="json", exclude_defaults=True, exclude={"file"})}
    shown: dict[str, Any] = {"name": name, "about": about, "rules": rules, "reasons": REASONS, "figures": figures}
    shown |= {"shortened": shortened, "annotated_chains": annotated_chains}
    shown["samples"] = list(islice(product(first_of_task.values(), sides), _SAMPLES))
    card, text = folder / "README.md", _rendered("card.md.jinja", own_recipe=yaml.safe_dump(own_recipe), **shown)
    if card.is_file() and card.read_bytes() not in (b"", text.encode()):
        card.replace(folder / "README.before.md")  # the user may have edited it
    write_text(card, text)


def histogram(values: Sequence[float], title: str) -> str:
    """An SVG histogram of values, rounded to hundredths: at most 20 bars, a title, and the ends of both axes."""
    import numpy as np

    hundredths = [round(value, 2) for value in values]
    bars, _ = np.histogram(hundredths, bins=_BARS)
    return _rendered("figure.svg.jinja", bars=bars.tolist(), low=min(hundredths), high=max(hundredths), title=title)


def cell(value: object) -> Markup:
    """Escape text for a one-line Markdown or HTML cell, links included, because it may come from untrusted files."""
    from markupsafe import Markup, escape

    signs = re.sub(r"([|\[\]`\\*~$])", r"\\\1", escape(one_line(str(value))))
    # Addresses that stand alone become links, too.
    return Markup(re.sub(r"(?i):(?=//)|@|(?<=www)\.", lambda found: f"&#{ord(found[0])};", signs))  # noqa: S704


def block(text: str) -> Markup:
    """Escape text for a preformatted Markdown or HTML block."""
    from markupsafe import Markup, escape

    return Markup(f"<pre>{terminal_safe(escape(text.rstrip()))}</pre>".replace("\n", "&#10;"))  # noqa: S704


def _rendered(template: str, **values: Any) -> str:
    """Render a template with HTML escaping."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("cotree.data", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"cell": cell, "block": block}
    return environment.get_template(template).render(values) + "\n"
