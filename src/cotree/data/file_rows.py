"""Convert rows of a file or hub dataset to candidate rows: cotree's and TRL's formats, ShareGPT, Alpaca and others.

Texts are not changed. Rows in an unknown format or removed by a gate, and dropped columns, are counted and named.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from cotree.base.errors import UsageError
from cotree.base.progress import one_line
from cotree.base.rows import Row
from cotree.data.gates import Messages, Rules
from cotree.data.kinds import REQUIRED, faults_of, optional_columns
from cotree.models.encode import RowError, encode_chains, encode_dpo

# ShareGPT's names (Sky-T1, OpenThoughts).
_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_PROMPTS = ("prompt", "question", "problem", "instruction", "input")
_RESPONSES = ("response", "completion", "generation", "output", "solution")
# {column with reasoning only (s1K, OpenThoughts): column with its answer, or None}
_REASONINGS = {
    "reasoning_content": None,
    "reasoning": None,
    "thinking": None,
    "thinking_trajectories": None,
    "deepseek_thinking_trajectory": "deepseek_attempt",
    "deepseek_reasoning": "deepseek_solution",
}
_MESSAGE_REASONINGS = ("reasoning_content", "reasoning", "thinking")
_SYSTEMS = ("system", "system_prompt")
_SIDES = (("chosen", "rejected"), ("chosen_response", "rejected_response"))  # Argilla's are the second
_SPEAKERS = re.compile(r"\n\n(Human|Assistant):")  # hh-rlhf stores a conversation as one text
_FAULTS_KEPT = 20


def hub_rows(name: str) -> Iterator[Row]:
    """Read a hub dataset, `OWNER/NAME` or `OWNER/NAME@REVISION`: its `train` split, or its only one.

    Raises:
        UsageError: the hub is unreachable, the dataset is missing, or it has several configurations or splits.
    """
    import huggingface_hub
    from datasets import load_dataset

    repository, _, revision = name.partition("@")
    try:
        if not Path(repository).is_dir() and not huggingface_hub.is_offline_mode():
            # Check the connection first: `datasets` would retry for half a minute without a hub.
            huggingface_hub.HfApi().dataset_info(repository, timeout=10)
        splits = load_dataset(repository, revision=revision or None)
        if "train" not in splits and len(splits) > 1:
            raise ValueError(f"it has the splits {', '.join(splits)}; download one and give it as file")
        return iter(splits["train"] if "train" in splits else next(iter(splits.values())))
    except Exception as error:  # noqa: BLE001 - the hub client and `datasets` raise dozens of unrelated types
        reason = one_line(str(error))[:200] or type(error).__name__
        raise UsageError(f"cannot load {name} from the hub: {reason}") from None


def file_rows(rows: Iterable[Row], rules: Rules, name: str) -> Iterator[tuple[int, Row]]:
    """Convert rows of any known format to candidate rows (rank, row) of the dataset's kind; counts the others.

    The rank is 0, as these rows come from no tree.

    Args:
        name: the task of rows that have none.
    """
    kind, counts, left_out = rules.settings.rows, rules.counts, Counter[str]()
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
        except RowError as error:
            counts.leave_out(error.reason, rows=1)
            if len(counts.template_faults) < _FAULTS_KEPT:
                counts.template_faults.append(f"row {number}: {str(error).removeprefix('row 0: ')}")
            continue
        except (ValueError, UsageError) as error:
            counts.leave_out("malformed", rows=1)
            if len(counts.faults) < _FAULTS_KEPT:
                counts.faults.append(f"row {number}: {str(error).removeprefix('row 0: ')}")
            continue
        left_out.update(_names(raw) - used - own.keys() - {"id"})
        for column in used:
            turns = [raw[column]] if isinstance(raw.get(column), dict) else raw.get(column)
            if isinstance(turns, list):
                records = [turn for turn in turns if isinstance(turn, dict)]
                left_out.update(
                    {f"{column}.{part}" for turn in records for part in _names(turn) - {*_turn_parts(turn)}}
                )
        if reason is None:
            yield 0, row
        else:
            counts.leave_out(reason, rows=1)
    counts.columns_left_out = dict(left_out)


def _names(record: Row) -> set[str]:
    """The names of a row's or turn's non-empty values."""
    return {name for name, value in record.items() if value not in (None, "", [])}


def _why_left_out(raw: Row, row: Row, rules: Rules) -> str | None:
    """The first reason (of `REASONS`) to leave out a row, or None; adds token counts and reward to the row.

    Raises:
        ValueError: a message is invalid.
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
    """An SFT row's prompt and completion, not validated, and the columns that they come from: a conversation, TRL's
    format, or one column each.

    Raises:
        ValueError: unknown format.
    """
    if column := _conversation(raw):
        messages, used = _with_system(raw, messages_of(raw[column]))
        return {"prompt": messages[:-1], "completion": messages[-1:]}, {column, *used}
    responses = [answer for name, answer in _REASONINGS.items() if answer and raw.get(name)]
    response = next((column for column in (*responses, *_RESPONSES) if _is_text_or_turns(raw.get(column))), None)
    prompt, used = prompt_of(raw)
    if not prompt or response is None:
        has = ", ".join(raw)
        raise ValueError(f"no `conversations`, no `messages`, and no prompt with a response; it has {has}")
    completion = messages_of(raw[response])
    reasonings = [name for name, answer in _REASONINGS.items() if raw.get(name) and answer in (None, response)]
    for name in reasonings[:1]:
        thoughts = raw[name] if isinstance(raw[name], list) else [raw[name]]
        if all(isinstance(thought, str) for thought in thoughts):
            completion[-1]["content"] = _reasoned("\n\n".join(thoughts), completion[-1]["content"])
            used.add(name)
    return {"prompt": prompt, "completion": completion}, used | {response}


