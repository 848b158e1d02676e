"""Decoding against a fake model: it never sees gold, the vote is counted over the whole tree, tokens are equal."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from tests.support.benchmark_data import benchmark_rows
from tests.support.fake_server import FakeServerThread, count_tokens, draw
from tests.support.search import PlainTemplate

from cotree.base.errors import CotreeError, UsageError
from cotree.decode.strategies import Decoded, GoldFreeScorer, OpenTask, search_answer
from cotree.models.client import Client
from cotree.models.endpoints import Endpoint
from cotree.search.growth import Growth
from cotree.search.journal import SearchModels
from cotree.search.mcts import Node
from cotree.search.settings import Reward, Search, Stop, Writer
from cotree.tasks import Question, Task, Verdict, task
from cotree.tasks.base import group_answers

ONE = {"thinker": (Writer(model="one"),)}
WIDE = {"root": {"thinking": 6}, "thinking": {"answer": 2}, "reflection": {"thinking": 1}}


def talk(prompt: str, seed: int, index: int) -> str:
    """A thought, or a number of which 3 is the commonest; a whole chain ends with its answer."""
    number = (3, 4, 3, 5)[draw(prompt, seed, index) % 4]
    if prompt.endswith("{"):
        return f"{number}" + "}"
    return f" step {draw(prompt, seed, index) % 97}\nThe answer is: \\boxed{{{number}}}\nmore"


def poem(prompt: str, seed: int, index: int) -> str:
    """A thought, then a free text."""
    words = " ".join("abcdefg"[draw(prompt, seed, index, i) % 7] for i in range(4))
    return words if prompt.endswith("is:\n") else f" I think {words}\nThe answer is:\n{words}"


def search(**changes: Any) -> Search:
    base = {"rollouts": 12, "leaves_per_round": 2, "patterns": {"wide": WIDE}, "ends": "line"}
    return Search.model_validate(base | {"max_reflections": 1} | changes)


def budget(tokens: int, **changes: Any) -> Search:
    settings = search(stop=Stop(tokens=tokens), **changes)
    return settings.model_copy(update={"rollouts": 10_000})


def ask(
    kind: Task,
    question: Question,
    settings: Search,
    *,
    server: dict[str, Any] | None = None,
    rounds: list[Decoded] | None = None,
    **how: Any,
) -> Decoded:
    async def run(url: str) -> Decoded:
        one, prm = (Client(n, url, n, max_in_flight=64, count_tokens=count_tokens, backoff=0.01) for n in ("one", "p"))
        async with one, prm:
            endpoints = {"one": Endpoint("one", (one,), PlainTemplate(), "one"), "p": Endpoint("p", (prm,), None, "p")}
            note = [] if rounds is None else rounds
            models = SearchModels(endpoints)
            return await search_answer(kind, question, models, settings, roles=ONE, on_round=note.append, **how)

    with FakeServerThread(**({"reply": talk} | (server or {}))) as fake:
        best = asyncio.run(run(fake.url))
        assert best.spent.requests == fake.calls
    return best


def boxed(text: str = "How many?") -> tuple[OpenTask, Question]:
    kind = OpenTask(boxed=True)
    return kind, kind.question_of([{"role": "user", "content": text}])


def free(text: str = "Why?") -> tuple[OpenTask, Question]:
    kind = OpenTask(boxed=False)
    return kind, kind.question_of([{"role": "user", "content": text}])


# --- no gold ------------------------------------------------------------------------------------------------------


def _looked(*_: object) -> Any:
    raise AssertionError("decoding looked at what is right")


class Secret(str):
    """A gold answer, or a later turn's, that must not be read."""

    __slots__ = ()
    __eq__ = __ne__ = __str__ = __repr__ = __len__ = __iter__ = __contains__ = __format__ = __add__ = _looked
    __hash__ = __getitem__ = strip = casefold = translate = _looked


class Hidden(Mapping[str, Any]):
    """What a verifier needs, out of reach."""

    __getitem__ = __iter__ = __len__ = __contains__ = get = _looked


