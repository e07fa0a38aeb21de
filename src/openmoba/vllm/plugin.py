"""How the plugin gets into vLLM: two backends in its registry, and a look at every configuration before it is used.

On the CPU there is one backend, whose place MoBA's takes. On CUDA there are many, of which vLLM picks one by the
machine: a model with MoBA settings gets `CUSTOM`, which is ours. Models without settings are left alone on both.
"""

from __future__ import annotations

import logging
from functools import wraps
from typing import Any

import vllm

from openmoba.vllm.served import check_engine, is_known, served

BACKENDS = {"cpu": ("CPU_ATTN", "openmoba.vllm.cpu.Backend"), "cuda": ("CUSTOM", "openmoba.vllm.cuda.Backend")}
"""Device type -> the name of our backend in vLLM's registry, and its class."""
# vLLM shows what lies below its own logger.
log = logging.getLogger("vllm.openmoba")


def install() -> None:
    """Do it, once in each process; vLLM may load plugins several times.

    In a release of vLLM that is not known, all models but those with MoBA settings, which are refused, are left alone.
    """
    from vllm.engine.arg_utils import EngineArgs

    if is_known(vllm.__version__):
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        for name, path in BACKENDS.values():
            if not AttentionBackendEnum[name].is_overridden():
                register_backend(AttentionBackendEnum[name], path)
    look_before_start(EngineArgs)


def look_before_start(arguments: Any) -> None:
    """Have the class of an engine's arguments look at each configuration that it makes; once."""
    create = arguments.create_engine_config
    if hasattr(create, "looks_for_moba"):
        return

    @wraps(create)
    def create_and_look(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = create(self, *args, **kwargs)
        settle(config)
        return config

    create_and_look.looks_for_moba = True  # type: ignore[attr-defined]
    arguments.create_engine_config = create_and_look


def settle(config: Any) -> None:
    """Have a model with MoBA settings use our backend.

    Raises:
        ValueError: the model, or what is asked for beside it, cannot be served.
    """
    settings = served(config)
    if settings is None:
        return
    check_engine(config, vllm.__version__)
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    device = current_platform.device_type
    if device not in BACKENDS or (device == "cuda" and not current_platform.is_cuda()):
        raise ValueError(f"MoBA is served on CPUs and NVIDIA GPUs, got {current_platform.device_name}")
    name, path = BACKENDS[device]
    ours = AttentionBackendEnum[name]
    if ours.get_path() != path:
        raise ValueError(
            f"another plugin has put {ours.get_path()} in the place of MoBA's backend ({name}); "
            "name the plugins to load, VLLM_PLUGINS=openmoba"
        )
    attention = config.attention_config
    if attention.backend not in (None, ours) or any(kind != ours for kind in attention.backend_per_kind.values()):
        raise ValueError(
            f"this model asks for MoBA, which other attention backends do not compute; start with {name}, or none named"
        )
    attention.backend = ours
    log.info("openmoba: %s", settings)
