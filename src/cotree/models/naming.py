"""One word for a model, on the command line and in Python, as the `Model` that a recipe would have."""

from __future__ import annotations

from pathlib import Path

from cotree.base.errors import UsageError
from cotree.models.settings import Model
from cotree.models.weights import PACKAGED


def is_url(word: str) -> bool:
    """Whether a model's word is the address of a server."""
    return word.startswith(("http://", "https://"))


def model_of(
    word: str,
    *,
    served: str = "default",
    tokenizer: str | None = None,
    chat: bool = False,
    api_key_env: str | None = None,
    max_in_flight: int = 16,
    base: str | None = None,
) -> Model:
    """The model that a word names: a server's URL, a packaged name, a `.gguf`, `REPO_ID:FILE.gguf` or a transformers
    folder.

    Args:
        served: a server's name for the model.
        tokenizer: hub id or folder that renders a server's prompts. chat: the server renders them instead.
        api_key_env: the environment variable that holds a server's key.
        max_in_flight: requests at once.
        base: the GGUF that a transformers folder was trained from; gives its metadata and tokenizer.

    Raises:
        UsageError: the word names nothing, or an option does not go with it.
    """
    if not word:
        raise UsageError("name a model: a server's URL, a .gguf file, a transformers folder or a packaged name")
    if is_url(word):
        if tokenizer is None and not chat:
            raise UsageError(f"give --tokenizer (hub id or folder) for {word}, or --chat: its server renders then")
        return Model(
            url=word,
            model=served,
            tokenizer=tokenizer,
            mode="chat" if chat else "completions",
            api_key_env=api_key_env,
            max_in_flight=max_in_flight,
        )
    if chat or api_key_env:
        raise UsageError("--chat and --api-key-env are for servers; weights in this process continue text exactly")
    if word not in PACKAGED and ":" not in word and not Path(word).exists():
        known = f"a packaged name ({', '.join(PACKAGED)})"
        raise UsageError(f"nothing at {word}; give a server's URL, a .gguf file, a transformers folder or {known}")
    model = Model(weights=word, tokenizer=tokenizer, max_in_flight=max_in_flight)
    return model if base is None else model.model_copy(update={"base": base})