@pytest.mark.parametrize("name", ["arithmetic", "letters", "gsm8k", "math500", "blocksworld"])
@pytest.mark.parametrize("strategy", ["mcts", "vote"])
def test_decoding_works_where_looking_at_gold_raises(name: str, strategy: str) -> None:
    if name not in ("arithmetic", "letters"):
        benchmark_rows({"gsm8k": "gsm8k_test.jsonl", "math500": "math500.jsonl"}.get(name, "blocksworld.jsonl.gz"))
    kind = task(name)
    first = kind.questions("test", 1)[0]
    # A regular expression reads a Secret's characters without asking it, but nothing that is no string.
    gold: Any = Hidden() if name in ("arithmetic", "letters") else Secret("3")
    secret = Question(first.id, first.task, first.messages, gold, first.family, spec=Hidden())
    with pytest.raises((AssertionError, TypeError), match=r"looked at what is right|expected string"):
        kind.judge(secret, "\\boxed{4}" if name != "blocksworld" else "pick up the red block")

    def plans(prompt: str, seed: int, index: int) -> str:
        plan = f"pick up the {('red', 'red', 'blue')[draw(prompt, seed, index) % 3]} block"
        return plan if prompt.endswith("is:\n") else f" I see {seed % 7}\nThe answer is:\n{plan}"

    reply = plans if name == "blocksworld" else talk
    best = ask(kind, secret, search(), server={"reply": reply}, strategy=strategy)
    assert best.answer in best.votes
    assert best.chains >= 12


def test_another_gold_changes_nothing() -> None:
    kind = task("arithmetic")
    first = kind.questions("dev", 1)[0]
    found = [
        ask(kind, Question(first.id, first.task, first.messages, gold, first.family), search()) for gold in ("3", "77")
    ]
    assert found[0] == found[1]


# --- the vote -----------------------------------------------------------------------------------------------------


def grown(settings: Search, scorer: GoldFreeScorer, reply: Any = talk) -> tuple[Growth, list[list[tuple[int, float]]]]:
    """A tree grown by hand, and each round's leaves with their rewards."""
    kind, question = boxed()

    async def run(url: str) -> tuple[Growth, list[list[tuple[int, float]]]]:
        async with Client("one", url, "one", max_in_flight=8, count_tokens=count_tokens) as one:
            models = SearchModels({"one": Endpoint("one", (one,), PlainTemplate(), "one")})
            growth = Growth(kind, question, models, settings, roles=ONE, seed="0/t", scorer=scorer)
            rounds = []
            while not growth.search.done:
                await growth.grow_round()
                rounds.append([(leaf.node_id, leaf.reward or 0.0) for leaf in growth.search.leaves])
        return growth, rounds

    with FakeServerThread(reply=reply) as server:
        return asyncio.run(run(server.url))


def answered(growth: Growth, leaves: Sequence[Node]) -> list[str | None]:
    return [growth.task.extract(leaf.text, "stop", "strict") if leaf.verdict is None else None for leaf in leaves]


def test_a_leaf_is_worth_its_share_of_the_vote_and_is_valued_anew_each_round() -> None:
    growth, rounds = grown(search(max_reflections=0), GoldFreeScorer("vote"))
    leaves = growth.search.leaves
    for told in rounds:
        known = [leaf for leaf in leaves if leaf.node_id in dict(told)]
        answers = answered(growth, known)
        for leaf, answer in zip(known, answers, strict=True):
            share = answers.count(answer) / sum(a is not None for a in answers)
            assert dict(told)[leaf.node_id] == pytest.approx(share if answer is not None else 0.0)
    first = rounds[0][0]
    assert dict(rounds[-1])[first[0]] != first[1], "the first leaf's value moved as the votes came in"
    for node in growth.search.nodes:
        below = [leaf for leaf in leaves if node is growth.search.root or node in leaf.chain()]
        assert node.visits == len(below)
        assert node.value == pytest.approx(sum(leaf.reward or 0.0 for leaf in below))
    assert {leaf.verdict for leaf in leaves} == {None}, "nobody verified anything"


