"""Secrets in files that only their owner reads: written whole, read again when they change."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from megatoken.access.credentials import METADATA_KEY, Credentials, identify
from megatoken.access.table import Identity
from megatoken.errors import RequestError
from megatoken.log import log_event

logger = logging.getLogger(__name__)

CHECK_S: Final = 1.0  # a changed file is in force within this
HURRIED_CHECK_S: Final = 0.05  # and within this when a token comes that is not known
Metadata = tuple[tuple[str, str], ...]


def write_private(path: Path, text: str) -> None:
    """Replaces the file in one step; it is never readable by others, not for a moment."""
    staged = path.with_name(f".{path.name}.{os.getpid()}.new")
    with open(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "w") as file:
        file.write(text)
    staged.rename(path)


def read_private(path: Path, field: str) -> str:
    """The file's text. Raises RequestError, naming `field`, when it cannot be read or others may read it."""
    try:
        with open(os.open(path, os.O_RDONLY)) as file:
            status = os.fstat(file.fileno())
            if status.st_mode & 0o077 or status.st_uid != os.geteuid():
                raise RequestError(field, str(path), "a file of yours that only you may read: chmod 600 it")
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not text"
        raise RequestError(field, str(path), f"a file that can be read; {why}") from None


class CredentialsFile:
    """A process's credentials. A file that does not read leaves the last ones in force, and is logged."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises RequestError when the file cannot be used."""
        self._path, self._clock = path, clock
        self._checked_s = clock()
        self._stamp = self._read_stamp()
        self._current = self._load()

    @property
    def current(self) -> Credentials:
        """As of at most CHECK_S ago."""
        self._look(CHECK_S)
        return self._current

    def metadata(self) -> Metadata:
        """What this process shows with a call."""
        return ((METADATA_KEY, self.current.token),)

    def identify(self, token: str) -> Identity | None:
        """Whom a token stands for. One that is not known has the file looked at again: it may be newer than ours."""
        found = identify(self.current, token)
        if found is None and self._look(HURRIED_CHECK_S):
            found = identify(self._current, token)
        return found

    def _look(self, after_s: float) -> bool:
        """Reads the file again when it changed; not more often than every `after_s`. Says whether it did."""
        now = self._clock()
        if now - self._checked_s < after_s:
            return False
        self._checked_s = now
        stamp = self._read_stamp()
        if stamp is None or stamp == self._stamp:
            return False
        try:
            self._current = self._load()
        except RequestError as error:
            log_event(logger, "credentials.unreadable", str(error), level=logging.ERROR)
            return False
        self._stamp = stamp
        log_event(logger, "credentials.reloaded")
        return True

    def _load(self) -> Credentials:
        text = read_private(self._path, "credentials_file")
        try:
            return Credentials.model_validate_json(text)
        except ValueError:  # pydantic's message would show the content
            raise RequestError("credentials_file", str(self._path), "JSON as the control plane writes it") from None

    def _read_stamp(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino
