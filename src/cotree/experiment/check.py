"""`cotree check`: test everything that a run needs (models, servers, data, disk, packages) before it starts.

Models are tested through the same endpoints as in the search, so what passes here works there.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shutil
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from cotree.base.errors import CotreeError, UsageError
from cotree.base.progress import Output
from cotree.data.settings import Dataset
from cotree.eval.evaluate import check_fit
from cotree.eval.settings import Evaluation
from cotree.experiment.estimates import disk_bytes, student_shapes
from cotree.experiment.fingerprints import Fingerprints
from cotree.experiment.recipe import Node, Recipe
from cotree.experiment.server_probe import QUESTION, ServerProbe
from cotree.experiment.state import run_folder
from cotree.experiment.work import tokenizer_of
from cotree.models.client import Client, Request
from cotree.models.endpoints import Endpoint, open_endpoints
from cotree.models.resolve import engine_of
from cotree.models.vllm import vllm_program
from cotree.search.reward import combine_step_scores, load_reward_function, step_score_messages
from cotree.search.settings import Reward, Trees
from cotree.search.thoughts import examples_shown
from cotree.tasks import Question
from cotree.train.processes import launched, process_count
from cotree.train.settings import Optimizer

# Attempts per request; fewer than in a search, so that a check fails fast.
_ATTEMPTS = 2
_BYTES_KEPT = 5  # bytes on disk per weight of a trained student: fp32, and Q8_0 as GGUF
_LEAST_BYTES = 2 * 10**8


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check: its subject, and the problem with its fix ("": none) or a remark."""

    subject: str
    check: str
    problem: str = ""
    remark: str = ""

    def __str__(self) -> str:
        return f"{'FAIL' if self.problem else 'ok  '} {self.subject}: {self.check}: {self.problem or self.remark}"


# (subject, name of the check, the check): it returns a remark, or raises CotreeError.
Check = tuple[str, str, Callable[[], str]]
# record(subject, name, work): awaits a check, records and shows its finding, and returns whether it passed.
Record = Callable[[str, str, Awaitable[str]], Awaitable[bool]]


def check(recipe: Recipe, output: Output | None = None, runs_dir: Path = Path("runs")) -> list[Finding]:
    """Check everything that a run needs and print one line per check.

    Loads weights and generates a few hundred tokens per server.

    Returns:
        All findings, if none is a problem.

    Raises:
        UsageError: at least one problem; the message counts them and repeats the first.
    """
    output = output or Output()
    findings: list[Finding] = []
    said: dict[str, str] = {}

    async def record(subject: str, name: str, work: Awaitable[str]) -> bool:
        try:
            finding = Finding(subject, name, remark=await work)
        except CotreeError as error:
            finding = Finding(subject, name, str(error))
        findings.append(finding)
        place = said.setdefault(finding.problem, f"{subject}: {name}")  # report a cause of several failures once
        known = finding.problem and place != f"{subject}: {name}"
        output.print(str(replace(finding, problem=f"as {place}") if known else finding))
        return not finding.problem

    async def check_all() -> None:
        for subject, name, look in preflight(Fingerprints(recipe), recipe.nodes.values()):
            await record(subject, name, asyncio.to_thread(look))
        await record(f"folder {runs_dir}", "usable", asyncio.to_thread(_disk, recipe, runs_dir))
        # One at a time: two models need not fit into memory together.
        for name in recipe.models:
            await _check_model(recipe, name, record)

    asyncio.run(check_all())
    failed = [finding for finding in findings if finding.problem]
    if failed:
        first = f"{'the first: ' if failed[1:] else ''}{failed[0].subject}: {failed[0].check}: {failed[0].problem}"
        raise UsageError(f"{len(failed)} of {len(findings)} checks failed; {first}")
    return findings


def preflight(fingerprints: Fingerprints, nodes: Iterable[Node[Any]]) -> Iterator[Check]:
    """Yield the checks of these nodes that need no model: packages, questions, tokenizers, lengths, rewards."""
    recipe, by_id = fingerprints.recipe, {node.id: node for node in nodes}
    if by_id:
        yield "packages", "installed", partial(_packages, recipe, by_id.values())
    for name, node in by_id.items():
        settings = node.settings
        if node.kind in ("trees", "evaluations"):
            what = "rollouts" if getattr(settings, "file", None) else f"{settings.split} questions"
            yield name, what, partial(_questions, fingerprints, node)
            if settings.tokens_of is not None:
                yield name, "tokens_of", partial(_tokens_of, fingerprints, node)
        if node.kind == "trees" and settings.reward is not None and settings.reward.function is not None:
            yield name, "reward function", partial(_reward_function, settings.reward.function)
        if node.kind == "datasets" and settings.trees and settings.gates.contamination:
            yield name, "contamination", partial(_contamination, fingerprints, node)
        if node.kind == "students":
            yield name, "student", partial(_chat_template, recipe, node.name)
            if settings.training.gpus != "all" or launched() > 1:  # else any machine fits
                yield name, "gpus", partial(_processes, settings.training)
        if node.kind == "evaluations":
            for model in {recipe.root_model(model) for model in settings.models}:
                if recipe.models[model].weights is not None:
                    yield name, f"questions fit into `{model}`", partial(_lengths, fingerprints, node, model)


def _packages(recipe: Recipe, nodes: Iterable[Node[Any]]) -> str:
    """Check that the required extras are installed: an engine to serve weights, torch to train."""
    asked = [name for node in nodes if node.kind == "trees" for name in node.settings.writers]
    asked += [name for node in nodes if node.kind == "evaluations" for name in node.settings.models]
    served = {name: model for name in asked if (model := recipe.models[recipe.root_model(name)]).weights is not None}
    engines = {engine_of(model): name for name, model in served.items()}
    if "vllm" in engines and vllm_program() is None:
        fault = f"`{engines['vllm']}` is served by vLLM, which is not installed"
        raise UsageError(f"{fault}; pip install 'cotree[vllm]', or take `engine: llama.cpp`")
    needed = ["xllamacpp"] if "llama.cpp" in engines else []
    trainings = [node.settings.training for node in nodes if node.kind == "students"]
    needed += ["torch", "accelerate"] if trainings else []
    needed += ["peft"] if any(training.lora for training in trainings) else []
    for package in needed:
        if importlib.util.find_spec(package) is None:
            extra = "local" if package == "xllamacpp" else "train"
            raise UsageError(f"{package} is not installed; pip install 'cotree[{extra}]', or use `make demo`")
    return ", ".join(needed) or "none needed"


def _questions(fingerprints: Fingerprints, node: Node[Any]) -> str:
    return f"{len(fingerprints.questions(node))} there"


def _reward_function(name: str) -> str:
    load_reward_function(name)
    return f"{name} loads"


def _chat_template(recipe: Recipe, student: str) -> str:
    tokenizer_of(recipe, student)
    return "has a chat template"


def _processes(training: Optimizer) -> str:
    return f"{process_count(training)} processes train"


def _tokens_of(fingerprints: Fingerprints, node: Node[Any]) -> str:
    """Check that the `tokens_of` node has all questions of the node that it budgets."""
    other = fingerprints.recipe.nodes[f"{node.kind}/{node.settings.tokens_of}"]
    there = {(question.task, question.id) for _, question in fingerprints.questions(other)}
    lacking = [question for _, question in fingerprints.questions(node) if (question.task, question.id) not in there]
    if lacking:
        raise UsageError(
            f"{node.kind}.{node.name}.tokens_of: `{other.name}` lacks question `{lacking[0].id}` of {lacking[0].task} "
            f"({len(lacking)} are lacking); ask no more questions than it"
        )
    return "it has all questions"


def _lengths(fingerprints: Fingerprints, node: Node[Evaluation], name: str) -> str:
    """Check that every question and its reply fit into a model's context."""
    check_fit(fingerprints.recipe.models[name], fingerprints.questions(node), node.settings, name=name)
    return "they do"


def _contamination(fingerprints: Fingerprints, node: Node[Dataset]) -> str:
    """Report how many questions of a dataset's trees overlap with an evaluation; fail if all do."""
    trees = [fingerprints.recipe.nodes[f"trees/{name}"] for name in node.settings.trees]
    asked, repeated = sum(len(fingerprints.questions(each)) for each in trees), len(fingerprints.contaminated(node))
    if repeated >= asked:
        raise UsageError(
            f"datasets.{node.name}: all {asked} questions of its trees repeat one of an evaluation, so nothing is "
            "left; ask the evaluation another split, or set gates.contamination: false"
        )
    return f"{repeated} of {asked} questions repeat one of an evaluation"


