"""The models of a recipe as open clients: embedded ones served in this process, others reached over HTTP.

Invariant: whoever asks for a completion sees only an `Endpoint`. A question stays with one server of a model, so that
its prompts stay warm there. The identity of a model (what decides its text) is part of every journal key, its address
is not.
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
from cotree.experiment.recipe import Model, Price
from cotree.models.chat import Prompt, render
from cotree.models.client import ATTEMPTS, Client, Counters
from cotree.models.embedded import at_type, locate, serve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# llama.cpp under load can take minutes for a batch; a call that is slow must not be made twice.
_SERVER_TIMEOUT, _EMBEDDED_TIMEOUT = 60.0, 600.0
# About right for English; stands in only where a server reports no usage and no tokenizer is given.
_BYTES_PER_TOKEN = 4


@dataclass(frozen=True)
class Endpoint:
    """An open model: a client for each of its servers, and what renders its prompts (None: the servers do)."""

    name: str
    clients: tuple[Client, ...]
    tokenizer: PreTrainedTokenizerBase | None
    identity: str
    price: Price | None = None

    def begin(self, messages: Sequence[Mapping[str, str]]) -> Prompt:
        """The prompt of a conversation, standing where the assistant begins."""
        if self.tokenizer is None:
            return Prompt("", tuple((message["role"], message["content"]) for message in messages))
        return Prompt(render(self.tokenizer, messages))

    def client(self, question: str) -> Client:
        """The server that a question stays with: the highest hash wins, so another server takes only its own share."""
        return max(self.clients, key=lambda client: hashlib.sha256(f"{client.url}\n{question}".encode()).digest())

    @property
    def counters(self) -> Counters:
        """What all servers of the model were asked so far."""
        return sum((client.counters for client in self.clients), Counters())

    @property
    def cost(self) -> float | None:
        """What that cost so far, in the price's currency; None without a price."""
        return None if self.price is None else self.counters.cost(self.price)


def identity(model: Model) -> str:
    """What decides a model's text, without its address: two servers of one model are one model."""
    if model.embedded:
        return f"{model.embedded}@{model.gguf}"
    # In the other modes the server's template decides what the model reads, so it is another writer.
    return model.model if model.mode == "completions" else f"{model.model} ({model.mode})"


@asynccontextmanager
async def open_endpoints(
    models: Mapping[str, Model], *, widest: int = 8, attempts: int = ATTEMPTS
) -> AsyncIterator[dict[str, Endpoint]]:
    """Start or reach every model; all are ready when this yields.

    Args:
        widest: the most samples that one request will ask for; an embedded engine needs a slot for each.
        attempts: how often a request is sent before it fails.

    Raises:
        UsageError: a model is missing, a server does not answer, or an API key is not in the environment.
    """
    async with AsyncExitStack() as stack:
        endpoints: dict[str, Endpoint] = {}
        for name, model in models.items():
            tokenizer = _tokenizer(model)
            if model.embedded is None:
                clients = await _reach(stack, name, model, tokenizer, attempts)
            else:
                path = at_type(locate(model.embedded), model.gguf)
                url = stack.enter_context(serve(path, slots=max(model.max_in_flight, widest), shared=True))
                client = _client(name, url, model, tokenizer, _EMBEDDED_TIMEOUT, attempts)
                clients = [await stack.enter_async_context(client)]
            rendering = tokenizer if model.mode == "completions" else None
            endpoints[name] = Endpoint(name, tuple(clients), rendering, identity(model), model.price)
        yield endpoints


async def check_servers(models: Mapping[str, Model]) -> None:
    """Ask every server of a recipe whether it is there, and read every model's tokenizer; no model is loaded.

    Raises:
        UsageError: one is not (all that are not are named), or its tokenizer or its API key.
    """
    async with AsyncExitStack() as stack:
        for name, model in models.items():
            await _reach(stack, name, model, None, ATTEMPTS)
            _tokenizer(model)


async def _reach(
    stack: AsyncExitStack, name: str, model: Model, tokenizer: PreTrainedTokenizerBase | None, attempts: int
) -> list[Client]:
    """Clients of all servers of a model, asked at once; one line names every one that is not ready."""
    clients = [_client(name, url, model, tokenizer, _SERVER_TIMEOUT, attempts) for url in model.urls]
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

    source = model.tokenizer if model.embedded is None else locate(model.embedded)
    return None if source is None else load_tokenizer(source, chats=False)


def _client(
    name: str, url: str, model: Model, tokenizer: PreTrainedTokenizerBase | None, timeout: float, attempts: int
) -> Client:
    from cotree.models.tokenizer import token_counter

    key = None if model.api_key_env is None else os.environ.get(model.api_key_env)
    if model.api_key_env is not None and not key:
        raise UsageError(f"model `{name}`: the environment variable {model.api_key_env} is not set; export its API key")
    return Client(
        name, url, model.model, max_in_flight=model.max_in_flight,
        count_tokens=_guessed_tokens if tokenizer is None else token_counter(tokenizer), api_key=key, timeout=timeout,
        attempts=attempts,
    )  # fmt: skip


def _guessed_tokens(text: str) -> int:
    return -(-len(text.encode("utf-8", "replace")) // _BYTES_PER_TOKEN)
