"""Token ids in a cache on disk, so that completions from before a stop are not written again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from training.teacher_cache import TeacherCache


def packed(tokens: list[int]) -> bytes:
    """The token ids as the cache stores them: 32-bit integers."""
    return np.array(tokens, dtype=np.int32).tobytes()


def unpacked(content: bytes) -> list[int]:
    """The token ids in a value that `packed` has made."""
    return np.frombuffer(content, dtype=np.int32).tolist()


@dataclass(frozen=True)
class KeptTokens:
    """Lists of token ids by key."""

    cache: TeacherCache

    def of(self, keys: Sequence[bytes], write: Callable[[list[int]], list[list[int]]]) -> list[list[int]]:
        """The token ids of each key, in the order of the keys.

        Args:
            keys: a key for each list of token ids.
            write: gets the places of the missing keys in `keys`, and returns their token ids.
        """
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
