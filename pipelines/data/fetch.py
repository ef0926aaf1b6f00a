"""Fetches large files over a bad line: resumed, checked, from mirrors, several at once."""

import hashlib
import math
import re
import ssl
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import requests
import urllib3.exceptions
from requests.exceptions import InvalidHeader, InvalidSchema, InvalidURL, TooManyRedirects
from urllib3.util import Retry

from pipelines.data.part import BLOCK, UNKNOWN, Origin, Part, Stopped
from pipelines.locks import hold_lock
from pipelines.progress import Progress
from pipelines.redaction import redact_url

RETRY = Retry(total=10, backoff_factor=1, backoff_max=60, backoff_jitter=1, retry_after_max=300)
TIMEOUT = (20, 60)  # seconds to connect, and without a byte after that
REAL_PROGRESS = 1 << 20  # bytes beyond what there ever was; with so many the retries start anew
TEMPORARY = (408, 425, 429, 500, 502, 503, 504)
AS_IT_IS = {"Accept-Encoding": "identity"}


class AddressFailed(Exception):
    """One address fails for good: it is the next one's turn."""


class Interrupted(Exception):
    """An attempt failed, and another may do better, after `pause` seconds if the server asks for that."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.pause = pause


@dataclass(frozen=True)
class Remote:
    """A file on the web: the addresses that have it, tried in order, and its SHA-256, empty if not known."""

    addresses: tuple[str, ...]
    sha256: str

    @property
    def url(self) -> str:
        return self.addresses[0]

    def file_in(self, folder: Path, suffix: str) -> Path:
        return folder / f"{hashlib.sha256(self.url.encode()).hexdigest()[:16]}.{suffix}"

    def missing_in(self, folder: Path, size: int) -> int:
        """How many of its `size` bytes are still to come."""
        part = self.file_in(folder, "part")
        return max(0, size - (part.stat().st_size if part.exists() else 0))


@contextmanager
def claim(remotes: Sequence[Remote], folder: Path) -> Iterator[None]:
    """Holds what is fetched of `remotes` into `folder` for this process, and removes it when the block ends well.

    A process that wants one of the same files says so and waits. A lock dies with its process.
    """
    with ExitStack() as stack:
        for remote in sorted(remotes, key=lambda remote: remote.url):  # in one order: no two wait for each other
            stack.enter_context(hold_lock(remote.file_in(folder, "lock"), partial(say_who_fetches, remote)))
        yield
        for remote in remotes:
            remote.file_in(folder, "part").unlink(missing_ok=True)
            remote.file_in(folder, "json").unlink(missing_ok=True)


def say_who_fetches(remote: Remote, holder: str) -> None:
    print(f"{holder} is fetching {redact_url(remote.url)}; waiting for it to end", file=sys.stderr, flush=True)


def ask_sizes(remotes: Sequence[Remote]) -> dict[str, int]:
    """Bytes by URL, as a server tells them without sending the file; 0 where none does."""

    def size_of(remote: Remote) -> int:
        for address in remote.addresses:
            with suppress(requests.RequestException):
                answer = requests.head(address, headers=AS_IT_IS, allow_redirects=True, timeout=TIMEOUT)
                if answer.ok and (size := _number(answer.headers.get("Content-Length"))):
                    return size
        return 0

    with ThreadPoolExecutor(max(1, len(remotes))) as pool:
        return dict(zip((remote.url for remote in remotes), pool.map(size_of, remotes), strict=True))


def fetch_all(remotes: Sequence[Remote], folder: Path, sizes: dict[str, int]) -> dict[str, Path]:
    """The files by URL, whole, with the right checksum and on the disk, in a `folder` that `claim` holds.

    It goes on from what is there already. The first failure stops the others, and what has come stays for the
    next run. Raises ValueError that names every address that was tried.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(max(1, len(remotes))) as pool:
        futures = {remote.url: pool.submit(_fetch, remote, folder, sizes[remote.url], stop) for remote in remotes}
        try:
            for future in as_completed(futures.values()):
                future.result()
        except BaseException:
            stop.set()
            raise
    return {url: future.result() for url, future in futures.items()}


def _fetch(remote: Remote, folder: Path, size: int, stop: threading.Event) -> Path:
    path = remote.file_in(folder, "part")
    failures: list[str] = []
    with Progress(None, f"fetch {redact_url(remote.url).rpartition('/')[2]}", size or math.inf, "B") as bar:
        bar.unit_scale = True
        with Part(path, bar, stop) as part:
            for address in remote.addresses:
                try:
                    _fetch_from(address, part, remote.sha256)
                    return path
                except AddressFailed as error:
                    failures.append(f"{redact_url(address)} {error}")
                    part.say(f"{failures[-1]}; {len(remote.addresses) - len(failures)} more addresses to try")
    raise ValueError("; ".join(failures))


