"""Updates a learning calibration with the engine's scores, and saves it to disk."""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from router.adaptive import AdaptiveCalibration, SavedState, SeenScores
from router.problems import problems
from server.metrics import AIMED_COMPLETION_TOKENS, REALISED_RATE

logger = logging.getLogger(__name__)

SAVE_EVERY = 30
"""Updates between two writes to the disk."""


class PriceFollower:
    """Learns the prices of one gateway from its traffic.

    The state survives a restart: it is saved in a file whose name depends on student, gate and spans.
    """

    def __init__(
        self, calibration: AdaptiveCalibration, read: Callable[..., Awaitable[Sequence[Any]]], file: Path
    ) -> None:
        """Continue from the saved state, if the file has one for this gate.

        Args:
            calibration: the calibration from which the policy gets its prices.
            read: vLLM's `collective_rpc`.
            file: the file of the saved state.
        """
        self._calibration = calibration
        self._read = read
        self._file = file
        self._unsaved = 0
        """Updates since the state was last written."""
        self._taken = 0
        """Observations of the calibration at the last update."""
        self._failure = ""
        """The last failure that was logged; the same one is not logged again."""
        self._restore()

    def switch(self, calibration: AdaptiveCalibration, file: Path) -> AdaptiveCalibration:
        """Follow another gate; if it is the same one, nothing that was learned is lost.

        Args:
            calibration: a new calibration of the gate, which has learned nothing yet.
            file: the file of its saved state.

        Returns:
            The calibration that is followed from now on.
        """
        if file != self._file:
            self._save()
            self._calibration = calibration
            self._file = file
            self._taken = 0
            self._restore()
        return self._calibration

    async def follow(self, seconds: float = 1.0) -> None:
        """Update every ``seconds`` seconds while there is traffic, forever; saves at the end."""
        try:
            while True:
                await asyncio.sleep(seconds)
                idle = self._calibration.observations == self._taken
                if not idle:
                    await self._try_update()
                if self._unsaved >= (1 if idle else SAVE_EVERY):
                    await asyncio.to_thread(self._save)
        finally:
            self._save()

    async def _try_update(self) -> None:
        try:
            await self.update()
        except Exception as error:  # for example in the engine's process: the next update may succeed
            if repr(error) != self._failure:
                logger.exception("the price could not be updated")
            self._failure = repr(error)

    async def update(self) -> None:
        """Learn from the engine's newest scores, and publish the realised rates."""
        observations = self._calibration.observations
        for answer in await self._read("gate_scores"):
            if answer is not None:  # a `SeenScores`, which arrives as a list
                scores = SeenScores(*answer)
                if scores.positions:
                    self._calibration.see(scores)
                break
        for realised in self._calibration.realised:
            aim = f"{realised.aim:g}"
            REALISED_RATE.labels(aim).set(realised.rate)
            AIMED_COMPLETION_TOKENS.labels(aim).set(realised.completion_tokens)
        self._taken = observations
        self._unsaved += 1

    def _restore(self) -> None:
        try:
            state = SavedState.model_validate_json(self._file.read_bytes())
        except FileNotFoundError:
            return
        except (OSError, ValidationError) as error:
            problem = f"{self._file}: {problems(error)}" if isinstance(error, ValidationError) else error
            logger.warning("the learned prices cannot be read, and are learned again: %s", problem)
            return
        if self._calibration.restore(state):
            logger.info("learned prices read from %s", self._file)

    def _save(self) -> None:
        """Write the state to the file, as a whole or not at all."""
        self._unsaved = 0
        scratch = self._file.with_suffix(f".{os.getpid()}.tmp")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_text(self._calibration.state.model_dump_json())
            scratch.replace(self._file)
        except OSError as error:
            logger.warning("the learned prices cannot be saved: %s", error)