def _prompt_and_sides(raw: Row) -> tuple[Row, set[str]]:
    """A pair's prompt and sides, not validated, and the columns that they come from; both sides may include the prompt.

    Raises:
        ValueError: unknown format.
    """
    if not all(raw.get(side) and isinstance(raw[side], str | list | dict) for side in sides_of(raw)):
        raise ValueError(f"no `chosen` and `rejected`, each a text or messages; it has {', '.join(raw)}")
    chosen, rejected = (messages_of(_dialogue(raw[side])) for side in sides_of(raw))
    prompt, used = prompt_of(raw)
    if column := _conversation(raw):
        turns = messages_of(raw[column])
        if turns not in (chosen, rejected):  # UltraFeedback repeats the chosen side here
            prompt, used = _with_system(raw, turns)
        used.add(column)
    if chosen[:-1] and chosen[:-1] == rejected[:-1]:
        shared, systems = _with_system(raw, chosen[:-1])
        said = "\n".join(str(message["content"]) for message in shared)
        if not all(str(message["content"]) in said for message in prompt):
            raise ValueError("the prompt is none that `chosen` and `rejected` begin with")
        prompt, chosen, rejected, used = shared, chosen[-1:], rejected[-1:], used | systems
    if not prompt:
        raise ValueError("no `prompt`, and `chosen` and `rejected` share none")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}, used | {*sides_of(raw)}


def sides_of(raw: Row) -> tuple[str, str]:
    """The columns of chosen and rejected: the first names in `_SIDES` with values, else the first that exist."""
    return max(_SIDES, key=lambda names: (all(map(raw.get, names)), {*names} <= raw.keys()))


def _dialogue(side: Any) -> Any:
    """Split a transcript with `Human:` and `Assistant:` (hh-rlhf) into turns; anything else is returned unchanged."""
    if not isinstance(side, str) or not _SPEAKERS.match(side):
        return side
    _, *parts = _SPEAKERS.split(side)
    return [{"role": who.lower(), "content": text.strip()} for who, text in zip(parts[::2], parts[1::2], strict=True)]


