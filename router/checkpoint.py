"""The router checkpoint: one directory with everything learned about a pair.

    router.json         `RouterConfig`: format, rows, span length, calibration, fingerprints
    router.safetensors  taps (count - 1, H) and gate.* tensors

It is joined with its student by `merge`, which writes the taps into the student's reserved rows;
the result is a plain Hugging Face directory that stock vLLM serves.
"""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from router.budget import TeacherName
from router.gate import GATES, Gate, LearnedGate, TeachersGate
from router.gate_names import LEARNED
from router.policy import Calibration, GateOutput
from router.problems import problems
from router.reserved import RESERVED_ROWS, ReservedRows
from router.rows import VOCABULARY_TENSORS, CheckpointError, VocabularyTensors, copied, opened
from router.words import BudgetWords, check_budget_prompt

CONFIG_FILE = "router.json"
TENSORS_FILE = "router.safetensors"
MERGED_ROUTER = "router"  # folder inside a merged student: vLLM loads every *.safetensors next to config.json
HEAD_BYTES = 4096
UNUSED = "value"
"""Prefix of tensors in older checkpoints, which nothing reads."""


class Fingerprints(BaseModel):
    """Identifies the pair a router was trained for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    student: str
    """`fingerprint` of the student's directory; the same before and after a merge."""
    tokenizer: str
    """`tokenizer_fingerprint` shared by the pair."""
    teacher: str
    """Name of the teacher, for the operator; a served teacher's weights cannot be seen."""

    @classmethod
    def of(cls, student: Path, reserved: ReservedRows, teacher: str) -> "Fingerprints":
        """The fingerprints of a student's directory and the name of its teacher."""
        return cls(
            student=fingerprint(student, reserved.start),
            tokenizer=tokenizer_fingerprint(student),
            teacher=teacher,
        )


Points = list[tuple[float, float]]
"""Pairs of (teacher rate, price)."""
Fact = float | int | str | Points
"""A setting, a figure, or pairs of (fraction, figure)."""


