"""Parts of a model that run as they are, inside a packed graph.

What no other op expresses, and no export can trace, is one node that calls the model's own code:
over all tokens at once where it treats each alone, else sequence by sequence, with what the
model itself would keep of earlier tokens read from our caches.
"""

from .calls import CALLS, TokenCall
from .module_ops import (
    cached_recurrent_module,
    cached_sequence_module,
    recurrent_module,
    sequence_module,
    token_module,
)

__all__ = [
    "CALLS",
    "TokenCall",
    "cached_recurrent_module",
    "cached_sequence_module",
    "recurrent_module",
    "sequence_module",
    "token_module",
]
