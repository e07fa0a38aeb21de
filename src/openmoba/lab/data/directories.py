"""Documents that are directories: the source files of a folder, directory by directory.

    ==> net/llc/af_llc.c <==
    /* the text of the file */

    ==> net/llc/llc_c_ac.c <==
    ...

A document holds the files of a directory and of those below it that are too small to be documents themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from openmoba.lab.data.corpus import Corpus, Item
from openmoba.lab.data.files import LeftOut, NotTextError, read_text, walk
from openmoba.lab.data.rules import FileRules


def open_directories(folder: str, rules: FileRules, merge_below: int) -> Corpus:
    """Find the documents of a folder. Files with the same contents are taken once, at the first of their paths.

    Args:
        merge_below: documents of fewer bytes are merged into that of the directory around them.

    Raises:
        ValueError: no such folder, or no text in it.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise ValueError(f"{folder} is no folder, so it has no directories; give a folder of source files")
    left_out = LeftOut()
    sizes: dict[str, int] = {}
    files: dict[str, Path] = {}
    seen = set()
    digest = hashlib.blake2b(f"directories {merge_below}".encode(), digest_size=16)
    for path, file in walk(root, rules, left_out):
        try:
            text = read_text(file)
        except NotTextError as error:
            left_out.add(str(error), path)
            continue
        contents = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if contents in seen:
            left_out.add("with the contents of another", path)
            continue
        seen.add(contents)
        sizes[path], files[path] = len(_entry(path, text).encode()) + 1, file
        digest.update(path.encode() + b"\0" + contents)
    if not sizes:
        raise ValueError(f"{folder} holds no text files that the options take; {str(left_out) or 'it is empty'}")
    merged = _merged(sizes, merge_below)

    def items() -> Iterator[Item]:
        for done, (directory, paths) in enumerate(merged.items(), 1):
            text = "\n".join(_entry(path, read_text(files[path])) for path in paths)
            yield Item(directory, text, done / len(merged))

    return Corpus(folder, digest.hexdigest(), items, left_out)


def _entry(path: str, text: str) -> str:
    """Write a file in a document: a line with its path, then its text."""
    return f"==> {path} <==\n{text}" + ("" if text.endswith("\n") else "\n")


def _merged(sizes: dict[str, int], merge_below: int) -> dict[str, list[str]]:
    """Group paths by directory, where directories of fewer bytes are part of the one around them."""
    files: dict[PurePosixPath, list[str]] = {}
    for path in sizes:
        around = PurePosixPath(path).parents
        for directory in around:  # which has no files of its own, perhaps, and may get some
            files.setdefault(directory, [])
        files[around[0]].append(path)
    for directory in sorted(files, key=lambda directory: len(directory.parts), reverse=True):
        small = sum(sizes[path] for path in files[directory]) < merge_below
        if directory.parts and (small or not files[directory]):
            files[directory.parent] += files.pop(directory)
    ordered = {str(directory): sorted(files[directory], key=PurePosixPath) for directory in sorted(files)}
    return {directory: paths for directory, paths in ordered.items() if paths}
