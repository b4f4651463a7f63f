"""The served pair: its student, router, rows, spans and policy, decided once at startup."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from router.adaptive import AdaptiveCalibration
from router.checkpoint import (
    MERGED_ROUTER,
    CheckpointError,
    RouterCheckpoint,
    fingerprint,
    is_awaited,
    vocabulary,
)
from router.gate_names import LEARNED, UNTRAINED_GATE
from router.policy import Calibration, GateOutput, Policy
from router.reserved import ReservedRows, visible_rows
from router.rows import MODEL_CONFIG, append_rows, check_decoder, vocabulary_rows
from router.words import BudgetWords
from server.config import ConfigError, ServeConfig
from server.gate_processor import gate_settings


class Spans(NamedTuple):
    """Lengths of spans and calls, in tokens."""

    span_tokens: int
    """Length of the longest span."""
    ask_tokens: int
    """Number of tokens that a teacher call asks for."""


UNTRAINED_SPANS = Spans(span_tokens=4, ask_tokens=1)
"""Lengths without a router: calls of one token, and an initial credit of four tokens for a fraction."""


@dataclass(frozen=True)
class ServedPair:
    """A student with its router, as configured; the engine loads both from one directory."""

    config: ServeConfig
    student: Path
    """Directory that the engine loads; with a router, it contains the router's taps."""
    router: RouterCheckpoint | None
    reserved: ReservedRows
    visible: int
    """The first row that is no token, and neither are later ones; see `router.reserved.visible_rows`."""
    spans: Spans

    @classmethod
    def of(cls, config: ServeConfig) -> "ServedPair":
        """The configured pair. Raises ConfigError or CheckpointError if its parts do not fit together."""
        check_decoder(config.student)
        rows = vocabulary_rows(config.student)
        router, student = _merged(config)
        reserved = router.reserved if router is not None else _free_rows(student)
        models = len(config.model_teachers)
        if models > reserved.count:
            raise ConfigError(
                f"teacher: {models} teachers, but the student has rows for only {reserved.count}"
            )
        pair = cls(
            config=config,
            student=student,
            router=router,
            reserved=reserved,
            visible=min(_known_rows(student, reserved), rows, reserved.start),
            spans=_spans(config, router),
        )
        pair.check_teachers()
        return pair

    def check_teachers(self) -> None:
        """Raises CheckpointError if the gate in use was trained for other teachers."""
        if self.router is not None and self.gate == LEARNED:
            self.router.check_teachers(self.config.model_teachers)

    def with_router(self, router: RouterCheckpoint) -> "ServedPair":
        """The pair with another router for the same student. Raises CheckpointError if it does not fit."""
        try:
            changed = replace(self, router=router, spans=_spans(self.config, router))
        except ConfigError as error:
            raise CheckpointError(str(error)) from error
        changed.check_teachers()
        if changed.learns_its_price and not self.learns_its_price:
            raise CheckpointError(
                f"it has no calibration for the gate {self.gate} and spans of {changed.spans.span_tokens}; "
                "only a restart can learn a price for them"
            )
        return changed

    def gate_settings(self) -> dict[str, Any]:
        """The gate's settings, as the engine's ``additional_config``."""
        router = None if self.router is None else self.student / MERGED_ROUTER
        return gate_settings(
            self.reserved,
            self.gate,
            router,
            self.visible,
            sketch=self.learns_its_price,
            teachers=len(self.config.model_teachers),
        )

    @property
    def gate(self) -> str:
        """Name of the configured gate; default: the learned gate with a router, else an untrained one."""
        if self.config.gate is not None:
            return self.config.gate
        return LEARNED if self.router is not None else UNTRAINED_GATE

    @property
    def words(self) -> BudgetWords | None:
        """The text by which the student reads a request's budget; None if its gate was trained without."""
        return self.router.config.words if self.router is not None and self.gate == LEARNED else None

    @property
    def learns_its_price(self) -> bool:
        """Whether no price is set or measured, so that the gateway learns prices while serving."""
        return self.config.price is None and not self._is_calibrated and self.gate != "random"

    def policy(self, max_len: int) -> Policy:
        """The policy that turns budgets into prices.

        ``max_len``: most tokens that the student takes, prompt and completion together.

        Raises:
            ConfigError: the router cannot be served, or has no calibration for `aim: rate`.
        """
        config = self.config
        router = self.router
        expected = router.config.expected_tokens if router else max_len / 4
        if config.aim == "rate" and (config.price is not None or router is None):
            raise ConfigError("aim rate needs a router checkpoint with its calibration, and no fixed price")
        outputs = self._outputs
        if config.price is not None:
            return Policy(Calibration(((0.5, config.price),)), expected, outputs=outputs)
        if router is not None and self._is_calibrated:
            return Policy(router.calibration(self.gate), expected, self._spare(router), outputs)
        if self.gate == "random":
            return Policy(Calibration.of_random_gate(self.spans.ask_tokens), expected)
        return Policy(AdaptiveCalibration(self.gate, self.spans.ask_tokens), expected, outputs=outputs)

    @property
    def price_file(self) -> Path:
        """File for the prices that are learned while serving."""
        name = f"{fingerprint(self.student, self.reserved.start)} {self.gate} {self.spans}"
        return self.config.cache / "prices" / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"

    def checked_policy(self, max_len: int) -> Policy:
        """As `policy`, for a router that is about to replace the running one. Raises CheckpointError."""
        try:
            return self.policy(max_len)
        except ConfigError as error:
            raise CheckpointError(str(error)) from error

    @property
    def _is_calibrated(self) -> bool:
        """Whether the router has a calibration of this gate, measured with these span lengths."""
        router = self.router
        return (
            router is not None
            and self.gate in router.config.calibration
            and self.spans == _spans(None, router)
        )

    @property
    def _outputs(self) -> tuple[GateOutput, ...]:
        """Outputs of a learned gate for several teachers, one for each; empty for any other gate.

        Their own measured prices are left out unless the common calibration is in use too.
        """
        if self.router is None or self.gate != LEARNED:
            return ()
        measured = self.config.price is None and self._is_calibrated
        outputs = self.router.outputs
        return outputs if measured else tuple(replace(output, alone=None) for output in outputs)

    def _spare(self, router: RouterCheckpoint) -> Calibration | None:
        if self.config.aim != "rate":
            return None
        try:
            return router.spare(self.gate)
        except CheckpointError as error:
            raise ConfigError(f"aim rate: {error}") from error


