"""MoBA in vLLM, by a plugin: `vllm serve` of a model whose config.json has MoBA settings attends as these say.

vLLM calls `register` in each of its processes, by the entry point in the group `vllm.general_plugins`. Importing this
module needs neither torch nor vLLM.
"""


def register() -> None:
    """Put MoBA's backends into vLLM's registry, and have vLLM look at a model's settings before it starts."""
    from openmoba.vllm.plugin import install

    install()
