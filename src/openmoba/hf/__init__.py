"""MoBA in transformers models. Importing this module registers the attention and the mask named "moba"."""

from transformers import AttentionInterface, AttentionMaskInterface

from openmoba.hf.attention import attention_forward
from openmoba.hf.checkpoint import convert
from openmoba.hf.find_layout import layout_mask
from openmoba.hf.layers import prepare_new_models
from openmoba.hf.model import configure
from openmoba.hf.settings import NAME

__all__ = ["configure", "convert"]

AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, layout_mask)
prepare_new_models()
