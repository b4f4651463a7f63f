"""The tree of exceptions: every error that ends a command or a request on purpose.

WheelsError
├── UnusableInput                 an input of a command cannot be used
│   ├── ConfigError               settings of the gateway
│   │   ├── UsageError            an unknown word of a command line
│   │   └── UnsupportedVllm       this vLLM lacks what the gateway reaches into
│   ├── RecipeError               settings of training
│   ├── CheckpointError           a router, or the pair that it is used with
│   ├── DataError                 a file of examples
│   ├── LoraError                 adapters that this model does not take
│   ├── UnreadableModel           a model that training cannot read
│   ├── UnusableTokenizer         a tokenizer that changes texts, or cannot continue one
│   ├── NotOnHub                  a model's name that the hub does not give us
│   ├── IncompletePair            a pair's directory that lacks a file
│   ├── NothingToLearn            a gateway whose prices prompts do not move
│   ├── HeavyError                a student that the benchmarks cannot deepen
│   ├── TooLarge                  models that leave a card of the benchmarks no memory
│   ├── ImportFailed              a model in GGUF format
│   ├── FetchError                a data set that cannot be made here
│   └── TrackerError              a tracker that is not installed
├── PeerError                     another server is away, or gives an unusable answer
│   ├── TeacherError              the teacher of a gateway
│   │   └── DifferentVocabulary   its tokens are not the student's, or not those of its replicas
│   ├── GatewayError              a gateway that is measured
│   ├── ServerError               a server that training asks
│   ├── JudgeError                a served model that rates answers
│   ├── HubError                  the Hugging Face hub
│   └── ServiceError              a process of the demo or of the benchmarks
├── RunEnded                      a run ended without its result
│   ├── EngineDied                the student's engine is gone
│   ├── ExportError               the export is not the trained model
│   ├── Diverged                  a number of the training is not finite
│   └── Stopped                   a signal stopped the training
└── BadRequest                    a client asks for what the gateway does not do
    ├── BudgetRefused             a budget above the tenant's maximum
    └── TooManySessions           one more session than an owner may have

Each class is defined in the package that raises it. Two places read the tree: `wheels.main` turns an error
into one line and an exit status, and `server.http.errors` turns one into a reply.
"""

from http import HTTPStatus
from typing import ClassVar


class WheelsError(Exception):
    """An error with a message for its reader: one line that names what is wrong."""

    exit_status: ClassVar[int | None] = None
    """Exit status of a command that ends with this error. None: see `wheels.Command.failure`."""
    http_status: ClassVar[HTTPStatus] = HTTPStatus.INTERNAL_SERVER_ERROR
    """Status of the reply to a request that ends with this error."""


class UnusableInput(WheelsError):
    """An input of a command cannot be used: a setting, a file or a model."""


class PeerError(WheelsError):
    """Another server or process is unreachable, refuses, or gives an unusable answer."""

    http_status = HTTPStatus.BAD_GATEWAY


class RunEnded(WheelsError):
    """A run ended without its result."""

    exit_status = 1


class BadRequest(WheelsError):
    """The gateway cannot do what the client's ``param`` asks for; the message says why."""

    http_status = HTTPStatus.BAD_REQUEST

    def __init__(self, param: str | None, message: str) -> None:
        super().__init__(message)
        self.param = param
