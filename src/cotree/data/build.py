"""Build the datasets of a run: gates, selection, rows in TRL's types as Parquet, and their card.

Invariant: the same store and settings give the same bytes; what was left out is counted, with the reason; memory does
not grow with the number of trees. Trees are read once, one at a time; their candidate rows wait in a temporary SQLite
file until what concerns all of them (duplicates, rows a question, balance) is decided.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cotree.base.errors import CotreeError, UsageError
from cotree.base.rows import Row
from cotree.data.card import write_card
from cotree.data.chains import PLAIN, Chain, Reading, chains_of, mean_value
from cotree.data.gates import passes
from cotree.data.kinds import COLUMNS, write_parquet
from cotree.data.select import Pair, draw_chains, select_dpo, select_sft, select_step_pairs
from cotree.experiment.recipe import Build, Gates
from cotree.models.encode import special_words, template_hash
from cotree.search.prompts import chain_text
from cotree.search.store import StoredTree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Built:
    """What a build wrote: counts and means for the summary, and a few pairs to be read by people."""

    counts: dict[str, Any]
    samples: list[dict[str, Any]]


def built_lines(counts: Mapping[str, Any]) -> list[str]:
    """What a build wrote and what it left out, for the terminal."""
    named = (("sft_rows", "SFT chains"), ("dpo_pairs", "DPO pairs"), ("control_rows", "control chains"),
             ("step_pairs", "step pairs"), ("stepwise_rows", "process-reward rows"))  # fmt: skip
    written = []
    for key, name in named:
        tasks = ", ".join(f"{task} {n}" for task, n in counts.get(f"{key}_by_task", {}).items())
        if counts[key]:
            written.append(f"{counts[key]} {name}" + (f" ({tasks})" if tasks else ""))
    removed = ", ".join(f"{name} {n}" for name, n in counts["removed"].items())
    return [", ".join(written), f"left out: {removed or 'nothing'}"]


@dataclass
class Seen:
    """The distributions of a dataset's columns, counted while its rows are written; memory grows with no row."""

    rows: int = 0
    numbers: dict[str, Counter[float]] = field(default_factory=dict)
    tasks: Counter[str] = field(default_factory=Counter)
    first: dict[str, Row] = field(default_factory=dict)

    def watch(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Pass rows on; shares are counted in hundredths."""
        for row in rows:
            self.rows += 1
            self.tasks[row["task"]] += 1
            self.first.setdefault(row["task"], row)
            for name, value in row.items():
                if isinstance(value, int | float) and not name.endswith(("_id", "_leaf")):
                    kept = value if isinstance(value, int) else round(value, 2)
                    self.numbers.setdefault(name, Counter())[kept] += 1
            yield row

    def mean(self, name: str) -> float:
        """The mean of a column; 0 without rows."""
        return sum(value * n for value, n in self.numbers.get(name, {}).items()) / max(self.rows, 1)


def build_sft(trees: Iterable[StoredTree], tokenizer: PreTrainedTokenizerBase, folder: Path, settings: Build,
              *, seed: int = 0, reading: Reading = PLAIN) -> Built:  # fmt: skip
    """Only the SFT dataset, into `folder/sft`; as `build`. The folder's card is that of the last build into it."""
    return build(trees, tokenizer, settings, folder, seed=seed, reading=reading, kinds=("sft",))


def build_dpo(trees: Iterable[StoredTree], tokenizer: PreTrainedTokenizerBase, folder: Path, settings: Build,
              *, seed: int = 0, reading: Reading = PLAIN) -> Built:  # fmt: skip
    """Only the DPO dataset, into `folder/dpo`; as `build`. The folder's card is that of the last build into it."""
    return build(trees, tokenizer, settings, folder, seed=seed, reading=reading, kinds=("dpo",))


def build(
    trees: Iterable[StoredTree],
    tokenizer: PreTrainedTokenizerBase,
    settings: Build,
    folder: Path,
    *,
    seed: int,
    control: bool = False,
    reading: Reading = PLAIN,
    kinds: Collection[str] = ("sft", "dpo", "step_pairs", "stepwise"),
    contaminated: Collection[tuple[str, str]] = (),
    about: Mapping[str, Any] | None = None,
) -> Built:
    """Select rows from trees and write `folder/KIND/train.parquet` and the datasets' card.

    control: also rows for a control student, as many as SFT has.
    contaminated: (task, question id) of questions that repeat an evaluation question; their trees give nothing.
    about: what the card says of the run (`name`, `recipe`, `models`).

    Raises:
        UsageError: reflections are to be cut, and there is no `reading` with a judge to judge those chains again.
        CotreeError: no tree gave a correct chain, or none gave both a correct and a wrong one; nothing was written.
    """
    if settings.reflections == "cut" and reading.judge is None:
        raise UsageError("`reflections: cut` needs a judge of what was cut: pass reading=Reading(judge=...)")
    removed: Counter[str] = Counter()
    chains = 0
    special = special_words(tokenizer)
    with _Spill(settings.gates, seed) as spill:
        for tree in trees:
            found, no_answer = chains_of(tree, tokenizer, settings, reading)
            removed["no_answer"] += no_answer
            judged = sum(node.verdict is not None for node in tree.nodes)
            removed["repeated_in_tree"] += judged - no_answer - len(found)
            if (tree.task, tree.question_id) in contaminated:
                removed["contaminated"] += len(found)
                continue
            prompt = "\n\n".join(message["content"] for message in tree.messages)
            usable = [chain for chain in found if passes(chain, prompt, settings, special, removed)]
            chains += len(usable)
            for kind, rank, row in _rows(tree, prompt, usable, settings, seed, control):
                if kind in kinds or kind == "control":
                    removed["duplicate"] += not spill.add(kind, rank, row)
        for kind in kinds:
            removed["rows_per_question"] += spill.cap_questions(kind)
            removed["balance"] += spill.balance(kind)
        sizes = {kind: spill.count(kind) for kind in kinds}
        if "sft" in kinds and not sizes["sft"]:
            raise CotreeError("no tree has a correct chain, so there is nothing to train on; raise search.rollouts")
        if "dpo" in kinds and not sizes["dpo"]:
            raise CotreeError("no tree has both a correct and a wrong chain, so no pairs; raise search.rollouts")
        noted = {"template": template_hash(tokenizer), "seed": seed, "build": settings.model_dump(mode="json")}
        if control:
            sizes["control"] = sizes["sft"]
        seen = {kind: Seen() for kind in COLUMNS}
        for kind, limit in sizes.items():
            path = folder / kind / "train.parquet"
            if limit:
                write_parquet(path, kind, seen[kind].watch(spill.rows(kind, limit)), noted)
            else:
                path.unlink(missing_ok=True)  # of a build before this one
    counts = _counts(chains, removed, seen)
    written = {kind: found for kind, found in seen.items() if found.rows}
    write_card(folder, written, counts, settings, about or {})
    return Built(counts, [_sample(name, row) for name, row in sorted(seen["dpo"].first.items())])


def _counts(chains: int, removed: Counter[str], seen: Mapping[str, Seen]) -> dict[str, Any]:
    sft, dpo = seen["sft"], seen["dpo"]
    return {
        "chains": chains,
        "removed": {name: n for name, n in sorted(removed.items()) if n},
        "sft_rows": sft.rows,
        "control_rows": seen["control"].rows,
        "dpo_pairs": dpo.rows,
        "step_pairs": seen["step_pairs"].rows,
        "stepwise_rows": seen["stepwise"].rows,
        "mean_sft_tokens": sft.mean("length_tokens"),
        "mean_chosen_tokens": dpo.mean("chosen_tokens"),
        "mean_rejected_tokens": dpo.mean("rejected_tokens"),
        "mean_prefix_tokens": dpo.mean("prefix_tokens"),
        "sft_rows_by_task": dict(sorted(sft.tasks.items())),
        "dpo_pairs_by_task": dict(sorted(dpo.tasks.items())),
    }


def _rows(
    tree: StoredTree, prompt: str, chains: list[Chain], settings: Build, seed: int, control: bool
) -> Iterator[tuple[str, int, Row]]:
    """A tree's candidate rows: kind, order within the tree, row. `length_rank` is 1 for the tree's shortest chain."""
    verdicts = [node.verdict for node in tree.nodes if node.verdict is not None]
    common = {
        "tree_id": tree.tree_id,
        "task": tree.task,
        "question_id": tree.question_id,
        "pass_rate": verdicts.count("correct") / max(len(verdicts), 1),
    }
    answered = [chain for chain in chains if chain.verdict != "no_answer"]
    ordered = sorted(answered, key=lambda chain: len(chain.tokens))
    ranks = {chain.leaf_id: rank for rank, chain in enumerate(ordered, 1)}

    def sft(chain: Chain) -> Row:
        return {
            "prompt": tree.messages,
            "completion": _assistant(chain),
            "leaf_id": chain.leaf_id,
            "length_tokens": len(chain.tokens),
            "length_rank": ranks[chain.leaf_id],
            "pattern": chain.pattern,
            "reward": chain.reward,
            "value": chain.value,
            **common,
        }

    def dpo(pair: Pair) -> Row:
        return {
            "prompt": tree.messages,
            "chosen": _assistant(pair.chosen),
            "rejected": _assistant(pair.rejected),
            "chosen_leaf": pair.chosen.leaf_id,
            "rejected_leaf": pair.rejected.leaf_id,
            "prefix_tokens": pair.prefix_tokens,
            "chosen_tokens": len(pair.chosen.tokens),
            "rejected_tokens": len(pair.rejected.tokens),
            "rejected_finished": pair.rejected.verdict != "no_answer",
            **common,
        }

    for chain in select_sft(chains, settings.sft, seed):
        yield "sft", 0, sft(chain)
    for pair in select_dpo(chains, settings.dpo, seed):
        yield "dpo", 0, dpo(pair)
    if control:
        # No tree gives more SFT rows than this, so more are never asked for.
        for rank, chain in enumerate(draw_chains(answered, settings.sft.chains_per_tree, seed)):
            yield "control", rank, sft(chain)
    if settings.step_pairs is not None:
        for pair in select_step_pairs(tree, chains, settings.step_pairs, seed):
            yield "step_pairs", 0, {**dpo(pair), **_step(tree, pair)}
    if settings.stepwise is not None:
        for chain in draw_chains(answered, settings.stepwise.chains_per_tree, seed):
            nodes = [tree.nodes[node_id] for node_id in chain.nodes]
            yield "stepwise", 0, {
                "prompt": prompt,
                "completions": [node.text.strip() for node in nodes],
                "labels": [mean_value(node) > settings.stepwise.label_above for node in nodes],
                "values": [mean_value(node) for node in nodes],
                "visits": [node.visits for node in nodes],
                "leaf_id": chain.leaf_id,
                **common,
            }  # fmt: skip


def _assistant(chain: Chain) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": chain.text}]


def _step(tree: StoredTree, pair: Pair) -> Row:
    """The sibling thoughts, what was judged of them, and the words before them that the student sees."""
    assert pair.better is not None
    assert pair.worse is not None
    parting = pair.better.node_id
    shared = takewhile(lambda node_id: node_id != parting, pair.chosen.nodes)
    before = [tree.nodes[node_id] for node_id in shared]
    row: Row = {"step_type": pair.better.type, "prefix": chain_text(before)}
    for side, node in (("chosen", pair.better), ("rejected", pair.worse)):
        row |= {f"{side}_step": node.text, f"{side}_value": mean_value(node), f"{side}_visits": node.visits}
    return row


def _sample(title: str, row: Row) -> dict[str, Any]:
    sides = (("chosen", "correct"), ("rejected", "wrong"))
    chains = [{"text": row[kind][0]["content"], "verdict": verdict, "kind": kind} for kind, verdict in sides]
    return {"title": title, "prompt": row["prompt"][-1]["content"], "chains": chains}


class _Spill:
    """Candidate rows in a temporary SQLite file (in SQLITE_TMPDIR, TMPDIR or /var/tmp) that goes when it is closed."""

    def __init__(self, gates: Gates, seed: int) -> None:
        self._gates = gates
        self._key = str(seed).encode()
        self._db = sqlite3.connect("", isolation_level=None)
        self._db.execute("PRAGMA journal_mode=OFF")
        self._db.execute("CREATE TABLE rows (kind TEXT, rank INTEGER, question TEXT, part TEXT, digest BLOB, row TEXT)")
        self._db.execute("CREATE UNIQUE INDEX once ON rows (kind, digest)")

    def __enter__(self) -> _Spill:
        self._db.execute("BEGIN")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._db.close()
        if isinstance(error, sqlite3.Error):
            raise CotreeError(f"cannot keep the build's rows ({error}); free some space or set SQLITE_TMPDIR") from None

    def add(self, kind: str, rank: int, row: Row) -> bool:
        """Keep a row; False where one with the same messages is kept already."""
        group = {"task": row["task"], "difficulty": min(int(row["pass_rate"] * 3), 2)}
        part = "/".join(str(group[name]) for name in self._gates.balance)
        words = json.dumps([row["prompt"], *(row.get(c) for c in ("completion", "chosen", "rejected", "completions"))])
        unique = words if self._gates.duplicates and kind != "control" else f"{row['tree_id']}/{rank}/{words}"
        digest = blake2b(unique.encode(), key=self._key, digest_size=16).digest()
        question = f"{row['task']}/{row['question_id']}"
        values = (kind, rank, question, part, digest, json.dumps(row))
        return self._db.execute("INSERT OR IGNORE INTO rows VALUES (?,?,?,?,?,?)", values).rowcount == 1

    def cap_questions(self, kind: str) -> int:
        """Drop what a question has too many of, drawn by seed; returns how many."""
        limit = self._gates.rows_per_question
        return 0 if limit is None else self._keep(kind, limit, by_question=True)

    def balance(self, kind: str) -> int:
        """Drop what a group has too many of, drawn by seed; returns how many."""
        smallest = "SELECT min(n) FROM (SELECT count(*) AS n FROM rows WHERE kind = ? GROUP BY part)"
        (least,) = self._db.execute(smallest, (kind,)).fetchone()
        return self._keep(kind, int(least * self._gates.at_most), False) if self._gates.balance and least else 0

    def _keep(self, kind: str, limit: int, by_question: bool) -> int:
        # The digest is as good as a lot: it depends on the row and the seed alone.
        return self._db.execute(
            "DELETE FROM rows WHERE rowid IN (SELECT rowid FROM (SELECT rowid, row_number() OVER "
            "(PARTITION BY iif(?, question, part) ORDER BY digest) AS place FROM rows WHERE kind = ?) WHERE place > ?)",
            (by_question, kind, limit),
        ).rowcount

    def count(self, kind: str) -> int:
        """How many rows of a kind are kept."""
        return int(self._db.execute("SELECT count(*) FROM rows WHERE kind = ?", (kind,)).fetchone()[0])

    def rows(self, kind: str, limit: int) -> Iterator[Row]:
        """The first `limit` rows, the trees in their order; of a control, one of each tree in turn."""
        kept = "SELECT row FROM rows WHERE kind = ? ORDER BY rank, rowid LIMIT ?"
        for (row,) in self._db.execute(kept, (kind, limit)):
            yield json.loads(row)
