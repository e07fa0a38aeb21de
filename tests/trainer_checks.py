"""Trainer on sequences split over two processes, others beside them, against one: see `test_context_parallel.py`."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from accelerate import ParallelismConfig
from as_gpus import as_gpus
from decoders import QUIETLY, SIZES, VOCAB, stacked
from ranks import made_alone, run_checks
from torch import distributed
from torch.utils.data import Dataset, IterableDataset
from transformers import (
    DataCollatorWithFlattening,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from openmoba import MobaConfig
from openmoba.hf import configure
from openmoba.hf.context_parallel import ContextParallel
from openmoba.hf.releases import CHECKPOINTING
from openmoba.hf.shards import shard_inputs
from openmoba.parallel import Sharding, sharded

HYBRID = MobaConfig(block_size=4, top_k=2, full_layers=1)
OPTIONS = ("context_parallel", "made", "compute_metrics", "go_on")  # of a trainer, not of its arguments
LENGTH = 39  # which the processes do not divide


class Split(ContextParallel, Trainer):
    """What a user writes."""


def model(settings: MobaConfig = HYBRID, heads: int = 4, kv_heads: int = 2, *, steep: bool = False) -> Any:
    """A small decoder; a steep one has key convolutions that change its output by far."""
    torch.manual_seed(0)
    sizes = SIZES | {"num_hidden_layers": 2, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    made = configure(LlamaForCausalLM(LlamaConfig(**sizes)), settings)
    for layer in made.model.layers if steep else ():
        torch.nn.init.normal_(layer.self_attn.key_conv.weight)
    return made


def without_shared_keys() -> Any:
    """A GPT-NeoX, whose configuration has no number of key/value heads."""
    torch.manual_seed(0)
    sizes = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "pad_token_id")}
    return configure(GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, num_hidden_layers=2, num_attention_heads=4)), HYBRID)


def compiled() -> Any:
    """A model whose layers are compiled one by one, as the laboratory does it on GPUs."""
    made = model()
    for layer in made.model.layers:
        layer.compile(dynamic=False, backend="aot_eager")
    return made


def rows(count: int = 8, length: int = LENGTH) -> list[dict[str, Any]]:
    """Token ids, some without label."""
    ids = torch.randint(VOCAB, (count, length), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": x.tolist(), "labels": [-100] * 5 + x[5:].tolist()} for x in ids]


class Streamed(IterableDataset[dict[str, Any]]):
    """Rows that come one after another."""

    def __init__(self, count: int = 8) -> None:
        self.count = count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from rows()[: self.count]


class Turned(Dataset[dict[str, Any]]):
    """Rows that begin anywhere, by the random numbers of whoever reads them."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, Any]:
        ids = rows()[i]["input_ids"]
        by = int(torch.randint(LENGTH, ()))
        return {"input_ids": ids[by:] + ids[:by], "labels": ids[by:] + ids[:by]}


def steps(kind: Any, batch_size: int, collate: Any = stacked, data: Any = None, **settings: Any) -> list[Any]:
    """Loss and gradient norm of two steps, the loss of an evaluation whose last batch is not full, and the weights."""
    options = {name: settings.pop(name) for name in OPTIONS if name in settings}
    arguments = TrainingArguments(
        max_steps=2,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        ddp_find_unused_parameters=False,
        **{"output_dir": mkdtemp()} | QUIETLY | settings,
    )
    data = rows() if data is None else data
    evaluated = Streamed(3) if isinstance(data, Streamed) else (data if isinstance(data, list) else rows())[:3]
    made, go_on = options.pop("made", None) or model(), options.pop("go_on", None)
    trainer = kind(made, arguments, data_collator=collate, train_dataset=data, eval_dataset=evaluated, **options)
    trainer.train(resume_from_checkpoint=go_on)
    logged = [row[name] for row in trainer.state.log_history for name in ("loss", "grad_norm") if name in row]
    weight = next(x for name, x in made.named_parameters() if "k_proj" in name or "query_key_value" in name).detach()
    return [*logged, trainer.evaluate()["eval_loss"], getattr(weight, "full_tensor", lambda: weight)()]


def same(one: list[Any], many: list[Any]) -> None:
    assert len(one) == len(many) == 6
    for x, y in zip(one, many, strict=True):
        torch.testing.assert_close(torch.as_tensor(y), torch.as_tensor(x), rtol=2e-4, atol=2e-6)


def packed(length: int = 60) -> dict[str, Any]:
    """Rows of several sequences, by positions alone and by transformers' own collator."""
    ids = torch.randint(VOCAB, (8, length), generator=torch.Generator().manual_seed(2))
    positions = torch.cat([torch.arange(n) for n in (23, 5, 32)])
    data = [{"input_ids": x.tolist(), "labels": x.tolist(), "position_ids": positions.tolist()} for x in ids]
    return {"data": data}


def flattened() -> dict[str, Any]:
    ids = torch.randint(VOCAB, (8, 30), generator=torch.Generator().manual_seed(3))
    data = [{"input_ids": x[: 11 + 2 * i].tolist()} for i, x in enumerate(ids)]
    return {"data": data, "collate": DataCollatorWithFlattening(return_flash_attn_kwargs=True)}


