"""CPU seconds and memory of a server with all its processes, from /proc."""

import os
from dataclasses import dataclass
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Usage:
    """CPU time and memory that the processes of one server have used since their start."""

    cpu_seconds: float
    """User and system time of all processes that live, front end and engine."""
    front_cpu_seconds: float
    """CPU seconds of the first process alone: HTTP, tokeniser, span loop."""
    front_memory: int
    """Resident bytes of the first process."""

    def since(self, before: "Usage") -> "Usage":
        """The difference to an earlier usage."""
        return Usage(
            self.cpu_seconds - before.cpu_seconds,
            self.front_cpu_seconds - before.front_cpu_seconds,
            self.front_memory - before.front_memory,
        )


def usage(leader: int, proc: Path = Path("/proc")) -> Usage:
    """Usage of the process group that ``leader`` leads."""
    total = front = 0.0
    memory = 0
    for directory in proc.iterdir():
        if not directory.name.isdigit():
            continue
        try:
            # After the name, which may hold spaces: state, ppid, pgrp, …, utime, stime, …, rss.
            fields = (directory / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[2]) != leader:
            continue
        seconds = (int(fields[11]) + int(fields[12])) / TICK
        total += seconds
        if int(directory.name) == leader:
            front = seconds
            memory = int(fields[21]) * PAGE
    return Usage(total, front, memory)