def _disk(recipe: Recipe, runs_dir: Path) -> str:
    """Check that the run folder's disk is writable and has room for the recipe's students."""
    folder = run_folder(recipe, runs_dir).path.absolute()
    while not folder.exists():
        folder = folder.parent
    needed, peak = _LEAST_BYTES, 0
    for node in recipe.of_kind("students"):
        with suppress(CotreeError):  # missing weights of unknown shape; reported by the student's check
            _, parameters = student_shapes(recipe, node)
            needed += _BYTES_KEPT * parameters
            peak = max(peak, disk_bytes(parameters, node.settings.training, None) - _BYTES_KEPT * parameters)
    needed += peak
    free = shutil.disk_usage(folder).free
    found = f"{free / 1e9:.1f} GB free, a run takes up to about {needed / 1e9:.1f} GB"
    if free < needed:
        raise UsageError(f"{found}; free some space or give another --runs-dir")
    if not os.access(folder, os.W_OK):
        raise UsageError("not writable; give another --runs-dir")
    return found


async def _check_model(recipe: Recipe, name: str, record: Record) -> None:
    """Run all checks of one model, on each of its servers."""
    subject, model = f"model `{name}`", recipe.models[name]
    async with AsyncExitStack() as opened:
        endpoints: dict[str, Endpoint] = {}

        async def reach() -> str:
            opening = open_endpoints({name: model}, attempts=_ATTEMPTS, all_ready=True)
            endpoints.update(await opened.enter_async_context(opening))
            servers = len(endpoints[name].clients)
            ready = f"{servers} server{'s' * (servers > 1)} ready"
            if model.weights is None:
                return ready
            return f"{ready} in vLLM" if engine_of(model) == "vllm" else "loaded in llama.cpp"

        if not await record(subject, "reach", reach()):
            return
        endpoint = endpoints[name]
        for node in recipe.of_kind("trees"):
            if node.settings.file is None and node.settings.roles["thinker"][0].model == name:
                await record(node.id, "thoughts", _thoughts(node.settings, endpoint))
        for client in endpoint.clients:
            where = f"{subject} at {client.url}" if len(endpoint.clients) > 1 else subject
            if model.mode == "pooling":
                await record(where, "scores", _scores(client, _reward_of(recipe, name)))
                continue
            probe = ServerProbe(endpoint, client)
            if await record(where, "template", probe.template()) and await record(where, "usage", probe.usage()):
                await record(where, "continues", probe.continues())
                await record(where, "exact", probe.exact())
                await record(where, "stop strings", probe.stops())
                await record(where, "samples", probe.samples())


def _reward_of(recipe: Recipe, name: str) -> Reward:
    """The recipe's `reward` settings that use this process reward model."""
    rewards = [node.settings.reward for node in recipe.of_kind("trees")]
    return next((reward for reward in rewards if reward is not None and reward.process == name), Reward(process=name))


async def _thoughts(settings: Trees, endpoint: Endpoint) -> str:
    """Describe how the thinker is prompted; unset settings depend on the kind of model."""
    shown = examples_shown(settings.examples, endpoint.kind)
    default = "" if settings.examples is not None else " by default"
    limit = settings.max_chain_tokens if settings.ends == "paragraph" else settings.max_thought_tokens
    each = (
        f"a {settings.ends} each, {'chains' if settings.ends == 'paragraph' else 'thoughts'} of at most {limit} tokens"
    )
    return f"a {endpoint.kind} model: {each}; {shown} worked examples{default}; patterns {', '.join(settings.patterns)}"


async def _scores(client: Client, reward: Reward) -> str:
    """Check that a process reward model returns a score for each step."""
    asked = Question("check", "check", (QUESTION,), "")
    messages = step_score_messages(asked, ["One.", "Two."], reward.separator)
    completion = await client.complete(Request("", 1, 1, 0.0, 1.0, 0, (), messages, scores=True))
    score = combine_step_scores(json.loads(completion.choices[0].text), 2, reward.combine)
    return f"2 scores for 2 steps, together {score:.2f}"
