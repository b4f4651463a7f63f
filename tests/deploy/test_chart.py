"""The Helm chart: linted, rendered, validated, compared with golden files, and refused for wrong values."""

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import distribution
from pathlib import Path
from types import ModuleType
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubernetes_validate.utils import schema_contents
from pydantic import AnyHttpUrl, BaseModel, TypeAdapter

from router.ledger import LedgerConfig
from server.config import ENVIRONMENT_PREFIX, ServeConfig, load
from server.teacher_settings import TeacherSettings
from tests.helpers import helm

# The oldest Kubernetes that the chart allows, and the newest with published schemas.
KUBERNETES = ("1.30", "1.37")
CUSTOM = {
    "ScaledObject": ("keda", "v1alpha1"),
    "ServiceMonitor": ("prometheus_operator", "v1"),
    "PrometheusRule": ("prometheus_operator", "v1"),
}
"""Packages of models of custom resources, and the version in use."""
MONITORING = "--set=" + ",".join(
    f"monitoring.{part}.enabled=true" for part in ("serviceMonitor", "rules", "dashboards")
)


@pytest.fixture(scope="module", autouse=True)
def _schemas_are_read_once() -> Iterator[None]:
    """Cache definitions: each schema refers to all of its version, and the package reads them anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kubernetes_validate.utils, "schema_contents", cache(schema_contents))
        yield


def manifests(text: str) -> list[dict[str, Any]]:
    return [manifest for manifest in yaml.load_all(text, yaml.CSafeLoader) if manifest]


def of_kind(text: str, kind: str, component: str = "gateway") -> dict[str, Any]:
    (found,) = (
        manifest
        for manifest in manifests(text)
        if manifest["kind"] == kind and manifest["metadata"]["name"] == f"wheels-{component}"
    )
    return found


@cache
def models(package: str, version: str) -> ModuleType:
    """The models in CUSTOM, without the package's other hundreds, which take a second to build."""
    files = distribution(f"cloudcoil.models.{package}")
    path = files.locate_file(f"cloudcoil/models/{package}/{version}.py")
    imports, *classes = re.split(r"^(?=class )", path.read_text(), flags=re.MULTILINE)
    code = {one.removeprefix("class ").partition("(")[0]: one for one in classes}
    module = sys.modules[f"{package}_{version}"] = ModuleType(f"{package}_{version}")
    wanted = named([kind for kind, place in CUSTOM.items() if place == (package, version)], code)
    exec(imports + "".join(one for name, one in code.items() if name in wanted), vars(module))
    return module


