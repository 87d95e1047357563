"""Files read over HTTP, patiently: what fails is asked for again from the byte where it broke off.

The bytes, and so the tokens, do not depend on what went wrong on the way: a file has the size that it had when it was
listed, or the run ends with the reason.
"""

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from email.message import Message
from typing import IO
from urllib.parse import unquote, urlsplit

from mamba_train.config_data import LONGEST_ASKED_PAUSE_SECONDS
from mamba_train.data.stored_files import CHUNK_BYTES

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
AGAIN = (408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529)  # what may be otherwise the next time


@dataclass(frozen=True)
class Patience:
    """How often in a row a request is repeated that brought nothing, and how long an answer may take."""

    retries: int
    timeout_seconds: float


@dataclass
class Requests:
    """Of this process: how many requests had to be repeated."""

    repeated: int = 0


REQUESTS = Requests()


class _Failed(Exception):
    """A request failed in a way that may pass; `pause` is how long the server asks to wait."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


def is_address(place: str) -> bool:
    """Whether a place is one of the network."""
    return place.startswith(("http://", "https://"))


class Attempts:
    """Counts what failed in a row, and waits longer each time."""

    def __init__(self, what: str, patience: Patience) -> None:
        self._what, self._patience, self._n_failed = what, patience, 0

    def succeeded(self) -> None:
        """Something came: the next failure is a first one."""
        self._n_failed = 0

    def failed(self, reason: str, pause: float = 0.0) -> None:
        """Wait before the next attempt. Raises ValueError when there have been enough."""
        self._n_failed += 1
        if self._n_failed > self._patience.retries:
            raise ValueError(f"{self._what}: given up after {self._n_failed} attempts in a row, the last one: {reason}")
        REQUESTS.repeated += 1
        grown = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** (self._n_failed - 1))
        time.sleep(max(grown, min(pause, LONGEST_ASKED_PAUSE_SECONDS)))


@dataclass(frozen=True)
class HttpFile:
    """A file at an address, of `size` stored bytes (0: unknown so far)."""

    address: str
    size: int
    patience: Patience

    @property
    def name(self) -> str:
        """The last part of the path."""
        return unquote(urlsplit(self.address).path.rpartition("/")[2])

    def __str__(self) -> str:
        return self.address

    def chunks(self) -> Iterator[bytes]:
        """The stored bytes, all of them. Raises ValueError that begins with the address."""
        attempts, offset = Attempts(self.address, self.patience), 0
        while offset < self.size:
            try:
                for chunk in self._from(offset):
                    attempts.succeeded()
                    offset += len(chunk)
                    yield chunk
                if offset < self.size:
                    attempts.failed(f"the answer ended at byte {offset:,} of {self.size:,}")
            except _Failed as failure:
                attempts.failed(str(failure), failure.pause)

    def find_size(self) -> "HttpFile":
        """The same file with its size, which is asked for. Raises ValueError that begins with the address."""
        attempts = Attempts(self.address, self.patience)
        while True:
            try:
                with closing(self._open("HEAD", 0)) as answer:
                    size = _number(answer.headers, "Content-Length")
                if size is not None:
                    return HttpFile(self.address, size, self.patience)
                attempts.failed("the answer does not say how long the file is")
            except _Failed as failure:
                attempts.failed(str(failure), failure.pause)

    def _from(self, offset: int) -> Iterator[bytes]:
        with closing(self._open("GET", offset)) as answer:
            begins, size = _extent(answer)
            if size is not None and size != self.size:
                raise _Failed(f"the file has {size:,} bytes there, {self.size:,} when it was listed: was it changed?")
            if begins > offset:
                raise _Failed(f"the answer begins at byte {begins:,}, not at {offset:,}")
            left_out = offset - begins  # of a server that always sends all
            while chunk := _read(answer):
                if left_out >= len(chunk):
                    left_out -= len(chunk)
                    continue
                chunk, left_out = chunk[left_out:], 0
                if offset + len(chunk) > self.size:
                    raise _Failed(f"the answer is longer than the file, {self.size:,} bytes")
                offset += len(chunk)
                yield chunk

    def _open(self, method: str, offset: int) -> "http.client.HTTPResponse":
        request = urllib.request.Request(self.address, method=method, headers={"Accept-Encoding": "identity"})
        if offset:
            request.add_header("Range", f"bytes={offset}-")
        for header, value in _credentials(self.address).items():
            request.add_unredirected_header(header, value)  # for this server, not for the one it sends us to
        try:
            answer: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=self.patience.timeout_seconds)
            return answer
        except urllib.error.HTTPError as error:
            if error.code in AGAIN:
                pause = _number(error.headers, "Retry-After") or 0
                raise _Failed(f"HTTP {error.code} {error.reason}", pause) from error
            raise ValueError(f"{self.address}: cannot be read (HTTP {error.code} {error.reason})") from error
        except (OSError, http.client.HTTPException) as error:  # URLError, resets, time-outs, an answer that is none
            raise _Failed(f"{type(error).__name__}: {error}") from error


def _read(answer: IO[bytes]) -> bytes:
    try:
        return answer.read(CHUNK_BYTES)
    except http.client.IncompleteRead as error:
        raise _Failed("the answer was cut short") from error
    except (OSError, http.client.HTTPException) as error:
        raise _Failed(f"{type(error).__name__}: {error}") from error


def _extent(answer: "http.client.HTTPResponse") -> tuple[int, int | None]:
    """The byte of the file with which an answer begins, and the size of the file, if it says so."""
    if answer.status != 206:
        return 0, _number(answer.headers, "Content-Length")
    where, _, size = answer.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
    first = where.partition("-")[0]
    if not first.isdecimal():
        raise _Failed(f"Content-Range: {answer.headers.get('Content-Range')!r}")
    return int(first), int(size) if size.isdecimal() else None


def _number(headers: Message, name: str) -> int | None:
    value = headers.get(name, "")
    return int(value) if value.isdecimal() else None


def _credentials(address: str) -> dict[str, str]:
    """What the hub wants to see of its users."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers

    if not address.startswith(constants.ENDPOINT + "/"):
        return {}
    headers = build_hf_headers()
    return {"Authorization": headers["authorization"]} if "authorization" in headers else {}
