"""Check a recipe before anything is spent: its questions, the disk, and that its models continue text exactly.

Invariant: every model is asked through the very endpoint that the search uses, so what passes here works there. A
search writes a chain in pieces, each request continuing the assistant's words; a server that begins anew, repeats what
it was given or writes past a stop string would spoil every tree without an error.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from cotree.config import Recipe, Reward
from cotree.errors import CotreeError, UsageError
from cotree.llm.client import Client, Completion, Request
from cotree.llm.endpoints import Endpoint, open_endpoints
from cotree.progress import Output
from cotree.search.reward import check_reward, combined, steps_messages
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


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: what was looked at, and the problem with its fix ("": none) or a remark."""

    subject: str
    check: str
    problem: str = ""
    remark: str = ""

    def __str__(self) -> str:
        return f"{'FAIL' if self.problem else 'ok  '} {self.subject}: {self.check}: {self.problem or self.remark}"


Note = Callable[[Finding], None]


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

    def note(finding: Finding) -> None:
        findings.append(finding)
        output.say(str(finding))

    _questions(recipe, note)
    if recipe.search.reward is not None and recipe.search.reward.function is not None:
        note(_reward(recipe.search.reward))
    note(_disk(recipe, runs_dir))
    asyncio.run(_models(recipe, note))
    failed = [finding for finding in findings if finding.problem]
    if failed:
        first = f"{failed[0].subject}: {failed[0].check}: {failed[0].problem}"
        raise UsageError(
            f"{len(failed)} of {len(findings)} checks failed; {'the first: ' if failed[1:] else ''}{first}"
        )
    return findings


def _questions(recipe: Recipe, note: Note) -> None:
    splits: tuple[tuple[Split, dict[str, int]], ...] = (
        ("train", recipe.tasks.train),
        ("dev", recipe.tasks.dev),
        ("test", recipe.tasks.eval),
    )
    for split, counts in splits:
        for name, wanted in counts.items():
            try:
                found = len(task(name).questions(split, wanted))
                problem = "" if found == wanted else f"{found} of {wanted} there; lower the number"
            except CotreeError as error:
                problem = str(error)
            note(Finding(f"task `{name}`", f"{split} questions", problem, f"{wanted} there"))


def _reward(reward: Reward) -> Finding:
    try:
        check_reward(reward)
    except CotreeError as error:
        return Finding("reward", "function", str(error))
    return Finding("reward", "function", remark=f"{reward.function} loads")


def _disk(recipe: Recipe, runs_dir: Path) -> Finding:
    folder = runs_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    needed = _LEAST_BYTES + _BYTES_PER_WEIGHT * _weights(recipe)
    said = f"{free / 1e9:.1f} GB free, a run takes up to about {needed / 1e9:.1f} GB"
    problem = ""
    if free < needed:
        problem = f"{said}; free some space or give another --runs-dir"
    elif not os.access(folder, os.W_OK):
        problem = "not writable; give another --runs-dir"
    return Finding(f"folder {runs_dir}", "disk", problem, said)


def _weights(recipe: Recipe) -> int:
    """How many weights the student has; 0 when it is not here, which the check of its model says."""
    from cotree.llm.embedded import locate
    from cotree.llm.gguf_file import GGUF

    try:
        return sum(
            prod(tensor.shape)
            for tensor in GGUF(locate(recipe.models[recipe.train.student].embedded or "")).tensors.values()
        )
    except CotreeError:
        return 0


async def _models(recipe: Recipe, note: Note) -> None:
    for name, model in recipe.models.items():
        subject = f"model `{name}`"
        try:
            # One after the other: two embedded models need not fit into memory together.
            async with open_endpoints({name: model}, attempts=_ATTEMPTS) as endpoints:
                endpoint = endpoints[name]
                servers = len(endpoint.clients)
                remark = "loaded" if model.embedded else f"{servers} server{'s' * (servers > 1)} ready"
                note(Finding(subject, "reach", remark=remark))
                for client in endpoint.clients:
                    where = f"{subject} at {client.url}" if servers > 1 else subject
                    if model.mode == "pooling":
                        await _scoring(client, recipe.search.reward or Reward(process=name), where, note)
                    else:
                        await _server(endpoint, client, where, note)
        except CotreeError as error:
            note(Finding(subject, "reach", str(error)))


async def _scoring(client: Client, reward: Reward, subject: str, note: Note) -> None:
    """That a process reward model gives each step a score."""
    asked = Question("check", "check", (_QUESTION,), "")
    messages = steps_messages(asked, ["One.", "Two."], reward.separator)
    try:
        completion = await client.complete(Request("", 1, 1, 0.0, 1.0, 0, (), messages, scores=True))
        worth = combined(json.loads(completion.choices[0].text), 2, reward.combine)
        note(Finding(subject, "scores", remark=f"2 for 2 steps, worth {worth:.2f}"))
    except CotreeError as error:
        note(Finding(subject, "scores", str(error)))


async def _server(endpoint: Endpoint, client: Client, subject: str, note: Note) -> None:
    """All checks of one server."""
    probe = Probe(endpoint, client)

    async def judged(name: str, work: Awaitable[Verdict]) -> bool:
        try:
            problem, remark = await work
        except CotreeError as error:
            problem, remark = str(error), ""
        note(Finding(subject, name, problem, remark))
        return not problem

    if await judged("template", probe.template()) and await judged("usage", probe.usage()):
        await judged("continues", probe.continues())
        await judged("exact", probe.exact())
        await judged("stop strings", probe.stops())
        await judged("samples", probe.samples())
        await judged("seed", probe.seed())


Verdict = tuple[str, str]  # the problem with its fix ("": none), and a remark


