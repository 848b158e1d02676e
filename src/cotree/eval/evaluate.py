"""One model on some tasks, without a recipe: a server, a GGUF, an embedded model or a transformers folder.

Invariant: a folder holds one model asked in one way, which `settings.json` tells; the same call goes on in it, another
one is refused.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from cotree.base.atomic import write_json
from cotree.base.errors import UsageError, spoken_for
from cotree.base.progress import Output
from cotree.eval.asking import (
    Asked,
    Sampling,
    Strategy,
    ask,
    check_distinct,
    check_lengths,
    embedded,
    opened_server,
    plain,
)
from cotree.eval.journal import JOURNAL, read_samples
from cotree.eval.outcome import constant_baselines, instruction_scores, outcomes
from cotree.eval.results import Evaluation, text_hash, write_results
from cotree.eval.searching import searched
from cotree.experiment.recipe import GGUFType, Model
from cotree.experiment.run_folder import read_json
from cotree.models.embedded import at_type, cache_folder, locate
from cotree.models.endpoints import Endpoint, check_servers
from cotree.models.tokenizer import load_tokenizer
from cotree.tasks import task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def evaluate(
    model: str,
    tasks: Sequence[str],
    *,
    max_tokens: int = 1024,
    samples: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    data: str | Path | None = None,
    family: str | None = None,
    limit: int | None = None,
    name: str | None = None,
    out: Path | None = None,
    gguf: str | None = None,
    base: str = "smollm2-135m-instruct",
    served: str = "default",
    tokenizer: str | None = None,
    chat: bool = False,
    api_key_env: str | None = None,
    max_in_flight: int = 16,
    strategy: str | None = None,
    value: str | None = None,
    budget_tokens: int | None = None,
    output: Output | None = None,
) -> Evaluation:
    """Evaluate a model; calling it again resumes.

    Args:
        model: the URL of an OpenAI-compatible server, a `.gguf` file, an embedded model's name, or a transformers
            folder, which is written as GGUF first (its metadata and tokenizer come from `base`).
        tasks: names as in `cotree tasks`, or own tasks; their test questions are asked.
        samples: completions a question; more than one need a temperature. The default is one greedy completion.
        data: where the tasks' rows are, as in `cotree.task`.
        family: only questions of this family: "3 blocks", "English", "Algebra". limit: the first so many of a task.
        name: of the model, in tables. out: the folder, by default `runs/evals/NAME`.
        gguf: F32, F16 or Q8_0; by default a file is served as it is, and everything else as Q8_0.
        served, tokenizer, chat, api_key_env, max_in_flight: of a server, as `model`, `tokenizer`, `mode: chat`,
            `api_key_env` and `max_in_flight` of a recipe's model.
        strategy: decode with search (`mcts`, `vote`, `best_of_n`, `beam`; docs/decoding.md) from its worked examples,
            for about `budget_tokens` generated tokens a sample; `value` is what it goes by.

    Raises:
        UsageError: found before any question was asked.
        CotreeError: work failed after it had started; the same call resumes it.
    """
    if samples > 1 and temperature == 0:
        raise UsageError("greedy samples are all alike: several samples need a temperature, e.g. --temperature 0.8")
    if not model:
        raise UsageError("name a model: a server's URL, a .gguf, a transformers folder or an embedded name")
    if not 0 < top_p <= 1:
        raise UsageError(f"top_p {top_p} keeps no token, or more than all; give one above 0 and up to 1")
    if gguf is not None and gguf not in get_args(GGUFType):
        raise UsageError(f"unknown GGUF type `{gguf}`; known: {', '.join(get_args(GGUFType))}")
    how = Sampling(max_tokens, samples, temperature, top_p, seed)
    if strategy is not None:  # a search begins with its worked examples, and each sample is one
        how = replace(how, examples=True, together=1)
    questions, available = _questions(tasks, data, family, limit)
    settings: dict[str, Any] = {
        "model": model, "max_tokens": max_tokens, "samples": samples, "temperature": temperature, "top_p": top_p,
        "seed": seed, "tasks": {t.name: t.prompt_version for t, _ in questions}, "available": available,
        "questions": text_hash(json.dumps([asdict(q) for _, q in questions], sort_keys=True, default=str)),
        "data": str(data or ""), "family": family, "limit": limit, "gguf": gguf, "weights": None, "template": None,
        "served": served, "chat": chat, "strategy": strategy, "value": value, "budget_tokens": budget_tokens,
    }  # fmt: skip
    sampler: Strategy = plain
    widest = 1
    if strategy is not None:
        sampler, widest = searched(strategy, value, budget_tokens, how, questions)
    elif value is not None or budget_tokens is not None:
        raise UsageError("--value and --budget-tokens go with a --strategy")
    reached: AbstractAsyncContextManager[Endpoint]
    if model.startswith(("http://", "https://")):
        if tokenizer is None and not chat:
            raise UsageError(f"give --tokenizer (hub id or folder) for {model}, or --chat: its server renders then")
        server = Model(
            url=model, model=served, tokenizer=tokenizer, mode="chat" if chat else "completions",
            api_key_env=api_key_env, max_in_flight=max_in_flight,
        )  # fmt: skip
        asyncio.run(check_servers({"model": server}))
        if tokenizer is not None and not chat:
            settings["template"] = _template(load_tokenizer(tokenizer, chats=False))
        name, reached = name or served, opened_server(server)
    else:
        if chat or api_key_env:
            raise UsageError("--chat and --api-key-env are for servers; an embedded model continues text exactly")
        file = _local(model, base, cast(GGUFType | None, gguf))
        reading = load_tokenizer(tokenizer or file, chats=False)
        settings |= {"weights": _sha256(file), "template": _template(reading)}
        check_lengths(file, reading, questions, how, model)
        name, reached = name or Path(model).stem, embedded(file, reading, questions, how, widest)
    folder = out or Path("runs") / "evals" / re.sub(r"[^\w.-]+", "_", name)
    began = _begin(folder, settings)

    output, started, journal = output or Output(), time.monotonic(), folder / JOURNAL
    before = sum(sample.tokens for sample in read_samples(journal))
    with spoken_for(), output.progress(name) as update:
        found = ask(reached, questions, journal, how, strategy=sampler, on_sample=update)
    seconds = time.monotonic() - started
    new = sum(sample.tokens for sample in found) - before
    output.say(f"samples: {len(found)}; {new} new tokens in {seconds:.1f} s, {new / seconds:.0f} tokens/s")
    evaluation = Evaluation(
        name, outcomes(questions, found), instruction_scores(questions, found), constant_baselines(questions)
    )
    path = write_results(folder, evaluation, questions, found, how, settings, began, seconds)
    output.say(str(path))
    return evaluation


def _questions(
    tasks: Sequence[str], data: str | Path | None, family: str | None, limit: int | None
) -> tuple[list[Asked], dict[str, int]]:
    """What to ask, and how many test questions each task has in all."""
    asked: list[Asked] = []
    available = {}
    for name in tasks:
        kind = task(name, data)
        there = kind.questions("test")
        chosen = [question for question in there if family in (None, question.family)]
        if not chosen:
            families = ", ".join(sorted({question.family for question in there}))
            raise UsageError(f"{kind.name} has no questions of family `{family}`; its families: {families}")
        if limit is not None and limit > len(chosen):
            raise UsageError(f"{kind.name} has {len(chosen)} such questions, not {limit}; lower the limit")
        available[kind.name] = len(there)
        asked += [(kind, question) for question in chosen[:limit]]
    if not asked:
        raise UsageError("name a task to evaluate on, e.g. --task gsm8k; `cotree tasks` lists them")
    check_distinct(asked, "test")
    return asked, available


def _local(model: str, base: str, kind: GGUFType | None) -> Path:
    """The GGUF to serve."""
    path = Path(model)
    if path.is_dir():
        return _exported(path, locate(base), kind or "Q8_0")
    if path.parent != Path(".") and ":" not in model and not path.is_file():
        raise UsageError(f"nothing at {model}; give a server's URL, a .gguf, a transformers folder or an embedded name")
    served = kind is None and path.suffix == ".gguf" and path.is_file()
    return path if served else at_type(locate(model), kind or "Q8_0")


def _exported(folder: Path, base: Path, kind: GGUFType) -> Path:
    """A transformers folder as GGUF, made once for its weights and kept in the cache folder."""
    from cotree.train.export_gguf import export_gguf

    for needed in ("config.json", "model.safetensors"):
        if not (folder / needed).is_file():
            inner = folder / "model"
            fix = f"give {inner}" if inner.is_dir() else "give a transformers folder with its weights in one file"
            raise UsageError(f"{folder} has no {needed}; {fix}")
    weights = text_hash(f"{_sha256(folder / 'model.safetensors')} {_sha256(base)}")
    file = cache_folder() / f"{folder.name}-{weights[:12]}-{kind}.gguf"
    if not file.is_file():
        try:
            export_gguf(folder, base, file, kind)
        except UsageError as error:
            raise UsageError(f"{error}; --base names the GGUF that it was trained from") from None
    return file


def _begin(folder: Path, settings: dict[str, Any]) -> datetime:
    """When the evaluation in this folder began: now, if there is none."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; --out names the folder of the results")
    path = folder / "settings.json"
    known = read_json(path)
    if known is None:
        known = {"began": datetime.now().isoformat(), **settings}
        write_json(path, known)
    changed = [key for key in settings if known.get(key) != settings[key]]
    if changed:
        changed = [key for key in changed if key != "questions"] or changed  # it follows from the others
        fix = "repeat them to resume it, or choose another --out or --name"
        raise UsageError(f"{folder} holds an evaluation with other settings ({', '.join(changed)}); {fix}")
    return datetime.fromisoformat(known["began"])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    return text_hash(str(tokenizer.chat_template)) if tokenizer.chat_template else None
