"""Evaluate one model: generate, judge, score, and write results files.

`evaluate` computes a cell of a run; `evaluate_model` any one model without a recipe (`cotree eval`, `cotree.evaluate`).
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cotree.base.errors import UsageError, first_cotree_error
from cotree.base.lock import locked
from cotree.base.progress import Output
from cotree.base.run_folder import NodeFolder, NodeRecord
from cotree.base.settings import hashed_settings, parse_section, require_name
from cotree.eval.asking import ask, check_lengths, load_questions
from cotree.eval.journal import JOURNAL, content_hash, damaged_lines
from cotree.eval.metrics import score_samples
from cotree.eval.results import write_results
from cotree.eval.samplers import Budgets, Sampler, check_strategy, make_sampler, samples_of_a_request
from cotree.eval.scores import ModelScores
from cotree.eval.settings import AskSettings
from cotree.models.client import Client
from cotree.models.endpoints import Endpoint, check_servers, open_endpoints
from cotree.models.llama_cpp import serve
from cotree.models.resolve import engine_of, gguf_file, identity, parse_model, tokenizer_source
from cotree.models.settings import Model
from cotree.models.tokenizer import load_tokenizer, token_counter
from cotree.models.weights import PACKAGED, context_length, locate
from cotree.tasks.base import VERDICT_VERSION, Asked, Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# llama.cpp's KV cache in tokens. 768 tokens per slot suffice for most prompts; longer ones get fewer slots.
_SLOTS, _PROMPT_TOKENS, _MEMORY_TOKENS = 16, 768, 32_768
FILES = (JOURNAL, "results_*.json", "samples_*.jsonl")  # of an evaluation; all are derived from the journal
_OTHER = "choose another --out"
_TIMEOUT = 600.0  # seconds; llama.cpp under load can take minutes for a batch


def evaluate(
    model: Model,
    questions: Sequence[Asked],
    asking: AskSettings,
    folder: Path,
    *,
    name: str,
    budgets: Budgets | None = None,
    available: Mapping[str, int] | None = None,
    output: Output | None = None,
) -> ModelScores:
    """Evaluate a model in a folder: request samples that its journal lacks, judge all, and write the results files.

    Replies are stored by question, so only new questions and changed prompts are requested. If nothing is missing, no
    model is opened.

    Args:
        folder: of one model with fixed settings: `journal.jsonl`, `results_*.json`, `samples_*.jsonl`.
        name: of the model, in tables.
        budgets: token budget of each question's search; replaces `asking.budget_tokens`.
        available: {task: number of all its questions}, recorded in the results.

    Raises:
        UsageError: before any request.
        CotreeError: work failed after it started; the same call resumes it.
    """
    check_strategy(asking, questions, budgets)
    if model.weights is None or engine_of(model) == "vllm":
        opened = open_server(model, name, folder)
    else:
        opened = open_local(*local_model(model, asking), questions, asking, name=name)
    endpoints: list[Endpoint] = []

    def sampler_of(endpoint: Endpoint) -> Sampler:
        endpoints.append(endpoint)
        return make_sampler(endpoint, asking, budgets)

    output, started = output or Output(), time.monotonic()
    with first_cotree_error(), output.progress(name) as update:
        samples, tokens = ask(
            opened,
            questions,
            folder / JOURNAL,
            asking,
            sampler_of=sampler_of,
            on_sample=update,
            on_damage=lambda n: output.print(
                f"{name}: {damaged_lines(n)} of {JOURNAL} left out; what is lacking is asked again"
            ),
        )
    seconds = time.monotonic() - started
    if tokens:
        output.print(f"{name}: {tokens:,} new tokens in {seconds:.1f} s, {tokens / seconds:.0f} tokens/s")
    counters = [client.counters for endpoint in endpoints for client in endpoint.clients]
    repeats, misreported = sum(each.repeats for each in counters), sum(each.misreported for each in counters)
    for count, what in (repeats, "requests sent again after failures"), (misreported, "replies with impossible usage"):
        if count:
            output.print(f"{name}: {count} {what}")
    scores = score_samples(name, questions, samples, folder).model_copy(update={"repeats": repeats})
    record = NodeFolder(folder).record()
    available, seconds = available or {}, seconds + (record.seconds if record else 0.0)
    write_results(scores, questions, samples, asking=asking, model=model, available=available, seconds=seconds)
    return scores


def local_model(model: Model, asking: AskSettings) -> tuple[Path, PreTrainedTokenizerBase]:
    """The file to serve for an evaluation of weights (a GGUF for llama.cpp, a transformers folder for vLLM), and the
    tokenizer.

    Raises:
        UsageError: the weights are missing, or cannot be served.
    """
    source = tokenizer_source(model)
    assert model.weights, "only weights are served here"
    assert source, "weights carry a tokenizer"
    file = locate(model.weights) if asking.gguf is None or engine_of(model) == "vllm" else gguf_file(model, asking.gguf)
    return file, load_tokenizer(source, chats=False)


def check_fit(model: Model, questions: Sequence[Asked], asking: AskSettings, *, name: str) -> None:
    """Check that every question with its reply fits into the model's context.

    Raises:
        UsageError: one does not, or the weights cannot be served.
    """
    file, tokenizer = local_model(model, asking)
    given = model.engine_args.get("max_model_len")
    context = given if isinstance(given, int) else context_length(file)
    check_lengths(context, tokenizer, questions, asking, name=name)


@asynccontextmanager
async def open_server(model: Model, name: str, logs: Path) -> AsyncIterator[Endpoint]:
    """Open a model on servers and check that they are ready; starts vLLM, with logs in a folder."""
    async with open_endpoints({name: model}, logs=logs) as endpoints:
        yield endpoints[name]


@asynccontextmanager
async def open_local(
    file: Path, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Asked], asking: AskSettings, *, name: str
) -> AsyncIterator[Endpoint]:
    """Serve a GGUF in this process, with context for the longest question and slots for the samples of one request.

    Raises:
        UsageError: a question is too long for the model.
    """
    longest = check_lengths(context_length(file), tokenizer, questions, asking, name=name)
    context = max(_PROMPT_TOKENS + asking.max_tokens, longest)
    slots = max(1, min(_SLOTS, _MEMORY_TOKENS // context))
    at_once = samples_of_a_request(asking)
    client_of = partial(Client, max_in_flight=max(1, slots // at_once), count_tokens=token_counter(tokenizer))
    # With a unified KV cache, the samples of a request share its prompt.
    with serve(file, slots=max(slots, at_once), context=context, shared=at_once > 1) as url:
        async with client_of(name, url, "default", timeout=_TIMEOUT) as client:
            yield Endpoint(name, (client,), tokenizer, str(file))


def evaluate_model(
    model: str,
    tasks: str | Sequence[str],
    *,
    data: str | Path | None = None,
    split: Split = "test",
    family: str | None = None,
    limit: int | None = None,
    name: str | None = None,
    out: Path | None = None,
    gguf: str | None = None,
    output: Output | None = None,
    **options: Any,
) -> ModelScores:
    """Evaluate a model; the same call resumes.

    Args:
        model: the URL of an OpenAI-compatible server, or weights as in a recipe; llama.cpp serves a transformers folder
            after converting it to GGUF.
        tasks: names as in `cotree tasks`, or own tasks.
        data: source of the tasks' rows, as in `cotree.task`.
        split: train, dev or test.
        family: only questions of this family: "3 blocks", "English", "Algebra". limit: the first questions of a task.
        name: of the model, in tables. out: the folder, by default `runs/evals/NAME`. Results of other settings move to
            its `older/`, and back when those settings return.
        gguf: F32, F16 or Q8_0; by default a `.gguf` file is served as it is, everything else as Q8_0.
        options: how questions are asked, as in an `evaluations` entry of a recipe (`eval.settings.AskSettings`):

            max_tokens (1024): of a reply. samples (1): completions per question; more than one need a temperature.
                temperature (0), top_p (1), seed (0): the default is one greedy completion.
            examples (False): put the search's worked examples before the question.
            strategy: decode by search (`mcts`, `vote`, `best_of_n`, `beam`; docs/decoding.md) with its worked examples,
                with about `budget_tokens` generated tokens per sample; `value` ranks answers.

            And options of the model (`models.resolve.parse_model`):

            served, tokenizer, chat, api_key_env, max_in_flight (16): for a server, as `model`, `tokenizer`,
                `mode: chat`, `api_key_env` and `max_in_flight` of a recipe's model.
            engine, engine_args: for weights, as of a recipe's model; arguments as `key=value`.

    Raises:
        UsageError: before any request.
        CotreeError: work failed after it started; the same call resumes it.
    """
    settings = {key: options.pop(key) for key in AskSettings.model_fields if key in options}
    settings["gguf"] = gguf or (None if model.endswith(".gguf") and ":" not in model else "Q8_0")
    asking = parse_section(AskSettings, settings, "")
    questions = load_questions(
        [(task, limit) for task in ([tasks] if isinstance(tasks, str) else tasks)], split, data=data, family=family
    )
    if not questions:
        raise UsageError("name a task to evaluate on, e.g. --task gsm8k; `cotree tasks` lists them")
    available = {task.name: len(task.questions(split)) for task in {task for task, _ in questions}}
    source = parse_model(model, **options)
    folder_name = name
    if name is None:
        weights = Path(model)
        own_name = weights.resolve().parent.name if weights.name == "model" else weights.stem  # STUDENT/model
        own_name = model if model in PACKAGED else own_name  # these names contain dots
        name = source.model if source.weights is None else own_name
        folder_name = re.sub(r"[^\w.-]+", "_", name)
    folder = out or Path("runs") / "evals" / require_name(str(folder_name), "--name")
    check_strategy(asking, questions, None)
    node, output = NodeFolder(folder), output or Output()
    node.check_owned(JOURNAL, other=_OTHER)
    with locked(folder, other=_OTHER) if folder.is_dir() else nullcontext():  # create nothing before the checks
        if source.weights is None:
            for line in asyncio.run(check_servers({name: source})):
                output.print(line)
        else:
            check_fit(source, questions, asking, name=name)
            if engine_of(source) == "vllm":
                output.print(f"{name}: served by vLLM")
    with locked(folder, other=_OTHER):
        record = _record(source, questions, asking)
        if line := node.explain_missing_record(record, "an evaluation of this model with these settings"):
            output.print(line)
        with node.working(node.begin(record)) as work:
            scores = evaluate(source, questions, asking, folder, name=name, available=available, output=output)
            work.result |= scores.model_dump()
            work.add_files(*FILES)
    output.print(f"results: {folder}")
    return scores


def _record(model: Model, questions: Sequence[Asked], asking: AskSettings) -> NodeRecord:
    """The folder's record; its base, model and settings without questions, decides whether replies are kept."""
    parts: dict[str, Any] = {"model": identity(model), "asking": hashed_settings(asking)}
    base = content_hash(parts)[:16]
    asked = [task.content_of(question) for task, question in questions]
    parts |= {"questions": content_hash(asked)[:16], "verdicts": VERDICT_VERSION}
    return NodeRecord(fingerprint=content_hash(parts)[:16], base=base, parts=parts)
