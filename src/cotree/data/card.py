"""The datasets' card: README.md as the hub wants it, with its figures as SVG beside it.

Invariant: every number in it was counted while the rows were written, and text of models is escaped: a chain cannot
break out of the page. The same build gives the same bytes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cotree.base.atomic import write_text
from cotree.experiment.recipe import Build

if TYPE_CHECKING:
    from cotree.data.build import Seen

_NAMES = {"sft": "SFT", "dpo": "DPO", "control": "control", "step_pairs": "step pairs", "stepwise": "process rewards"}
_FIGURES = {
    "length_tokens": "Tokens of an SFT completion",
    "chosen_tokens": "Tokens of a chosen completion",
    "rejected_tokens": "Tokens of a rejected completion",
    "value": "Mean of v/n along an SFT chain",
    "pass_rate": "Share of a tree's answers that are correct",
}
_BARS = 20
_LIMITS = """\
- A chain is correct if its task's verifier accepts the final answer; the steps before it are not checked, and a right
  answer can follow wrong steps.
- Lengths are counted with one student's tokenizer and chat template; for another student build again.
- The language gate tells scripts apart, not languages of one script.
- Values (v/n) of thoughts come from few rollouts; use the visit counts before relying on them."""


def write_card(
    folder: Path, seen: Mapping[str, Seen], counts: Mapping[str, Any], settings: Build, about: Mapping[str, Any]
) -> None:
    """Write `folder/README.md` and `folder/figures/*.svg`.

    about: `name`, `recipe` (YAML), `models` ({name: where it comes from and its licence}); each may be missing.
    """
    figures = []
    for kind, found in seen.items():
        for column, title in _FIGURES.items():
            if column in found.numbers and kind in ("sft", "dpo"):
                write_text(folder / "figures" / f"{kind}_{column}.svg", histogram(found.numbers[column], title))
                figures.append(f"![{title}](figures/{kind}_{column}.svg)")
    name = str(about.get("name", "cotree"))
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(name, seen, settings), sort_keys=False)}---",
        f"# {name}",
        "Chains of thought from trees that cotree grew by Monte Carlo tree search ([paper](https://arxiv.org/abs/2503.01461)).",
        _table(("dataset", "rows", "tasks"), [(_NAMES[kind], f.rows, _listed(f.tasks)) for kind, f in seen.items()]),
        _lengths(counts),
        "## What was left out\n\n" + _table(("gate", "removed"), list(counts["removed"].items()) or [("none", 0)]),
        "## Models\n\n" + _table(("model", "source and licence"), sorted(about.get("models", {}).items())),
        "## Distributions\n\n" + "\n\n".join(figures),
        "## Sample chains\n\n" + "\n\n".join(_samples(seen)),
        f"## Known limits\n\n{_LIMITS}",
        f"## Recipe\n\n{_block(about.get('recipe') or yaml.safe_dump({'build': settings.model_dump(mode='json')}))}",
    ]
    write_text(folder / "README.md", "\n\n".join(parts) + "\n")


def _front_matter(name: str, seen: Mapping[str, Seen], settings: Build) -> dict[str, Any]:
    most = max((found.rows for found in seen.values()), default=0)
    sizes = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M")]
    return {
        "pretty_name": name,
        "license": settings.license or "other",
        "task_categories": ["text-generation"],
        "size_categories": [next((label for limit, label in sizes if most < limit), "1M<n<10M")],
        "tags": ["chain-of-thought", "mcts", "cotree", *(kind for kind in seen if kind in ("sft", "dpo"))],
        "configs": [{"config_name": kind, "data_files": f"{kind}/train.parquet"} for kind in seen],
    }


def _lengths(counts: Mapping[str, Any]) -> str:
    gap = counts["mean_chosen_tokens"] - counts["mean_rejected_tokens"]
    sft = [f"SFT {counts['mean_sft_tokens']:.1f}"] if counts["sft_rows"] else []
    dpo = [
        f"chosen {counts['mean_chosen_tokens']:.1f}, rejected {counts['mean_rejected_tokens']:.1f} "
        f"(chosen minus rejected {gap:+.1f}), shared prefix of a pair {counts['mean_prefix_tokens']:.1f}"
    ] if counts["dpo_pairs"] else []  # fmt: skip
    return f"Mean tokens of the student: {', '.join(sft + dpo) or 'not counted'}."


def _samples(seen: Mapping[str, Seen]) -> list[str]:
    found = [
        (row["task"], f"{_NAMES[kind]}, {column}", [row["prompt"][-1], *row[column]])
        for kind, column in (("sft", "completion"), ("dpo", "chosen"), ("dpo", "rejected"))
        if kind in seen
        for row in seen[kind].first.values()
    ]
    return [f"{escape(task)}, {what}:\n\n{_block(_words(messages))}" for task, what, messages in found[:3]]


def _words(messages: Sequence[Mapping[str, str]]) -> str:
    return "".join(f"{message['role']}: {message['content']}\n" for message in messages)


def _block(text: str) -> str:
    """Preformatted text that neither Markdown nor HTML reads."""
    return f"<pre>{escape(text.rstrip(), quote=False).replace(chr(10), '&#10;')}</pre>"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: Any) -> str:
    """In one line, and without a link: a licence is whatever a model's file says."""
    return re.sub(r"([|\[\]`\\])", r"\\\1", escape(" ".join(str(value).split())))


def _listed(tasks: Counter[str]) -> str:
    return ", ".join(f"{name} {n}" for name, n in sorted(tasks.items()))


def histogram(values: Mapping[float, int], title: str) -> str:
    """Counted values as an SVG of at most 20 bars, a title and the ends of both axes."""
    low, high = min(values), max(values)
    width = (high - low) / _BARS or 1.0
    bars: Counter[int] = Counter()
    for value, n in values.items():
        bars[min(int((value - low) / width), _BARS - 1)] += n
    most = max(bars.values())
    drawn = "".join(
        f'<rect x="{40 + at * 20}" y="{150 - 110 * n / most:.1f}" width="18" height="{110 * n / most:.1f}"/>'
        for at, n in sorted(bars.items())
    )
    words = "".join(
        f'<text x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'
        for x, y, anchor, text in (
            (240, 22, "middle", title), (40, 168, "start", f"{low:g}"), (440, 168, "end", f"{high:g}"),
            (34, 46, "end", str(most)), (34, 152, "end", "0"),
        )
    )  # fmt: skip
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 480 180" width="480" height="180" role="img" '
        f'font-family="sans-serif" font-size="12"><title>{escape(title)}</title>'
        f'<rect width="480" height="180" fill="#fff"/><g fill="#4063d8">{drawn}</g>{words}</svg>\n'
    )
