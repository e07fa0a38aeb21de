"""The plugin for vLLM without vLLM: what it reads of configurations, and a layer's arithmetic on vLLM's kind of batch.

`make test-vllm` runs it in real engines.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from paging import Server
from serving_stubs import BLOCKS, SCALE, SETTINGS, FakeLayer, config, forward, new_layer, place
from torch import Tensor

from openmoba import moba_attention, moba_paged
from openmoba.vllm import register
from openmoba.vllm.layers import keys_and_values, write_rows
from openmoba.vllm.served import Served, check_engine, check_layer, served

PAGE = 8
Randn = Callable[..., Tensor]


def test_batches() -> None:
    """Prompts in chunks beside steps of others, padding behind them, and a request that begins with another's pages."""
    server = Server(PAGE, 4)
    layer = new_layer(server)
    a, b = server.begin(), server.begin()
    for news in ({a: 21}, {a: 1, b: 19}, {a: 1, b: 1}, {b: 20, a: 2}):
        torch.testing.assert_close(*step(layer, server, news), rtol=1e-12, atol=1e-12)
    c = server.begin(like=b, shared=3)
    for news in ({c: 5, a: 1}, {a: 1, c: 1}):
        torch.testing.assert_close(*step(layer, server, news), rtol=1e-12, atol=1e-12)


def step(layer: FakeLayer, server: Server, news: dict[int, int]) -> tuple[Tensor, Tensor]:
    """Let requests grow: what the layer gives for the new tokens, and what each gives in a call of its own."""
    call = server.call(news)
    got = forward(layer, server, call, padding=3)
    assert (got[-3:] == -1).all(), "padding is left alone"
    alone = [
        moba_attention(q[None], server.keys[request][None], server.values[request][None], **BLOCKS, scale=SCALE)[0]
        for request, q in zip(news, call["q"].split(list(news.values())), strict=True)
    ]
    return got[:-3], torch.cat(alone)


def test_kernels_get_no_more_of_the_table_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(*arguments: Any, **settings: Any) -> Tensor:
        seen.append(arguments[4].shape)
        return moba_paged(*arguments, **settings)

    monkeypatch.setattr("openmoba.vllm.layers.moba_paged", watched)
    server = Server(PAGE, 4)
    layer, a, b = new_layer(server), server.begin(), server.begin()
    step(layer, server, {a: 2 * PAGE, b: 3})
    step(layer, server, {a: 1, b: 1})
    assert seen == [(2, 2), (2, 3)]


def test_another_cache_gets_other_centroids() -> None:
    """vLLM makes a small cache to measure with, then the real one."""
    small, large = Server(PAGE, 4, pages=20), Server(PAGE, 4, pages=40)
    layer = new_layer(small)
    for server in (small, large):
        request = server.begin()
        for new in (20, 1):
            torch.testing.assert_close(*step(layer, server, {request: new}))
        assert layer.centroids is not None
        assert layer.centroids.shape == server.centroids.shape


def test_full_layers_and_profiling_are_the_parents(randn: Randn) -> None:
    layer, out = new_layer(Server(PAGE, 4)), randn(3, 6, 8)
    for index, batch in ((1, SimpleNamespace()), (2, None)):
        assert (layer.forward(place(index), out, out, out, out, batch, out.clone()) == 7).all()
    assert layer.asked["kv_cache_dtype"] == "auto"


@pytest.mark.parametrize(
    ("batch", "scales", "message"),
    [({"causal": False}, (), "causal, and this batch is not"), ({"causal": True}, (1.0,), "does not quantise")],
)
def test_batches_of_another_kind(batch: dict[str, Any], scales: Any, message: str, randn: Randn) -> None:
    layer, x = new_layer(Server(PAGE, 4)), randn(3, 6, 8)
    with pytest.raises(ValueError, match=message):
        layer.forward(place(0), x, x, x, x, SimpleNamespace(**batch), x, *scales)


