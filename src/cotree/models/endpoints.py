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
from cotree.models.chat import Prompt, render
from cotree.models.client import ATTEMPTS, Client, Counters
from cotree.models.identity import identity_text
from cotree.models.llama_cpp import serve
from cotree.models.settings import Model, Price
from cotree.models.weights import gguf_file, tokenizer_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Seconds. llama.cpp under load can take minutes for a batch, and a call that is only slow must not be made twice.
_SERVER_TIMEOUT, _LLAMA_CPP_TIMEOUT = 60.0, 600.0
# About right for English; stands in only where a server reports no usage and no tokenizer is given.
_BYTES_PER_TOKEN = 4


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
        return Prompt(render(self.tokenizer, messages))

    def client_for(self, question: str) -> Client:
        """The server that a question stays with (rendezvous hashing: another server takes over only its own share)."""
        return max(self.clients, key=lambda client: hashlib.sha256(f"{client.url}\n{question}".encode()).digest())

    @property
    def counters(self) -> Counters:
        """The requests and tokens of all servers of the model so far."""
        return sum((client.counters for client in self.clients), Counters())

    @property
    def cost(self) -> float | None:
        """What these tokens cost, in the price's currency; None without a price."""
        return None if self.price is None else self.counters.cost(self.price)


@asynccontextmanager
async def open_endpoints(
    models: Mapping[str, Model], *, widest: int = 8, attempts: int = ATTEMPTS
) -> AsyncIterator[dict[str, Endpoint]]:
    """Start or reach every model; all are ready when this yields.

    Args:
        widest: the most samples that one request will ask for; llama.cpp needs a slot for each.
        attempts: how often a request is sent before it fails.

    Raises:
        UsageError: a model is missing, a server does not answer, or an API key is not in the environment.
    """
    async with AsyncExitStack() as stack:
        endpoints: dict[str, Endpoint] = {}
        for name, model in models.items():
            tokenizer = _tokenizer(model)
            if model.weights is None:
                clients = await _reach_servers(stack, name, model, tokenizer=tokenizer, attempts=attempts)
            else:
                slots = max(model.max_in_flight, widest)
                url = stack.enter_context(serve(gguf_file(model, model.gguf), slots=slots, shared=True))
                client = _client(name, url, model, tokenizer=tokenizer, timeout=_LLAMA_CPP_TIMEOUT, attempts=attempts)
                clients = [await stack.enter_async_context(client)]
            endpoints[name] = Endpoint(
                name=name,
                clients=tuple(clients),
                tokenizer=tokenizer if model.mode == "completions" else None,
                identity=identity_text(model),
                price=model.price,
            )
        yield endpoints


async def check_servers(models: Mapping[str, Model]) -> None:
    """Ask every server whether it is ready, and read every model's tokenizer; no weights are loaded.

    Raises:
        UsageError: servers that are not ready (all are named), or a tokenizer or an API key that is not there.
    """
    async with AsyncExitStack() as stack:
        for name, model in models.items():
            await _reach_servers(stack, name, model, tokenizer=None, attempts=ATTEMPTS)
            _tokenizer(model)


async def _reach_servers(
    stack: AsyncExitStack, name: str, model: Model, *, tokenizer: PreTrainedTokenizerBase | None, attempts: int
) -> list[Client]:
    """Clients of all servers of a model, which are asked at once whether they are ready."""
    clients = [
        _client(name, url, model, tokenizer=tokenizer, timeout=_SERVER_TIMEOUT, attempts=attempts) for url in model.urls
    ]
    for client in clients:
        await stack.enter_async_context(client)
    results = await asyncio.gather(*(client.ready(model.mode) for client in clients), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, UsageError):
            raise result
    problems = [str(result) for result in results if result is not None]
    if problems:
        which = f"{len(problems)} of {len(clients)} servers are not ready: " if len(clients) > 1 else ""
        raise UsageError(which + "; ".join(problems))
    return clients


def _tokenizer(model: Model) -> PreTrainedTokenizerBase | None:
    from cotree.models.tokenizer import load_tokenizer

    source = tokenizer_source(model)
    return None if source is None else load_tokenizer(source, chats=False)


def _client(
    name: str, url: str, model: Model, *, tokenizer: PreTrainedTokenizerBase | None, timeout: float, attempts: int
) -> Client:
    from cotree.models.tokenizer import token_counter

    api_key = None if model.api_key_env is None else os.environ.get(model.api_key_env)
    if model.api_key_env is not None and not api_key:
        raise UsageError(f"model `{name}`: the environment variable {model.api_key_env} is not set; export its API key")
    return Client(
        name,
        url,
        model.model,
        max_in_flight=model.max_in_flight,
        count_tokens=_estimated_tokens if tokenizer is None else token_counter(tokenizer),
        api_key=api_key,
        timeout=timeout,
        attempts=attempts,
    )


def _estimated_tokens(text: str) -> int:
    return -(-len(text.encode("utf-8", "replace")) // _BYTES_PER_TOKEN)
