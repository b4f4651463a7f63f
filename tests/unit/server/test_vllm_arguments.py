"""Settings of vLLM's server reach its parser in full. Settings that a gateway cannot honour are refused."""

import ast
import asyncio
import datetime
import inspect
import ipaddress
import json
import shlex
import ssl
from argparse import Namespace
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from vllm.entrypoints.launchers.api_server import entry
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from server import gateway
from server.config import ConfigError
from server.gate_processor import SETTINGS
from server.vllm_api import HttpLayer, UsageContext
from server.vllm_flags import read_flags


@pytest.fixture(scope="module")
def http() -> HttpLayer:
    return HttpLayer()


def vllm_alone(words: list[str]) -> Namespace:
    """The result of vLLM's own command line for the words."""
    return _vllm_parser().parse_args(words)


@cache
def _vllm_parser() -> FlexibleArgumentParser:
    return make_arg_parser(FlexibleArgumentParser())


def refusal(http: HttpLayer, settings: dict[str, Any], **fixed: Any) -> str:
    with pytest.raises(ConfigError) as error:
        http.parse(settings, fixed=fixed)
    assert "\n" not in str(error.value)
    return str(error.value)


# From the command line


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--api-key OLD NEW",
        "--api-key=ONE",
        "--api-key OLD --api-key NEW",
        "--api_key OLD NEW --max_model_len 64",
        "--lora-modules a=/a b=/b",
        """--lora-modules '{"name": "a", "path": "/a"}' '{"name": "b", "path": "/b"}'""",
        "--no-enable-prefix-caching",
        "--enable-prefix-caching --no-enable-prefix-caching",
        "--no-enable-prefix-caching --enable-prefix-caching",
        "--enable-prefix-caching --enforce-eager --no-enable-prefix-caching --enable-prefix-caching",
        "--seed -1",
        "--seed 1 --seed 2",
        "--max-model-len 1k --gpu-memory-utilization=0.5",
        "--chat-template= --uvicorn-log-level warning",
        "--hf-overrides.a 1 --hf-overrides.b.c two",
        "--hf_overrides.a_b=1 --hf-overrides.c+ x,y",
        """--hf-overrides '{"a": {"b": 1}}'""",
        """--allowed-origins '["*"]' --allowed-methods '["GET", "POST"]'""",
        "-tp 2 -O3 -q awq",
        "-O 2",
        "--middleware a.b --middleware c.d",
        "--cudagraph-capture-sizes 1 2 4",
        "--ssl-cert-reqs 2 --h11-max-header-count 7 --root-path /api",
    ],
)
def test_a_command_line_means_what_it_means_to_vllm(http: HttpLayer, line: str) -> None:
    words = shlex.split(line)
    assert vars(http.parse(read_flags(words))) == vars(vllm_alone(words))


def test_several_values_are_several(http: HttpLayer) -> None:
    arguments = http.parse(read_flags(["--api-key", "OLD", "NEW", "--lora-modules", "a=/a", "b=/b"]))
    assert arguments.api_key == ["OLD", "NEW"]
    assert [module.name for module in arguments.lora_modules] == ["a", "b"]


