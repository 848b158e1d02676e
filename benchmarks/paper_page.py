"""Render docs/results.md and its figures from the tables' files in docs/results/ (`benchmarks.paper` writes them).

Every number of the page comes from these files through `benchmarks/paper_page.md.jinja`, where its words stand. An
arm's numbers are means over its seeds. A difference is claimed only where it is at least what so many questions can
show.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks import paper_figures

from cotree.base.atomic import write_text
from cotree.base.numbers import ABSENT, duration, interval, number, percent, signed
from cotree.base.statistics import minimum_detectable_difference, wilson_interval

TEMPLATE = Path(__file__).with_name("paper_page.md.jinja")
TITLES = {
    "small": "Small tier: SmolLM2-135M on generated arithmetic and letters",
    "small_models": "Small tier: SmolLM2-135M and Gemma-3-270M",
    "real": "Real tier: Qwen2.5-Coder-0.5B on GSM8K",
    "real_models": "Real tier: Qwen2.5-Coder-0.5B and SmolLM2-135M",
}
_HEAD = (
    *("student", "task", "accuracy %", "no answer %", "loop %", "over-reflection %", "instruction failure %", "tokens"),
    "n",
)
_SHARES = ("no_answer", "loop", "over_reflection", "instruction_failure")


@dataclass(frozen=True)
class Arm:
    """An arm's rows on one task, a row a seed."""

    rows: Sequence[dict[str, Any]]

    def __getattr__(self, name: str) -> Any:
        return self.rows[0][name]

    def mean(self, key: str) -> float | None:
        """The mean over seeds; None where no seed has the number."""
        found = [row[key] for row in self.rows if row.get(key) is not None]
        return fmean(found) if found else None

    @property
    def accuracy_words(self) -> str:
        """Of one seed with its 95% interval, of several the mean with the standard deviation over seeds."""
        if len(self.rows) > 1:
            return f"{percent(self.mean('accuracy'))} ± {percent(stdev(row['accuracy'] for row in self.rows))}"
        return f"{percent(self.accuracy)} ({interval(self.low, self.high)})"


