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
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from openmoba.lab.files import FileRules, LeftOut, NotTextError, read_text, walk


@dataclass(frozen=True)
class Directories:
    """Documents made of the files of a folder, of which only the paths are held.

    Attributes:
        name: of the folder, as the user gave it.
        files: by directory, in order, the paths of its document's files below the folder, in order.
        digest: of the contents, hexadecimal.
        left_out: files of the folder that are in no document.
    """

    name: str
    files: dict[str, list[str]]
    digest: str
    left_out: LeftOut

    def named(self) -> Iterator[tuple[str, str]]:
        """Directory and text of each document, in order."""
        for directory, paths in self.files.items():
            yield directory, "\n".join(_entry(path, read_text(Path(self.name).expanduser() / path)) for path in paths)

    def documents(self) -> Iterator[str]:
        """The texts alone."""
        return (text for _, text in self.named())


def open_directories(folder: str, rules: FileRules, merge_below: int) -> Directories:
    """Find the documents of a folder. Files with the same contents are taken once, at the first of their paths.

    Args:
        merge_below: documents of fewer bytes are merged into that of the directory around them.

    Raises:
        ValueError: no such folder, or no text in it.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise ValueError(f"{folder} is no folder, so it has no directories; give a folder of source files")
    left_out, sizes, seen = LeftOut(), {}, set()
    digest = hashlib.blake2b(f"directories {merge_below}".encode(), digest_size=16)
    for path, file in walk(root, rules, left_out):
        try:
            content = _entry(path, read_text(file)).encode()
        except NotTextError as error:
            left_out.add(str(error), path)
            continue
        text_digest = hashlib.blake2b(content.partition(b"\n")[2], digest_size=16).digest()
        if text_digest in seen:
            left_out.add("a copy", path)
            continue
        seen.add(text_digest)
        sizes[path] = len(content) + 1
        digest.update(path.encode() + b"\0" + text_digest)
    if not sizes:
        raise ValueError(f"{folder} holds no text files that the options take; {str(left_out) or 'it is empty'}")
    return Directories(folder, _merged(sizes, merge_below), digest.hexdigest(), left_out)


def _entry(path: str, text: str) -> str:
    """A file in a document: a line with its path, then its text."""
    return f"==> {path} <==\n{text}" + ("" if text.endswith("\n") else "\n")


def _merged(sizes: dict[str, int], merge_below: int) -> dict[str, list[str]]:
    """Paths by directory, where directories of fewer bytes have become part of the one around them."""
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
