"""The `models` section of a recipe: the models that write thoughts, are trained and are evaluated."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Final, Literal

from pydantic import Field, model_validator

from cotree.base.settings import NOT_CONTENT, Section

GGUFType = Literal["F32", "F16", "Q8_0"]
# `n` samples and `stop` strings are what a search is made of; no server that refuses them can be used.
Parameter = Literal["max_tokens", "temperature", "top_p", "seed", "add_generation_prompt", "continue_final_message"]
RequestMode = Literal["completions", "chat", "pooling"]
Engine = Literal["llama.cpp", "vllm"]
# Arguments of `vllm serve` that change its place, memory or speed, as a server's hardware may be another; all others
# count as content.
SPEED_ARGS: Final = (
    *("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "distributed_executor_backend"),
    *("gpu_memory_utilization", "kv_cache_memory_bytes", "cpu_offload_gb", "block_size", "max_model_len"),
    *("max_num_seqs", "max_num_batched_tokens", "enable_prefix_caching", "enable_chunked_prefill", "enforce_eager"),
    *("compilation_config", "load_format", "download_dir"),
)
_NUMBERS = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "max_model_len",
)  # cotree counts with
_OURS = ("model", "host", "port", "api_key", "served_model_name")  # arguments of `vllm serve` that cotree gives


def _is_json(value: Any) -> bool:
    try:
        return bool(json.dumps(value))
    except (TypeError, ValueError):
        return False


class Price(Section):
    """The price of a million tokens, in any currency; `cached` prompt tokens cost as much as others by default."""

    prompt: float = Field(0.0, ge=0)
    cached: float | None = Field(None, ge=0)
    completion: float = Field(0.0, ge=0)


class Model(Section):
    """A model: weights that run on this machine (`weights`), or OpenAI-compatible servers (`url`).

    weights: a packaged name (smollm2-135m-instruct, gemma-3-270m), a `.gguf` file, a transformers folder, or a model of
        the hub (`OWNER/NAME`, `OWNER/NAME@REVISION`, `OWNER/NAME:FILE.gguf`); an id without a revision is pinned to the
        newest commit when a run begins. A folder is written as GGUF with its own tokenizer where llama.cpp serves it.
    engine: what serves the weights: `llama.cpp` in this process, or `vllm` (`vllm serve` in a process of its own, for
        transformers folders). By default vLLM where it and a GPU are here and the weights are a folder.
    engine_args: arguments of `vllm serve`: {tensor_parallel_size: 2, dtype: bfloat16, enforce_eager: true, ...}.
    gguf: the type at which weights write thoughts in llama.cpp; an evaluation has its own setting for it.
    url: one server or a list of servers of the same model; a question stays with one of them, so that its prompts stay
        in that server's cache. model: its name at the server. tokenizer: hub id or folder, renders the chat template.
    mode: `chat` sends the chain so far as an assistant message to be continued, for servers that offer only
        `/v1/chat/completions`, and needs no tokenizer; `pooling` is a process reward model behind vLLM's `/pooling`,
        which writes nothing and scores the steps of a chain.
    max_in_flight: requests a server at once; a large server is used better with more, a small one only queues them.
    timeout: the most seconds that a request may take at a server (a minute and half a second a token, where that is
        less); then it is sent once more. Of several servers, one that has answered nothing at all for a third of it,
        that only fails for 30 s or cannot be reached, is lost: the others are asked in its place, until it answers
        again. Of `engine: vllm`
        also the most seconds until it is ready.
    omit: parameters that the server refuses and that are not sent; its own values then hold, so this is content.
    rename: other names for parameters that it knows by them (`{max_tokens: max_completion_tokens}`); the values are the
        same, so this is not.
    api_key_env: the environment variable, in capitals, that holds the server's API key. Keys stand in no recipe,
        neither here nor in a `url`, because recipes are copied into run folders.
    """

    weights: str | None = None
    engine: Engine | None = None
    engine_args: dict[str, Any] = Field(default_factory=dict)
    gguf: GGUFType = "Q8_0"
    url: Annotated[str | tuple[str, ...] | None, NOT_CONTENT] = None
    model: str = "default"
    tokenizer: str | None = None
    mode: RequestMode = "completions"
    omit: tuple[Parameter, ...] = ()
    rename: Annotated[dict[Parameter, str], NOT_CONTENT] = Field(default_factory=dict)
    api_key_env: Annotated[str | None, NOT_CONTENT] = None
    max_in_flight: Annotated[int, NOT_CONTENT] = Field(16, ge=1)
    timeout: Annotated[float, NOT_CONTENT] = Field(1800.0, gt=0)
    price: Annotated[Price | None, NOT_CONTENT] = None

    @model_validator(mode="after")
    def _one_source(self) -> Model:
        if any(re.search("[@?#]", url) for url in self.urls):
            fix = "keys come from the environment variable that `api_key_env` names"
            raise ValueError(f"`url` must look like http://HOST:PORT or https://HOST/v1, without a key in it; {fix}")
        if self.api_key_env is not None and not re.fullmatch("[A-Z_][A-Z0-9_]*", self.api_key_env):
            form = "the name of an environment variable in capitals, like OPENAI_API_KEY, that holds the key"
            raise ValueError(f"`api_key_env` must be {form}; the key itself is written nowhere")
        if (self.weights is None) == (not self.urls):
            raise ValueError("give exactly one of `weights` (on this machine) or `url` (a server)")
        if self.weights is not None and self.mode != "completions":
            raise ValueError(f"`mode: {self.mode}` is for servers; weights in this process continue text exactly")
        if self.weights is not None and (self.omit or self.rename):
            raise ValueError("`omit` and `rename` are for servers; weights in this process take every parameter")
        if self.weights is None and self.engine is not None:
            raise ValueError("`engine` serves `weights`; a server has one already")
        if self.engine_args and self.engine != "vllm":
            raise ValueError("`engine_args` are of vLLM; add `engine: vllm` (--engine vllm)")
        for name, value in self.engine_args.items():
            if name in _OURS or not re.fullmatch("[a-z][a-z0-9_]*", name) or value is None:
                fault = "is given by cotree" if name in _OURS else "is no argument with a value"
                raise ValueError(f"`engine_args.{name}` {fault}; write those of `vllm serve`, e.g. max_model_len: 8192")
            if (name in _NUMBERS and (type(value) is not int or value < 1)) or not _is_json(value):
                form = (
                    "a whole number from 1" if name in _NUMBERS else "text, a number, true, false, a list or a section"
                )
                raise ValueError(f"`engine_args.{name}` must be {form}")
        if self.urls and self.mode == "completions" and self.tokenizer is None:
            raise ValueError("a `url` model needs `tokenizer` (hub id or folder): prompts are rendered on this side")
        return self

    @property
    def urls(self) -> tuple[str, ...]:
        """The servers, none for weights in this process."""
        return (self.url,) if isinstance(self.url, str) else self.url or ()
