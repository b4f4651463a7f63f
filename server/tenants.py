"""Tenants: who may use the gateway, by API key, and how much of the teacher.

    admin_keys: [<sha256>]              # may see every budget
    tenants:
      - name: acme
        keys: [<sha256>, <sha256>]      # two while a key is replaced
        default_budget: 0.1             # for requests that set none
        maximum_budget: {fraction: 0.3, calls: 40}
        over_maximum: clamp             # or: refuse
        limits:
          - {type: tokens, tokens: 1000000, window_seconds: 86400}
          - {type: fraction, fraction: 0.2, window_seconds: 3600}
        exhausted: student              # or: refuse
        priority: 2.0

Keys are kept as SHA-256 of a random secret: `printf %s "$KEY" | sha256sum`, with KEY from
`openssl rand -hex 24`. (A password would need a slow hash; 24 random bytes cannot be guessed.)
"""

import asyncio
import hashlib
import hmac
import logging
import os
from collections import Counter
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError, model_validator

from router.budget import Budget
from router.errors import BadRequest
from router.ledger import Limit, Scope
from router.problems import problems
from server.config import ConfigError, read_yaml
from server.file_state import FileState
from server.sources import TEACHER

logger = logging.getLogger(__name__)

KeyHash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of an API key, in hex")]


class BudgetRefused(BadRequest):
    """A request's budget exceeds its tenant's maximum; the message names the part."""


class Resolved(NamedTuple):
    """The budget that a request gets, and whether it is less than it asked for."""

    budget: Budget
    clamped: bool


class Tenant(BaseModel):
    """One customer of the gateway."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    keys: Annotated[tuple[KeyHash, ...], Field(min_length=1)]
    default_budget: Budget | None = None
    """Budget of requests that set none; None for the server's default."""
    maximum_budget: Budget | None = None
    over_maximum: Literal["clamp", "refuse"] = "clamp"
    """Whether a request that asks for more gets the maximum ("clamp"), or a 400 ("refuse")."""
    limits: tuple[Limit, ...] = ()
    """Limits that all requests of the tenant share."""
    exhausted: Literal["student", "refuse"] = "student"
    """When a limit is used up, the student writes alone ("student"), or the request gets a 429 ("refuse")."""
    priority: PositiveFloat = 1.0
    """Under a limit that all tenants share, this tenant aims at this many times the common rate."""

    @model_validator(mode="after")
    def _consistent(self) -> "Tenant":
        if (
            self.default_budget
            and self.maximum_budget
            and self.maximum_budget.exceeded_by(self.default_budget)
        ):
            raise ValueError("default_budget is more than maximum_budget")
        if len({scope.id for scope in self.scopes}) < len(self.limits):
            raise ValueError("two limits have the same type and window: keep the smaller one")
        return self

    @cached_property
    def scopes(self) -> tuple[Scope, ...]:
        """The tenant's limits, as the ledger knows them."""
        return tuple(Scope("tenant", self.name, limit) for limit in self.limits)

    @property
    def in_money(self) -> str | None:
        """Name of a setting that is an amount of money; None if there is none."""
        for name in ("default_budget", "maximum_budget"):
            budget = getattr(self, name)
            if budget is not None and budget.in_money:
                return f"{name}.cost"
        return "limits" if any(limit.in_money for limit in self.limits) else None

    def unknown_teacher(self, known: Collection[str]) -> str | None:
        """Name of a teacher in a budget or limit that is not ``known``; None if all are."""
        for budget in (self.default_budget, self.maximum_budget):
            if budget is not None and (stranger := budget.unknown(known)) is not None:
                return stranger
        return next((limit.teacher for limit in self.limits if limit.teacher not in (None, *known)), None)

    def resolve(self, requested: Budget | None, server_default: Budget) -> Resolved:
        """The budget that a request gets.

        A part of the maximum also applies if the request does not set this part. A default above the maximum
        is lowered without notice, because the request did not ask for it.

        Args:
            requested: the budget that the request sets; None if it sets none.
            server_default: the server's default budget.

        Raises:
            BudgetRefused: a part is more than the maximum, and ``over_maximum`` is "refuse".
        """
        budget = requested or self.default_budget or server_default
        if self.maximum_budget is None:
            return Resolved(budget, clamped=False)
        exceeded = self.maximum_budget.exceeded_by(budget)
        if requested and exceeded and self.over_maximum == "refuse":
            raise BudgetRefused("teacher_budget", exceeded[0])
        return Resolved(budget.within(self.maximum_budget), clamped=bool(requested and exceeded))


