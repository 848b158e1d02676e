"""Build a dataset: candidate rows from trees or a file, dataset-wide limits, Parquet in TRL's format, dataset card.

Invariant: the same inputs and settings give the same bytes; everything left out is counted with the reason. Candidate
rows wait in a temporary file, so memory grows by a few numbers per row at most.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from cotree.base.errors import CotreeError, UsageError
from cotree.base.rows import Row, read_rows
from cotree.data.card import write_card
from cotree.data.file_rows import file_rows, sides_of
from cotree.data.gates import DatasetCounts, Messages, RowJudge, Rules
from cotree.data.kinds import COLUMNS, COMPLETION_TOKENS, read_columns, write_parquet
from cotree.data.select import tree_rows
from cotree.data.settings import Dataset, Gates
from cotree.models.encode import shortens_replies, template_hash
from cotree.models.tokenizer import load_tokenizer
from cotree.models.weights import locate
from cotree.search.store import StoredTree
from cotree.tasks import Question, Task
from cotree.tasks import task as find_task
from cotree.tasks.decontamination import contaminated
from cotree.tasks.diagnosis import diagnose

# Columns of others that may hold the right answer.
_GOLD_COLUMNS = ("gold", "answer", "final_answer", "ground_truth")
_REPLIES = ("completion", "chosen", "rejected", "completions")


def build_dataset(
    rules: Rules,
    folder: Path,
    *,
    name: str,
    trees: Iterable[StoredTree] = (),
    rows: Iterable[Row] | None = None,
    about: Mapping[str, Any] | None = None,
) -> DatasetCounts:
    """Write `folder/train.parquet`, its card (`README.md`) and `figures/`; returns counts of rows written and left out.

    Args:
        name: the dataset's, for its card; also the task of file rows without one.
        trees: sources of chains. rows: rows of a file instead.
        about: run information for the card: `name`, `recipe` (YAML), `models` ({name: source and licence}).

    Raises:
        UsageError: no row of the file can be used.
        CotreeError: no chain became a row, with the reasons; nothing was written.
    """
    candidates = tree_rows(trees, rules) if rows is None else file_rows(rows, rules, name)
    write_rows(folder / "train.parquet", candidates, rules)
    write_card(folder, name, rules, about or {})
    return rules.counts


def write_rows(path: Path, candidates: Iterable[tuple[int, Row]], rules: Rules) -> None:
    """Drop duplicates and rows over dataset-wide limits from the candidates, and write the rest as Parquet.

    Args:
        candidates: (rank, row); the rank is the row's index among those of its tree.

    Raises:
        CotreeError: no row is left (UsageError if they came from a file); nothing was written.
    """
    settings, gates, counts = rules.settings, rules.settings.gates, rules.counts
    with Candidates(gates, rules.seed) as kept:
        for rank, row in candidates:
            counts.leave_out("duplicate", rows=not kept.add(rank, row))
        if gates.contamination and rules.held_out and not counts.trees:  # trees were filtered before
            asked = [Question(str(number), "file", tuple(row["prompt"]), "") for number, row in kept.rows()]
            counts.leave_out("contaminated", rows=kept.drop(map(int, contaminated(asked, rules.held_out))))
        counts.leave_out("rows_per_question", rows=kept.limit(gates.rows_per_question, of_each="question"))
        counts.leave_out("balance", rows=kept.balance())
        if rules.size_of is not None:
            other = read_columns(rules.size_of)
            tokens = [number for column in COMPLETION_TOKENS for number in other.get(column, [])]
            if settings.size_in == "tokens" and not tokens:
                raise UsageError(f"{rules.size_of} does not count the tokens of its rows; use `size_in: rows`")
            over = kept.limit(len(other["task"])) if settings.size_in == "rows" else kept.limit_tokens(sum(tokens))
            counts.leave_out("size_of", rows=over)
        if next(kept.rows(), None) is None:
            raise (CotreeError if counts.trees else UsageError)(f"{path}: {counts.why_empty()}")
        # Omit the path of a local file: it is private, and the dataset may be published.
        shown = settings.model_dump(mode="json", exclude={"file"})
        template = template_hash(rules.tokenizer)
        metadata = {"kind": settings.rows, "settings": shown, "seed": rules.seed, "template": template}
        write_parquet(path, COLUMNS[settings.rows], _counted(kept, rules), metadata)
    counts.add_written(read_columns(path))


def _counted(kept: Candidates, rules: Rules) -> Iterator[Row]:
    """Yield the kept rows, counting verified ones and those with shortened prompts."""
    for _, row in kept.rows():
        if rules.counts.verified is not None:
            rules.counts.verified += row.get("reward") == 1
        if rules.settings.rows != "stepwise":
            rules.counts.shortened_prompts += shortens_replies(rules.tokenizer, row["prompt"])
        yield row


class Candidates:
    """Candidate rows in a temporary SQLite file, to apply dataset-wide limits without holding them in memory.

    The file is in SQLITE_TMPDIR, TMPDIR or /var/tmp; SQLite removes it when the block ends. Which rows a limit keeps
    depends on the seed and the rows' text only: they are ordered by a keyed hash of it.
    """

    def __init__(self, gates: Gates, seed: int) -> None:
        self._gates = gates
        self._key = str(seed).encode()
        self._added = 0
        self._db = sqlite3.connect("", isolation_level=None)
        self._db.execute("PRAGMA journal_mode=OFF")
        columns = "rank INTEGER, question TEXT, balance_group TEXT, tokens INTEGER, digest BLOB UNIQUE, row TEXT"
        self._db.execute(f"CREATE TABLE rows (number INTEGER PRIMARY KEY, {columns})")
        self._db.execute("BEGIN")

    def __enter__(self) -> Candidates:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._db.close()
        if isinstance(error, sqlite3.Error):
            raise CotreeError(f"cannot keep candidate rows ({error}); free some space or set SQLITE_TMPDIR") from None

    def add(self, rank: int, row: Row) -> bool:
        """Add a row; returns False for a duplicate, which is dropped (`gates.duplicates`).

        rank: its index among the rows of its tree.
        """
        rate = row.get("pass_rate")
        group = {"task": row["task"], "difficulty": "unknown" if rate is None else min(int(rate * 3), 2)}
        balance_group = "/".join(str(group[name]) for name in self._gates.balance)
        words = json.dumps([row["prompt"], *(row.get(name) for name in _REPLIES)])
        unique = words if self._gates.duplicates else f"{self._added}/{words}"
        digest = blake2b(unique.encode(), key=self._key, digest_size=16).digest()
        question = f"{row['task']}/{row['question_id']}"
        tokens = sum(row.get(column) or 0 for column in COMPLETION_TOKENS)
        values = (self._added, rank, question, balance_group, tokens, digest, json.dumps(row))
        self._added += 1
        return self._db.execute("INSERT OR IGNORE INTO rows VALUES (?,?,?,?,?,?,?)", values).rowcount == 1

    def balance(self) -> int:
        """Limit each group to `at_most` times the smallest (`gates.balance`); returns how many rows were dropped."""
        sizes = [size for (size,) in self._db.execute("SELECT count(*) FROM rows GROUP BY balance_group")]
        most = int(min(sizes, default=0) * self._gates.at_most)
        return self.limit(most, of_each="balance_group") if self._gates.balance else 0

    def limit(self, most: int | None, *, of_each: Literal["question", "balance_group"] | None = None) -> int:
        """Keep at most `most` rows (None: all), drawn by seed; returns how many were dropped.

        of_each: apply the limit per question or per balance group instead of overall. Overall, each tree's first row
            has the same chance to stay, and none is dropped while any tree has a second one.
        """
        return self._db.execute(
            "DELETE FROM rows WHERE number IN (SELECT number FROM (SELECT number, row_number() OVER (PARTITION BY "
            "CASE :group WHEN 'question' THEN question WHEN 'balance_group' THEN balance_group END "
            "ORDER BY iif(:group IS NULL, rank, 0), digest) AS place FROM rows) WHERE place > :most)",
            {"group": of_each, "most": most},
        ).rowcount

    def limit_tokens(self, wanted: int) -> int:
        """Drop rows, as `limit`, until the total of completion tokens is as close to `wanted` as possible (at least one
        row stays); returns how many were dropped."""
        nearest = self._db.execute(
            "SELECT place FROM (SELECT row_number() OVER drawn AS place, sum(tokens) OVER drawn AS total FROM rows "
            "WINDOW drawn AS (ORDER BY rank, digest)) ORDER BY abs(total - ?), place LIMIT 1",
            (wanted,),
        ).fetchone()
        return 0 if nearest is None else self.limit(nearest[0])

    def drop(self, numbers: Iterable[int]) -> int:
        """Drop rows by number; returns how many."""
        return self._db.executemany("DELETE FROM rows WHERE number = ?", ((number,) for number in numbers)).rowcount

    def rows(self) -> Iterator[tuple[int, Row]]:
        """Yield (number, row) of the kept rows in the order of insertion."""
        for number, row in self._db.execute("SELECT number, row FROM rows ORDER BY number"):
            yield number, json.loads(row)


def import_file(
    source: Path, student: str, out: Path, *, task: str | None, held_out: Sequence[str], max_tokens: int
) -> DatasetCounts:
    """Import a file as SFT rows, or as pairs if its first row has `chosen` and `rejected`; returns the counts.

    Args:
        student: its tokenizer counts tokens: a packaged name, a `.gguf`, a folder or a hub id.
        out: a Parquet file.
        task: verifies rows that contain a gold answer or a question of the task.
        held_out: tasks whose questions must not be repeated by a row.

    Raises:
        UsageError: no row passed the gates; `out` is unchanged.
    """
    folder_or_hub = Path(student).is_dir() or ("/" in student and not student.endswith(".gguf"))
    tokenizer = load_tokenizer(student if folder_or_hub else locate(student))
    judging = None if task is None else find_task(task)
    rows = read_rows(source)
    if (first := next(rows, None)) is None:
        raise UsageError(f"{source} has no rows")
    kind: Literal["sft", "dpo"] = "dpo" if {*sides_of(first)} <= first.keys() else "sft"
    rules = Rules(
        Dataset(file=str(source), rows=kind, max_tokens=max_tokens),
        tokenizer,
        row_judge=row_judge(judging),
        held_out=[question for name in held_out for question in find_task(name).questions()],
    )
    rules.counts.verified = None if task is None else 0
    write_rows(out, file_rows(chain([first], rows), rules, judging.name if judging else source.stem), rules)
    return rules.counts


def row_judge(task: Task | None) -> RowJudge:
    """Make a function that verifies a row's text by its task and detects loops and cut-off texts."""
    known = {} if task is None else {_last_message_words(question.messages): question for question in task.questions()}

    def judge(raw: Row, prompt: Messages, text: str) -> str | None:
        verdict, question = None, known.get(_last_message_words(prompt))
        gold = next((raw[name] for name in _GOLD_COLUMNS if raw.get(name) not in (None, "")), None)
        if task is not None and (question is not None or gold is not None):
            verdict = task.judge(question or Question("", task.name, tuple(prompt), str(gold)), text).kind
        found = diagnose(text, answered=None if verdict is None else verdict != "no_answer")
        return "no_answer" if found.no_answer and verdict != "wrong" else verdict

    return judge


def _last_message_words(messages: Sequence[dict[str, str]]) -> str:
    """The words of the last message, to match rows of a file with questions of a task."""
    return " ".join(messages[-1]["content"].split())
