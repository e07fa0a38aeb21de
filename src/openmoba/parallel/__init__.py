"""Attention of one sequence over several devices, on `torch.distributed`."""

from openmoba.parallel.api import full_attention, moba_attention
from openmoba.parallel.sharding import Sharding

__all__ = ["Sharding", "full_attention", "moba_attention"]