@pytest.mark.parametrize("index", [0, 1], ids=["moba", "full"])
def test_keys_that_were_not_convolved(index: int, randn: Randn) -> None:
    """Of a model that vLLM computes in a way of its own, or replays from a graph."""
    layer, x, batch = new_layer(Server(PAGE, 4)), randn(3, 6, 8), SimpleNamespace()
    layer.served = replace(layer.served, key_conv=3)
    layer.forward(place(index), x, x, x, x, None, x)
    for given in (None, SimpleNamespace(batch=SimpleNamespace())):
        layer.key_conv = given
        with pytest.raises(ValueError, match=rf"keys of model\.layers\.{index}\.self_attn\.attn have not passed"):
            layer.forward(place(index), x, x, x, x, batch, x)


def test_filters_that_were_not_loaded(randn: Randn) -> None:
    layer, weight = new_layer(Server(PAGE, 4)), randn(6, 4)
    layer.key_conv = SimpleNamespace(weight=weight)
    layer.process_weights_after_loading(torch.float32)
    assert layer.asked["dtype"] is torch.float32
    weight[3, 1] = float("nan")
    with pytest.raises(ValueError, match=r"key_conv.*not in its checkpoint"):
        layer.process_weights_after_loading(torch.float32)


def test_rows_are_written_where_slots_say(randn: Randn) -> None:
    cache = torch.zeros(3, 2, PAGE, 2 * 8, dtype=torch.bfloat16)
    key, value = randn(2, 5, 2, 8).unbind()
    write_rows(key, value, cache, torch.tensor([17, -1, 7, 0]))
    keys, values = keys_and_values(cache)
    assert torch.equal(keys[2, 1], key[0].bfloat16())
    assert torch.equal(values[0, 7], value[2].bfloat16())
    assert torch.equal(keys[0, 0], key[3].bfloat16())
    assert cache.count_nonzero() == 3 * key[0].numel() * 2


def test_settings_are_the_models() -> None:
    assert served(None) is None
    assert served(config(moba=None)) is None
    found = served(config())
    assert found == Served(4, 2, frozenset({1}))
    assert str(found) == "MoBA with blocks of 4 tokens, top-2, layers [1] full"
    convolving = served(config(moba=SETTINGS | {"key_conv": 3}))
    assert convolving == Served(4, 2, frozenset({1}), 3)
    assert str(convolving) == f"{found}, keys convolved over 3 tokens"
    with pytest.raises(ValueError, match=r"full_layers \[3\] are not layers"):
        served(config(moba=SETTINGS | {"full_layers": [3]}))


def test_layers_by_name() -> None:
    found = Served(4, 2, frozenset({1}))
    assert [found.is_sparse(f"model.layers.{index}.self_attn.attn") for index in (0, 1, 2)] == [True, False, True]
    for name in ("model.attn", "encoder.layers.1.heads.2"):
        with pytest.raises(ValueError, match=f"'{name}' has no one number"):
            found.is_sparse(name)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"cache__cache_dtype": "fp8_e4m3"},
            "a cache in fp8_e4m3 of a model in bfloat16; start with --kv-cache-dtype auto",
        ),
        ({"cache__cache_dtype": "float16"}, "a cache in float16"),
        ({"cache__block_size": 6}, "blocks of 4 tokens in pages of 6; start with --block-size 32$"),
        ({"cache__prefix_match_unit": 4}, "prefixes that end within a page"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"kv_transfer_config": object()}, "moved between machines or memories"),
        ({"parallel__decode_context_parallel_size": 2}, "spread over GPUs"),
        ({"parallel__prefill_context_parallel_size": 2}, "spread over GPUs"),
    ],
)
def test_engines(changed: dict[str, Any], message: str) -> None:
    check_engine(config(cache__cache_dtype="bfloat16", cache__block_size=2), "0.32.0")
    with pytest.raises(ValueError, match=f"does not serve .*{message}"):
        check_engine(config(**changed), "0.33.1")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model__using_transformers_backend": lambda: True}, "in a model of transformers'; generate with"),
        ({"lora_config": object()}, "beside LoRA adapters; start without --enable-lora"),
    ],
)
def test_engines_of_models_with_key_convolution(changed: dict[str, Any], message: str) -> None:
    check_engine(config(**changed), "0.32.0")
    check_engine(config(SETTINGS | {"key_conv": 4}), "0.32.0")
    with pytest.raises(ValueError, match=f"does not serve key convolution {message}"):
        check_engine(config(SETTINGS | {"key_conv": 4}, **changed), "0.32.0")


