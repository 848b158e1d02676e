"""The `models` section of a recipe: the models that write thoughts, are trained and are evaluated."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Final, Literal

from pydantic import Field, model_validator

from cotree.base.settings import NOT_CONTENT, Section

GGUFType = Literal["F32", "F16", "Q8_0"]
# Parameters that `omit` may name; not `n` and `stop`, which every search needs.
Parameter = Literal["max_tokens", "temperature", "top_p", "seed", "add_generation_prompt", "continue_final_message"]
RequestMode = Literal["completions", "chat", "pooling"]
Engine = Literal["llama.cpp", "vllm"]
# Arguments of `vllm serve` that affect placement, memory or speed only; all others are part of the fingerprint.
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
)  # cotree computes with these
_OURS = ("model", "host", "port", "api_key", "served_model_name")  # arguments of `vllm serve` that cotree gives


def _is_json(value: Any) -> bool:
    try:
        return bool(json.dumps(value))
    except (TypeError, ValueError):
        return False


class Price(Section):
    """Prices per million tokens, in any currency; `cached` prompt tokens default to the price of uncached ones."""

    prompt: float = Field(0.0, ge=0)
    cached: float | None = Field(None, ge=0)
    completion: float = Field(0.0, ge=0)


class Model(Section):
    """A model: local weights (`weights`), or OpenAI-compatible servers (`url`).

    weights: a packaged name (smollm2-135m-instruct, gemma-3-270m), a `.gguf` file, a transformers folder, or a hub
        model (`OWNER/NAME`, `OWNER/NAME@REVISION`, `OWNER/NAME:FILE.gguf`); an id without a revision is pinned to the
        newest commit when a run starts. llama.cpp serves a folder by converting it to GGUF with its own tokenizer.
    engine: serves the weights: `llama.cpp` in this process, or `vllm` (`vllm serve` as a subprocess, for transformers
        folders). Default: vLLM if it is installed, a GPU is present and the weights are a folder.
    engine_args: arguments of `vllm serve`: {tensor_parallel_size: 2, dtype: bfloat16, enforce_eager: true, ...}.
    gguf: quantization type for search in llama.cpp; evaluations have their own setting.
    url: one server or a list of servers of the same model; each question sticks to one, for its prefix cache. model:
        its name at the server. tokenizer: hub id or folder, renders the chat template.
    mode: `chat` continues the chain as an assistant message, for servers with `/v1/chat/completions` only, and needs no
        tokenizer; `pooling` is a process reward model behind vLLM's `/pooling`, which scores the steps of a chain.
    max_in_flight: concurrent requests per server; large servers need more, small ones only queue them.
    timeout: maximum seconds per request (or 60 s plus 0.5 s a token, if less); then one retry. With several servers, a
        server without any reply for a third of it, with only failures for 30 s, or unreachable, is lost: others take
        its requests until it answers again. For `engine: vllm` also the maximum startup time.
    omit: parameters that the server refuses and that are not sent; its defaults then apply, so it changes the content.
    rename: the server's names for parameters (`{max_tokens: max_completion_tokens}`); does not change the content.
    api_key_env: the environment variable, in capitals, with the API key. Recipes and `url`s must not contain keys,
        because recipes are copied into run folders.
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
        """The server URLs; empty for local weights."""
        return (self.url,) if isinstance(self.url, str) else self.url or ()
