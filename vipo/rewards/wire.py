"""Asking a server that may be broken or hostile: bounded in time and bytes, and everything it says is checked."""

import base64
import contextlib
import http.client
import io
import json
import math
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from vipo.config.reward_process import RemoteOptions
from vipo.errors import VipoError
from vipo.rewards.errors import RewardError
from vipo.text import one_line

_BLOCK = 2**20
_SHOWN = 300
AGAIN = frozenset({408, 409, 429, 502, 503, 504, 520, 521, 522, 523, 524, 529})
"""Statuses that may pass: a gateway that is restarted, or too many at once."""
_LONGEST_PAUSE = 30.0


class _Failed(VipoError):
    """The connection failed: it may be tried again, after `pause` seconds or more."""

    pause = 0.0


class Endpoint:
    """One server.

    Args:
        url: ``http(s)://host[:port][/path]``.
        options: how it is asked.
        called: begins each message.
        token: sent with each request; None: the value of the environment's ``token_env``, if that is set.
        gone: whether, and how, the server has ended for good: nothing is tried again then.
        again: statuses after which a request is tried again.

    Raises:
        RewardError: the environment has no such variable, or no token that a header can hold.
    """

    def __init__(
        self,
        url: str,
        options: RemoteOptions,
        called: str,
        token: str | None = None,
        gone: Callable[[], str | None] = lambda: None,
        again: frozenset[int] = AGAIN,
    ) -> None:
        self.called = f"{called} at {url}"
        self._parts = urlsplit(url)
        self._options, self._gone, self._again = options, gone, again
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        # No compressed answer: a small one could become any number of bytes.
        self._headers["Accept-Encoding"] = "identity"
        if options.token_env is not None:
            token = os.environ.get(options.token_env)
            if not token:
                raise RewardError(f"{self.called}: the environment has no {options.token_env}; put the token there")
        if token is not None:
            if not token.isascii() or not token.isprintable():
                raise RewardError(f"{self.called}: the token holds what a header cannot; give it without line ends")
            self._headers["Authorization"] = f"Bearer {token}"

    def ask(self, path: str, question: Mapping[str, Any] | None, most: int, bare: str | None = None) -> dict[str, Any]:
        """What the server answers: a JSON object.

        Args:
            path: below the address.
            question: posted as JSON; None: nothing is posted.
            most: bytes of an answer, at most.
            bare: name under which a list is returned that is the whole answer; None: that is refused.

        Raises:
            RewardError: it cannot be reached, took too long, refused, or said something else than a JSON object.
        """
        body = None if question is None else json.dumps(question, allow_nan=False).encode()
        for number in range(self._options.retries + 1):
            try:
                return self._object(*self._once(path, body, most), bare)
            except _Failed as failure:
                if (how := self._gone()) is not None:
                    raise RewardError(f"{self.called}: its process ended ({how})") from failure
                if number == self._options.retries:
                    tries = f"{number + 1} tries" if number else "one try"
                    raise RewardError(
                        f"{self.called}: no answer in {tries}, the last one: {failure}; see whether it runs, or raise "
                        "timeout or retries"
                    ) from failure
                pause = max(min(0.5 * 2**number, _LONGEST_PAUSE), min(failure.pause, self._options.timeout))
            time.sleep(pause)
        raise AssertionError

    def _once(self, path: str, body: bytes | None, most: int) -> tuple[int, bytes]:
        limit, host = self._options.timeout, str(self._parts.hostname)
        context = ssl.create_default_context() if self._parts.scheme == "https" else None
        connection: http.client.HTTPConnection = (
            http.client.HTTPConnection(host, self._parts.port, timeout=limit)
            if context is None
            else http.client.HTTPSConnection(host, self._parts.port, timeout=limit, context=context)
        )
        late = threading.Event()

        def hang_up() -> None:
            # A timeout of each read would never end a server that sends a byte at a time.
            late.set()
            if connection.sock is not None:
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(limit, hang_up)
        timer.daemon = True
        timer.start()
        try:
            # Not by the connection itself: what is hung up on must be known to it before anything is awaited.
            connection.sock = _connected(host, connection.port, limit)
            if context is not None:
                secured = context.wrap_socket(connection.sock, server_hostname=host, do_handshake_on_connect=False)
                connection.sock = secured
                self._in_time(late)
                secured.do_handshake()
            self._in_time(late)
            connection.request("GET" if body is None else "POST", self._parts.path + path, body, self._headers)
            response = connection.getresponse()
            found = self._read(response, most, late)
            self._in_time(late)
            if response.status in self._again:
                failed = _Failed(f"status {response.status}{_said(found)}")
                failed.pause = _seconds(response.headers.get("Retry-After"))
                raise failed
            return response.status, found
        except (OSError, http.client.HTTPException, ValueError, _Failed) as error:
            if late.is_set() or isinstance(error, TimeoutError):
                raise _Failed(f"it took more than {limit:g} s") from error
            if isinstance(error, _Failed):
                raise
            raise _Failed(f"{type(error).__name__}: {one_line(str(error), _SHOWN)}") from error
        finally:
            timer.cancel()
            connection.close()

    def _in_time(self, late: threading.Event) -> None:
        if late.is_set():
            raise _Failed(f"it took more than {self._options.timeout:g} s")

    def _read(self, response: http.client.HTTPResponse, most: int, late: threading.Event) -> bytes:
        encoding = response.headers.get("Content-Encoding", "identity").lower()
        if encoding != "identity":
            self._refuse(f"the answer is compressed ({one_line(encoding, _SHOWN)}), which was not asked for")
        if (response.length or 0) > most:
            self._refuse(f"the answer has {response.length} bytes, more than the {most} that it can need")
        found, block = bytearray(), memoryview(bytearray(min(_BLOCK, most + 1)))
        # Into a buffer of ours: what is read of a chunk whose length is below 0 would have no end.
        while count := response.readinto(block):
            self._in_time(late)
            found += block[:count]
            if len(found) > most:
                self._refuse(f"the answer has more than the {most} bytes that it can need")
        if response.length:
            raise _Failed(f"the answer ended {response.length} bytes early")
        return bytes(found)

    def _object(self, status: int, body: bytes, bare: str | None) -> dict[str, Any]:
        if 300 <= status < 400:
            self._refuse(f"it redirects (status {status}), which is not followed; give the address itself")
        try:
            found = json.loads(body.decode(), parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            start = one_line(repr(body[:80]), _SHOWN)
            self._refuse(f"status {status}, and the answer is no JSON ({type(error).__name__}): {start}")
        if bare is not None and isinstance(found, list):
            found = {bare: found}
        if not isinstance(found, dict):
            self._refuse(f"status {status}, and the answer is a {type(found).__name__}, not an object")
        if status != 200:
            self._refuse(f"status {status}{_said(body)}")
        return found

    def _refuse(self, why: str) -> NoReturn:
        raise RewardError(f"{self.called}: {why}")


def _said(body: bytes) -> str:
    """The error that a server tells, after a colon; nothing where it tells none."""
    found: Any = body.decode(errors="replace")
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(found)
        found = found.get("error", found) if isinstance(found, dict) else found
    told = one_line(str(found), _SHOWN)
    return f": {told}" if told else ""


def _seconds(told: str | None) -> float:
    """Those of a header Retry-After; 0 where it holds none, or a date."""
    return float(told) if told is not None and re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", told) else 0.0


def _connected(host: str, port: int, seconds: float) -> socket.socket:
    """A connection to the first address of a host that answers; all of them together get these seconds.

    Raises:
        OSError: none does.
    """
    end = time.monotonic() + seconds
    places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for number, (family, kind, protocol, _, address) in enumerate(places):
        found = None
        try:
            found = socket.socket(family, kind, protocol)
            # Each gets its share of what is left: one that never answers leaves time for the next.
            found.settimeout(max(0.001, (end - time.monotonic()) / (len(places) - number)))
            found.connect(address)
        except OSError:
            if found is not None:
                found.close()
            if number == len(places) - 1:
                raise
            continue
        found.settimeout(seconds)
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return found
    raise OSError(f"{host} has no address")


def encoded(frame: np.ndarray[Any, Any], form: str = "png") -> str:
    """A frame ``(H, W, 3)`` uint8 in base64, without a loss: as PNG, or as WebP."""
    buffer = io.BytesIO()
    if form == "png":
        Image.fromarray(frame).save(buffer, format="PNG", compress_level=1)
    else:
        Image.fromarray(frame).save(buffer, format="WEBP", lossless=True, exact=True, quality=0, method=0)
    return base64.b64encode(buffer.getvalue()).decode()


def finite_number(value: Any) -> float | None:
    """A number of JSON as a float; None for anything else, and for one that no float holds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _no_number(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON")
