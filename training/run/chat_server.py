"""Asks an OpenAI-compatible server: retries, waits while it is busy or gone, and gives up within a stated time.

The key is read from the environment and goes into one header; texts of the server are cleared of it before any use.
"""

import asyncio
import itertools
import json
import logging
import os
import random
import ssl
import time
from email.utils import parsedate_to_datetime
from typing import NamedTuple

import httpx

from base.console import bars_cleared
from base.errors import Interrupted, UsageError, first_line


logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
BACKOFF_SECONDS = 0.5, 15.0  # first and longest wait between two tries, each drawn from half of it to all
SAID_AFTER = 2.0  # seconds without an answer; shorter waits are nobody's concern
MAX_FAILURES = 4  # of one request, while the server answers others
MAX_REPLY_BYTES = 4 * 2**20
SHOWN_CHARACTERS = 200  # of a server's error message
LOOPBACK = {"localhost", "127.0.0.1", "::1"}  # reached without a proxy, whatever the environment says
UNAVAILABLE = {429, 502, 503, 504, 529}  # busy, or starting behind a gateway
WRONG_SETTINGS = {401: "the key is not accepted", 403: "the key is not allowed to", 404: "no such model or address"}


class Reply(NamedTuple):
    """An answer's text; `is_cut`: ended by the limit of tokens, `is_refused`: by a filter."""

    text: str
    is_cut: bool
    is_refused: bool


class RequestRefused(Exception):
    """This request gets no answer, others may."""


class Failed(Exception):
    """A try that failed, for reasons that may lie in the request."""


class Dropped(Failed):
    """The connection broke while the answer was made: the server is gone, or the request has killed it."""


class Unavailable(Exception):
    """The server is gone or busy: `seconds` is for how long it asks to be left alone, None if it does not say."""

    def __init__(self, reason: str, seconds: float | None = None):
        super().__init__(reason)
        self.seconds = seconds


class ChatServer:
    """One server, for as many requests at once as its users make. An `async with` block closes the connections."""

    def __init__(self, base_url: str, key_variable: str, timeout: float, max_wait: float):
        self.base_url, self.timeout, self.max_wait = base_url.rstrip("/"), timeout, max_wait
        self.key_variable, self.key = key_variable, read_key(key_variable)
        self.client = make_client(self.base_url, self.key)
        self.num_answers = 0  # good ones
        self.failing_since: float | None = None  # since when every try has failed
        self.open_at = 0.0  # nothing is sent before
        self.has_said = False  # that it is waited for

    async def __aenter__(self) -> "ChatServer":
        return self

    async def __aexit__(self, *_) -> None:
        await self.client.aclose()

    async def only_model(self) -> str:
        """The model that the server lists; UsageError if it does not list exactly one."""
        try:
            listed = await self.request("GET", "/models", None, names_in)
        except RequestRefused as error:
            raise UsageError(f"{self.base_url}: lists no models ({error}); give --model") from error
        if len(listed) != 1:
            names = printable(", ".join(listed)) or "none"
            raise UsageError(f"{self.base_url}: serves {names}; choose one with --model")
        return listed[0]

    async def ask(self, body: bytes) -> Reply:
        """The first choice for a chat completion's body. RequestRefused, Interrupted or UsageError without one."""
        return await self.request("POST", "/chat/completions", body, reply_in)

    async def request(self, method: str, path: str, body: bytes | None, read):
        """What `read` makes of the JSON of a good answer."""
        failures, num_answers = 0, self.num_answers
        for attempt in itertools.count(1):
            await self.until_open()
            try:
                found = read(await self.try_once(method, path, body))
            except Unavailable as error:
                self.note_failure(str(error), error.seconds or 0.0)
                self.open_at = max(self.open_at, time.monotonic() + (error.seconds or backoff(attempt)))
            except Failed as error:
                # A server that is gone breaks every connection: that is counted only if it answered others since
                failures += not isinstance(error, Dropped) or num_answers < self.num_answers
                num_answers = self.num_answers
                self.note_failure(str(error))
                if failures == MAX_FAILURES:
                    raise RequestRefused(str(error)) from error
                await asyncio.sleep(backoff(attempt))
            else:
                self.note_answer()
                return found

    async def try_once(self, method: str, path: str, body: bytes | None):
        """The JSON of the answer to one request."""
        try:
            async with asyncio.timeout(self.timeout):  # in all: httpx's own limits are per read
                async with self.client.stream(method, self.base_url + path, content=body) as response:
                    text = self.without_key(await read_text(response))
        except TimeoutError as error:
            raise Failed(f"no answer within {self.timeout:g} s") from error
        except httpx.DecodingError as error:
            raise Failed(f"a broken answer ({self.without_key(first_line(error))})") from error
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
            raise Unavailable(self.without_key(first_line(error))) from error
        except httpx.TransportError as error:
            raise Dropped(self.without_key(first_line(error))) from error
        check_status(self.base_url, self.key_variable, response, text)
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise Failed("a broken answer (not JSON)") from error

    def without_key(self, text: str) -> str:
        """Without the key, which some servers repeat in their errors. Words such as EMPTY stand for none."""
        return text.replace(self.key, "[the key]") if len(self.key) >= 8 else text

    # ------------------------------------------------------------ waiting

    async def until_open(self) -> None:
        while (seconds := self.open_at - time.monotonic()) > 0:
            await asyncio.sleep(seconds + random.uniform(0, min(seconds, 1)))  # not all at once

    def note_failure(self, reason: str, asked_for: float = 0.0) -> None:
        """Interrupted once every try has failed for `max_wait`; before that, one line. `asked_for`: seconds to come."""
        now = time.monotonic()
        self.failing_since = self.failing_since or now
        waited = now - self.failing_since
        if waited + asked_for > self.max_wait:
            asked = f", and it asks for {asked_for:.0f} s more" if asked_for else ""
            raise Interrupted(
                f"{self.base_url}: no answer for {waited:.0f} s ({reason}){asked}; every caption so far is kept, and the "
                "same command goes on"
            )
        if not self.has_said and waited + asked_for > SAID_AFTER:
            self.has_said = True
            self.warn(f"no answer ({reason}); it is waited for, up to {self.max_wait:g} s")

    def note_answer(self) -> None:
        if self.has_said:
            self.has_said = False
            self.warn(f"answers again, after {time.monotonic() - self.failing_since:.0f} s")
        self.failing_since = None
        self.num_answers += 1

    def warn(self, line: str) -> None:
        with bars_cleared():
            logger.warning("%s: %s", self.base_url, line)