class _Merged(NamedTuple):
    """A student and its router in one directory."""

    router: RouterCheckpoint | None
    student: Path
    """Directory that the engine loads."""


def _merged(config: ServeConfig) -> _Merged:
    """Merge the router, if there is one, into a student that the engine loads."""
    merged_router = config.student / MERGED_ROUTER
    if config.router is None or is_awaited(config.router):
        if merged_router.is_dir():
            return _Merged(RouterCheckpoint.load(merged_router), config.student)
        if config.gate == LEARNED:
            found = "--router" if config.router is None else f"{config.router} is empty"
            raise ConfigError(
                f"the learned gate needs a router checkpoint ({found}); "
                "without --gate, an untrained gate is used"
            )
        return _Merged(None, _with_rows(config))
    router = RouterCheckpoint.load(config.router)
    router.check_student(config.student)
    merged = _copy_of_student(config, router.digest())
    if not merged.is_dir():
        router.merge(config.student, merged)
    return _Merged(router, merged)


def _with_rows(config: ServeConfig) -> Path:
    """Directory of the student, or of its copy with more rows if its vocabulary has none to spare."""
    reserved = _free_rows(config.student)
    if reserved.end <= vocabulary_rows(config.student):
        return config.student
    copy = _copy_of_student(config, f"{reserved} {fingerprint(config.student, reserved.start)}")
    if not copy.is_dir():
        append_rows(config.student, copy, reserved)
    return copy


def _copy_of_student(config: ServeConfig, contents: str) -> Path:
    """Directory of a copy. It links to files of the original, so an original elsewhere has another copy."""
    student = config.student.resolve()
    digest = hashlib.sha256(f"{contents} {student}".encode())
    digest.update((student / MODEL_CONFIG).read_bytes())  # a copy with more rows has its own file
    return config.cache / "merged" / digest.hexdigest()[:16]


def _free_rows(student: Path) -> ReservedRows:
    known = visible_rows(token_id for _, token_id in vocabulary(student))
    rows = vocabulary_rows(student)
    try:
        return ReservedRows.for_model(rows, known)
    except ValueError as error:
        raise CheckpointError(f"{student}: {error}") from error


def _known_rows(student: Path, reserved: ReservedRows) -> int:
    if not (student / "tokenizer.json").is_file():
        return reserved.start  # a tokenizer of another kind: its ids are not known
    return visible_rows(token_id for _, token_id in vocabulary(student))


def _spans(config: ServeConfig | None, router: RouterCheckpoint | None) -> Spans:
    """Lengths from the configuration, else from the router, else `UNTRAINED_SPANS`."""
    measured = UNTRAINED_SPANS
    if router is not None:
        measured = Spans(router.config.span_tokens, router.config.ask_tokens or router.config.span_tokens)
    span_tokens = (config and config.span_tokens) or measured.span_tokens
    ask_tokens = (config and config.ask_tokens) or measured.ask_tokens
    if ask_tokens > span_tokens:
        raise ConfigError(f"ask_tokens: {ask_tokens} is more than span_tokens, which is {span_tokens}")
    return Spans(span_tokens, ask_tokens)
