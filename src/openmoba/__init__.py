"""Mixture of Block Attention (MoBA) for long-context language models."""

from openmoba.config import MobaConfig
from openmoba.ops.api import block_attention, merge_attention, moba_attention, moba_select
from openmoba.ops.centroids import new_centroids
from openmoba.ops.decode import moba_decode
from openmoba.ops.explain import Explanation, explain
from openmoba.ops.paged import complete_paged, moba_paged, new_paged_centroids
from openmoba.ops.pages import complete_pages

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
