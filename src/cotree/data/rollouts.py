"""Read rollouts from other tools: JSON lines of prompts with completions and rewards, lm-eval and verifiers samples,
and inspect `.eval` logs.

Invariant: each rollout and column is kept, or counted as left out.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cotree.base.errors import UsageError
from cotree.base.numbers import counted
from cotree.base.rows import Row, read_rows
from cotree.data.file_rows import messages_of, prompt_of
from cotree.tasks import Question, Task, Verdict
from cotree.tasks import task as find_task
from cotree.tasks.base import Asked, Message, Split, WorkedExample
from cotree.tasks.extract import ExtractionMode

_COMPLETIONS = ("completions", "responses", "generations", "samples", "outputs", "rollouts")
_COMPLETION = ("completion", "response", "generation", "output")
_REWARDS = ("rewards", "reward", "scores", "score", "correct")
_GOLDS = ("gold", "answer", "target", "ground_truth", "final_answer")
_IDS = ("question_id", "example_id", "id", "doc_id")
_LENGTH = ("length", "max_tokens", "model_length")
_ZSTANDARD = 93  # zip compression method
_WORTH = {"C": 1.0, "I": 0.0, "P": 0.5, "N": 0.0}  # inspect's grades


@dataclass(frozen=True)
class Rollout:
    """One completion of a question. reward: None if unknown. cut: truncated by max_tokens."""

    text: str
    reward: float | None = None
    cut: bool = False
    model: str = ""


@dataclass
class Rollouts:
    """The rollouts of a file.

    asked: questions with their tasks; `spec` holds a hash of the rollouts. of: {(task, id): rollouts}. left_out:
    {reason: rollouts}. columns_left_out: {column that is not kept: rows that have it}.
    """

    asked: list[Asked]
    of: dict[tuple[str, str], list[Rollout]]
    left_out: Counter[str]
    columns_left_out: Counter[str]

    def lines(self) -> list[str]:
        """Lines for the terminal: rollouts read and left out."""
        number = sum(map(len, self.of.values()))
        left_out = ", ".join(f"{count} {reason}" for reason, count in self.left_out.most_common())
        counts = f"{counted(number, 'rollout')} of {counted(len(self.of), 'question')}"
        lines = [f"{counts}; left out: {left_out or 'nothing'}"]
        if self.columns_left_out:
            columns = ", ".join(f"{name} {count}" for name, count in sorted(self.columns_left_out.items()))
            lines.append(f"columns that are not kept, and how many rows have them: {columns}")
        return lines


class RolloutTask(Task):
    """The task of imported rollouts: verifies with another task, or relies on the rollouts' own rewards."""

    description = "rollouts of others"
    prompt_version = "1"
    generated = False
    comparable = False

    def __init__(self, name: str, judged_by: Task | None = None) -> None:
        super().__init__()
        self.name, self.judged_by = name, judged_by
        self.answer_form = "text" if judged_by is None else judged_by.answer_form
        self.verifier_version = "" if judged_by is None else judged_by.verifier_version

    def questions(self, split: Split | None = None, limit: int | None = None) -> list[Question]:
        """Always empty: the questions are in the file."""
        return []

    def worked_examples(self, question: Question) -> Sequence[WorkedExample]:
        """Always empty."""
        return ()

    def judge(
        self, question: Question, completion: str, finish_reason: str = "stop", mode: ExtractionMode = "strict"
    ) -> Verdict:
        """The other task's verdict; undecided without one."""
        if self.judged_by is None:
            return Verdict("undecided", 0.0, None, "no task was named that judges it")
        return self.judged_by.judge(question, completion, finish_reason, mode)


@dataclass
class _Question:
    """A row's question and rollouts, and the columns that were read."""

    task: str
    id: str | None
    messages: list[Message]
    gold: str
    rollouts: list[Rollout]
    used: set[str]

    def __post_init__(self) -> None:
        """Raises ValueError if a reward is infinite or NaN, or a text has a lone surrogate (neither can be stored)."""
        kept = [self.task, self.id, self.messages, self.gold, *map(astuple, self.rollouts)]
        json.dumps(kept, ensure_ascii=False, allow_nan=False).encode()


