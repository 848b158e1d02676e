"""Test that a server generates as the search needs it: exact continuation, stop strings, usage, and n samples.

A search generates a chain in pieces, each continuing the assistant's text; a server that starts a new turn, echoes the
given text or ignores stop strings would silently spoil every tree.
"""

from __future__ import annotations

import itertools
import re

from cotree.base.errors import CotreeError, UsageError
from cotree.models.client import Client, Completion, Request
from cotree.models.endpoints import Endpoint

QUESTION = {"role": "user", "content": "Count from one to thirty in words, separated by commas."}
# An unlikely start of a reply that ends inside a word, so only a server that reads it continues correctly.
_FOREIGN = "Zq41: eleven, twelve, thirt"
_NEW_TURN = re.compile(
    r"\W*(<\||<start_of_turn|\[/?INST|assistant\b|user\b|sure\b|certainly\b|of course\b|hello\b)", re.I
)
_MAX_TOKENS = 48


class ServerProbe:
    """Tests of one server: each method returns a remark, or raises UsageError with problem and fix.

    Call `template` and `usage` first: the other tests use their results.
    """

    def __init__(self, endpoint: Endpoint, client: Client) -> None:
        self.endpoint, self.client = endpoint, client
        self.fresh = ""  # the greedy reply to the bare question

    async def ask(
        self, prefix: str = "", *, n: int = 1, max_tokens: int = _MAX_TOKENS, temperature: float = 0.0, stop: str = ""
    ) -> Completion:
        """Request a continuation of `prefix` as the start of the assistant's turn."""
        prompt = self.endpoint.prompt([QUESTION])
        stops = (stop,) if stop else ()
        words = prompt.text + prompt.opened + prefix
        request = Request(words, n, max_tokens, temperature, 1.0, 11, stops, prompt.messages)
        return await self.client.complete(request)

    async def template(self) -> str:
        """Test that the template renders the conversation with all its texts."""
        prompt = self.endpoint.prompt([QUESTION])
        if prompt.messages:
            return "the server renders it"
        answered = self.endpoint.prompt([QUESTION, {"role": "assistant", "content": "One."}, QUESTION]).text
        if QUESTION["content"] not in prompt.text or "One." not in answered:
            raise UsageError("it leaves out what was said; use this model's own `tokenizer`")
        return f"renders, {len(prompt.text)} characters before the assistant's turn"

    async def usage(self) -> str:
        """Test that a text comes back, and that its reported token count matches the local tokenizer's."""
        done = await self.ask()
        choice = done.choices[0]
        # A character that max_tokens cut in half is no text to be continued.
        self.fresh = choice.text.rstrip("\ufffd")
        if not self.fresh.strip():
            raise UsageError("the reply to a plain question is empty; is this a chat model with the right template?")
        if done.misreported:
            raise UsageError(f"the server's `usage` cannot be true for max_tokens {_MAX_TOKENS}; it is not to trust")
        if not 0 < choice.tokens <= _MAX_TOKENS + 1:
            raise UsageError(f"the reply has {choice.tokens} tokens for max_tokens {_MAX_TOKENS}; does it heed that?")
        if self.endpoint.tokenizer is not None:
            prompt = self.endpoint.prompt([QUESTION])
            own = len(self.endpoint.tokenizer(prompt.text + prompt.opened)["input_ids"])
            if abs(own - done.prompt_tokens) > max(2, own // 20):
                counted = f"the server counts {done.prompt_tokens} prompt tokens, `tokenizer` {own}"
                raise UsageError(f"{counted}; is it this model's?")
        return f"{done.prompt_tokens} prompt and {choice.tokens} completion tokens"

    async def continues(self) -> str:
        """Test that an unlikely prefix is continued, without a new turn or an echo."""
        reply = (await self.ask(_FOREIGN)).choices[0].text
        start = self.fresh.strip()[:16]
        if _FOREIGN in reply or QUESTION["content"] in reply:
            raise UsageError(f"the reply repeats the prompt ({_quote(reply)}); switch the server's `echo` off")
        if _NEW_TURN.match(reply) or (len(start) > 3 and reply.strip().startswith(start)):
            problem = f"the prefix {_quote(_FOREIGN)} is not continued, the reply begins anew: {_quote(reply)}"
            raise UsageError(f"{problem}; {self._fix}")
        return f"{_quote(_FOREIGN[-12:])} goes on with {_quote(reply)}"

    async def exact(self) -> str:
        """Test that the first half of the model's greedy reply is completed to the same reply."""
        spaces = [i for i, c in enumerate(self.fresh) if c == " " and self.fresh[:i].strip()]
        # Cut before a space, which does not change the tokens.
        cut = min(spaces, key=lambda i: abs(i - len(self.fresh) // 2), default=len(self.fresh) // 2)
        agreed, reply = await self._agreement(cut)
        wanted = len(_squash(self.fresh[cut:]))
        if agreed < min(12, (wanted + 1) // 2):
            problem = f"after half of its own reply it writes {_quote(reply)} instead of {_quote(self.fresh[cut:])}"
            raise UsageError(f"{problem}; {self._fix}")
        if agreed < wanted:
            return f"goes on with the same {agreed} characters, then differs (rounding; servers that batch do that)"
        inside, _ = await self._agreement(cut + 3)
        same = inside == len(_squash(self.fresh[cut + 3 :]))
        return f"its greedy reply cut in two is completed to itself, cut amid a word {'too' if same else 'not'}"

    async def _agreement(self, cut: int) -> tuple[int, str]:
        """The number of characters after `cut` on which the continuation agrees with the greedy reply (ignoring white
        space), and the continuation."""
        reply = (await self.ask(self.fresh[:cut])).choices[0].text
        pairs = zip(_squash(self.fresh[cut:]), _squash(reply), strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)), reply

    async def stops(self) -> str:
        """Test that a stop string ends the text and is not part of it."""
        words = self.fresh.split()
        stop = words[len(words) // 3] if len(words) > 2 else self.fresh.strip()[-1:]
        choice = (await self.ask(stop=stop)).choices[0]
        if choice.text.rstrip().endswith(stop) and choice.finish_reason == "stop" and choice.text.count(stop) == 1:
            raise UsageError(f"the text keeps the stop string {_quote(stop)}; make the server leave it out")
        if stop in choice.text:
            problem = f"the text goes on after the stop string {_quote(stop)}: {_quote(choice.text)}"
            raise UsageError(f"{problem}; use another server")
        if choice.finish_reason != "stop":
            return f"not seen: this time the model did not write {_quote(stop)}"
        return f"{_quote(stop)} ended the text"

    async def samples(self) -> str:
        """Test that a request for n samples returns n."""
        try:
            done = await self.ask(n=3, max_tokens=16, temperature=1.0)
        except CotreeError as error:
            raise UsageError(
                f"{error}; siblings are written by one request with `n`; use a server that takes it"
            ) from None
        return f"3 came for n=3, {len({choice.text for choice in done.choices})} different"

    @property
    def _fix(self) -> str:
        if self.endpoint.tokenizer is not None:
            return "is `tokenizer` this model's, and does the server take the prompt as it is?"
        return "chat mode needs a server that takes continue_final_message; else set `tokenizer` and mode: completions"


def _squash(text: str) -> str:
    return " ".join(text.split())


def _quote(text: str) -> str:
    """The start of a text, quoted in one line, without control characters."""
    return repr(text if len(text) <= 40 else text[:40] + "...")
