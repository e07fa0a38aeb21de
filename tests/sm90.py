"""Cross-compile the kernels that a call launches for Hopper, without a GPU, and read their machine code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from openmoba.ops.arguments import Blocking, KeyCache, KeyPages

HOPPER = GPUTarget("cuda", 90, 32)
_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl", "debug", "sanitize_overflow")


@dataclass(frozen=True)
class Launch:
    """One recorded kernel launch."""

    kernel: JITFunction
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class MachineCode:
    """What the compiler made of a launch: SASS and resource use."""

    name: str
    sass: str
    shared: int
    registers: int

    def count(self, opcode: str) -> int:
        """Instructions whose name starts with `opcode`."""
        return len(re.findall(rf"\s{opcode}[.\s]", self.sass))

    @property
    def spills(self) -> int:
        """Loads and stores of local memory."""
        return self.count("STL") + self.count("LDL")

    @property
    def loop_spills(self) -> int:
        """Those within the longest loop: the one over tiles, in kernels that have their products in flight."""
        loops: list[tuple[int, int]] = [(0, 0)]
        for address, target in re.findall(r"/\*(\w{4,})\*/[^;/]*\bBRA\b[^;/]*?\b0x(\w+)", self.sass):
            loops.append((int(target, 16), int(address, 16)))
        begin, end = max(loops, key=lambda loop: loop[1] - loop[0])
        places = re.findall(r"/\*(\w{4,})\*/\s+(?:@!?P\d+ )?(?:STL|LDL)\b", self.sass)
        return sum(begin <= int(place, 16) <= end for place in places)


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Collect launches instead of running them; outputs of kernels stay undefined."""
    launches: list[Launch] = []

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(kernel, args, kwargs))

    with patch.object(JITFunction, "run", record):
        yield launches


def launches_of(call: Callable[[], Any]) -> list[Launch]:
    """The launches that `call` makes."""
    with recorded_launches() as launches:
        call()
    return launches


def compile_launch(launch: Launch) -> MachineCode:
    """Compile for sm_90 with the specialisation that the launcher would choose, and disassemble."""
    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    options = {name: value for name, value in launch.kwargs.items() if name in _OPTIONS}
    values = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
    values |= {name: value for name, value in launch.kwargs.items() if name not in _OPTIONS}
    for index, parameter in enumerate(launch.kernel.params):
        value = values.get(parameter.name, parameter.default)
        signature[parameter.name] = _specialised(value, parameter.is_constexpr, (index,), constants, attributes)
    source_class = GluonASTSource if launch.kernel.is_gluon() else ASTSource
    source = source_class(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=HOPPER, options=options)
    sass = _disassemble(compiled.asm["cubin"])
    return MachineCode(launch.kernel.__name__, sass, compiled.metadata.shared, _registers(compiled.asm["cubin"]))


