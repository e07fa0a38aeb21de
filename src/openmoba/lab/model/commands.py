"""`openmoba convert`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from openmoba.config import MobaConfig


@dataclass(frozen=True)
class Convert:
    """Make a MoBA checkpoint of a Llama, Qwen, Mistral ... checkpoint: the same weights, sparse attention."""

    model: tyro.conf.Positional[str]
    """A run's folder, a model's folder, or a model of the hub."""
    out: tyro.conf.Positional[Path]
    """Folder of the new checkpoint."""
    block_size: int
    """Tokens per block."""
    top_k: int
    """Blocks each query reads, its own included."""
    full_layers: str = "none"
    """Layers that keep full attention: "none", a count of last ones, "first:3", "spread:3" (evenly), or indices:
    "0,15,31"."""
    key_conv: int | None = None
    """Width in tokens, such as 4, of a convolution over the keys of every layer, to be trained; left out: none."""

    def run(self) -> None:
        """Convert, and say how to load the result."""
        from openmoba.hf.checkpoint import convert
        from openmoba.lab.model.build import model_folder

        settings = MobaConfig(self.block_size, self.top_k, self.full_layers, self.key_conv)
        with model_folder(self.model) as folder:
            convert(folder, self.out, settings)
        print(f'import openmoba.hf, then AutoModelForCausalLM.from_pretrained("{self.out}")')
