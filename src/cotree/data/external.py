"""Long chains of thought that others distilled, as our SFT rows: the data that the paper compares with.

Invariant: texts stay as they are; where the gold answer is known only verified ones stay, and all that is left out is
counted by the same gates as our own chains.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cotree.base.atomic import whole
from cotree.base.errors import UsageError
from cotree.base.rows import Row, read_rows
from cotree.data.chains import Chain
from cotree.data.gates import passes
from cotree.data.kinds import faults_of, write_parquet
from cotree.experiment.recipe import Build
from cotree.models.embedded import locate
from cotree.models.encode import encode_chains, special_words, template_hash
from cotree.models.tokenizer import load_tokenizer
from cotree.tasks import Question, Task
from cotree.tasks import task as find_task
from cotree.tasks.decontamination import contaminated
from cotree.tasks.diagnosis import diagnose

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]
# ShareGPT's names (OpenThoughts).
_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_PROMPTS = ("prompt", "question", "problem", "instruction", "input")
_RESPONSES = ("response", "completion", "generation", "output", "solution")
_GOLDS = ("gold", "answer", "final_answer", "ground_truth")


def import_file(
    source: Path, student: str, out: Path, task: str | None, held_out: Sequence[str], max_tokens: int
) -> str:
    """As `import_rows`, by the names of student and tasks; says what was done."""
    folder_or_hub = Path(student).is_dir() or ("/" in student and not student.endswith(".gguf"))
    tokenizer = load_tokenizer(student if folder_or_hub else locate(student))
    judge = None if task is None else find_task(task)
    questions = [question for name in held_out for question in find_task(name).questions()]
    counts, faults = import_rows(source, tokenizer, out, Build(max_tokens=max_tokens), judge, questions)
    left_out = [f"{name} {n}" for name, n in counts.items() if name not in ("written", "verified")]
    if faults:
        left_out.append(f"malformed {len(faults)} (the first: {faults[0]})")
    told = f"{out}: {counts['written']} rows, {counts['verified']} of them verified"
    return f"{told}; left out: {', '.join(left_out) or 'nothing'}"


def import_rows(
    source: Path,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    settings: Build,
    task: Task | None = None,
    held_out: Sequence[Question] = (),
) -> tuple[dict[str, int], list[str]]:
    """Read a file of long chains, gate them, and write SFT rows to `out` (Parquet).

    The forms: `conversations` ({from, value}: Sky-T1, ShareGPT, OpenThoughts), `messages` ({role, content}: OpenR1),
    and prompt and response columns. task: judges each row whose gold is in the row, or whose question is the task's.
    held_out: evaluation questions; rows that repeat one are left out.

    Returns:
        How many were `written`, how many of them `verified`, and how many each gate left out; and what is wrong with
        each row that is of no known form.

    Raises:
        UsageError: no row passed; `out` stays as it was.
    """
    faults: list[str] = []
    counts: Counter[str] = Counter()
    golds = {_plain(q.messages[-1]["content"]): q for q in task.questions()} if task is not None else {}

    asked = [] if not held_out else [
        Question(str(index), "import", tuple(prompt), "") for index, _, prompt, _ in _well_formed(source, [])
    ]  # fmt: skip
    repeated = contaminated(asked, held_out)
    special = special_words(tokenizer)

    def rows() -> Iterator[Row]:
        seen = set[int]()
        for index, raw, prompt, text in _well_formed(source, faults):
            key = hash((str(prompt), text))
            verdict = _verdict(raw, prompt, text, task, golds)
            found = diagnose(text, answered=None if verdict is None else verdict != "no_answer")
            reasons = {"contaminated": str(index) in repeated, "duplicate": key in seen, "wrong": verdict == "wrong",
                       "no_answer": found.no_answer}  # fmt: skip
            if any(reasons.values()):
                counts[next(name for name, holds in reasons.items() if holds)] += 1
                continue
            seen.add(key)
            (ids,) = encode_chains(tokenizer, [(prompt, [{"role": "assistant", "content": text}])])
            name = str(raw.get("id", index))
            chain = Chain(name, 0, text, verdict or "", float(verdict == "correct"), "external", tuple(ids.completion),
                          len(ids.prompt))  # fmt: skip
            if not passes(chain, " ".join(message["content"] for message in prompt), settings, special, counts):
                continue
            counts["written"] += 1
            counts["verified"] += verdict is not None
            yield {
                "prompt": prompt,
                "completion": [{"role": "assistant", "content": text}],
                "tree_id": name,
                "leaf_id": 0,
                "length_tokens": len(chain.tokens),
                "length_rank": 1,
                "pattern": chain.pattern,
                "reward": chain.reward if verdict is not None else None,
                "task": task.name if task is not None else source.stem,
                "question_id": name,
            }

    noted = {"template": template_hash(tokenizer), "source": source.name}
    with whole(out) as partial:
        if not write_parquet(partial, "sft", rows(), noted):
            fault = f"; {len(faults)} malformed, the first: {faults[0]}" if faults else ""
            raise UsageError(f"no row of {source} passed: {dict(counts) or 'none was judged'}{fault}")
    return dict(sorted(counts.items())), faults


def _well_formed(source: Path, faults: list[str]) -> Iterator[tuple[int, Row, Messages, str]]:
    """Number, row, prompt and response of every row of a known form; what the others lack is added to `faults`."""
    for index, raw in enumerate(read_rows(source)):
        try:
            *prompt, reply = _conversation(raw)
            # An empty reply is well formed: it is a reply without an answer.
            told = reply if str(reply["content"]).strip() else reply | {"content": "-"}
            found = faults_of({"prompt": prompt, "completion": [told]}, "sft")
        except ValueError as error:
            found = [str(error)]
        if found:
            faults.append(f"row {index}: {found[0]}")
        else:
            yield index, raw, prompt, reply["content"]


def _conversation(raw: Row) -> Messages:
    """A row's messages; whether they are whole ones is not looked at.

    Raises:
        ValueError: the row is of no known form.
    """
    turns = raw.get("conversations") or raw.get("messages")
    if turns:
        try:
            named = [
                (turn["from"], turn["value"]) if "from" in turn else (turn["role"], turn["content"]) for turn in turns
            ]
            messages = [{"role": _ROLES[role], "content": content} for role, content in named]
        except (KeyError, TypeError) as error:
            raise ValueError(f"a turn is no {{from, value}} or {{role, content}} of a known role ({error})") from None
        if raw.get("system") and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": raw["system"]})
        return messages
    prompt = next((raw[name] for name in _PROMPTS if isinstance(raw.get(name), str)), None)
    response = next((raw[name] for name in _RESPONSES if isinstance(raw.get(name), str)), None)
    if prompt is None or response is None:
        raise ValueError(f"no `conversations`, no `messages`, and no prompt with a response; it has {', '.join(raw)}")
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def _verdict(raw: Row, prompt: Messages, text: str, task: Task | None, golds: dict[str, Question]) -> str | None:
    """The task's verdict, or None where no gold is known."""
    if task is None:
        return None
    gold: Any = next((raw[name] for name in _GOLDS if raw.get(name) not in (None, "")), None)
    question = golds.get(_plain(prompt[-1]["content"]))
    if question is None and gold is not None:
        question = Question("", task.name, tuple(prompt), str(gold))
    return None if question is None else task.judge(question, text).kind


def _plain(text: str) -> str:
    return " ".join(text.split())
