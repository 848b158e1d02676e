"""The files of an evaluation: `results_*.json` and `samples_*.jsonl` with the keys of lm-evaluation-harness.

Whatever reads lm-eval's output reads these files (keys, shapes, hashes and file names are those of its 0.4 series);
what lm-eval has no key for is under `cotree`. Both are made anew from the journal, under the date of the first time, so
an evaluation that is run again replaces them.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from cotree.base.atomic import write_json
from cotree.base.rows import Row, write_jsonl
from cotree.base.run_folder import read_json
from cotree.eval.journal import EvalSample, content_hash
from cotree.eval.metrics import Evaluated
from cotree.eval.samplers import conversation
from cotree.eval.settings import Asking
from cotree.models.identity import identity
from cotree.models.settings import Model
from cotree.tasks.base import Asked, Question, Task
from cotree.tasks.extract import ExtractionMode, visible_text

# Ours, by the names of the filters that lm-eval's GSM8K has for the same two things; of free texts there is one.
_FILTERS: Mapping[str, ExtractionMode] = {"strict-match": "strict", "flexible-extract": "lenient", "none": "strict"}
_DATE = "%Y-%m-%dT%H-%M-%S.%f"  # in the files' names


def write_results(
    folder: Path,
    evaluated: Evaluated,
    questions: Sequence[Asked],
    samples: Sequence[EvalSample],
    *,
    asking: Asking,
    model: Model,
    available: Mapping[str, int],
) -> None:
    """Write both kinds of files in place of those of an earlier time.

    Args:
        available: how many questions a task has in all, by task; by default as many as were asked.
    """
    before = [*folder.glob("results_????-??-??T*.json"), *folder.glob("samples_*_????-??-??T*.jsonl")]
    date = before[0].stem.rpartition("_")[2] if before else datetime.now().strftime(_DATE)
    tasks = {task.name: task for task, _ in questions}
    by_key: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    written = [folder / f"results_{date}.json"]
    for name, rows in _rows_by_name(questions, samples, asking).items():
        written.append(folder / f"samples_{name}_{date}.jsonl")
        write_jsonl(written[-1], rows)
        task = tasks[rows[0]["doc"]["task"]]
        n = len({row["doc_id"] for row in rows})
        hashes = [row["doc_hash"] + row["prompt_hash"] + row["target_hash"] for row in rows]
        about = {
            "results": _metrics(name, rows, evaluated),
            "group_subtasks": [],
            "configs": {
                "task": name,
                "dataset_path": None if task.source is None else task.source.hub,
                "output_type": "generate_until",
                "num_fewshot": 0,
                "repeats": asking.samples,
                "generation_kwargs": _arguments(asking),
                "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
                "metadata": {"version": task.prompt_version},
            },
            "versions": task.prompt_version,
            "n-shot": 0,
            "higher_is_better": {"exact_match": True},
            "n-samples": {"original": available.get(task.name, n), "effective": n},
            "task_hashes": content_hash("".join(hashes)),
        }
        for key, value in about.items():
            by_key[key][name] = value
    cut = [n["effective"] for n in by_key["n-samples"].values() if n["effective"] < n["original"]]
    asked = {name: [question.id for task, question in questions if task.name == name] for name in tasks}
    content = {
        **by_key,
        "config": {
            "model": "cotree",
            "model_args": {"pretrained": model.weights or model.model},
            "model_sha": identity(model).get("weights"),
            "limit": max(cut, default=None),
            "gen_kwargs": _arguments(asking),
            "random_seed": asking.seed,
        },
        "date": datetime.strptime(date, _DATE).timestamp(),
        "model_source": "cotree",
        "model_name": evaluated.model,
        "model_name_sanitized": re.sub(r"[\"<>:/|\\?*\[\]]+", "__", evaluated.model),
        "cotree": {**asdict(evaluated), "asking": asking.model_dump(mode="json"), "questions": asked},
    }
    write_json(written[0], content)
    for old in set(before).difference(written):
        old.unlink()


def questions_asked(folder: Path) -> set[tuple[str, str]] | None:
    """(task, question id) of what the results in a folder are about; None where none are written yet."""
    for path in folder.glob("results_*.json"):
        asked = (read_json(path) or {})["cotree"]["questions"]
        return {(task, id_) for task, ids in asked.items() for id_ in ids}
    return None


def _rows_by_name(questions: Sequence[Asked], samples: Sequence[EvalSample], asking: Asking) -> dict[str, list[Row]]:
    """The rows of lm-eval's sample files by the names of their tasks, one for each question, turn and filter.

    The samples of a first turn are repeats of one request; a later turn is a request for each sample, because each
    conversation has gone its own way. A name is fit for a file: `multi_if, turn 2` is `multi_if_turn_2`.
    """
    by_key = {sample.key: sample for sample in samples}
    rows: defaultdict[str, list[Row]] = defaultdict(list)
    for index, (task, first) in enumerate(questions):
        asked = [first] * asking.samples
        while asked:
            question = asked[0]
            found = [by_key[question.task, question.id, question.turn, number] for number in range(asking.samples)]
            requests = [found] if question is first else [[sample] for sample in found]
            conversations = [conversation(task, asked[request[0].sample], asking) for request in requests]
            prompts = [json.dumps(messages, ensure_ascii=False) for messages in conversations]
            about = {"doc_id": index, **_about_question(task, question, prompts, asking)}
            for name in ("none",) if task.answer_form == "text" else ("strict-match", "flexible-extract"):
                rows[re.sub(r"\W+", "_", found[0].task_turn)].append(about | _about_replies(task, requests, name))
            following = [each.follow_up(visible_text(s.response)) for each, s in zip(asked, found, strict=True)]
            asked = [each for each in following if each is not None]
    return rows


def _about_question(task: Task, question: Question, prompts: Sequence[str], asking: Asking) -> Row:
    doc = {
        "id": question.id,
        "task": task.name,
        "family": question.family,
        "turn": question.turn,
        "question": question.messages[-1]["content"],
        "answer": question.gold,
    }
    arguments = [{"arg_0": prompt, "arg_1": _arguments(asking)} for prompt in prompts]
    return {
        "doc": doc,
        "target": question.gold,
        "arguments": {f"gen_args_{place}": given for place, given in enumerate(arguments)},
        "metrics": ["exact_match"],
        "doc_hash": content_hash(json.dumps(doc, indent=2, ensure_ascii=False)),
        "prompt_hash": content_hash(prompts[0]),
        "target_hash": content_hash(question.gold),
    }


def _about_replies(task: Task, requests: Sequence[Sequence[EvalSample]], name: str) -> Row:
    """The replies under one filter."""
    mode = _FILTERS[name]
    samples = [sample for request in requests for sample in request]
    verdicts = [s.verdict if mode == "strict" else s.lenient_verdict or s.verdict for s in samples]
    answers = [
        [task.extract(sample.response, sample.finish_reason, mode) or "[invalid]" for sample in request]
        for request in requests
    ]
    return {
        "resps": [[sample.response for sample in request] for request in requests],
        "filtered_resps": [found[0] if len(found) == 1 else found for found in answers],
        "filter": name,
        "exact_match": fmean(verdict == "correct" for verdict in verdicts),
        "cotree": {
            "verdicts": verdicts,
            "finish_reasons": [sample.finish_reason for sample in samples],
            "tokens": [sample.tokens for sample in samples],
        },
    }


def _metrics(name: str, rows: Sequence[Row], evaluated: Evaluated) -> dict[str, Any]:
    """lm-eval's metrics of one task, each by filter: "exact_match,strict-match"."""
    found: dict[str, Any] = {"name": name, "alias": name, "sample_len": len({row["doc_id"] for row in rows})}
    for filter_ in dict.fromkeys(row["filter"] for row in rows):
        values = [float(row["exact_match"]) for row in rows if row["filter"] == filter_]
        found[f"exact_match,{filter_}"] = fmean(values)
        found[f"exact_match_stderr,{filter_}"] = stdev(values) / len(values) ** 0.5 if len(values) > 1 else "N/A"
    doc = rows[0]["doc"]
    scores = [s for s in evaluated.instructions if (s.task, s.turn) == (doc["task"], doc["turn"] + 1)]
    for score in scores:
        group = "none" if len(scores) == 1 else score.group
        for level, field in (("prompt", "prompt"), ("inst", "instruction")):
            found[f"{level}_level_strict_acc,{group}"] = getattr(score, f"{field}_strict")
            found[f"{level}_level_loose_acc,{group}"] = getattr(score, f"{field}_loose")
    return found


def _arguments(asking: Asking) -> dict[str, Any]:
    sampled = {"do_sample": asking.temperature > 0, "temperature": asking.temperature, "top_p": asking.top_p}
    return {"until": [], "max_gen_toks": asking.max_tokens, **sampled}