class TenantList(BaseModel):
    """The contents of a tenants file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    admin_keys: tuple[KeyHash, ...] = ()
    tenants: tuple[Tenant, ...] = ()

    @model_validator(mode="after")
    def _unique(self) -> "TenantList":
        names = Counter(tenant.name for tenant in self.tenants)
        keys = Counter(self.admin_keys)
        for tenant in self.tenants:
            keys.update(tenant.keys)
        for what, counts in (("tenants named", names), ("uses of the key", keys)):
            twice = min(counts - Counter(counts.keys()), default=None)
            if twice is not None:
                raise ValueError(f"two {what} {twice}")
        return self


ADMIN = Literal["admin"]


class Tenants:
    """The current tenants, read from a file, and again when the file changes.

    ``source`` is the file's path, or the contents themselves (from an environment variable). A text with a
    line break or a brace at its beginning is contents.
    """

    def __init__(self, source: str, *, priced: bool = False, teachers: Collection[str] = (TEACHER,)) -> None:
        """Read the tenants.

        Args:
            source: path or contents, see the class.
            priced: whether the gateway has prices.
            teachers: names of all configured teachers.

        Raises:
            ConfigError: the source is not usable.
        """
        self._priced = priced
        self._teachers = teachers
        inline = "\n" in source or source.lstrip().startswith("{")
        self._inline = source if inline else None
        self._path = None if inline else Path(source)
        # No client can compute this hash of a key, so the time of a look-up tells nothing about keys.
        self._secret = os.urandom(32)
        self._seen = self._stat()
        self._use(self._read())

    @property
    def current(self) -> TenantList:
        """The tenants as they were read last."""
        return self._current

    def authenticate(self, credential: str | None) -> "Tenant | ADMIN | None":
        """The owner of a key: a tenant, "admin", or None if the key is missing or unknown.

        ``credential``: an Authorization header (``Bearer KEY``) or an x-api-key header (the key).
        """
        if credential is None:
            return None
        digest = hash_key(key_of(credential))
        stored, owner = self._owners.get(self._index(digest), ("", None))
        return owner if hmac.compare_digest(stored, digest) else None

    def reload(self) -> bool:
        """Read the file again if it has changed; returns whether it had.

        Raises:
            ConfigError: the file is not usable; the old tenants stay.
        """
        seen = self._stat()
        if seen == self._seen:
            return False
        self._use(self._read())
        self._seen = seen
        return True

    def _use(self, tenants: TenantList) -> None:
        owners: dict[bytes, tuple[str, Tenant | ADMIN]] = {}
        for key in tenants.admin_keys:
            owners[self._index(key)] = (key, "admin")
        for tenant in tenants.tenants:
            for key in tenant.keys:
                owners[self._index(key)] = (key, tenant)
        self._current = tenants
        self._owners = owners

    async def watch(self, seconds: float = 2.0) -> None:
        """Reload whenever the file changes, forever; an unusable file is logged once and changes nothing."""
        logged = ""
        while True:
            await asyncio.sleep(seconds)
            try:
                if await asyncio.to_thread(self.reload):
                    logger.info("tenants reloaded: %d", len(self.current.tenants))
                logged = ""
            except Exception as error:
                if logged != str(error):
                    ours = not isinstance(error, ConfigError)
                    logger.error("the tenants were not reloaded: %s", error, exc_info=ours)
                logged = str(error)

    def _index(self, digest: str) -> bytes:
        return hmac.digest(self._secret, digest.encode(), "sha256")

    def _stat(self) -> FileState | None:
        """State of the file; None if the contents do not come from a file."""
        if self._path is None:
            return None
        try:
            return FileState.of(self._path)
        except OSError as error:
            raise ConfigError(f"cannot read the tenants: {error}") from error

    def _read(self) -> TenantList:
        where = "the tenants" if self._path is None else str(self._path)
        try:
            text = self._inline or "" if self._path is None else self._path.read_bytes()
            content = read_yaml(text)
            tenants = TenantList.model_validate({} if content is None else content)
        except ValidationError as error:
            raise ConfigError(f"{where}: {problems(error)}") from error
        except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
            problem = " ".join(str(error).split())  # YAML's errors are drawn over several lines
            raise ConfigError(f"cannot read {where}: {problem}") from error
        for tenant in () if self._priced else tenants.tenants:
            if (setting := tenant.in_money) is not None:
                raise ConfigError(f"{where}: {tenant.name}: {setting} needs prices (--prices)")
        for tenant in tenants.tenants:
            if (stranger := tenant.unknown_teacher(self._teachers)) is not None:
                raise ConfigError(f"{where}: {tenant.name}: no teacher is named {stranger!r}")
        return tenants


def key_of(credential: str) -> str:
    """The key in an Authorization header (``Bearer KEY``) or an x-api-key header (the key)."""
    scheme, _, key = credential.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else credential.strip()


def hash_key(key: str) -> str:
    """SHA-256 of an API key in hex, as the tenants file keeps it."""
    return hashlib.sha256(key.encode()).hexdigest()
