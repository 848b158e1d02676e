"""The models of a recipe as open endpoints: weights served by llama.cpp in this process, others reached over HTTP.

Whoever asks for a completion sees only an `Endpoint`. A question stays with one server of a model, so that its prompts
stay in that server's cache.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cotree.base.errors import UsageError
from cotree.models.client import ATTEMPTS, Client
from cotree.models.encode import render_prompt
from cotree.models.llama_cpp import serve
from cotree.models.settings import Model, Price
from cotree.models.tokenizer import load_tokenizer, token_counter
from cotree.models.weights import gguf_file, identity_text, tokenizer_source
from cotree.models.wire import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Seconds. llama.cpp under load can take minutes for a batch, and a call that is only slow must not be made twice.
_SERVER_TIMEOUT, _LLAMA_CPP_TIMEOUT = 60.0, 600.0


@dataclass(frozen=True)
class Endpoint:
    """An open model.

    name: in the recipe. clients: one for each of its servers. tokenizer: renders its prompts, None where the servers
    do. identity: `identity_text` of the model, a part of the key of every journalled completion.
    """

    name: str
    clients: tuple[Client, ...]
    tokenizer: PreTrainedTokenizerBase | None
    identity: str
    price: Price | None = None

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> Prompt:
        """A conversation up to where the assistant begins to write."""
        if self.tokenizer is None:
            return Prompt("", tuple((message["role"], message["content"]) for message in messages))
        return Prompt(render_prompt(self.tokenizer, messages))

    def client_for(self, question: str) -> Client:
        """The server that a question stays with (rendezvous hashing: another server takes over only its own share)."""
        return max(self.clients, key=lambda client: hashlib.sha256(f"{client.url}\n{question}".encode()).digest())

    @property
    def cost(self) -> float | None:
        """What the tokens of all its servers cost so far, in the price's currency; None without a price."""
        return None if self.price is None else sum(client.counters.cost(self.price) for client in self.clients)


@asynccontextmanager
async def open_endpoints(
    models: Mapping[str, Model], *, widest: int = 8, attempts: int = ATTEMPTS
) -> AsyncIterator[dict[str, Endpoint]]:
    """Start or reach every model; all are ready when this yields.

    Args:
        widest: the most samples that one request will ask for; llama.cpp needs a slot for each.
        attempts: how often a request is sent before it fails.

    Raises:
        UsageError: a model is missing, a server does not answer (all that do not are named), or an API key is not in
            the environment.
    """
    async with AsyncExitStack() as stack:
        endpoints: dict[str, Endpoint] = {}
        for name, model in models.items():
            api_key = os.environ.get(model.api_key_env or "")
            if model.api_key_env is not None and not api_key:
                fault = f"the environment variable {model.api_key_env} is not set; export its API key"
                raise UsageError(f"model `{name}`: {fault}")
            tokenizer, urls, timeout = _tokenizer(model), model.urls, _SERVER_TIMEOUT
            if model.weights is not None:
                slots = max(model.max_in_flight, widest)
                urls = (stack.enter_context(serve(gguf_file(model, model.gguf), slots=slots, shared=True)),)
                timeout = _LLAMA_CPP_TIMEOUT
            clients = [
                Client(
                    name,
                    url,
                    model.model,
                    max_in_flight=model.max_in_flight,
                    count_tokens=token_counter(tokenizer),
                    api_key=api_key,
                    omit=model.omit,
                    rename=dict(model.rename.items()),
                    timeout=timeout,
                    attempts=attempts,
                )
                for url in urls
            ]
            for client in clients:
                await stack.enter_async_context(client)
            if model.weights is None:
                found = await asyncio.gather(*(client.find_problem(model.mode) for client in clients))
                if problems := [problem for problem in found if problem]:
                    which = f"{len(problems)} of {len(urls)} servers are not ready: " if len(urls) > 1 else ""
                    raise UsageError(which + "; ".join(problems))
            rendering = tokenizer if model.mode == "completions" else None
            endpoints[name] = Endpoint(name, tuple(clients), rendering, identity_text(model), model.price)
        yield endpoints


async def check_servers(models: Mapping[str, Model]) -> None:
    """Ask every server whether it is ready, and read every model's tokenizer; no weights are loaded.

    Raises:
        UsageError: servers that are not ready (all of a model are named), or a tokenizer or an API key is missing.
    """
    async with open_endpoints({name: model for name, model in models.items() if model.weights is None}):
        for model in models.values():
            if model.weights is not None:
                _tokenizer(model)


def _tokenizer(model: Model) -> PreTrainedTokenizerBase | None:
    source = tokenizer_source(model)
    return None if source is None else load_tokenizer(source, chats=False)