def named(names: Iterable[str], code: Mapping[str, str]) -> set[str]:
    """The named classes, and all classes that their code names. Their docstrings do not count."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        found.add(name)
        words = re.findall(r"\w+", re.sub(r'"{3}(?s:.*?)"{3}', "", code[name]))
        waiting += (set(words) & code.keys()) - found
    return found


def check(manifest: dict[str, Any]) -> None:
    """Raises if a field is unknown, missing or of the wrong type."""
    kind = manifest["kind"]
    if place := CUSTOM.get(kind):
        model: type[BaseModel] = getattr(models(*place), kind)
        parsed = model.model_validate(manifest)
        assert not unknown(manifest["spec"], parsed.spec)
    else:
        for version in KUBERNETES:
            kubernetes_validate.validate(manifest, version, strict=True)


def unknown(given: Any, parsed: Any) -> list[str]:
    """Fields of a resource that its model dropped: these models ignore what they do not know."""
    if isinstance(given, list):
        return [name for one, other in zip(given, parsed, strict=True) for name in unknown(one, other)]
    if not isinstance(given, dict) or not isinstance(parsed, BaseModel):
        return []
    fields = {field.alias or name: name for name, field in type(parsed).model_fields.items()}
    return [name for name in given if name not in fields] + [
        inner
        for name, value in given.items()
        if name in fields
        for inner in unknown(value, getattr(parsed, fields[name]))
    ]


def test_helm_accepts_the_chart() -> None:
    for case in helm.CASES:
        result = helm.helm("lint", "--strict", str(helm.CHART), "--values", f"{helm.HERE}/values/{case}.yaml")
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("case", helm.CASES)
def test_manifests_are_those_of_the_golden_files(case: str) -> None:
    """After an intended change, run `python -m tests.helpers.helm` and read the difference."""
    assert helm.rendered(case) == helm.golden(case).read_text()


@pytest.mark.parametrize("case", helm.CASES)
def test_manifests_are_valid(case: str) -> None:
    for manifest in manifests(helm.rendered(case)):
        check(manifest)


def test_monitoring_manifests_are_valid() -> None:
    rendered = manifests(helm.template(MONITORING).stdout)
    kinds = [manifest["kind"] for manifest in rendered]
    assert kinds.count("ServiceMonitor") == 2
    assert kinds.count("PrometheusRule") == 2
    for manifest in rendered:
        check(manifest)


def test_gateways_are_scraped_with_the_key_of_their_metrics() -> None:
    secret = {"name": "wheels-metrics", "key": "key"}
    keyed = "--set=" + ",".join(f"monitoring.serviceMonitor.gatewayKey.{k}={v}" for k, v in secret.items())
    for flags, expected in (((), None), ((keyed,), {"credentials": secret})):
        rendered = helm.template(MONITORING, *flags).stdout
        gateway = of_kind(rendered, "ServiceMonitor", "gateway")
        check(gateway)
        assert gateway["spec"]["endpoints"][0].get("authorization") == expected
        assert "authorization" not in of_kind(rendered, "ServiceMonitor", "teacher")["spec"]["endpoints"][0]
    assert helm.template(MONITORING, keyed.rpartition(",")[0]).returncode != 0


def test_without_monitoring_only_gateways_reach_the_teacher() -> None:
    result = helm.template("--set-json", "networkPolicy.monitoring=[]")
    assert result.returncode == 0, result.stderr
    policy = of_kind(result.stdout, "NetworkPolicy", "teacher")
    check(policy)
    (peer,) = policy["spec"]["ingress"][0]["from"]
    assert peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "gateway"


def test_a_policy_for_nobody_is_refused() -> None:
    """Kubernetes reads an empty list of peers as everybody."""
    result = helm.template("--set-json", "networkPolicy.clients=[]")
    assert "'/networkPolicy/clients': minItems: got 0, want 1" in result.stderr


def test_a_wrong_manifest_is_noticed() -> None:
    good = of_kind(helm.rendered("fleet"), "ScaledObject")
    check(good)
    with pytest.raises(AssertionError, match="maxReplicas"):
        check(good | {"spec": good["spec"] | {"maxReplicas": 3}})
    deployment = of_kind(helm.rendered("demo"), "Deployment")
    with pytest.raises(kubernetes_validate.ValidationError):
        check(deployment | {"spec": deployment["spec"] | {"replica": 3}})


def test_the_values_of_the_deployment_guide_are_valid(tmp_path: Path) -> None:
    """The values are the indented block after "Write the values" in docs/deploy.md."""
    guide = (helm.ROOT / "docs" / "deploy.md").read_text()
    block = guide.split("4. Write the values.")[1].split("\n\n")[1]
    values = tmp_path / "values.yaml"
    values.write_text(block)
    result = helm.template("--values", str(values))
    assert result.returncode == 0, result.stderr
    config = yaml.safe_load(of_kind(result.stdout, "ConfigMap")["data"]["config.yaml"])
    assert config["student"] == "/models/student"
    assert config["vllm"] == {}


def test_the_schema_of_the_values_is_that_of_the_gateways_settings() -> None:
    """After a new setting of the gateway, run `python -m tests.helpers.helm`."""
    assert helm.schema_with(helm.configuration_schema()) == helm.SCHEMA.read_text()


@pytest.mark.parametrize("case", ["demo", "cpu-external-teacher"])
def test_the_gateway_takes_its_configuration(case: str, tmp_path: Path) -> None:
    text = of_kind(helm.rendered(case), "ConfigMap")["data"]["config.yaml"]
    file = tmp_path / "config.yaml"
    file.write_text(text.replace("/opt/demo", str(helm.ROOT / "deploy" / "demo")))
    assert load(["--config", str(file)]).default_budget.fraction == 0.1


def of_teachers(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, TeacherSettings]:
    """The teachers that a gateway takes from its file and its variables; each Secret holds its own name."""
    file = tmp_path / "config.yaml"
    config = of_kind(text, "ConfigMap")["data"]["config.yaml"]
    file.write_text(config.replace("/opt/demo", str(helm.ROOT / "deploy" / "demo")))
    held: dict[str, str] = {}
    for variable in of_kind(text, "Deployment")["spec"]["template"]["spec"]["containers"][0]["env"]:
        if "value" in variable:
            value = re.sub(r"\$\((\w+)\)", lambda name: held[name[1]], variable["value"])
        else:
            value = variable["valueFrom"]["secretKeyRef"]["name"]
        held[variable["name"]] = value
        if variable["name"].startswith(ENVIRONMENT_PREFIX):
            monkeypatch.setenv(variable["name"], value)
    return load(["--config", str(file)]).teachers


OWN = [AnyHttpUrl("http://wheels-teacher-0.wheels-teacher:8000")]


def test_several_teachers_have_names_and_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teachers = of_teachers(helm.rendered("several-teachers"), tmp_path, monkeypatch)
    assert teachers.keys() == {"small", "large", "lookup"}
    assert list(teachers["small"].url) == OWN
    assert teachers["small"].api_key is None
    large = teachers["large"]
    assert [url.host for url in large.url] == ["one.example.com", "two.example.com"]
    assert (large.model, large.api_key.get_secret_value()) == ("org/Large", "large")
    lookup = teachers["lookup"]
    assert (lookup.tool[0].path, lookup.timeout, lookup.api_key) == ("/answer", 2.5, None)


def test_without_keys_several_teachers_are_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = helm.template("--set", "teachers.a.url=http://a,teachers.b.tool={http://b/1,http://b/2}")
    assert result.returncode == 0, result.stderr
    config = yaml.safe_load(of_kind(result.stdout, "ConfigMap")["data"]["config.yaml"])
    assert config["teacher"] == {"a": {"url": "http://a"}, "b": {"tool": ["http://b/1", "http://b/2"]}}
    assert "WHEELS_TEACHER" not in dict(variables(result.stdout, "Deployment", "gateway"))
    assert "StatefulSet" not in [manifest["kind"] for manifest in manifests(result.stdout)]
    assert of_teachers(result.stdout, tmp_path, monkeypatch).keys() == {"a", "b"}


def test_one_of_several_teachers_that_runs_in_this_release_has_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keyed = "teachers.a.vocabulary=same,teachers.b.url=http://b,secrets.teacherApiKey.name=ours"
    text = helm.template("--set", keyed).stdout
    teachers = of_teachers(text, tmp_path, monkeypatch)
    assert list(teachers["a"].url) == OWN
    assert teachers["a"].api_key.get_secret_value() == "ours"
    assert teachers["b"].api_key is None
    assert "VLLM_API_KEY" in dict(variables(text, "StatefulSet", "teacher"))


@pytest.mark.parametrize("case", helm.CASES)
def test_environment_variables_are_settings_of_the_gateway(case: str) -> None:
    """The gateway refuses unknown variables that begin with its prefix."""
    pod = of_kind(helm.rendered(case), "Deployment")["spec"]["template"]["spec"]
    assert pod["enableServiceLinks"] is False  # a Service named "wheels" would set WHEELS_PORT
    variables = {variable["name"]: variable.get("value") for variable in pod["containers"][0]["env"]}
    ours = {name for name in variables if name.startswith(ENVIRONMENT_PREFIX)}
    assert {name.removeprefix(ENVIRONMENT_PREFIX).lower() for name in ours} <= set(ServeConfig.model_fields)
    if "WHEELS_LEDGER" in ours:
        assert list(variables).index("LEDGER_URL") < list(variables).index("WHEELS_LEDGER")
        value = variables["WHEELS_LEDGER"].replace("$(LEDGER_URL)", "redis://:pass@cache:6379/0")
        TypeAdapter(LedgerConfig).validate_python(json.loads(value))


WRONG = {
    "gateway.replica=3": "'/gateway': additional properties 'replica' not allowed",
    "gateway.replicas=0": "'/gateway/replicas': minimum: got 0, want 1",
    "gateway.config.gate=guess": "'/gateway/config/gate': value must be one of",
    "gateway.config.default_budget=2": "'/gateway/config/default_budget': maximum: got 2, want 1",
    "gateway.env.WHEELS_PORT=x": "invalid propertyName 'WHEELS_PORT'",
    "gateway.config.spam=1": "'/gateway/config': additional properties 'spam' not allowed",
    "gateway.config.limits[0].type=tokens": "'/gateway/config/limits/0': missing properties 'tokens', ",
    "ledger.settings.url=redis://cache": "'/ledger/settings': additional properties 'url' not allowed",
    "teacher.urls[0]=teacher:8000": "'/teacher/urls/0': 'teacher:8000' does not match pattern",
    "teachers.a.url=http://a,teachers.a.tool=http://a": "'/teachers/a': 'not' failed",
    "teachers.b.url=b:8000": "'/teachers/b/url': 'b:8000' does not match pattern",
    "teachers.c.urls[0]=http://c": "'/teachers/c': additional properties 'urls' not allowed",
}
"""Values that the schema refuses, all named by Helm at once."""


@pytest.fixture(scope="module")
def refused() -> str:
    result = helm.template("--set", ",".join(WRONG))
    assert result.returncode != 0
    return result.stderr


@pytest.mark.parametrize("values", WRONG)
def test_wrong_values_are_refused(values: str, refused: str) -> None:
    assert WRONG[values] in refused


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("gateway.config.student=/s", "additional properties 'student' not allowed"),
        ("secrets.tenants.name=tenants", "several gateways with limits or tenants need ledger.urlSecret"),
        (
            "secrets.tenants.name=tenants,secrets.apiKey.name=key,ledger.urlSecret.name=redis",
            "secrets.tenants and secrets.apiKey exclude each other",
        ),
        ("teacher.urls[0]=http://t,teacher.autoscaling.enabled=true", "teacher.autoscaling"),
        ("teachers.a.url=http://a,teacher.urls[0]=http://b", "teacher.urls and teachers exclude each other"),
        ("teachers.a.model=x,teachers.b.model=y", "teachers: only one can run here"),
        ("teachers.a.secret.name=a", "teachers.a.secret: the key of the teacher that runs here"),
        (
            "teachers.a.url=http://a,secrets.teacherApiKey.name=key",
            "secrets.teacherApiKey is for a teacher that runs here",
        ),
        (
            "teachers.a.url=http://a,gateway.config.teacher_model=m",
            "gateway.config.teacher_model: each of teachers has its own",
        ),
    ],
)
def test_values_that_do_not_fit_together_are_refused(values: str, message: str) -> None:
    result = helm.template("--set", values)
    assert result.returncode != 0
    assert message in result.stderr


# Variables and numbers


def variables(text: str, kind: str, component: str) -> list[tuple[str, Any]]:
    """Names and values of a container's environment, in order."""
    pod = of_kind(text, kind, component)["spec"]["template"]["spec"]
    return [(variable["name"], variable.get("value")) for variable in pod["containers"][0]["env"]]


