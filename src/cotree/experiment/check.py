"""What can be known to fail before anything is spent: `preflight` of each run; `check`, which also asks the models.

Invariant: every model is asked through the very endpoint that the search uses, so what passes here works there. A
search writes a chain in pieces, each request continuing the assistant's words; a server that begins anew, repeats what
it was given or writes past a stop string would spoil every tree without an error.
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import json
import os
import re
import shutil
from collections.abc import Awaitable, Callable, Iterator, Set
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

from cotree.base.errors import CotreeError, UsageError
from cotree.base.progress import Output
from cotree.eval.asking import Asked, Sampling, check_distinct, check_lengths
from cotree.experiment.datasets import student_source
from cotree.experiment.recipe import STAGES, Recipe, Reward
from cotree.experiment.run_folder import find_run
from cotree.models.client import Client, Completion, Request
from cotree.models.endpoints import Endpoint, open_endpoints
from cotree.models.gguf_file import GGUF
from cotree.models.tokenizer import load_tokenizer
from cotree.search.reward import combined, load_function, steps_messages
from cotree.tasks import Question, Split, task

_QUESTION = {"role": "user", "content": "Count from one to thirty in words, separated by commas."}
# No reply to the question begins like this, so only a server that reads it goes on from it; it ends amid a word.
_FOREIGN = "Zq41: eleven, twelve, thirt"
_NEW_TURN = re.compile(
    r"\W*(<\||<start_of_turn|\[/?INST|assistant\b|user\b|sure\b|certainly\b|of course\b|hello\b)", re.I
)
_MAX_TOKENS = 48
# A request that fails twice fails here: a check should not wait as long as a search would.
_ATTEMPTS = 2
# Checkpoints in fp32 (base, control, sft, dpo), the optimizer's two moments while training, and the GGUF files.
_BYTES_PER_WEIGHT = 30
_LEAST_BYTES = 2 * 10**8
_SPLITS: tuple[Split, ...] = ("train", "dev", "test")

# A subject, what is checked of it, and the look itself: it returns a remark, or raises CotreeError.
Look = tuple[str, str, Callable[[], str]]


def questions(recipe: Recipe, split: Split) -> list[Asked]:
    """A recipe's questions of a split, each with its task.

    Raises:
        UsageError: a task has fewer, or two of them have one name.
    """
    asked: list[Asked] = []
    problems = []
    for name, count in recipe.tasks.of(split).items():
        try:
            known = task(name)
            asked += [(known, question) for question in known.questions(split, count)]
        except UsageError as error:
            problems.append(str(error))
    if problems:
        raise UsageError("; ".join(problems))
    check_distinct(asked, split)
    return asked


def preflight(recipe: Recipe, stages: Set[str]) -> Iterator[Look]:
    """All looks at what can be known to fail in these stages of a recipe without asking a model."""
    if stages <= {"report"}:
        return
    yield "packages", "installed", partial(_packages, recipe, stages)
    for split in _SPLITS:
        yield "tasks", f"{split} questions", partial(_questions, recipe, split)
    yield f"model `{recipe.train.student}`", "student", partial(_student, recipe, stages)
    if "search" in stages and recipe.search.reward is not None and recipe.search.reward.function is not None:
        yield "reward", "function", partial(_function, recipe.search.reward.function)


def _packages(recipe: Recipe, stages: Set[str]) -> str:
    serves = "eval" in stages or ("search" in stages and any(m.embedded for m in recipe.used_models().values()))
    trains = bool(stages & {"train_sft", "train_dpo"})
    adapts = recipe.train.sft.lora or recipe.train.dpo.lora
    trained = ("torch", "accelerate", *(("peft",) if adapts else ())) if trains else ()
    needed = ({"xllamacpp": "local"} if serves else {}) | dict.fromkeys(trained, "train")
    for package, extra in needed.items():
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"{package} is not installed; pip install 'cotree[{extra}]', or use `make demo`")
    return ", ".join(needed) or "none needed"


def _questions(recipe: Recipe, split: Split) -> str:
    found = questions(recipe, split)
    if split == recipe.eval.split and not found:
        raise UsageError(f"eval.split is `{split}`, but the recipe's tasks name no such questions")
    return f"{len(found)} there"


def _student(recipe: Recipe, stages: Set[str]) -> str:
    """That it has a chat template, and what it is asked in the evaluation fits into its context."""
    source = student_source(recipe)
    tokenizer = load_tokenizer(source)
    if "eval" in stages:
        how = Sampling(recipe.eval.max_tokens, examples=recipe.eval.examples)
        check_lengths(source, tokenizer, questions(recipe, recipe.eval.split), how, recipe.train.student)
    return "has a chat template, and the questions fit into its context"


def _function(name: str) -> str:
    load_function(name)
    return f"{name} loads"


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: what was looked at, and the problem with its fix ("": none) or a remark."""

    subject: str
    check: str
    problem: str = ""
    remark: str = ""

    def __str__(self) -> str:
        return f"{'FAIL' if self.problem else 'ok  '} {self.subject}: {self.check}: {self.problem or self.remark}"


