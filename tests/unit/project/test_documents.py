"""Everything that documents and docstrings cite exists: files, headings, modules, classes, members."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.sources import SOURCES, docstrings_and_comments, parsed, statements

DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "deploy/**/*.md")
    for path in ROOT.glob(pattern)
    if path.name not in ("licences.md", "log.md")  # the log describes the past, with the names of its day
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
PATH = re.compile(r"(?:server|router|training|tests|deploy|docs)/[\w./*-]*")
DOTTED = re.compile(r"(?:server|router|training|tests)(?:\.\w+)*\.(?!json|safetensors|py|yaml)\w+")
MEMBER = re.compile(r"(?!Dockerfile)([A-Z]\w*[a-z]\w*)\.(\w+)(?:\(\))?")


@dataclass
class Names:
    """Every name that the project's code defines or imports."""

    members: dict[str, set[str]] = field(default_factory=dict)
    """Methods, fields and attributes by class name; classes that share a name are joined."""
    bases: dict[str, set[str]] = field(default_factory=dict)
    imported: set[str] = field(default_factory=set)
    modules: dict[str, set[str]] = field(default_factory=dict)
    """Names that a module defines at its top, by the module's dotted name."""

    def has_member(self, owner: str, member: str) -> bool:
        """Whether a class or its base has the member; True for every member of other packages' classes."""
        if owner not in self.members:
            return owner in self.imported
        if member in self.members[owner]:
            return True
        return any(base in self.members and self.has_member(base, member) for base in self.bases[owner])

    def has_dotted(self, dotted: str) -> bool:
        """Whether `package.module.Class.member`, or a beginning of it that is a module, exists."""
        if dotted in self.modules:
            return True
        module, _, name = dotted.rpartition(".")
        if module in self.modules:
            return name in self.modules[module]
        module, _, owner = module.rpartition(".")
        return module in self.modules and owner in self.modules[module] and self.has_member(owner, name)


@cache
def project_names() -> Names:
    names = Names()
    for path in [*SOURCES, ROOT / "wheels.py"]:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        tree = parsed(path)
        names.modules[module] = set()
        for statement in tree.body:
            names.modules[module].update(_bound(statement))
        for statement in statements(tree):
            if isinstance(statement, ast.Import | ast.ImportFrom):
                names.imported.update(_bound(statement))
            if isinstance(statement, ast.ClassDef):
                members = names.members.setdefault(statement.name, set())
                for inner in statements(statement):
                    members.update(_bound(inner), _attributes(inner))
                bases = names.bases.setdefault(statement.name, set())
                bases.update(base.id for base in statement.bases if isinstance(base, ast.Name))
    return names


def _attributes(statement: ast.stmt) -> set[str]:
    """Names of the attributes that one statement sets."""
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    parts = (part for target in targets if target is not None for part in ast.walk(target))
    return {
        part.attr for part in parts if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store)
    }


def _bound(node: ast.AST) -> set[str]:
    """Names that one statement binds."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return {node.target.id}
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name for alias in node.names}
    return set()


def headings(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    anchors = set()
    for line in re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", line).lower())
        anchors.add(plain.strip().replace(" ", "-"))
    return anchors


def wrong_links(document: Path) -> Iterator[str]:
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (document.parent / file) if file else document
        if not target.exists():
            yield f"{link}: no such file"
        elif anchor and anchor not in headings(target):
            yield f"{link}: no such heading"


def wrong_names(text: str) -> Iterator[str]:
    """Citations in backticks of names that do not exist."""
    names = project_names()
    for cited in CODE.findall(text):
        if PATH.fullmatch(cited) and "." in cited.rpartition("/")[2] and not list(ROOT.glob(cited)):
            yield f"{cited}: no such file"
        if DOTTED.fullmatch(cited) and not names.has_dotted(cited):
            yield f"{cited}: no such name"
        member = MEMBER.fullmatch(cited)
        if member is not None and not names.has_member(member[1], member[2]):
            yield f"{cited}: no such member"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_everything_that_a_document_cites_exists(document: Path):
    assert [*wrong_links(document), *wrong_names(document.read_text())] == []


def test_everything_that_docstrings_and_comments_cite_exists():
    wrong = {}
    for source in SOURCES:
        found = list(wrong_names(docstrings_and_comments(source)))
        if found:
            wrong[str(source.relative_to(ROOT))] = found
    assert wrong == {}


@pytest.mark.parametrize(
    "text",
    [
        "see `server/no_such_file.py`",
        "see `router.budget.NoSuchClass`",
        "see `router.nothing`",
        "see `Budget.is_unbounded`",
        "see `NoSuchClass.member`",
    ],
)
def test_a_citation_of_a_missing_name_is_found(text: str):
    assert len(list(wrong_names(text))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "see `server/gateway.py`",
        "see `router/`",
        "see `router.budget.Bucket`",
        "see `router.budget.Bucket.reserve`",
        "see `Bucket.reserve()`",
        "see `SamplingParams.extra_args` of vLLM",
    ],
)
def test_a_citation_of_an_existing_name_is_accepted(text: str):
    assert list(wrong_names(text)) == []