# From a file


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"enable-prefix-caching": False}, "--no-enable-prefix-caching"),
        ({"enable_prefix_caching": True}, "--enable-prefix-caching"),
        ({"no-enable-prefix-caching": True}, "--no-enable-prefix-caching"),
        ({"no-enable-prefix-caching": False}, "--enable-prefix-caching"),
        ({"disable-log-stats": False, "enforce-eager": False}, "--no-enforce-eager"),
        ({"seed": None, "max-model-len": 64}, "--max-model-len 64"),
        ({"api-key": ["a", "b"]}, "--api-key a b"),
        ({"api-key": ["-a"]}, "--api-key=-a"),
        ({"api-key": []}, ""),
        ({"allowed-origins": ["*"]}, """--allowed-origins '["*"]'"""),
        ({"cudagraph-capture-sizes": [1, 2]}, "--cudagraph-capture-sizes 1 2"),
        ({"middleware": ["a.b", "c.d"]}, "--middleware a.b --middleware c.d"),
        (
            {"lora-modules": [{"name": "a", "path": "/a"}, "b=/b"]},
            """--lora-modules '{"name": "a", "path": "/a"}' b=/b""",
        ),
        ({"hf-overrides": {"a": {"b": "1"}, "c": [1]}}, """--hf-overrides '{"a": {"b": "1"}, "c": [1]}'"""),
        ({"hf-overrides": {"a.b": 1}}, """--hf-overrides '{"a.b": 1}'"""),
        ({"hf-overrides": {}}, "--hf-overrides {}"),
        ({"hf-overrides.a": False, "hf-overrides.b": [1]}, "--hf-overrides.a false --hf-overrides.b [1]"),
        ({"gpu-memory-utilization": 0.5, "-tp": 2}, "--gpu-memory-utilization 0.5 -tp 2"),
    ],
)
def test_a_setting_in_a_file_equals_its_flag(http: HttpLayer, settings: dict[str, Any], line: str) -> None:
    assert vars(http.parse(settings)) == vars(vllm_alone(shlex.split(line)))


def test_a_key_on_the_command_line_replaces_that_key_of_the_file(http: HttpLayer) -> None:
    settings = {"hf-overrides": {"a": 1, "b": 2}} | read_flags(["--hf-overrides.b", "3"])
    assert http.parse(settings).hf_overrides == {"a": 1, "b": 3}


# Refusals


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"no-such": 1}, "vllm: unrecognized arguments: --no-such=1"),
        ({"max-model": 8}, "vllm: unrecognized arguments: --max-model=8"),  # no abbreviations
        ({"seed": "x"}, "vllm: argument --seed: invalid int value: 'x'"),
        ({"seed": True}, "vllm: argument --seed: expected one argument"),
        ({"seed": [1, 2]}, "vllm: --seed takes one value, got 1 2"),
        ({"lora-modules": ["{"]}, "vllm: Invalid JSON format for --lora-modules: {"),
        ({"headless": True}, "vllm's headless is not supported"),
        ({"grpc": True}, "vllm's grpc is not supported"),
        ({"grpc-port": 50051}, "vllm: --grpc-port requires"),
        ({"tokens-only": True}, "vllm's tokens-only is not supported"),
        ({"config": "vllm.yaml"}, "vllm's config is not supported"),
        ({"-dpm": True, "-dp": 2, "-dpl": 2}, "vllm's data-parallel-multi-port-external-lb is not supported"),
        ({"api-server-count": 2}, "vllm's api-server-count is not supported"),
        ({"-asc": 0}, "vllm's api-server-count is not supported"),
        ({"ssl-keyfile": "key.pem"}, "vllm's ssl-keyfile needs ssl-certfile"),
        ({"ssl-ca-certs": "ca.pem"}, "vllm's ssl-ca-certs needs ssl-certfile"),
        ({"enable-ssl-refresh": True}, "vllm's enable-ssl-refresh needs ssl-certfile"),
        ({"ssl-certfile": "/no/where.pem"}, "vllm's TLS settings cannot be used (/no/where.pem): [Errno 2]"),
    ],
)
def test_what_a_gateway_cannot_honour_is_refused_in_one_line(
    http: HttpLayer, settings: dict[str, Any], said: str
) -> None:
    assert refusal(http, settings).startswith(said)


def test_every_model_has_a_name_of_its_own(http: HttpLayer) -> None:
    served = {"served-model-name": ["wheels", "wheels-best"]}
    assert http.parse({}, fixed=served).served_model_name == ["wheels", "wheels-best"]
    for adapters, name in ((["wheels-best=/a"], "wheels-best"), (["a=/a", "a=/b"], "a")):
        message = refusal(http, {"lora-modules": adapters}, **served)
        assert message == f"vllm's lora-modules: two models named {name}"