def read_rollouts(path: Path, task: str | None = None) -> Rollouts:
    """Read a file of rollouts; rows with the same task and prompt are merged to one question.

    Args:
        task: verifies them, instead of their rewards; gold answers come from its questions with equal prompts.

    Raises:
        UsageError: the file is missing, damaged, or has no rollout in a known format.
    """
    judge = None if task is None else find_task(task)
    found: dict[tuple[str, str], _Question] = {}
    left_out, columns, filters = Counter[str](), Counter[str](), dict[Any, Any]()
    fault = ""
    for number, raw in enumerate(_rows(path)):
        try:
            raw = (
                _trace_row(raw["trace"])
                if "trace" in raw
                else _eval_row(raw["sample"], raw["log"])
                if "sample" in raw
                else raw
            )
            read = _lm_eval_question(raw, path.stem) if "resps" in raw else _question(raw, path.stem)
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            left_out["of no known form"] += 1
            fault = fault or f"row {number}: {error}"
            continue
        if filters.setdefault(raw.get("doc_id") if "resps" in raw else None, raw.get("filter")) != raw.get("filter"):
            left_out["under another filter of lm-eval"] += len(read.rollouts)
            continue
        columns.update(name for name, value in raw.items() if name not in read.used and value not in (None, "", [], {}))
        name = judge.name if judge else read.task
        question = found.setdefault((name, json.dumps(read.messages)), replace(read, rollouts=[]))
        question.rollouts += [rollout for rollout in read.rollouts if rollout.text.strip()]
        left_out["empty"] += sum(not rollout.text.strip() for rollout in read.rollouts)
    found = {key: question for key, question in found.items() if question.rollouts}
    if not found:
        forms = "prompts with completions and rewards, samples of lm-eval or verifiers, or an .eval log of inspect"
        fault = fault or ("all of them are empty" if left_out["empty"] else "no rows")
        raise UsageError(f"{path} holds no rollouts ({fault}); it must have {forms}")
    known = {} if judge is None else {_words(question.messages): question for question in judge.questions()}
    tasks = {name: RolloutTask(name, judge) for name, _ in found}
    asked: list[Asked] = []
    of: dict[tuple[str, str], list[Rollout]] = {}
    for (name, key), question in found.items():
        digest = hashlib.sha256(f"{key}{question.rollouts}".encode("utf-8", "replace")).hexdigest()[:16]
        its_id = question.id if question.id not in (None, *(id_ for of_task, id_ in of if of_task == name)) else None
        unique = its_id or hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()[:12]
        own = known.get(_words(question.messages)) or Question(unique, name, (), question.gold)
        spec = {**own.spec, "rollouts": digest}
        asked.append((tasks[name], replace(own, id=unique, messages=tuple(question.messages), later=(), spec=spec)))
        of[name, unique] = question.rollouts
    return Rollouts(asked, of, +left_out, columns)


def _question(raw: Row, name: str) -> _Question:
    """Parse a row with a prompt and one or several completions, each a text or one assistant message.

    Raises:
        ValueError: prompt or completion is missing, or a completion has several turns.
    """
    messages, used = prompt_of(raw)
    column = next((column for column in (*_COMPLETIONS, *_COMPLETION) if raw.get(column) is not None), None)
    if not messages or column is None:
        raise ValueError(f"no prompt with completions; it has {', '.join(raw)}")
    several = column in _COMPLETIONS and isinstance(raw[column], list)
    replies = raw[column] if several else [raw[column]]
    rewards_of = next((name for name in _REWARDS if raw.get(name) is not None), None)
    rewards = raw[rewards_of] if rewards_of is not None else None
    rewards = rewards if isinstance(rewards, list) else [rewards] * len(replies)
    if len(rewards) != len(replies):
        raise ValueError(f"{len(rewards)} {rewards_of} for {len(replies)} {column}")
    cut, model = raw.get("is_truncated") or raw.get("finish_reason") in _LENGTH, str(raw.get("model") or "")
    golds, ids = (_first(raw, names) for names in (_GOLDS, _IDS))
    used |= {column, "task", "is_truncated", "finish_reason", "model", *filter(None, (rewards_of, golds[0], ids[0]))}
    rollouts = [
        _rollout(reply, reward, cut=bool(cut), model=model) for reply, reward in zip(replies, rewards, strict=True)
    ]
    return _Question(str(raw.get("task") or name), ids[1], messages, golds[1] or "", rollouts, used)


