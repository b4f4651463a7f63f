"""Every package that an installation brings along has its version in constraints.txt."""

import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from measuring.pair import is_cpu_build
from tests.helpers.paths import ROOT

# Packages that differ between the two builds, or that the Makefile removes again.
PER_BUILD = re.compile(r"torchvision|torchaudio|torchcodec|triton|apache-tvm-ffi")


def brought_along(name: str, extras: frozenset[str], seen: set[tuple[str, frozenset[str]]]) -> Iterator[str]:
    """Canonical names of a package and of its installed requirements."""
    key = (canonicalize_name(name), extras)
    if key in seen:
        return
    seen.add(key)
    try:
        package = distribution(name)
    except PackageNotFoundError:
        return
    yield key[0]
    for text in package.requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra}) for extra in extras or {""}
        ):
            yield from brought_along(requirement.name, frozenset(requirement.extras), seen)


@pytest.mark.skipif(not is_cpu_build(), reason="CUDA's packages are pinned by torch and vLLM themselves")
def test_every_version_is_pinned() -> None:
    pinned = {
        canonicalize_name(name)
        for name in re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    }
    found = set(brought_along("training-wheels", frozenset({"cpu", "train", "dev"}), set()))
    assert len(found) > 100
    loose = {name for name in found - pinned - {"training-wheels"} if not PER_BUILD.fullmatch(name)}
    assert not loose, "pin these in constraints.txt: both builds have to resolve with them"
