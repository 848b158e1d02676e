"""cotree: grow trees of thought with Monte Carlo tree search over language models, and train small models on them.

Importing this does no work and loads neither torch nor any other heavy library.
"""

from __future__ import annotations

from cotree.errors import CotreeError, UsageError

__version__ = "0.1.0"
__all__ = ["CotreeError", "UsageError", "__version__"]
