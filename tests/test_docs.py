"""The documentation says what is there: names, links, tables, and the version."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("transformers")

import held
import paper
import picture
import served
import synthetic_study
import tables
from synthetic_study import CANDIDATES, RECIPE, train

import openmoba
from openmoba.bench.cases import GRIDS
from openmoba.bench.parallel.cases import ParallelCase, ParallelRow
from openmoba.bench.parallel.chart import gain_chart
from openmoba.bench.rows import append_row, read_rows
from openmoba.bench.table import Row
from openmoba.bench.training.cases import GRIDS as TRAINING_GRIDS
from openmoba.bench.training.cases import TrainingRow, arm_name
from openmoba.lab.study.recipe import parse_recipe
from openmoba.ops.cost import causal_pairs, moba_pairs
from openmoba.records.disk import read_json

ROOT = Path(__file__).parent.parent
TRAINING = {"training_h200": "loop", "longest_h200": "longest"}
"""Tables of results/h200/training.csv, and the kind of rows that they show: as long as it has none, they are empty."""
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("docs/*.md")]
NAME = re.compile(r"`(openmoba(?:\.\w+)+)`")
KERNELS = ROOT / "src/openmoba/ops/triton"
MODULES = "|".join(
    re.escape(".".join(path.relative_to(KERNELS).with_suffix("").parts)) for path in KERNELS.rglob("[!_]*.py")
)
KERNEL = re.compile(rf"`({MODULES})\.(?!py|csv)(\w+)`")
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")
SETTING = re.compile(r"\bOPENMOBA_\w+")


def writer(root: Path) -> Callable[[str], str]:
    """Return what writes a table by its name, from the results below `root`."""
    return lambda name: tables.TABLES[name](root)


def resolve(name: str) -> Any:
    """The module, class or function of a dotted name; AttributeError if there is none."""
    found: Any = openmoba
    for part in name.split(".")[1:]:
        if isinstance(found, ModuleType) and not hasattr(found, part):
            try:
                importlib.import_module(f"{found.__name__}.{part}")
            except ModuleNotFoundError as error:
                raise AttributeError(f"{name}: {found.__name__} has no {part}") from error
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_and_links_exist(document: Path) -> None:
    text = document.read_text()
    for name in set(NAME.findall(text)):
        resolve(name)
    for module, kernel in set(KERNEL.findall(text)):
        resolve(f"openmoba.ops.triton.{module}.{kernel}")
    links = [link for link in LINK.findall(text) if "://" not in link]
    assert [link for link in links if not (document.parent / link).exists()] == []
    for page, name in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", text):
        headings = re.findall(r"^#+ (.+)$", (document.parent / page if page else document).read_text(), re.MULTILINE)
        assert name in map(tables.anchor, headings), f"{document.name} links to {page}#{name}"
    sources = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    assert [name for name in SETTING.findall(text) if name not in sources] == []


def test_the_equations_name_many_functions() -> None:
    names = NAME.findall((ROOT / "docs" / "moba.md").read_text())
    assert {"openmoba.moba_attention", "openmoba.ops.reference.choose_blocks"} < set(names)
    with pytest.raises(AttributeError):
        resolve("openmoba.ops.reference.no_such_function")
    with pytest.raises(AttributeError):
        resolve("openmoba.ops.no_such_module")


def test_tables_are_those_of_the_results() -> None:
    """What `python docs/tables.py` would write is what stands there, so no number drifts from its file."""
    texts = [path.read_text() for path in tables.documents()]
    assert {name for text in texts for _, name, _ in tables.TABLE.findall(text)} == set(tables.TABLES)
    assert [tables.with_tables(text) for text in texts] == texts, "run python docs/tables.py"
    rows = (ROOT / "results" / "h200" / "training.csv").read_text()
    unmeasured = {name for name, kind in TRAINING.items() if f",{kind}," not in rows}
    unmeasured |= set() if list((ROOT / "results").glob("h200x*/parallel.csv")) else {"parallel_h200"}
    unmeasured |= set() if (ROOT / "results" / "h200" / "serving.csv").exists() else {"serving_h200"}
    assert {name for name in tables.TABLES if not writer(ROOT)(name)} == unmeasured


def test_rows_of_several_gpus_make_their_table_and_the_paper(tmp_path: Path) -> None:
    """By hand: 340 ms on one GPU of which two would take 170; a quarter of what they send by heads is not hidden."""
    case = ParallelCase("attention", 2**20, "heads", "contiguous")
    where = {"device": "NVIDIA H200", "commit": "abc"}
    step = ParallelCase("step", 2**19, size="545m", full_layers=3)
    rows = [
        ParallelRow.of(case.on(1), 1, p50_ms=340.0, peak_mb=54360.0, **where),
        ParallelRow.of(case, 2, p50_ms=185.0, one_ms=340.0, speedup=340 / 185, peak_mb=45299.0, **where),
        *(
            ParallelRow.of(replace(case, kind="transfer", way=way), 2, gb_per_second=300.0, **where)
            for way in paper.WAYS
        ),
        ParallelRow.of(step, 2, p50_ms=1e4, tokens_per_second=52429.0, waiting=0.04, peak_mb=6e4, **where),
        ParallelRow.of(replace(step, tokens=2**20), 2, error="out of memory", **where),
    ]
    for row in rows:
        append_row(tmp_path / "results" / "h200x2" / "parallel.csv", row)
    text = writer(tmp_path)("parallel_h200")
    sent_ms = 2 * 2 * (32 + 8) / 2 / 2 * 128 * 2**20 * 2 / 300e9 * 1000
    line = "| both | 128 / 8 | 1M | 340 | 2 | heads, contiguous | 185 | 1.84x | 8% |"
    assert f"{line} {170 + sent_ms / 4:.4g} | 54.4 | 45.3 |" in text
    assert (
        "at 512K tokens on 2 GPUs: 10.0 s, 4% of it waiting for others or for the host, 52,429 tokens/s, 60 GB" in text
    )
    assert "512K tokens on 2 GPUs (1M does not fit)" in text
    (tmp_path / "results" / "h200").mkdir()
    (tmp_path / "results" / "h200" / "attention.csv").write_bytes((ROOT / "results/h200/attention.csv").read_bytes())
    assert "two GPUs have by NVLink, 300 GB/s by heads and 300 GB/s by keys" in writer(tmp_path)("parallel_cost")
    gain = gain_chart(rows).axes[0]
    assert [bar.get_height() for bar in gain.patches] == [pytest.approx(340 / 185, rel=1e-5)]


def test_tables_follow_their_files(tmp_path: Path) -> None:
    table = writer(tmp_path)
    assert [table(name) for name in tables.TABLES] == [""] * len(tables.TABLES)
    case = GRIDS["headline"][0]
    origin = {"device": "a GPU", "power_limit_w": 700.0, "torch": "2", "triton": "3"}
    path = tmp_path / "results" / "h200" / "attention.csv"
    append_row(path, Row.of("moba", case, p50_ms=9.0, commit="old", **origin))
    (tmp_path / "results" / "h200" / "cited-peers.csv").write_text(
        "contender,version,head_dim,tokens,block_size,top_k,forward_ms,backward_ms,device,torch,date\n"
        "flash_moba,2.0,128,8192,128,8,2,4,a GPU,2.11,2026-11-21\n"
        "flash_moba,2.0,128,131072,128,8,10,30,a GPU,2.11,2026-11-21\n"
    )
    assert "| D | block / top-k | tokens | MoBA | FlashMoBA 2.0 | ratio |" in table("cited_h200")
    assert "| 128 | 128 / 8 | 8K | 9.00 | 6.00 | 0.7x |" in table("cited_h200")
    for contender, ms in (("moba", 2.0), ("sdpa_cudnn", 5.0), ("flash_moba", 6.0)):
        times = {"dense_ms": 5.0, "speedup": 2.5} if contender == "moba" else {}
        append_row(path, Row.of(contender, case, p50_ms=ms, commit="new", **times, **origin))
    memory = {"roofline": 0.4, "forward_mb": 60.2, "backward_mb": 90.0}
    for passes in ("forward", "forward+backward"):
        shown = replace(case, passes=passes, tokens=32768)
        append_row(path, Row.of("moba", shown, p50_ms=float(len(passes)), commit="new", **memory, **origin))
    first = "| 128 | 128 / 8 | 8K | - | 2.00 | 5.00 | 2.5x | 6.00 | - | - | - |"
    second = "| 128 | 128 / 8 | 32K | 7.00 | 16.0 | - | - | - | 40% | 60 | 90 |"
    assert f"{first}\n{second}\n\n" in table("attention_h200")
    assert "Dense attention is SDPA/cuDNN." in table("attention_h200")
    assert table("cited_h200") == "", "FlashMoBA was timed above"
    assert table("opening") == "", "no full attention was measured at 128K tokens"
    fastest = tmp_path / "results" / "h200" / "flash-attention-4.csv"
    for tokens in (2**13, 2**17):
        for contender, ms in (("moba", 2.0), ("sdpa_cudnn", 60.0), ("fa4", 50.0)):
            library = {"library": f"{contender} 1.0"}
            row = Row.of(contender, replace(case, tokens=tokens), p50_ms=ms, commit="new", **library, **origin)
            append_row(fastest, row)
    assert "| 128 | 128 / 8 | 8K | 2.00 | 60.0 | 50.0 | 30.0x | 25.0x |" in table("dense_h200")
    assert "commit new, torch 2, moba 1.0, sdpa_cudnn 1.0, fa4 1.0:" in table("dense_h200")
    line = "| attention, forward and backward (full: FlashAttention 4) | 8K | 50.0 ms | 2.00 ms | 25.0x |\n"
    assert line in table("speed")
    assert "tokens takes 2.00 ms forward and backward, where full attention takes 50.0 ms" in table("opening")
    assert "a GPU: it reads 1.5% of the pairs" in table("opening")
    assert "** Full attention there is FlashAttention 4, faster than SDPA/cuDNN." in table("opening")
    peer = "took 40.0 ms, 20.0 times as long, timed [apart](docs/speed.md#others) on another a GPU on 2026-11-21.\n"
    assert table("opening").endswith(peer)
    path = tmp_path / "results" / "h200" / "short.csv"
    for commit, short in zip(("older", "newer"), GRIDS["short"], strict=False):
        append_row(path, Row.of("sdpa_cudnn", short, p50_ms=1.25, commit=commit, **origin))
        append_row(path, Row.of("moba", short, p50_ms=1.5, commit=commit, path="triton blocks", **origin))
    assert "| 1.50 | 1.25 | +0.25 | 1.20 | blocks |" in table("short_h200")
    assert "Commit older and newer." in table("short_h200")
    path = tmp_path / "results" / "h200" / "attention.csv"
    peer = GRIDS["peers"][0]
    for contender, ms, commit in (("moba", 2.0, "newer"), ("flex", 10.0, "older")):
        append_row(path, Row.of(contender, peer, p50_ms=ms, commit=commit, **origin))
    assert "| 2.00 | 10.0 | 5.0x |" in table("flex_h200")
    assert "Commit newer and older." in table("flex_h200")
    path = tmp_path / "results" / "h200" / "decode.csv"
    step = Row.of("moba", case, p50_ms=0.02, commit="c", **origin)
    shown = replace(step, passes="decode", tokens=2**17, batch=16)
    append_row(path, shown)
    append_row(path, replace(shown, contender="sdpa_flash_grouped", block_size=None, top_k=None, p50_ms=0.2))
    for tokens in (2**17, 2**16):
        append_row(path, replace(step, passes="prefill chunk", tokens=tokens, p50_ms=tokens / 2**14))
    written = table("decode_h200")
    assert "| 16 | 128 / 8 | 128K | 0.020 | 0.200 | 10.0x |" in written
    assert "Dense attention is SDPA/flash with grouped queries." in written
    first_and_last = (
        "128K tokens in chunks of 64K, block / top-k 128 / 8, takes 4.00 ms for the first chunk and 8.00 ms"
    )
    assert first_and_last in table("prefill_h200")
    assert "| a decoding step of one layer, batch 16 | 128K | 0.200 ms | 0.020 ms | 10.0x |" in table("speed")
    path = tmp_path / "results" / "h200" / "paged.csv"
    chunk = replace(step, passes="chunk of 8K", tokens=2**19, p50_ms=2.0)
    for passes, ms in (("chunk of 8K", 2.0), ("chunk of 8K, pages of 16", 2.25), ("decode, pages of 16", 9.0)):
        append_row(path, replace(chunk, passes=passes, p50_ms=ms))
    assert "| chunk of 8K | 1 | 512K | 128 / 8 | 16 | 2.00 | 2.25 | 1.12 |" in table("paged_h200")
    assert "9.00" not in table("paged_h200")  # nothing stands beside it
    path = tmp_path / "results" / "h200" / "training.csv"
    rates = {"full": 1e5, "512/3": 4e5, "128/9": 3e5}
    times = {"p50_ms": 2000.0, "busy_ms": 1e3, "mfu": 0.5, "matrix_tflops": 700.0, "attention_share": 0.25}
    results = {"total": 14_000_000, "peak_mb": 9e3, "attention_kernel": "cudnn", "commit": "c", **times, **origin}
    speed_ups = {"eager": 0.5, "graphed": 1.5}
    for grid in ("headline", "eager", "graphed", "trainer", "longest"):
        for case in TRAINING_GRIDS[grid]:
            rate = rates[arm_name(case)] * speed_ups.get(grid, 1.0)
            limit = "time" if case.top_k else "memory"
            append_row(path, TrainingRow.of(case, "bfloat16", tokens_per_second=rate, limit=limit, **results))
    moba = "| 4.0x | 50%, 50% | 25%, 25% | 50%, 50% | 9.0, 9.0 | 200 K | 600 K | 400 K |"
    assert f"| llama 14m | 4 | 100 K | 400 K | 300 K {moba}\n" in table("training_h200")
    assert "| gain | of the measured matrix rate |" in table("training_h200")
    assert "in the same run, 700 TFLOP/s. MFU in reports of studies is" in table("training_h200")
    assert "Full attention ran cuDNN's kernels." in table("training_h200")
    assert "| a training step, 14M parameters | 32K | 100 K tokens/s | 400 K tokens/s | 4.0x |" in table("speed")
    assert "top-8; in training 512, top-3. Commits" in table("speed")
    assert "training.png" not in table("training_h200")
    path.with_suffix(".png").touch()
    assert "(../results/h200/training.png)" in table("training_h200")
    assert "| llama 14m | yes | 32K, 2.0 s | 32K+, 2.0 s |\n" in table("longest_h200")
    assert "was not tried" in table("longest_h200")
    path = tmp_path / "results" / "cpu" / "attention.csv"
    on_cpu = replace(GRIDS["cpu"][1], tokens=2**14)
    for contender, ms in (("sdpa", 300.0), ("moba", 75.2)):
        times = {"dense_ms": 300.0, "speedup": 4.0} if contender == "moba" else {}
        append_row(path, Row.of(contender, on_cpu, p50_ms=ms, commit="c", **times, **origin))
    assert "| float32 | 128 / 8 | 16K | 75.2 | 300 | 4.0x |" in table("attention_cpu")


def test_the_table_of_serving_follows_its_file(tmp_path: Path) -> None:
    path = tmp_path / "results" / "cpu" / "serving.csv"
    path.parent.mkdir(parents=True)
    names = "attention,block_size,top_k,context,batch,prefill_tokens_per_s,decode_tokens_per_s,"
    names += "cpu,threads,torch,vllm,commit"
    rows = [
        f"{name},{blocks},{context},{batch},{rate / context},{rate * batch},a CPU,1,2.13,0.32,abc"
        for name, blocks, rate in (("full", ",", 4096), ("moba", "128,8", 10240))
        for context in (1024, 2048)
        for batch in (1, 4)
    ]
    path.write_text("\n".join([names, *rows, ""]))
    table = writer(tmp_path)("serving_cpu")
    assert "| context | prefill | decoding, 1 request | decoding, 4 requests |" in table
    assert "| 2K | 2, 5: 2.5x | 4,096, 10,240: 2.5x | 16,384, 40,960: 2.5x |" in table
    assert "a CPU, 1 thread, seconds of the processor" in table
    assert "blocks of 128, top-8. vLLM 0.32, torch 2.13, commit abc" in table
    assert writer(tmp_path)("serving_h200") == ""
    on_gpu = path.parent.with_name("h200") / path.name
    on_gpu.parent.mkdir()
    on_gpu.write_text("\n".join([names + ",gpu", *(f"{row},a GPU" for row in rows), ""]))
    table = writer(tmp_path)("serving_h200")
    assert "| 2K | 2, 5: 2.5x |" in table
    assert "a GPU, in CUDA graphs as vLLM makes them by itself; twelve layers" in table
    assert list(served.gains(tmp_path, "h200")) == [
        ("vLLM, twelve layers, a prompt", "2K", "2 tokens/s", "5 tokens/s", "2.5x"),
        ("vLLM, twelve layers, decoding, 4 requests", "2K", "16 K tokens/s", "41 K tokens/s", "2.5x"),
    ]
    assert "key convolution" not in table
    slower = [row.replace("moba", "moba with key convolution") for row in rows if row.startswith("moba")]
    slower = [row.replace(str(10240 * 4), str(10240 * 2)) for row in slower]
    on_gpu.write_text("\n".join([names + ",gpu", *(f"{row},a GPU" for row in (*rows, *slower)), ""]))
    assert table.strip() + " With key convolution over 4 tokens a step takes 1.50 times as long (1.00 to 2.00)." == (
        writer(tmp_path)("serving_h200").strip()
    )
    assert "(../results/h200/serving.csv)" in table


def test_the_picture_of_shards_is_that_of_shardings() -> None:
    assert held.PICTURE.read_text() == held.picture(), "run python docs/held.py"
    chunks = [owner for chunk, head, owner in held._owners(2) if head == 0]
    assert chunks == [0, 1, 2, 2, 1, 0]


def test_the_picture_shows_what_the_operation_reads() -> None:
    assert picture.PICTURE.read_text() == picture.picture(), "run python docs/picture.py"
    pairs = moba_pairs(picture.TOKENS, picture.BLOCK, picture.TOP_K)
    assert picture.keys_read(picture.TOP_K).sum() == pairs
    assert f"reads {pairs / causal_pairs(picture.TOKENS):.0%}</text>" in picture.picture()


def test_the_readme_stays_short() -> None:
    """Two screens before the links, the charts' sentences aside, and one table; the rest is in docs/."""
    text = (ROOT / "README.md").read_text().partition("## Where to go next")[0]
    assert len(text.splitlines()) < 130
    assert len(re.findall(r"^\| ---", text, re.MULTILINE)) == 1