class Probe:
    """The questions that one server is asked. `template` and `usage` come first: the others compare with their text."""

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

    async def template(self) -> Verdict:
        """The conversation renders and holds what was said."""
        prompt = self.endpoint.begin([_QUESTION])
        if prompt.messages:
            return "", "the server renders it"
        answered = self.endpoint.begin([_QUESTION, {"role": "assistant", "content": "One."}, _QUESTION]).text
        if _QUESTION["content"] not in prompt.text or "One." not in answered:
            return "it leaves out what was said; use this model's own `tokenizer`", ""
        return "", f"renders, {len(prompt.text)} characters before the assistant's turn"

    async def usage(self) -> Verdict:
        """There is a text, and its tokens are counted as this side counts them."""
        done = await self.ask()
        choice = done.choices[0]
        # A character that max_tokens cut in half is no text to be continued.
        self.fresh = choice.text.rstrip("\ufffd")
        if not self.fresh.strip():
            return "the reply to a plain question is empty; is this a chat model with the right template?", ""
        if not 0 < choice.tokens <= _MAX_TOKENS + 1:
            return (
                f"{choice.tokens} tokens reported for max_tokens {_MAX_TOKENS}; the server's usage is not to trust",
                "",
            )
        if self.endpoint.tokenizer is not None:
            own = len(self.endpoint.tokenizer(self.endpoint.begin([_QUESTION]).text)["input_ids"])
            if abs(own - done.prompt_tokens) > max(2, own // 20):
                return (
                    f"the server counts {done.prompt_tokens} prompt tokens, `tokenizer` {own}; is it this model's?",
                    "",
                )
        return "", f"{done.prompt_tokens} prompt and {choice.tokens} completion tokens"

    async def continues(self) -> Verdict:
        """Words that the model would not have chosen are gone on from, not begun anew or repeated."""
        reply = (await self.ask(_FOREIGN)).choices[0].text
        begins, start = reply.strip(), self.fresh.strip()[:16]
        if _FOREIGN in reply or _QUESTION["content"] in reply:
            return f"the reply repeats the prompt ({_quote(reply)}); switch the server's `echo` off", ""
        if _NEW_TURN.match(begins) or (len(start) > 3 and begins.startswith(start)):
            return (
                f"the prefix {_quote(_FOREIGN)} is not continued, the reply begins anew: {_quote(reply)}; {self._fix}",
                "",
            )
        return "", f"{_quote(_FOREIGN[-12:])} goes on with {_quote(reply)}"

    async def exact(self) -> Verdict:
        """The first half of its own greedy reply is completed to the same reply."""
        spaces = [i for i, c in enumerate(self.fresh) if c == " " and self.fresh[:i].strip()]
        # Before a space a cut does not change how the text falls into tokens.
        cut = min(spaces, key=lambda i: abs(i - len(self.fresh) // 2), default=len(self.fresh) // 2)
        agreed, reply = await self._agreement(cut)
        wanted = len(_squash(self.fresh[cut:]))
        if agreed < min(12, (wanted + 1) // 2):
            second = _quote(self.fresh[cut:])
            return f"after half of its own reply it writes {_quote(reply)} instead of {second}; {self._fix}", ""
        if agreed < wanted:
            return "", f"goes on with the same {agreed} characters, then differs (rounding; servers that batch do that)"
        amid = cut + 3
        inside, _ = await self._agreement(amid)
        same = inside == len(_squash(self.fresh[amid:]))
        return "", f"its greedy reply cut in two is completed to itself, cut amid a word {'too' if same else 'not'}"

    async def _agreement(self, cut: int) -> tuple[int, str]:
        """How many characters of the greedy reply after `cut` come back, whitespace aside, and what came."""
        reply = (await self.ask(self.fresh[:cut])).choices[0].text
        pairs = zip(_squash(self.fresh[cut:]), _squash(reply), strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)), reply

    async def stops(self) -> Verdict:
        """A stop string ends the text and is not in it."""
        words = self.fresh.split()
        stop = words[len(words) // 3] if len(words) > 2 else self.fresh.strip()[-1:]
        choice = (await self.ask(stop=stop)).choices[0]
        if choice.text.rstrip().endswith(stop) and choice.finish_reason == "stop" and choice.text.count(stop) == 1:
            return f"the text keeps the stop string {_quote(stop)}; make the server leave it out", ""
        if stop in choice.text:
            return (
                f"the text goes on after the stop string {_quote(stop)}: {_quote(choice.text)}; use another server",
                "",
            )
        if choice.finish_reason != "stop":
            return "", f"not seen: this time the model did not write {_quote(stop)}"
        return "", f"{_quote(stop)} ended the text"

    async def samples(self) -> Verdict:
        """A request for n samples brings n."""
        try:
            done = await self.ask(n=3, max_tokens=16, temperature=1.0)
        except CotreeError as error:
            return f"{error}; siblings are written by one request with `n`, so use a server that takes it", ""
        return "", f"3 came for n=3, {len({choice.text for choice in done.choices})} different"

    async def seed(self) -> Verdict:
        """Whether a seed gives the same text again; nothing depends on it."""
        one, two = [(await self.ask(temperature=1.0)).choices[0].text for _ in range(2)]
        return (
            "",
            "the same seed gives the same text"
            if one == two
            else "the same seed gives another text (the journal does not mind)",
        )

    @property
    def _fix(self) -> str:
        if self.endpoint.tokenizer is None:
            return (
                "chat mode needs a server that takes continue_final_message; else set `tokenizer` and mode: completions"
            )
        return "is `tokenizer` this model's, and does the server take the prompt as it is?"


def _squash(text: str) -> str:
    return " ".join(text.split())


def _quote(text: str) -> str:
    """The beginning of a text in one line, quoted; models' words must not drive the terminal."""
    return repr(text if len(text) <= 40 else text[:40] + "...")