class TeacherOutput(BaseModel):
    """The learned gate's output for one of several teachers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: TeacherName
    """The teacher's name, as in the gateway's configuration."""
    cost: PositiveFloat
    """Cost of the teacher's token, in any one unit: the teacher's price is the common price times this."""
    calibration: Points = Field(default_factory=list)
    """Pairs of (teacher rate, price) if this is the only teacher that is asked; may be empty."""


class RouterConfig(BaseModel):
    """The contents of router.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    reserved_start: PositiveInt
    reserved_count: PositiveInt
    gate_width: PositiveInt
    span_tokens: PositiveInt
    """Longest span, and the credit of a request's bucket, see `router.budget.Bucket`."""
    ask_tokens: PositiveInt | None = None
    """Tokens of one teacher call; None: a whole span."""
    expected_tokens: PositiveFloat
    """Mean completion length on validation data, in tokens."""
    calibration: dict[str, Points]
    """Pairs of (teacher rate, price) by gate, see `router.policy.Calibration`."""
    spare: dict[str, Points] = Field(default_factory=dict)
    """Pairs of (fraction, spare price that realises it) by gate, see `router.policy.Policy`."""
    fingerprints: Fingerprints
    budget_prompt: str | None = None
    """Template of budgets in words, see `router.words`. If it is set, the calibration of the learned gate
    holds for prompts that have the words.
    """
    training: dict[str, Fact] = Field(default_factory=dict)
    """Facts about the training: objective, gain, seed, data. Serving reads none of them."""
    teachers: tuple[TeacherOutput, ...] = ()
    """Teachers in the order of the learned gate's outputs, from the cheapest to the dearest. The dearest one
    judged the others. Empty: the gate has one output, for any teacher.
    """

    @field_validator("budget_prompt")
    @classmethod
    def _has_percent(cls, template: str | None) -> str | None:
        return template if template is None else check_budget_prompt(template)

    @model_validator(mode="after")
    def _words_have_prices(self) -> Self:
        if self.budget_prompt is not None and not self.calibration.get(LEARNED):
            raise ValueError("budget_prompt: the learned gate has no calibration")
        return self

    @field_validator("teachers")
    @classmethod
    def _are_several(cls, teachers: tuple[TeacherOutput, ...]) -> tuple[TeacherOutput, ...]:
        if len(teachers) == 1:
            raise ValueError("set teachers only if there are several")
        if len({teacher.name for teacher in teachers}) < len(teachers):
            raise ValueError("two teachers have the same name")
        costs = [teacher.cost for teacher in teachers]
        if costs != sorted(costs):
            raise ValueError("teachers must be ordered by cost, the cheapest first")
        return teachers

    @model_serializer(mode="wrap")
    def _as_ever(self, dump: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Leave out ``teachers`` if it is empty: such a file looks as in older versions."""
        data = dump(self)
        if not self.teachers:
            data.pop("teachers", None)
        return data

    @property
    def words(self) -> BudgetWords | None:
        """The budgets in words that the student was trained with; None if it was trained without."""
        if self.budget_prompt is None:
            return None
        return BudgetWords(self.budget_prompt, [fraction for fraction, _ in self.calibration[LEARNED]])


@dataclass(frozen=True)
class RouterCheckpoint:
    """The contents of a router's files: settings, taps and the learned gate."""

    config: RouterConfig
    taps: Tensor
    """(reserved_count - 1, H), read-outs of the last hidden state (after the final norm)."""
    gate: dict[str, Tensor]
    """State dict of the `LearnedGate`."""

    @property
    def reserved(self) -> ReservedRows:
        """The student's reserved rows: the escalation token and the taps."""
        return ReservedRows(self.config.reserved_start, self.config.reserved_count)

    def build_gate(self, name: str = LEARNED) -> Gate:
        """The gate with this name (see `router.gate.GATES`), ready for inference.

        Raises:
            CheckpointError: no gate has this name.
        """
        if name not in GATES:
            raise CheckpointError(f"unknown gate {name!r}; known: {', '.join(GATES)}")
        if name != LEARNED:
            return GATES[name](self.reserved)
        return self.learned_gate()

    def learned_gate(self) -> LearnedGate:
        """The gate that was trained with the taps, ready for inference."""
        gate = new_gate(self.reserved, self.config.gate_width, [each.cost for each in self.config.teachers])
        gate.load_state_dict(self.gate)
        return gate.eval().requires_grad_(False)

    @property
    def outputs(self) -> tuple[GateOutput, ...]:
        """The learned gate's outputs, one for each of several teachers; empty if one is for all."""
        outputs = []
        for teacher in self.config.teachers:
            alone = Calibration(tuple(teacher.calibration)) if teacher.calibration else None
            outputs.append(GateOutput(teacher.name, teacher.cost, alone))
        return tuple(outputs)

    def check_teachers(self, names: Collection[str]) -> None:
        """Raises CheckpointError if the learned gate was trained to choose between other teachers."""
        trained = [teacher.name for teacher in self.config.teachers]
        if trained and set(trained) != set(names):
            raise CheckpointError(
                f"the router chooses between the teachers {', '.join(trained)}, and here the models are "
                f"{', '.join(names)}: give the teachers these names, or take a gate without training"
            )

    def calibration(self, name: str = LEARNED) -> Calibration:
        """The calibration of a gate. Raises CheckpointError if the router has none for it."""
        return self._calibrated(self.config.calibration, name)

    def spare(self, name: str = LEARNED) -> Calibration:
        """The spare prices of a gate. Raises CheckpointError if the router has none for it."""
        return self._calibrated(self.config.spare, name)

    @staticmethod
    def _calibrated(points: dict[str, Points], name: str) -> Calibration:
        if name not in points:
            known = ", ".join(points) or "none"
            raise CheckpointError(f"the router has no calibration for gate {name!r}, only for: {known}")
        return Calibration(tuple(points[name]))

    def save(self, directory: Path) -> None:
        """Write both files into the directory. Each appears complete, and `router.json` last."""
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {"taps": self.taps}
        tensors |= {f"gate.{name}": tensor for name, tensor in self.gate.items()}
        scratch = directory / f"{TENSORS_FILE}.tmp"
        save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, scratch)
        os.replace(scratch, directory / TENSORS_FILE)
        scratch = directory / f"{CONFIG_FILE}.tmp"
        scratch.write_text(self.config.model_dump_json(indent=1) + "\n")
        os.replace(scratch, directory / CONFIG_FILE)

    @classmethod
    def load(cls, directory: Path) -> "RouterCheckpoint":
        """The router in a directory.

        Raises:
            CheckpointError: a file is missing or malformed, a key is unknown, or a tensor has a wrong shape.
        """
        config_file = directory / CONFIG_FILE
        tensors_file = directory / TENSORS_FILE
        for file in (config_file, tensors_file):
            if not file.is_file():
                raise CheckpointError(f"no router checkpoint in {directory}: {file.name} is missing")
        try:
            config = RouterConfig.model_validate_json(config_file.read_bytes())
        except ValidationError as error:
            raise CheckpointError(f"{config_file}: {problems(error)}") from error
        try:
            tensors = load_file(tensors_file)
        except SafetensorError as error:
            raise CheckpointError(f"{tensors_file}: {error}") from error
        taps = tensors.pop("taps", None)
        if taps is None or taps.dim() != 2 or taps.shape[0] != config.reserved_count - 1:
            raise CheckpointError(f"{tensors_file}: taps must be ({config.reserved_count - 1}, H)")
        gate: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            part, _, key = name.partition(".")
            if part == "gate":
                gate[key] = tensor
            elif part != UNUSED:
                raise CheckpointError(f"{tensors_file}: unknown tensor {name!r}")
        checkpoint = cls(config=config, taps=taps, gate=gate)
        try:
            for name in config.calibration:
                checkpoint.calibration(name)
            for name in config.spare:
                checkpoint.spare(name)
            _ = checkpoint.outputs
            checkpoint.build_gate()
        except (ValueError, RuntimeError) as error:
            problem = " ".join(str(error).split())  # torch's message has several lines
            raise CheckpointError(f"{directory}: {problem}") from error
        return checkpoint

    def digest(self) -> str:
        """Hex SHA-256 that identifies this router and, by its fingerprint, its student."""
        digest = hashlib.sha256(self.config.model_dump_json().encode())
        for name, tensor in sorted({"taps": self.taps, **self.gate}.items()):
            digest.update(name.encode() + tensor.detach().contiguous().cpu().float().numpy().tobytes())
        return digest.hexdigest()

    def check_student(self, student: Path) -> None:
        """Raises CheckpointError if this router was trained for another student."""
        theirs = fingerprint(student, self.config.reserved_start)
        ours = self.config.fingerprints.student
        if theirs != ours:
            raise CheckpointError(
                f"the router was trained for student {ours[:12]}, but {student} is {theirs[:12]}; "
                "use the router that was trained with this student"
            )

    def merge(self, student: Path, out: Path) -> None:
        """Write ``student`` with the taps in its reserved rows to ``out``, all at once (see `copied`).

        A student that has no rows to spare gets new ones.

        Raises:
            CheckpointError: the router is for another student, or its rows and taps do not fit.
        """
        self.check_student(student)
        vocabulary = VocabularyTensors.of(student)
        if vocabulary.rows <= self.reserved.start:
            vocab_size: int | None = self.reserved.end
            tensors = vocabulary.grown(student, self.reserved.end)
        else:
            vocab_size = None
            tensors = vocabulary.read(student, vocabulary.outputs)
        for name in vocabulary.outputs:
            matrix = tensors[name]
            if matrix.shape != (self.reserved.end, self.taps.shape[1]):
                raise CheckpointError(
                    f"the taps need an output matrix of {(self.reserved.end, self.taps.shape[1])}, "
                    f"but {name} of {student} is {tuple(matrix.shape)}"
                )
            matrix[self.reserved.taps] = self.taps.to(matrix.dtype)
        with copied(student, out, tensors, vocab_size=vocab_size, without=[MERGED_ROUTER]) as scratch:
            self.save(scratch / MERGED_ROUTER)


