"""Build one dataset: candidate rows of trees or of a file, limits over all of them, Parquet in TRL's types, the card.

Invariant: the same inputs and settings give the same bytes; what was left out is counted, with the reason. Memory grows
by a few numbers a row at most, because candidate rows wait in a temporary file.
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
    """Write `folder/train.parquet`, its card (`README.md`) and `figures/`; returns what was written and left out.

    Args:
        name: the dataset's, for its card; rows of a file that name no task get it as theirs.
        trees: where the chains come from. rows: those of a file instead.
        about: what the card says of the run: `name`, `recipe` (YAML), `models` ({name: source and licence}).

    Raises:
        UsageError: no row of the file can be used.
        CotreeError: no chain became a row, with the reasons; nothing was written.
    """
    candidates = tree_rows(trees, rules) if rows is None else file_rows(rows, rules, name)
    write_rows(folder / "train.parquet", candidates, rules)
    write_card(folder, name, rules, about or {})
    return rules.counts


def write_rows(path: Path, candidates: Iterable[tuple[int, Row]], rules: Rules) -> None:
    """Write candidate rows as Parquet, without duplicates and what is over the limits of the whole dataset.

    Args:
        candidates: (rank, row); the rank is the row's place among those of its tree, from 0.

    Raises:
        CotreeError: no row is left (UsageError: of a file); nothing was written.
    """
    settings, gates, counts = rules.settings, rules.settings.gates, rules.counts
    with Candidates(gates, rules.seed) as kept:
        for rank, row in candidates:
            counts.leave_out("duplicate", rows=not kept.add(rank, row))
        if gates.contamination and rules.held_out and not counts.trees:  # trees are left out before they are read
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
        # The path of a local file is private, and the dataset may be published.
        shown = settings.model_dump(mode="json", exclude={"file"})
        template = template_hash(rules.tokenizer)
        metadata = {"kind": settings.rows, "settings": shown, "seed": rules.seed, "template": template}
        write_parquet(path, COLUMNS[settings.rows], _counted(kept, rules), metadata)
    counts.add_written(read_columns(path))


def _counted(kept: Candidates, rules: Rules) -> Iterator[Row]:
    """The rows that are written; counts those that were verified and those with shortened prompts."""
    for _, row in kept.rows():
        if rules.counts.verified is not None:
            rules.counts.verified += row.get("reward") == 1
        if rules.settings.rows != "stepwise":
            rules.counts.shortened_prompts += shortens_replies(rules.tokenizer, row["prompt"])
        yield row


class Candidates:
    """Candidate rows in a temporary SQLite file, until those over the limits of the whole dataset are dropped.

    The file is in SQLITE_TMPDIR, TMPDIR or /var/tmp; SQLite removes it when the block ends. Which rows stay under a
    limit depends on nothing but the seed and the text of the rows: they are ordered by a keyed digest of it.
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
        """Keep a row; False where one with the same messages is kept already (`gates.duplicates`).

        rank: its place among the rows of its tree.
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
        """Drop rows of each group over `at_most` times the smallest one (`gates.balance`); returns how many."""
        sizes = [size for (size,) in self._db.execute("SELECT count(*) FROM rows GROUP BY balance_group")]
        most = int(min(sizes, default=0) * self._gates.at_most)
        return self.limit(most, of_each="balance_group") if self._gates.balance else 0

    def limit(self, most: int | None, *, of_each: Literal["question", "balance_group"] | None = None) -> int:
        """Drop the rows over `most`, drawn by seed; returns how many. None is no limit.

        of_each: rows of one question, or of one group that is balanced, instead of all rows. Of all rows, the first of
            each tree has the same chance to stay, and none is dropped as long as any tree has a second one.
        """
        return self._db.execute(
            "DELETE FROM rows WHERE number IN (SELECT number FROM (SELECT number, row_number() OVER (PARTITION BY "
            "CASE :group WHEN 'question' THEN question WHEN 'balance_group' THEN balance_group END "
            "ORDER BY iif(:group IS NULL, rank, 0), digest) AS place FROM rows) WHERE place > :most)",
            {"group": of_each, "most": most},
        ).rowcount

    def limit_tokens(self, wanted: int) -> int:
        """Drop rows, as `limit`, until the completion tokens of the others are as near to `wanted` as whole rows come
        (at least one row stays); returns how many."""
        nearest = self._db.execute(
            "SELECT place FROM (SELECT row_number() OVER drawn AS place, sum(tokens) OVER drawn AS total FROM rows "
            "WINDOW drawn AS (ORDER BY rank, digest)) ORDER BY abs(total - ?), place LIMIT 1",
            (wanted,),
        ).fetchone()
        return 0 if nearest is None else self.limit(nearest[0])

    def drop(self, numbers: Iterable[int]) -> int:
        """Drop rows by their numbers; returns how many."""
        return self._db.executemany("DELETE FROM rows WHERE number = ?", ((number,) for number in numbers)).rowcount

    def rows(self) -> Iterator[tuple[int, Row]]:
        """The kept rows with their numbers, in the order in which they were added."""
        for number, row in self._db.execute("SELECT number, row FROM rows ORDER BY number"):
            yield number, json.loads(row)


def import_file(
    source: Path, student: str, out: Path, *, task: str | None, held_out: Sequence[str], max_tokens: int
) -> DatasetCounts:
    """Write the rows of a file that pass the gates as SFT rows, or as pairs where the first one has `chosen` and
    `rejected`; returns what was written and left out.

    Args:
        student: whose tokens count: a packaged name, a `.gguf`, a folder or a hub id.
        out: a Parquet file.
        task: judges each row whose gold is in the row, or whose question is the task's.
        held_out: tasks whose questions no row may repeat.

    Raises:
        UsageError: no row passed; `out` stays as it was.
    """
    folder_or_hub = Path(student).is_dir() or ("/" in student and not student.endswith(".gguf"))
    tokenizer = load_tokenizer(student if folder_or_hub else locate(student))
    judging = None if task is None else find_task(task)
    rows = read_rows(source)
    first = next(rows, {})
    kind: Literal["sft", "dpo"] = "dpo" if {*sides_of(first)} <= first.keys() else "sft"
    rules = Rules(
        Dataset(file=str(source), rows=kind, max_tokens=max_tokens),
        tokenizer,
        row_judge=row_judge(judging),
        held_out=[question for name in held_out for question in find_task(name).questions()],
    )
    rules.counts.verified = None if task is None else 0
    write_rows(
        out, file_rows(chain([first] if first else [], rows), rules, judging.name if judging else source.stem), rules
    )
    return rules.counts


def row_judge(task: Task | None) -> RowJudge:
    """A function that judges a row's text by its task, and finds texts that loop or break off without an answer."""
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
    """The words of the last message, by which rows of a file and questions of a task are matched."""
    return " ".join(messages[-1]["content"].split())
