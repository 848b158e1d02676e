"""Rows of messages as token ids, through the student's chat template.

Invariant: the ids of a chain are the template's rendering of the whole conversation, tokenised in one piece, and the
ids of its prompt are what a server reads before it generates. Nothing is ever cut: a row that is too long is left out
and counted. Imports neither torch nor transformers, so that datasets can count tokens as the trainer will.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from cotree.base.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[dict[str, str]]


@dataclass(frozen=True)
class EncodedChain:
    """An SFT row as token ids: the prompt up to where the assistant begins, the completion through end of turn."""

    prompt: list[int]
    completion: list[int]

    @property
    def sequences(self) -> tuple[list[int], ...]:
        """The sequences that training computes: one, the prompt with the completion."""
        return (self.prompt + self.completion,)

    @property
    def tokens(self) -> int:
        """Number of tokens of the prompt and the completion."""
        return len(self.prompt) + len(self.completion)

    @property
    def longest_sequence(self) -> int:
        """Number of tokens of the longest sequence, which a token limit is about."""
        return self.tokens


@dataclass(frozen=True)
class EncodedPair:
    """A DPO row as token ids: a preferred and a rejected completion of one prompt.

    prefix: how many tokens the completions share at their start.
    reference: the reference model's log-probabilities of chosen and rejected that the margin subtracts, in nats; 0
        where there is none.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    prefix: int
    reference: tuple[float, float] = (0.0, 0.0)

    @property
    def sequences(self) -> tuple[list[int], ...]:
        """The sequences that training computes: the prompt with chosen, the prompt with rejected."""
        return self.prompt + self.chosen, self.prompt + self.rejected

    @property
    def tokens(self) -> int:
        """Number of tokens of both sequences, as training without packing computes them."""
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)

    @property
    def longest_sequence(self) -> int:
        """Number of tokens of the longer sequence."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


EncodedRow = TypeVar("EncodedRow", bound=EncodedChain | EncodedPair)


@dataclass(frozen=True)
class Encoded(Generic[EncodedRow]):
    """The rows that fit, in order, and how many were left out because they are over the token limit."""

    rows: list[EncodedRow]
    too_long: int


def encode_chains(tokenizer: PreTrainedTokenizerBase, chats: Sequence[tuple[Messages, Messages]]) -> list[EncodedChain]:
    """Encode pairs of (prompt messages, completion messages) as the trainer will see them.

    A completion is one assistant message. Its ids end with the token that ends the turn; what a template adds after it
    (SmolLM2 and Qwen add a newline) is left out, because generation stops there: a student never writes those tokens,
    and a loss over them would look better than it is.

    Raises:
        UsageError: a completion is not one assistant message, the prompt's tokens are not a prefix of the whole
            conversation's (the template rewrites earlier turns, or a merge crosses the boundary), or the template does
            not end an assistant turn with a special token, so that the student could not learn to stop.
    """
    for index, (_, completion) in enumerate(chats):
        if len(completion) != 1 or completion[0].get("role") != "assistant":
            raise UsageError(f"row {index}: a completion must be one assistant message")
    # The chains of a tree have one prompt: it is rendered and tokenised once.
    distinct = {json.dumps(prompt): prompt for prompt, _ in chats}
    rendered = [_render(tokenizer, prompt, add_generation_prompt=True) for prompt in distinct.values()]
    ids_of = dict(zip(distinct, _ids(tokenizer, rendered), strict=True))
    prompts = [ids_of[json.dumps(prompt)] for prompt, _ in chats]
    wholes = _ids(
        tokenizer,
        [_render(tokenizer, [*prompt, *answer], add_generation_prompt=False) for prompt, answer in chats],
    )
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.add(tokenizer.eos_token_id)
    chains = []
    for index, (prompt_ids, whole) in enumerate(zip(prompts, wholes, strict=True)):
        if whole[: len(prompt_ids)] != prompt_ids:
            raise UsageError(
                f"row {index}: under this chat template the prompt's tokens are not a prefix of prompt + completion; "
                "the student would be trained on other tokens than it is asked with"
            )
        completion_ids = whole[len(prompt_ids) :]
        end = max((at for at, token in enumerate(completion_ids) if token in special), default=-1) + 1
        if end == 0 or tokenizer.decode(completion_ids[end:]).strip():
            raise UsageError(
                "this chat template does not end an assistant turn with a special token: the student could not learn "
                "to stop; take an instruct model whose template has an end-of-turn token"
            )
        chains.append(EncodedChain(prompt_ids, completion_ids[:end]))
    return chains


def encode_sft(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[dict[str, Any]], max_tokens: int
) -> Encoded[EncodedChain]:
    """Encode SFT rows (`prompt`, `completion`: messages), leaving out those over `max_tokens`."""
    return _within(encode_chains(tokenizer, [(row["prompt"], row["completion"]) for row in rows]), max_tokens)


def encode_dpo(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[dict[str, Any]], max_tokens: int
) -> Encoded[EncodedPair]:
    """Encode DPO rows (`prompt`, `chosen`, `rejected`: messages), leaving out those with a side over `max_tokens`.

    A row with `rejected_finished: false` has a rejected completion that was cut off: it gets no end of turn.

    Raises:
        UsageError: as `encode_chains`; and if rejected is chosen, or only its beginning.
    """
    rows = list(rows)
    chosen = encode_chains(tokenizer, [(row["prompt"], row["chosen"]) for row in rows])
    rejected = encode_chains(tokenizer, [(row["prompt"], row["rejected"]) for row in rows])
    pairs = []
    for index, (good, bad) in enumerate(zip(chosen, rejected, strict=True)):
        if not rows[index].get("rejected_finished", True):
            bad = unfinished_turn(bad)
        if good.completion[: len(bad.completion)] == bad.completion:
            raise UsageError(f"row {index}: chosen begins with all of rejected's tokens; there is nothing to prefer")
        shared = prefix_tokens(good.completion, bad.completion)
        pairs.append(EncodedPair(good.prompt, good.completion, bad.completion, shared))
    return _within(pairs, max_tokens)


def unfinished_turn(chain: EncodedChain) -> EncodedChain:
    """The chain without the token that ends the turn, as a model leaves it when max_tokens cuts it off."""
    return EncodedChain(chain.prompt, chain.completion[:-1])


def prefix_tokens(first: Sequence[int], second: Sequence[int]) -> int:
    """The number of tokens that two completions share at their start."""
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(first, second, strict=False)))


def special_words(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """A pattern of the special tokens' names, which the tokenizer reads as these tokens wherever a text has them."""
    names = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content]
    return re.compile("|".join(map(re.escape, names)) or "(?!)")


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what decides how messages become tokens: chat template, special tokens, the ids of a sample text.

    Rows that were selected by token counts under one tokenizer must not be trained under another: their hashes differ.
    """
    sample = "It's 1,024 \\boxed{-3.5}\n\n  12 naïve 日本 Wait! x_1 = \t7"
    parts = [
        tokenizer.chat_template,
        tokenizer.eos_token,
        tokenizer.bos_token,
        len(tokenizer),
        _ids(tokenizer, [sample])[0],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _render(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UsageError(f"the student's chat template cannot render a conversation of {roles}: {error}") from error
    return text


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    return ids


def _within(rows: list[EncodedRow], max_tokens: int) -> Encoded[EncodedRow]:
    kept = [row for row in rows if row.longest_sequence <= max_tokens]
    return Encoded(kept, len(rows) - len(kept))
