"""The models of a recipe as open clients: embedded ones served in this process, others reached over HTTP.

Invariant: whoever asks for a completion sees only a `Client` and a tokenizer; the identity of a model (what decides
its text) is part of every journal key, its address is not.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cotree.config import Model
from cotree.errors import UsageError
from cotree.llm.client import Client
from cotree.llm.embedded import at_type, locate, serve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# llama.cpp under load can take minutes for a batch; a call that is slow must not be made twice.
_EMBEDDED_TIMEOUT = 600.0


@dataclass(frozen=True)
class Endpoint:
    """An open model: its client, the tokenizer that renders its prompts, and its identity for journal keys."""

    client: Client
    tokenizer: PreTrainedTokenizerBase
    identity: str


def identity(model: Model) -> str:
    """What decides a model's text, without its address: two servers of one model are one model."""
    return f"{model.embedded}@{model.gguf}" if model.embedded else f"{model.model}"


@asynccontextmanager
async def open_endpoints(models: Mapping[str, Model]) -> AsyncIterator[dict[str, Endpoint]]:
    """Start or reach every model; all are ready when this yields.

    Raises:
        UsageError: a model is missing, a server does not answer, or an API key is not in the environment.
    """
    from cotree.llm.tokenizer import load_tokenizer

    async with AsyncExitStack() as stack:
        endpoints: dict[str, Endpoint] = {}
        for name, model in models.items():
            if model.embedded is not None:
                source = locate(model.embedded)
                tokenizer = load_tokenizer(source)
                url = stack.enter_context(serve(at_type(source, model.gguf), slots=model.max_in_flight, shared=True))
                client = _client(name, url, "default", tokenizer, model, timeout=_EMBEDDED_TIMEOUT)
                endpoints[name] = Endpoint(await stack.enter_async_context(client), tokenizer, identity(model))
            else:
                assert model.url is not None
                assert model.tokenizer is not None
                key = _api_key(name, model)
                tokenizer = load_tokenizer(model.tokenizer)
                client = _client(name, model.url, model.model, tokenizer, model, api_key=key)
                endpoints[name] = Endpoint(await stack.enter_async_context(client), tokenizer, identity(model))
                await client.ready()
        yield endpoints


async def check_servers(models: Mapping[str, Model]) -> None:
    """Ask every server of a recipe whether it is there, without loading anything.

    Raises:
        UsageError: one is not, or its API key is not in the environment.
    """
    for name, model in models.items():
        if model.url is not None:
            key = _api_key(name, model)
            async with Client(name, model.url, model.model, max_in_flight=1, count_tokens=len, api_key=key) as client:
                await client.ready()


def _client(
    name: str,
    url: str,
    served_as: str,
    tokenizer: PreTrainedTokenizerBase,
    model: Model,
    *,
    timeout: float = 60.0,
    api_key: str | None = None,
) -> Client:
    def count_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    return Client(
        name,
        url,
        served_as,
        max_in_flight=model.max_in_flight,
        count_tokens=count_tokens,
        api_key=api_key,
        timeout=timeout,
    )


def _api_key(name: str, model: Model) -> str | None:
    if model.api_key_env is None:
        return None
    key = os.environ.get(model.api_key_env)
    if not key:
        raise UsageError(f"model `{name}`: the environment variable {model.api_key_env} is not set; export its API key")
    return key
