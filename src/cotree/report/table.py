"""The table of evaluations, of one run or of several runs and evaluations together.

A row is a model or a student (over its seeds) on one task. One seed shows a 95% interval, several seeds mean and
standard deviation. Notes below give sampling settings and caveats.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from cotree.base.errors import UsageError
from cotree.base.numbers import interval, number, paper_form, percent
from cotree.base.run_folder import NodeFolder, NodeRecord, check_against_record, find_run, read_json
from cotree.base.settings import nearest
from cotree.base.statistics import minimum_detectable_difference
from cotree.report.grid import Grid, Row, write_grids
from cotree.report.summary import Baseline, EvalRow, InstructionRow, Summary, split_seed, summarize_model, summarize_run
from cotree.report.templates import lines, listed, sentence

if TYPE_CHECKING:
    from rich.console import RenderableType

# (run name, summary)
NamedSummary = tuple[str, Summary]
_NUMBERS = ("accuracy", "no_answer", "loop", "cut_off", "finished_without_answer", "accuracy_answered", "lenient")
_HEAD = ("model", "accuracy\n%", "95%\ninterval", "no\nanswer\n%", "cut\noff\n%", "if\nanswered\n%", "tokens", "n")
_COSTS = ("mean_tokens", "seconds_p50", "seconds_p95")
_SECONDS = ("seconds\np50", "seconds\np95")  # only if some row uses a decoding strategy
_SHARES = ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose", "average")
_INSTRUCTIONS_HEAD = ("model", "prompts\nstrict", "prompts\nloose", "single\nstrict", "single\nloose", "mean\nof these")
# {task: column of the paper's tables}; other tasks keep their name.
PAPER_COLUMNS = {"gsm8k": "GSM8K", "math500": "MATH", "aime24": "AIME", "aime25": "AIME", "blocksworld": "Plan."}
_PAPER_ORDER = (*dict.fromkeys(PAPER_COLUMNS.values()), "IF(Zh)", "IF(En)", "IF(Other)")
_PAPER_TITLE = "In the paper's form: accuracy in %, in parentheses the ratio of outputs without an answer"


@dataclass(frozen=True)
class TableRow:
    """The scores of one model or student (over seeds) on one task of one evaluation.

    label: its name in the table. run: its run or evaluation folder. rows: an `EvalRow` or `InstructionRow` per seed.
    relatives: its parent, and the student that it is like.
    """

    label: str
    run: str
    rows: tuple[Any, ...]
    relatives: frozenset[str] = frozenset()

    @property
    def first(self) -> Any:
        """The first seed's row, for values that all seeds share."""
        return self.rows[0]

    def mean(self, key: str) -> float | None:
        """The mean of a number over seeds; None if no seed has it."""
        found = [value for row in self.rows if (value := getattr(row, key)) is not None]
        return fmean(found) if found else None

    @property
    def accuracy(self) -> float:
        """The mean accuracy over seeds."""
        return fmean(row.accuracy for row in self.rows)

    @property
    def deviation(self) -> float | None:
        """The standard deviation of the accuracy over seeds; None for one seed."""
        return stdev(row.accuracy for row in self.rows) if len(self.rows) > 1 else None

    @property
    def low(self) -> float:
        """The low end of the 95% interval; the lowest over seeds, so that a claim holds for each."""
        return min(map(float, (row.low for row in self.rows)))

    @property
    def high(self) -> float:
        """The high end of the 95% interval; the highest over seeds."""
        return max(map(float, (row.high for row in self.rows)))

    @property
    def constants(self) -> list[str]:
        """Notes about seeds that give almost the same answer to everything."""
        return [f"{self.label} {words}" for row in self.rows if (words := sentence("constant", row))]

    def cells(self, *, seconds: bool = False) -> Row:
        """The row's cells in the accuracy table; `seconds`: with latency columns."""
        spread = interval(self.low, self.high) if self.deviation is None else f"±{percent(self.deviation)}"
        ratios = (percent(self.mean(key)) for key in ("no_answer", "truncated", "accuracy_answered"))
        seeds = f"{len(self.rows)} × " if len(self.rows) > 1 else ""
        tokens = number(float(self.mean("mean_tokens") or 0.0))
        took = [self.mean(key) for key in _COSTS[1:]] if seconds else []
        times = ("–" if each is None else f"{each:.1f}" for each in took)
        return (self.label, percent(self.accuracy), spread, *ratios, tokens, *times, f"{seeds}{number(self.first.n)}")

    def to_json(self) -> dict[str, Any]:
        """The row's numbers as plain data: all of one seed, or means over several."""
        same = self.first.model_dump(include={"evaluation", "student", "task", "n", "samples", "max_tokens"})
        low, high = (self.low, self.high) if self.deviation is None else (None, None)
        named = {"model": self.label, "run": self.run, **same}
        named |= {"seeds": [row.seed for row in self.rows if row.seed is not None], "deviation": self.deviation}
        return named | {key: self.mean(key) for key in (*_NUMBERS, *_COSTS)} | {"low": low, "high": high}


