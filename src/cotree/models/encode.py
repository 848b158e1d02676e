"""Render conversations to prompts and tokenize dataset rows with a model's chat template.

Invariant: a chain's token ids are those of the whole rendered conversation, tokenized in one piece, and its prompt's
ids are what a server reads before it generates. Rows are never truncated: longer ones are left out and counted. The
scored tokens spell exactly the row's completion: if a reasoning template changes the reply (Qwen3 adds an empty think
block, DeepSeek-R1 drops the reasoning), the unchanged reply follows the rendered prompt; other rows that a template
changes are rejected. Imports neither torch nor transformers, so that datasets can count tokens as the trainer does.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from itertools import takewhile
from string import ascii_letters
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from unicodedata import normalize

from cotree.base.errors import UsageError
from cotree.base.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turns = Sequence[dict[str, str]]  # messages: a role and a content each
# A fixed date for templates that print today's: Llama 3.2's default. Defined as a macro that replaces transformers'
# `strftime_now`, because a function passed to a template would be rendered as text.
_TODAY = datetime(2024, 7, 26)
_DATE_PARTS = {part: _TODAY.strftime(part) for flag in ("%", "%-") for part in map(flag.__add__, ascii_letters)}
_FIXED_DATE = """{% macro strftime_now(format) %}{% set date = namespace(text=format) %}
{% for part, value in date_parts.items() %}{% set date.text = date.text | replace(part, value) %}{% endfor %}
{{ date.text }}{% endmacro %}
"""
# Turn markers of common chat templates: in a text they are leaked turn boundaries, whatever the student's template.
_TURN_TOKENS = {
    "ChatML: Qwen, SmolLM, Yi": ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    "Llama 3 headers": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "Llama 3 texts": ("<|begin_of_text|>", "<|end_of_text|>"),
    "Gemma": ("<start_of_turn>", "<end_of_turn>"),
    "Phi, GLM, Zephyr": ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    "Granite": ("<|start_of_role|>", "<|end_of_role|>"),
    "Command R": ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    "DeepSeek": ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
}


class _TokenCounts:
    """Token counts of an encoded row."""

    @property
    def sequences(self) -> tuple[list[int], ...]:
        """The sequences that training computes."""
        raise NotImplementedError

    @property
    def tokens(self) -> int:
        """Total tokens of all sequences, as computed without prefix sharing."""
        return sum(map(len, self.sequences))

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest sequence, to compare with `max_tokens`."""
        return max(map(len, self.sequences))


@dataclass(frozen=True)
class EncodedChain(_TokenCounts):
    """An SFT row as token ids: the prompt up to the assistant's turn, the completion through the end-of-turn token."""

    prompt: list[int]
    completion: list[int]

    @property
    def sequences(self) -> tuple[list[int], ...]:
        """One: the prompt with the completion."""
        return (self.prompt + self.completion,)