def padded(left: bool) -> dict[str, Any]:
    """Rows of other lengths, padded on one side."""
    data = []
    for i, row in enumerate(rows()):
        real = LENGTH - 3 * i
        ends = (
            (lambda x, fill, n=real: [fill] * (LENGTH - n) + x[:n])
            if left
            else (lambda x, fill, n=real: x[:n] + [fill] * (LENGTH - n))
        )
        data.append(
            {
                "input_ids": ends(row["input_ids"], 0),
                "labels": ends(row["labels"], -100),
                "attention_mask": ends([1] * LENGTH, 0),
            }
        )
    return {"data": data}


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "hybrid": dict,
    "by keys": lambda: {"made": model(heads=4, kv_heads=1)},
    "full": lambda: {"made": model(MobaConfig(4, 2, full_layers="all"))},
    "checkpointed": lambda: {CHECKPOINTING: True},
    "compiled": lambda: {"made": compiled()},
    "key convolution": lambda: {"made": model(replace(HYBRID, key_conv=3), steep=True)},
    "key convolution, packed, by keys": lambda: (
        packed() | {"made": model(replace(HYBRID, key_conv=3), 4, 1, steep=True)}
    ),
    "packed": packed,
    "flattened": flattened,
    "padded on the left": lambda: padded(True),
    "padded on the right": lambda: padded(False),
    "no shared keys": lambda: {"made": without_shared_keys()},
    "streamed": lambda: {"data": Streamed()},
    "random rows, read by workers": lambda: {"data": Turned(), "dataloader_num_workers": 2},
}


def alone(name: str) -> list[Any]:
    return steps(Trainer, 2, **CASES[name]())


