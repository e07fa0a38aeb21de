"""The settings of the model that vLLM is making."""

from __future__ import annotations

from vllm.config import get_current_vllm_config_or_none

from openmoba.vllm.served import Served, served


def current() -> Served | None:
    """Return them; None for a model without, and where no model is being made."""
    return served(get_current_vllm_config_or_none())
