"""Measuring cases on all devices at once: every one makes the same calls, and the slowest counts."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, distributed

import openmoba
from openmoba import parallel
from openmoba.bench.machine import Machine, failure, now, say
from openmoba.bench.parallel.cases import ParallelCase, ParallelRow, compared
from openmoba.bench.rows import append_row, read_rows
from openmoba.bench.timing import MB, Work, measure, quantiles
from openmoba.parallel import Sharding
from openmoba.parallel.collectives import Exchange, gather
from openmoba.parallel.cost import key_copies

STEPS = 2
"""After the one that the layers are compiled with."""
PATIENCE = timedelta(minutes=3)  # for a device that compiles while the others wait


def run_parallel_benchmark(cases: Sequence[ParallelCase], out: Path, machine: Machine) -> list[ParallelRow]:
    """Measure on all devices what `out` does not hold yet; the first process appends it there.

    Returns:
        The rows of these cases, also those that were there.

    Raises:
        Exception: of the first case that fails, after its row: devices are out of step then. The same command goes on
            behind it.
    """
    ranks, rank = distributed.get_world_size(), distributed.get_rank()
    done = {row.key: row for row in read_rows(out, ParallelRow)}
    slowest([0.0], machine.device)  # all have read it before the first process adds to it
    wanted = []
    asked = dict.fromkeys(case.on(ranks) for case in cases if ranks > 1 or case.kind != "transfer")
    for number, case in enumerate(asked, 1):
        start = time.monotonic()
        row = ParallelRow.of(case, ranks, **machine.machine)
        if row.key not in done:
            row = replace(row, time=now())
            try:
                row = compared(measure_case(case, row, machine.device), done.values())
            except Exception as error:
                _append_failure(out, replace(row, error=failure(error)), rank)
                raise
            if rank == 0:
                append_row(out, row)
                took = time.monotonic() - start
                say(f"{number} of {len(asked)}, {took:.0f} s: {case.words} on {ranks}: {row.p50_ms:.3f} ms")
            done[row.key] = row
            machine.tidy()
        wanted.append(done[row.key])
    return wanted


def _append_failure(out: Path, row: ParallelRow, rank: int) -> None:
    """Write a failure down, once: it may be that of one process, for which the others wait, or of all."""
    time.sleep(min(rank, 1))
    if rank == 0 or row.key not in {other.key for other in read_rows(out, ParallelRow)}:
        append_row(out, row)


def leave_at_once() -> NoReturn:
    """Say what failed and end the process: in an orderly end it might wait for transfers that nobody takes part in.

    torchrun ends the others then.
    """
    traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)


def measure_case(case: ParallelCase, row: ParallelRow, device: torch.device) -> ParallelRow:
    """Fill in the row of a case; every device calls this."""
    if case.kind == "step":
        return _step(case, row, device)
    work, sent = (_attention if case.kind == "attention" else _transfer)(case, row.ranks, device)
    found = measure(work, device, agree=lambda times: slowest(times, device))
    row = replace(row, p20_ms=found.p20_ms, p50_ms=found.p50_ms, p80_ms=found.p80_ms, samples=found.samples)
    if device.type == "cuda":
        row = replace(row, peak_mb=slowest([peak_mb(work, device)], device)[0])
    return row if sent is None else replace(row, gb_per_second=sent / found.p50_ms / 1e6)


def peak_mb(work: Work, device: torch.device) -> float:
    """Return the most memory that tensors take on a GPU during a call; timing counts each pass for itself."""
    torch.cuda.reset_peak_memory_stats(device)
    work.run()
    return torch.cuda.max_memory_allocated(device) / MB


def slowest(values: list[float], device: torch.device) -> list[float]:
    """Return the largest of each value over all devices."""
    largest = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    found: list[float] = largest.tolist()
    return found


def _attention(case: ParallelCase, ranks: int, device: torch.device) -> tuple[Work, None]:
    """Return the call: over all devices, or of one the whole."""
    backward = case.passes == "forward+backward"
    sharding = Sharding.over(None, case.tokens, way="heads" if ranks == 1 else case.way, layout=case.layout)
    size, top_k = case.block_size, case.top_k
    q, k, v, d_out = (
        _normal(sharding.local_tokens, heads, case, device, seed)
        for seed, heads in enumerate((case.heads, case.kv_heads, case.kv_heads, case.heads))
    )
    for x in (q, k, v):
        x.requires_grad_(backward)

    def forward() -> Tensor:
        if ranks == 1:
            return openmoba.moba_attention(q, k, v, block_size=size, top_k=top_k)
        return parallel.moba_attention(q, k, v, sharding, block_size=size, top_k=top_k)

    return Work(forward, (q, k, v), d_out if backward else None), None


def _transfer(case: ParallelCase, ranks: int, device: torch.device) -> tuple[Work, float]:
    """Return one transfer of attention's forward pass, all heads in one turn, and the bytes that a device sends."""
    group = Sharding.over(None, case.tokens).group
    shard = case.tokens // ranks
    if case.way == "keys":
        x = _normal(shard, 2 * case.kv_heads, case, device, 0)[0]
        return Work(lambda: gather(x, group)()), x.nbytes * (ranks - 1)
    kv_heads = case.kv_heads * key_copies(case.kv_heads, ranks)
    tensors = [
        _normal(ranks * shard, heads // ranks, case, device, seed).view(ranks, shard, -1, case.head_dim)
        for seed, heads in enumerate((case.heads, kv_heads, kv_heads))
    ]
    exchange = Exchange(group)

    def send() -> Tensor:
        exchange.start(*tensors)
        return exchange.wait()[0]

    return Work(send), sum(x.nbytes for x in tensors) * (ranks - 1) / ranks


def _normal(tokens: int, heads: int, case: ParallelCase, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(8 * distributed.get_rank() + seed)
    shape = (1, tokens, heads, case.head_dim)
    return torch.randn(shape, generator=generator, device=device, dtype=getattr(torch, case.dtype))


def _step(case: ParallelCase, row: ParallelRow, device: torch.device) -> ParallelRow:
    """Time steps of `openmoba train`, and see in a profile of one how long nothing but transfers ran."""
    from openmoba.bench.parallel.steps import shared_loop
    from openmoba.bench.training.profiles import read_profile
    from openmoba.bench.training.watch import Watch

    # A number of steps, not a time: every device has to make as many.
    watch = Watch(device, warmup=0, seconds=0.0, fewest=STEPS, most=STEPS)
    watch.run(shared_loop(case, row.ranks, device))
    times = slowest(watch.times_ms, device)
    p20, p50, p80 = quantiles(times)
    row = replace(row, p20_ms=p20, p50_ms=p50, p80_ms=p80, samples=STEPS, tokens_per_second=1000 * case.tokens / p50)
    computing_ms = read_profile(watch.profile).computing_ms
    if computing_ms is None or watch.peak_mb is None:
        return row
    waiting, peak_mb = slowest([max(0.0, 1 - computing_ms / p50), watch.peak_mb], device)
    return replace(row, waiting=waiting, peak_mb=peak_mb)
