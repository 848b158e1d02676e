"""Rows in the terminal as the trainer sees them: every token, which of them carry loss, and what would be dropped.

Invariant: what is shown is decoded from the very ids that training encodes. Each line begins with a mark that says the
same as its colour.
"""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from cotree.base.rows import read_rows
from cotree.data.kinds import check_file, check_template
from cotree.models.encode import encode_dpo, encode_sft

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

_STYLES = {"prompt": "dim", "shared": "cyan", "loss": "green", "chosen": "green", "rejected": "red"}


# All but the newline and the tab; with the marks that turn the direction of what follows.
_CONTROL = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u2028\\u2029\\u202a-\\u202e\\u2066-\\u2069]")


def visible(text: str) -> str:
    """Text of a model with its control characters written out, so that it cannot command the terminal."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def preview(path: Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int, rows: int = 3) -> Text:
    """The first rows of a dataset file, and how many rows would be dropped for their length.

    prompt: no loss. loss: the completion. shared: the prefix that both sides of a pair have; the masked margin and the
    suffix scope leave it out. Special tokens stand as they are written.

    Raises:
        UsageError: the file is faulty, or was built for another chat template.
    """
    from rich.text import Text

    kind, count = check_file(path)
    check_template(path, tokenizer)
    text = Text(f"{path}: {count} {kind} rows\n")
    if kind == "stepwise":
        for row in islice(read_rows(path), rows):
            text.append(f"\n{visible(row['prompt'])}\n")
            for step, label in zip(row["completions"], row["labels"], strict=True):
                text.append(
                    f"{'right' if label else 'wrong':>8} │ {visible(step)}\n", style="green" if label else "red"
                )
        return text
    longest = []
    for index, row in enumerate(read_rows(path)):
        if kind == "sft":
            (chain,) = encode_sft(tokenizer, [row], 2**62).rows
            longest.append(chain.longest)
            parts = {"prompt": chain.prompt, "loss": chain.completion}
        else:
            (pair,) = encode_dpo(tokenizer, [row], 2**62).rows
            longest.append(pair.longest)
            parts = {"prompt": pair.prompt, "shared": pair.chosen[: pair.prefix],
                     "chosen": pair.chosen[pair.prefix :], "rejected": pair.rejected[pair.prefix :]}  # fmt: skip
        if index < rows:
            sizes = ", ".join(f"{len(ids)} {mark}" for mark, ids in parts.items())
            fate = "dropped" if longest[-1] > max_tokens else "kept"
            text.append(f"\nrow {index}: {sizes} tokens, {longest[-1]} of at most {max_tokens}: {fate}\n")
            for mark, ids in parts.items():
                for line in re.findall(r"[^\n]*\n|[^\n]+", tokenizer.decode(ids)):
                    shown = visible(line.replace("\n", "⏎")) + "\n"
                    text.append(f"{mark:>8} │ ", style="bold").append(shown, style=_STYLES[mark])
    dropped = sum(tokens > max_tokens for tokens in longest)
    text.append(
        f"\n{count} rows of {min(longest)} to {max(longest)} tokens; {dropped} would be dropped (over {max_tokens})"
    )
    return text