@dataclass(frozen=True)
class EncodedPair(_TokenCounts):
    """A DPO row as token ids: a chosen and a rejected completion of one prompt.

    prefix: tokens in the completions' common prefix.
    reference: the reference model's log-probabilities of chosen and rejected in nats, subtracted in the margin; 0
        without a reference model.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    prefix: int
    reference: tuple[float, float] = (0.0, 0.0)

    @property
    def sequences(self) -> tuple[list[int], ...]:
        """Two: the prompt with chosen, the prompt with rejected."""
        return self.prompt + self.chosen, self.prompt + self.rejected


EncodedRow = TypeVar("EncodedRow", bound=EncodedChain | EncodedPair)


@dataclass(frozen=True)
class Encoded(Generic[EncodedRow]):
    """The rows within `max_tokens`, in order, and the number of longer ones left out."""

    rows: list[EncodedRow]
    too_long: int


class RowError(UsageError):
    """A row that this chat template cannot represent; other rows are not affected.

    Attributes:
        reason: `template_refuses` (rendering fails), `template_changes` (text would be lost or added) or
            `special_tokens` (a text contains one).
    """

    def __init__(self, reason: str, fault: str) -> None:
        super().__init__(fault)
        self.reason = reason


def encode_chains(tokenizer: PreTrainedTokenizerBase, chats: Sequence[tuple[Turns, Turns]]) -> list[EncodedChain]:
    """Encode as `encode_each`, but raise for the first invalid row.

    Raises:
        RowError: the first invalid row; the message names it.
        UsageError: as `encode_each`.
    """
    chains = []
    for index, chain in enumerate(encode_each(tokenizer, chats)):
        if isinstance(chain, RowError):
            raise RowError(chain.reason, f"row {index}: {chain}")
        chains.append(chain)
    return chains


def encode_each(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[tuple[Turns, Turns]]
) -> list[EncodedChain | RowError]:
    """Encode (prompt messages, completion messages) for training.

    A completion is one assistant message. Its ids end with the end-of-turn token; anything that the template adds after
    it (SmolLM2 and Qwen: a newline) is dropped, because a student never generates it and it would flatter the loss.

    Returns:
        Per row a chain or an error: the template cannot render it; the prompt's tokens are not a prefix of the
        conversation's (the template rewrites earlier turns, or a token spans the boundary); a question is changed in
        the prompt, or the scored tokens do not spell the completion.

    Raises:
        UsageError: a completion is not one assistant message, or the template does not end an assistant turn with a
            special token, so that the student could not learn to stop.
    """
    for index, (_, completion) in enumerate(chats):
        if len(completion) != 1 or completion[0].get("role") != "assistant":
            raise UsageError(f"row {index}: a completion must be one assistant message")
    # All chains of a tree have the same prompt: render and tokenize it once.
    distinct = {json.dumps(prompt): prompt for prompt, _ in chats}
    prompts = {
        key: _rendered_or_fault(tokenizer, prompt, add_generation_prompt=True) for key, prompt in distinct.items()
    }
    ending = _end_of_turn(tokenizer)
    wholes = [_whole(tokenizer, [*prompt, *answer], prompts[json.dumps(prompt)], ending) for prompt, answer in chats]
    texts = list(dict.fromkeys(text for text in [*prompts.values(), *wholes] if isinstance(text, str)))
    ids_of = dict(zip(texts, _ids(tokenizer, texts), strict=True))
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.add(tokenizer.eos_token_id)
    chains: list[EncodedChain | RowError] = []
    for (prompt, answer), whole in zip(chats, wholes, strict=True):
        asked = prompts[json.dumps(prompt)]
        if isinstance(asked, RowError):
            chains.append(asked)
            continue
        if isinstance(whole, RowError):
            chains.append(whole)
            continue
        prompt_ids, completion_ids = ids_of[asked], ids_of[whole][len(ids_of[asked]) :]
        if ids_of[whole][: len(prompt_ids)] != prompt_ids:
            fault = "under this chat template the prompt's tokens are not a prefix of prompt + completion"
            chains.append(_changed(f"{fault}; the student would be trained on other tokens than it is asked with"))
            continue
        end = max((at for at, token in enumerate(completion_ids) if token in special), default=-1) + 1
        if end == 0 or tokenizer.decode(completion_ids[end:]).strip():
            fault = "this chat template does not end an assistant turn with a special token"
            fix = "take an instruct model whose template has an end-of-turn token"
            raise UsageError(f"{fault}: the student could not learn to stop; {fix}")
        own, fault = completion_ids[:end], "nothing of it is scored"
        while fault and own and own[-1] in special:  # a turn may end with several special tokens
            own = own[:-1]
            scored = tokenizer.decode(own, clean_up_tokenization_spaces=False)
            fault = _change(prompt, asked, answer[0]["content"], scored)
        chains.append(_changed(fault) if fault else EncodedChain(prompt_ids, completion_ids[:end]))
    return chains


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that a reasoning template adds after a reply; "" for other templates."""
    if "</think>" not in str(tokenizer.chat_template):
        return ""
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "reply"}]
    text = _rendered_or_fault(tokenizer, chat, add_generation_prompt=False)
    return text.rpartition("reply")[2] if isinstance(text, str) else ""


