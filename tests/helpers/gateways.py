"""The type of the integration tests' fixture that starts gateways."""

from collections.abc import Callable
from contextlib import AbstractContextManager

from measuring.pair import Serving

StartGateway = Callable[..., AbstractContextManager[Serving]]
"""Called with a directory for the log, flags of `wheels serve`, and a router if it is not the pair's."""
