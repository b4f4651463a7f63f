"""Token ids in a cache on disk: what was written before a stop is not written again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from training.teacher_cache import TeacherCache


def packed(tokens: list[int]) -> bytes:
    """As they are kept: ids in 32 bits."""
    return np.array(tokens, dtype=np.int32).tobytes()


def unpacked(content: bytes) -> list[int]:
    """The other way round."""
    return np.frombuffer(content, dtype=np.int32).tolist()


@dataclass(frozen=True)
class KeptTokens:
    """Token ids by key."""

    cache: TeacherCache

    def of(self, keys: Sequence[bytes], write: Callable[[list[int]], list[list[int]]]) -> list[list[int]]:
        """Those of each key; `write` gives those whose places are missing."""
        found = []
        missing = []
        for place, value in enumerate(self.cache.get(keys)):
            found.append([] if value is None else unpacked(value))
            if value is None:
                missing.append(place)
        if missing:
            new = {}
            for place, tokens in zip(missing, write(missing), strict=True):
                found[place] = tokens
                new[keys[place]] = packed(tokens)
            self.cache.put(new)
        return found