MINE = ("HOME", "VLLM_API_KEY", "LEDGER_URL", "HF_TOKEN")


@pytest.mark.parametrize("names", [MINE, MINE[1:]], ids=["with HOME", "without"])
def test_a_variable_is_rendered_once_as_configured(names: tuple[str, ...]) -> None:
    components = {"gateway": "Deployment", "teacher": "StatefulSet"}
    given = [f"{component}.env.{name}=/mine" for component in components for name in names]
    result = helm.template("--set", ",".join(given))
    assert result.returncode == 0, result.stderr
    for component, kind in components.items():
        found = variables(result.stdout, kind, component)
        assert len({variable for variable, _ in found}) == len(found)
        assert dict(found) == {"HOME": "/home/wheels"} | dict.fromkeys(names, "/mine")


@pytest.mark.parametrize(
    ("variable", "secret"),
    [
        ("gateway.env.VLLM_API_KEY", "secrets.apiKey"),
        ("gateway.env.LEDGER_URL", "ledger.urlSecret"),
        ("teacher.env.VLLM_API_KEY", "secrets.teacherApiKey"),
        ("teacher.env.HF_TOKEN", "secrets.huggingFaceToken"),
    ],
)
def test_a_variable_that_a_secret_sets_is_refused(variable: str, secret: str) -> None:
    result = helm.template("--set", f"{variable}=mine,{secret}.name=theirs")
    assert result.returncode != 0
    assert f"{variable} and {secret} exclude each other" in result.stderr