def _conversation(raw: Row) -> str | None:
    """The name of the column with the whole conversation, or None."""
    return next((column for column in ("conversations", "messages") if raw.get(column)), None)


def prompt_of(raw: Row) -> tuple[Messages, set[str]]:
    """The prompt of a row without a conversation, and its columns: one column, or Alpaca's `history`, instruction and
    input (joined by a newline)."""
    column = next((column for column in _PROMPTS if _is_text_or_turns(raw.get(column))), None)
    if column is None:
        return [], set()
    messages, used = messages_of(raw[column], "user"), {column}
    if column == "instruction" and isinstance(raw[column], str):
        given, history = raw.get("input"), raw.get("history")
        if given and isinstance(given, str):
            messages[0]["content"] = "\n".join(filter(None, (raw[column], given)))
            used.add("input")
        if history:
            messages[:0] = _earlier(history)
            used.add("history")
    messages, systems = _with_system(raw, messages)
    return messages, used | systems


def _earlier(history: Any) -> Messages:
    """Convert `history` to messages: Alpaca's lists of [question, answer], or conversation turns.

    Raises:
        ValueError: it is neither.
    """
    turns = history if isinstance(history, list) else [history]
    if all(isinstance(turn, dict) for turn in turns):
        return messages_of(turns)
    if not all(isinstance(turn, list) and [*map(type, turn)] == [str, str] for turn in turns):
        raise ValueError("`history` is no list of [question, answer], each a text")
    said = (zip(("user", "assistant"), turn, strict=True) for turn in turns)
    return [{"role": role, "content": text} for turn in said for role, text in turn]


def _with_system(raw: Row, messages: Messages) -> tuple[Messages, set[str]]:
    """Prepend the system message of a separate column, unless the messages have one; also returns the column used."""
    column = next((column for column in _SYSTEMS if raw.get(column)), None)
    if column is None:
        return messages, set()
    first = {"role": "system", "content": raw[column]}
    if messages[0]["role"] == "system":
        return messages, {column} if messages[0] == first else set()
    return [first, *messages], {column}


def _is_text_or_turns(value: Any) -> bool:
    """Whether a value is a string (maybe empty) or a list of turns."""
    return isinstance(value, str) or (isinstance(value, list) and bool(value))


def messages_of(turns: Any, role: str = "assistant") -> Messages:
    """Convert turns, a single turn, or a text (with the given role) to messages."""
    if isinstance(turns, str):
        return [{"role": role, "content": turns}]
    try:
        return [_message(turn) for turn in ([turns] if isinstance(turns, dict) else turns)]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a turn is no {{from, value}} or {{role, content}} of a known role ({error})") from None


def _message(turn: Mapping[str, Any]) -> dict[str, str]:
    """Convert a turn to a message, merging a separate reasoning field; of alternative field names, takes the non-null
    ones (Arrow gives every row all fields)."""
    parts = _turn_parts(turn)
    role, content = _ROLES[turn[parts[0]]], turn[parts[1]]
    for name in parts[2:]:
        content = _reasoned(turn[name], content or "")
    return {"role": role, "content": content}


def _turn_parts(turn: Mapping[str, Any]) -> tuple[str, ...]:
    """The field names of a turn's role, text, and reasoning if any."""
    pair = ("role", "content") if turn.get("role") is not None else ("from", "value")
    reasonings = (name for name in _MESSAGE_REASONINGS if turn.get(name) and isinstance(turn[name], str))
    reasoning = next(reasonings, None) if _ROLES.get(turn.get(pair[0], "")) == "assistant" else None
    return pair if reasoning is None else (*pair, reasoning)


def _reasoned(reasoning: str, answer: Any) -> Any:
    """Prepend reasoning in think tags to an answer, unless the answer contains it already."""
    if not isinstance(answer, str) or not reasoning.strip() or reasoning.strip() in answer:
        return answer
    return f"<think>\n{reasoning.strip()}\n</think>\n\n{answer.strip()}"
