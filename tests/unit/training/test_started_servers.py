"""Servers that the router's stage starts by itself: their commands, the changed recipe, and their end."""

import sys
from pathlib import Path

import httpx
import pytest

from measuring.gateway import GatewayError
from measuring.pair import free_port
from measuring.processes import Service, ServiceError
from training.config import RecipeError, load_recipe
from training.model_config import ServedConfig
from training.record import router_record
from training.started_servers import Servers, StartedTeacher, started, to_start, with_addresses
from training.workspace import Workspace

STAND_IN = """
import os, sys
from http.server import HTTPServer, SimpleHTTPRequestHandler

class Handler(SimpleHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/end":
            print("out of memory", flush=True)
            os._exit(9)
        super().do_GET()

HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
RECIPE = """
output: {output}
work: {work}
threads: 2
task: {{name: numbers}}
teacher: {{pretrained: {output}/teacher, dtype: bfloat16}}
student: {{pretrained: {output}/student}}
router:
  {{span_tokens: 1, ask_tokens: 1, gain: {{type: regret}}, rollouts: {{type: gateway}}}}
"""


@pytest.fixture
def recipe_file(untrained_pair: Path, tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(output=untrained_pair, work=tmp_path / "work"))
    return file


def workspace(file: Path, *overrides: str) -> Workspace:
    return Workspace(load_recipe(file, list(overrides)))


def planned(space: Workspace) -> Servers:
    return to_start(space, space.recipe.router.rollouts)


def values(command: list[str], flag: str) -> list[str]:
    return [command[place + 1] for place, word in enumerate(command) if word == flag]


def test_teacher_and_gateway_have_the_models_of_the_output_directory(
    recipe_file: Path, untrained_pair: Path
) -> None:
    servers = planned(workspace(recipe_file))
    teacher, gateway = servers.services
    assert values(teacher.command, "--model") == [str(untrained_pair / "teacher")]
    assert values(gateway.command, "--student") == [str(untrained_pair / "student")]
    assert values(gateway.command, "--teacher") == [servers.teacher.url]
    assert values(gateway.command, "--router") == [str(servers.router)]
    assert values(teacher.command, "--dtype")[-1] == "bfloat16", "the last one counts"
    assert values(gateway.command, "--dtype")[-1] == "float32"
    for service in servers.services:
        assert values(service.command, "--host") == ["127.0.0.1"]
        assert "VLLM_API_KEY" in service.hidden


@pytest.mark.parametrize(("threads", "each"), [(1, 1), (2, 1), (8, 4)])
def test_both_engines_share_the_threads_of_the_recipe(recipe_file: Path, threads: int, each: int) -> None:
    for service in planned(workspace(recipe_file, f"threads={threads}")).services:
        assert service.environment["OMP_NUM_THREADS"] == str(each)


def test_a_teacher_behind_a_url_is_not_started(recipe_file: Path) -> None:
    servers = planned(workspace(recipe_file, "teacher={url: 'http://there:8000', model: big}"))
    (gateway,) = servers.services
    assert values(gateway.command, "--teacher") == ["http://there:8000"]
    assert values(gateway.command, "--teacher-model") == ["big"]


def test_flags_reach_the_engine_that_they_are_for(recipe_file: Path) -> None:
    rollouts = "{type: gateway, teacher_flags: [--max-model-len, '64'], student_flags: [--seed, '7']}"
    teacher, gateway = planned(workspace(recipe_file, f"router.rollouts={rollouts}")).services
    assert values(teacher.command, "--max-model-len")[-1] == "64"
    assert values(gateway.command[gateway.command.index("--") :], "--seed") == ["7"]


def test_the_gateway_begins_without_the_router_of_an_earlier_start(recipe_file: Path) -> None:
    space = workspace(recipe_file)
    (planned(space).router / "router.json").write_text("{}")
    assert list(planned(space).router.iterdir()) == []


def test_a_missing_model_is_named(recipe_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no teacher in .*nowhere/teacher: train it first"):
        planned(workspace(recipe_file, f"output={tmp_path}/nowhere"))


def test_answers_of_a_started_teacher_are_kept_by_its_directory(recipe_file: Path) -> None:
    """The teacher's port differs at each start."""
    first, second = (planned(workspace(recipe_file)).teacher for _ in range(2))
    assert isinstance(first, StartedTeacher)
    assert first.url != second.url
    assert first.known_as == second.known_as


