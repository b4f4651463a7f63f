import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from router.checkpoint import (
    MERGED_ROUTER,
    CheckpointError,
    RouterCheckpoint,
    RouterConfig,
    fingerprint,
    tokenizer_fingerprint,
)
from router.gate import GATES
from router.words import BudgetWords

# The pair of the `reserved` and `router` fixtures: 10 visible rows, 4 reserved ones, 4 hidden units.
ROWS, HIDDEN, START = 14, 4, 10


def student_tensors(tied: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = ["model.embed_tokens.weight", "model.norm.weight", *([] if tied else ["lm_head.weight"])]
    shapes = {"model.norm.weight": (HIDDEN,)}
    return {name: torch.randn(shapes.get(name, (ROWS, HIDDEN)), generator=generator) for name in names}


def write_student(directory: Path, *, tied: bool, sharded: bool) -> Path:
    directory.mkdir()
    tensors = student_tensors(tied)
    if sharded:
        files = {name: f"model-{i}-of-{len(tensors)}.safetensors" for i, name in enumerate(tensors, start=1)}
        for name, file in files.items():
            save_file({name: tensors[name]}, directory / file, metadata={"format": "pt"})
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    else:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps({"vocab_size": ROWS, "tie_word_embeddings": tied}))
    (directory / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 1}}}')
    return directory


def all_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.fixture(params=[(True, False), (False, False), (True, True), (False, True)], ids=str)
def student(request, tmp_path) -> Path:
    tied, sharded = request.param
    return write_student(tmp_path / "student", tied=tied, sharded=sharded)


@pytest.fixture
def plain_student(tmp_path) -> Path:
    return write_student(tmp_path / "student", tied=False, sharded=False)


def trained_for(router: RouterCheckpoint, student: Path) -> RouterCheckpoint:
    prints = router.config.fingerprints.model_copy(update={"student": fingerprint(student, START)})
    return replace(router, config=router.config.model_copy(update={"fingerprints": prints}))


# Saving and loading


def test_a_loaded_router_equals_the_saved_one(router, tmp_path):
    router.save(tmp_path / "new" / "router")
    loaded = RouterCheckpoint.load(tmp_path / "new" / "router")
    assert loaded.config == router.config
    assert torch.equal(loaded.taps, router.taps)
    assert loaded.gate.keys() == router.gate.keys()
    assert all(torch.equal(loaded.gate[name], router.gate[name]) for name in router.gate)


@pytest.mark.parametrize(
    "facts",
    [
        {"gain": "excess", "seed": 0, "task": "numbers"},  # an older one
        {"objective": "constrained", "rounds": 8, "data": "ab", "duals": [(0.1, 0.5), (0.9, -0.25)]},
    ],
)
def test_facts_about_the_training_are_kept(router, facts, tmp_path):
    told = replace(router, config=router.config.model_copy(update={"training": facts}))
    told.save(tmp_path)
    loaded = RouterCheckpoint.load(tmp_path)
    assert loaded.config.training == facts
    assert loaded.digest() == told.digest()


def test_an_older_checkpoint_is_read_without_its_value_heads(router, tmp_path):
    router.save(tmp_path)
    edit_tensors(tmp_path, **{"value.linear.weight": torch.ones(1, HIDDEN)})
    assert RouterCheckpoint.load(tmp_path).digest() == router.digest()


def test_a_loaded_gate_decides_as_the_saved_one(router, tmp_path):
    router.save(tmp_path)
    logits = torch.randn(5, ROWS, generator=torch.Generator().manual_seed(0))
    assert torch.equal(RouterCheckpoint.load(tmp_path).build_gate()(logits), router.build_gate()(logits))


def test_a_built_gate_is_for_inference(router):
    gate = router.build_gate()
    assert not gate.training
    assert not any(parameter.requires_grad for parameter in gate.parameters())


def test_the_reserved_rows_are_the_configs(router, reserved):
    assert router.reserved == reserved
    assert router.build_gate("margin").reserved == reserved


@pytest.mark.parametrize("name", GATES)
def test_every_gate_can_be_built_by_name(router, name):
    assert type(router.build_gate(name)) is GATES[name]


