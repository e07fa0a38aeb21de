"""The search for needles on a GPU: a model of the study's size at its lengths, in the time that the page promises."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from openmoba import MobaConfig
from openmoba.lab.config import DataConfig, ModelConfig
from openmoba.lab.data.tokenizer import byte_tokenizer
from openmoba.lab.measure.needle import measure_needles
from openmoba.lab.model.build import build_model, set_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """Sixteen documents, each a window of 32K bytes and a little more."""
    (tmp_path / "texts").mkdir()
    for number in range(16):
        text = "".join(f"{i} times {number} is {i * number}, " for i in range(1800))
        (tmp_path / "texts" / f"{number}.txt").write_text(text[:33_000])
    return DataConfig("stdlib", valid=str(tmp_path / "texts"), cache=str(tmp_path / "cache"))


@pytest.mark.parametrize("attention", [None, MobaConfig(512, 3), MobaConfig(128, 9, full_layers=2, key_conv=4)])
def test_a_search_takes_less_than_half_a_minute(attention: MobaConfig | None, data: DataConfig, tmp_path: Path) -> None:
    """Once the kernels are compiled; examples that go through the model together are scored as alone."""
    model = build_model(ModelConfig(size="14m", family="qwen3"), len(byte_tokenizer()), 32768, 0)
    set_attention(model, attention)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    lengths = (4096, 8192, 16384, 32768)
    (first,) = measure_needles([tmp_path / "model"], lengths=lengths, depths=1, samples=8, data=data)
    (search,) = measure_needles([tmp_path / "model"], lengths=lengths, depths=6, samples=16, data=data)
    print(f"\n{attention}: {search.seconds:.1f} s for 6.9 M tokens; the first {first.seconds:.1f} s compile, too")
    assert search.seconds < 30
    (alone,) = measure_needles([tmp_path / "model"], lengths=(4096,), depths=2, samples=16, data=data)[0].grids
    together = search.grids[0]
    for depth in (0.0, None):
        one, many = (np.array(grid.loss[grid.depths.index(depth)]) for grid in (alone, together))
        np.testing.assert_allclose(one, many, atol=0.03, err_msg="bf16 of an untrained model")
