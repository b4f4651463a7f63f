"""Checks vLLM's server arguments: one that a gateway cannot support stops the start with one line."""

import ssl
from argparse import Action, Namespace
from collections.abc import Mapping

from server.config import ConfigError
from server.vllm_flags import setting_name


def check_arguments(arguments: Namespace) -> None:
    """Raises ConfigError if a gateway cannot support one of vLLM's arguments."""
    _refuse_what_one_gateway_cannot_do(arguments)
    _check_adapters(arguments)
    _check_tls(arguments)


def check_fixed(
    settings: Mapping[str, object], fixed: Mapping[str, object], actions: Mapping[str, Action]
) -> None:
    """Raises ConfigError if the operator sets what the gateway sets itself, in any spelling.

    Args:
        settings: the operator's settings, by flag name.
        fixed: the gateway's own settings, by flag name.
        actions: actions of vLLM's parser, by flag.
    """
    ours = {_destination(name, actions) for name in fixed}
    if clash := [name for name in settings if _destination(name, actions) in ours]:
        names = ", ".join(sorted(setting_name(name) for name in clash))
        raise ConfigError(f"leave out these vllm settings, because the gateway sets them: {names}")


def one_line(message: object) -> str:
    """The message on one line; pydantic and argparse use several lines."""
    return " ".join(str(message).split())


def _destination(name: str, actions: Mapping[str, Action]) -> str:
    """Name in vLLM of the argument that a flag sets, in any of its spellings."""
    flag = setting_name(name).partition(".")[0]
    action = actions.get(flag if flag.startswith("-") else f"--{flag}")
    return flag if action is None else action.dest


def _refuse_what_one_gateway_cannot_do(arguments: Namespace) -> None:
    reasons = {
        "config": "put vLLM's settings under `vllm` of the gateway's own file",
        "headless": "a gateway serves HTTP",
        "grpc": "a gateway serves HTTP",
        "grpc_port": "a gateway serves HTTP",
        "tokens_only": "a gateway serves the OpenAI API",
        "data_parallel_multi_port_external_lb": "start one gateway for each rank",
    }
    for name, reason in reasons.items():
        if getattr(arguments, name, None) not in (None, False):
            raise ConfigError(f"vllm's {name.replace('_', '-')} is not supported: {reason}")
    if arguments.api_server_count not in (None, 1):
        raise ConfigError(
            "vllm's api-server-count is not supported: a gateway is one process; start several gateways"
        )


def _check_adapters(arguments: Namespace) -> None:
    """Raises ConfigError if two models have the same name."""
    names = set(arguments.served_model_name or ())
    for adapter in arguments.lora_modules or ():
        if adapter.name in names:
            raise ConfigError(f"vllm's lora-modules: two models named {adapter.name}")
        names.add(adapter.name)


def _check_tls(arguments: Namespace) -> None:
    """Load certificate and key once, before the slow start of the engine. Raises ConfigError if it fails."""
    if arguments.ssl_certfile is None:
        unused = ("ssl_keyfile", "ssl_ca_certs", "ssl_ciphers")
        if given := [name.replace("_", "-") for name in unused if getattr(arguments, name) is not None]:
            raise ConfigError(f"vllm's {given[0]} needs ssl-certfile")
        if arguments.enable_ssl_refresh:
            raise ConfigError("vllm's enable-ssl-refresh needs ssl-certfile and ssl-keyfile")
        return
    if arguments.enable_ssl_refresh and arguments.ssl_keyfile is None:
        raise ConfigError("vllm's enable-ssl-refresh needs ssl-keyfile")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(arguments.ssl_certfile, arguments.ssl_keyfile, password=_no_password)
        if arguments.ssl_ca_certs is not None:
            context.load_verify_locations(arguments.ssl_ca_certs)
        if arguments.ssl_ciphers is not None:
            context.set_ciphers(arguments.ssl_ciphers)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        files = ", ".join(
            str(file)
            for file in (arguments.ssl_certfile, arguments.ssl_keyfile, arguments.ssl_ca_certs)
            if file is not None
        )
        raise ConfigError(f"vllm's TLS settings cannot be used ({files}): {error}") from error


def _no_password() -> str:
    raise ValueError("the key has a password: use a key without one")