def _rollout(reply: Any, reward: Any, *, cut: bool, model: str) -> Rollout:
    """Parse a completion: a text, an assistant message (alone or in a list), or an object with its own reward."""
    if isinstance(reply, dict) and "role" not in reply:
        text = next((reply[name] for name in ("text", "content", *_COMPLETION) if name in reply), None)
        reward = next((reply[name] for name in _REWARDS if reply.get(name) is not None), reward)
        own = reply.get("is_truncated") or reply.get("finish_reason") in _LENGTH
        return _rollout(text, reward, cut=bool(own) or cut, model=str(reply.get("model") or model))
    called = any(
        isinstance(turn, dict) and turn.get("tool_calls") for turn in (reply if isinstance(reply, list) else [reply])
    )
    messages = [] if called else messages_of(reply)
    if len(messages) != 1 or messages[0]["role"] != "assistant" or not isinstance(messages[0]["content"], str):
        raise ValueError("a completion is a conversation, or calls tools, and no single reply")
    return Rollout(messages[0]["content"], None if reward is None else float(reward), cut, model)


def _lm_eval_question(raw: Row, name: str) -> _Question:
    """Parse a line of lm-eval's `samples_*.jsonl`. Its metric covers all replies of the line, so with several replies
    only cotree's own files have individual rewards."""
    doc, (sent, *_) = raw["doc"], raw["arguments"].values() if isinstance(raw["arguments"], dict) else raw["arguments"]
    prompt = sent["arg_0"] if isinstance(sent, dict) else sent[0]
    turns = json.loads(prompt) if isinstance(prompt, str) and prompt.startswith("[{") else prompt
    texts = [text for request in raw["resps"] for text in (request if isinstance(request, list) else [request])]
    metric = next((name for name in raw.get("metrics") or () if isinstance(raw.get(name), int | float)), None)
    rewards: list[float | None] = [None if metric is None or len(texts) > 1 else float(raw[metric])] * len(texts)
    own = raw.get("cotree") or {}
    cuts = [reason in _LENGTH for reason in own.get("finish_reasons") or [None] * len(texts)]
    if verdicts := own.get("verdicts"):
        rewards = [None if verdict == "undecided" else float(verdict == "correct") for verdict in verdicts]
    rollouts = [Rollout(text, reward, cut) for text, reward, cut in zip(texts, rewards, cuts, strict=True)]
    about = doc if isinstance(doc, dict) else {}
    used = {
        "doc",
        "doc_id",
        "arguments",
        "resps",
        "filtered_resps",
        "filter",
        "metrics",
        "target",
        "cotree",
        metric or "",
    }
    used |= {"doc_hash", "prompt_hash", "target_hash"}
    task, its_id = str(about.get("task") or name), str(about.get("id") or raw["doc_id"])
    return _Question(task, its_id, messages_of(turns, "user"), str(raw.get("target") or ""), rollouts, used)


def _rows(path: Path) -> Iterator[Row]:
    """Read a file's rows; an inspect log's samples become {sample, log}, verifiers' traces {trace}."""
    if path.is_file() and zipfile.is_zipfile(path):
        yield from _eval_rows(path)
        return
    for row in read_rows(path):
        if isinstance(row.get("traces"), list):
            yield from ({"trace": trace} for trace in row["traces"])
        else:
            yield row


def _trace_row(trace: Row) -> Row:
    """Convert a trace of verifiers' `traces.jsonl` to a row; a branching trace has several replies."""
    data = trace["task"]["data"]
    rewards = [
        each["score"] * each.get("weight", 1.0) for each in trace.get("rewards", {}).values() if each is not None
    ]
    ends = [call.get("finish_reason") for call in trace.get("calls") or ()]
    row = {"task": trace["task"].get("type"), "id": data.get("id") or data.get("idx"), "answer": data.get("answer")}
    row |= {"reward": sum(rewards) if rewards else None, "finish_reason": next(iter(ends[-1:]), None)}
    return row | _conversation([node["message"] for node in trace["nodes"]])


