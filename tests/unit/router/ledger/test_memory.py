"""The memory ledger under every interleaving that hypothesis finds."""

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from router.ledger import MemoryLedger
from tests.helpers.ledger_machine import LEASE_SECONDS, LedgerMachine


class MemoryMachine(LedgerMachine):
    forgets = True

    def open(self) -> MemoryLedger:
        return MemoryLedger(lease_seconds=LEASE_SECONDS, on_expiry=self.on_expiry, clock=self.clock)

    reopen = open


class ChargingMemoryMachine(MemoryMachine):
    on_expiry = "charge"


@pytest.mark.parametrize("machine", [MemoryMachine, ChargingMemoryMachine])
def test_no_interleaving_exceeds_the_bound_or_leaks_tokens(machine: type[LedgerMachine]) -> None:
    run_state_machine_as_test(machine, settings=settings(max_examples=150, stateful_step_count=40))