@pytest.mark.parametrize("name", ["model", "served_model_name", "middleware", "no-model"])
def test_what_the_gateway_sets_itself_is_refused_in_any_spelling(http: HttpLayer, name: str) -> None:
    fixed = {"model": "m", "served-model-name": "s", "middleware": "a.b"}
    message = refusal(http, {name: "x"}, **fixed)
    if name == "no-model":
        assert message == "vllm: unrecognized arguments: --no-model=x"
    else:
        assert (
            message
            == f"leave out these vllm settings, because the gateway sets them: {name.replace('_', '-')}"
        )


def test_more_than_one_api_server_is_refused(http: HttpLayer) -> None:
    assert http.parse({"api-server-count": 1}).api_server_count == 1


# Arguments of the server and the engine


def test_all_that_vllms_entry_passes_to_its_server_is_passed(http: HttpLayer) -> None:
    """vLLM adds such arguments now and then. This test finds them before an operator misses one."""
    tree = ast.parse(inspect.getsource(entry.build_and_serve))
    (call,) = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "serve_http"
    ]
    theirs = {keyword.arg for keyword in call.keywords if keyword.arg is not None}
    ours = http.serve_options(vllm_alone([]), keep_alive_seconds=1).keys()
    assert theirs - ours == {"sock", "peer_loads"}  # the second is for several servers at one socket
    assert ours - theirs == set()


def test_settings_of_the_server_are_passed_on(http: HttpLayer, tmp_path: Path) -> None:
    logging = tmp_path / "logging.json"
    logging.write_text(json.dumps({"version": 1, "disable_existing_loggers": False}))
    given = {
        "h11-max-header-count": 7,
        "h11-max-incomplete-event-size": 1000,
        "uvicorn-log-level": "error",
        "disable-uvicorn-access-log": True,
        "ssl-cert-reqs": 1,
        "logging-config": {"pylogging_config_file": str(logging)},
    }
    options = http.serve_options(http.parse(given), keep_alive_seconds=75)
    assert (options["h11_max_header_count"], options["h11_max_incomplete_event_size"]) == (7, 1000)
    assert (options["log_level"], options["access_log"]) == ("error", False)
    assert options["ssl_cert_reqs"] == 1
    assert options["log_config"] == {"version": 1, "disable_existing_loggers": False}
    assert options["timeout_keep_alive"] == 75


def test_vllms_variable_for_kept_connections_holds(http: HttpLayer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "9")
    assert http.serve_options(vllm_alone([]), keep_alive_seconds=75)["timeout_keep_alive"] == 9