BIG = 10_000_000


def big_values() -> dict[str, Any]:
    """A big number wherever the chart takes one; ports and replicas of a teacher have their limits."""
    component = {
        "tensorParallel": BIG,
        "dataParallel": BIG,
        "startSeconds": BIG,
        "drainSeconds": BIG,
        "podDisruptionBudget": {"maxUnavailable": BIG},
        "resources": {"requests": {"cpu": BIG}, "limits": {"memory": BIG}},
    }
    limit = {"type": "tokens", "tokens": BIG, "window_seconds": 60}
    return {
        "gateway": component
        | {"autoscaling": {"enabled": True, "minReplicas": BIG, "maxReplicas": BIG, "waitingRequests": BIG}}
        | {"config": {"limits": [limit], "vllm": {"max-model-len": BIG}, "default_budget": {"tokens": BIG}}}
        | {"tolerations": [{"key": "gpu", "operator": "Exists", "tolerationSeconds": BIG}]},
        "teacher": component | {"replicas": 3},
        "ledger": {"urlSecret": {"name": "redis"}, "settings": {"retry_seconds": BIG, "connections": BIG}},
    }


def test_numbers_are_written_as_numbers(tmp_path: Path) -> None:
    """Helm reads numbers as floating point, and would write 1e+07."""
    values = tmp_path / "values.yaml"
    values.write_text(yaml.safe_dump(big_values()))
    result = helm.template("--values", str(values))
    assert result.returncode == 0, result.stderr
    assert "e+0" not in result.stdout
    scaled = of_kind(result.stdout, "ScaledObject")["spec"]
    assert (scaled["minReplicaCount"], scaled["maxReplicaCount"]) == (BIG, BIG)
    assert scaled["triggers"][0]["metadata"]["threshold"] == str(BIG)
    for kind, component in (("Deployment", "gateway"), ("StatefulSet", "teacher")):
        pod = of_kind(result.stdout, kind, component)["spec"]["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] == BIG + 30
        assert pod["containers"][0]["startupProbe"]["failureThreshold"] == BIG // 5
        assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == BIG * BIG
        assert pod["containers"][0]["resources"]["limits"]["memory"] == BIG
    config = yaml.safe_load(of_kind(result.stdout, "ConfigMap")["data"]["config.yaml"])
    assert (config["drain_seconds"], config["limits"][0]["tokens"]) == (BIG, BIG)
    assert config["vllm"]["tensor-parallel-size"] == BIG
    ledger = json.loads(dict(variables(result.stdout, "Deployment", "gateway"))["WHEELS_LEDGER"])
    assert ledger["connections"] == BIG


def test_a_teachers_password_is_not_in_the_notes() -> None:
    result = helm.helm(
        *("install", "wheels", str(helm.CHART), "--namespace", "ai", "--dry-run=client"),
        *("--set", "teacher.urls[0]=http://me:secret@teacher:8000"),
    )
    notes = result.stdout.partition("NOTES:")[2]
    assert "http://teacher:8000" in notes
    assert "secret" not in notes
