"""Which of the student's LoRA adapters a teacher's server has, by name."""

from collections.abc import Iterable


class Adapters:
    """The known adapters of one server; checked again after one was missing."""

    def __init__(self) -> None:
        self._names: frozenset[str] = frozenset()
        self.missed = False
        """Whether an adapter was wanted that the server did not have."""

    def served(self, names: Iterable[str]) -> None:
        """Note the models that the server has now."""
        self._names = frozenset(names)
        self.missed = False

    def model_for(self, adapter: str | None, base: str | None) -> str | None:
        """The model to ask: the server's own adapter of that name, else its base model."""
        if adapter is None:
            return base
        if adapter in self._names:
            return adapter
        self.missed = True
        return base

    def lost(self, adapter: str | None) -> bool:
        """Note that the server no longer has this adapter; returns False if it was not known to have it."""
        if adapter not in self._names:
            return False
        self._names -= {adapter}
        self.missed = True
        return True