def split(name: str) -> None:
    """Share every sequence between two processes; of four, two share one and two another."""
    others = distributed.get_world_size() // 2
    same(made_alone(name), steps(Split, 2 // others, context_parallel=2, **CASES[name]()))


def split_by_accelerate(name: str) -> None:
    """As on GPUs: accelerate's own mesh, and FSDP2 over all processes."""
    others = distributed.get_world_size() // 2
    with as_gpus():
        mesh = ParallelismConfig(cp_size=2, dp_shard_size=others)
        same(made_alone(name), steps(Split, 2 // others, fsdp=True, parallelism_config=mesh, **CASES[name]()))


def begun() -> Path:
    return Path(sys.argv[1]) / "begun"


def begin() -> list[Any]:
    """Train with a checkpoint after the first step."""
    return steps(Trainer, 2, output_dir=str(begun()), save_strategy="steps", save_steps=1)


def go_on() -> None:
    """Two processes go on from the checkpoint of one, and end where it did."""
    same(made_alone("begin"), steps(Split, 2, context_parallel=2, go_on=str(begun() / "checkpoint-1")))


def go_on_sharded() -> None:
    """Two processes share sequences from the checkpoint on that they left with sequences of their own, under FSDP2."""
    root = Path(sys.argv[1]) / "sharded"
    with as_gpus():
        apart, together = ParallelismConfig(dp_shard_size=2), ParallelismConfig(cp_size=2)
        saved = {"output_dir": str(root), "save_strategy": "steps", "save_steps": 1}
        steps(Split, 1, fsdp=True, parallelism_config=apart, **saved)
        found = steps(Split, 2, fsdp=True, parallelism_config=together, go_on=str(root / "checkpoint-1"))
    same(made_alone("begin"), found)


def own_loop() -> None:
    """The function that docs/parallel.md shows, with labels that one of the processes has most of, and padding."""
    shown = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "docs" / "parallel.md").read_text(), re.S)
    (source,) = (text for text in shown if "def both_passes" in text)
    names: dict[str, Any] = {"distributed": distributed}
    exec(source, names)
    one, many = model(), model()
    batch = {name: x.clone() for name, x in stacked(padded(False)["data"][:2]).items()}
    batch["labels"][:, :25] = -100
    loss = one(**batch).loss
    loss.backward()
    torch.testing.assert_close(names["both_passes"](many, batch), loss.detach(), rtol=1e-5, atol=0)
    for x, y in zip(one.parameters(), many.parameters(), strict=True):
        torch.testing.assert_close(y.grad, x.grad, rtol=1e-4, atol=1e-6)


def random_rows() -> None:
    """Processes of another sequence draw other numbers than one process does, but neighbours the same."""
    steps(Split, 1, context_parallel=2, **CASES["random rows, read by workers"]())


def loss_in_16_bits() -> None:
    """FSDP2's own policy would return 5.6 for 5.61."""
    with as_gpus():
        found = steps(Split, 2, fsdp=True, parallelism_config=ParallelismConfig(cp_size=2), bf16=True)
    torch.testing.assert_close(found[0], made_alone("hybrid")[0], rtol=2e-4, atol=0)


def refusals() -> None:
    """One sentence with the way out, before anything is trained."""
    refuses("do not divide the 2 that there are; start a multiple of 3", context_parallel=3)
    for number in (0, -1, 2.0, "2", True):
        refuses(f"context_parallel must be a whole number >= 1, got {number!r}", context_parallel=number)
    refuses("attn_implementation='sdpa' does not know", made=configure(model(), None))
    refuses("compute_metrics needs logits", compute_metrics=print)
    refuses("leave compute_loss_func and label", label_smoothing_factor=0.1)
    refuses("leave average_tokens_across_devices=True", average_tokens_across_devices=False)
    for add, said in (
        ({"attention_mask": [1] * 20 + [0] * 3 + [1] * 16}, "padding between the tokens of a sequence cannot be split"),
        ({"attention_mask": [[1] * LENGTH] * LENGTH}, "cannot be split over processes; give a padding mask of shape"),
        ({"token_type_ids": [0] * LENGTH}, "the input token_type_ids cannot be split"),
    ):
        refuses(said, data=[row | add for row in rows()], remove_unused_columns=False)
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    for inputs, said in (
        ({"inputs_embeds": torch.zeros(2, 8, 32)}, "a batch is split by its input_ids .*, got None; give token ids"),
        ({"input_ids": tokens[0]}, r"got torch.Size\(\[8\]\)"),
        ({"input_ids": tokens[:, :0]}, r"got torch.Size\(\[2, 0\]\)"),
        ({"input_ids": tokens, "position_ids": tokens[:, :5]}, r"position_ids of shape \(2, 5\) do not fit input_ids"),
        ({"input_ids": tokens, "labels": tokens[:, :5]}, r"labels of shape \(2, 5\) do not fit"),
    ):
        with pytest.raises(ValueError, match=said):
            shard_inputs(inputs, None, model().config)
    routed = model()
    routed.config.output_router_logits = True
    refuses("set model.config.output_router_logits=False", made=routed)
    refuses("neftune_noise_alpha=5.0 scales noise", neftune_noise_alpha=5.0)
    refuses("dispatch_batches=True deals out other", accelerator_config={"dispatch_batches": True})
    rotating = model()
    rotating.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    refuses("rope_type='dynamic' rotates by the highest position", made=rotating)
    # Models under a sharding that somebody else has put in force.
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    with sharded(Sharding.over(None, 8)):
        for inputs in ({}, {"position_ids": tokens, "attention_mask": tokens}):
            with pytest.raises(ValueError, match="takes position_ids of the whole, and neither mask nor cache"):
                model()(tokens, **inputs)


def other_batches() -> None:
    """What differs between processes is said in all of them, whatever it is, and nobody waits for another."""
    rank, tokens = distributed.get_rank(), torch.arange(16).view(2, 8)
    same = {"input_ids": tokens, "labels": tokens}
    for changed, said in (
        ({"input_ids": tokens.roll(rank)}, "input_ids"),
        ({"input_ids": tokens[:, rank:], "labels": tokens[:, rank:]}, "input_ids, labels"),
        ({name: x.view(2 - rank, -1) for name, x in same.items()}, "input_ids, labels"),
        ({"labels": tokens.masked_fill(tokens < rank, -100)}, "labels"),
        ({"position_ids": tokens % (8 - rank)}, "position_ids"),
        ({"attention_mask": tokens > 15 * rank}, "attention_mask"),
    ):
        with pytest.raises(ValueError, match=rf"were given different batches \({said}\); give them the same"):
            shard_inputs(same | changed, None, model().config)
    for given in (rows(8 - 2 * rank), Streamed() if rank else rows()):
        refuses(rf"data of different lengths, this one of {'(3|none)' if rank else '4'}", data=given)
    arguments = TrainingArguments(output_dir=mkdtemp(), per_device_eval_batch_size=2, **QUIETLY)
    with pytest.raises(ValueError, match=f"data of different lengths, this one of {2 - rank} batches"):
        Split(model(), arguments, context_parallel=2).get_eval_dataloader(rows(4 - 2 * rank))
    torch.manual_seed(rank)
    refuses(r"different batches \(input_ids, labels\)", data=Turned(), seed=rank)


def refuses(text: str, **settings: Any) -> None:
    with pytest.raises(ValueError, match=text):
        steps(Split, 2, **{"context_parallel": 2} | settings)


ACCELERATED = ("hybrid", "checkpointed", "streamed", "key convolution, packed, by keys")


def all_checks(ranks: int) -> dict[str, Callable[[], Any]]:
    names = list(CASES) if ranks == 2 else ["hybrid", "packed", "streamed"]
    checks: dict[str, Callable[[], Any]] = {name: partial(split, name) for name in names}
    checks |= {f"{name}, FSDP2": partial(split_by_accelerate, name) for name in ACCELERATED if name in names}
    if ranks == 2:
        return checks | {
            "go on": go_on,
            "go on, FSDP2": go_on_sharded,
            "own loop": own_loop,
            "loss in 16 bits, FSDP2": loss_in_16_bits,
            "refusals": refusals,
            "other batches": other_batches,
        }
    return checks | {"random rows": random_rows}


if __name__ == "__main__":
    run_checks(all_checks(int(sys.argv[2])), {name: partial(alone, name) for name in CASES} | {"begin": begin})