def _specialised(
    value: Any, is_constexpr: bool, path: tuple[int, ...], constants: dict[Any, Any], attributes: dict[Any, Any]
) -> Any:
    """The type of an argument, or those of a struct's members, beside what the compiler may know of its value."""
    if isinstance(value, tuple):
        members = [_specialised(x, is_constexpr, (*path, i), constants, attributes) for i, x in enumerate(value)]
        return type(value)(*members)
    kind = "constexpr" if is_constexpr or value is None else _kind(value)
    if kind == "constexpr" or (kind == "i32" and value == 1):
        constants[path] = value
        return "constexpr"
    if kind.startswith("*") or (kind == "i32" and value % 16 == 0):
        attributes[path] = [["tt.divisibility", 16]]
    return kind


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _cuobjdump(cubin: bytes, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def _disassemble(cubin: bytes) -> str:
    return _cuobjdump(cubin, "-sass")


def _registers(cubin: bytes) -> int:
    return int(re.findall(r"REG:(\d+)", _cuobjdump(cubin, "-res-usage"))[-1])


def report(
    width: int,
    block_size: int,
    top_k: int,
    dtype: torch.dtype = torch.bfloat16,
    hoppers_own: bool = False,
    given: bool = False,
) -> list[dict[str, Any]]:
    """What the kernels of one forward and backward with matrix products compile to, 32 / 8 heads.

    Args:
        hoppers_own: the kernels in `ops.triton.hopper` where they serve, as on a Hopper GPU.
        given: the caller chooses the blocks.
    """
    from openmoba.ops.triton import attention, hopper

    q, k = (torch.empty(1, 4096, heads, width, dtype=dtype) for heads in (32, 8))
    blocks = torch.empty(1, 4096, 32, top_k - 1, dtype=torch.int32) if given else None
    blocking = Blocking(None, None, block_size, top_k)

    def call() -> None:
        out, lse, choice = attention.forward(q, k, k, blocks, blocking, 1.0)
        attention.backward(out, None, q, k, k, out, lse, choice, blocking, 1.0)

    with patch.object(hopper, "is_available", lambda _: hoppers_own):
        launches = launches_of(call)
    without = ("_pool", "_row_statistics")
    return _codes([launch for launch in launches if "D" in launch.kwargs and launch.kernel.__name__ not in without])


def plan_report() -> list[dict[str, Any]]:
    """What the kernels around the products compile to: pooling, statistics, and lists made in both ways and cut.

    Lists of given blocks too, and statistics with the gradient of the log-sum-exp.
    """
    from openmoba.ops.triton import attention, plan

    q, k = (torch.empty(1, 4096, heads, 64, dtype=torch.float16) for heads in (8, 2))
    given, blocking = torch.empty(1, 4096, 2, 3, dtype=torch.int32), Blocking(None, None, 128, 4)

    def call(blocks: torch.Tensor | None) -> None:
        out, lse, choice = attention.forward(q, k, k, blocks, blocking, 1.0)
        d_lse = None if blocks is None else lse
        attention.backward(out, d_lse, q, k, k, out, lse, choice, blocking, 1.0)

    launches = []
    for most_looks in (2**40, 0):
        with (
            patch.object(plan, "_MOST_LOOKS", most_looks),
            patch.object(attention, "workspaces", lambda _: (2**22,) * 2),
        ):
            launches += launches_of(lambda: call(None))
    with_given = launches_of(lambda: call(given))
    names = ("_pool", "_count_pairs", "_place_pairs", "_write_plan", "_find_borders", "_order_items", "_row_statistics")
    first = {launch.kernel.__name__: launch for launch in reversed(launches)}
    added = [launch for launch in with_given if launch.kernel.__name__ in ("_sort_given", "_row_statistics")]
    return _codes([first[name] for name in names] + added)


def decode_report(
    width: int, block_size: int, top_k: int, queries: int, dtype: torch.dtype = torch.bfloat16
) -> list[dict[str, Any]]:
    """What the kernels of one decoding step over 4096 left-padded tokens compile to, 32 / 8 heads."""
    from openmoba.ops import centroids as stored
    from openmoba.ops.triton import decode, pages

    q = torch.empty(1, queries, 32, width, dtype=dtype)
    k = torch.empty(1, 8, 4096, width, dtype=dtype).transpose(1, 2)
    centroids = stored.new_centroids(k, 4096, block_size)
    lengths = torch.empty(1, dtype=torch.int32)
    cache = KeyCache(centroids, k, lengths, lengths, block_size)

    def call() -> None:
        pages.complete_pages(cache, queries)
        decode.decode(q, cache, k, top_k, 1.0)

    with patch.object(decode, "multiprocessors", lambda _: 132), patch.object(decode, "overlaps", lambda _: True):
        return _codes(launches_of(call))


def paged_report(
    width: int, block_size: int, top_k: int, queries: int, page_size: int, dtype: torch.dtype = torch.bfloat16
) -> list[dict[str, Any]]:
    """What the kernels of a call over a block table compile to, on a Hopper GPU: 4 sequences, 32 / 8 heads.

    Pages lie as vLLM has them: keys and values of a page side by side, head by head.
    """
    from openmoba.ops.paged import new_paged_centroids
    from openmoba.ops.triton import decode, hopper, paged

    pool = torch.empty(64, 8, page_size, 2 * width, dtype=dtype)
    k, v = (x.transpose(1, 2) for x in pool.split(width, 3))
    q, centroids = torch.empty(queries, 32, width, dtype=dtype), new_paged_centroids(k, block_size)
    table, lengths, cu = (torch.empty(shape, dtype=torch.int32) for shape in ((4, 16), 4, 5))
    cache = KeyPages(centroids, k, table, lengths, cu, block_size)

    def call() -> None:
        paged.complete_paged(cache)
        paged.attend_paged(q, cache, v, top_k, 1.0)

    with (
        patch.object(decode, "multiprocessors", lambda _: 132),
        patch.object(decode, "overlaps", lambda _: True),
        patch.object(hopper, "is_available", lambda _: True),
    ):
        launches = launches_of(call)
    around = ("_gate", "_second_look", "_count_pairs", "_place_pairs", "_write_plan", "_order_items")
    return _codes([launch for launch in launches if launch.kernel.__name__ not in around])


def raw_keys_report() -> list[dict[str, Any]]:
    """What the kernels of key convolution over a block table compile to: a batch that decodes, and one with prompts."""
    from openmoba.ops.raw_keys import new_raw_keys
    from openmoba.ops.triton import raw_keys

    weight = torch.empty(512, 4, dtype=torch.bfloat16)
    table, lengths, starts = (torch.empty(shape, dtype=torch.int32) for shape in ((4, 16), 4, 5))

    def call() -> None:
        for tokens in (4, 300):
            convolve(tokens)

    def convolve(tokens: int) -> None:
        keys = torch.empty(tokens, 3 * 512, dtype=torch.bfloat16).chunk(3, 1)[1]
        batch = table, lengths, starts, torch.empty(tokens, dtype=torch.int64)
        raw_keys.convolve_paged(keys, weight, new_raw_keys(64, weight, torch.bfloat16), *batch, 128)

    return _codes(launches_of(call))


def launcher_arguments() -> list[dict[str, Any]]:
    """What Triton's launcher hands a kernel, and what a fixed launch does: forward, backward, and over a block table.

    The driver is one that compiles for Hopper and runs nothing; hooks and what is prepared for them are left out. What
    a kernel was compiled for is not handed to it.
    """
    from openmoba.ops.paged import new_paged_centroids
    from openmoba.ops.triton import attention, hopper, paged
    from openmoba.ops.triton.host.launch import Launch

    given: list[list[Any]] = []

    def launcher(source: Any, _: Any) -> Callable[..., None]:
        kinds = list(_members(source.signature.values()))

        def note(*arguments: Any) -> None:
            taken = zip(kinds, _members(arguments[9:]), strict=True)
            given.append([*map(_plainly, arguments[:6]), *[_plainly(x) for kind, x in taken if kind != "constexpr"]])

        return note

    properties = {"max_shared_mem": 232448}
    utils = SimpleNamespace(
        get_device_properties=lambda _: properties, load_binary=lambda *_: (0, 1, 255, 0, 1024), launch=None
    )
    driver.set_active(
        SimpleNamespace(
            launcher_cls=launcher,
            utils=utils,
            get_current_device=lambda: 0,
            get_current_stream=lambda _: 0,
            get_current_target=lambda: HOPPER,
        )
    )
    launch, seen = Launch.__call__, []

    def launch_twice(self: Launch, *tensors: Any) -> None:
        given.clear()
        launch(self, *tensors)
        launch(self, *tensors)
        seen.append({"kernel": self._kernel.__name__, "triton": given[0], "fixed": given[1]})

    q, k = (torch.empty(1, 300, heads, 64, dtype=torch.bfloat16) for heads in (4, 2))
    blocking = Blocking(None, None, 128, 2)
    with patch.object(hopper, "is_available", lambda _: True), patch.object(Launch, "__call__", launch_twice):
        for blocks in (None, torch.empty(1, 300, 2, 1, dtype=torch.int32)):
            out, lse, choice = attention.forward(q, k, k, blocks, blocking, 1.0)
            d_lse = None if blocks is None else lse
            attention.backward(out, d_lse, q, k, k, out, lse, choice, blocking, 1.0)
        table, lengths, cu = (torch.empty(shape, dtype=torch.int32) for shape in ((1, 32), 1, 2))
        pages = torch.empty(4, 128, 2, 64, dtype=torch.bfloat16)
        cache = KeyPages(new_paged_centroids(pages, 128), pages, table, lengths, cu, 128)
        for tokens in (1, 300):
            paged.complete_paged(cache)
            paged.attend_paged(q[0, :tokens], cache, pages, 2, 1.0)
    return seen


def launched_on_amd() -> list[str]:
    """The kernels of a forward and backward that Triton compiles for an AMD GPU, with their options, and launches.

    Only in a process that has not imported the kernels yet.
    """
    with patch.object(torch.version, "hip", "6.4"):
        from openmoba.ops.triton import attention

        names: list[str] = []

        def load(name: str, *_: Any) -> tuple[int, ...]:
            names.append(name)
            return 0, 1, 255, 0, 1024

        utils = SimpleNamespace(get_device_properties=lambda _: {"max_shared_mem": 65536}, load_binary=load)
        driver.set_active(
            SimpleNamespace(
                launcher_cls=lambda *_: lambda *_: None,
                utils=utils,
                get_current_device=lambda: 0,
                get_current_stream=lambda _: 0,
                get_current_target=lambda: GPUTarget("hip", "gfx942", 64),
            )
        )
        q, k = (torch.empty(1, 300, heads, 64, dtype=torch.bfloat16) for heads in (4, 2))
        blocking = Blocking(None, None, 64, 3)
        out, lse, choice = attention.forward(q, k, k, None, blocking, 1.0)
        attention.backward(out, None, q, k, k, out, lse, choice, blocking, 1.0)
    return names


def names_in_profiles() -> dict[str, str]:
    """The kernels of all families by the names that the compiler gives them, with the modules that they are in."""
    from openmoba.bench.training.profiles import own_kernels
    from openmoba.ops.triton import attention, paged  # noqa: F401
    from openmoba.ops.triton.hopper import forward, keys, own_queries  # noqa: F401

    return own_kernels()


def _members(values: Iterable[Any]) -> Iterator[Any]:
    """Values, with the members of structs in the place of these."""
    for x in values:
        if isinstance(x, tuple):
            yield from _members(x)
        else:
            yield x


def _plainly(x: Any) -> Any:
    """Tensors as addresses, which is what launchers make of them; the rest as JSON holds it."""
    if isinstance(x, torch.Tensor):
        return x.data_ptr()
    return x if x is None or isinstance(x, int | float | str) else str(x)


def _codes(launches: list[Launch]) -> list[dict[str, Any]]:
    return [
        {
            "kernel": code.name,
            "compiled": re.findall(r"Function : (\S+)", code.sass),
            "hgmma": code.count("HGMMA"),
            "waits": code.count("WARPGROUP.DEPBAR"),
            "three_way": code.count("VIMNMX3"),
            "calls": code.count("CALL"),
            "matrix": code.count("HGMMA") + code.count("HMMA"),
            "spills": code.spills,
            "loop_spills": code.loop_spills,
            "shared": code.shared,
            "registers": code.registers,
        }
        for code in map(compile_launch, launches)
    ]


if __name__ == "__main__":
    # Each argument is "plan", "raw_keys", "launches", "names", "amd" alone, or "width,block_size,top_k", or with
    # ",queries" a decoding step, with ",queries,page_size" a call over a block table, then ":dtype" unless bf16, or
    # ":hopper" for Hopper's own kernels, or ":given" for those where they serve and given blocks; one line of JSON
    # each. A process of its own: Triton decides at import whether kernels are interpreted.
    for argument in sys.argv[1:]:
        whole = {
            "plan": plan_report,
            "raw_keys": raw_keys_report,
            "launches": launcher_arguments,
            "names": names_in_profiles,
            "amd": launched_on_amd,
        }
        if argument in whole:
            print(json.dumps(whole[argument]()), flush=True)
            continue
        numbers, _, variant = argument.partition(":")
        sizes = [int(size) for size in numbers.split(",")]
        if variant in ("hopper", "given"):
            lines = report(*sizes, hoppers_own=True, given=variant == "given")
        else:
            make_report: Any = {3: report, 4: decode_report, 5: paged_report}[len(sizes)]
            lines = make_report(*sizes, dtype=getattr(torch, variant or "bfloat16"))
        print(json.dumps(lines), flush=True)
