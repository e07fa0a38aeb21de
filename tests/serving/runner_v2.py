"""Have vLLM's build for CPUs use Model Runner V2, as GPUs do: a plugin of pytest, loaded before vLLM.

That build does so where Triton has a backend for CPUs. Triton's interpreter, in which kernels run here, asks for none.
"""

from __future__ import annotations

import os

os.environ |= {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}  # both are read early

from types import SimpleNamespace

from triton.backends import backends

backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: False), compiler=None)