def test_the_log_says_of_every_entry_what_became_of_it() -> None:
    sections = re.split(r"^##+ ", (ROOT / "docs" / "log.md").read_text(), flags=re.MULTILINE)[1:]
    entries = [section for section in sections if not section.startswith("20")]
    assert len(entries) > 50
    for entry in entries:
        assert re.match(r"(Open|Dropped|Kept|Found|Mended|Closed): ", entry), entry
        assert re.search(r"\*(Tried and result|Result)[:*]", entry), entry
        assert entry.startswith("Closed") == ("*Later:*" in entry), entry


def test_contributing_names_files_that_there_are() -> None:
    named = set(re.findall(r"`([\w./]+\.py)`", (ROOT / "CONTRIBUTING.md").read_text()))
    assert {"ops/backends.py", "ops/triton/families.py", "lab/arms.py", "lab/measure/compute.py"} < named
    places = (ROOT, ROOT / "src", ROOT / "src" / "openmoba", ROOT / "tests")
    assert [name for name in named if not any((place / name).exists() for place in places)] == []


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert set(re.findall(r"\]\((\w+\.md)\)", index)) == pages


def test_results_follow_the_records_of_studies(tmp_path: Path) -> None:
    table = writer(tmp_path)
    for name, text in (("chart-b", RECIPE), ("short-list", CANDIDATES)):
        folder = tmp_path / "results" / "h200" / "study" / name
        folder.mkdir(parents=True)
        (folder / "recipe.toml").write_text(text)
        for run in parse_recipe(text, title="t").runs:
            train(run.config(folder), folder / run.name)
        (folder / "figures").mkdir()
        for figure in ("pretrain-scaling-law", "finetune-large-layerwise-hybrid", "candidates-large-candidates"):
            if figure.partition("-")[0] in text:
                (folder / "figures" / f"{figure}.png").touch()
    page = table("experiments")
    order = [line for line in page.splitlines() if line.startswith(("###", "**", "!["))]
    assert order == [
        "### Short list",
        "**Which setting is as good as full attention?**",
        "![Short list, stage candidates](../results/h200/study/short-list/figures/candidates-large-candidates.png)",
        "### Synthetic study",
        "![Synthetic study, stage pretrain](../results/h200/study/chart-b/figures/pretrain-scaling-law.png)",
        "![Synthetic study, stage finetune](../results/h200/study/chart-b/figures/finetune-large-layerwise-hybrid.png)",
    ]
    assert page.count("the trailing loss of MoBA lies +") == 2, "by operations; all sizes took the same seconds"
    assert ", **resolved** (8 documents, 24 windows, 2 seeds)." in page
    assert "1.2 M: last-3 has the lowest trailing loss of 4 sparse candidates. " in page
    assert "| MoBA | 3 | +0.1360 [" in page
    assert "With 3 of 16 layers full (19%; last-3): +0.0" in page
    assert table("settings").startswith(
        "At 1,024 tokens, the lowest loss first:\n\n"
        "- **last-3** reads 42% of the keys; its loss at the last positions is within noise of full attention's; it "
        "trains 1.0 times as fast.\n"
        "- **last-1** reads 33% of the keys; its loss at the last positions is 2.4% above full attention's; it "
    )
    rows = [line.split(" | ") for line in table("settings").splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert [row[0] for row in rows] == sorted((row[0] for row in rows), key=lambda cell: int(cell[2:].replace(",", "")))
    assert [row[2] for row in rows if row[0] == "| 1,024"] == [
        "last-1: blocks of 64, top-3, 1 of 16 layers full (15)",
        "last-3: blocks of 64, top-3, 3 of 16 layers full (13, 14, 15)",
    ]
    assert "Models of 200,000 to 1,200,000 parameters" in table("limits")
    assert "documents of stdlib, 1 to 3 seeds of a run." in table("limits")
    assert "at most 1.0 epochs, 0.137 to 2.05 tokens for each parameter" in table("limits")
    assert 'alt="Trailing loss over compute' in table("study")
    assert tables.TINY not in table("study")
    assert 'src="results/h200/study/chart-b/figures/finetune-large-layerwise-hybrid.png"' in table("study")
    assert "[Synthetic study](results/h200/study/chart-b/report.md): an imagined processor, 22 minutes" in table(
        "study"
    )


def test_a_baseline_is_called_weak_where_a_smaller_model_ends_lower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The larger model's list of candidates, beside laws of smaller models of full attention that learned more."""

    def finish(name: str, text: str) -> Path:
        folder = tmp_path / "results" / "h200" / "study" / name
        for run in parse_recipe(text, title="t").runs:
            train(run.config(folder), folder / run.name)
        (folder / "recipe.toml").write_text(text)
        return folder

    finish("chart-b", RECIPE)
    finish("short-list", CANDIDATES)
    weak = "has not finished learning"
    assert weak not in writer(tmp_path)("experiments")
    monkeypatch.setitem(synthetic_study.LAWS, "full", (2.0, -0.097))
    folder = finish("short-list-again", CANDIDATES)
    (folder / "figures").mkdir()
    (folder / "figures" / "candidates-large-candidates.png").touch()
    losses = [read_json(folder / f"candidates/large-full-seed{seed}/result.json")["eval"] for seed in range(3)]
    said = " and ".join(f"{loss['trailing_loss']:.3f}" for loss in losses)
    tables._studies.cache_clear()
    page = writer(tmp_path)("experiments")
    sentence = f"Full attention {weak}: its trailing loss is {said} after 400 steps. The smaller 500 K is at "
    assert page.count(sentence) == page.count(weak) == 1
    assert " after 200 (Synthetic study)." in page
    assert sentence in writer(tmp_path)("study")


def test_charts_that_no_large_study_has_are_the_demos(tmp_path: Path) -> None:
    table = writer(tmp_path)
    head, stages = (
        RECIPE[: RECIPE.index("[[stages]]")],
        "[[stages]]\nname = 'context'\nsizes = ['small']\narms = ['full']\n",
    )
    for name, text in (("h200/study/context", head + stages), ("demo", RECIPE)):
        folder = tmp_path / "results" / name
        folder.mkdir(parents=True)
        (folder / "recipe.toml").write_text(text)
        for run in parse_recipe(text, title="t").runs:
            train(run.config(folder), folder / run.name)
    (tmp_path / "results/demo/figures").mkdir()
    (tmp_path / "results/demo/figures/pretrain-scaling-law.png").touch()
    assert 'src="results/demo/figures/pretrain-scaling-law.png"' in table("study")
    assert table("study").startswith(tables.TINY)
    assert "(../results/demo/report.md)" in table("settings")
    assert "Models of 200,000 to 200,000 parameters" in table("limits")
    assert table("experiments").count("### Synthetic study") == 2


def test_changelog_begins_with_this_version() -> None:
    versions = re.findall(r"^## (\S+?),", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == openmoba.__version__


def test_sparse_calls_are_faster_than_dense_ones_from_8k_tokens_on() -> None:
    """As the README says of the H200's rows."""
    assert (
        "From 8K tokens on it is faster than cuDNN's dense attention at every setting measured"
        in (ROOT / "README.md").read_text()
    )
    sparse = [
        row
        for row in read_rows(ROOT / "results/h200/attention.csv", Row)
        if row.contender == "moba"
        and row.dense_ms
        and row.tokens >= 8192
        and 4 * row.top_k * row.block_size <= row.tokens
    ]
    assert len(sparse) > 80
    assert all(row.p50_ms < row.dense_ms for row in sparse)
