"""Build one dataset: candidate rows of trees or of a file, what concerns all of them, Parquet in TRL's types, the card.

Invariant: the same inputs and settings give the same bytes; what was left out is counted, with the reason; memory does
not grow with the number of trees or rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cotree.base.errors import CotreeError, UsageError
from cotree.base.rows import Row, read_rows
from cotree.data.card import write_card
from cotree.data.counts import ColumnStatistics, DatasetCounts
from cotree.data.file_rows import file_rows
from cotree.data.gates import Messages, RowJudge, Rules, TextJudge, question_keys
from cotree.data.kinds import COLUMNS, completion_tokens, write_parquet
from cotree.data.select import tree_rows
from cotree.data.settings import Dataset
from cotree.data.spill import Spill
from cotree.models.encode import template_hash
from cotree.models.tokenizer import load_tokenizer
from cotree.models.weights import locate
from cotree.search.store import StoredTree
from cotree.search.thoughts import PATTERNS, Pattern
from cotree.tasks import Question, Task
from cotree.tasks import task as find_task
from cotree.tasks.decontamination import contaminated as contaminated_questions
from cotree.tasks.diagnosis import diagnose

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GOLDS = ("gold", "answer", "final_answer", "ground_truth")


def build_dataset(
    settings: Dataset,
    folder: Path,
    *,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    trees: Iterable[StoredTree] = (),
    rows: Iterable[Row] | None = None,
    contaminated: Collection[tuple[str, str]] = (),
    held_out: Sequence[Question] = (),
    patterns: Mapping[str, Pattern] = PATTERNS,
    judge: TextJudge | None = None,
    size_of: Path | None = None,
    questions_of: Path | None = None,
    about: Mapping[str, Any] | None = None,
) -> DatasetCounts:
    """Write `folder/train.parquet`, its card (`README.md`) and `figures/`; returns what was written and left out.

    Args:
        trees: where the chains come from. rows: those of a file instead.
        contaminated: (task, question id) of the trees' questions that repeat an evaluation question.
        held_out: evaluation questions; rows of a file that repeat one are left out.
        patterns: by which the trees were grown. judge: verifies chains whose reflections were cut.
        size_of, questions_of: the `train.parquet` of the datasets that the settings name.
        about: what the card says of the run: `name`, `recipe` (YAML), `models` ({name: source and licence}).

    Raises:
        UsageError: something that the settings need was not passed, or no row of the file can be used.
        CotreeError: no chain became a row, with the reasons; nothing was written.
    """
    passed = {"judge": judge, "size_of": size_of, "questions_of": questions_of}
    needed = {"judge": settings.reflections == "cut", **settings.model_dump(include={"size_of", "questions_of"})}
    if missing := [argument for argument in passed if needed[argument] and passed[argument] is None]:
        raise UsageError(f"the settings of dataset {name} need {'= and '.join(missing)}=: pass it to build_dataset")
    wanted = None if questions_of is None else _questions_in(questions_of)
    rules = Rules(settings, tokenizer, seed, patterns, judge=judge, wanted=wanted, size_of=size_of)
    if settings.gates.contamination:  # the questions of trees were compared before
        rules = replace(rules, contaminated=contaminated, held_out=() if rows is None else held_out)
    candidates = tree_rows(trees, rules) if rows is None else file_rows(rows, rules, name)
    statistics = write_candidates(folder / "train.parquet", candidates, rules)
    write_card(folder, name, rules, statistics=statistics, about=about or {})
    return rules.counts


def write_candidates(path: Path, candidates: Iterable[tuple[int, Row]], rules: Rules) -> ColumnStatistics:
    """Write candidate rows (rank in their tree, row) as Parquet but for those that all of them together leave out.

    Raises:
        CotreeError: no row is left (UsageError: of a file); nothing was written.
    """
    settings, counts, statistics = rules.settings, rules.counts, ColumnStatistics()
    with Spill(settings.gates, rules.seed) as spill:
        for number, (rank, row) in enumerate(candidates):
            counts.leave_out("duplicate", rows=not spill.add(number, rank, row))
        asked = (Question(str(number), "file", tuple(row["prompt"]), "") for number, row in spill.rows())
        repeated = contaminated_questions(list(asked), rules.held_out) if rules.held_out else {}
        counts.leave_out("contaminated", rows=spill.drop(map(int, repeated)))
        counts.leave_out("rows_per_question", rows=spill.keep(settings.gates.rows_per_question, of_each="question"))
        counts.leave_out("balance", rows=spill.balance())
        counts.leave_out("size_of", rows=_cut_to_size(spill, settings, rules.size_of))
        if next(spill.rows(), None) is None:
            raise (CotreeError if counts.trees else UsageError)(f"{path}: {counts.why_empty()}")
        # Where a file is on this machine is nobody's business.
        shown = settings.model_dump(mode="json", exclude={"file"})
        template = template_hash(rules.tokenizer)
        notes = {"kind": settings.rows, "settings": shown, "seed": rules.seed, "template": template}
        rows = statistics.watch(row for _, row in spill.rows())
        write_parquet(path, COLUMNS[settings.rows], rows, notes)
    counts.add_written(statistics)
    return statistics


def _questions_in(path: Path) -> set[str]:
    """The keys of the questions of a dataset file."""
    keys = (question_keys(str(row.get("task")), str(row.get("question_id")), row["prompt"]) for row in read_rows(path))
    return set().union(*keys)


def _cut_to_size(spill: Spill, settings: Dataset, other: Path | None) -> int:
    """Drop what is over the rows or completion tokens of another dataset, drawn by seed; returns how many rows."""
    if other is None:
        return 0
    tokens = [completion_tokens(row) for row in read_rows(other)]
    if settings.size_in == "rows":
        return spill.keep(len(tokens))
    if None in tokens:
        raise UsageError(f"{other} does not count the tokens of its rows; use `size_in: rows`")
    return spill.keep_tokens(sum(filter(None, tokens)))


def import_file(
    source: Path, student: str, out: Path, *, task: str | None, held_out: Sequence[str], max_tokens: int
) -> list[str]:
    """As `import_rows`, by the names of student (a packaged name, `.gguf`, folder or hub id) and tasks; returns lines
    that say what was written and what was left out."""
    folder_or_hub = Path(student).is_dir() or ("/" in student and not student.endswith(".gguf"))
    tokenizer = load_tokenizer(student if folder_or_hub else locate(student))
    settings = Dataset(file=str(source), rows="sft", max_tokens=max_tokens)
    questions = [question for name in held_out for question in find_task(name).questions()]
    judge = None if task is None else find_task(task)
    first, *others = import_rows(settings, tokenizer, out, task=judge, held_out=questions).lines()
    return [f"{out}: {first}", *others]


def import_rows(
    settings: Dataset, tokenizer: PreTrainedTokenizerBase, out: Path, *, task: Task | None, held_out: Sequence[Question]
) -> DatasetCounts:
    """Read `settings.file`, gate its rows, and write SFT rows to `out` (Parquet).

    task: judges each row whose gold is in the row, or whose question is the task's.
    held_out: evaluation questions; rows that repeat one are left out.

    Raises:
        UsageError: no row passed; `out` stays as it was.
    """
    source = Path(str(settings.file))
    rules = Rules(settings, tokenizer, row_judge=row_judge(task), held_out=held_out)
    rows = file_rows(read_rows(source), rules, task.name if task else source.stem)
    statistics = write_candidates(out, rows, rules)
    if task is not None:
        rules.counts.verified = int(statistics.total("reward"))
    return rules.counts


def row_judge(task: Task | None) -> RowJudge:
    """Judges a row's text by its task, and finds texts that loop or break off without an answer."""
    known = {} if task is None else {_words(q.messages): q for q in task.questions()}

    def judge(raw: Row, prompt: Messages, text: str) -> str | None:
        verdict, question = None, known.get(_words(prompt))
        gold = next((raw[name] for name in _GOLDS if raw.get(name) not in (None, "")), None)
        if task is not None and (question is not None or gold is not None):
            verdict = task.judge(question or Question("", task.name, tuple(prompt), str(gold)), text).kind
        found = diagnose(text, answered=None if verdict is None else verdict != "no_answer")
        return "no_answer" if found.no_answer and verdict != "wrong" else verdict

    return judge


def _words(messages: Sequence[dict[str, str]]) -> str:
    return " ".join(messages[-1]["content"].split())
