"""The tables and figures of README.md and docs/, written from the files under results/.

    python docs/tables.py

replaces what stands between `<!-- table: NAME -->` and `<!-- end -->` by what the function of that name returns,
which is nothing where the results are not there. A test compares the documents with what this would write.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import front
import imports
import measured
import paper
import peers
import planned
import served

from openmoba.lab.study import results
from openmoba.lab.study.settings import settings_table
from openmoba.lab.study.studies import Study, read_studies

ROOT = Path(__file__).parent.parent
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    for path in documents():
        path.write_text(with_tables(path.read_text()))


def documents() -> list[Path]:
    """List the files that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def with_tables(text: str) -> str:
    """Write all tables of `text` anew; KeyError for a name without a function."""
    return TABLE.sub(lambda found: found[1] + TABLES[found[2]](ROOT) + found[3], text)


def study(root: Path) -> str:
    """Show charts A and B with what they say, of models of a realistic size if they are drawn, else of the demo."""
    found = _studies(root)
    if not found:
        return ""
    text = (
        "[docs/results.md](docs/results.md) has every study, which setting to take, and what this does not show. A "
        "size, such as 14 M, is that of the model's parameters without embeddings.\n\n"
    )
    shown = results.headlines(found, root)
    if f"({DEMO}/" in shown:
        text = f"{TINY} {text}"
    return text + shown


def experiments(root: Path) -> str:
    """Write every study: its question, its figures and its answer; the demo last."""
    return results.experiments(_studies(root), root / "docs")


def settings(root: Path) -> str:
    """Say which setting to take, by length and budget."""
    found, page = _studies(root), root / "docs"
    return settings_table([study for study in found if study.folder != root / DEMO], page) or settings_table(
        found, page
    )


def limits(root: Path) -> str:
    """Say what the studies do not show."""
    found = _studies(root)
    return results.limits([study for study in found if study.folder != root / DEMO] or found)


def verdicts(root: Path) -> str:
    """List the log's entries that readers look for, what is open and what did not help, from their own headings."""
    log = root / "docs" / "log.md"
    entries = re.findall(r"^### (\w+): (.+)$", log.read_text(), re.MULTILINE) if log.exists() else []
    lines = []
    for verdict in ("Open", "Dropped"):
        titles = [title for found, title in entries if found == verdict]
        links = "".join(f"- [{title}](#{anchor(f'{verdict}: {title}')})\n" for title in titles)
        lines += [f"**{verdict}**, {len(titles)} of {len(entries)} entries:\n\n{links}"] if titles else []
    return "\n".join(lines)


def drawing(root: Path, inside: str = "") -> str:
    """Draw what imports what."""
    return imports.drawing(root / "src", inside) if (root / "src").exists() else ""


def folders(root: Path) -> str:
    """Write what each folder of the package holds."""
    return imports.folders_table(root / "src") if (root / "src").exists() else ""


def anchor(heading: str) -> str:
    """Return the name under which GitHub links to a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@cache
def _studies(root: Path) -> list[Study]:
    """Read the studies on a GPU, then the demo."""
    patterns = (str(STUDIES), DEMO)
    return [study for pattern in patterns for study in read_studies(sorted(root.glob(pattern)))]


STUDIES = Path("results/h200/study/*")
DEMO = "results/demo"
TINY = (
    "The charts in miniature are of the demo's tiny models, trained for minutes: they show what is measured and how "
    "large the noise is, not what a large model loses."
)
TABLES: dict[str, Callable[[Path], str]] = {
    "opening": partial(front.opening, machine="h200"),
    "speed": partial(front.speed, machine="h200"),
    "attention_h200": partial(measured.attention, machine="h200"),
    "attention_h100": partial(measured.attention, machine="h100"),
    "short_h200": partial(measured.short, machine="h200"),
    "flex_h200": partial(peers.flex, machine="h200"),
    "dense_h200": partial(peers.dense, machine="h200"),
    "cited_h200": partial(peers.cited, machine="h200"),
    "decode_h200": partial(measured.decode, machine="h200"),
    "paged_h200": partial(measured.paged, machine="h200"),
    "prefill_h200": partial(measured.prefill, machine="h200"),
    "training_h200": partial(measured.training, machine="h200"),
    "longest_h200": partial(measured.longest, machine="h200"),
    "attention_cpu": measured.attention_cpu,
    "serving_cpu": partial(served.speed, machine="cpu"),
    "serving_h200": partial(served.speed, machine="h200"),
    "costs": planned.costs,
    "needle": planned.needle,
    "vocabulary": planned.vocabulary,
    "parallel_cost": partial(paper.cost, machine="h200"),
    "parallel_h200": partial(paper.measured, machine="h200"),
    "study": study,
    "experiments": experiments,
    "settings": settings,
    "limits": limits,
    "verdicts": verdicts,
    "packages": drawing,
    "rooms": partial(drawing, inside="lab"),
    "folders": folders,
}


if __name__ == "__main__":
    main()
