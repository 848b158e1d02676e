"""Write an evaluation's `results_*.json` and `samples_*.jsonl` in the format of lm-evaluation-harness.

Tools for lm-eval's output can read these files (keys, shapes, hashes and file names of its 0.4 series); other values
are under `cotree`. Both are regenerated from the journal under the date of the first run, so later runs replace them.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime
from statistics import fmean, stdev
from typing import Any

from cotree.base.atomic import write_json
from cotree.base.rows import Row, write_jsonl
from cotree.eval.journal import EvalSample, content_hash
from cotree.eval.samplers import conversation
from cotree.eval.scores import ModelScores
from cotree.eval.settings import AskSettings
from cotree.models.resolve import identity, tokenizer_source
from cotree.models.settings import Model
from cotree.models.tokenizer import load_tokenizer
from cotree.tasks.base import Asked, Question, Task
from cotree.tasks.extract import ExtractionMode, visible_text

# Our extraction modes by the filter names of lm-eval's GSM8K; free texts have only one.
_FILTERS: Mapping[str, ExtractionMode] = {"strict-match": "strict", "flexible-extract": "lenient", "none": "strict"}
_DATE = "%Y-%m-%dT%H-%M-%S.%f"  # in file names


def write_results(
    scores: ModelScores,
    questions: Sequence[Asked],
    samples: Sequence[EvalSample],
    *,
    asking: AskSettings,
    model: Model,
    available: Mapping[str, int],
    seconds: float,
) -> None:
    """Write results and samples files to `scores.folder`, replacing earlier ones.

    Args:
        available: {task: number of all its questions}; by default the number asked.
        seconds: duration of the evaluation over all attempts.
    """
    folder, arguments = scores.folder, _generation_arguments(asking)
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
        about = {
            "results": _metrics(name, rows, scores),
            "group_subtasks": [],
            "configs": {
                "task": name,
                "dataset_path": None if task.source is None else task.source.hub,
                "output_type": "generate_until",
                "num_fewshot": 0,
                "repeats": asking.samples,
                "generation_kwargs": arguments,
                "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
                "metadata": {"version": task.prompt_version},
            },
            "versions": task.prompt_version,
            "n-shot": 0,
            "higher_is_better": {"exact_match": True},
            "n-samples": {"original": available.get(task.name, n), "effective": n},
            "task_hashes": content_hash("".join(r["doc_hash"] + r["prompt_hash"] + r["target_hash"] for r in rows)),
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
            "gen_kwargs": arguments,
            "random_seed": asking.seed,
        },
        "date": datetime.strptime(date, _DATE).timestamp(),
        "total_evaluation_time_seconds": str(seconds),
        "chat_template_sha": _chat_template_hash(model),
        "model_source": "cotree",
        "model_name": scores.model,
        "model_name_sanitized": re.sub(r"[\"<>:/|\\?*\[\]]+", "__", scores.model),
        "cotree": {**scores.model_dump(), "asking": asking.model_dump(mode="json"), "questions": asked},
    }
    write_json(written[0], content)
    for old in set(before).difference(written):
        old.unlink()


def _rows_by_name(
    questions: Sequence[Asked], samples: Sequence[EvalSample], asking: AskSettings
) -> dict[str, list[Row]]:
    """{task name: rows of lm-eval's sample files}, one row per question, turn and filter.

    Samples of a first turn are repeats of one request; later turns have a request per sample, as conversations differ.
    Names are made safe for files: `multi_if, turn 2` is `multi_if_turn_2`.
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
            about = {"doc_id": index, **_question_columns(task, question, prompts, asking)}
            for name in ("none",) if task.answer_form == "text" else ("strict-match", "flexible-extract"):
                rows[re.sub(r"\W+", "_", found[0].task_turn)].append(about | _reply_columns(task, requests, name))
            following = [each.follow_up(visible_text(s.response)) for each, s in zip(asked, found, strict=True)]
            asked = [each for each in following if each is not None]
    return rows


def _question_columns(task: Task, question: Question, prompts: Sequence[str], asking: AskSettings) -> Row:
    """The question's columns of a row, with lm-eval's hashes."""
    doc = {
        "id": question.id,
        "task": task.name,
        "family": question.family,
        "turn": question.turn,
        "question": question.messages[-1]["content"],
        "answer": question.gold,
    }
    arguments = _generation_arguments(asking)
    return {
        "doc": doc,
        "target": question.gold,
        "arguments": {f"gen_args_{i}": {"arg_0": prompt, "arg_1": arguments} for i, prompt in enumerate(prompts)},
        "metrics": ["exact_match"],
        "doc_hash": content_hash(json.dumps(doc, indent=2, ensure_ascii=False)),
        "prompt_hash": content_hash(prompts[0]),
        "target_hash": content_hash(question.gold),
    }


def _reply_columns(task: Task, requests: Sequence[Sequence[EvalSample]], filter_name: str) -> Row:
    """The reply's columns of a row, and the answers that a filter extracts.

    `exact_match` is None, and excluded from metrics, if a sample is undecided, as in `TaskScores`.
    """
    mode = _FILTERS[filter_name]
    samples = [sample for request in requests for sample in request]
    verdicts = [s.verdict if mode == "strict" else s.lenient_verdict or s.verdict for s in samples]
    answers = [[task.extract(s.response, s.finish_reason, mode) or "[invalid]" for s in each] for each in requests]
    exact = None if "undecided" in verdicts else fmean(verdict == "correct" for verdict in verdicts)
    return {
        "resps": [[sample.response for sample in request] for request in requests],
        "filtered_resps": [found[0] if len(found) == 1 else found for found in answers],
        "filter": filter_name,
        "exact_match": exact,
        "cotree": {
            "verdicts": verdicts,
            "finish_reasons": [sample.finish_reason for sample in samples],
            "tokens": [sample.tokens for sample in samples],
        },
    }


def _metrics(name: str, rows: Sequence[Row], scores: ModelScores) -> dict[str, Any]:
    """lm-eval's metrics of one task, by metric and filter: "exact_match,strict-match"."""
    found: dict[str, Any] = {"name": name, "alias": name, "sample_len": len({row["doc_id"] for row in rows})}
    for filter_name in dict.fromkeys(row["filter"] for row in rows):
        exact = [row["exact_match"] for row in rows if row["filter"] == filter_name]
        values = [float(value) for value in exact if value is not None]
        if not values:
            continue
        found[f"exact_match,{filter_name}"] = fmean(values)
        found[f"exact_match_stderr,{filter_name}"] = stdev(values) / len(values) ** 0.5 if len(values) > 1 else "N/A"
    doc = rows[0]["doc"]
    groups = [s for s in scores.instructions if (s.task, s.turn) == (doc["task"], doc["turn"] + 1)]
    for group in groups:
        name = "none" if len(groups) == 1 else group.group
        found[f"prompt_level_strict_acc,{name}"] = group.prompt_strict
        found[f"prompt_level_loose_acc,{name}"] = group.prompt_loose
        found[f"inst_level_strict_acc,{name}"] = group.instruction_strict
        found[f"inst_level_loose_acc,{name}"] = group.instruction_loose
    return found


def _chat_template_hash(model: Model) -> str | None:
    """SHA-256 of the chat template; None if a server renders prompts or the model has none."""
    source = tokenizer_source(model)
    if source is None or model.mode == "chat":
        return None
    template = load_tokenizer(source, chats=False).chat_template
    return content_hash(template) if template else None


def _generation_arguments(asking: AskSettings) -> dict[str, Any]:
    """lm-eval's `gen_kwargs`."""
    sampled = {"do_sample": asking.temperature > 0, "temperature": asking.temperature, "top_p": asking.top_p}
    return {"until": [], "max_gen_toks": asking.max_tokens, **sampled}