@pytest.fixture
def engine_started(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """A function that starts a fake engine and returns the arguments that vLLM got on the way."""

    def start(refusal: Exception | None = None, speculative: Any = None) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        config = SimpleNamespace(
            use_v2_model_runner=False,
            speculative_config=speculative,
            scheduler_config=SimpleNamespace(scheduler_cls=None),
            additional_config={SETTINGS: {}},
        )

        class Arguments:
            @classmethod
            def from_cli_args(cls, arguments: Namespace) -> "Arguments":
                return cls()

            def create_engine_config(self, usage_context: UsageContext | None = None) -> Any:
                seen["configuration"] = usage_context
                if refusal is not None:
                    raise refusal
                return config

        def from_vllm_config(config: Any, usage_context: UsageContext, **options: Any) -> None:
            seen["engine"] = usage_context

        monkeypatch.setattr(gateway, "AsyncEngineArgs", Arguments)
        monkeypatch.setattr(gateway.CooperativeEngine, "from_vllm_config", from_vllm_config)
        gateway._engine(vllm_alone([]))
        return seen

    return start


def test_the_engine_is_configured_as_vllms_own_server_configures_it(
    engine_started: Callable[..., dict[str, Any]],
) -> None:
    """On an H100, the default batch is four times as large with the usage context of a server."""
    server = UsageContext.OPENAI_API_SERVER
    assert engine_started() == {"configuration": server, "engine": server}


def test_a_configuration_that_vllm_refuses_is_one_line(engine_started: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match=r"^vllm: too long: 9 is more than 8$"):
        engine_started(refusal=ValueError("too long:\n  9 is more than 8\n"))


def test_a_student_that_speculates_is_refused_before_it_is_loaded(
    engine_started: Callable[..., dict[str, Any]],
) -> None:
    with pytest.raises(ConfigError, match="vllm's speculative-config is not supported"):
        engine_started(speculative=SimpleNamespace(method="ngram"))


# TLS


def certificate(directory: Path, password: bytes | None = None) -> dict[str, str]:
    """A key and a self-signed certificate for 127.0.0.1."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "gateway")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    encoded = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    (directory / "key.pem").write_bytes(encoded)
    (directory / "cert.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    (directory / "both.pem").write_bytes(encoded + signed.public_bytes(serialization.Encoding.PEM))
    return {"ssl-keyfile": str(directory / "key.pem"), "ssl-certfile": str(directory / "cert.pem")}


async def until_started(app: Starlette, serving: asyncio.Task[Any]) -> None:
    while not (hasattr(app.state, "server") and app.state.server.started):
        await asyncio.wait([serving], timeout=0.001)
        assert not serving.done(), serving.exception()


@asynccontextmanager
async def served(http: HttpLayer, settings: dict[str, Any]) -> AsyncIterator[str]:
    """vLLM's server with an app that answers with the scheme of its request; yields its address."""
    app = Starlette(routes=[Route("/", lambda request: PlainTextResponse(request.url.scheme))])
    app.state.engine_client = None
    arguments = http.parse({"model": "m", "host": "127.0.0.1", "port": 0, **settings})
    address, socket = http.listen(arguments)
    port = socket.getsockname()[1]
    options = http.serve_options(arguments, keep_alive_seconds=1)
    task = asyncio.create_task(http.serve_http(app, sock=socket, **options))
    try:
        await until_started(app, task)
        yield f"{address.rpartition(':')[0]}:{port}"
    finally:
        app.state.server.should_exit = True
        await (await task)
        socket.close()


@pytest.mark.parametrize("one_file", [False, True])
async def test_a_gateway_with_a_certificate_speaks_https(
    http: HttpLayer, tmp_path: Path, one_file: bool
) -> None:
    settings = certificate(tmp_path)
    if one_file:
        settings = {"ssl-certfile": str(tmp_path / "both.pem")}
    trust = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
    async with served(http, settings) as url, httpx.AsyncClient(verify=trust) as client:
        assert url.startswith("https://127.0.0.1:")
        assert (await client.get(url)).text == "https"
        with pytest.raises(httpx.HTTPError):
            await client.get(url.replace("https", "http"))


async def test_without_a_certificate_it_speaks_http(http: HttpLayer) -> None:
    async with served(http, {}) as url, httpx.AsyncClient() as client:
        assert url.startswith("http://127.0.0.1:")
        assert (await client.get(url)).text == "http"


def test_a_key_with_a_password_is_refused(http: HttpLayer, tmp_path: Path) -> None:
    assert "the key has a password" in refusal(http, certificate(tmp_path, password=b"secret"))


def test_a_key_of_another_certificate_is_refused(http: HttpLayer, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        certificate(tmp_path / name)
    files = {"ssl-keyfile": str(tmp_path / "one/key.pem"), "ssl-certfile": str(tmp_path / "two/cert.pem")}
    assert "vllm's TLS settings cannot be used" in refusal(http, files)


def test_an_address_in_use_is_refused_in_one_line(http: HttpLayer, monkeypatch: pytest.MonkeyPatch) -> None:
    def setup_server(*_: Any, **__: Any) -> None:
        raise OSError(98, "Address already in use")

    monkeypatch.setattr(http, "_setup_server", setup_server)
    with pytest.raises(ConfigError, match=r"^vllm: \[Errno 98\] Address already in use$"):
        http.listen(http.parse({}))