def _eval_rows(path: Path) -> Iterator[Row]:
    """Read the samples of an inspect log.

    Raises:
        UsageError: the file is damaged or not a log.
    """
    try:
        with zipfile.ZipFile(path) as log:
            names = log.namelist()
            start = next((name for name in ("header.json", "_journal/start.json", "start.json") if name in names), None)
            if start is None:
                raise UsageError(f"{path} is no log of inspect: it has no header.json")
            about = _read_zipped(log, start)["eval"]
            for name in sorted(name for name in names if name.startswith("samples/") and name.endswith(".json")):
                yield {"sample": _read_zipped(log, name), "log": about}
    except (zipfile.BadZipFile, ValueError, KeyError, OSError, EOFError, NotImplementedError) as error:
        raise UsageError(f"{path} is damaged, or no log of inspect ({error})") from None


def _read_zipped(log: zipfile.ZipFile, name: str) -> Row:
    """Read a JSON object from a zip file, also with inspect's Zstandard compression, which `zipfile` lacks."""
    about = log.getinfo(name)
    if about.compress_type != _ZSTANDARD:
        found: Row = json.loads(log.read(name))
        return found
    import pyarrow as pa

    with Path(str(log.filename)).open("rb") as file:
        file.seek(about.header_offset + 26)  # lengths of the name and the extra field
        file.seek(sum(struct.unpack("<HH", file.read(4))), 1)
        content = pa.BufferReader(file.read(about.compress_size))
    found = json.loads(pa.CompressedInputStream(content, "zstd").read())
    return found


def _eval_row(sample: Row, about: Row) -> Row:
    """Convert a sample of an inspect log to a row, with the first scorer's grade as reward."""
    scores: dict[str, Row] = sample.get("scores") or {}
    grade = next((score.get("value") for score in scores.values()), None)
    target, choice = sample.get("target"), (sample["output"].get("choices") or [{}])[0]
    return {
        "task": about.get("task"),
        "id": str(sample["id"]),
        "reward": _WORTH.get(str(grade), grade) if isinstance(grade, str | int | float) else None,
        "finish_reason": choice.get("stop_reason"),
        "model": about.get("model"),
        "target": target[0] if isinstance(target, list) and target else target,
        **_conversation(sample["messages"], sample.get("attachments") or {}),
    }


def _conversation(turns: Sequence[Row], attached: Mapping[str, str] = MappingProxyType({})) -> Row:
    """Split a conversation into `prompt` (before the first reply) and `completion`; multi-part contents become text.

    attached: texts for references `attachment://HASH`.
    """

    def text_of(content: Any) -> Any:
        if not isinstance(content, list):
            name = content.removeprefix("attachment://") if isinstance(content, str) else ""
            return attached.get(name, content)
        if others := [part["type"] for part in content if part["type"] not in ("text", "reasoning")]:
            raise ValueError(f"a message has {others[0]}, and not text alone")
        thinking = [part["reasoning"].strip() for part in content if part["type"] == "reasoning"]
        said = [text_of(part["text"]) for part in content if part["type"] == "text"]
        return "\n\n".join([*(f"<think>\n{text_of(thought)}\n</think>" for thought in thinking), *said])

    names = ("role", "reasoning_content", "tool_calls")
    messages = [
        {name: turn[name] for name in names if turn.get(name)} | {"content": text_of(turn["content"])} for turn in turns
    ]
    first = next((place for place, turn in enumerate(messages) if turn["role"] == "assistant"), len(messages))
    return {"prompt": messages[:first], "completion": messages[first:]}


def _first(raw: Row, names: Sequence[str]) -> tuple[str | None, str | None]:
    """The first of these columns that a row has, and its value as a string."""
    name = next((name for name in names if isinstance(raw.get(name), str | int | float)), None)
    return name, None if name is None else str(raw[name])


def _words(messages: Sequence[Message]) -> str:
    """The words of the last message, to match rows with questions of a task."""
    return " ".join(messages[-1]["content"].split())