# Waits for one check of a subject, notes and says what was found, and returns whether all is well.
Judged = Callable[[str, str, Awaitable[str]], Awaitable[bool]]


def check(recipe: Recipe, output: Output | None = None, runs_dir: Path = Path("runs")) -> list[Finding]:
    """Check everything that a run will need and say what was found, a line a check.

    Embedded models are started and servers are asked, a few hundred tokens each.

    Returns:
        All findings, when none is a problem.

    Raises:
        UsageError: something is wrong; the message counts the problems and repeats the first.
    """
    output = output or Output()
    findings: list[Finding] = []

    async def judged(subject: str, name: str, work: Awaitable[str]) -> bool:
        try:
            finding = Finding(subject, name, remark=await work)
        except CotreeError as error:
            finding = Finding(subject, name, str(error))
        findings.append(finding)
        output.say(str(finding))
        return not finding.problem

    async def look_at_all() -> None:
        disk: Look = (f"folder {runs_dir}", "usable", partial(_disk, recipe, runs_dir))
        for subject, name, look in (*preflight(recipe, set(STAGES)), disk):
            await judged(subject, name, asyncio.to_thread(look))
        # One after the other: two embedded models need not fit into memory together.
        for name in recipe.models:
            await _model(recipe, name, judged)

    asyncio.run(look_at_all())
    failed = [finding for finding in findings if finding.problem]
    if failed:
        first = f"{failed[0].subject}: {failed[0].check}: {failed[0].problem}"
        raise UsageError(
            f"{len(failed)} of {len(findings)} checks failed; {'the first: ' if failed[1:] else ''}{first}"
        )
    return findings


def _disk(recipe: Recipe, runs_dir: Path) -> str:
    find_run(runs_dir, recipe)
    folder = runs_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        weights = sum(prod(tensor.shape) for tensor in GGUF(student_source(recipe)).tensors.values())
    except CotreeError:  # the student is not here, which the check of it says
        weights = 0
    free, needed = shutil.disk_usage(folder).free, _LEAST_BYTES + _BYTES_PER_WEIGHT * weights
    said = f"{free / 1e9:.1f} GB free, a run takes up to about {needed / 1e9:.1f} GB"
    if free < needed:
        raise UsageError(f"{said}; free some space or give another --runs-dir")
    if not os.access(folder, os.W_OK):
        raise UsageError("not writable; give another --runs-dir")
    return said


