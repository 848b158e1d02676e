"""The files of an evaluation: `results_*.json` and `samples_*.jsonl` with the keys of lm-evaluation-harness.

Invariant: whatever reads lm-eval's output reads these files (keys, shapes, hashes and file names are those of its 0.4
series); what lm-eval has no key for is under `cotree`. Both are made anew from the journal, under the date when the
evaluation began, so running it again replaces them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from cotree.base.atomic import write_json
from cotree.base.errors import UsageError
from cotree.base.rows import write_jsonl
from cotree.eval.asking import Asked, Sampling
from cotree.eval.journal import EvalSample
from cotree.experiment.run_folder import read_json
from cotree.tasks import Question, Task
from cotree.tasks.extract import Mode, spoken

# Ours, by the names of the filters that lm-eval's GSM8K has for the same two things.
_FILTERS: Mapping[str, Mode] = {"strict-match": "strict", "flexible-extract": "lenient"}
_NO_ANSWER = "[invalid]"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One model's numbers: `rows` as `outcome.outcomes`, `instructions` as `outcome.instruction_scores`."""

    model: str
    rows: Sequence[Mapping[str, Any]]
    instructions: Sequence[Mapping[str, Any]]
    baselines: Sequence[Mapping[str, Any]]


def write_results(
    folder: Path,
    evaluation: Evaluation,
    questions: Sequence[Asked],
    samples: Sequence[EvalSample],
    how: Sampling,
    settings: Mapping[str, Any],
    began: datetime,
    seconds: float,
) -> Path:
    """Write both kinds of files; returns the path of `results_*.json`."""
    date = began.isoformat().replace(":", "-")
    tasks = {task.name: task for task, _ in questions}
    rows: dict[str, list[dict[str, Any]]] = {}
    for part, row in sample_rows(questions, samples, how):
        rows.setdefault(part, []).append(row)
    parts = {}
    for part, found in rows.items():
        write_jsonl(folder / f"samples_{part}_{date}.jsonl", found)
        task = tasks[found[0]["doc"]["task"]]
        known = {"original": settings["available"][task.name], "effective": len({row["doc_id"] for row in found})}
        hashes = "".join(row["doc_hash"] + row["prompt_hash"] + row["target_hash"] for row in found)
        parts[part] = {
            "results": _metrics(part, found, evaluation), "group_subtasks": [], "configs": _config(part, task, how),
            "versions": task.prompt_version, "n-shot": 0, "higher_is_better": {"exact_match": True},
            "n-samples": known, "task_hashes": text_hash(hashes),
        }  # fmt: skip
    content = {
        **{key: {part: about[key] for part, about in parts.items()} for key in next(iter(parts.values()))},
        "config": {
            "model": "cotree", "model_args": {"pretrained": settings["model"]}, "model_sha": settings["weights"],
            "limit": settings["limit"], "gen_kwargs": _arguments(how), "random_seed": how.seed,
        },
        "date": began.timestamp(),
        "model_source": "cotree",
        "model_name": evaluation.model,
        "model_name_sanitized": re.sub(r"[\"<>:/|\\?*\[\]]+", "__", evaluation.model),
        "chat_template_sha": settings["template"],
        "total_evaluation_time_seconds": str(seconds),
        "cotree": {**asdict(evaluation), "settings": dict(settings)},
    }  # fmt: skip
    path = folder / f"results_{date}.json"
    write_json(path, content)
    return path


def read_results(folder: Path) -> list[Evaluation]:
    """The evaluation in a folder of `cotree eval`, or those of all models in a run folder.

    Raises:
        UsageError: there is none.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder; give one of `cotree eval`, or a finished run")
    found = sorted(folder.glob("results_*.json"))
    content = read_json(found[-1] if found else folder / "summary.json") or {}
    if isinstance(content.get("cotree"), dict):
        own = content["cotree"]
        return [Evaluation(own["model"], own["rows"], own["instructions"], own["baselines"])]
    if not content.get("eval"):
        raise UsageError(f"no results of an evaluation in {folder}; give a folder of `cotree eval`, or a finished run")

    def of(model: str, key: str) -> list[Mapping[str, Any]]:
        return [row for row in content.get(key, ()) if row["model"] == model]

    models = dict.fromkeys(row["model"] for row in content["eval"])
    return [Evaluation(m, of(m, "eval"), of(m, "instructions"), content.get("baselines", ())) for m in models]


def read_evaluations(folders: Sequence[Path]) -> list[Evaluation]:
    """Those in several folders; where two models have one name, each is called by its folder too."""
    found = [(folder, evaluation) for folder in folders for evaluation in read_results(folder)]
    names = Counter(evaluation.model for _, evaluation in found)
    return [
        replace(evaluation, model=f"{folder.name}: {evaluation.model}") if names[evaluation.model] > 1 else evaluation
        for folder, evaluation in found
    ]


def sample_rows(
    questions: Sequence[Asked], samples: Sequence[EvalSample], how: Sampling
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of lm-eval's sample files with the name of their task, one for each question, turn and filter.

    The samples of a first turn are repeats of one request; a later turn is a request for each sample, because each
    conversation has gone its own way.
    """
    said = {(sample.task, sample.id, sample.turn, sample.sample): sample for sample in samples}
    for index, (task, first) in enumerate(questions):
        asked: list[Question] = [first] * how.samples
        for turn in range(first.turn, first.turn + 1 + len(first.later)):
            found = [said[first.task, first.id, turn, number] for number in range(how.samples)]
            requests = [found] if turn == first.turn else [[sample] for sample in found]
            prompts = [
                json.dumps(how.conversation(task, asked[request[0].sample]), ensure_ascii=False) for request in requests
            ]
            for name in ["none"] if task.answer_form == "text" else _FILTERS:
                yield _slug(found[0].part), _row(index, task, asked[0], requests, prompts, name, how)
            following = [question.follow_up(spoken(s.response)) for question, s in zip(asked, found, strict=True)]
            asked = [question for question in following if question is not None]