def test_an_unknown_gate_is_refused(router):
    with pytest.raises(CheckpointError, match="unknown gate 'oracle'; known: learned, random"):
        router.build_gate("oracle")


def test_only_calibrated_gates_have_a_price(router):
    assert router.calibration().price(0.2) == pytest.approx(3.0)
    with pytest.raises(CheckpointError, match="no calibration for gate 'entropy', only for: learned"):
        router.calibration("entropy")


def test_the_digest_tells_routers_apart(router, tmp_path):
    router.save(tmp_path)
    assert RouterCheckpoint.load(tmp_path).digest() == router.digest()
    others = [
        replace(router, taps=router.taps + 1),
        replace(router, gate={**router.gate, "mlp.4.bias": torch.tensor([1.0])}),
        replace(router, config=router.config.model_copy(update={"span_tokens": 5})),
    ]
    assert len({router.digest(), *(other.digest() for other in others)}) == 4


# What is not a router


def edit_config(directory: Path, **changes: object) -> None:
    file = directory / "router.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(directory: Path, **changes: torch.Tensor | None) -> None:
    file = directory / "router.safetensors"
    tensors = load_file(file) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


BROKEN = {
    "config missing": (lambda d: (d / "router.json").unlink(), "router.json"),
    "tensors missing": (lambda d: (d / "router.safetensors").unlink(), "router.safetensors"),
    "config empty": (lambda d: (d / "router.json").write_text(""), "router.json"),
    "config no json": (lambda d: (d / "router.json").write_text("{"), "router.json"),
    "config no text": (lambda d: (d / "router.json").write_bytes(b"\xff\xfe\x00"), "router.json"),
    "config a list": (lambda d: (d / "router.json").write_text("[]"), "router.json"),
    "another format": (lambda d: edit_config(d, format=2), "router.json"),
    "unknown key": (lambda d: edit_config(d, prise=3), "router.json"),
    "wrong type": (lambda d: edit_config(d, span_tokens="four"), "router.json"),
    "no span": (lambda d: edit_config(d, span_tokens=0), "router.json"),
    "fingerprint missing": (lambda d: edit_config(d, fingerprints={"student": "0"}), "router.json"),
    "unknown fingerprint": (
        lambda d: edit_config(d, fingerprints=dict.fromkeys(["student", "tokenizer", "teacher", "cat"], "0")),
        "router.json",
    ),
    "rates fall": (lambda d: edit_config(d, calibration={"margin": [[0.2, 1], [0.1, 2]]}), "calibration"),
    "no points": (lambda d: edit_config(d, calibration={"margin": []}), "calibration"),
    "tensors empty": (lambda d: (d / "router.safetensors").write_bytes(b""), "router.safetensors"),
    "tensors garbage": (lambda d: (d / "router.safetensors").write_bytes(b"x" * 99), "router.safetensors"),
    "tensors cut": (
        lambda d: (d / "router.safetensors").write_bytes((d / "router.safetensors").read_bytes()[:-8]),
        "router.safetensors",
    ),
    "no taps": (lambda d: edit_tensors(d, taps=None), "router.safetensors: taps"),
    "taps of other rows": (lambda d: edit_tensors(d, taps=torch.ones(4, HIDDEN)), "taps must be .3, H."),
    "taps a vector": (lambda d: edit_tensors(d, taps=torch.ones(3)), "router.safetensors: taps"),
    "unknown tensor": (lambda d: edit_tensors(d, gait=torch.ones(1)), "unknown tensor 'gait'"),
    "gate incomplete": (lambda d: edit_tensors(d, **{"gate.mean": None}), "mean"),
    "gate of another width": (lambda d: edit_config(d, gate_width=3), "size mismatch"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_malformed_checkpoint_is_refused_by_name(router, tmp_path, case):
    spoil, named = BROKEN[case]
    router.save(tmp_path)
    spoil(tmp_path)
    with pytest.raises(CheckpointError, match=named) as refusal:
        RouterCheckpoint.load(tmp_path)
    assert str(tmp_path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_directory_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no router checkpoint in .*nowhere"):
        RouterCheckpoint.load(tmp_path / "nowhere")


# Merging


def test_a_merge_writes_the_taps_and_nothing_else(router, student, tmp_path):
    router, before, merged = trained_for(router, student), all_tensors(student), tmp_path / "new" / "merged"
    router.merge(student, merged)
    after = all_tensors(merged)
    output = "lm_head.weight" if "lm_head.weight" in before else "model.embed_tokens.weight"
    expected = before[output].clone()
    expected[11:14] = router.taps
    assert torch.equal(after.pop(output), expected)
    del before[output]
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_merge_links_every_file_but_one_and_leaves_the_student_alone(router, student, tmp_path):
    before, merged = contents(student), tmp_path / "merged"
    trained_for(router, student).merge(student, merged)
    assert contents(student) == before
    assert contents(merged).keys() == before.keys()
    (rewritten,) = [name for name in before if not (merged / name).is_symlink()]
    assert rewritten.endswith(".safetensors")
    assert all(contents(merged)[name] == before[name] for name in before if name != rewritten)
    with safe_open(merged / rewritten, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_merged_student_is_the_same_student(router, student, tmp_path):
    router = trained_for(router, student)
    router.merge(student, tmp_path / "merged")
    assert fingerprint(tmp_path / "merged", START) == fingerprint(student, START)
    router.check_student(tmp_path / "merged")


def test_a_merged_student_brings_its_router(router, plain_student, tmp_path):
    router = trained_for(router, plain_student)
    router.merge(plain_student, tmp_path / "merged")
    assert RouterCheckpoint.load(tmp_path / "merged" / MERGED_ROUTER).digest() == router.digest()
    # vLLM loads every *.safetensors next to config.json: the router's must not be there
    assert [file.name for file in (tmp_path / "merged").glob("*.safetensors")] == ["model.safetensors"]


def test_a_merged_student_can_get_another_router(router, plain_student, tmp_path):
    first = trained_for(router, plain_student)
    second = replace(first, taps=first.taps + 100)
    first.merge(plain_student, tmp_path / "first")
    second.merge(tmp_path / "first", tmp_path / "second")
    assert torch.equal(all_tensors(tmp_path / "second")["lm_head.weight"][11:], second.taps)
    assert RouterCheckpoint.load(tmp_path / "second" / MERGED_ROUTER).digest() == second.digest()


def test_a_merge_leaves_an_existing_copy_alone(router, plain_student, tmp_path):
    """The existing copy is another gateway's, which may be loading from it just now."""
    merged, router = tmp_path / "merged", trained_for(router, plain_student)
    router.merge(plain_student, merged)
    before = contents(merged)
    replace(router, taps=router.taps + 1).merge(plain_student, merged)
    assert contents(merged) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "student"]


def test_concurrent_merges_leave_one_copy_that_stays(router, plain_student, tmp_path):
    merged, router = tmp_path / "merged", trained_for(router, plain_student)

    def merge(_: int) -> int:
        router.merge(plain_student, merged)
        return (merged / MERGED_ROUTER).stat().st_ino

    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(merge, range(32)))) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "student"]


