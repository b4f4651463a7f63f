"""The places of tests: they mirror the packages, in files that can be read in one sitting."""

from tests.helpers.paths import ROOT

TESTS = ROOT / "tests"
LONGEST = 500


def test_unit_tests_mirror_the_packages() -> None:
    """A folder is a package, or a module with several test files; `project` is for all packages."""
    strange = []
    for path in sorted((TESTS / "unit").rglob("test_*.py")):
        place = path.parent.relative_to(TESTS / "unit")
        module = (ROOT / place).with_suffix(".py")
        if place.name != "project" and not ((ROOT / place / "__init__.py").exists() or module.exists()):
            strange.append(str(path.relative_to(TESTS)))
    assert strange == []


def test_helpers_are_in_a_folder_of_their_own() -> None:
    folders = ("unit", "integration", "deploy")
    files = [path for folder in folders for path in (TESTS / folder).rglob("*.py")]
    assert [
        path.name for path in files if not path.name.startswith("test_") and path.name != "conftest.py"
    ] == []


def test_no_test_file_is_long() -> None:
    lines = {str(path.relative_to(TESTS)): path.read_text().count("\n") for path in TESTS.rglob("*.py")}
    assert {path: count for path, count in lines.items() if count > LONGEST} == {}
