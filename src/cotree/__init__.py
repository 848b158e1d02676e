"""cotree: grow trees of thought with Monte Carlo tree search over language models, and train small models on them.

Importing this does no work and loads neither torch nor any other heavy library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cotree.errors import CotreeError, UsageError

if TYPE_CHECKING:
    from cotree.eval.diagnosis import diagnose

__version__ = "0.1.0"
__all__ = ["CotreeError", "UsageError", "__version__", "diagnose"]
# Where the rest of the API lives; it is loaded when it is first asked for.
_LAZY = {"diagnose": "cotree.eval.diagnosis"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
