"""treequest's StandardMCTS doing rollouts against the same stub server, and what its tree costs a node.

A treequest node is a whole chain: one trial writes sub_task, thinking and answer in three requests (it knows no
thoughts) and is judged as cotree judges. `step`, as its README shows it, copies the tree and waits for each trial;
`ask_batch` and `tell` are driven in the best way that its interface allows: in place, all of a node's samples at once,
many trees at once, over the bare aiohttp client.
"""

from __future__ import annotations

import asyncio
import gc
import http.client
import json
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from benchmarks.search_tree import TEXT
from treequest import StandardMCTS

from cotree.search.thoughts import PREFIXES, draw
from cotree.tasks import Question, task

STEPS = ("sub_task", "thinking", "answer")
ACTION = "chain"
Score = tuple[str, float]


@dataclass(frozen=True)
class Run:
    """What rollouts took."""

    seconds: float
    cpu_seconds: float
    rollouts: int

    @property
    def requests(self) -> int:
        """A rollout is three."""
        return len(STEPS) * self.rollouts


def _body(prompt: str, seed: int) -> bytes:
    fields = {"model": "default", "prompt": prompt, "n": 1, "max_tokens": 64, "temperature": 0.8, "seed": seed}
    return json.dumps(fields).encode()


def _rollout(question: Question, parent: str | None, seed: int) -> tuple[list[tuple[str, int]], str]:
    """The three requests' prefixes with their seeds, and the prompt that they continue."""
    start = f"{question.messages[-1]['content']}\n{parent or ''}"
    return [(PREFIXES[kind][0], draw(f"{question.id}/{seed}/{kind}", 2**31)) for kind in STEPS], start


def _judge(question: Question, text: str) -> Score:
    return text, task("letters").judge(question, text + "}").reward


def one_tree_steps(url: str, question: Question, rollouts: int) -> Run:
    """One tree by `step`: a trial after the other, each waiting for its requests."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc)

    def generate(parent: str | None) -> Score:
        steps, text = _rollout(question, parent, next(numbers))
        for prefix, seed in steps:
            connection.request("POST", "/v1/completions", _body(text + prefix, seed))
            text += prefix + json.loads(connection.getresponse().read())["choices"][0]["text"]
        return _judge(question, text)

    numbers = iter(range(rollouts))
    algorithm: StandardMCTS[str] = StandardMCTS()
    started, cpu = time.perf_counter(), time.process_time()
    state = algorithm.init_tree()
    for _ in range(rollouts):
        state = algorithm.step(state, {ACTION: generate})
    connection.close()
    return Run(time.perf_counter() - started, time.process_time() - cpu, rollouts)


async def trees(url: str, questions: Sequence[Question], *, rollouts: int, samples: int, in_flight: int) -> Run:
    """A tree a question by `ask_batch` and `tell`, `samples` trials at once in each, `in_flight` trees at once."""
    gate = asyncio.Semaphore(in_flight)
    async with _session() as session:

        async def generate(question: Question, parent: str | None, number: int) -> Score:
            steps, text = _rollout(question, parent, number)
            for prefix, seed in steps:
                async with session.post(f"{url}/v1/completions", data=_body(text + prefix, seed)) as reply:
                    text += prefix + json.loads(await reply.read())["choices"][0]["text"]
            return _judge(question, text)

        async def tree(question: Question) -> None:
            async with gate:
                algorithm: StandardMCTS[str] = StandardMCTS(samples_per_action=samples)
                state, done = algorithm.init_tree(), 0
                while done < rollouts:
                    state, trials = algorithm.ask_batch(state, min(samples, rollouts - done), [ACTION])
                    results = await asyncio.gather(
                        *(generate(question, trial.parent_state, done + i) for i, trial in enumerate(trials))
                    )
                    for trial, result in zip(trials, results, strict=True):
                        state = algorithm.tell(state, trial.trial_id, result)
                    done += len(trials)

        started, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*map(tree, questions))
        return Run(time.perf_counter() - started, time.process_time() - cpu, rollouts * len(questions))


@asynccontextmanager
async def _session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        yield session


def _generator(seed: int) -> Callable[[Any], Score]:
    numbers = iter(range(10**9))

    def generate(_: Any) -> Score:
        number = next(numbers)
        return f"{TEXT}{number}", float(draw(f"{seed}/{number}", 2))

    return generate


def _grow(
    algorithm: StandardMCTS[str], state: Any, size: int, generate: Callable[[Any], Score], *, inplace: bool
) -> Any:
    while len(state.tree) < size:
        state = algorithm.step(state, {ACTION: generate}, inplace=inplace)
    return state


def milliseconds(sizes: Sequence[int], seed: int, nodes: int = 30) -> dict[str, dict[int, float]]:
    """CPU ms a node at each size: `step` (copies the tree) and `in_place`."""
    found: dict[str, dict[int, float]] = {"step": {}, "in_place": {}}
    for size in sizes:
        for name in found:
            algorithm: StandardMCTS[str] = StandardMCTS(samples_per_action=4)
            generate = _generator(seed)
            state = _grow(algorithm, algorithm.init_tree(), size - nodes, generate, inplace=True)
            started = time.process_time()
            _grow(algorithm, state, size, generate, inplace=name == "in_place")
            found[name][size] = 1000 * (time.process_time() - started) / nodes
    return found


def bytes_a_node(size: int, seed: int) -> float:
    """Memory a node with a state of 100 characters; by `ask` and `tell`, as a tree in use holds its trials."""
    gc.collect()
    tracemalloc.start()
    algorithm: StandardMCTS[str] = StandardMCTS(samples_per_action=4)
    state = _grow(algorithm, algorithm.init_tree(), size, _generator(seed), inplace=True)
    gc.collect()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return held / len(state.tree)
