"""Mixture of Block Attention (MoBA) for long-context language models."""

from openmoba.config import MobaConfig
from openmoba.ops.api import Explanation, explain, moba_attention, moba_select

__version__ = "0.1.0"

__all__ = ["Explanation", "MobaConfig", "__version__", "explain", "moba_attention", "moba_select"]
