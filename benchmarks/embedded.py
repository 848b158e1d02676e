"""Output tokens a second of the embedded model at each GGUF type, side by side in one run.

    python benchmarks/embedded.py

Two shapes: 16 unrelated prompts at once (evaluation, a KV cache a slot), and 2 prompts with 8 samples each (search, one
shared pool). Ratios are to the shipped file; the machine decides the rest.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from cotree.models.client import Client, Request
from cotree.models.llama_cpp import serve
from cotree.models.resolve import gguf_at_type
from cotree.models.weights import locate

TOKENS = 48


def prompt(number: int) -> str:
    return (
        f"<|im_start|>user\nTell a long story about {number} apples.<|im_end|>\n<|im_start|>assistant\nOnce upon a time"
    )


async def speed(path: Path, *, shared: bool, prompts: int, samples: int) -> float:
    with serve(path, slots=16, context=512, shared=shared) as url:
        async with Client("m", url, "default", max_in_flight=16, count_tokens=len, timeout=600) as client:
            started = time.monotonic()
            asked = [Request(prompt(i), samples, TOKENS, 0.8, 1.0, i, ()) for i in range(prompts)]
            await asyncio.gather(*map(client.complete, asked))
            # A story seldom ends within TOKENS, so every sample counts as that many.
            return prompts * samples * TOKENS / (time.monotonic() - started)


def main() -> None:
    shipped = locate("smollm2-135m-instruct")
    files = {"shipped Q4_1": shipped, "F16": gguf_at_type(shipped, "F16"), "Q8_0": gguf_at_type(shipped, "Q8_0")}
    first: dict[str, float] = {}
    for name, path in files.items():
        unrelated = asyncio.run(speed(path, shared=False, prompts=32, samples=1))
        siblings = asyncio.run(speed(path, shared=True, prompts=6, samples=8))
        first = first or {"unrelated": unrelated, "siblings": siblings}
        print(
            f"{name:13} unrelated prompts {unrelated:6.1f}/s (x{unrelated / first['unrelated']:.2f})   "
            f"8 samples a prompt {siblings:6.1f}/s (x{siblings / first['siblings']:.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
