"""Attention of one sequence over several devices, on `torch.distributed`."""

from openmoba.parallel.api import block_attention, full_attention, moba_attention, over_ranks
from openmoba.parallel.collectives import leave_group, prioritize_transfers
from openmoba.parallel.current import sharded
from openmoba.parallel.key_conv import key_convolution
from openmoba.parallel.sharding import Sharding

__all__ = [
    "Sharding",
    "block_attention",
    "full_attention",
    "key_convolution",
    "leave_group",
    "moba_attention",
    "over_ranks",
    "prioritize_transfers",
    "sharded",
]
