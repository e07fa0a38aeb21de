"""The chosen configurations, cross-compiled for Hopper: matrix instructions, shared memory, no spills in bf16."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

TUNED = ["64,128,8", "64,512,3", "128,128,8", "128,512,3", "256,128,8"]  # head width, block size, top_k
CONFIGURATIONS = [*TUNED, "96,16,8"]
HOPPER_CONFIGURATIONS = ["64,128,8:hopper", "64,512,3:hopper", "128,128,8:hopper", "128,512,3:hopper"]
# With blocks that the caller gives; the last one is not for Hopper's own kernels.
GIVEN_CONFIGURATIONS = ["64,128,8:given", "128,128,8:given", "128,512,3:given", "96,16,8:given"]
WIDEST_FLOAT32 = "256,80,8:float32"  # launches every kernel
DECODE_CONFIGURATIONS = ["64,128,8,1", "128,128,8,1", "128,512,3,16", "256,128,8,16", "80,16,1,2"]
PAGED_CONFIGURATIONS = [  # with queries and page size
    *("128,128,8,4,128", "128,128,8,4,16", "64,512,3,4,64", "80,16,1,4,32", "16,5,40,4,1"),
    *("128,128,8,4096,128", "128,512,3,4096,512", "128,128,8,4096,16"),
]
SHARED_MEMORY = 227 * 1024  # of one thread block
ALL_SHARED_MEMORY, RESERVED_SHARED_MEMORY = 228 * 1024, 1024  # of a multiprocessor, of which some for every block
REGISTERS = 2**16
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
# The gate is held to 128 registers, so that two programs share a multiprocessor. The others have all 255 of a thread,
# and yet a few values are over since Triton 3.8, more at width 256 since 3.9.
GATE_SPILLS = 8 if VERSION < (3, 9) else 14
SPILLS = 0 if VERSION < (3, 8) else 8 if VERSION < (3, 9) else 16
WIDEST_SPILLS = SPILLS if VERSION < (3, 9) else 150
# Values that wait while the accumulators have the registers; one more where blocks are given, since 3.9.
HOPPER_SPILLS = 24 if VERSION < (3, 9) else 25
# Of these, what the loop over tiles reads. One read between two matrix products holds up all that come behind it.
# `attend_past_streaming` needs most addresses; what it reads is for a tile of rows, not for every piece of a block.
LOOP_SPILLS = 0 if VERSION < (3, 9) else 1
STREAMING_LOOP_SPILLS = 1 if VERSION < (3, 8) else 4 if VERSION < (3, 9) else 9
PAGED_SPILLS = 32  # before and after the loop over keys
# Programs that share a multiprocessor, their threads, and matrix instructions at least.
HOPPER_KERNELS = {
    "attend_past_resident": (2, 128, 16),
    "attend_past_streaming": (2, 128, 12),
    "attend_own": (3, 128, 8),
    "own_query_gradients": (3, 128, 10),
    "key_gradients": (1, 256, 16),
    "own_key_gradients": (1, 256, 16),
}


@pytest.fixture(scope="module")
def reports() -> dict[str, list[dict[str, Any]]]:
    """`sm90.report` of every configuration."""
    arguments = [
        *CONFIGURATIONS,
        *HOPPER_CONFIGURATIONS,
        *GIVEN_CONFIGURATIONS,
        WIDEST_FLOAT32,
        *DECODE_CONFIGURATIONS,
        *PAGED_CONFIGURATIONS,
        "plan",
        "raw_keys",
        "launches",
        "names",
    ]
    return dict(zip(arguments, compiled(arguments), strict=True))


def compiled(arguments: list[str]) -> list[Any]:
    """What `sm90.py` prints of each argument."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    runner = Path(__file__).parent / "sm90.py"
    done = subprocess.run(
        [sys.executable, runner, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_kernels_fit_and_multiply_matrices(reports, configuration):
    kernels = reports[configuration]
    names = {kernel["kernel"] for kernel in kernels}
    assert {"_gate", "attend_past", "attend_own", "key_gradients", "own_query_gradients"} <= names
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_MEMORY, kernel
        assert kernel["matrix"] > 0, kernel


@pytest.mark.parametrize("configuration", [*CONFIGURATIONS, *HOPPER_CONFIGURATIONS, *GIVEN_CONFIGURATIONS])
def test_no_maximum_of_three_integers(reports, configuration):
    """The assembler of CUDA 12.8 loses the sign of a negated one; ranking compares sort keys, none of them negated."""
    kernels = [kernel for kernel in reports[configuration] if kernel["kernel"] not in ("_gate", "_second_look")]
    assert [kernel for kernel in kernels if kernel["three_way"]] == []


def test_portable_kernels_of_given_blocks(reports):
    kernels = {kernel["kernel"]: kernel for kernel in reports[GIVEN_CONFIGURATIONS[-1]]}
    assert "_gate" not in kernels
    for name in ("attend_own", "own_query_gradients"):
        assert kernels[name]["matrix"] > 0
        assert kernels[name]["spills"] == 0
        assert kernels[name]["shared"] <= SHARED_MEMORY


def test_float32_fits_at_the_largest_width(reports):
    kernels = reports[WIDEST_FLOAT32]
    assert {"_second_look", "query_gradients"} <= {kernel["kernel"] for kernel in kernels}
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_MEMORY, kernel


def test_kernels_around_the_products_compile(reports):
    """The interpreter takes what the compiler refuses, such as a variable that changes its type in a loop."""
    assert len(reports["plan"]) == 9
    assert not any(kernel["matrix"] for kernel in reports["plan"])


def test_key_convolution_over_a_block_table_stays_in_registers(reports):
    kernels = reports["raw_keys"]
    assert [kernel["kernel"] for kernel in kernels] == ["_read_before", "_keep", "_convolve"] * 2
    assert not any(kernel["spills"] for kernel in kernels)


def test_only_given_blocks_are_asserted_about(reports):
    """The compiler keeps assertions where it is asked to; the others would slow down what they are in."""
    assert [kernel["kernel"] for kernel in reports["plan"] if kernel["calls"]] == ["_sort_given"]


def test_fixed_launches_say_what_triton_says(reports):
    """To the launcher, which is Triton's own affair, with every supported version (`make test-triton`)."""
    launches = reports["launches"]
    kernels = {launch["kernel"] for launch in launches}
    assert {"_gate", "_sort_given", "attend_past_resident", "key_gradients", "own_query_gradients"} <= kernels
    for launch in launches:
        assert launch["fixed"] == launch["triton"], launch["kernel"]


def test_profiles_tell_the_families_apart(reports):
    """A profile has the compiler's name of a kernel and nothing else, and the families' kernels are namesakes."""
    where = reports["names"]
    assert where["hopper_attend_own"] == "hopper.own_queries"
    assert where["portable_attend_own"] == "portable.forward"
    assert where["decode_attend"] == "decode_kernels"
    assert where["_gate"] == "gate"
    for configuration in (CONFIGURATIONS[-1], HOPPER_CONFIGURATIONS[0], HOPPER_CONFIGURATIONS[1]):
        for kernel in reports[configuration]:
            (name,) = kernel["compiled"]
            assert name in where, kernel
            assert name.removeprefix("hopper_").removeprefix("portable_") == kernel["kernel"]
            own = configuration.endswith(":hopper") and kernel["kernel"] not in ("_gate", "_second_look")
            assert where[name].startswith("hopper.") == own, kernel


def test_portable_kernels_are_compiled_and_launched_on_amd():
    """With no option and no product that only NVIDIA's compiler has; Hopper's own kernels stay away."""
    (kernels,) = compiled(["amd"])
    steps = {f"portable_{step}" for step in ("attend_past", "attend_own", "key_gradients", "own_query_gradients")}
    assert {"_pool", "_gate", *steps} <= set(kernels)


@pytest.mark.parametrize("configuration", TUNED)
def test_warp_group_instructions_and_no_spills(reports, configuration):
    for kernel in reports[configuration]:
        assert kernel["hgmma"] > 0, kernel
        most = WIDEST_SPILLS if configuration.startswith("256,") else SPILLS
        assert kernel["spills"] <= (GATE_SPILLS if kernel["kernel"] == "_gate" else most), kernel


@pytest.mark.parametrize("configuration", [*HOPPER_CONFIGURATIONS, *GIVEN_CONFIGURATIONS[:-1]])
def test_hoppers_own_kernels(reports, configuration):
    """Their products stay in flight: a kernel that the assembler serialises waits after every instruction."""
    kernels = {kernel["kernel"]: kernel for kernel in reports[configuration]}
    past = "attend_past_resident" if ",128," in configuration else "attend_past_streaming"
    for name in (past, "attend_own", "own_query_gradients", "key_gradients", "own_key_gradients"):
        kernel, (programs, threads, products) = kernels[name], HOPPER_KERNELS[name]
        assert programs * (kernel["shared"] + RESERVED_SHARED_MEMORY) <= ALL_SHARED_MEMORY, kernel
        assert programs * threads * kernel["registers"] <= REGISTERS, kernel
        assert kernel["spills"] <= HOPPER_SPILLS, kernel
        most = STREAMING_LOOP_SPILLS if name == "attend_past_streaming" else LOOP_SPILLS
        assert kernel["loop_spills"] <= most, kernel
        assert kernel["hgmma"] >= products, kernel
        assert kernel["waits"] <= 4, kernel


@pytest.mark.parametrize("configuration", DECODE_CONFIGURATIONS)
def test_machine_code_of_decoding(reports, configuration):
    kernels = {kernel["kernel"]: kernel for kernel in reports[configuration]}
    top_k = int(configuration.split(",")[2])
    assert set(kernels) == {"_complete", "attend"} | ({"score"} if top_k > 1 else set())
    assert all(kernel["spills"] == 0 for kernel in kernels.values())
    assert kernels["attend"]["registers"] <= 128  # four programs share a multiprocessor
    if top_k > 1:
        assert kernels["score"]["hgmma"] > 0
        assert kernels["score"]["shared"] <= SHARED_MEMORY


@pytest.mark.parametrize("configuration", PAGED_CONFIGURATIONS)
def test_machine_code_over_a_block_table(reports, configuration):
    """Hopper's own kernels serve blocks that lie in one page; as many programs as ever share a multiprocessor."""
    kernels = {kernel["kernel"]: kernel for kernel in reports[configuration]}
    _, block_size, top_k, queries, page_size = map(int, configuration.split(","))
    if queries == 4:
        assert set(kernels) == {"_complete_blocks", "attend"} | ({"score"} if top_k > 1 else set())
        assert kernels["attend"]["registers"] <= 128
        assert kernels["attend"]["loop_spills"] <= 2  # of Triton 3.7 and 3.8, with pages of 16
        assert top_k == 1 or kernels["score"]["hgmma"] > 0
    elif page_size >= block_size:
        past = "attend_past_resident" if block_size == 128 else "attend_past_streaming"
        assert set(kernels) == {"_complete_blocks", "_gather", past, "attend_own"}
        for name in (past, "attend_own"):
            kernel, (programs, threads, products) = kernels[name], HOPPER_KERNELS[name]
            assert programs * (kernel["shared"] + RESERVED_SHARED_MEMORY) <= ALL_SHARED_MEMORY, kernel
            assert programs * threads * kernel["registers"] <= REGISTERS, kernel
            assert kernel["hgmma"] >= products, kernel
            assert kernel["waits"] <= 4, kernel
    else:
        assert set(kernels) == {"_complete_blocks", "_gather", "attend_past", "attend_own"}
        assert all(kernels[name]["hgmma"] > 0 for name in ("attend_past", "attend_own"))
    for kernel in kernels.values():
        assert kernel["shared"] <= SHARED_MEMORY, kernel
        assert kernel["spills"] <= PAGED_SPILLS, kernel
        assert (kernel["calls"] > 0) == (kernel["kernel"] == "_complete_blocks"), "upkeep alone asserts"
