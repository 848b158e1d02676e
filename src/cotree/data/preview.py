"""Show dataset rows in the terminal as the trainer sees them: all tokens, the loss mask, and rows that are too long.

Invariant: the text shown is decoded from the token ids used in training.
"""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from cotree.base.rows import Row, read_rows
from cotree.data.gates import shortened
from cotree.data.kinds import check_file, check_template, turn_faults
from cotree.models.encode import RowError, encode_dpo, encode_sft, shortens_replies

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# {word at the start of a line: its colour}
_STYLES = {"prompt": "dim", "shared": "cyan", "loss": "green", "chosen": "green", "rejected": "red"}
# Control characters except newline and tab, and Unicode direction marks.
_CONTROL = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u2028\\u2029\\u202a-\\u202e\\u2066-\\u2069]")


def visible(text: str) -> str:
    """Escape control characters of model output, so that it cannot control the terminal."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def preview(path: Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int, rows: int = 3) -> Text:
    """Render the first rows of a dataset file, and count the rows longer than `max_tokens`.

    prompt: no loss. loss: the completion. shared: a pair's common prefix, which `mask_prefix` and `sft_scope: suffix`
    leave out. Special tokens are shown.

    Raises:
        UsageError: the file is invalid, or was built with another chat template.
    """
    kind, count = check_file(path)
    check_template(path, tokenizer)
    text = Text(f"{path}: {count} {kind} rows\n")
    if kind == "stepwise":
        for row in islice(read_rows(path), rows):
            text.append(f"\n{visible(row['prompt'])}\n")
            for step, right in zip(row["completions"], row["labels"], strict=True):
                line = f"{'right' if right else 'wrong':>8} │ {visible(step)}\n"
                text.append(line, style="green" if right else "red")
        return text
    lengths, refused, shorter = [], 0, 0
    for index, row in enumerate(read_rows(path)):
        try:
            if faults := turn_faults(row, kind, tokenizer):
                raise RowError("special_tokens", faults[0])
            parts, longest = _parts(row, kind, tokenizer)
        except RowError as error:
            refused += 1
            if index < rows or refused == 1:
                fault = str(error).removeprefix("row 0: ")
                text.append(f"\nrow {index}: cannot be trained on: {visible(fault)}\n", style="red")
            continue
        lengths.append(longest)
        shorter += shortens_replies(tokenizer, row["prompt"])
        if index < rows:
            sizes = ", ".join(f"{len(ids)} {part}" for part, ids in parts.items())
            fate = "dropped" if longest > max_tokens else "kept"
            text.append(f"\nrow {index}: {sizes} tokens, {longest} of at most {max_tokens}: {fate}\n")
            for part, ids in parts.items():
                for line in re.findall(r"[^\n]*\n|[^\n]+", tokenizer.decode(ids)):
                    shown = visible(line.replace("\n", "⏎")) + "\n"
                    text.append(f"{part:>8} │ ", style="bold").append(shown, style=_STYLES[part])
    dropped = sum(length > max_tokens for length in lengths)
    text.append(f"\n{len(lengths)} rows of {min(lengths, default=0)} to {max(lengths, default=0)} tokens; ")
    text.append(f"{dropped} would be dropped (over {max_tokens})")
    if refused:
        text.append(f"; {refused} rows cannot be trained on", style="red")
    if shorter:
        text.append(f"; {shortened(shorter)}")
    return text


def _parts(row: Row, kind: str, tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, list[int]], int]:
    """{part (of `_STYLES`): token ids} of a row, and the length of its longest sequence."""
    if kind == "sft":
        (chain,) = encode_sft(tokenizer, [row], 2**62).rows
        return {"prompt": chain.prompt, "loss": chain.completion}, chain.longest_sequence
    (pair,) = encode_dpo(tokenizer, [row], 2**62).rows
    sides = {"chosen": pair.chosen[pair.prefix :], "rejected": pair.rejected[pair.prefix :]}
    return {"prompt": pair.prompt, "shared": pair.chosen[: pair.prefix], **sides}, pair.longest_sequence
