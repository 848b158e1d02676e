"""Open a recipe's models as endpoints: llama.cpp in this process, vLLM subprocesses, or HTTP servers.

Callers see only an `Endpoint`. A question sticks to one server of a model, for its prefix cache; other servers take
over while that one is lost, or full while they are not.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cotree.base.errors import UsageError
from cotree.models import llama_cpp, vllm
from cotree.models.checksums import check_weights
from cotree.models.client import ATTEMPTS, Client
from cotree.models.encode import render_prompt
from cotree.models.resolve import engine_of, gguf_file, identity_text, tokenizer_source
from cotree.models.settings import Model, Price
from cotree.models.tokenizer import load_tokenizer, token_counter
from cotree.models.weights import locate
from cotree.models.wire import Completion, Prompt, Request
from cotree.tasks.extract import opened_thinking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ModelKind = Literal["base", "chat", "reasoning"]
# Seconds. llama.cpp under load can take minutes for a batch, and slow requests must not be repeated.
_SERVER_TIMEOUT, _LLAMA_CPP_TIMEOUT = 60.0, 600.0


@dataclass(frozen=True)
class Endpoint:
    """An open model that completes requests.

    name: in the recipe. clients: one per server. tokenizer: renders prompts; None if the servers do. identity:
    `identity_text` of the model, part of the journal key of every completion.
    """

    name: str
    clients: tuple[Client, ...]
    tokenizer: PreTrainedTokenizerBase | None
    identity: str
    price: Price | None = None

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> Prompt:
        """Render a conversation up to the start of the assistant's turn."""
        if self.tokenizer is None:
            return Prompt("", tuple((message["role"], message["content"]) for message in messages))
        text = render_prompt(self.tokenizer, messages)
        opened = opened_thinking(text)
        return Prompt(text.removesuffix(opened), opened=opened)

    @property
    def kind(self) -> ModelKind:
        """`base` without a chat template, `reasoning` if the template handles thinking, else `chat`."""
        if self.tokenizer is None:
            return "chat"
        template = str(self.tokenizer.chat_template or "")
        return "reasoning" if "</think>" in template else "chat" if template else "base"

    @property
    def turn_stops(self) -> tuple[str, ...]:
        """Extra stop strings that end a turn: for base models, which have no end-of-turn token, the next question."""
        return ("\nQuestion:",) if self.kind == "base" else ()

    def servers_for(self, question: str) -> list[Client]:
        """The servers in order of preference for a question, by rendezvous hashing.

        So adding a server moves only its share of the questions.
        """

        def rank(client: Client) -> bytes:
            return hashlib.sha256(f"{client.url}\n{question}".encode()).digest()

        return sorted(self.clients, key=rank, reverse=True)

    async def complete(self, request: Request, question: str) -> Completion:
        """Complete a request at the question's preferred server, or the next one while it is lost or full.

        Raises:
            CotreeError: as `Client.complete`.
        """
        own, *others = self.servers_for(question) if len(self.clients) > 1 else self.clients
        return await own.complete(request, others)

    @property
    def lost(self) -> list[str]:
        """The lost servers, each with the reason."""
        lost = [client for client in self.clients if client.lost and len(self.clients) > 1]
        # A request that fails while its server dies only reports a broken connection, so get the reason here.
        return [f"{client}: {client.ended() or client.problem}" for client in lost]

    @property
    def cost(self) -> float | None:
        """The cost of all tokens so far, in the price's currency; None without a price."""
        return None if self.price is None else sum(client.counters.cost(self.price) for client in self.clients)