async def _model(recipe: Recipe, name: str, judged: Judged) -> None:
    """All checks of one model, on each of its servers."""
    subject, model = f"model `{name}`", recipe.models[name]
    async with AsyncExitStack() as opened:
        endpoints: dict[str, Endpoint] = {}

        async def reach() -> str:
            endpoints.update(await opened.enter_async_context(open_endpoints({name: model}, attempts=_ATTEMPTS)))
            servers = len(endpoints[name].clients)
            return "loaded" if model.embedded else f"{servers} server{'s' * (servers > 1)} ready"

        if not await judged(subject, "reach", reach()):
            return
        endpoint = endpoints[name]
        for client in endpoint.clients:
            where = f"{subject} at {client.url}" if len(endpoint.clients) > 1 else subject
            if model.mode == "pooling":
                await judged(where, "scores", _scores(client, recipe.search.reward or Reward(process=name)))
                continue
            probe = Probe(endpoint, client)
            if await judged(where, "template", probe.template()) and await judged(where, "usage", probe.usage()):
                await judged(where, "continues", probe.continues())
                await judged(where, "exact", probe.exact())
                await judged(where, "stop strings", probe.stops())
                await judged(where, "samples", probe.samples())
                await judged(where, "seed", probe.seed())


async def _scores(client: Client, reward: Reward) -> str:
    """That a process reward model gives each step a score."""
    asked = Question("check", "check", (_QUESTION,), "")
    messages = steps_messages(asked, ["One.", "Two."], reward.separator)
    completion = await client.complete(Request("", 1, 1, 0.0, 1.0, 0, (), messages, scores=True))
    worth = combined(json.loads(completion.choices[0].text), 2, reward.combine)
    return f"2 for 2 steps, worth {worth:.2f}"