def _fetch_from(address: str, part: Part, sha256: str) -> None:
    """Returns when the file is whole. A wrong checksum gets a second chance, from the first byte."""
    for chance in (1, 2):
        _transfer(address, part, sha256)
        part.sync()
        got = part.digest.hexdigest()
        if not sha256:
            part.say(f"{redact_url(address)} has sha256 {got}; with that in download.sha256 it would be checked")
        if sha256 in ("", got):
            return
        part.restart(UNKNOWN)
        if chance == 1:
            part.say(f"{redact_url(address)} has sha256 {got}, expected {sha256}; fetching it once more")
    raise AddressFailed(f"has sha256 {got}, expected {sha256}; fetch it again or correct download.sha256")


def _transfer(address: str, part: Part, sha256: str) -> None:
    """Returns when all has come, after as many attempts as it takes while they bring something."""
    retry, most = RETRY, part.size
    while True:
        try:
            return _attempt(address, part, sha256)
        except Interrupted as error:
            state = f"{error}, at {part.size} of {part.origin.size or 'unknown'} bytes"
            if part.size >= most + REAL_PROGRESS:
                retry, most = RETRY, part.size
            try:
                retry = retry.increment(error=error)
            except urllib3.exceptions.MaxRetryError:
                raise AddressFailed(
                    f"cannot be fetched: {state}, after {len(retry.history) + 1} attempts; "
                    "check the address and the network, and run again to go on from there"
                ) from error
            pause = retry.get_backoff_time() if error.pause is None else error.pause
        part.say(f"{redact_url(address)}: {state}; going on in {pause:.1f} s")
        if part.stop.wait(pause):
            raise Stopped


def _attempt(address: str, part: Part, sha256: str) -> None:
    """One request. With a checksum a part of any origin may go on; without one the origin must agree."""
    if sha256 and 0 < part.size == part.origin.size:
        return
    if part.size and not sha256 and not part.origin.validator:
        part.restart(UNKNOWN)
    headers = dict(AS_IT_IS)
    if part.size:
        headers["Range"] = f"bytes={part.size}-"
        if not sha256:
            headers["If-Range"] = part.origin.validator
    try:
        with requests.get(address, headers=headers, stream=True, timeout=TIMEOUT) as answer:
            total = _begin(answer, part, sha256)
            if total is None:
                return
            for block in iter(lambda: answer.raw.read1(BLOCK), b""):
                part.append(block)
    except (InvalidURL, InvalidSchema, InvalidHeader, TooManyRedirects) as error:
        raise AddressFailed(f"cannot be fetched: {redact_url(error)}; check the address") from error
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        cause = _cause(error)
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise AddressFailed(f"has a certificate that is not good: {cause.verify_message}; use a mirror") from error
        raise Interrupted(redact_url(cause)) from error
    if part.size > total > 0:
        part.restart(UNKNOWN)
        raise Interrupted("it sends more than there is")
    if part.size < total:
        raise Interrupted("the answer ends early")


def _begin(answer: requests.Response, part: Part, sha256: str) -> int | None:
    """Readies the part for the answer's body; the whole file's size, 0 if not told, None if nothing is missing."""
    status, headers = answer.status_code, answer.headers
    if status in TEMPORARY:
        with suppress(urllib3.exceptions.InvalidHeader):
            raise Interrupted(f"it answers {status}", RETRY.get_retry_after(answer.raw))
        raise Interrupted(f"it answers {status}")
    if status not in (200, 206, 416):
        raise AddressFailed(f"answers {status}; check the address")
    if headers.get("Content-Encoding", "identity") != "identity":
        raise AddressFailed(f"sends {headers['Content-Encoding']} where the file as it is was asked for; use a mirror")
    told = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(?:(\d+)|\*)", headers.get("Content-Range", ""))
    total = _number(headers.get("Content-Length") if status == 200 else told and told[2])
    validators = ("", "") if sha256 else (headers.get("ETag", ""), headers.get("Last-Modified", ""))
    if status == 200:
        part.restart(Origin(total, *validators))
        return total
    start = told and told[1 if status == 206 else 2]
    if start != str(part.size) or part.origin.differs(Origin(total, *validators)):
        part.restart(UNKNOWN)
        raise Interrupted("it has another file now, or sends other bytes than asked for")
    return total if status == 206 else None


def _number(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 0


def _cause(error: BaseException) -> BaseException:
    """The bottom of the errors of requests and urllib3, which wrap one another."""
    for inner in (getattr(error, "reason", None), *error.args):
        if isinstance(inner, BaseException):
            return _cause(inner)
    return error
