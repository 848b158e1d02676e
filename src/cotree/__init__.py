"""cotree: grow trees of thought with Monte Carlo tree search over language models, and train small models on them.

Importing this does no work and loads neither torch nor any other heavy library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cotree.errors import CotreeError, UsageError

if TYPE_CHECKING:
    from cotree.tasks import Question, Task, Verdict, task

__version__ = "0.1.0"
__all__ = ["CotreeError", "Question", "Task", "UsageError", "Verdict", "__version__", "task"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'cotree' has no attribute {name!r}")
    import cotree.tasks

    return getattr(cotree.tasks, name)
