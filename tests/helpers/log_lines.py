"""What is logged during a test."""

import logging


class LogLines(logging.Handler):
    """Keeps all lines that reach the root's logger."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        self.records: list[logging.LogRecord] = []
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(self.format(record))
        self.records.append(record)

    @property
    def text(self) -> str:
        return "".join(f"{line}\n" for line in self._lines)

    @property
    def messages(self) -> list[str]:
        return [record.getMessage() for record in self.records]