class Results:
    """One table's file, and what the page says of it."""

    def __init__(self, path: Path) -> None:
        self.name, self.there = path.stem, path.is_file()
        content = json.loads(path.read_text(encoding="utf-8")) if self.there else {}
        self.rows, self.students = content.get("rows", []), content.get("students", [])
        self.datasets, self.trees = content.get("datasets", []), content.get("trees", [])

    @property
    def tiers(self) -> list[str]:
        """The tiers that were measured."""
        return list(dict.fromkeys(row["tier"] for row in self.rows))

    def arms(self, tier: str) -> list[Arm]:
        """The arms of a tier, task after task."""
        found = [row for row in self.rows if row["tier"] == tier]
        names = list(dict.fromkeys((row["evaluation"], row["model"]) for row in found))
        tasks = list(dict.fromkeys(row["task"] for row in found))
        found.sort(key=lambda row: (tasks.index(row["task"]), names.index((row["evaluation"], row["model"]))))
        grouped = groupby(found, key=lambda row: (row["task"], row["evaluation"], row["model"]))
        return [Arm(list(rows)) for _, rows in grouped]

    def arm(self, tier: str, model: str, task: str) -> Arm | None:
        """An arm on a task; None where it was not measured."""
        return next((arm for arm in self.arms(tier) if (arm.model, arm.task) == (model, task)), None)

    def tasks(self, tier: str) -> list[str]:
        """The tasks of a tier."""
        return list(dict.fromkeys(arm.task for arm in self.arms(tier)))

    def table(self, tier: str) -> str:
        """The arms of a tier as a table, with Test@k where samples were drawn."""
        arms = self.arms(tier)
        test_at = list(dict.fromkeys(k for arm in arms for k in arm.rows[0].get("test_at") or ()))
        lines = [[*_HEAD, *(f"Test@{k} %" for k in test_at)]]
        for arm in arms:
            seeds = f"{len(arm.rows)} × " if len(arm.rows) > 1 else ""
            name = arm.model if arm.evaluation == self.name else f"{arm.model} ({arm.evaluation})"
            cells = [f"`{name}`", arm.task, arm.accuracy_words, *(percent(arm.mean(key)) for key in _SHARES)]
            cells += [number(arm.mean("mean_tokens")), f"{seeds}{number(arm.n)}"]
            shares = [(arm.rows[0].get("test_at") or {}).get(k) for k in test_at]
            lines.append([*cells, *(ABSENT if each is None else percent(each[0]) for each in shares)])
        return _markdown(lines)

    def trained(self, tier: str) -> str:
        """What each student of a tier was trained on: rows, steps, trained tokens, and the seconds that it took."""
        head = ("student", "from", "rows of", "rows", "steps", "trained tokens", "seconds")
        found = [row for row in self.students if row["tier"] == tier]
        lines = [list(head)]
        for row in {row["model"]: row for row in reversed(found)}.values():
            numbers = [number(row[key]) for key in ("rows", "steps", "tokens")]
            parent, took = row["parent"].partition("@seed")[0], number(float(row["seconds"]))
            lines.append([f"`{row['model']}`", f"`{parent}`", f"`{row['data']}`", *numbers, took])
        return _markdown([lines[0], *reversed(lines[1:])])

    def reflections(self, tier: str) -> str:
        """How often a reflection of each trees node repairs: a correct answer follows it; with Wilson's interval."""
        lines = [["trees", "reflections", "repaired", "% (95%)"]]
        for row in self.trees:
            done = row["counts"].get("reflections", 0)
            if row["tier"] == tier and done:
                ends = wilson_interval(row["counts"]["repaired"], done)
                share = f"{percent(row['counts']['repaired'] / done)} ({interval(*ends)})"
                lines.append([f"`{row['name']}`", number(done), number(row["counts"]["repaired"]), share])
        return _markdown(lines)

    def figure(self, tier: str) -> str:
        """A tier's figure as Markdown."""
        name = paper_figures.figure_of(self.name, tier, self.students)
        shows = (
            "Output length and no answer along DPO training" if name.endswith("-training") else "Accuracy and no answer"
        )
        return f"![{shows}](results/{name}.svg)"

    def least(self, tier: str) -> str:
        """The least difference that each task of a tier can show: "arithmetic 18.7 points (n = 112)"."""
        words = []
        for task in self.tasks(tier):
            arms = [arm for arm in self.arms(tier) if arm.task == task]
            n, shares = min(arm.n for arm in arms), [arm.mean("accuracy") or 0.0 for arm in arms]
            nearest = min(shares, key=lambda share: abs(share - 0.5))
            least = minimum_detectable_difference(n, nearest)
            words.append(f"{task} {'none' if least is None else f'{percent(least)} points'} (n = {n})")
        return ", ".join(words)

    def beside(self, tier: str, model: str, other: str, key: str = "accuracy") -> str:
        """A share of another arm and of this one, task by task, and where so many questions cannot show the difference:
        "arithmetic 50.0 → 20.0%, letters 25.0 → 20.0% (not shown)"."""
        words = []
        for task in self.tasks(tier):
            arms = self.arm(tier, model, task), self.arm(tier, other, task)
            found = [arm.mean(key) for arm in arms if arm is not None]
            shares = [share for share in found if share is not None]
            if len(shares) < 2 or arms[0] is None:
                continue
            least = minimum_detectable_difference(arms[0].n, min(shares, key=lambda share: abs(share - 0.5)))
            shown = least is not None and abs(shares[0] - shares[1]) >= least
            words.append(f"{task} {percent(shares[1])} → {percent(shares[0])}%{'' if shown else ' (not shown)'}")
        return ", ".join(words) or "not measured yet"

    def redrawn(self, earlier: Results, tier: str) -> str:
        """Accuracies of one seed's students beside those of an earlier run of the same recipe, which grew other trees;
        "" without any. The last column is the difference in points."""
        lines = [["student", "task", "earlier trees %", "these trees %", "difference"]]
        for before in earlier.arms(tier):
            now = self.arm(tier, before.model, before.task)
            same = [row for row in now.rows if row["seed"] == before.seed] if now is not None else []
            if before.seed is not None and same:
                difference = 100 * (same[0]["accuracy"] - before.accuracy)
                shares = percent(before.accuracy), percent(same[0]["accuracy"])
                lines.append([f"`{before.model}`", before.task, *shares, signed(difference)])
        return _markdown(lines) if len(lines) > 1 else ""

    def made(self) -> str:
        """When, on what machines, at which commits and in how long the numbers were made."""
        parts = [*self.rows, *self.students, *self.datasets, *self.trees]
        machines = {json.dumps(each["machine"]): each["machine"] for each in parts if each.get("machine")}
        words = [f"{each['cores']} core{'s' * (each['cores'] > 1)} of an {each['cpu']}" for each in machines.values()]
        cells = {(row["evaluation"], row["fingerprint"]): row["seconds"] for row in self.rows if "fingerprint" in row}
        others = {row["fingerprint"]: row["seconds"] for row in parts if row not in self.rows}
        seconds = sum(cells.values()) + sum(others.values())
        commits = sorted({str(each["git"]) for each in parts if each.get("git")})
        dates = sorted({each["date"] for each in parts if each.get("date")})
        seeds = sorted({row["seed"] for row in self.rows if row["seed"] is not None}) or [0]
        when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        return (
            f"{when}, {' and '.join(dict.fromkeys(words))}, seeds {', '.join(map(str, seeds))}, commit "
            f"{', '.join(commits)}; {duration(seconds)} with all that it rests on"
        )


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as a table; the first is its head."""
    head, *rows = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([head, "|" + "---|" * len(lines[0]), *rows])


def render_page(out: Path) -> str:
    """The page as text."""
    import jinja2

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters.update({"percent": percent, "number": number})
    masking, template = out / "masking.json", TEMPLATE.read_text(encoding="utf-8")
    tables = re.findall(r'call section\("(\w+)"', template)
    values = {
        "results": lambda table: Results(out / f"{table}.json"),
        "earlier": lambda table: Results(out / "earlier" / f"{table}.json"),
        "missing": [table for table in tables if not (out / f"{table}.json").is_file()],
        "titles": TITLES,
        "masking": json.loads(masking.read_text(encoding="utf-8")) if masking.is_file() else None,
    }
    text: str = environment.from_string(template).render(values)
    return text.rstrip("\n") + "\n"


def write_page(out: Path) -> Path:
    """Write the page beside the folder of the tables' files (docs/results.md for docs/results/) and its figures into
    that folder, in place of all figures there; returns the page's path."""
    figures = {name: svg for path in sorted(out.glob("*.json")) for name, svg in paper_figures.figures(path).items()}
    for name, svg in figures.items():
        write_text(out / name, svg)
    for stale in [path for path in out.glob("*.svg") if path.name not in figures]:
        stale.unlink()
    page = out.with_suffix(".md")
    write_text(page, render_page(out))
    return page
