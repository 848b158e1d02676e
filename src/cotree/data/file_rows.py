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
from cotree.base.progress import one_line
from cotree.base.rows import Row
from cotree.data.gates import Messages, Rules
from cotree.data.kinds import REQUIRED, faults_of, optional_columns
from cotree.models.encode import encode_chains, encode_dpo

# ShareGPT's names (Sky-T1, OpenThoughts).
_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_PROMPTS = ("prompt", "question", "problem", "instruction", "input")
_RESPONSES = ("response", "completion", "generation", "output", "solution")
_TURN_PARTS = {"from", "value", "role", "content"}
_FAULTS_KEPT = 20


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
    """Read rows of any known form as candidate rows (rank, row) of the dataset's kind; the others are counted.

    The rank, a row's place among those of its tree, is 0 for each of them.

    Args:
        name: the task of rows that name none.
    """
    kind, counts, left_out = rules.settings.rows, rules.counts, set[str]()
    read = _prompt_and_completion if kind == "sft" else _prompt_and_sides
    for number, raw in enumerate(rows):
        try:
            messages, used = read(raw)
            own = optional_columns(raw, kind)
            row_id = None if raw.get("id") is None else str(raw["id"])
            asked = blake2b(str(messages["prompt"][-1:]).encode("utf-8", "replace"), digest_size=8).hexdigest()
            known: Row = {"tree_id": row_id or str(number), "task": name, "question_id": row_id or asked}
            known |= {"pattern": "external"} if kind == "sft" else {"rejected_finished": True}
            row = known | own | messages
            reason = _why_left_out(raw, row, rules)
        except (ValueError, UsageError) as error:  # a UsageError: the chat template cannot render it
            counts.leave_out("malformed", rows=1)
            if len(counts.faults) < _FAULTS_KEPT:
                counts.faults.append(f"row {number}: {str(error).removeprefix('row 0: ')}")
            continue
        left_out |= _names(raw) - used - own.keys() - {"id"}
        for column in used:
            turns = raw.get(column)
            if isinstance(turns, list):
                left_out.update(f"{column}.{part}" for turn in turns for part in _names(turn) - _TURN_PARTS)
        if reason is None:
            yield 0, row
        else:
            counts.leave_out(reason, rows=1)
    counts.columns_left_out = sorted(left_out)


def _names(record: Row) -> set[str]:
    """The names of the values that a row or a turn has."""
    return {name for name, value in record.items() if value is not None}


def _why_left_out(raw: Row, row: Row, rules: Rules) -> str | None:
    """The first reason to leave a row out (of `REASONS`), or None; fills in the row's token counts and reward.

    Raises:
        ValueError: a message of it is not what it must be.
    """
    kind = rules.settings.rows
    texts = [row[side][-1]["content"] for side in REQUIRED[kind][1:]]
    if any(isinstance(text, str) and not text.strip() for text in texts):
        return "no_answer"
    if faults := faults_of({column: row[column] for column in REQUIRED[kind]}, kind):
        raise ValueError(faults[0])
    if not rules.allows_question(row["task"], row["question_id"], row["prompt"]):
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
    # A rejected side that was cut off may be a loop: that is why it is rejected.
    answered = (True, row.get("rejected_finished", True))
    failed = (
        rules.failed_gate(text, row["prompt"], longest, answered=end)
        for text, end in zip(texts, answered, strict=False)
    )
    return next(filter(None, failed), None)


def _prompt_and_completion(raw: Row) -> tuple[Row, set[str]]:
    """An SFT row's messages, unchecked, and the columns they are read from: a conversation, TRL's type, or a column of
    each.

    Raises:
        ValueError: it is of no known form.
    """
    for column in ("conversations", "messages"):
        if raw.get(column):
            messages = _messages(raw[column])
            if raw.get("system") and messages[0]["role"] != "system":
                messages.insert(0, {"role": "system", "content": raw["system"]})
            return {"prompt": messages[:-1], "completion": messages[-1:]}, {column, "system"}
    prompt = next((column for column in _PROMPTS if _is_text_or_turns(raw.get(column))), None)
    response = next((column for column in _RESPONSES if _is_text_or_turns(raw.get(column))), None)
    if prompt is None or response is None:
        has = ", ".join(raw)
        raise ValueError(f"no `conversations`, no `messages`, and no prompt with a response; it has {has}")
    return {"prompt": _messages(raw[prompt], "user"), "completion": _messages(raw[response])}, {prompt, response}


def _prompt_and_sides(raw: Row) -> tuple[Row, set[str]]:
    """A pair's messages, unchecked, and the columns they are read from; a prompt may be part of both sides instead.

    Raises:
        ValueError: it is of no known form.
    """
    prompt, used = raw.get("prompt"), {"prompt", "chosen", "rejected"}
    if not all(raw.get(side) and isinstance(raw[side], str | list) for side in ("chosen", "rejected")):
        raise ValueError(f"no `chosen` and `rejected`, each a text or messages; it has {', '.join(raw)}")
    chosen, rejected = _messages(raw["chosen"]), _messages(raw["rejected"])
    shared = chosen[:-1]
    if shared and shared == rejected[:-1] and (isinstance(prompt, str) or not prompt):
        return {"prompt": shared, "chosen": chosen[-1:], "rejected": rejected[-1:]}, used
    if not _is_text_or_turns(prompt):
        raise ValueError("no `prompt`, and `chosen` and `rejected` share none")
    return {"prompt": _messages(prompt, "user"), "chosen": chosen, "rejected": rejected}, used


def _is_text_or_turns(value: Any) -> bool:
    """Whether it is a text, also an empty one, or turns."""
    return isinstance(value, str) or (isinstance(value, list) and bool(value))


def _messages(turns: Any, role: str = "assistant") -> Messages:
    """Turns as messages; a text is one message of that role."""
    if isinstance(turns, str):
        return [{"role": role, "content": turns}]
    try:
        return [
            {"role": _ROLES[turn["from"]], "content": turn["value"]}
            if "from" in turn
            else {"role": _ROLES[turn["role"]], "content": turn["content"]}
            for turn in turns
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"a turn is no {{from, value}} or {{role, content}} of a known role ({error})") from None
