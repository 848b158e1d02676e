"""Candidate rows of a file or of the hub: rows of ours, TRL's types, and the long chains that others distilled.

Texts stay as they are. A row of no known form, one that a gate takes and a column that our rows do not have are counted
and named.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

from cotree.base.errors import UsageError
from cotree.base.rows import Row
from cotree.data.gates import Messages, Rules
from cotree.data.kinds import NEEDED, faults_of, own_columns
from cotree.models.encode import encode_chains, encode_dpo
from cotree.models.wire import one_line

# ShareGPT's names (Sky-T1, OpenThoughts).
_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_PROMPTS = ("prompt", "question", "problem", "instruction", "input")
_FAULTS_KEPT = 20
_RESPONSES = ("response", "completion", "generation", "output", "solution")


def hub_rows(name: str) -> Iterator[Row]:
    """The rows of a dataset of the hub, `OWNER/NAME` or `OWNER/NAME@REVISION`: its `train` split, or its only one.

    Raises:
        UsageError: the hub is not reached, there is no such dataset, or it has several configurations or splits.
    """
    import huggingface_hub
    from datasets import load_dataset

    repository, _, revision = name.partition("@")
    try:
        if not Path(repository).is_dir() and not huggingface_hub.is_offline_mode():
            # One question first: `datasets` itself would try for half a minute before it says that there is no hub.
            huggingface_hub.HfApi().dataset_info(repository, timeout=10)
        splits = load_dataset(repository, revision=revision or None)
        if "train" not in splits and len(splits) > 1:
            raise ValueError(f"it has the splits {', '.join(splits)}; download one and give it as file")
        return iter(splits["train"] if "train" in splits else next(iter(splits.values())))
    except Exception as error:  # noqa: BLE001 - the hub client and `datasets` raise dozens of unrelated types
        reason = one_line(str(error))[:200] or type(error).__name__
        raise UsageError(f"cannot load {name} from the hub: {reason}") from None


def file_rows(rows: Iterable[Row], rules: Rules, name: str) -> Iterator[tuple[int, Row]]:
    """Candidate rows with their rank, which is 0: no row of a file is a tree's second one.

    name: the task of rows that name none.
    """
    kind, left_out = rules.settings.rows, set[str]()
    for number, raw in enumerate(rows):
        columns = _FileRow(raw)
        try:
            messages = columns.sft() if kind == "sft" else columns.dpo()
            own = own_columns(raw, kind)
            row_id = None if raw.get("id") is None else str(raw["id"])
            asked = blake2b(str(messages["prompt"][-1:]).encode("utf-8", "replace"), digest_size=8).hexdigest()
            known: Row = {"tree_id": row_id or str(number), "task": name, "question_id": row_id or asked}
            known |= {"pattern": "external"} if kind == "sft" else {"rejected_finished": True}
            row = known | own | messages
            failed = _failed(raw, row, rules)
        except (ValueError, UsageError) as error:  # a UsageError: the chat template cannot render it
            rules.counts.leave_out("malformed", rows=1)
            fault = f"row {number}: {str(error).removeprefix('row 0: ')}"
            rules.counts.faults = [*rules.counts.faults, fault][:_FAULTS_KEPT]
            continue
        unknown = raw.keys() - columns.used - own.keys() - {"id"}
        left_out.update(columns.not_kept, (column for column in unknown if raw[column] is not None))
        rules.counts.columns_left_out = sorted(left_out)
        if failed is None:
            yield 0, row
        else:
            rules.counts.leave_out(failed, rows=1)


def _failed(raw: Row, row: Row, rules: Rules) -> str | None:
    """The first reason to leave a row out, or None; fills in the columns that count tokens, and the reward.

    Raises:
        ValueError: a message of it is not what it must be.
    """
    kind = rules.settings.rows
    texts = [row[side][-1]["content"] for side in NEEDED[kind][1:]]
    if any(isinstance(text, str) and not text.strip() for text in texts):
        return "no_answer"
    if faults := faults_of({column: row[column] for column in NEEDED[kind]}, kind):
        raise ValueError(faults[0])
    if not rules.wants(row["task"], row["question_id"], row["prompt"]):
        return "questions_of"
    if rules.row_judge is not None:
        verdict = rules.row_judge(raw, row["prompt"], texts[0])
        row["reward"] = 1.0 if verdict == "correct" else None
        if verdict not in ("correct", None):
            return verdict
    if kind == "sft":
        (chain,) = encode_chains(rules.tokenizer, [(row["prompt"], row["completion"])])
        row["length_tokens"], longest = len(chain.completion), chain.longest_sequence
    else:
        (pair,) = encode_dpo(rules.tokenizer, [row], 2**62).rows
        row |= {"prefix_tokens": pair.prefix, "chosen_tokens": len(pair.chosen), "rejected_tokens": len(pair.rejected)}
        longest = pair.longest_sequence
    if longest > rules.settings.max_tokens:
        return "too_long"
    # A rejected side that was cut off may be a loop: that is why it is rejected.
    answered = (True, row.get("rejected_finished", True))
    gates = (rules.failed_gate(text, row["prompt"], answered=end) for text, end in zip(texts, answered, strict=False))
    return next(filter(None, gates), None)


def _has_words(value: Any) -> bool:
    """Whether it is a text, also an empty one, or turns."""
    return isinstance(value, str) or (isinstance(value, list) and bool(value))


class _FileRow:
    """A row of a file as messages, unchecked; `used` has the columns that were read, `not_kept` what they have beside.

    Its methods raise ValueError where it is of no known form.
    """

    def __init__(self, raw: Row) -> None:
        self.raw, self.used, self.not_kept = raw, set[str](), set[str]()

    def sft(self) -> Row:
        """Prompt and completion: of a conversation, of TRL's type, or of a column of each."""
        for column in ("conversations", "messages"):
            if self.raw.get(column):
                self.used.add("system")
                messages = self._messages(column)
                if self.raw.get("system") and messages[0]["role"] != "system":
                    messages.insert(0, {"role": "system", "content": self.raw["system"]})
                return {"prompt": messages[:-1], "completion": messages[-1:]}
        prompt = next((column for column in _PROMPTS if _has_words(self.raw.get(column))), None)
        response = next((column for column in _RESPONSES if _has_words(self.raw.get(column))), None)
        if prompt is None or response is None:
            has = ", ".join(self.raw)
            raise ValueError(f"no `conversations`, no `messages`, and no prompt with a response; it has {has}")
        return {"prompt": self._messages(prompt, "user"), "completion": self._messages(response)}

    def dpo(self) -> Row:
        """Prompt, chosen and rejected, texts or messages; a prompt may be part of both sides instead (TRL's types)."""
        prompt, sides = self.raw.get("prompt"), {}
        for column in ("chosen", "rejected"):
            if not self.raw.get(column) or not isinstance(self.raw[column], str | list):
                raise ValueError(f"no `chosen` and `rejected`, each a text or messages; it has {', '.join(self.raw)}")
            sides[column] = self._messages(column)
        shared = sides["chosen"][:-1]
        if shared and shared == sides["rejected"][:-1] and (isinstance(prompt, str) or not prompt):
            self.used.add("prompt")
            return {"prompt": shared, **{column: side[-1:] for column, side in sides.items()}}
        if not _has_words(prompt):
            raise ValueError("no `prompt`, and `chosen` and `rejected` share none")
        return {"prompt": self._messages("prompt", "user"), **sides}

    def _messages(self, column: str, role: str = "assistant") -> Messages:
        """A column's turns as messages; a text is one message of that role."""
        self.used.add(column)
        turns: Any = self.raw[column]
        if isinstance(turns, str):
            return [{"role": role, "content": turns}]
        messages = []
        for turn in turns:
            try:
                known = ("from", "value") if "from" in turn else ("role", "content")
                messages.append({"role": _ROLES[turn[known[0]]], "content": turn[known[1]]})
            except (KeyError, TypeError) as error:
                raise ValueError(
                    f"a turn is no {{from, value}} or {{role, content}} of a known role ({error})"
                ) from None
            self.not_kept |= {f"{column}.{name}" for name in turn.keys() - {*known} if turn[name] is not None}
        return messages