class Probe:
    """The questions that one server is asked: each returns a remark, or raises UsageError with the problem and its fix.

    `template` and `usage` come first: the others compare with their text.
    """

    def __init__(self, endpoint: Endpoint, client: Client) -> None:
        self.endpoint, self.client = endpoint, client
        self.fresh = ""  # the greedy reply to the bare question

    async def ask(
        self, prefix: str = "", *, n: int = 1, max_tokens: int = _MAX_TOKENS, temperature: float = 0.0, stop: str = ""
    ) -> Completion:
        """Continue `prefix` as the assistant's first words."""
        prompt = self.endpoint.begin([_QUESTION])
        stops = (stop,) if stop else ()
        request = Request(prompt.text + prefix, n, max_tokens, temperature, 1.0, 11, stops, prompt.messages)
        return await self.client.complete(request)

    async def template(self) -> str:
        """The conversation renders and holds what was said."""
        prompt = self.endpoint.begin([_QUESTION])
        if prompt.messages:
            return "the server renders it"
        answered = self.endpoint.begin([_QUESTION, {"role": "assistant", "content": "One."}, _QUESTION]).text
        if _QUESTION["content"] not in prompt.text or "One." not in answered:
            raise UsageError("it leaves out what was said; use this model's own `tokenizer`")
        return f"renders, {len(prompt.text)} characters before the assistant's turn"

    async def usage(self) -> str:
        """There is a text, and its tokens are counted as this side counts them."""
        done = await self.ask()
        choice = done.choices[0]
        # A character that max_tokens cut in half is no text to be continued.
        self.fresh = choice.text.rstrip("\ufffd")
        if not self.fresh.strip():
            raise UsageError("the reply to a plain question is empty; is this a chat model with the right template?")
        if not 0 < choice.tokens <= _MAX_TOKENS + 1:
            said = f"{choice.tokens} tokens reported for max_tokens {_MAX_TOKENS}"
            raise UsageError(f"{said}; the server's usage is not to trust")
        if self.endpoint.tokenizer is not None:
            own = len(self.endpoint.tokenizer(self.endpoint.begin([_QUESTION]).text)["input_ids"])
            if abs(own - done.prompt_tokens) > max(2, own // 20):
                said = f"the server counts {done.prompt_tokens} prompt tokens, `tokenizer` {own}"
                raise UsageError(f"{said}; is it this model's?")
        return f"{done.prompt_tokens} prompt and {choice.tokens} completion tokens"

    async def continues(self) -> str:
        """Words that the model would not have chosen are gone on from, not begun anew or repeated."""
        reply = (await self.ask(_FOREIGN)).choices[0].text
        begins, start = reply.strip(), self.fresh.strip()[:16]
        if _FOREIGN in reply or _QUESTION["content"] in reply:
            raise UsageError(f"the reply repeats the prompt ({_quote(reply)}); switch the server's `echo` off")
        if _NEW_TURN.match(begins) or (len(start) > 3 and begins.startswith(start)):
            said = f"the prefix {_quote(_FOREIGN)} is not continued, the reply begins anew: {_quote(reply)}"
            raise UsageError(f"{said}; {self._fix}")
        return f"{_quote(_FOREIGN[-12:])} goes on with {_quote(reply)}"

    async def exact(self) -> str:
        """The first half of its own greedy reply is completed to the same reply."""
        spaces = [i for i, c in enumerate(self.fresh) if c == " " and self.fresh[:i].strip()]
        # Before a space a cut does not change how the text falls into tokens.
        cut = min(spaces, key=lambda i: abs(i - len(self.fresh) // 2), default=len(self.fresh) // 2)
        agreed, reply = await self._agreement(cut)
        wanted = len(_squash(self.fresh[cut:]))
        if agreed < min(12, (wanted + 1) // 2):
            said = f"after half of its own reply it writes {_quote(reply)} instead of {_quote(self.fresh[cut:])}"
            raise UsageError(f"{said}; {self._fix}")
        if agreed < wanted:
            return f"goes on with the same {agreed} characters, then differs (rounding; servers that batch do that)"
        amid = cut + 3
        inside, _ = await self._agreement(amid)
        same = inside == len(_squash(self.fresh[amid:]))
        return f"its greedy reply cut in two is completed to itself, cut amid a word {'too' if same else 'not'}"

    async def _agreement(self, cut: int) -> tuple[int, str]:
        """How many characters of the greedy reply after `cut` come back, whitespace aside, and what came."""
        reply = (await self.ask(self.fresh[:cut])).choices[0].text
        pairs = zip(_squash(self.fresh[cut:]), _squash(reply), strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)), reply

    async def stops(self) -> str:
        """A stop string ends the text and is not in it."""
        words = self.fresh.split()
        stop = words[len(words) // 3] if len(words) > 2 else self.fresh.strip()[-1:]
        choice = (await self.ask(stop=stop)).choices[0]
        if choice.text.rstrip().endswith(stop) and choice.finish_reason == "stop" and choice.text.count(stop) == 1:
            raise UsageError(f"the text keeps the stop string {_quote(stop)}; make the server leave it out")
        if stop in choice.text:
            said = f"the text goes on after the stop string {_quote(stop)}: {_quote(choice.text)}"
            raise UsageError(f"{said}; use another server")
        if choice.finish_reason != "stop":
            return f"not seen: this time the model did not write {_quote(stop)}"
        return f"{_quote(stop)} ended the text"

    async def samples(self) -> str:
        """A request for n samples brings n."""
        try:
            done = await self.ask(n=3, max_tokens=16, temperature=1.0)
        except CotreeError as error:
            fix = "siblings are written by one request with `n`, so use a server that takes it"
            raise UsageError(f"{error}; {fix}") from None
        return f"3 came for n=3, {len({choice.text for choice in done.choices})} different"

    async def seed(self) -> str:
        """Whether a seed gives the same text again; nothing depends on it."""
        one, two = [(await self.ask(temperature=1.0)).choices[0].text for _ in range(2)]
        return f"the same seed gives {'the same' if one == two else 'another'} text (the journal needs neither)"

    @property
    def _fix(self) -> str:
        if self.endpoint.tokenizer is None:
            server = "a server that takes continue_final_message"
            return f"chat mode needs {server}; else set `tokenizer` and mode: completions"
        return "is `tokenizer` this model's, and does the server take the prompt as it is?"


def _squash(text: str) -> str:
    return " ".join(text.split())


def _quote(text: str) -> str:
    """The beginning of a text in one line, quoted; models' words must not drive the terminal."""
    return repr(text if len(text) <= 40 else text[:40] + "...")