def new_gate(reserved: ReservedRows, width: int, costs: Sequence[float] = ()) -> LearnedGate:
    """An untrained gate.

    Args:
        reserved: the student's reserved rows.
        width: width of the hidden layers.
        costs: cost of each teacher's token, for a gate with an output for each; empty: one output for all.
    """
    return TeachersGate(reserved, width, costs) if costs else LearnedGate(reserved, width)


def is_awaited(directory: Path) -> bool:
    """Whether the router of a directory is still to come: the directory is empty."""
    return not any(directory.iterdir())


def fingerprint(model: Path, reserved_start: int) -> str:
    """Identity of a model's weights: hex SHA-256 over name, shape, type and first 4 KiB of every tensor.

    It is cheap for a model of any size. It ignores the reserved rows, which `merge` overwrites. A model
    without such rows has the identity of its copy with rows appended.
    """
    digest = hashlib.sha256()
    heads: list[_Head] = []
    for file in sorted(model.glob("*.safetensors")):
        with opened(file):
            heads += _heads(file, reserved_start)
    if not heads:
        raise CheckpointError(f"no *.safetensors weights in {model}")
    for head in sorted(heads):
        digest.update(json.dumps([head.name, head.dtype, head.shape]).encode())
        digest.update(head.content)
    return digest.hexdigest()