def test_a_gateway_that_runs_is_left_alone(recipe_file: Path) -> None:
    space = workspace(recipe_file, "router.rollouts.url=http://there", "router.rounds=null")
    with with_addresses(space) as served:
        assert served is space


def stand_ins(directory: Path) -> Servers:
    """Stand-ins for a gateway and a teacher; each one ends at a request for `/end`."""
    urls = []
    services = []
    for name in ("teacher", "gateway"):
        port = free_port()
        urls.append(f"http://127.0.0.1:{port}")
        command = (sys.executable, "-c", STAND_IN, str(port))
        services.append(Service(name, command, urls[-1], directory / f"{name}.log"))
    return Servers(services, ServedConfig(url=urls[0]), urls[1], directory / "router", directory)


def answers(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.TransportError:
        return False


def test_the_stage_has_the_addresses_as_long_as_the_servers_run(recipe_file: Path, tmp_path: Path) -> None:
    space = workspace(recipe_file)
    with started(space, stand_ins(tmp_path)) as served:
        recipe = served.recipe
        urls = (recipe.teacher.url, recipe.router.rollouts.url)
        assert list(map(answers, urls)) == [True, True]
        assert recipe.router.rollouts.router == tmp_path / "router"
        assert served.exported("student") == space.exported("student")
    assert list(map(answers, urls)) == [False, False]


def test_ctrl_c_ends_the_servers(recipe_file: Path, tmp_path: Path) -> None:
    servers = stand_ins(tmp_path)
    with pytest.raises(KeyboardInterrupt), started(workspace(recipe_file), servers):
        raise KeyboardInterrupt
    assert not answers(servers.gateway)
    assert not answers(servers.teacher.url)


def test_a_server_that_dies_is_explained_by_its_log(recipe_file: Path, tmp_path: Path) -> None:
    servers = stand_ins(tmp_path)
    explained = pytest.raises(ServiceError, match=r"the gateway ended with status 9(.|\n)*out of memory")
    with explained, started(workspace(recipe_file), servers):
        assert not answers(f"{servers.gateway}/end")
        raise GatewayError("connection refused")
    assert not answers(servers.teacher.url)


def test_an_error_while_servers_run_names_their_logs(recipe_file: Path, tmp_path: Path) -> None:
    refused = pytest.raises(GatewayError, match="too long")
    with refused as raised, started(workspace(recipe_file), stand_ins(tmp_path)):
        raise GatewayError("the prompt is too long")
    assert raised.value.__notes__ == [f"Logs: {tmp_path}"]


def test_flags_of_servers_that_are_not_started_are_refused(recipe_file: Path) -> None:
    running = "{type: gateway, url: 'http://there', router: there, student_flags: [--seed, '7']}"
    with pytest.raises(RecipeError, match="student_flags: no effect with url"):
        load_recipe(recipe_file, [f"router.rollouts={running}"])
    with pytest.raises(RecipeError, match="teacher_flags: no effect, because a teacher behind a URL"):
        load_recipe(
            recipe_file,
            ["router.rollouts.teacher_flags=[--seed, '7']", "teacher={url: 'http://there'}"],
        )
    with pytest.raises(RecipeError, match="router needs url"):
        load_recipe(recipe_file, ["router.rollouts.router=there"])


def test_the_addresses_of_servers_do_not_change_the_recipe(recipe_file: Path) -> None:
    """A run that began with servers of its own can continue with servers that somebody else started."""
    own = router_record(load_recipe(recipe_file, []))
    url = "router.rollouts={type: gateway, url: 'http://there', router: there, concurrency: 4}"
    assert router_record(load_recipe(recipe_file, [url])) == own
