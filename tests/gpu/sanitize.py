"""Forward and backward, and calls over block tables, on tiny shapes that reach every kernel but that of ranges.

To run under compute-sanitizer:

    PYTHONPATH=src:tests PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/gpu/sanitize.py
    PYTHONPATH=src:tests compute-sanitizer --tool racecheck python tests/gpu/sanitize.py

Words behind it select the cases whose names hold one of them. Without torch's memory cache every tensor is an
allocation of its own, whose bounds memcheck knows.
"""

from __future__ import annotations

import sys

import torch
from attending import Case, batched, packed, run
from given import at_random
from given import run as run_given
from paging import Server

from openmoba import moba_paged
from openmoba.ops.triton import paged, plan
from openmoba.ops.triton.host import replay

CASES = {
    "resident keys": batched(torch.bfloat16, (2, 150, 200, 4, 2, 64), 32, 3, "cuda"),
    "streamed keys": batched(torch.bfloat16, (1, 300, 1400, 2, 1, 64), 600, 2, "cuda"),
    "key tiles": batched(torch.float16, (1, 333, 700, 3, 1, 128), 300, 2, "cuda"),
    "wide heads": batched(torch.bfloat16, (1, 130, 130, 2, 1, 256), 30, 3, "cuda"),
    "packed": packed(torch.float16, [90, 1, 0, 60], [90, 1, 20, 77], (3, 1, 80), 16, 3, "cuda"),
    "Hopper, resident keys": batched(torch.bfloat16, (1, 300, 310, 4, 2, 64), 128, 2, "cuda"),
    "Hopper, streamed keys": batched(torch.float16, (1, 530, 600, 2, 1, 128), 256, 2, "cuda"),
    "own block": batched(torch.bfloat16, (1, 70, 90, 2, 1, 64), 50, 1, "cuda"),
    "many picks": batched(torch.bfloat16, (1, 40, 600, 2, 1, 64), 4, 30, "cuda"),
    "second look": batched(torch.bfloat16, (1, 300, 3000, 2, 1, 64), 8, 9, "cuda"),
    "given": at_random(packed(torch.float16, [90, 1, 0, 60], [90, 1, 20, 77], (3, 1, 80), 16, 0, "cuda"), 5, 3),
    "Hopper, given": at_random(batched(torch.bfloat16, (1, 300, 510, 4, 2, 64), 128, 0, "cuda"), 5, 2),
    "Hopper, given, wide": at_random(batched(torch.float16, (1, 530, 900, 2, 1, 128), 256, 0, "cuda"), 3, 1),
}
PAGED = {
    "pages, alike": (128, 128),
    "pages, smaller": (16, 128),
    "pages, larger": (512, 256),
    "pages of a token": (1, 5),
}
"""Page and block size."""


def run_paged(page_size: int, block_size: int) -> list[torch.Tensor]:
    """Write centroids, decode and prefill: a chunk, single tokens, none, and queries of no sequence behind them."""
    server = Server(page_size, block_size, torch.bfloat16, 2048 // page_size, 4, 2, 64, "cuda")
    server.complete(server.call({server.begin(): 700, server.begin(): 130, server.begin(): 0}))
    results = []
    for few in (True, False):
        paged.are_few = lambda *_, few=few: few
        call = server.call({0: 20, 1: 1, 2: 0})
        server.complete(call)
        call["q"] = torch.cat([call["q"], call["q"][:3]])
        results.append(moba_paged(**call, top_k=3))
    return results


def main(words: list[str]) -> None:
    for way, most_looks in (("placed", 2**40), ("replayed", 2**40), ("sorted", 0)):
        plan._MOST_LOOKS = most_looks
        if way != "replayed":
            replay.forget()
        for name, case in CASES.items():
            if words and not any(word in name for word in words):
                continue
            results = run(case) if isinstance(case, Case) else run_given(case)
            torch.cuda.synchronize()
            assert all(torch.isfinite(x).all() for x in results), name
            print(f"{name}, {way}: done", flush=True)
    for name, sizes in PAGED.items():
        if not words or any(word in name for word in words):
            results = run_paged(*sizes)
            torch.cuda.synchronize()
            assert all(torch.isfinite(x).all() for x in results), name
            print(f"{name}: done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