def _whole(tokenizer: PreTrainedTokenizerBase, turns: Turns, asked: str | RowError, ending: str) -> str | RowError:
    """Render a conversation that ends with a reply; if a reasoning template changes the reply, return the rendered
    prompt followed by the unchanged reply.

    Args:
        asked: the rendered prompt. ending: from `_end_of_turn`.
    """
    whole, reply = _rendered_or_fault(tokenizer, turns, add_generation_prompt=False), turns[-1]["content"].strip()
    if not ending or not isinstance(asked, str) or not isinstance(whole, str):
        return whole
    if whole.startswith(asked) and _has_words(asked, reply, whole.removeprefix(asked).removesuffix(ending)):
        return whole
    if asked.rstrip().endswith("<think>"):
        if not reply.startswith("<think>") and "</think>" not in reply:
            return _changed("the chat template's prompt opens <think>, which the completion does not close")
        reply = reply.removeprefix("<think>").lstrip()
    return asked + reply + ending


def _changed(fault: str) -> RowError:
    return RowError("template_changes", f"{fault}; use another `tokenizer` or student, or write the rows otherwise")


def _change(prompt: Turns, asked: str, completion: str, scored: str) -> str:
    """Describe what the chat template changes in a row, or ""; ignores white space at the ends and around think tags.

    Earlier replies may lose their reasoning, as they do in evaluation (`shortens_replies`).

    Args:
        asked: the rendered prompt. scored: the text that training scores, without the end of turn.
    """
    for message in prompt:
        answer = message["content"].rpartition("</think>")[2] if message["role"] == "assistant" else message["content"]
        if answer.strip() not in asked:
            return f"the chat template does not print the {message['role']}'s message as it is written"
    if _has_words(asked, completion, scored):
        return ""
    written, trained = _words(completion), _words(scored)
    at = prefix_tokens(written, trained)
    ours, theirs = (repr(text[max(at - 10, 0) : at + 30]) for text in (written, trained))
    return f"the chat template changes the completion: {ours} would be trained as {theirs}"


def _has_words(asked: str, completion: str, scored: str) -> bool:
    """Whether the scored text equals the completion; the rendered prompt may have opened the thinking."""
    written, trained = _words(completion), _words(scored)
    return trained == written or (asked.rstrip().endswith("<think>") and f"<think>{trained}" == written)


def _words(text: str) -> str:
    """Normalize a text for comparison: Unicode composition, and white space around think tags."""
    return re.sub(r"\s*(</?think>)\s*", r"\1", normalize("NFC", text).strip())


def encode_sft(tokenizer: PreTrainedTokenizerBase, rows: Iterable[Row], max_tokens: int) -> Encoded[EncodedChain]:
    """Encode SFT rows (`prompt`, `completion`: messages), leaving out those longer than `max_tokens`."""
    return _within(encode_chains(tokenizer, [(row["prompt"], row["completion"]) for row in rows]), max_tokens)