def test_a_leaf_without_an_answer_is_worth_nothing_and_has_no_vote() -> None:
    def empty_now_and_then(prompt: str, seed: int, index: int) -> str:
        return "}" if prompt.endswith("{") and draw(prompt, seed) % 3 == 0 else talk(prompt, seed, index)

    growth, _ = grown(search(rollouts=16), GoldFreeScorer("vote"), empty_now_and_then)
    kinds = {leaf.verdict for leaf in growth.search.leaves}
    assert kinds == {None, "no_answer"}
    assert {leaf.reward for leaf in growth.search.leaves if leaf.verdict} == {0.0}
    best = ask(*boxed(), search(rollouts=16), server={"reply": empty_now_and_then})
    assert sum(best.votes.values()) < best.chains


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_an_answer_that_disagrees_with_the_vote_earns_a_reflection_and_no_more_than_allowed(bound: int) -> None:
    growth, _ = grown(search(max_reflections=bound, rollouts=20), GoldFreeScorer("vote"))
    reflected = [node for node in growth.search.nodes if node.type == "reflection"]
    waiting = [
        node for node in growth.search.nodes if any(slot.type == "reflection" and not slot.taken for slot in node.slots)
    ]
    assert len(reflected) + len(waiting) == bound
    agreed, _ = grown(
        search(max_reflections=3), GoldFreeScorer("vote"), lambda p, s, i: "3}" if p.endswith("{") else talk(p, s, i)
    )
    assert not any(node.type == "reflection" for node in agreed.search.nodes), "who agrees is not doubted"


def test_equal_answers_in_other_words_are_one_vote() -> None:
    kind, question = boxed()
    answers = ["1/2", "0.5", "Paris", "paris", "dog", "god", None]
    assert group_answers(kind, question, answers) == [0, 0, 1, 1, 2, 3, None]


def test_the_best_answer_can_be_read_after_each_round() -> None:
    rounds: list[Decoded] = []
    best = ask(*boxed(), budget(300), rounds=rounds)
    tokens = [so_far.spent.completion_tokens for so_far in rounds]
    assert len(rounds) > 4
    assert tokens == sorted(tokens)
    assert all(so_far.answer in so_far.votes and not so_far.stopped for so_far in rounds)
    assert best.stopped == "tokens"
    assert best.answer == max(best.votes, key=lambda answer: best.votes[answer]) == "3"
    assert best.text.endswith(best.answer_text)


# --- other values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("usage", ["llama.cpp", "vllm"])
def test_likelihood_is_the_mean_over_the_tokens_of_the_chain(usage: Any) -> None:
    kind, question = free()
    best = ask(kind, question, search(), server={"reply": poem, "usage": usage})
    assert best.votes == {}
    thoughts = (best.reasoning, best.answer_text.removeprefix("The answer is:\n"))
    words = [[*thought.split(), "</s>"] for thought in thoughts]
    values = [-(draw(word) % 1000) / 400 for thought in words for word in thought]
    rounds: list[Decoded] = []
    ask(kind, question, search(), server={"reply": poem, "usage": usage}, rounds=rounds)

    async def value(node: Node) -> float:
        return await GoldFreeScorer("likelihood").chain_value(None, node)  # type: ignore[arg-type]

    chain = Node(0, None, None, "")
    for thought in words:
        logprob = sum(-(draw(word) % 1000) / 400 for word in thought) / len(thought)
        chain = Node(1, 0, "thinking", "", tokens=len(thought), parent=chain, logprob=logprob)
    assert asyncio.run(value(chain)) == pytest.approx(math.exp(sum(values) / len(values)))


def test_of_free_texts_the_likeliest_is_chosen_by_every_strategy_that_can() -> None:
    for strategy in ("mcts", "best_of_n", "beam"):
        seen: list[Decoded] = []
        best = ask(*free(), search(), server={"reply": poem}, strategy=strategy, value="likelihood", rounds=seen)
        assert best.answer is not None
        assert "The answer is" not in best.answer
        assert best == ask(*free(), search(), server={"reply": poem}, strategy=strategy, value="likelihood")


def longest(question: Question, text: str, verdict: Verdict | None) -> float:
    assert verdict is None
    assert question.gold == ""
    return min(1.0, len(text) / 100)


@pytest.mark.parametrize("strategy", ["mcts", "best_of_n", "beam"])
@pytest.mark.parametrize("source", ["function", "judge", "process"])
def test_a_verifier_values_without_gold(strategy: str, source: str) -> None:
    reward = {"function": {"function": f"{__name__}:longest"}, "judge": {"judge": "one"}, "process": {"process": "p"}}

    def judging(prompt: str, seed: int, index: int) -> str:
        return " yes" if "Reply with yes or no" in prompt else talk(prompt, seed, index)

    settings = search(reward=Reward.model_validate(reward[source]))
    kind = task("arithmetic")
    best = ask(
        kind, kind.questions("dev", 1)[0], settings, server={"reply": judging}, strategy=strategy, value="verifier"
    )
    assert best.answer in best.votes
    assert max(best.votes.values()) > 0


