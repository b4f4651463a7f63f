"""Dockerfiles and the compose file, as far as they can be checked without a container engine."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.config import load
from tests.helpers.paths import ROOT

COMPOSE = ROOT / "deploy" / "compose"
DOCKER = ROOT / "deploy" / "docker"
DOCKERFILES = sorted(DOCKER.glob("Dockerfile.?pu"))
# Tools that pip installs next to the interpreter.
BIN = Path(sys.executable).parent


def run(*command: str | Path) -> str:
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def compose(profile: str) -> dict[str, Any]:
    """The compose file with all its anchors, variables and profiles resolved, by Docker Compose itself."""
    return yaml.safe_load(
        run(BIN / "docker-compose", "-f", COMPOSE / "compose.yaml", "--profile", profile, "config")
    )


def pinned(text: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_are_clean(path: Path) -> None:
    run(BIN / "hadolint", path)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_every_copied_file_exists_and_reaches_the_builder(path: Path) -> None:
    allowed = path.with_name(path.name + ".dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY (?!--from)(.+)$", path.read_text(), re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists()
            assert f"!{source}" in allowed


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_every_package_is_copied(path: Path) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {name.removesuffix("*") for name in settings["packages"]["find"]["include"]}
    copied = re.findall(r"^COPY (\w+) \1$", path.read_text(), re.MULTILINE)
    assert set(copied) == packages


def test_an_image_without_a_compiler_compiles_nothing() -> None:
    """vLLM compiles the function that counts ranks of log-probabilities, even in eager engines."""
    image = (DOCKER / "Dockerfile.cpu").read_text()
    assert re.search(r"^ENV (.*\\\n)*.*TORCHDYNAMO_DISABLE=1", image, re.MULTILINE)


def test_versions_in_images_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = pinned((ROOT / "constraints.txt").read_text())
    cpu, gpu = ((DOCKER / f"Dockerfile.{kind}").read_text() for kind in ("cpu", "gpu"))
    assert f"vllm-openai:v{versions['vllm']}\n" in gpu
    assert f"torch=={versions['torch']}+cpu" in cpu
    assert f"uv=={versions['uv']} " in cpu
    for kind in ("cpu", "gpu"):
        images = {service["image"] for service in compose(kind)["services"].values()}
        assert f"training-wheels:{project['version']}-{kind}" in images
    chart = yaml.safe_load((ROOT / "deploy" / "helm" / "Chart.yaml").read_text())
    assert chart["appVersion"] == project["version"]


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_compose_is_valid(profile: str) -> None:
    services = compose(profile)["services"]
    assert {"redis", "prometheus", "grafana"} < set(services)
    reachable = {
        name for s in services.values() for n in s["networks"].values() if n for name in n["aliases"]
    }
    assert reachable == {"gateway", "teacher"}
    for name, service in services.items():
        assert not service["image"].endswith(":latest"), name
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert all(port["host_ip"] == "127.0.0.1" for port in service.get("ports", ())), name
        for volume in service.get("volumes", ()):
            assert volume["type"] == "volume" or Path(volume["source"]).exists(), volume


def test_the_gateway_takes_its_configuration(tmp_path: Path) -> None:
    file = tmp_path / "wheels.yaml"
    text = (COMPOSE / "wheels.yaml").read_text()
    file.write_text(text.replace("/opt/demo", str(ROOT / "deploy" / "demo")))
    assert load(["--config", str(file)]).ledger.type == "redis"


def test_prometheus_takes_its_configuration() -> None:
    run("promtool", "check", "config", "--syntax-only", COMPOSE / "prometheus.yml")