@dataclass(frozen=True)
class Table:
    """A table of evaluations. rows: one per model and task, grouped by task, in the experiment's order.

    instruction_rows: instruction-following scores. notes: sampling settings and caveats.
    """

    rows: tuple[TableRow, ...]
    instruction_rows: tuple[TableRow, ...]
    baselines: tuple[Baseline, ...]
    notes: tuple[str, ...]

    def tasks(self) -> dict[str, list[TableRow]]:
        """{task: rows}, in order."""
        return {task: list(rows) for task, rows in groupby(self.rows, key=lambda row: str(row.first.task))}

    def limits(self) -> list[str]:
        """Notes on each task's minimum detectable difference, for tasks with several rows."""
        return [f"{task}: {detectable_difference(rows)}" for task, rows in self.tasks().items() if len(rows) > 1]

    def claims(self) -> dict[str, list[str]]:
        """{task: sentences on which differences are significant}."""
        return {
            task: lines("claims", rows, pairs_to_compare(rows), self.baselines, detectable_difference(rows))
            for task, rows in self.tasks().items()
        }

    def accuracies(self) -> Grid:
        """The accuracy table: models grouped by task, with the best constant answer as last row."""
        seconds = any(row.first.decoding for row in self.rows)
        sections = {task: [row.cells(seconds=seconds) for row in rows] for task, rows in self.tasks().items()}
        for best in self.baselines:
            if best.task in sections:
                sections[best.task].append((f"always “{best.answer}”", percent(best.accuracy)))
        return Grid((*_HEAD[:-1], *_SECONDS, _HEAD[-1]) if seconds else _HEAD, sections, named="task")

    def instructions(self) -> Grid:
        """The table of instructions followed, strict and loose, by the paper's groups."""
        sections: dict[str, list[Row]] = {}
        for row in self.instruction_rows:
            shares = (percent(row.mean(key)) for key in _SHARES)
            sections.setdefault(row.first.section, []).append((row.label, *shares))
        return Grid(_INSTRUCTIONS_HEAD, sections, title="Instructions followed, %", named="group")

    def paper(self) -> Grid:
        """The table in the paper's format: accuracy in percent with the no-answer ratio in parentheses.

        Tasks of one column are pooled, weighted by questions. Instruction groups show the mean of the four shares, over
        all turns.
        """
        followed = {row.first.task for row in self.instruction_rows}
        groups = Counter(group for _, group in {(row.first.task, row.first.group) for row in self.instruction_rows})
        pooled: dict[tuple[str, str], list[tuple[int, float, float]]] = {}
        for row in self.rows:
            if row.first.task.partition(", turn ")[0] not in followed:
                cell = (row.first.n, row.accuracy, row.mean("no_answer") or 0.0)
                pooled.setdefault((row.label, PAPER_COLUMNS.get(row.first.task, row.first.task)), []).append(cell)
        for score in self.instruction_rows:  # of a group with several turns their mean comes last
            group = score.first.group
            column = group if groups[group] == 1 else f"{score.first.task} {group}"
            pooled[score.label, column] = [(1, score.mean("average") or 0.0, score.mean("no_answer") or 0.0)]
        cells = {}
        for key, shares in pooled.items():
            questions, accuracies, no_answers = zip(*shares, strict=True)
            cells[key] = paper_form(fmean(accuracies, questions), fmean(no_answers, questions))
        columns = list(dict.fromkeys(column for _, column in cells))
        columns.sort(key=lambda column: (*_PAPER_ORDER, column.split()[-1]).index(column.split()[-1]))
        labels = dict.fromkeys(label for label, _ in cells)
        rows = [(label, *(cells.get((label, column), "–") for column in columns)) for label in labels]
        return Grid(("model", *columns), {"": rows}, title=_PAPER_TITLE)

    def grids(self) -> list[Grid]:
        """All tables, except the one in the paper's format."""
        return [self.accuracies(), self.instructions()] if self.instruction_rows else [self.accuracies()]

    def render(self, form: str = "terminal") -> RenderableType:
        """Render tables and notes as `markdown`, `latex` or `html`; `terminal` gives a rich renderable.

        Raises:
            UsageError: unknown format.
        """
        details = [sentence("behind_row", row.label, each) for row in self.rows for each in row.rows]
        return write_grids([*self.grids(), self.paper()], [*self.notes, *self.limits(), *details], form)

    def to_json(self) -> dict[str, Any]:
        """The numbers as plain data; shares are fractions."""
        return {
            "rows": [row.to_json() for row in self.rows],
            "instructions": [
                {"model": row.label, **row.first.model_dump(include={"evaluation", "task", "group", "turn"})}
                | {key: row.mean(key) for key in (*_SHARES, "no_answer")}
                for row in self.instruction_rows
            ],
            "baselines": [baseline.model_dump() for baseline in self.baselines],
            "notes": [*self.notes, *self.limits()],
        }


