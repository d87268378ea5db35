# SPDX-License-Identifier: MIT
"""The configuration of `kvmprobe watch`: one TOML file, every key optional."""

from __future__ import annotations

import ipaddress
import os
import re
import stat
import tomllib
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from kvmprobe.analysis.rules import RULES
from kvmprobe.capture.plan import BACKENDS
from kvmprobe.errors import UsageError
from kvmprobe.watch.status import RUNTIME_DIRECTORY

#: The file the packaged unit names.
CONFIG_FILE = Path("/etc/kvmprobe/watch.toml")
STATE_DIRECTORY = Path("/var/lib/kvmprobe")
LISTEN = "127.0.0.1:9973"
_MAX_BYTES = 1 << 20


class ConfigError(UsageError):
    """The configuration can't be used; the message names the file and the key."""


def parse_listen(text: str) -> tuple[str, int] | None:
    """Take "ADDRESS:PORT" apart; "" is None: no metrics.  Port 0 takes any free one.

    Raises ValueError that says what to write.
    """
    if not text:
        return None
    found = re.fullmatch(r"\[?([0-9A-Fa-f:.]+?)\]?:([0-9]{1,5})", text)
    try:
        if found is None or int(found[2]) > 0xFFFF:
            raise ValueError
        return str(ipaddress.ip_address(found[1])), int(found[2])
    except ValueError:
        raise ValueError(
            f"{text!r} is not ADDRESS:PORT; write 127.0.0.1:9973, [::1]:9973, or nothing for no "
            "metrics"
        ) from None


def _listen(text: str) -> str:
    parse_listen(text)
    return text


def _directory(value: object) -> object:
    if isinstance(value, str | Path) and Path(value).is_absolute():
        return Path(value)
    raise ValueError("not an absolute path")


def _one_of(*known: str) -> AfterValidator:
    def check(value: str) -> str:
        if value not in known:
            raise ValueError(f"{value!r} is not known; there are {', '.join(known)}")
        return value

    return AfterValidator(check)


Directory = Annotated[Path, BeforeValidator(_directory)]
Words = Annotated[str, Field(min_length=1, max_length=400)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Metrics(_Table):
    """`[metrics]`.  `listen`: ADDRESS:PORT of the HTTP server, "" for none."""

    listen: Annotated[str, AfterValidator(_listen)] = LISTEN


class Log(_Table):
    """`[log]`: findings as NDJSON.

    `max_kib`: a file is rotated before it gets larger.  `files`: how many are kept, the current one
    included.
    """

    max_kib: Annotated[int, Field(ge=4, le=1 << 20)] = 8192
    files: Annotated[int, Field(ge=1, le=100)] = 4


class Evidence(_Table):
    """`[evidence]`: captures written when a finding appears; `files`: how many at most, 0: none."""

    files: Annotated[int, Field(ge=0, le=1000)] = 32


class Loss(_Table):
    """`[loss]`.  `degrades`: how many seconds lost records degrade the verdict."""

    degrades: Annotated[int, Field(ge=60, le=31 * 86400)] = 3600


class Ignore(_Table):
    """`[[ignore]]`: findings of `rule` on the VM named `vm` raise no alarm until `expires`."""

    rule: Annotated[str, _one_of(*(rule.id for rule in RULES))]
    vm: Words
    reason: Words
    expires: date

    def covers(self, rule: str, vm: str | None, today: date) -> bool:
        """Whether a finding is covered; on the day of `expires` it is not any more."""
        return rule == self.rule and vm == self.vm and today < self.expires


class Config(_Table):
    """The whole file.  Directories are made when they don't exist."""

    runtime_directory: Directory = RUNTIME_DIRECTORY
    state_directory: Directory = STATE_DIRECTORY
    backend: Annotated[str, _one_of(*BACKENDS)] | None = None
    metrics: Metrics = Metrics()
    log: Log = Log()
    evidence: Evidence = Evidence()
    loss: Loss = Loss()
    ignore: tuple[Ignore, ...] = Field(default=(), strict=False, max_length=1000)

    @model_validator(mode="after")
    def _own_directories(self) -> Config:
        if self.runtime_directory == self.state_directory:
            raise ValueError("runtime_directory and state_directory must differ")
        return self

    def expired(self, today: date) -> list[Ignore]:
        """The [[ignore]] entries that have no effect any more."""
        return [entry for entry in self.ignore if today >= entry.expires]


#: What a reload can't change: files are open in them, programs are attached by it.
FIXED = ("runtime_directory", "state_directory", "backend")


def today() -> date:
    """The date that [[ignore]] entries expire by: UTC's."""
    return datetime.now(UTC).date()


def load(path: Path | None, overrides: dict[str, Any] | None = None) -> Config:
    """Read the configuration; `overrides` are what flags say, in the shape of the file.

    `path` None is the default file, which may be missing.

    Raises:
        ConfigError: it can't be read, is no TOML, has an unknown key or a wrong value.

    """
    name = str(path or CONFIG_FILE)
    try:
        tables = tomllib.loads(_read(path or CONFIG_FILE, missing_ok=path is None))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: no TOML: {_line(error)}") from None
    try:
        return Config.model_validate(_merge(tables, overrides or {}))
    except ValidationError as error:
        where = "the command line" if _given(overrides or {}, error.errors()[0]["loc"]) else name
        raise ConfigError(f"{where}: {_said(error)}") from None


def _given(overrides: object, key: tuple[int | str, ...]) -> bool:
    """Whether a flag says what the key has."""
    for part in key:
        if not isinstance(overrides, dict) or part not in overrides:
            return False
        overrides = overrides[part]
    return bool(key)


def _merge(tables: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    merged = dict(tables)
    for key, value in overrides.items():
        below = merged.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            value = below | value
        merged[key] = value
    return merged


def _read(path: Path, *, missing_ok: bool) -> str:
    try:
        # O_NONBLOCK: a FIFO must not hold us up.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ConfigError(f"{path} is no regular file; name a TOML file")
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        if missing_ok:
            return ""
        raise ConfigError(f"{path} does not exist; name a TOML file") from None
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror}") from None
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"{path} is larger than {_MAX_BYTES} bytes: no configuration")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: no TOML: byte {error.start} is not UTF-8") from None


def _said(error: ValidationError) -> str:
    """The first thing that is wrong, with its key; and how many more there are."""
    problems = error.errors(include_url=False, include_context=False)
    first = problems[0]
    key = ".".join(f"{part + 1}" if isinstance(part, int) else part for part in first["loc"])
    message = {
        "extra_forbidden": "unknown key",
        "missing": "must be given",
        "model_type": "must be a table",
    }.get(first["type"])
    if message is None:
        message = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{key}: {message}{more}" if key else f"{message}{more}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
