"""Mixture of Block Attention (MoBA) for long-context language models."""

from typing import TYPE_CHECKING, Any

from openmoba.config import MobaConfig

if TYPE_CHECKING:
    from openmoba.ops.public import *
else:

    def __getattr__(name: str) -> Any:
        """Import the operation, and torch with it, when one of its names is asked for: commands' help has none."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from openmoba.ops import public

        found = globals()[name] = getattr(public, name)
        return found


__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "MobaConfig",
    "__version__",
    "block_attention",
    "complete_paged",
    "complete_pages",
    "explain",
    "merge_attention",
    "moba_attention",
    "moba_decode",
    "moba_paged",
    "moba_select",
    "new_centroids",
    "new_paged_centroids",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
