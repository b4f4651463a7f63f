"""Modules that may load each other at run time; test_packaging reads the import statements."""

import subprocess
import sys

from tests.helpers.paths import ROOT

SERVING = ("vllm", "fastapi", "starlette", "uvicorn", "server", "training", "transformers")


def loaded(program: str, *modules: str) -> set[str]:
    """The modules, out of those named, that a fresh interpreter has loaded at a program's end."""
    report = f"\nimport sys; print(*({set(modules)!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program + report], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_the_router_loads_neither_engine_nor_http():
    program = (
        "import importlib, pkgutil, router\n"
        "names = [m.name for m in pkgutil.walk_packages(router.__path__, 'router.')]\n"
        "assert {'router.budget', 'router.checkpoint', 'router.gate'} <= set(names), names\n"
        "for name in names: importlib.import_module(name)"
    )
    assert loaded(program, *SERVING) == set()


def test_budgets_and_prices_need_no_torch():
    assert loaded("import router.budget, router.policy", "torch", *SERVING) == set()


def test_gates_load_numba_only_to_read_logits_on_a_cpu():
    assert loaded("import router.checkpoint", "numba") == set()


def test_help_loads_neither_torch_nor_vllm():
    program = "import wheels; wheels.main(['--help'])"
    assert loaded(program, "torch", "server", "router", "training", *SERVING) == set()


def test_middleware_and_configuration_load_neither_torch_nor_vllm():
    """The middleware and the configuration can be checked and tested without an engine."""
    program = "import server.http.fields, server.config, server.metrics"
    assert loaded(program, "torch", "transformers", "vllm") == set()
