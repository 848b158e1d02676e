"""Worked examples for search prompts: those of the shipped tasks are in `worked_examples.yaml`, their texts our own.

They have the form of the `examples` in a user's task file (`own_tasks`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files

from cotree.tasks.base import WorkedExample

_STEPS = ("sub_task", "thinking", "double_check")


@cache
def shipped_examples(section: str, prompt: str = "{question}") -> tuple[WorkedExample, ...]:
    """The worked examples of one section of the file, each question put into `prompt`."""
    import yaml

    sections = yaml.safe_load(files("cotree.tasks").joinpath("worked_examples.yaml").read_text(encoding="utf-8"))
    return tuple(worked_example(fields, prompt) for fields in sections[section])


def worked_example(fields: Mapping[str, str], prompt: str) -> WorkedExample:
    """A worked example from its fields: `question`, whatever else the prompt shows, steps by thought type, `answer`."""
    steps = {step: fields[step] for step in _STEPS if step in fields}
    return WorkedExample(fill_prompt(prompt, fields), steps, fields["answer"])


def fill_prompt(prompt: str, fields: Mapping[str, object]) -> str:
    r"""Replace each `{name}` that is a field; other braces, as in `\boxed{}`, stay."""
    return re.sub(r"\{(\w+)\}", lambda match: str(fields.get(match[1], match[0])), prompt)