def test_layers_of_other_types() -> None:
    mixed = config()
    mixed.model_config.hf_text_config.layer_types[0] = "sliding_attention"
    with pytest.raises(ValueError, match=r"layers of types \['sliding_attention'\]"):
        check_engine(mixed, "0.32.0")


@pytest.mark.parametrize("version", ["0.31.0", "0.3.2", "0.330.0", "1.0.0"])
def test_other_versions(version: str) -> None:
    with pytest.raises(ValueError, match=f"vLLM 0.32 and 0.33, this is {version}"):
        check_engine(config(), version)


def test_other_kinds_of_attention() -> None:
    check_layer(attn_type="decoder", alibi_slopes=None, sliding_window=None, logits_soft_cap=0, chunk_lookback=-1)
    for name, value in {"sinks": torch.ones(2), "sliding_window": 1, "new_kind": True, "alibi_slopes": [1.0]}.items():
        with pytest.raises(ValueError, match=name):
            check_layer(**{name: value})


class FakeBackend:
    """A member of vLLM's registry."""

    def __init__(self, path: str | None) -> None:
        self.path = path

    def is_overridden(self) -> bool:
        return str(self.path).startswith("openmoba")

    def get_path(self) -> str | None:
        return self.path


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stand-ins for the parts of vLLM that the plugin touches, on a GPU that vLLM would give its own backend."""

    class EngineArgs:
        def create_engine_config(self, **changed: Any) -> Any:
            return config(**changed)

    registry = {"CPU_ATTN": FakeBackend("vllm.cpu.Backend"), "CUSTOM": FakeBackend(None)}
    platform = SimpleNamespace(device_type="cuda", device_name="an accelerator", is_cuda=lambda: True)
    parts: dict[str, dict[str, Any]] = {
        "vllm": {"__version__": "0.33.0"},
        "vllm.engine.arg_utils": {"EngineArgs": EngineArgs},
        "vllm.platforms": {"current_platform": platform},
        "vllm.v1.attention.backends.registry": {
            "AttentionBackendEnum": registry,
            "register_backend": lambda backend, path: setattr(backend, "path", path),
        },
    }
    for name, contents in parts.items():
        module = ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "openmoba.vllm.plugin", raising=False)
    return SimpleNamespace(arguments=EngineArgs, registry=registry, platform=platform, version=sys.modules["vllm"])


def test_a_model_with_settings_gets_our_backend(fake_vllm: Any) -> None:
    register()
    register()
    create = fake_vllm.arguments().create_engine_config
    assert not hasattr(create.__wrapped__, "__wrapped__"), "looked at once, however often plugins are loaded"
    assert create().attention_config.backend is fake_vllm.registry["CUSTOM"]
    assert create(moba=None).attention_config.backend is None
    fake_vllm.platform.device_type = "cpu"
    assert create().attention_config.backend is fake_vllm.registry["CPU_ATTN"]
    assert fake_vllm.registry["CPU_ATTN"].path == "openmoba.vllm.cpu.Backend"


def test_it_never_gets_another(fake_vllm: Any) -> None:
    register()
    create = fake_vllm.arguments().create_engine_config
    other = FakeBackend("vllm.flash.Backend")
    for asked in ({"attention__backend": other}, {"attention__backend_per_kind": {"full_attention": other}}):
        with pytest.raises(ValueError, match="other attention backends do not compute; start with CUSTOM"):
            create(**asked)
        create(moba=None, **asked)
    fake_vllm.registry["CUSTOM"].path = "theirs.Backend"
    with pytest.raises(ValueError, match=r"theirs\.Backend in the place of MoBA's.*VLLM_PLUGINS=openmoba"):
        create()
    fake_vllm.platform.is_cuda = lambda: False
    with pytest.raises(ValueError, match="on CPUs and NVIDIA GPUs, got an accelerator"):
        create()


def test_other_releases_are_left_alone_but_for_models_with_settings(fake_vllm: Any) -> None:
    fake_vllm.version.__version__ = "0.40.0"
    register()
    assert not any(backend.is_overridden() for backend in fake_vllm.registry.values())
    create = fake_vllm.arguments().create_engine_config
    create(moba=None)
    with pytest.raises(ValueError, match=r"this is 0\.40\.0"):
        create()
