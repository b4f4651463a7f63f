"""`wheels serve`."""

import sys

from server.config import ConfigError, load


def main(argv: list[str]) -> int:
    """Exit status: 1 with one line on stderr when the gateway cannot start, or cannot go on."""
    try:
        config = load(argv)
    except ConfigError as error:
        return _fail(error)
    # vLLM takes seconds to import: a wrong flag is said before.
    from router.checkpoint import CheckpointError
    from server.gateway import run
    from server.http.lifecycle import EngineDied
    from server.teacher.client import TeacherError

    try:
        return run(config)
    except (ConfigError, CheckpointError, EngineDied, TeacherError) as error:
        return _fail(error)
    except KeyboardInterrupt:
        return 130


def _fail(error: Exception) -> int:
    print(f"wheels serve: {error}", file=sys.stderr)
    return 1
