"""`docstrings`: a function's source to the first sentence of its docstring, from the packages that are
installed here.

Summarisation that every machine has data for. With the pinned packages it is the same data everywhere;
files, not functions, are split, so that near copies beside each other stay on one side.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from training.tasks.base import register
from training.tasks.jsonl import Jsonl

STDLIB = "stdlib"
PACKAGES = (STDLIB, "numpy", "torch", "transformers", "matplotlib", "nltk", "vllm")
SOURCE_CHARACTERS = range(60, 601)
SENTENCE_CHARACTERS = range(15, 121)
HELD_OUT = {0: "valid", 1: "test"}  # of SHARES shares of the files
SHARES = 20
SENTENCE_END = re.compile(r"(?<=[.!?])\s|\n\s*\n")


@register
class Docstrings(Jsonl):
    """`directory`: extracted to when it is not there yet, which takes minutes. `packages`: importable names,
    and `stdlib`. Raises ValueError for a package that is not installed.
    """

    name = "docstrings"

    def __init__(
        self,
        directory: str = "data/docstrings",
        packages: Sequence[str] = PACKAGES,
        metric: str = "rouge_l",
    ) -> None:
        if not Path(directory).exists():
            extract(Path(directory), packages)
        super().__init__(directory, metric=metric)


def extract(directory: Path, packages: Sequence[str] = PACKAGES) -> None:
    """Write {train,valid,test}.jsonl, all or nothing."""
    splits: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    seen: set[str] = set()
    for package in packages:
        for file, name in files_of(package):
            share = int(hashlib.sha256(name.encode()).hexdigest(), 16) % SHARES
            for source, sentence in functions(file):
                if source not in seen:
                    seen.add(source)
                    row = json.dumps({"source": source, "target": sentence}, ensure_ascii=False)
                    splits[HELD_OUT.get(share, "train")].append(row + "\n")
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=directory.parent))
    for split, rows in splits.items():
        (scratch / f"{split}.jsonl").write_text("".join(rows))
    try:
        os.rename(scratch, directory)
    except OSError:  # another process was first, with the same files
        for path in scratch.iterdir():
            path.unlink()
        scratch.rmdir()


def files_of(package: str) -> Iterator[tuple[Path, str]]:
    """Python files, tests apart, each with its name within the package."""
    if package == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
    else:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"the package {package!r} is not installed")
        root = Path(spec.submodule_search_locations[0])
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if not {"test", "tests", "site-packages"} & set(parts):
            yield file, "/".join((package, *parts))


def functions(file: Path) -> Iterator[tuple[str, str]]:
    """(source without the docstring, first sentence of the docstring) of what is neither short nor long."""
    try:
        with warnings.catch_warnings(action="ignore"):  # other people's escapes
            tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if not docstring or len(node.body) < 2:
            continue
        sentence = " ".join(SENTENCE_END.split(docstring, maxsplit=1)[0].split())
        if len(sentence) in SENTENCE_CHARACTERS:
            node.body = node.body[1:]
            source = ast.unparse(node)
            if len(source) in SOURCE_CHARACTERS:
                yield source, sentence