@asynccontextmanager
async def open_endpoints(
    models: Mapping[str, Model],
    *,
    widest: int = 8,
    attempts: int = ATTEMPTS,
    all_ready: bool = False,
    logs: Path | None = None,
) -> AsyncIterator[dict[str, Endpoint]]:
    """Start or connect to every model; yields when each has a ready server.

    Args:
        widest: the largest `n` of a request; llama.cpp needs a slot for each sample.
        attempts: maximum attempts per request.
        all_ready: require all servers of each model; else one is enough.
        logs: folder for vLLM's logs; by default a new temporary folder.

    Raises:
        UsageError: a model is missing, no server of it answers, a server has a permanent fault (names all that are not
            ready), or an API key is not in the environment.
        CotreeError: a vLLM server does not become ready.
    """
    in_vllm = [name for name, model in models.items() if model.weights is not None and engine_of(model) == "vllm"]
    gpus = vllm.share_gpus({name: vllm.gpus_of_a_server(models[name].engine_args) for name in in_vllm})
    async with AsyncExitStack() as stack:
        endpoints: dict[str, Endpoint] = {}
        for name, model in models.items():
            api_key = os.environ.get(model.api_key_env or "")
            if model.api_key_env is not None and not api_key:
                fault = f"the environment variable {_variable(model.api_key_env)} is not set; export its API key"
                raise UsageError(f"model `{name}`: {fault}")
            tokenizer = _tokenizer(model)
            shared: dict[str, Any] = {
                "max_in_flight": model.max_in_flight,
                "count_tokens": token_counter(tokenizer),
                "omit": model.omit,
                "rename": dict(model.rename.items()),
                "attempts": attempts,
            }
            if model.weights is not None and name not in in_vllm:
                slots = max(model.max_in_flight, widest)
                url = stack.enter_context(llama_cpp.serve(gguf_file(model, model.gguf), slots=slots, shared=True))
                clients = [Client(name, url, model.model, timeout=_LLAMA_CPP_TIMEOUT, **shared)]
            else:
                at: list[dict[str, Any]] = [
                    {"url": url, "model": model.model, "api_key": api_key} for url in model.urls
                ]
                if name in in_vllm:
                    serving = _serve_in_vllm(name, model, gpus[name], logs)
                    servers = await stack.enter_async_context(serving)
                    at = [{"url": s.url, "model": name, "api_key": s.api_key, "ended": s.ended} for s in servers]
                silence = model.timeout / 3 if len(at) > 1 else None
                shared |= {"timeout": _SERVER_TIMEOUT, "longest": model.timeout, "silence": silence}
                clients = [Client(name, **server, **shared) for server in at]
            for client in clients:
                await stack.enter_async_context(client)
            if model.weights is None:
                found = await asyncio.gather(*(client.find_problem(model.mode) for client in clients))
                problems = [problem for problem in found if problem]
                stay = any(problem and not client.lost for problem, client in zip(found, clients, strict=True))
                if problems and (all_ready or stay or len(problems) == len(clients)):
                    which = f"{len(problems)} of {len(clients)} servers are not ready: " if len(clients) > 1 else ""
                    raise UsageError(which + "; ".join(problems))
            rendering = tokenizer if model.mode == "completions" else None
            endpoints[name] = Endpoint(name, tuple(clients), rendering, identity_text(model), model.price)
        yield endpoints


def _serve_in_vllm(
    name: str, model: Model, gpus: Sequence[tuple[str, ...]], logs: Path | None
) -> AbstractAsyncContextManager[list[vllm.Server]]:
    """Check a model's weights for damage and serve them with one vLLM server per entry of `gpus`."""
    folder = locate(str(model.weights))
    check_weights(folder)
    logs = logs or Path(tempfile.mkdtemp(prefix="cotree-vllm-"))
    return vllm.serve(folder, model.engine_args, name=name, gpus=gpus, logs=logs, ready=model.timeout)


async def check_servers(models: Mapping[str, Model]) -> list[str]:
    """Check that every server is ready and every tokenizer loads; loads no weights.

    Returns a line for each server that does not answer while others of its model do.

    Raises:
        UsageError: as `open_endpoints`, or a tokenizer is missing.
    """
    on_servers = {name: model for name, model in models.items() if model.weights is None}
    async with open_endpoints(on_servers) as endpoints:
        for model in models.values():
            if model.weights is not None:
                _tokenizer(model)
        lost = [server for endpoint in endpoints.values() for server in endpoint.lost]
        return [f"{server}; the model's other servers are asked in its place" for server in lost]


def _variable(name: str) -> str:
    """The name of an environment variable for a message, hidden if it looks like a key given by mistake."""
    looks_like_key = len(name) > 40 or re.search("[a-z]", name) or (re.search("[0-9]", name) and "_" not in name)
    return "that `api_key_env` (--api-key-env) names" if looks_like_key else name


def _tokenizer(model: Model) -> PreTrainedTokenizerBase | None:
    source = tokenizer_source(model)
    return None if source is None else load_tokenizer(source, chats=False)