def encode_dpo(tokenizer: PreTrainedTokenizerBase, rows: Iterable[Row], max_tokens: int) -> Encoded[EncodedPair]:
    """Encode DPO rows (`prompt`, `chosen`, `rejected`: messages), leaving out those with a side over `max_tokens`.

    The rejected side gets no end of turn if `rejected_finished` is false (it was cut off).

    Raises:
        UsageError: as `encode_chains`; and if rejected equals chosen or is its prefix.
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


def shortens_replies(tokenizer: PreTrainedTokenizerBase, prompt: Turns) -> bool:
    """Whether the chat template drops text of earlier replies from a prompt, as many drop the reasoning."""
    replies = [_words(message["content"]) for message in prompt if message["role"] == "assistant"]
    if not replies:
        return False
    asked = _words(_render(tokenizer, prompt, add_generation_prompt=True))
    return not all(reply in asked for reply in replies)


def unfinished_turn(chain: EncodedChain) -> EncodedChain:
    """The chain without its end-of-turn token, as when max_tokens cuts it off."""
    return EncodedChain(chain.prompt, chain.completion[:-1])


def prefix_tokens(first: Sequence[Any], second: Sequence[Any]) -> int:
    """The length of the common prefix of two sequences of tokens (or characters)."""
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(first, second, strict=False)))


def special_words(tokenizer: PreTrainedTokenizerBase | None) -> re.Pattern[str]:
    """A pattern for texts that must not be in a row: this tokenizer's special tokens, which would be tokenized as such,
    and turn markers of common chat templates (only these for None)."""
    own = () if tokenizer is None else tokenizer.added_tokens_decoder.values()
    names = [name for names in _TURN_TOKENS.values() for name in names]
    names += [token.content for token in own if token.special and token.content]
    return re.compile("|".join(map(re.escape, names)))


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of how messages become tokens: chat template, a rendered sample, special tokens, ids of a sample text.

    Used to refuse training on rows that were selected by another tokenizer's token counts.
    """
    sample = "It's 1,024 \\boxed{-3.5}\n\n  12 naïve 日本 Wait! x_1 = \t7"
    template, special = tokenizer.chat_template, (tokenizer.eos_token, tokenizer.bos_token)
    chat = [{"role": "user", "content": sample}, {"role": "assistant", "content": f"<think>\n{sample}\n</think>\n\n7"}]
    rendered = [
        str(_rendered_or_fault(tokenizer, turns, add_generation_prompt=len(turns) == 1)) for turns in (chat[:1], chat)
    ]
    parts = [template, *rendered, *special, len(tokenizer), *_ids(tokenizer, [sample])]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> str:
    """Render a conversation up to the start of the assistant's turn.

    Without the begin-of-sequence token if the server adds it. A base model (no chat template) gets plain turns:

        Question: What is 1 + 2?
        Answer:
        1 + 2 = 3.

        Question: What is 3 + 4?
        Answer:

    Raises:
        UsageError: the chat template refuses the conversation.
    """
    if not tokenizer.chat_template:  # answers start on a new line, like thoughts
        turns = ((message["role"], message["content"].strip()) for message in messages)
        return "".join(f"Question: {text}\nAnswer:\n" if role == "user" else f"{text}\n\n" for role, text in turns)
    text = _render(tokenizer, messages, add_generation_prompt=True)
    bos = getattr(tokenizer, "bos_token", None)
    if bos and text.startswith(bos) and _adds_bos(tokenizer):
        text = text.removeprefix(bos)
    return text


@lru_cache(maxsize=8)
def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer puts the begin-of-sequence token in front of every text, as a server does with it."""
    return bool(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool
) -> str:
    from jinja2 import TemplateError

    turns = [dict(message) for message in messages]
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
    template = tokenizer.chat_template
    if isinstance(template, str) and "strftime_now" in template:
        options |= {"chat_template": _FIXED_DATE + template, "date_parts": _DATE_PARTS}
    try:
        text = tokenizer.apply_chat_template(turns, **options)
    except (TemplateError, ValueError, TypeError, LookupError) as error:  # templates are programs and raise anything
        roles = ", ".join(turn["role"] for turn in turns)
        fault = f"the chat template cannot render a conversation of {roles}: {error}"
        raise UsageError(f"{fault}; use another `tokenizer` or student") from error
    return str(text)


def _rendered_or_fault(
    tokenizer: PreTrainedTokenizerBase, messages: Turns, *, add_generation_prompt: bool
) -> str | RowError:
    try:
        return _render(tokenizer, messages, add_generation_prompt=add_generation_prompt)
    except UsageError as error:
        return RowError("template_refuses", str(error))


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    return ids


def _within(rows: list[EncodedRow], max_tokens: int) -> Encoded[EncodedRow]:
    kept = [row for row in rows if row.longest_sequence <= max_tokens]
    return Encoded(kept, len(rows) - len(kept))