def summary_lines(summary: Summary) -> Iterator[RenderableType]:
    """Terminal output of a run's results: its table with notes, then a line or two per node."""
    if summary.eval:
        table = make_table([(summary.name, summary)])
        yield write_grids(table.grids(), (*table.notes, *table.limits()), "terminal")
        yield ""
    yield from lines("searches", summary)
    yield from (f"  {line}" for line in lines("compared", summary.compared))
    yield from lines("datasets", summary)
    yield from lines("times", summary)


def table_of(paths: str | Path | Sequence[str | Path]) -> Table:
    """Make the table of several runs and evaluations; equal cells appear once.

    Args:
        paths: run folders, `RUN:STUDENT` for one student or model of a run (all nodes of a sweep or of seeds), and
            folders of `cotree eval`.

    Raises:
        UsageError: no such folder, evaluation or student.
    """
    if not paths:
        raise UsageError("name a run folder, RUN:STUDENT, or a folder of `cotree eval`")
    several = [paths] if isinstance(paths, str | Path) else paths
    found = [_read_evaluations(str(path)) for path in several]
    names = unique_names({folder for folder, _ in found})
    return make_table([(names[folder], summary) for folder, summary in found])


def unique_names(folders: Collection[Path]) -> dict[Path, str]:
    """{folder: name in tables}: its last part, or the whole path if that is ambiguous."""
    names = {folder: folder.resolve().name for folder in folders}
    counts = Counter(names.values())
    return {folder: name if counts[name] == 1 else str(folder) for folder, name in names.items()}


def _read_evaluations(path: str) -> tuple[Path, Summary]:
    """Parse an argument (a run, RUN:STUDENT, or a folder of `cotree eval`); returns the folder and its evaluations."""
    folder, student = Path(path), ""
    if not folder.exists() and ":" in path:
        parent, _, student = path.rpartition(":")
        folder = Path(parent)
    if not folder.is_dir():
        raise UsageError(f"no folder at {folder}; give a run folder, RUN:STUDENT, or a folder of `cotree eval`")
    results = sorted(folder.glob("results_*.json"))
    if results:
        check_against_record(results[-1])
        own = (read_json(results[-1]) or {}).get("cotree")
        if not isinstance(own, dict):
            raise UsageError(f"{results[-1]} is of another program; give a folder of `cotree eval`, or a run folder")
        record = NodeFolder(folder).record() or NodeRecord("", "")
        summary = summarize_model("", str(own.get("model")), replace(record, result=own), results[-1])
    else:
        summary = summarize_run(find_run(folder))
    if not summary.eval:
        raise UsageError(f"nothing has been evaluated in {folder} yet; finish an evaluation of it first")
    return folder, _rows_of_student(summary, student, folder) if student else summary


def _rows_of_student(summary: Summary, student: str, folder: Path) -> Summary:
    """Reduce a summary to the rows of one student or model."""
    scores = [row for row in summary.eval if student in row.names]
    if not scores:
        known = dict.fromkeys(name for row in summary.eval for name in row.names)
        raise UsageError(f"{folder} has no evaluated student or model `{student}`; {nearest(student, known)}")
    instructions = [row for row in summary.instructions if student in row.names]
    return summary.model_copy(update={"eval": scores, "instructions": instructions})


def make_table(summaries: Sequence[NamedSummary]) -> Table:
    """Make a table from (run name, summary) pairs, in their order."""
    found = table_rows(summaries)
    rows = tuple(row for row in found if isinstance(row.first, EvalRow))
    baselines = {(best.task, best.answer, best.accuracy): best for _, s in summaries for best in s.baselines}

    def of_each_run(notes_of: Callable[[Summary], list[str]]) -> list[str]:
        named = len(dict(summaries)) > 1
        return [f"{run}: {note}" if named else note for run, summary in summaries for note in notes_of(summary)]

    notes = of_each_run(lambda summary: [f"left out: {name}, whose node.json is damaged" for name in summary.damaged])
    notes += of_each_run(_asked_notes)
    notes.append("cut off: no answer, not in a loop, because max_tokens came first")
    if any(row.deviation is not None for row in rows):
        notes.append("±: standard deviation over seeds; the other numbers of such a row are their means")
    notes += [f"on {row.first.task} {line}" for row in rows for line in row.constants]
    notes += [line for row in rows for each in row.rows if (line := sentence("not_judged", row.label, each))]
    return Table(
        rows=rows,
        instruction_rows=tuple(row for row in found if isinstance(row.first, InstructionRow)),
        baselines=tuple(baselines.values()),
        notes=tuple(dict.fromkeys([*notes, *of_each_run(_difference_notes)])),
    )