def test_a_merged_matrix_keeps_its_type(router, plain_student, tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in student_tensors(tied=False).items()}
    save_file(tensors, plain_student / "model.safetensors")
    trained_for(router, plain_student).merge(plain_student, tmp_path / "merged")
    head = all_tensors(tmp_path / "merged")["lm_head.weight"]
    assert head.dtype == torch.bfloat16
    assert torch.equal(head[11:], router.taps.bfloat16())


def test_a_router_of_another_student_is_refused(router, plain_student, tmp_path):
    with pytest.raises(CheckpointError, match=r"trained for student 0{12}, but .*student is"):
        router.merge(plain_student, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(("rows", "hidden"), [(4, HIDDEN + 1), (3, HIDDEN)])
def test_taps_of_another_shape_are_refused(router, plain_student, tmp_path, rows, hidden):
    config = router.config.model_copy(update={"reserved_count": rows})
    router = trained_for(replace(router, taps=torch.ones(rows - 1, hidden), config=config), plain_student)
    with pytest.raises(CheckpointError, match="the taps need an output matrix of"):
        router.merge(plain_student, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["student"]  # no scratch is left behind


def test_a_student_without_weights_is_refused(router, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no \*.safetensors weights in .*empty"):
        router.merge(tmp_path / "empty", tmp_path / "merged")


def test_a_student_without_an_output_matrix_is_refused(router, plain_student, tmp_path):
    save_file({"model.norm.weight": torch.ones(HIDDEN)}, plain_student / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"none of lm_head.weight, model.embed_tokens.weight in"):
        trained_for(router, plain_student).merge(plain_student, tmp_path / "merged")


QUANTISED = {
    "packed": {"lm_head.qweight": torch.zeros(2, dtype=torch.int32), "lm_head.scales": torch.ones(2)},
    "scaled": {"lm_head.weight": torch.zeros(ROWS, HIDDEN), "lm_head.weight_scale": torch.ones(ROWS)},
    "eight bits": {"lm_head.weight": torch.zeros(ROWS, HIDDEN, dtype=torch.int8)},
    "float8": {"lm_head.weight": torch.zeros(ROWS, HIDDEN).to(torch.float8_e4m3fn)},
    "nested": {"language_model.lm_head.weight_packed": torch.zeros(2, dtype=torch.int32)},
}


@pytest.mark.parametrize("tensors", QUANTISED.values(), ids=QUANTISED)
@pytest.mark.parametrize("sharded", [False, True])
def test_taps_never_go_into_the_input_matrix_of_a_quantised_model(router, tmp_path, tensors, sharded):
    student = write_student(tmp_path / "student", tied=True, sharded=sharded)
    save_file(tensors, student / "head.safetensors")
    index = student / "model.safetensors.index.json"
    if sharded:
        files = json.loads(index.read_text())["weight_map"] | dict.fromkeys(tensors, "head.safetensors")
        index.write_text(json.dumps({"weight_map": files}))
    before = contents(student)
    with pytest.raises(CheckpointError, match=r"the output matrix of .*student is quantised \(.*lm_head"):
        trained_for(router, student).merge(student, tmp_path / "merged")
    assert contents(student) == before
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": True}, {"text_config": {}}])
def test_an_input_matrix_that_may_be_tied_takes_the_taps(router, tmp_path, config):
    student = write_student(tmp_path / "student", tied=True, sharded=False)
    (student / "config.json").write_text(json.dumps(config))
    trained_for(router, student).merge(student, tmp_path / "merged")
    merged = all_tensors(tmp_path / "merged")["model.embed_tokens.weight"]
    assert torch.equal(merged[11:], router.taps)


@pytest.mark.parametrize(
    "config", [{"tie_word_embeddings": False}, {"text_config": {"tie_word_embeddings": False}}]
)
def test_an_input_matrix_that_is_not_tied_takes_no_taps(router, tmp_path, config):
    student = write_student(tmp_path / "student", tied=True, sharded=False)
    (student / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"not tied to model\.embed_tokens, and not in its files"):
        trained_for(router, student).merge(student, tmp_path / "merged")


def test_a_quantised_input_matrix_is_refused(router, tmp_path):
    student = write_student(tmp_path / "student", tied=True, sharded=False)
    save_file({"model.embed_tokens.weight_scale": torch.ones(2)}, student / "scales.safetensors")
    with pytest.raises(CheckpointError, match=r"quantised \(model\.embed_tokens\.weight_scale\)"):
        trained_for(router, student).merge(student, tmp_path / "merged")


@pytest.mark.parametrize("name", ["language_model.lm_head", "model.language_model.embed_tokens"])
def test_a_nested_language_model_takes_the_taps(router, tmp_path, name):
    student = write_student(tmp_path / "student", tied=True, sharded=False)
    save_file({f"{name}.weight": torch.randn(ROWS, HIDDEN)}, student / "model.safetensors")
    trained_for(router, student).merge(student, tmp_path / "merged")
    assert torch.equal(all_tensors(tmp_path / "merged")[f"{name}.weight"][11:], router.taps)
    assert fingerprint(tmp_path / "merged", START) == fingerprint(student, START)


def test_a_merge_that_fails_leaves_nothing_behind(router, plain_student, tmp_path):
    router, merged = trained_for(router, plain_student), tmp_path / "merged"
    with pytest.raises(AttributeError):
        replace(router, gate={"broken": None}).merge(plain_student, merged)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


# Fingerprints


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_a_fingerprint_sees_every_tensor(plain_student, name):
    before = fingerprint(plain_student, START)
    tensors = student_tensors(tied=False)
    tensors[name].view(-1)[0] += 1  # a visible row
    save_file(tensors, plain_student / "model.safetensors")
    assert fingerprint(plain_student, START) != before


def test_a_fingerprint_does_not_depend_on_the_files(tmp_path):
    one = write_student(tmp_path / "one", tied=False, sharded=False)
    many = write_student(tmp_path / "many", tied=False, sharded=True)
    assert fingerprint(one, START) == fingerprint(many, START)


def test_a_fingerprint_depends_on_names_shapes_and_types(plain_student):
    prints = set()
    for name, shape in (("a", (4,)), ("b", (4,)), ("a", (2, 2)), ("a", (4, 1))):
        save_file({name: torch.ones(shape)}, plain_student / "model.safetensors")
        prints.add(fingerprint(plain_student, START))
    save_file({"a": torch.ones(4).view(torch.int32)}, plain_student / "model.safetensors")  # the same bytes
    prints.add(fingerprint(plain_student, START))
    assert len(prints) == 5


def test_a_fingerprint_reads_the_bytes_of_every_type(plain_student):
    prints = {fingerprint(plain_student, START)}
    for dtype in (torch.bfloat16, torch.float16):
        tensors = {name: tensor.to(dtype) for name, tensor in student_tensors(tied=False).items()}
        save_file(tensors, plain_student / "model.safetensors")
        prints.add(fingerprint(plain_student, START))
    assert len(prints) == 3


def write_tokenizer(directory: Path, model: object, added: list[dict] | None = None) -> Path:
    directory.mkdir()
    document = {"model": {"vocab": model}} | ({} if added is None else {"added_tokens": added})
    (directory / "tokenizer.json").write_text(json.dumps(document))
    return directory


def test_a_tokenizer_is_known_by_its_tokens_and_ids(tmp_path):
    prints = [
        tokenizer_fingerprint(write_tokenizer(tmp_path / str(i), *parts))
        for i, parts in enumerate(
            [
                ({"a": 0, "b": 1},),
                ({"b": 1, "a": 0}, []),  # the order of the file does not matter
                ([["a", -1.0], ["b", -2.0]],),  # unigram models list token and score by id
                ({"a": 0}, [{"content": "b", "id": 1}]),  # nor where a token is defined
                ({"a": 1, "b": 0},),
                ({"a": 0, "b": 1}, [{"content": "c", "id": 2}]),
            ]
        )
    ]
    assert prints[0] == prints[1] == prints[2] == prints[3]
    assert len(set(prints)) == 3


def test_a_tokenizer_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no tokenizer.json in"):
        tokenizer_fingerprint(tmp_path)


@pytest.mark.parametrize("template", ["no field", "{share} %", "{percent} of {share}", "{percent", "{}"])
def test_a_budget_prompt_has_one_field(router, template):
    with pytest.raises(ValidationError, match="budget_prompt"):
        RouterConfig.model_validate(router.config.model_dump() | {"budget_prompt": template})


def test_budgets_in_words_are_those_that_the_gate_was_calibrated_for(router):
    assert router.config.words is None
    points = [(0.05, 1.0), (0.1, 0.5)]
    update = {"budget_prompt": "At most {percent} %. ", "calibration": {"learned": points}}
    words = router.config.model_copy(update=update).words
    assert words == BudgetWords("At most {percent} %. ", [0.05, 0.1])


def test_budgets_in_words_need_a_calibration(router):
    update = {"budget_prompt": "At most {percent} %. ", "calibration": {}}
    with pytest.raises(ValidationError, match="budget_prompt: the learned gate has no calibration"):
        RouterConfig.model_validate(router.config.model_dump() | update)