def test_a_server_without_log_probabilities_is_one_line_that_names_the_way_out() -> None:
    with pytest.raises((CotreeError, ExceptionGroup)) as caught:
        ask(*free(), search(), server={"reply": poem, "ignores": ["logprobs"]})
    error: BaseException = caught.value
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    assert "no log-probabilities; use another value than likelihood" in str(error)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"value": "vote"}, "can be likelihood here, not vote: free texts cannot vote"),
        ({"strategy": "vote"}, "^free texts cannot vote: use mcts, best_of_n or beam$"),
        ({"strategy": "tree"}, "strategies are mcts, vote, best_of_n, beam"),
        ({"value": "verifier"}, "a verifier needs a `reward`"),
    ],
)
def test_what_does_not_go_together_is_refused_before_a_token_is_spent(how: dict[str, Any], message: str) -> None:
    with FakeServerThread(reply=poem) as server:
        with pytest.raises(UsageError, match=message):
            ask(*free(), search(), **how)
        assert server.calls == 0
    with pytest.raises(UsageError, match="chooses a chain by its own value"):
        ask(*boxed(), search(), strategy="beam", value="vote")


# --- budgets and determinism --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "value"), [("mcts", "vote"), ("vote", "vote"), ("best_of_n", "likelihood"), ("beam", "likelihood")]
)
def test_every_strategy_spends_the_budget_to_the_nearest_of_its_steps(strategy: str, value: str) -> None:
    rounds: list[Decoded] = []
    best = ask(*boxed(), budget(600), server={"usage": "vllm"}, strategy=strategy, value=value, rounds=rounds)
    steps = [rounds[0].spent.completion_tokens] + [
        b.spent.completion_tokens - a.spent.completion_tokens for a, b in itertools.pairwise(rounds)
    ]
    assert abs(best.spent.completion_tokens - 600) <= max(steps)
    assert best.stopped == "tokens"


@pytest.mark.parametrize("strategy", ["mcts", "vote", "beam"])
def test_the_answer_does_not_depend_on_latency(strategy: str) -> None:
    value = "likelihood" if strategy == "beam" else "vote"
    settings = budget(300, leaves_per_round=4)
    calm = ask(*boxed(), settings, strategy=strategy, value=value, seed=5)
    stormy = {"latency": (0.0, 0.03), "fault_rate": 0.1, "fault_kinds": ("500", "reset")}
    kind, question = boxed()

    async def run(url: str) -> Decoded:
        async with Client("one", url, "one", max_in_flight=8, count_tokens=count_tokens, backoff=0.01) as one:
            models = SearchModels({"one": Endpoint("one", (one,), PlainTemplate(), "one")})
            return await search_answer(
                kind, question, models, settings, roles=ONE, strategy=strategy, value=value, seed=5
            )

    with FakeServerThread(reply=talk, **stormy) as server:
        assert asyncio.run(run(server.url)) == calm
    other = ask(*boxed(), settings, strategy=strategy, value=value, seed=6)
    assert (other.text, other.votes) != (calm.text, calm.votes)


def test_a_deadline_ends_it_with_the_best_so_far() -> None:
    best = ask(*boxed(), search(rollouts=1000, stop=Stop(seconds=1e-9)))
    assert best.stopped == "deadline"
    assert best.answer is not None
    assert best.chains < 20


@pytest.mark.real
def test_the_real_model_is_decoded_with_votes_and_likelihood() -> None:
    from cotree.base.progress import Output
    from cotree.decode.answer import decode as decode_one

    question = task("arithmetic").questions()[0].id
    for value in ("vote", "likelihood"):
        best = decode_one(
            task="arithmetic",
            question_id=question,
            value=value,
            rollouts=4,
            overrides=["max_thought_tokens=24"],
            output=Output(quiet=True),
        )
        assert best.answer is not None
        assert best.spent.completion_tokens > 0
        assert 0 < sum(best.votes.values()) <= best.chains