# ---------------------------------------------------------------- one request


def read_key(variable: str) -> str:
    """The key in the environment; empty if there is none."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and (key.isprintable() or not key) and " " not in key):
        raise UsageError(f"${variable} (--api_key_env): holds characters that no key has")
    return key


def make_client(base_url: str, key: str) -> httpx.AsyncClient:
    url = httpx.URL(base_url)
    verify = ssl.create_default_context() if url.scheme == "https" else False  # reading certificates takes 0.1 s
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    limits = httpx.Limits(max_connections=None)  # callers bound it
    timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)
    options = {"headers": headers, "limits": limits, "timeout": timeout, "trust_env": url.host not in LOOPBACK}
    try:
        return httpx.AsyncClient(verify=verify, **options)
    except ImportError as error:  # a SOCKS proxy needs another package
        raise UsageError(f"--base_url: the proxy of the environment cannot be used ({first_line(error)})") from error


async def read_text(response: httpx.Response) -> str:
    content = bytearray()
    async for piece in response.aiter_bytes():
        content += piece
        if len(content) > MAX_REPLY_BYTES:
            raise Failed(f"an answer of more than {MAX_REPLY_BYTES >> 20} MiB")
    return content.decode(errors="replace")


def check_status(base_url: str, key_variable: str, response: httpx.Response, text: str) -> None:
    """Raise what a status other than 2xx calls for."""
    code = response.status_code
    if response.is_success:
        return
    reason = f"HTTP {code}: {message_in(text) or response.reason_phrase}"
    if code in UNAVAILABLE:
        raise Unavailable(reason, retry_after(response))
    if code >= 500 or code in (408, 409, 425):
        raise Failed(reason)
    if code in WRONG_SETTINGS or response.has_redirect_location:
        what = WRONG_SETTINGS.get(code, "the address has moved")
        hint = f"it is read from ${key_variable}" if code in (401, 403) else "check --base_url and --model"
        raise UsageError(f"{base_url}: {what} ({reason}); {hint}")
    raise RequestRefused(reason)


def message_in(text: str) -> str:
    """The message of an error in any of the usual shapes, in one line."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = text
    for name in ("error", "message", "detail"):
        found = found.get(name, found) if isinstance(found, dict) else found
    return printable(str(found))[:SHOWN_CHARACTERS]


def printable(text: str) -> str:
    """One line that a terminal can be shown."""
    return "".join(filter(str.isprintable, " ".join(text.split())))


def retry_after(response: httpx.Response) -> float | None:
    """Seconds, from a number of them or a date."""
    value = response.headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(value)) if value.replace(".", "", 1).isdigit() else until(value)
    except (TypeError, ValueError):
        return None


def until(date: str) -> float:
    return max(0.0, parsedate_to_datetime(date).timestamp() - time.time())


def backoff(count: int) -> float:
    """Seconds before the try after `count` failures, jittered so that requests do not come back together."""
    first, most = BACKOFF_SECONDS
    return min(most, first * 2 ** min(count - 1, 20)) * random.uniform(0.5, 1)


# ---------------------------------------------------------------- answers


def names_in(answer) -> list[str]:
    try:
        return [str(model["id"]) for model in answer["data"]]
    except (KeyError, TypeError) as error:
        raise Failed("a broken answer (no list of models)") from error


def reply_in(answer) -> Reply:
    """The first choice of a chat completion; its content may be a text, parts of one, or missing."""
    try:
        choice = answer["choices"][0]
        message, ending = choice["message"], choice.get("finish_reason")
        content, refusal = message.get("content") or "", message.get("refusal")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise Failed("a broken answer (no message in it)") from error
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return Reply(str(content), ending == "length", bool(refusal) or ending == "content_filter")