def _asked_notes(summary: Summary) -> list[str]:
    """Notes on sampling settings: "test: held-out questions, greedy, max_tokens 128"; evaluations with equal ones share
    a line."""
    by_words: dict[str, dict[str, None]] = {}
    for row in summary.eval:
        words = sentence("asked", row, summary.evaluations.get(row.evaluation, {}))
        by_words.setdefault(words, {})[row.evaluation] = None
    if len(by_words) == 1 and len({row.evaluation for row in summary.eval}) == 1:
        return list(by_words)
    return [f"{listed(list(names))}: {words}" if any(names) else words for words, names in by_words.items()]


def _difference_notes(summary: Summary) -> list[str]:
    """Notes on the settings in which students differ from the one that they are like, if few, and on students trained
    on unverified chains."""
    notes = []
    for model in dict.fromkeys(row.model for row in summary.eval):
        trained = summary.train.get(model, {})
        like = str((trained.get("differs") or {}).get("from")).partition("/")[2]
        data = summary.data.get(str(trained.get("data")), {})
        notes += lines("differences", [split_seed(name)[0] for name in (model, like)], trained, data)
    return notes


def table_rows(summaries: Sequence[NamedSummary]) -> list[TableRow]:
    """The accuracy and instruction rows of summaries: grouped by task, then by student over evaluations; cells that
    occur in an earlier summary are dropped."""
    groups: dict[tuple[int, str, str], list[Any]] = {}
    shown: set[str] = set()
    for place, (_, summary) in enumerate(summaries):
        labels = _labels(summary)
        all_rows: list[EvalRow | InstructionRow] = [*summary.eval, *summary.instructions]
        for row in all_rows:
            if row.fingerprint not in shown:
                groups.setdefault((place, labels[row.evaluation, row.student], row.section), []).append(row)
        shown |= {row.fingerprint for row in summary.eval if row.fingerprint}
    runs_of = Counter(label for _, label in {(summaries[place][0], label) for place, label, _ in groups})
    rows = []
    for (place, label, _), members in groups.items():
        run, summary = summaries[place]
        trained = summary.train.get(members[0].model, {})
        like = (trained.get("differs") or {}).get("from", "").partition("/")[2]
        name = f"{run}: {label}" if runs_of[label] > 1 else label  # several runs have this label
        rows.append(TableRow(name, run, tuple(members), frozenset({trained.get("parent"), like}) - {None, ""}))
    students = list(dict.fromkeys((row.run, row.first.student) for row in rows))
    tasks = list(dict.fromkeys(row.first.task for row in rows))
    rows.sort(key=lambda row: (tasks.index(row.first.task), students.index((row.run, row.first.student))))
    return rows


def _labels(summary: Summary) -> dict[tuple[str, str], str]:
    """{(evaluation, student): row label} of one run: the student's name, with the evaluation in parentheses if an
    earlier evaluation has one of its tasks too."""
    first_to_ask: dict[str, str] = {}
    again: set[str] = set()
    for row in summary.eval:
        if first_to_ask.setdefault(row.task, row.evaluation) != row.evaluation:
            again.add(row.evaluation)
    return {
        (row.evaluation, row.student): row.student + (f" ({row.evaluation})" if row.evaluation in again else "")
        for row in summary.eval
    }


def pairs_to_compare(rows: Sequence[TableRow]) -> list[tuple[TableRow, TableRow]]:
    """Pairs of a task's rows to compare: a row with its relatives in the same evaluation, or with the first row."""
    pairs = []
    for row in rows:
        same = [other for other in rows if (other.run, other.first.evaluation) == (row.run, row.first.evaluation)]
        known = [other for other in same if row.relatives & {other.first.student, *(each.model for each in other.rows)}]
        pairs += [(row, other) for other in known or rows[:1] if other is not row]
    return pairs


def detectable_difference(rows: Sequence[TableRow]) -> str:
    """A note on the minimum detectable difference between a task's rows, at the accuracy nearest to 1/2."""
    n: int = min(row.first.n for row in rows)
    nearest_to_half = min((row.accuracy for row in rows), key=lambda share: abs(share - 0.5))
    return sentence("detectable_difference", n, minimum_detectable_difference(n, nearest_to_half))