def _row(
    index: int,
    task: Task,
    question: Question,
    requests: Sequence[Sequence[EvalSample]],
    prompts: Sequence[str],
    name: str,
    how: Sampling,
) -> dict[str, Any]:
    mode = _FILTERS.get(name, "strict")
    samples = [sample for request in requests for sample in request]
    kinds = [sample.kind if mode == "strict" else sample.lenient or sample.kind for sample in samples]
    answers = [
        [task.extract(sample.response, sample.finish_reason, mode) or _NO_ANSWER for sample in request]
        for request in requests
    ]
    doc = {
        "id": question.id, "task": task.name, "family": question.family, "turn": question.turn,
        "question": question.messages[-1]["content"], "answer": question.gold,
    }  # fmt: skip
    return {
        "doc_id": index,
        "doc": doc,
        "target": question.gold,
        "arguments": {
            f"gen_args_{place}": {"arg_0": prompt, "arg_1": _arguments(how)} for place, prompt in enumerate(prompts)
        },
        "resps": [[sample.response for sample in request] for request in requests],
        "filtered_resps": [found[0] if len(found) == 1 else found for found in answers],
        "filter": name,
        "metrics": ["exact_match"],
        "doc_hash": text_hash(json.dumps(doc, indent=2, ensure_ascii=False)),
        "prompt_hash": text_hash(prompts[0]),
        "target_hash": text_hash(question.gold),
        "exact_match": fmean(kind == "correct" for kind in kinds),
        "cotree": {
            "verdicts": kinds,
            "finish_reasons": [sample.finish_reason for sample in samples],
            "tokens": [sample.tokens for sample in samples],
        },
    }


def _metrics(part: str, rows: Sequence[Mapping[str, Any]], evaluation: Evaluation) -> dict[str, Any]:
    found: dict[str, Any] = {"name": part, "alias": part, "sample_len": len({row["doc_id"] for row in rows})}
    for name in dict.fromkeys(row["filter"] for row in rows):
        values = [float(row["exact_match"]) for row in rows if row["filter"] == name]
        found[f"exact_match,{name}"] = fmean(values)
        found[f"exact_match_stderr,{name}"] = stdev(values) / len(values) ** 0.5 if len(values) > 1 else "N/A"
    turn = rows[0]["doc"]["turn"] + 1
    scores = [s for s in evaluation.instructions if (s["task"], s["turn"]) == (rows[0]["doc"]["task"], turn)]
    for score in scores:
        group = "none" if len(scores) == 1 else score["group"]
        for level in ("strict", "loose"):
            found[f"prompt_level_{level}_acc,{group}"] = score[f"prompt_{level}"]
            found[f"inst_level_{level}_acc,{group}"] = score[f"instruction_{level}"]
    return found


def _config(part: str, task: Task, how: Sampling) -> dict[str, Any]:
    return {
        "task": part,
        "dataset_path": None if task.source is None else task.source.hub,
        "output_type": "generate_until",
        "num_fewshot": 0,
        "repeats": how.samples,
        "generation_kwargs": _arguments(how),
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": task.prompt_version},
    }


def _arguments(how: Sampling) -> dict[str, Any]:
    sampled = {"do_sample": how.temperature > 0, "temperature": how.temperature, "top_p": how.top_p}
    return {"until": [], "max_gen_toks": how.max_tokens, **sampled}


def _slug(part: str) -> str:
    """A part's name as lm-eval's tasks are named, fit for a file: `multi_if, turn 2` is `multi_if_turn_2`."""
    return re.sub(r"\W+", "_", part)


def text_hash(text: str) -> str:
    """The sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()
