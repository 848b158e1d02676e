"""cotree: grow trees of thought with Monte Carlo tree search over language models, and train small models on them.

Importing this does no work and loads neither torch nor any other heavy library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cotree.base.errors import CotreeError, UsageError

if TYPE_CHECKING:
    from cotree.data.build import build_dpo, build_sft
    from cotree.decode.answer import decode
    from cotree.eval.evaluate import evaluate
    from cotree.tasks import Question, Task, Verdict, task
    from cotree.tasks.diagnosis import diagnose

__version__ = "0.1.0"
__all__ = [
    "CotreeError",
    "Question",
    "Task",
    "UsageError",
    "Verdict",
    "__version__",
    "build_dpo",
    "build_sft",
    "decode",
    "diagnose",
    "evaluate",
    "task",
]
# Where the rest of the API lives; it is loaded when it is first asked for.
_LAZY = {
    "Question": "cotree.tasks",
    "Task": "cotree.tasks",
    "Verdict": "cotree.tasks",
    "build_dpo": "cotree.data.build",
    "build_sft": "cotree.data.build",
    "decode": "cotree.decode.answer",
    "diagnose": "cotree.tasks.diagnosis",
    "evaluate": "cotree.eval.evaluate",
    "task": "cotree.tasks",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
