"""One word names a model, whatever it is; what does not go together is one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cotree.base.errors import UsageError
from cotree.models.naming import model_of
from cotree.models.settings import Model


def test_every_kind_of_word_is_the_model_that_a_recipe_would_have(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    url = "http://localhost:8000/v1"
    completions = Model(url=url, model="qwen", tokenizer="t", api_key_env="KEY", max_in_flight=4)
    assert model_of(url, served="qwen", tokenizer="t", api_key_env="KEY", max_in_flight=4) == completions
    assert model_of(url, chat=True) == Model(url=url, mode="chat")
    for word in ("smollm2-135m-instruct", str(tmp_path / "m.gguf"), str(tmp_path), "owner/repo:file.gguf"):
        assert model_of(word) == Model(weights=word)
    assert model_of(str(tmp_path), base="b.gguf", tokenizer="t") == Model(
        weights=str(tmp_path), base="b.gguf", tokenizer="t"
    )


@pytest.mark.parametrize(
    ("word", "options", "fault"),
    [
        ("", {}, "name a model: a server's URL, a .gguf file"),
        ("http://localhost:1", {}, "give --tokenizer .* for http://localhost:1, or --chat"),
        ("smollm2-135m-instruct", {"chat": True}, "--chat and --api-key-env are for servers"),
        ("smollm2-135m-instruct", {"api_key_env": "KEY"}, "--chat and --api-key-env are for servers"),
        ("no/such.gguf", {}, "nothing at no/such.gguf; give a server's URL"),
        ("llama-9", {}, r"nothing at llama-9; give .* or a packaged name \(smollm2"),
    ],
)
def test_what_names_nothing_is_refused(word: str, options: dict[str, Any], fault: str) -> None:
    with pytest.raises(UsageError, match=fault):
        model_of(word, **options)