class _Head(NamedTuple):
    """The beginning of a tensor."""

    name: str
    dtype: str
    shape: list[int]
    content: bytes


def _heads(file: Path, reserved_start: int) -> Iterator[_Head]:
    """The beginnings of all tensors in a file, without their reserved rows."""
    with file.open("rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(header_size))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            shape = entry["shape"]
            if name in VOCABULARY_TENSORS:
                rows = shape[0]
                end = start + (end - start) * min(rows, reserved_start) // rows
                shape = [reserved_start + RESERVED_ROWS if rows <= reserved_start else rows, *shape[1:]]
            stream.seek(8 + header_size + start)
            yield _Head(name, entry["dtype"], shape, stream.read(min(end - start, HEAD_BYTES)))


def vocabulary(model: Path) -> set[tuple[str, int]]:
    """(token, id) pairs of tokenizer.json, with added tokens. Raises CheckpointError if there are none."""
    file = model / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"no tokenizer.json in {model}")
    try:
        tokenizer = json.loads(file.read_text())
        base = tokenizer["model"]["vocab"]
        if isinstance(base, dict):
            pairs = set(base.items())
        else:  # unigram: a list of (token, score)
            pairs = {(token, index) for index, (token, _) in enumerate(base)}
        return pairs | {(token["content"], token["id"]) for token in tokenizer.get("added_tokens", [])}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} holds no vocabulary: {type(error).__name__} {error}") from error


def tokenizer_fingerprint(model: Path) -> str:
    """Identity of a vocabulary: hex SHA-256 over its sorted (token, id) pairs."""
    return hashlib.sha256(json.dumps(sorted(vocabulary(model))).encode()).hexdigest()


__all__ = [
    "CheckpointError",
    "Fingerprints",
    "RouterCheckpoint",
    "RouterConfig",
    "TeacherOutput",
    "fingerprint",
    "new_gate",
    "tokenizer_fingerprint",
    "vocabulary",
]
