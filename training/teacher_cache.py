"""A disk cache of a teacher's answers: demonstrations repeat in every epoch, with the same answers."""

import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path

WAIT_SECONDS = 60.0
"""Longest wait for another process of the same run that is writing."""
SHARE_DROPPED = 0.1
"""Share of a full cache's entries that are dropped at once, the least recently used first."""
SCHEMA = """
CREATE TABLE IF NOT EXISTS kept (
    key BLOB PRIMARY KEY, value BLOB NOT NULL, used INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_use ON kept (used);
"""


def key_of(*parts: object) -> bytes:
    """Key of an answer: a digest of all that the answer depends on. The parts are JSON values."""
    return hashlib.sha256(json.dumps(parts).encode()).digest()


class TeacherCache:
    """Answers by key in one SQLite file on a local disk, shared by all processes of a machine.

    Writing is atomic: however a process ends, an entry is there whole or not at all. A file that cannot be
    read is replaced by an empty one.

    Args:
        file: path of the SQLite file; it is created when it is first needed.
        max_bytes: size beyond which the least recently used answers are dropped.
    """

    def __init__(self, file: Path, max_bytes: int) -> None:
        self._file = file
        self._max_bytes = max_bytes
        self._connection: sqlite3.Connection | None = None

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The answer of each key; None for a key that is not kept."""
        database = self._database()
        found: list[bytes | None] = []
        for key in keys:
            row = database.execute("SELECT value FROM kept WHERE key = ?", (key,)).fetchone()
            found.append(None if row is None else row[0])
        with database:
            now = self._next_use(database)
            used = []
            for key, value in zip(keys, found, strict=True):
                if value is not None:
                    used.append((now, key))
            database.executemany("UPDATE kept SET used = ? WHERE key = ?", used)
        return found

    def put(self, answers: Mapping[bytes, bytes]) -> None:
        """Keep all these answers, or none of them if the disk is full."""
        database = self._database()
        try:
            with database:
                now = self._next_use(database)
                rows = [(key, value, now) for key, value in answers.items()]
                database.executemany("INSERT OR REPLACE INTO kept VALUES (?, ?, ?)", rows)
                if self._bytes(database) > self._max_bytes:
                    self._drop_oldest(database)
        except sqlite3.OperationalError as error:
            print(f"{self._file}: not kept: {error}")

    def clear(self) -> None:
        """Delete all answers."""
        database = self._database()
        with database:
            database.execute("DELETE FROM kept")

    def __len__(self) -> int:
        return self._database().execute("SELECT count(*) FROM kept").fetchone()[0]

    def _database(self) -> sqlite3.Connection:
        if self._connection is None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._connection = self._opened()
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError):
                    raise  # the database is busy or the disk full: the file itself is sound
                print(f"{self._file}: unreadable, started again empty: {error}")
                self._file.unlink()
                self._connection = self._opened()
        return self._connection

    def _opened(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._file, timeout=WAIT_SECONDS)
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        database.executescript(SCHEMA)
        return database

    def _drop_oldest(self, database: sqlite3.Connection) -> None:
        """Drop the least recently used answers. The file does not shrink; new answers fill its free pages."""
        count = database.execute("SELECT count(*) FROM kept").fetchone()[0]
        dropped = max(1, int(SHARE_DROPPED * count))
        database.execute(
            "DELETE FROM kept WHERE key IN (SELECT key FROM kept ORDER BY used LIMIT ?)", (dropped,)
        )

    @staticmethod
    def _next_use(database: sqlite3.Connection) -> int:
        return database.execute("SELECT coalesce(max(used), 0) + 1 FROM kept").fetchone()[0]

    @staticmethod
    def _bytes(database: sqlite3.Connection) -> int:
        """Bytes in use: the file's size without its free pages."""
        pages = database.execute("PRAGMA page_count").fetchone()[0]
        free = database.execute("PRAGMA freelist_count").fetchone()[0]
        return (pages - free) * database.execute("PRAGMA page_size").fetchone()[0]
