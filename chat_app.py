"""A small real-time backend for AI chat: one file, one process, one SQLite database.

    uv run chat_app.py                serve (settings: environment and .env, see .env.example)
    uv run chat_app.py token USER     print a token for USER (needs JWT_SECRET)
    uv run chat_app.py backup FILE    copy the database to FILE, also while the service runs

What it promises to its clients stands in docs/protocol.md. The way of one message, which is also
the way through this file:

    frame in -> parse_action -> Chats.send -> Database.accept (one transaction) -> echo
    -> Chats._answer -> model -> Reply's pieces -> each Connection's cursor -> frames out
    -> Chats._decide -> Database.settle -> ending out -> the chat's next reply

What always holds:

- Rows before the model: a message and its still empty reply are committed together before
  anybody hears of them. A row that is `streaming` at start-up is the trace of a crash.
- A reply is a growing list of pieces, a connection a cursor over it: the model waits for nobody.
- A reply ends once, in `Chats._decide`, the done-callback of its task; its ending is published
  by the commit that stores it.
- The application decides on the event loop, the database stores on its thread. One writer owns
  the write connection; what a commit makes true is announced by synchronous callbacks, in the
  order of the commits: nobody's cancellation can come in between.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import hashlib
import ipaddress
import json
import logging
import logging.handlers
import os
import queue
import re
import signal
import socket
import sqlite3
import sys
import threading
import time
import unicodedata
import urllib.request
import uuid
import zlib
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import (
    AsyncExitStack,
    ExitStack,
    aclosing,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, TypeVar
from urllib.parse import parse_qsl, quote, urlsplit, urlunsplit

import aiohttp
import aiosqlite
import filelock
import h11
import httpx2
import jwt
import openai
import prometheus_client as prometheus
import uvicorn
import yaml
from dotenv import dotenv_values
from pydantic import AfterValidator as Check
from pydantic import (
    BaseModel,
    Field,
    SecretBytes,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_core import from_json, to_json
from pydantic_settings import BaseSettings
from starlette.applications import Starlette
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import (
    FileResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket, WebSocketDisconnect
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import InvalidState
from websockets.protocol import State

if sys.platform != "win32":
    import resource

VERSION = "1.1.0"
HERE = Path(__file__).resolve().parent
MAX_ID = 2**63 - 1
T = TypeVar("T")
log = logging.getLogger("chat")


# --- Settings: all that can be set, with its default. Knows nothing of the rest. ---


class StartError(Exception):
    """The service can't start. The text is one sentence that names the setting at fault."""


def sqlite_url(url: str) -> str:
    scheme, _, path = url.partition(":///")
    if scheme not in {"sqlite", "sqlite+aiosqlite"} or path in {"", ":memory:"}:
        raise ValueError(
            "must be sqlite:///FILE, or sqlite:////FILE for an absolute path"
        )
    return url


def header_safe(key: SecretStr) -> SecretStr:
    """Return `key` without blanks around it; ValueError if an HTTP header can't carry it."""
    text = key.get_secret_value().strip()
    if not re.fullmatch("[!-~]*", text):
        raise ValueError(
            "may have printable ASCII characters only, no blanks in between"
        )
    return SecretStr(text)


def split_list(text: str) -> list[str]:
    """Return the names in a comma-separated list."""
    return [name for name in re.split(r"[,\s]+", text) if name]


def plain_origin(origin: str) -> str:
    """Return `origin` in lower case and without its scheme's default port (RFC 6454)."""
    text = origin.lower().rstrip("/")
    return re.sub(r"^(http://.*):80$|^(https://.*):443$", r"\1\2", text)


ORIGINS = r"(?i)^(([*]|null|[a-z][a-z0-9+.-]*://[^/,\s*]+/?)([,\s]+|$)|[,\s]+)*$"
Count = Annotated[int, Field(ge=1)]
CountOrNone = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]


class Settings(BaseSettings):
    """The variables, each in upper case. ValidationError where one is out of its range."""

    model_config = {"frozen": True, "extra": "ignore", "env_ignore_empty": True}

    database_url: Annotated[str, Check(sqlite_url)] = "sqlite:///./chat.db"
    openai_api_key: Annotated[SecretStr, Check(header_safe)] | None = None
    openai_base_url: Annotated[str, Field(pattern=r"^https?://[^/?#\s]\S*$")] | None = (
        None
    )
    model_name: str = "gpt-3.5-turbo"
    models: str = ""
    system_prompt: str = ""
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8005
    environment: Literal["development", "production"] = "development"
    jwt_secret: Annotated[SecretBytes, Field(min_length=32)] | None = None
    jwt_jwks_url: Annotated[str, Field(pattern=r"^https?://[^/?#\s]\S*$")] | None = None
    jwt_audience: str | None = None
    allowed_origins: Annotated[str, Field(pattern=ORIGINS)] = ""
    allowed_hosts: str = ""
    shard: Annotated[int, Field(ge=10, le=99)] | None = None
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["text", "json"] = "text"
    max_message_chars: Count = 32_000
    max_frame_bytes: Count = 409_600
    max_reply_chars: Count = 100_000
    max_reply_seconds: Seconds = 600
    model_timeout_seconds: Seconds = 60
    max_context_chars: Count = 48_000
    max_running_replies: Count = 1_000
    max_waiting_replies: CountOrNone = 8
    max_connections_per_user: Count = 20
    max_connections: Count = 10_000
    messages_per_minute: CountOrNone = 60
    slow_reader_seconds: Seconds = 30
    drain_seconds: Annotated[float, Field(ge=0, le=10)] = 5

    @model_validator(mode="after")
    def _check_tokens(self) -> Settings:
        if self.environment == "production" and not self.asks_for_tokens:
            raise ValueError(
                "JWT_SECRET: is required when ENVIRONMENT=production (or JWT_JWKS_URL)"
            )
        return self

    @property
    def asks_for_tokens(self) -> bool:
        return self.jwt_secret is not None or self.jwt_jwks_url is not None

    @property
    def is_demo(self) -> bool:
        return self.openai_api_key is None and self.openai_base_url is None

    @property
    def origins(self) -> list[str]:
        return [plain_origin(origin) for origin in split_list(self.allowed_origins)]

    @property
    def hosts(self) -> list[str]:
        return split_list(self.allowed_hosts.lower())

    @property
    def database_path(self) -> str:
        return self.database_url.partition(":///")[2]


# --- Log and metrics: what the service tells about itself, never what people say. ---

# That wait for a slow terminal, pipe or disk; what comes then is dropped
LOG_LINES = 10_000
LOG_END_SECONDS = 1.0  # for those at the end of the process
WAIT_BUCKETS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60]  # in seconds
REPLY_BUCKETS = [0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000]
COMMIT_BUCKETS = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 5]


def now() -> str:
    """Return the time as RFC 3339 in UTC with milliseconds and Z (docs/protocol.md)."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def log_event(
    name: str,
    level: int = logging.INFO,
    error: BaseException | None = None,
    **about: Any,
) -> None:
    """Log one event with its ids, never what people or the model said; a traceback of `error`."""
    log.log(level, name, exc_info=error, extra={"about": about})


class EventFormat(logging.Formatter):
    """One line per event: text for people, with LOG_FORMAT=json for machines."""

    def __init__(self, log_format: str) -> None:
        super().__init__()
        self._json = log_format == "json"

    def format(self, record: logging.LogRecord) -> str:
        about = getattr(record, "about", {})
        known = {name: value for name, value in about.items() if value is not None}
        head = {"time": now(), "level": record.levelname, "event": record.getMessage()}
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        if self._json:
            end = {"traceback": trace} if trace else {}
            return to_json(head | known | end).decode()
        pairs = [f"{name}={to_json(value).decode()}" for name, value in known.items()]
        line = " ".join([*head.values(), *pairs])
        return f"{line}\n{trace}" if trace else line


class LogQueue(logging.handlers.QueueHandler):
    """Hands records to the thread that writes them. A full queue drops them: nobody waits."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record  # the thread is in this process: nothing needs to be picklable

    def enqueue(self, record: logging.LogRecord) -> None:
        with suppress(queue.Full):
            self.queue.put_nowait(record)


class Stderr(logging.Handler):
    """Writes lines past Python's buffer, whose lock a stuck write would hold at the exit."""

    def emit(self, record: logging.LogRecord) -> None:
        line = f"{self.format(record)}\n".encode("utf-8", "replace")
        with suppress(OSError):
            # closed, or its disk is full: there is nowhere left to tell it
            while line:
                line = line[os.write(2, line) :]


@contextmanager
def logging_to_stderr(settings: Settings) -> Iterator[None]:
    """Log our events from LOG_LEVEL up, and others' warnings, on a thread of its own."""
    lines: queue.Queue[Any] = queue.Queue(LOG_LINES)
    stderr = Stderr()
    stderr.setFormatter(EventFormat(settings.log_format))
    listener = logging.handlers.QueueListener(lines, stderr)
    logging.basicConfig(handlers=[LogQueue(lines)], level="WARNING", force=True)
    log.setLevel(settings.log_level)
    # A client's broken UTF-8 is not worth a traceback: it is closed with 1007.
    uvicorn_log = logging.getLogger("uvicorn.error")
    uvicorn_log.addFilter(lambda record: "Invalid UTF-8" not in record.getMessage())
    listener.start()
    try:
        yield
    finally:
        deadline = time.monotonic() + LOG_END_SECONDS
        while not lines.empty() and time.monotonic() < deadline:
            time.sleep(0.01)
        if lines.empty():
            # Else nobody reads: its thread, a daemon, is left where it hangs
            listener.stop()


class Metrics:
    """What /metrics shows, in Prometheus' terms."""

    def __init__(self) -> None:
        self.registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=self.registry)
        self.connections = self._gauge(
            "chat_connections", "Open WebSockets and event streams"
        )
        self.running = self._gauge("chat_replies_running", "Replies being written")
        self.waiting = self._gauge(
            "chat_replies_waiting", "Replies waiting for their turn"
        )
        self.replies = prometheus.Counter(
            "chat_replies",
            "Replies that ended, by status",
            ["status"],
            registry=self.registry,
        )
        self.aborts = self._counter("chat_aborts", "Replies that somebody stopped")
        self.tokens = self._counter(
            "chat_tokens", "Pieces the model has sent, of ended replies"
        )
        self.commits = self._counter(
            "chat_commits", "Transactions committed or rolled back"
        )
        self.operations = self._counter(
            "chat_operations", "Operations in those transactions"
        )
        self.dropped = self._counter(
            "chat_dropped_readers", "Connections that did not read"
        )
        self.first_token = self._times(
            "chat_first_token_seconds",
            "From a message to its first piece",
            WAIT_BUCKETS,
        )
        self.duration = self._times(
            "chat_reply_seconds", "From a message to its end", REPLY_BUCKETS
        )
        self.latency = self._times(
            "chat_commit_seconds", "Duration of a transaction", COMMIT_BUCKETS
        )

    def _gauge(self, name: str, about: str) -> prometheus.Gauge:
        return prometheus.Gauge(name, about, registry=self.registry)

    def _counter(self, name: str, about: str) -> prometheus.Counter:
        return prometheus.Counter(name, about, registry=self.registry)

    def _times(
        self, name: str, about: str, buckets: list[float]
    ) -> prometheus.Histogram:
        return prometheus.Histogram(
            name, about, buckets=buckets, registry=self.registry
        )


# --- Domain: what there is. No I/O. ---


# What has become of a message. Replies go from STREAMING to exactly one of the others.
Status = StrEnum("Status", "COMPLETE STREAMING ABORTED FAILED INTERRUPTED")


@dataclass(frozen=True, slots=True)
class Chat:
    """A chat as stored and as sent (docs/protocol.md, Objects)."""

    id: int
    user_id: str
    title: str
    created_at: str
    updated_at: str
    model: str | None
    instructions: str | None


@dataclass(frozen=True, slots=True)
class Message:
    """A message or a reply as stored and as sent (docs/protocol.md, Objects)."""

    id: int
    chat_id: int
    content: str
    is_ai: bool
    timestamp: str
    status: Status
    task_id: str
    reply_to: int | None
    finish_reason: str | None
    client_msg_id: str | None
    replaces: int | None
    reasoning: str | None
    model: str | None
    prompt_tokens: int | None
    completion_tokens: int | None

    @property
    def ids(self) -> dict[str, Any]:
        return {"chat_id": self.chat_id, "task_id": self.task_id, "message_id": self.id}


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks. Without tokens that is nobody in particular: everybody is believed."""

    user_id: str | None = None
    expires: float = float("inf")  # Unix time, of the token

    def may_see(self, owner: str) -> bool:
        return self.user_id is None or self.user_id == owner

    @property
    def expired(self) -> bool:
        return time.time() >= self.expires


ANYONE = Asker()


@dataclass(slots=True)
class Report:
    """What the model says about its reply besides the text; filled in while it streams."""

    finish_reason: str | None = None
    model: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Delta(NamedTuple):
    """What one read of the model's stream brought.

    `alive`: it held any sign that the model is at work (text, thinking, a tool call), which
    keep-alive comments are not.
    """

    text: list[str]
    reasoning: list[str]
    alive: bool


# The one port to a model: the turns and the model's name in, what each read brought out; the rest
# in Report. A turn has a role (system, user, assistant) and a content.
Turn = dict[str, str]
Model = Callable[[list[Turn], str, Report], AsyncGenerator[Delta, None]]


class Cursor(NamedTuple):
    """How much of a reply somebody has: pieces of text and of reasoning."""

    text: int
    reasoning: int


START = Cursor(0, 0)


class Reply:
    """A reply that runs or waits. Only the event loop touches it."""

    def __init__(
        self, user_id: str, row: Message, settled: asyncio.Future[Message]
    ) -> None:
        self.user_id = user_id
        self.row = row  # as it was stored: without text
        self.settled = settled  # resolves with the row as its ending was stored
        self.report = Report()
        self.task: asyncio.Task[None] | None = None  # None: waiting for its turn
        self.stopped: Status | None = None  # how somebody else than the model ended it
        # These two only grow; together they are the wire's `seq`
        self.pieces: list[str] = []
        self.thoughts: list[str] = []
        self.chars = 0
        self.saved = START  # what the last checkpoint has
        self.created = time.monotonic()
        # The beginning of its token frames, kept by the wire section
        self.token_prefix = ""

    @property
    def cursor(self) -> Cursor:
        return Cursor(len(self.pieces), len(self.thoughts))

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def reasoning(self) -> str | None:
        return "".join(self.thoughts) or None

    def add(self, delta: Delta, limit: int) -> bool:
        """Append what came, cut at `limit` characters in all; True if that cut any."""
        cut = (
            self._append(self.thoughts, delta.reasoning, limit)
            if delta.reasoning
            else False
        )
        return self._append(self.pieces, delta.text, limit) or cut

    def _append(self, known: list[str], pieces: list[str], limit: int) -> bool:
        for piece in pieces:
            if self.chars + len(piece) > limit:
                known.extend(filter(None, [piece[: limit - self.chars]]))
                self.chars = limit
                return True
            known.append(piece)
            self.chars += len(piece)
        return False


class Fault(NamedTuple):
    """What clients are told under a code: an HTTP status, a WebSocket's close code, a sentence."""

    status: int
    close: int
    sentence: str


FAULTS = {
    "invalid_json": Fault(400, 4403, "The body is no JSON."),
    "invalid_frame": Fault(422, 4403, "A field is not as it must be."),
    "unauthorized": Fault(401, 4401, "A valid bearer token is required."),
    "forbidden": Fault(403, 4403, "That is not allowed."),
    "not_found": Fault(404, 4403, "There is nothing here."),
    "chat_not_found": Fault(404, 4403, "There is no such chat."),
    "task_not_found": Fault(404, 4403, "There is no such task."),
    "message_not_found": Fault(
        404, 4403, "There is no such user message in this chat."
    ),
    "unknown_action": Fault(422, 4403, "There is no such action."),
    "method_not_allowed": Fault(405, 4403, "This method is not allowed here."),
    "busy": Fault(409, 4403, "A reply of this chat is still being written."),
    "not_current": Fault(
        409, 4403, "Another message stands in the place of this one already."
    ),
    "not_running": Fault(409, 4403, "There is nothing to stop: it has ended."),
    "too_large": Fault(413, 1009, "The body is too large."),
    "unsupported_media_type": Fault(415, 4403, "The body must be JSON."),
    "misdirected": Fault(421, 1012, "This chat or user is of another shard."),
    "rate_limited": Fault(429, 1013, "Too many messages in a minute."),
    "overloaded": Fault(503, 1013, "The service has too much to do."),
    "internal": Fault(503, 1011, "Something went wrong in the service."),
    "interrupted": Fault(
        503, 1012, "The service was stopped while this reply was written."
    ),
    "model_error": Fault(503, 1011, "The model could not answer."),
    "model_auth": Fault(
        503, 1011, "The model did not accept the service's credentials."
    ),
    "model_rate_limited": Fault(
        503, 1011, "The model has too much to do. Try again later."
    ),
    "model_timeout": Fault(503, 1011, "The model took too long."),
    "model_context": Fault(503, 1011, "The conversation is too long for the model."),
    "model_incomplete": Fault(
        503, 1011, "The model stopped in the middle of its reply."
    ),
}


class ChatError(Exception):
    """A request that can't be granted: a code of FAULTS for programs, a sentence for people."""

    def __init__(
        self, code: str, message: str = "", retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message or FAULTS[code].sentence
        self.retry_after = retry_after


class ModelError(ChatError):
    """The model failed. The message is for the log only: it could hold a key or an address."""


class RateLimit:
    """Token buckets: a key may do `most` things at once, and as many in each further minute."""

    def __init__(self, most: int) -> None:
        self._most = most  # 0: no limit
        # left, and when
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, key: str) -> None:
        """Take one token of `key`; ChatError `rate_limited` if it has none."""
        if not self._most:
            return
        at = time.monotonic()
        self._forget_full(at)
        left, since = self._buckets.pop(key, (float(self._most), at))
        left = min(self._most, left + (at - since) * self._most / 60)
        enough = left > 0.999  # sums of floats
        self._buckets[key] = (left - enough, at)
        if not enough:
            seconds = (1 - left) * 60 / self._most
            raise ChatError("rate_limited", retry_after=int(seconds) + 1)

    def give_back(self, key: str) -> None:
        """Undo a `take`: what was asked for was refused."""
        if key in self._buckets:
            left, since = self._buckets[key]
            self._buckets[key] = (left + 1, since)

    def _forget_full(self, at: float) -> None:
        """Drop the keys that have been silent for a minute: their buckets are full."""
        while self._buckets:
            oldest = next(iter(self._buckets))
            if at - self._buckets[oldest][1] < 60:
                return
            del self._buckets[oldest]


def shows(text: str) -> bool:
    """Return whether `text` has anything to see: blanks and invisible characters are nothing."""
    return any(char.isprintable() and not char.isspace() for char in text)


def shorten(text: str, most: int) -> str:
    """Return the first `most` characters at most, with no visible character cut in half.

    Accents, joiners, variation selectors and skin tones stay with what stands before them, flags
    (two regional indicators) together: the rules of Unicode's UAX #29 that matter in a title.
    """
    end = min(most, len(text))
    while 0 < end < len(text) and _belong_together(text, end):
        end -= 1
    return text[: end or most].strip()


def _belong_together(text: str, place: int) -> bool:
    """Return whether what stands before and behind `place` is one visible character."""
    after = text[place]
    if (
        unicodedata.category(after) in {"Mn", "Mc", "Me", "Cf"}
        or text[place - 1] == "\u200d"
    ):
        return True
    if "\U0001f3fb" <= after <= "\U0001f3ff":  # skin tones
        return True
    flags = re.search("[\U0001f1e6-\U0001f1ff]*$", text[:place])
    return (
        "\U0001f1e6" <= after <= "\U0001f1ff"
        and len(flags[0] if flags else "") % 2 == 1
    )


# --- Wire: text to types and back. Pure. ---

UUID = "[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}"
# Of broken JSON: in more, the field at fault isn't looked for
NAMED_FAULT_BYTES = 32_768
json_string = json.JSONEncoder(ensure_ascii=False).encode


def not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be blank")
    return text


def valid_user_id(user_id: str) -> str:
    """Return `user_id` if it keeps docs/protocol.md's rule; ValueError if not.

    U+FFFD is what a URL that is not UTF-8 was read as: all of those would be one user.
    """
    if not re.fullmatch(r"[^/\x00-\x1f\x7f-\x9f\ufffd]{1,128}", user_id):
        raise ValueError(
            "must have 1 to 128 characters of UTF-8, no / and no control character"
        )
    if user_id in {".", ".."}:
        raise ValueError("must not be . or .., which browsers and proxies take away")
    return user_id


Id = Annotated[int, Field(ge=1, le=MAX_ID)]
Title = Annotated[str, Field(max_length=200), Check(str.strip)]
Instructions = Annotated[str, Field(max_length=8_000), Check(str.strip)]
ShortText = Annotated[str, Field(max_length=64)]
UserId = (
    Annotated[str, Check(valid_user_id)]
    | Annotated[int, Field(gt=-(10**127), lt=10**128)]
)


class Wire(BaseModel):
    """What clients send. Strict: no bool or float is an id; unknown fields are ignored."""

    model_config = {"strict": True, "extra": "ignore", "frozen": True}


class SendMessage(Wire):
    content: Annotated[str, Check(not_blank)]
    chat_id: Id | None = None
    client_msg_id: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    replaces: Id | None = None


class Abort(Wire):
    task_id: str | None = None
    chat_id: Id | None = None


class Regenerate(Wire):
    chat_id: Id


class Ping(Wire):
    id: ShortText | None = None


class ChatChange(Wire):
    """What of a chat is set anew: the fields that were sent.

    null and "" take a model or instructions away; "" gives the title back to the first message.
    """

    title: Title | None = None
    model: str | None = None
    instructions: Instructions | None = None


class NewChat(ChatChange):
    user_id: UserId | None = None


Ask = SendMessage | Regenerate  # for a reply
Action = Ask | Abort | Ping
ACTIONS: dict[str, type[Action]] = {
    "send_message": SendMessage,
    "abort": Abort,
    "regenerate": Regenerate,
    "ping": Ping,
}
W = TypeVar("W", bound=Wire)


def first_fault(error: ValidationError) -> tuple[str, str]:
    """Return the first field at fault ("" for the whole) and what is wrong; never its value."""
    first = error.errors(include_url=False, include_input=False)[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    return name, first["msg"].removeprefix("Value error, ")


def validate(model: type[W], data: dict[str, Any]) -> W:
    """Return `data` as `model`; ChatError `invalid_frame` that names the field if it isn't."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        name, fault = first_fault(error)
        raise ChatError(
            "invalid_frame", f"{name}: {fault}" if name else fault
        ) from None


def parse_object(raw: bytes) -> dict[str, Any]:
    """Return the JSON object in `raw`; ChatError `invalid_frame` if it is another value.

    ChatError `invalid_json` where it is no JSON, naming the top-level field that is at fault:
    NaN, Infinity, lone surrogates and deep nesting are no JSON here.
    """
    try:
        data = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        fault, _, place = str(error).partition(" at line ")
        name = field_at(raw, place) if len(raw) <= NAMED_FAULT_BYTES else ""
        raise ChatError("invalid_json", f"{name}not JSON: {fault}") from None
    if not isinstance(data, dict):
        raise ChatError("invalid_frame", "must be a JSON object")
    return data


def field_at(raw: bytes, place: str) -> str:
    """Return `name: ` of the top-level field around "LINE column COLUMN", "" if there is none.

    The parser tells only where it stopped: count brackets up to there and keep the last key.
    """
    numbers = [int(number) for number in re.findall(r"\d+", place)]
    line, column = numbers if len(numbers) == 2 else (1, 0)
    end = sum(len(part) + 1 for part in raw.split(b"\n")[: line - 1]) + column
    depth = 0
    name = ""
    for token in re.finditer(rb'"((?:[^"\\]|\\.)*+)"?(\s*:)?|[\[{]|[\]}]', raw):
        if token.start() >= end:
            break
        depth += (token[0] in b"[{") - (token[0] in b"]}")
        if token[2] and depth == 1:
            name = token[1][:64].decode("utf-8", "replace") + ": "
    return name


def parse_action(data: dict[str, Any]) -> Action:
    """Return the action in a frame; ChatError `invalid_frame` or `unknown_action`."""
    name = data.get("action")
    if not isinstance(name, str):
        raise ChatError("invalid_frame", "action: must be a string")
    if name not in ACTIONS:
        raise ChatError(
            "unknown_action", f"action: must be one of {', '.join(ACTIONS)}"
        )
    return validate(ACTIONS[name], data)


class Frame(NamedTuple):
    """A frame as JSON text, its type, and what it is about, for streams of one chat or task."""

    type: str
    text: str
    chat_id: int | None = None
    task_id: str | None = None


def make_frame(kind: str, **content: Any) -> Frame:
    text = to_json({"type": kind, **content}).decode()
    return Frame(kind, text, content.get("chat_id"), content.get("task_id"))


def message_frame(message: Message) -> Frame:
    frame = make_frame("message", message=message)
    return frame._replace(chat_id=message.chat_id, task_id=message.task_id)


def chat_frame(chat: Chat) -> Frame:
    return make_frame("chat", chat=chat)._replace(chat_id=chat.id)


def sync_frame(reply: Reply) -> Frame:
    return make_frame(
        "sync",
        **reply.row.ids,
        content=reply.text,
        reasoning=reply.reasoning,
        seq=sum(reply.cursor),
    )


def token_frame(reply: Reply, since: Cursor) -> Frame:
    """Return all that has come of `reply` since then as one `token` frame.

    Written by hand: it is the one frame that is sent thousands of times a second.
    """
    row = reply.row
    if not reply.token_prefix:
        reply.token_prefix = make_frame("token", **row.ids).text.removesuffix("}")
    text = json_string("".join(reply.pieces[since.text :]))
    seq = len(reply.pieces) + len(reply.thoughts)
    reasoning = ""
    if len(reply.thoughts) > since.reasoning:
        thoughts = json_string("".join(reply.thoughts[since.reasoning :]))
        reasoning = f',"reasoning":{thoughts}'
    line = f'{reply.token_prefix},"token":{text}{reasoning},"seq":{seq}}}'
    return Frame("token", line, row.chat_id, row.task_id)


def ending_frames(row: Message) -> list[Frame]:
    """Return the frames that tell that a reply ended, in docs/protocol.md's order."""
    frames: list[Frame] = []
    if row.content or row.reasoning or row.status is Status.COMPLETE:
        frames.append(message_frame(row))
    if row.status is Status.ABORTED:
        frames.append(make_frame("aborted", **row.ids))
    elif row.status is not Status.COMPLETE:
        code = row.finish_reason or "interrupted"
        frames.append(
            make_frame("error", message=FAULTS[code].sentence, code=code, **row.ids)
        )
    return frames


def refusal(error: ChatError, data: dict[str, Any]) -> Frame:
    """Return the `error` frame that refuses what `data` asked for, with its ids where known."""
    about: dict[str, Any] = {}
    task_id = data.get("task_id")
    if isinstance(task_id, str) and re.fullmatch(UUID, task_id):
        about["task_id"] = task_id
    client_msg_id = data.get("client_msg_id")
    if isinstance(client_msg_id, str) and 1 <= len(client_msg_id) <= 64:
        about["client_msg_id"] = client_msg_id
    chat_id = data.get("chat_id")
    if type(chat_id) is int and 1 <= chat_id <= MAX_ID:
        about["chat_id"] = chat_id
    if error.retry_after is not None:
        about["retry_after"] = error.retry_after
    code = "invalid_frame" if error.code == "invalid_json" else error.code
    return make_frame("error", message=error.message, code=code, **about)


def server_sent(frame: Frame) -> str:
    """Return a frame as a server-sent event (WHATWG HTML, 9.2)."""
    return f"event: {frame.type}\ndata: {frame.text}\n\n"


# --- Rooms: who is connected, and what waits to be sent to them. No sockets. ---

TOO_SLOW = (1013, "too slow")  # how a reader is closed for whom too much waits
RESTARTS = (1012, "the service restarts")
# That may wait for one reader besides a few endings of the longest replies
OUTBOX_BYTES = 2**22
LISTEN_BYTES = 2**18  # above this a reader that doesn't read isn't listened to


class Connection:
    """One reader: an outbox of frames and, in it, the replies that have grown for it.

    A reply is in the outbox once at most, however much it grows: a slow reader gets fewer and
    bigger `token` frames. A reader that lets whole frames pile up is closed with 1013.
    A WebSocket and an event stream are two ways of emptying it.
    """

    def __init__(
        self, most_bytes: int, chat_id: int | None = None, task_id: str | None = None
    ) -> None:
        # Code and reason, once the outbox is sent
        self.closing: tuple[int, str] | None = None
        self.sending = False  # a frame was taken and the next one not yet asked for
        self.waiting_bytes = 0
        self._most_bytes = most_bytes
        self._chat_id = chat_id  # of this chat alone
        self._task_id = task_id  # of this task alone
        self._outbox: deque[Frame | Reply] = deque()
        # What the reader has; None: to be synced
        self._since: dict[Reply, Cursor | None] = {}
        self._changed: asyncio.Future[None] | None = None  # what the sender waits for
        self._taken: asyncio.Future[None] | None = None  # what the listener waits for

    @property
    def empty(self) -> bool:
        return not self._outbox

    def wants(self, chat_id: int | None, task_id: str | None) -> bool:
        if self._chat_id is not None and self._chat_id != chat_id:
            return False
        return self._task_id is None or self._task_id == task_id

    def grew(self, reply: Reply, since: Cursor | None) -> None:
        """Note that `reply` has more than `since`; the first cursor since the last frame counts."""
        if self.closing is None and reply not in self._since:
            self._since[reply] = since
            self._outbox.append(reply)
            self._wake()

    def push(self, frame: Frame) -> None:
        if self.closing is not None:
            return
        self.waiting_bytes += len(frame.text.encode())
        # Where no frame is stuck, its sender just had no turn to take any.
        if self.waiting_bytes > self._most_bytes and self.sending:
            self._outbox.clear()
            self._since.clear()
            self.close(*TOO_SLOW)
            return
        self._outbox.append(frame)
        self._wake()

    def close(self, code: int, reason: str) -> None:
        self.closing = self.closing or (code, reason)
        self._wake()
        if self._taken is not None and not self._taken.done():
            self._taken.set_result(None)

    def _wake(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)

    async def get(self) -> Frame | None:
        """Return the next frame, waiting for one; None when the connection is to be closed.

        It can be cancelled without losing a frame.
        """
        self.sending = False
        while not self._outbox:
            if self.closing is not None:
                return None
            self._changed = asyncio.get_running_loop().create_future()
            await self._changed
        self.sending = True
        entry = self._outbox.popleft()
        if isinstance(entry, Frame):
            self._took(entry)
            return entry
        since = self._since.pop(entry)
        return sync_frame(entry) if since is None else token_frame(entry, since)

    def _took(self, frame: Frame) -> None:
        self.waiting_bytes -= len(frame.text.encode())
        if self._taken is not None and not self._taken.done():
            self._taken.set_result(None)

    async def readable(self) -> None:
        """Wait until the reader has taken enough of what waits for it to be listened to."""
        while self.waiting_bytes > LISTEN_BYTES and self.closing is None:
            self._taken = asyncio.get_running_loop().create_future()
            await self._taken


class Rooms:
    """The connections of each user."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._rooms: dict[str, dict[Connection, None]] = {}  # in the order of joining
        self._most_bytes = OUTBOX_BYTES + 64 * (
            settings.max_reply_chars + settings.max_message_chars
        )
        self.count = 0

    def check_places(self, user_id: str) -> None:
        """ChatError `overloaded` if the user, or everybody, has too many connections."""
        if len(self._rooms.get(user_id, ())) >= self._settings.max_connections_per_user:
            raise ChatError("overloaded", "Too many connections of this user.")
        if self.count >= self._settings.max_connections:
            raise ChatError("overloaded", "Too many connections.")

    @contextmanager
    def join(
        self, user_id: str, chat_id: int | None = None, task_id: str | None = None
    ) -> Iterator[Connection]:
        """Let a reader of `user_id` in, of one chat or task alone where they are given."""
        connection = Connection(self._most_bytes, chat_id, task_id)
        room = self._rooms.setdefault(user_id, {})
        room[connection] = None
        self.count += 1
        try:
            yield connection
        finally:
            # A frame half taken: its reader was too slow for the kernel, or is gone.
            if connection.sending or connection.closing == TOO_SLOW:
                self._metrics.dropped.inc()
            self.count -= 1
            del room[connection]
            if not room:
                del self._rooms[user_id]

    def publish(self, user_id: str, frames: list[Frame]) -> None:
        """Send `frames` to all of a user's connections. Never raises and never waits."""
        for connection in self._rooms.get(user_id, ()):
            for frame in frames:
                if connection.wants(frame.chat_id, frame.task_id):
                    connection.push(frame)

    def grew(self, reply: Reply, since: Cursor) -> None:
        """Note for all of the owner's connections that `reply` has more than `since`."""
        for connection in self._rooms.get(reply.user_id, ()):
            if connection.wants(reply.row.chat_id, reply.row.task_id):
                connection.grew(reply, since)

    def close(self, code: int, reason: str) -> None:
        """Close all connections, each once what waits for it is sent."""
        for room in self._rooms.values():
            for connection in room:
                connection.close(code, reason)

    @property
    def all_sent(self) -> bool:
        return all(
            connection.empty for room in self._rooms.values() for connection in room
        )


# --- Application: what happens, in order. No SQL, no sockets, no SDK. ---

# Promise 6: a second's text may be lost, also on a busy machine
CHECKPOINT_SECONDS = 0.4
# For usage and the end of a stream that has said it is finished
AFTER_FINISH_SECONDS = 1.0
# once, and three times with half, where the model says that it is too long
CONTEXT_TRIES = 4
# For a stopped reply to be stored, before its asker is told "internal"
ENDING_SECONDS = 6.0
SETTLE_SECONDS = 2.0  # at shutdown, for the last endings to be stored
FLUSH_SECONDS = 0.8  # at shutdown, for the outboxes to empty
PURGE_SECONDS = 0.02  # between two slices of deleted chats: others' writes come first
TIDY_SECONDS = 5.0  # between two looks at the size of the WAL
EXPORT_CHARS = 500_000  # of messages that an export reads at once


class Accepted(NamedTuple):
    """What was stored: no `reply` if it was a retry; the `chat`, if this made or titled it."""

    user_id: str
    message: Message
    reply: Message | None = None
    chat: Chat | None = None


class Chats:
    """The application: accepts messages, runs replies, ends them, tells whom it concerns.

    `running` has every reply that runs or waits, by task id: the dict that aborts look in.
    `lines` has them by chat, in order: the first is written, the others wait.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        model: Model,
        names: list[str],
        metrics: Metrics,
    ) -> None:
        self.settings = settings
        self.store = store
        self.model = model
        self.model_names = names  # the default first
        self.metrics = metrics
        self.rooms = Rooms(settings, metrics)
        self.running: dict[str, Reply] = {}
        self.lines: dict[int, list[Reply]] = {}
        self.draining = False
        self._rate = RateLimit(settings.messages_per_minute)
        # Places in chats, of messages on their way
        self._reserved: Counter[int | None] = Counter()
        self._starting = 0  # of those, the ones whose reply starts at once
        self._deleted = asyncio.Event()

    # Who listens

    @contextmanager
    def join(self, user_id: str, chat_id: int | None = None) -> Iterator[Connection]:
        """Let a reader in, brought up to date by `sync`; ChatError if that can't be now."""
        if self.draining:
            raise ChatError("overloaded", "The service restarts.", retry_after=5)
        self.rooms.check_places(user_id)
        with self.rooms.join(user_id, chat_id) as connection:
            for reply in self.running.values():
                if reply.user_id == user_id and connection.wants(
                    reply.row.chat_id, None
                ):
                    connection.grew(reply, None)
            yield connection

    @asynccontextmanager
    async def follow(self, user_id: str, message: Message) -> AsyncIterator[Connection]:
        """Join for the one task that answers `message`: all its frames, from the first on."""
        with self.rooms.join(user_id, message.chat_id, message.task_id) as connection:
            connection.push(message_frame(message))
            reply = self.running.get(message.task_id)
            if reply is None:  # a retry of what has ended
                for frame in ending_frames(await self.reply_to(message)):
                    connection.push(frame)
                connection.close(1000, "ended")
            else:
                if reply.cursor != START:
                    connection.grew(reply, START)
                reply.settled.add_done_callback(
                    lambda _: connection.close(1000, "ended")
                )
            yield connection

    def tell_chat(self, chat: Chat) -> None:
        self.rooms.publish(chat.user_id, [chat_frame(chat)])

    # Chats

    def check_model(self, name: str | None) -> None:
        if name and name not in self.model_names:
            names = ", ".join(self.model_names)
            raise ChatError("invalid_frame", f"model: must be one of {names}")

    async def create(self, user_id: str, asked: NewChat) -> Chat:
        self.check_model(asked.model)
        return await self.store.write(
            lambda db: db.create_chat(
                user_id,
                asked.title or "",
                asked.model or None,
                asked.instructions or None,
            ),
            then=self.tell_chat,
        )

    async def change(self, asker: Asker, chat_id: int, change: ChatChange) -> Chat:
        """Set what `change` names; ChatError `chat_not_found`, or `invalid_frame` for a model."""
        self.check_model(change.model)
        asked = {
            name: getattr(change, name) or None for name in change.model_fields_set
        }
        if change.title is None:
            asked.pop("title", None)
        return await self.store.write(
            lambda db: db.change_chat(asker, chat_id, asked), then=self.tell_chat
        )

    async def history(
        self, asker: Asker, chat_id: int, limit: int, before: int
    ) -> dict[str, Any]:
        """Return a chat and the newest of its messages before id `before`, `limit` at most."""
        page = await self.store.read(
            lambda db: db.history(asker, chat_id, limit, before)
        )
        shown = [await self._up_to_date(row) for row in page.messages]
        return asdict(page.chat) | {"messages": shown, "has_more": page.has_more}

    async def _up_to_date(self, row: Message) -> Message:
        """Return `row` with its text so far if it runs, or as it has ended since it was read."""
        if row.status is not Status.STREAMING:
            return row
        reply = self.running.get(row.task_id)
        if reply is not None:
            return replace(row, content=reply.text, reasoning=reply.reasoning)
        with suppress(ChatError):  # deleted meanwhile
            return await self.reply_to(row)
        return row

    async def export(self, user_id: str) -> AsyncIterator[bytes]:
        """Yield a line of JSON for each chat of the user, with all its messages, in parts."""
        asker = Asker(user_id)
        for chat_id in await self.store.read(lambda db: db.chat_ids(user_id)):
            with suppress(ChatError):  # deleted meanwhile
                async for part in self._export_chat(asker, chat_id):
                    yield part

    async def _export_chat(self, asker: Asker, chat_id: int) -> AsyncIterator[bytes]:
        chat = await self.store.read(lambda db: db.own_chat(asker, chat_id))
        yield to_json(chat).removesuffix(b"}") + b',"messages":['
        rows = await self._messages_after(chat_id, 0)
        while rows:
            yield b",".join([to_json(await self._up_to_date(row)) for row in rows])
            rows = await self._messages_after(chat_id, rows[-1].id)
            if rows:
                yield b","
        yield b'],"has_more":false}\n'

    async def _messages_after(self, chat_id: int, last: int) -> list[Message]:
        return await self.store.read(
            lambda db: db.messages_after(chat_id, last, EXPORT_CHARS)
        )

    async def delete(self, asker: Asker, chat_id: int) -> None:
        """Stop the chat's replies, then delete it; ChatError `chat_not_found`."""
        while True:  # a message may arrive between the stop and the delete
            await self.store.read(lambda db: db.own_chat(asker, chat_id))
            replies = list(self.lines.get(chat_id, ()))
            for reply in replies:
                self._stop(reply, Status.ABORTED)
            await self.ended(replies)
            if await self.store.write(
                lambda db: db.hide_chat(asker, chat_id), self._tell_deleted
            ):
                return

    def _tell_deleted(self, chat: Chat | None) -> None:
        if chat is not None:
            self._deleted.set()
            self.rooms.publish(
                chat.user_id, [make_frame("chat_deleted", chat_id=chat.id)]
            )

    async def erase(self, user_id: str) -> None:
        """Delete all chats of a user and forget under which ids their messages were sent."""
        while chat_ids := await self.store.read(lambda db: db.chat_ids(user_id)):
            for chat_id in chat_ids:
                with suppress(ChatError):  # deleted meanwhile
                    await self.delete(Asker(user_id), chat_id)
        while await self.store.write(lambda db: db.forget_sends(user_id)):
            pass

    # Messages

    async def send(self, user_id: str, action: Ask) -> Accepted:
        """Store a message (or take the chat's last one) and its reply, echo it, start the reply.

        What was sent before under the same client_msg_id comes back instead, whatever the limits.
        ChatError `invalid_frame`, `chat_not_found`, `message_not_found`, `not_current`, `busy`,
        `overloaded`, `rate_limited`, or `not_running` without a message to answer anew.
        """
        if isinstance(action, SendMessage):
            self._check_message(action)
        try:
            ahead = self._admit(user_id, action)
        except ChatError:
            known = await self.store.read(lambda db: db.check_ask(user_id, action))
            if known is None:
                raise
            return Accepted(user_id, known)
        task_id = str(uuid.uuid4())
        place = self._hold_place(action.chat_id, ahead)

        def take_place(accepted: Accepted) -> None:
            place.close()  # at once, so that no place is counted twice
            self._accepted(accepted)

        try:
            with place:
                return await self.store.write(
                    lambda db: db.accept(user_id, action, task_id), then=take_place
                )
        except ChatError:
            self._rate.give_back(user_id)
            raise

    def _check_message(self, action: SendMessage) -> None:
        most = self.settings.max_message_chars
        if len(action.content) > most:
            raise ChatError("invalid_frame", f"content: may have {most} characters")
        if action.replaces is not None and action.chat_id is None:
            raise ChatError("invalid_frame", "chat_id: is required with replaces")

    def _admit(self, user_id: str, action: Ask) -> int:
        """Let a message in, one of its user's for this minute; return how many replies of its
        chat are ahead of its own. ChatError `busy`, `overloaded` or `rate_limited`."""
        if self.draining:
            raise ChatError("overloaded", "The service restarts.", retry_after=5)
        ahead = 0
        if action.chat_id is not None:
            ahead = (
                len(self.lines.get(action.chat_id, ())) + self._reserved[action.chat_id]
            )
        alone = isinstance(action, Regenerate) or action.replaces is not None
        if alone and ahead:
            raise ChatError("busy")
        if ahead > self.settings.max_waiting_replies:
            raise ChatError("busy", "This chat has too many messages waiting.")
        if (
            not ahead
            and len(self.lines) + self._starting >= self.settings.max_running_replies
        ):
            raise ChatError(
                "overloaded", "The service writes too many replies.", retry_after=5
            )
        self._rate.take(user_id)
        return ahead

    def _hold_place(self, chat_id: int | None, ahead: int) -> ExitStack:
        """Hold the place of a message that was let in, until what is returned is closed."""
        starts = ahead == 0
        self._reserved[chat_id] += 1
        self._starting += starts
        place = ExitStack()
        place.callback(self._free_place, chat_id, starts)
        return place

    def _free_place(self, chat_id: int | None, starts: bool) -> None:
        self._starting -= starts
        self._reserved[chat_id] -= 1
        if not self._reserved[chat_id]:
            del self._reserved[chat_id]

    async def abort(
        self, asker: Asker, chat_id: int | None = None, task_id: str | None = None
    ) -> list[Reply]:
        """Stop a task, or all of a chat's; return at once, their endings follow.

        ChatError `chat_not_found`, `task_not_found`, or `not_running` if all has ended.
        """
        if chat_id is not None:
            await self.store.read(lambda db: db.own_chat(asker, chat_id))
        if task_id is not None:
            replies = [await self._running_task(asker, chat_id, task_id.lower())]
        elif chat_id is not None:
            replies = list(self.lines.get(chat_id, ()))
        else:
            raise ChatError("invalid_frame", "task_id: is required, or chat_id")
        if not replies:
            raise ChatError("not_running")
        for reply in replies:
            self._stop(reply, Status.ABORTED)
        return replies

    async def _running_task(
        self, asker: Asker, chat_id: int | None, task_id: str
    ) -> Reply:
        reply = self.running.get(task_id)
        if reply is None:  # ended, or never was
            await self.store.read(lambda db: db.find_task(asker, task_id, chat_id))
            raise ChatError("not_running")
        is_elsewhere = chat_id is not None and chat_id != reply.row.chat_id
        if is_elsewhere or not asker.may_see(reply.user_id):
            raise ChatError("task_not_found")
        return reply

    async def ended(self, replies: list[Reply]) -> list[Message]:
        """Wait until `replies` are stored; TimeoutError if the database can't."""
        async with asyncio.timeout(ENDING_SECONDS):
            return [await asyncio.shield(reply.settled) for reply in replies]

    async def reply_to(self, message: Message) -> Message:
        """Wait for the reply of `message`'s task to end, and return it as stored."""
        reply = self.running.get(message.task_id)
        if reply is not None:
            # Cancelling us would end it for all
            return await asyncio.shield(reply.settled)
        return await self.store.read(lambda db: db.find_task(ANYONE, message.task_id))

    # The life of a reply

    def _accepted(self, accepted: Accepted) -> None:
        """Announce what was just committed and put the reply in its chat's line."""
        user_id = accepted.user_id
        if accepted.reply is None:  # stored before: nothing is new
            self._rate.give_back(user_id)
            return
        settled = asyncio.get_running_loop().create_future()
        reply = Reply(user_id, accepted.reply, settled)
        self.running[reply.row.task_id] = reply
        line = self.lines.setdefault(reply.row.chat_id, [])
        line.append(reply)
        self._start(line[0])
        if self.draining:
            self._stop(reply, Status.INTERRUPTED)
        log_event("accepted", user=user_id, **reply.row.ids)
        frames = [message_frame(accepted.message)]
        if accepted.chat is not None:
            frames.insert(0, chat_frame(accepted.chat))
        self.rooms.publish(user_id, frames)

    def _start(self, reply: Reply) -> asyncio.Task[None]:
        """Return the task that writes `reply`, from now on if it has waited."""
        if reply.task is None:
            reply.task = asyncio.create_task(self._answer(reply))
            reply.task.add_done_callback(lambda task: self._decide(reply, task))
        return reply.task

    async def _answer(self, reply: Reply) -> None:
        """Stream the model's answer into `reply`. Nothing here stores or sends anything."""
        end = asyncio.get_running_loop().time() + self.settings.max_reply_seconds
        most_chars = self.settings.max_context_chars
        for left in reversed(range(CONTEXT_TRIES)):
            context = await self._context(reply, most_chars)
            try:
                await self._stream(reply, context, end)
            except ModelError as error:
                turns = context.turns
                if error.code != "model_context" or not left or len(turns) == 1:
                    raise
                if reply.chars:
                    raise
                most_chars = sum(len(turn["content"]) for turn in turns) // 2
            else:
                return

    async def _context(self, reply: Reply, most_chars: int) -> Context:
        return await self.store.read(lambda db: db.context(reply.row, most_chars))

    async def _stream(self, reply: Reply, context: Context, end: float) -> None:
        """Ask the model once; ModelError if it fails, or nothing comes in time."""
        parts = [self.settings.system_prompt, context.chat.instructions or ""]
        system = "\n\n".join(part for part in parts if part)
        turns = context.turns
        if system:
            turns = [{"role": "system", "content": system}, *turns]
        name = context.chat.model
        if name not in self.model_names:
            name = self.model_names[0]
        clock = asyncio.get_running_loop().time
        wait = self.settings.model_timeout_seconds
        until = min(end, clock() + wait)
        answer = aclosing(self.model(turns, name, reply.report))
        try:
            async with asyncio.timeout_at(until) as limit, answer as stream:
                async for delta in stream:
                    if delta.text or delta.reasoning:
                        if self._grow(reply, delta):
                            reply.report.finish_reason = "length"
                            return
                    elif not delta.alive:
                        continue  # comments earn no time
                    if reply.report.finish_reason is not None:
                        limit.reschedule(min(end, clock() + AFTER_FINISH_SECONDS))
                    elif until < min(end, clock() + wait):
                        # 2 % more: to renew it costs
                        until = min(end, clock() + 1.02 * wait)
                        limit.reschedule(until)
        except TimeoutError:
            raise ModelError("model_timeout", "no piece in time") from None

    def _grow(self, reply: Reply, delta: Delta) -> bool:
        """Append what came and note it for all who read; True if MAX_REPLY_CHARS cut any."""
        since = reply.cursor
        chars = reply.chars
        cut = reply.add(delta, self.settings.max_reply_chars)
        if reply.chars > chars:
            if not chars:
                self.metrics.first_token.observe(time.monotonic() - reply.created)
            self.rooms.grew(reply, since)
        return cut

    def _stop(self, reply: Reply, status: Status) -> None:
        """End `reply` with `status`, unless it has already been stopped."""
        if reply.stopped is None:
            reply.stopped = status
            self._start(reply).cancel()  # one that waited ends before its first step

    def _decide(self, reply: Reply, task: asyncio.Task[None]) -> None:
        """Read how the task ended: the one place where a reply's ending is decided.

        A done-callback, because a task that is cancelled before its first step never runs.
        """
        report = reply.report
        status = Status.COMPLETE
        if task.cancelled():
            status = reply.stopped or Status.INTERRUPTED
            report.finish_reason = None
        else:
            error = task.exception()
            # What fails after the model has said that it is done takes nothing away.
            if error is not None and report.finish_reason is None:
                status = Status.FAILED
                report.finish_reason = self._code_of(reply, error)
        text = reply.text
        reasoning = reply.reasoning
        self.store.write(
            lambda db: db.settle(reply.row.id, text, reasoning, status, report),
            then=lambda row: self._announce(reply, row),
            insist=True,
        )

    def _code_of(self, reply: Reply, error: BaseException) -> str:
        """Log why the model failed; return the code that its client is told."""
        code = error.code if isinstance(error, ModelError) else "internal"
        if code not in FAULTS:
            code = "internal"
        trace = error if code == "internal" else None
        why = str(error)
        log_event(
            "the model failed",
            logging.WARNING,
            trace,
            **reply.row.ids,
            code=code,
            why=why,
        )
        return code

    def _announce(self, reply: Reply, row: Message) -> None:
        """Tell the stored ending and give the next reply of the chat its turn."""
        del self.running[row.task_id]
        line = self.lines[row.chat_id]
        line.remove(reply)
        if not line:
            del self.lines[row.chat_id]
        reply.settled.set_result(row)
        if line:
            self._start(line[0])
        self._count(reply, row)
        self.rooms.publish(reply.user_id, ending_frames(row))

    def _count(self, reply: Reply, row: Message) -> None:
        pieces = sum(reply.cursor)
        self.metrics.replies.labels(row.status).inc()
        self.metrics.aborts.inc(row.status is Status.ABORTED)
        self.metrics.tokens.inc(pieces)
        self.metrics.duration.observe(time.monotonic() - reply.created)
        reason = row.finish_reason
        log_event(
            row.status, user=reply.user_id, **row.ids, reason=reason, pieces=pieces
        )

    # The service's own life

    async def checkpoint_forever(self) -> None:
        """Store what has come of running replies, all in one transaction (promise 6)."""
        while True:
            await asyncio.sleep(CHECKPOINT_SECONDS)
            grown = [
                reply for reply in self.running.values() if reply.cursor != reply.saved
            ]
            if not grown:
                continue
            try:
                await self._checkpoint(grown)
            except sqlite3.Error as error:
                log_event(
                    "not stored yet", logging.ERROR, replies=len(grown), why=str(error)
                )

    async def _checkpoint(self, grown: list[Reply]) -> None:
        ends = [reply.cursor for reply in grown]
        news = [_news_of(reply) for reply in grown]
        await self.store.write(lambda db: db.append_pieces(news))
        for reply, end in zip(grown, ends, strict=True):
            reply.saved = end

    async def purge_forever(self) -> None:
        """Remove deleted chats from the disk, slice by slice, between others' writes."""
        self._deleted.set()  # what a crash has left
        while True:
            await self._deleted.wait()
            self._deleted.clear()
            try:
                removed = False
                while await self.store.write(lambda db: db.purge_slice()):
                    removed = True
                    await asyncio.sleep(PURGE_SECONDS)
                if removed:
                    await self._forget_words()
            except sqlite3.Error as error:
                log_event("not removed yet", logging.ERROR, why=str(error))
                self._deleted.set()
                await asyncio.sleep(TIDY_SECONDS)

    async def _forget_words(self) -> None:
        """Rewrite the search index, and empty the WAL: both still have what was deleted."""
        await self.store.write(lambda db: db.merge_search(begin=True))
        while await self.store.write(lambda db: db.merge_search(begin=False)):  # noqa: ASYNC110
            await asyncio.sleep(PURGE_SECONDS)
        await self.store.shrink()

    async def tidy_forever(self) -> None:
        """Give the disk back what a long reader made the WAL grow by."""
        while True:
            await asyncio.sleep(TIDY_SECONDS)
            with suppress(sqlite3.Error):  # busy: the next look may find it free
                await self.store.shrink_if_idle()

    async def drain(self) -> None:
        """Promise 10: refuse what is new, let what runs finish, interrupt the rest."""
        self.draining = True
        for reply in list(self.running.values()):
            if reply.task is None:
                self._stop(reply, Status.INTERRUPTED)
        await self._wait_for_endings(self.settings.drain_seconds)
        for reply in list(self.running.values()):
            self._stop(reply, Status.INTERRUPTED)
        await self._wait_for_endings(SETTLE_SECONDS)
        deadline = time.monotonic() + FLUSH_SECONDS
        # Some readers may stall.
        while not self.rooms.all_sent and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

        self.rooms.close(*RESTARTS)

    async def _wait_for_endings(self, seconds: float) -> None:
        settled = [reply.settled for reply in self.running.values()]
        if settled:
            log_event("draining", replies=len(settled))
            await asyncio.wait(settled, timeout=seconds)


def _news_of(reply: Reply) -> News:
    """Return what has come of `reply` since the last checkpoint."""
    text = "".join(reply.pieces[reply.saved.text :])
    reasoning = "".join(reply.thoughts[reply.saved.reasoning :])
    return News(reply.row.id, sum(reply.saved), text, reasoning)


# --- Store: the database as the event loop sees it, and all SQL. Decides nothing. ---

MAX_BATCH = 200  # operations in one transaction
RETRY_SECONDS = 1.0  # an ending that could not be stored is tried again
BUSY_SECONDS = 5  # to wait for another process's lock on the database
OWNER_SECONDS = 20.0  # to wait for another service to let the database go
SEARCH_SECONDS = 5.0  # that a search may take, with its waiting for others'
PAGE_CHARS = 2_000_000  # that a page of history has at most, one message at least
# Of a deleted chat, removed in one transaction; fewer of long messages
SLICE_ROWS = 300
SLICE_CHARS = 200_000
MERGE_PAGES = 200  # of the search index, rewritten in one transaction
WAL_BYTES = 2**22  # that the WAL may keep while nobody writes
MAX_WAL_BYTES = 2**26  # and while somebody does
SHARD_IDS = 10**12  # ids of one shard: 42000000000001 is the first of shard 42
SKIPPED_IDS = 10**6
SEARCH_WORDS = 10
SEARCH_CHARS = 1000  # of these words together


class News(NamedTuple):
    """What has come of a reply since its last checkpoint; `position` puts it in order."""

    message_id: int
    position: int
    text: str
    reasoning: str


class Context(NamedTuple):
    chat: Chat
    turns: list[Turn]


class Page(NamedTuple):
    chat: Chat
    messages: list[Message]  # oldest first
    has_more: bool


class Write(NamedTuple):
    """An operation on its way to the writer, and whom its commit concerns."""

    operation: Callable[[Database], Any]
    then: Callable[[Any], None] | None
    future: asyncio.Future[Any]
    insist: bool  # try again until it is stored


class Store:
    """Three connections to one file, each on its own thread: for what is written, for what is
    read, and for searches, so that nothing waits behind those."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._path = settings.database_path
        self._sharded = settings.shard is not None
        self._metrics = metrics
        self._queue: asyncio.Queue[Write | None] = asyncio.Queue()
        self._written_at = time.monotonic()
        connect = [
            aiosqlite.connect(self._path, isolation_level=None, timeout=BUSY_SECONDS)
            for _ in range(3)
        ]
        self._writer, self._reader, self._searcher = connect
        self._file = (0, 0)  # device and inode of what was opened

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Settings, metrics: Metrics) -> AsyncIterator[Store]:
        """Open, create or recover the database; StartError if that can't be done."""
        store = cls(settings, metrics)
        with sole_owner(store._path):
            async with store._writer, store._reader, store._searcher:
                for connection in (store._writer, store._reader, store._searcher):
                    connection.row_factory = sqlite3.Row
                await store._run(store._writer, lambda db: db.prepare(settings.shard))
                rules = "PRAGMA query_only = ON; PRAGMA wal_autocheckpoint = 0"
                await store._reader.executescript(rules)
                await store._searcher.executescript(rules)
                store._file = file_identity(store._path)
                yield store

    async def read(self, query: Callable[[Database], T]) -> T:
        """Return what `query` does; its ChatError, or sqlite3.Error."""
        return await self._run(self._reader, query)

    async def search(
        self, user_id: str, words: list[str], limit: int
    ) -> list[dict[str, Any]]:
        """Return what was found; ChatError `overloaded` if it took too long."""
        deadline = time.monotonic() + SEARCH_SECONDS
        try:
            return await self._run(
                self._searcher, lambda db: db.search(user_id, words, limit, deadline)
            )
        except sqlite3.OperationalError as error:
            if "interrupted" not in str(error):
                raise
            raise ChatError(
                "overloaded", "The search took too long.", retry_after=5
            ) from None

    def write(
        self,
        operation: Callable[[Database], T],
        then: Callable[[T], None] | None = None,
        *,
        insist: bool = False,
    ) -> asyncio.Future[T]:
        """Queue `operation`; the future resolves with its result once it is on the disk.

        Before that `then` is called with the result, in the order of the commits. The future
        raises the operation's ChatError, which comes before its first write, or sqlite3.Error.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait(Write(operation, then, future, insist))
        return future

    async def check(self) -> None:
        """Read something past all that waits; OSError or sqlite3.Error if that can't be done, or
        the file at the path is not the one that was opened."""
        await asyncio.to_thread(check_file, self._path, self._file)

    async def shrink(self) -> None:
        """Copy the WAL into the database and empty it, if nobody reads from it just now.

        Not under SHARD: there Litestream does that, and two that do can lose pages (see prepare).
        """
        if not self._sharded:
            await self._run(self._writer, lambda db: db.shrink())

    async def shrink_if_idle(self) -> None:
        """Shrink the WAL where it has become large, or is not needed."""
        size = wal_bytes(self._path)
        idle = time.monotonic() - self._written_at > TIDY_SECONDS
        if size > MAX_WAL_BYTES or (idle and size > WAL_BYTES):
            await self.shrink()

    async def _run(
        self, connection: aiosqlite.Connection, call: Callable[[Database], T]
    ) -> T:
        """Run a whole operation for one hop to the connection's thread and back; aiosqlite's
        own methods are one statement a hop."""
        run: Callable[..., Awaitable[T]] = connection._execute  # noqa: SLF001 - no public way
        return await run(call, Database(connection._conn))  # noqa: SLF001

    async def write_forever(self) -> None:
        """Commit what is queued, as much as there is at once, until `stop`. Never cancelled."""
        while (write := await self._queue.get()) is not None:
            batch = [write]
            while len(batch) < MAX_BATCH and not self._queue.empty():
                write = self._queue.get_nowait()
                if write is None:
                    self._queue.put_nowait(None)
                    break
                batch.append(write)
            await self._commit(batch)

    async def _commit(self, batch: list[Write]) -> None:
        with self._metrics.latency.time():
            outcomes = await self._run(self._writer, lambda db: db.commit(batch))
        self._written_at = time.monotonic()
        self._metrics.commits.inc()
        self._metrics.operations.inc(len(batch))
        for done, outcome in zip(batch, outcomes, strict=True):
            self._tell(done, outcome)

    def stop(self) -> None:
        """Let `write_forever` end once all that is queued is stored."""
        self._queue.put_nowait(None)

    def _tell(self, write: Write, outcome: Any) -> None:
        """Tell the outcome. The caller may have been cancelled; what is committed is true."""
        failed = isinstance(outcome, Exception)
        if failed and write.insist:
            log_event("not stored yet", logging.ERROR, why=repr(outcome))
            asyncio.get_running_loop().call_later(
                RETRY_SECONDS, self._queue.put_nowait, write
            )
            return
        try:
            if write.then is not None and not failed:
                write.then(outcome)
        except Exception:
            log.exception("an announcement failed")
        if write.future.done():
            return
        if failed:
            write.future.set_exception(outcome)
        else:
            write.future.set_result(outcome)


@contextmanager
def sole_owner(path: str) -> Iterator[None]:
    """Hold the database for this process: two services would end each other's replies as crashed.

    The lock is on a file beside it: on macOS and NFS a lock on the database itself is in SQLite's
    way. Waits for a service that is being drained; StartError if it doesn't let go, or the file
    can't be opened.
    """
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        lock = filelock.FileLock(f"{path}.lock", timeout=OWNER_SECONDS, mode=0o600)
        with lock:
            yield
    except filelock.Timeout:
        raise StartError(f"DATABASE_URL: another service uses {path}") from None
    except OSError as error:
        if error.filename not in {path, f"{path}.lock"}:
            raise
        raise StartError(
            f"DATABASE_URL: cannot open {path}: {error.strerror}"
        ) from None


def file_identity(path: str) -> tuple[int, int]:
    status = Path(path).stat()
    return status.st_dev, status.st_ino


def check_file(path: str, expected: tuple[int, int]) -> None:
    if file_identity(path) != expected:
        raise FileNotFoundError(f"{path} is not the file that was opened")
    url = f"file:{quote(str(Path(path).resolve()))}?mode=ro"
    with contextlib.closing(sqlite3.connect(url, uri=True, timeout=1)) as connection:
        connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()


def wal_bytes(path: str) -> int:
    with suppress(FileNotFoundError):
        return Path(f"{path}-wal").stat().st_size
    return 0


# Search. A text becomes words that begin with their owner's key: what one user has written costs
# another one's search nothing, and no search can find it. In scripts without blanks, and of
# emoji, each character is a word, and what is searched for a row of them.

SINGLE = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u2190-\u2bff\u2e80-\u2fff\u3005-\u30ff\u3100-\u312f"
    "\u31f0-\u9fff\ua000-\ua4cf\uf900-\ufaff\uff66-\uff9f\U0001b000-\U0001b2ff"
    "\U0001f000-\U0001faff\U00020000-\U0003ffff]"
)
# Signs that go without saying: accents, and the vowel points of Hebrew and Arabic. In the scripts
# of India (the last range of WORD) vowel signs are no letters to `re`, but say what a word is.
POINTS = re.compile("[\u0300-\u036f\u0591-\u05bd\u05bf-\u05c7\u064b-\u065f\u0670]")
WORD = re.compile(rf"(?:[^\W_]|[\u0900-\u0963\u0966-\u0dff])+|{SINGLE.pattern}")


def search_words(user_id: str, text: str) -> list[str]:
    """Return the words of `text` as the index knows them: without case, accents and points."""
    key = hashlib.sha256(user_id.encode()).hexdigest()[:12]
    if not text.isascii():
        marked = unicodedata.normalize("NFKD", text)
        text = unicodedata.normalize("NFKC", POINTS.sub("", marked))
        text = SINGLE.sub(r" \g<0> ", text)
    return [key + word for word in WORD.findall(text.casefold())]


def snippet(content: str, words: list[str]) -> str:
    """Return about two lines of `content` around the first of `words` in it."""
    forms = "|".join(re.escape(word) for word in words)
    found = re.search(forms, content, re.IGNORECASE)
    start = max(0, found.start() - 60) if found else 0
    part = " ".join(content[start : start + 240].split())
    return "…" * (start > 0) + part + "…" * (start + 240 < len(content))


class Database:
    """The operations: plain SQL, in a transaction, on the thread of one connection."""

    # The columns of a chat and of a message are their fields, in the fields' order.
    CHAT = ", ".join(column.name for column in fields(Chat))
    MESSAGE = ", ".join(f"messages.{column.name}" for column in fields(Message))

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection

    def one(self, sql: str, *values: Any) -> Any:
        """Run a statement and return its first row, None if it has none."""
        return self.connection.execute(sql, values).fetchone()

    def all(self, sql: str, *values: Any) -> list[Any]:
        return self.connection.execute(sql, values).fetchall()

    def chat(self, row: sqlite3.Row) -> Chat:
        return Chat(**{name: row[name] for name in Chat.__slots__})

    def message(self, row: sqlite3.Row) -> Message:
        values = {name: row[name] for name in Message.__slots__}
        values["is_ai"] = bool(values["is_ai"])
        values["status"] = Status(values["status"])
        return Message(**values)

    # The file

    def prepare(self, shard: int | None) -> None:
        """Set up the write connection, bring the tables up to date, end what a crash left."""
        try:
            self.one("PRAGMA journal_mode = WAL")
            self.one("PRAGMA synchronous = FULL")  # promise 1: a commit is on the disk
            self.one("PRAGMA foreign_keys = ON")
            self.one("PRAGMA secure_delete = ON")  # deleted words leave the file
            self.one("PRAGMA temp_store = MEMORY")
            # SQLite before 3.51.3 can lose pages where two processes checkpoint at once
            # (sqlite.org/wal.html#walresetbug). A shard's Litestream does, at 1,000 pages and with
            # its own SQLite: ours (almost) never comes before at 40 MB, which still bound the WAL.
            self.one(
                f"PRAGMA wal_autocheckpoint = {1_000 if shard is None else 10_000}"
            )
            self.one(f"PRAGMA journal_size_limit = {WAL_BYTES}")
            self.migrate(shard)
            self.recover()
        except sqlite3.Error as error:
            raise StartError(
                f"DATABASE_URL: cannot use the database: {error}"
            ) from None

    def migrate(self, shard: int | None) -> None:
        """Run the steps of schema.sql that this file has not seen, in one transaction."""
        steps = re.split(
            r"PRAGMA user_version = \d+;", (HERE / "schema.sql").read_text("utf-8")
        )
        del steps[-1]  # what follows the last one: nothing
        version = self.one("PRAGMA user_version")[0]
        if version > len(steps):
            raise StartError(
                "DATABASE_URL: the database is of a newer version of the service"
            )
        missing = "".join(steps[version:])
        try:
            self.connection.executescript(f"BEGIN IMMEDIATE; {missing}")
            if version == 1:  # its search index had another form
                for row in self.connection.execute(
                    "SELECT id, user_id, content FROM messages WHERE status <> 'streaming'"
                ):
                    self.index(row["id"], row["user_id"], row["content"])
            self.claim(shard)
            self.one(f"PRAGMA user_version = {len(steps)}")
            self.one("COMMIT")
        except BaseException:
            if self.connection.in_transaction:
                self.one("ROLLBACK")
            raise
        if missing and shard is None:
            self.shrink()  # so that a copy of the file alone has its tables

    def claim(self, shard: int | None) -> None:
        """Give ids of `shard` only; StartError if others were given.

        Skips some at each start: a database that was restored from a replica doesn't know which
        ids were given out after its last replicated second, and none may mean two things.
        """
        if shard is not None:
            sql = """INSERT INTO sqlite_sequence SELECT column1, ?
                     FROM (VALUES ('chats'), ('messages'))
                     WHERE column1 NOT IN (SELECT name FROM sqlite_sequence)"""
            self.one(sql, shard * SHARD_IDS)
        sql = "SELECT seq / ? FROM sqlite_sequence WHERE seq / ? <> ?"
        other = self.one(sql, SHARD_IDS, SHARD_IDS, shard or 0)
        if other is not None:
            of = f"of shard {other[0]}" if other[0] else "of no shard"
            raise StartError(f"SHARD: the database is {of}")
        if shard is not None:
            self.one("UPDATE sqlite_sequence SET seq = seq + ?", SKIPPED_IDS)

    def recover(self) -> None:
        """End the replies that a crash left running, with the text that was checkpointed."""
        self.one("BEGIN IMMEDIATE")
        rows = self.all(
            f"SELECT {self.MESSAGE} FROM messages WHERE status = 'streaming'"
        )
        for row in rows:
            sql = "SELECT text, reasoning FROM pieces WHERE message_id = ? ORDER BY position"
            pieces = self.all(sql, row["id"])
            text = row["content"] + "".join(piece["text"] for piece in pieces)
            reasoning = "".join(piece["reasoning"] for piece in pieces) or None
            self.settle(row["id"], text, reasoning, Status.INTERRUPTED, Report())
        self.one("COMMIT")
        if rows:
            log_event("recovered", interrupted=len(rows))

    def shrink(self) -> None:
        self.one("PRAGMA busy_timeout = 0")  # nobody's reading is waited for
        try:
            self.one("PRAGMA wal_checkpoint(TRUNCATE)")
        finally:
            self.one(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000}")

    def commit(self, batch: list[Write]) -> list[Any]:
        """Run `batch` in one transaction; return each operation's result or exception.

        If that fails, the operations run one by one, so that only the bad one fails. If it can't
        even begin (locked, read-only), all fail: each of them would wait as long again.
        """
        outcomes: list[Any] = []
        try:
            self.one("BEGIN IMMEDIATE")
            for write in batch:
                try:
                    outcomes.append(write.operation(self))
                except ChatError as error:
                    outcomes.append(error)
            self.one("COMMIT")
        except Exception as error:  # noqa: BLE001 - whatever it is, its sender is told
            began = self.connection.in_transaction or bool(outcomes)
            if self.connection.in_transaction:
                # A full disk may have rolled it back already
                self.one("ROLLBACK")
            if len(batch) == 1 or not began:
                return [error] * len(batch)
            return [outcome for write in batch for outcome in self.commit([write])]
        return outcomes

    # Chats

    def own_chat(self, asker: Asker, chat_id: int) -> Chat:
        """Return a chat that `asker` may see; ChatError `chat_not_found`."""
        row = self.one(
            f"SELECT {self.CHAT} FROM chats WHERE id = ? AND NOT deleted", chat_id
        )
        if row is None or not asker.may_see(row["user_id"]):
            raise ChatError("chat_not_found")
        return self.chat(row)

    def create_chat(
        self,
        user_id: str,
        title: str,
        model: str | None = None,
        instructions: str | None = None,
    ) -> Chat:
        sql = f"""INSERT INTO chats (user_id, title, created_at, updated_at, model, instructions)
                  VALUES (?, ?, ?, ?, ?, ?) RETURNING {self.CHAT}"""
        at = self.next_activity(user_id)
        return self.chat(self.one(sql, user_id, title, at, at, model, instructions))

    def next_activity(self, user_id: str) -> str:
        """Return the time, but later than all activity of the user, whatever the clock does."""
        at = now()
        newest = self.one(
            "SELECT max(updated_at) FROM chats WHERE user_id = ?", user_id
        )[0]
        if newest is None or newest < at:
            return at
        later = datetime.fromisoformat(newest) + timedelta(milliseconds=1)
        return later.isoformat(timespec="milliseconds").replace("+00:00", "Z")

    def save_chat(self, chat: Chat) -> Chat:
        """Store a chat as changed now; an empty title becomes the first message's first line."""
        title = chat.title
        sql = "SELECT content FROM messages WHERE chat_id = ? ORDER BY id LIMIT 1"
        if not title and (first := self.one(sql, chat.id)):
            lines = (line for line in first["content"].splitlines() if shows(line))
            title = shorten(next(lines, "").strip(), 60)
        at = self.next_activity(chat.user_id)
        sql = "UPDATE chats SET title = ?, updated_at = ?, model = ?, instructions = ? WHERE id = ?"
        self.one(sql, title, at, chat.model, chat.instructions, chat.id)
        return replace(chat, title=title, updated_at=at)

    def change_chat(
        self, asker: Asker, chat_id: int, asked: dict[str, str | None]
    ) -> Chat:
        """Set the fields in `asked`; what is as it was moves nothing."""
        chat = self.own_chat(asker, chat_id)
        if "title" in asked:
            asked = asked | {"title": asked["title"] or ""}
        changed = replace(chat, **asked)  # type: ignore[arg-type]
        return chat if changed == chat else self.save_chat(changed)

    def list_chats(self, user_id: str, at: str, last: int, limit: int) -> list[Chat]:
        """Return `limit` of the user's chats after (`at`, `last`), newest activity first."""
        sql = f"""SELECT {self.CHAT} FROM chats WHERE user_id = ? AND NOT deleted
                  AND (updated_at, id) < (?, ?) ORDER BY updated_at DESC, id DESC LIMIT ?"""
        return [self.chat(row) for row in self.all(sql, user_id, at, last, limit)]

    def chat_ids(self, user_id: str) -> list[int]:
        sql = "SELECT id FROM chats WHERE user_id = ? AND NOT deleted ORDER BY id"
        return [row["id"] for row in self.all(sql, user_id)]

    def hide_chat(self, asker: Asker, chat_id: int) -> Chat | None:
        """Mark a chat as deleted, for all at once; None, and nothing, while a reply is unended."""
        chat = self.own_chat(asker, chat_id)
        sql = "SELECT 1 FROM messages WHERE status = 'streaming' AND chat_id = ?"
        if self.one(sql, chat_id):
            return None
        self.one("UPDATE chats SET deleted = 1 WHERE id = ?", chat_id)
        return chat

    def purge_slice(self) -> bool:
        """Remove some messages of a deleted chat, or the chat; False if there is none."""
        chat = self.one("SELECT id FROM chats WHERE deleted = 1 LIMIT 1")
        if chat is None:
            return False
        sql = """SELECT id, user_id, content FROM messages WHERE chat_id = ?
                 ORDER BY id DESC LIMIT ?"""  # replies before what they answer
        first = None
        chars = 0
        for row in self.all(sql, chat["id"], SLICE_ROWS):
            self.unindex(row["id"], row["user_id"], row["content"])
            first = row["id"]
            chars += len(row["content"])
            if chars > SLICE_CHARS:
                break
        if first is None:
            self.one("DELETE FROM chats WHERE id = ?", chat["id"])
        else:
            self.one(
                "DELETE FROM messages WHERE chat_id = ? AND id >= ?", chat["id"], first
            )
        return True

    def forget_sends(self, user_id: str) -> bool:
        """Forget some client_msg_ids of messages whose chat is deleted; False if there are none.

        Not the others: a message may have been sent since the user's chats were.
        """
        sql = """DELETE FROM sends WHERE user_id = ? AND client_msg_id IN
                 (SELECT sends.client_msg_id FROM sends
                  LEFT JOIN messages ON messages.id = message_id
                  LEFT JOIN chats ON chats.id = chat_id
                  WHERE sends.user_id = ? AND coalesce(deleted, 1) LIMIT ?)"""
        return self.connection.execute(sql, (user_id, user_id, SLICE_ROWS)).rowcount > 0

    # Messages

    def check_ask(self, user_id: str, action: Ask) -> Message | None:
        """Return what was stored under the same client_msg_id; ChatError if it can't be stored."""
        if isinstance(action, SendMessage):
            known = self.sent(user_id, action.client_msg_id)
            if known is not None:
                return known
        if action.chat_id is not None:
            self.own_chat(Asker(user_id), action.chat_id)
        if isinstance(action, Regenerate):
            self.last_sent(action.chat_id)
        elif action.replaces is not None:
            self.check_current(action.chat_id, action.replaces)
        return None

    def sent(self, user_id: str, client_msg_id: str | None) -> Message | None:
        if client_msg_id is None:
            return None
        sql = "SELECT message_id FROM sends WHERE user_id = ? AND client_msg_id = ?"
        row = self.one(sql, user_id, client_msg_id)
        return None if row is None else self.stored(row["message_id"])

    def last_sent(self, chat_id: int) -> int:
        """Return the id of a chat's last user message; ChatError `not_running` if it has none."""
        sql = "SELECT id FROM messages WHERE chat_id = ? AND NOT is_ai ORDER BY id DESC LIMIT 1"
        row = self.one(sql, chat_id)
        if row is None:
            raise ChatError("not_running", "There is no message to answer anew.")
        return int(row["id"])

    def check_current(self, chat_id: int | None, message_id: int) -> None:
        """ChatError `message_not_found`, or `not_current` where another message stands in its
        place or in that of an earlier one."""
        sql = "SELECT 1 FROM messages WHERE id = ? AND chat_id = ? AND NOT is_ai"
        if self.one(sql, message_id, chat_id) is None:
            raise ChatError("message_not_found")
        sql = "SELECT 1 FROM messages WHERE chat_id = ? AND replaces <= ? AND id > ?"
        if self.one(sql, chat_id, message_id, message_id):
            raise ChatError("not_current")

    def accept(self, user_id: str, action: Ask, task_id: str) -> Accepted:
        """Store a message and its empty reply, and their chat if there is none."""
        if isinstance(action, Regenerate):
            return self.answer_anew(user_id, action, task_id)
        known = self.sent(user_id, action.client_msg_id)
        if known is not None:
            return Accepted(user_id, known)
        if action.chat_id is None:
            chat = self.create_chat(user_id, "")
        else:
            chat = self.own_chat(Asker(user_id), action.chat_id)
        if action.replaces is not None:
            self.check_current(chat.id, action.replaces)
        message = self.insert_message(chat, action, task_id)
        reply = self.insert_reply(chat, message.id, task_id)
        if action.client_msg_id is not None:
            sql = "INSERT INTO sends (user_id, client_msg_id, message_id) VALUES (?, ?, ?)"
            self.one(sql, user_id, action.client_msg_id, message.id)
        saved = self.save_chat(chat)
        return Accepted(
            user_id, message, reply, saved if saved.title != chat.title else None
        )

    def answer_anew(self, user_id: str, action: Regenerate, task_id: str) -> Accepted:
        """Store a further, still empty reply to a chat's last user message."""
        chat = self.own_chat(Asker(user_id), action.chat_id)
        last = self.last_sent(chat.id)
        self.one("UPDATE messages SET task_id = ? WHERE id = ?", task_id, last)
        reply = self.insert_reply(chat, last, task_id)
        self.save_chat(chat)
        return Accepted(user_id, self.stored(last), reply)

    def stored(self, message_id: int) -> Message:
        sql = f"""SELECT {self.MESSAGE} FROM messages JOIN chats ON chats.id = chat_id
                  WHERE messages.id = ? AND NOT deleted"""
        row = self.one(sql, message_id)
        if row is None:
            raise ChatError(
                "chat_not_found", "This message was sent; its chat has been deleted."
            )
        return self.message(row)

    def insert_message(self, chat: Chat, action: SendMessage, task_id: str) -> Message:
        sql = f"""INSERT INTO messages (chat_id, user_id, content, is_ai, timestamp, status,
                  task_id, client_msg_id, replaces) VALUES (?, ?, ?, 0, ?, 'complete', ?, ?, ?)
                  RETURNING {self.MESSAGE}"""
        sent_as = action.client_msg_id
        row = self.one(
            sql,
            chat.id,
            chat.user_id,
            action.content,
            now(),
            task_id,
            sent_as,
            action.replaces,
        )
        self.index(row["id"], chat.user_id, action.content)
        return self.message(row)

    def insert_reply(self, chat: Chat, reply_to: int, task_id: str) -> Message:
        sql = f"""INSERT INTO messages (chat_id, user_id, content, is_ai, timestamp, status,
                  task_id, reply_to) VALUES (?, ?, '', 1, ?, 'streaming', ?, ?)
                  RETURNING {self.MESSAGE}"""
        return self.message(
            self.one(sql, chat.id, chat.user_id, now(), task_id, reply_to)
        )

    def append_pieces(self, news: list[News]) -> None:
        """Checkpoint running replies: only what is new of their text is written."""
        sql = """INSERT INTO pieces (message_id, position, text, reasoning)
                 SELECT id, :position, :text, :reasoning FROM messages
                 WHERE id = :message_id AND status = 'streaming'"""
        self.connection.executemany(sql, [piece._asdict() for piece in news])

    def settle(
        self,
        message_id: int,
        text: str,
        reasoning: str | None,
        status: Status,
        report: Report,
    ) -> Message:
        """Store a reply's ending, once, and return the row."""
        sql = """UPDATE messages SET content = ?, reasoning = ?, status = ?, finish_reason = ?,
                 model = ?, prompt_tokens = ?, completion_tokens = ?
                 WHERE id = ? AND status = 'streaming'"""
        counts = (report.prompt_tokens, report.completion_tokens)
        values = (
            text,
            reasoning,
            status,
            report.finish_reason,
            report.model,
            *counts,
            message_id,
        )
        if self.connection.execute(sql, values).rowcount:
            self.one("DELETE FROM pieces WHERE message_id = ?", message_id)
            row = self.one(
                f"SELECT {self.MESSAGE}, user_id FROM messages WHERE id = ?", message_id
            )
            self.index(message_id, row["user_id"], text)
            return self.message(row)
        return self.stored(message_id)

    def find_task(
        self, asker: Asker, task_id: str, chat_id: int | None = None
    ) -> Message:
        """Return the reply that a task wrote; ChatError `task_not_found`, also for another's."""
        sql = f"""SELECT {self.MESSAGE}, messages.user_id AS owner
                  FROM messages JOIN chats ON chats.id = chat_id
                  WHERE task_id = ? AND is_ai AND NOT deleted"""
        row = self.one(sql, task_id)
        if row is None or not asker.may_see(row["owner"]):
            raise ChatError("task_not_found")
        if chat_id is not None and chat_id != row["chat_id"]:
            raise ChatError("task_not_found")
        return self.message(row)

    def history(self, asker: Asker, chat_id: int, limit: int, before: int) -> Page:
        """Return a chat and the newest of its messages before id `before`: `limit` at most, and
        PAGE_CHARS, but one at least."""
        chat = self.own_chat(asker, chat_id)
        sql = f"""SELECT {self.MESSAGE} FROM messages WHERE chat_id = ? AND id < ?
                  ORDER BY id DESC LIMIT ?"""
        messages: list[Message] = []
        chars = 0
        for row in self.connection.execute(sql, (chat_id, before, limit + 1)):
            message = self.message(row)
            chars += len(message.content) + len(message.reasoning or "")
            if messages and (chars > PAGE_CHARS or len(messages) == limit):
                return Page(chat, messages[::-1], has_more=True)
            messages.append(message)
        return Page(chat, messages[::-1], has_more=False)

    def messages_after(self, chat_id: int, last: int, most_chars: int) -> list[Message]:
        """Return the messages of a chat after id `last`, oldest first: `most_chars`, one at least.

        Empty where there is none, also of a chat deleted meanwhile.
        """
        sql = f"""SELECT {self.MESSAGE} FROM messages JOIN chats ON chats.id = chat_id
                  WHERE chat_id = ? AND messages.id > ? AND NOT deleted ORDER BY messages.id"""
        messages: list[Message] = []
        for row in self.connection.execute(sql, (chat_id, last)):
            messages.append(self.message(row))
            most_chars -= len(row["content"])
            if most_chars < 0:
                break
        return messages

    def context(self, reply: Message, most_chars: int) -> Context:
        """Return what the model gets to see for `reply` (docs/protocol.md): turns that alternate,
        the last one the user message that it answers, before it the newest whole messages that
        fit into `most_chars` with it.
        """
        row = self.one(f"SELECT {self.CHAT} FROM chats WHERE id = ?", reply.chat_id)
        sql = """SELECT id, content, is_ai, reply_to, replaces FROM messages
                 WHERE chat_id = ? AND id <= ? AND status <> 'streaming' ORDER BY id DESC"""
        rows = self.connection.execute(sql, (reply.chat_id, reply.reply_to))
        return Context(self.chat(row), alternating(newest_current(rows, most_chars)))

    # Search

    def index(self, message_id: int, user_id: str, content: str) -> None:
        words = " ".join(search_words(user_id, content))
        self.one("INSERT INTO search (rowid, words) VALUES (?, ?)", message_id, words)

    def unindex(self, message_id: int, user_id: str, content: str) -> None:
        words = " ".join(search_words(user_id, content))
        sql = "INSERT INTO search (search, rowid, words) VALUES ('delete', ?, ?)"
        self.one(sql, message_id, words)

    def merge_search(self, *, begin: bool) -> bool:
        """Rewrite a part of the index without what was deleted; False if nothing is left to do.

        FTS5's way of optimizing step by step (its documentation, "The 'merge' Command"): a
        negative number of pages begins to make one segment of all, positive ones go on with it.
        """
        before = self.connection.total_changes
        pages = -MERGE_PAGES if begin else MERGE_PAGES
        self.one("INSERT INTO search (search, rank) VALUES ('merge', ?)", pages)
        return self.connection.total_changes - before >= 2

    def search(
        self, user_id: str, words: list[str], limit: int, deadline: float
    ) -> list[dict[str, Any]]:
        """Return the user's messages that have all `words`, newest first, each with a snippet.

        sqlite3.OperationalError "interrupted" if that isn't done by `deadline` (monotonic).
        """
        rows = [search_words(user_id, word) for word in words]
        # The last one may go on
        phrases = [f'"{" ".join(row)}" *' for row in rows if row]
        if not phrases:
            return []
        sql = f"""SELECT {self.MESSAGE} FROM search JOIN messages ON messages.id = search.rowid
                  JOIN chats ON chats.id = messages.chat_id
                  WHERE search MATCH ? AND messages.user_id = ? AND NOT deleted
                  ORDER BY search.rowid DESC LIMIT ?"""
        self.connection.set_progress_handler(lambda: time.monotonic() > deadline, 1000)
        try:
            found = self.all(sql, " AND ".join(phrases), user_id, limit)
        finally:
            self.connection.set_progress_handler(None, 0)
        messages = [self.message(row) for row in found]
        return [
            asdict(one) | {"snippet": snippet(one.content, words)} for one in messages
        ]


def newest_current(rows: Iterator[Any], most_chars: int) -> list[Turn]:
    """Return the turns in `rows`, both newest first, that the model gets to see.

    Left out: what was replaced, with all that followed it; older replies to the same message;
    replies without visible text; all from the first message on that doesn't fit.
    """
    turns: list[Turn] = []
    answered: set[int] = set()
    replaced_from = MAX_ID  # the first id that a later message stands in the place of
    for row in rows:
        current = row["id"] < replaced_from
        replaced_from = min(replaced_from, row["replaces"] or MAX_ID)
        if not current or row["reply_to"] in answered:
            continue
        if row["is_ai"]:
            answered.add(row["reply_to"])
            if not shows(row["content"]):
                continue
        most_chars -= len(row["content"])
        if turns and most_chars < 0:
            break
        role = "assistant" if row["is_ai"] else "user"
        turns.append({"role": role, "content": row["content"]})
    return turns


def alternating(turns: list[Turn]) -> list[Turn]:
    """Return `turns` (newest first) oldest first: neighbours of one role are joined, and the
    first one is the user's. Some models refuse anything else."""
    joined: list[Turn] = []
    for turn in reversed(turns):
        if joined and joined[-1]["role"] == turn["role"]:
            content = f"{joined[-1]['content']}\n\n{turn['content']}"
            joined[-1] = {"role": turn["role"], "content": content}
        elif joined or turn["role"] == "user":
            joined.append(turn)
    return joined


# --- Model: the port's two sides, any OpenAI-compatible server and a demo. Knows no chats. ---

OPENAI_URL = "https://api.openai.com/v1"
WIRE_ERRORS = (
    openai.OpenAIError,
    httpx2.HTTPError,
    aiohttp.ClientError,
    OSError,
    zlib.error,
)
CONNECT_SECONDS = 10.0
ERROR_SECONDS = 5.0  # for the body of a refusal to arrive
MAX_ERROR_BYTES = 2**16  # of a refusal's body
MAX_LINE_BYTES = 2**20  # of a model's stream
MAX_ANSWER_BYTES = 2**22  # of an answer that is no stream
# At once, of a stream that is compressed though nobody asked for it
INFLATED_BYTES = 2**16
FEW_STREAMS = 16  # up to here tokens are relayed one by one
# Seconds between two reads of one stream, for each that there is
STREAM_PAUSE = 0.00035
MAX_PAUSE = 0.2
PAUSE_STEP = 0.005  # pauses end together: one turn of the event loop for many streams
# How servers say that a request is too long for the model's context
TOO_LONG = re.compile(
    r"context_length_exceeded|context (length|window|size)|maximum context|too many tokens"
    r"|(prompt|input|request) (is |length )?.{0,20}(too long|exceeds)|reduce the length",
    re.IGNORECASE,
)


def check_proxy(url: str) -> None:
    """StartError if the way to `url` leads through a proxy that aiohttp can't speak to."""
    target = urlsplit(url)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(target.scheme) or proxies.get("all") or ""
    if proxy.lower().startswith("socks") and not urllib.request.proxy_bypass(
        target.hostname or ""
    ):
        raise StartError(
            "ALL_PROXY, HTTP_PROXY, HTTPS_PROXY: a SOCKS proxy can't be used for the model; name "
            "an HTTP proxy, or the model's host in NO_PROXY"
        )


async def bound_errors(response: Any) -> None:
    """Read no more of a refusal than there is to learn from it: a body may have no end."""
    if response.status_code < 400:
        return
    body = bytearray()
    with suppress(TimeoutError):
        async with asyncio.timeout(ERROR_SECONDS):
            async for part in response.aiter_raw():
                body += part
                if len(body) > MAX_ERROR_BYTES:
                    break
    await response.aclose()
    response._content = bytes(body[:MAX_ERROR_BYTES])  # noqa: SLF001 - as if read to its end


class OpenAIModel:
    """Any OpenAI-compatible server, as a Model, through the client's raw stream: its typed one
    makes several pydantic objects of every piece.

    Reads each stream the less often the more there are. While a socket rests the kernel keeps what
    arrives; the next read brings several tokens, and all layers above are paid once for them.
    """

    def __init__(self, settings: Settings) -> None:
        url = urlsplit(settings.openai_base_url or OPENAI_URL)
        check_proxy(url.geturl())
        secret = settings.openai_api_key
        self._key = secret.get_secret_value() if secret else "none"
        self._asks_usage = True
        self._streams = 0
        # By the time of their next read
        self._resting: dict[float, list[asyncio.Transport]] = {}
        # Reading has no limit here: comments would reset it; `Chats` times the pieces. An
        # http_client of one's own comes without the SDK's limits, so they are set.
        timeout = httpx2.Timeout(None, connect=CONNECT_SECONDS)
        limits = httpx2.Limits(
            max_connections=settings.max_running_replies, keepalive_expiry=30.0
        )
        http = openai.DefaultAioHttpClient(
            timeout=timeout,
            limits=limits,
            follow_redirects=False,  # the conversation goes to no other host
            event_hooks={"response": [bound_errors]},
        )
        self._client = openai.AsyncOpenAI(
            api_key=self._key,
            base_url=urlunsplit(url._replace(query="", fragment="")),
            default_query=dict(parse_qsl(url.query)),
            default_headers={"Accept-Encoding": "identity"},
            timeout=timeout,
            http_client=http,
        )

    async def close(self) -> None:
        await self._client.close()

    async def __call__(
        self, turns: list[Turn], name: str, report: Report
    ) -> AsyncGenerator[Delta, None]:
        """Yield what each read brings; ModelError with docs/protocol.md's code if it fails.

        Until the response begins the SDK tries twice more, as Retry-After says; later nobody.
        """
        stream = ChunkStream(report)
        opened = False
        try:
            async with AsyncExitStack() as stack:
                response = (await self._open(stack, turns, name)).http_response
                opened = True
                self._streams += 1
                read = self._reader(response)
                while not stream.done and (data := await read()):
                    yield stream.feed(data)
                yield stream.feed(b"\n", last=True)
                if stream.fault is not None:
                    raise stream.fault
        except (ModelError, *WIRE_ERRORS) as error:
            words = words_of(error).replace(self._key, "[key]")
            raise ModelError(model_code(error, opened=opened), words) from error
        finally:
            self._streams -= opened
        if report.finish_reason is None:
            raise ModelError(
                "model_incomplete", "the stream ended without a finish_reason"
            )

    async def _open(self, stack: AsyncExitStack, turns: list[Turn], name: str) -> Any:
        """Return the response to a request; without `stream_options` where they are refused."""
        create: Any = self._client.chat.completions.with_streaming_response.create
        # As `messages` each turn would cost the SDK 0.14 ms of checks, on the event loop.
        request = {
            "model": name,
            "messages": [],
            "extra_body": {"messages": turns},
            "stream": True,
        }
        if self._asks_usage:
            try:
                usage = {"include_usage": True}
                return await stack.enter_async_context(
                    create(**request, stream_options=usage)
                )
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                if "stream_options" not in error.response.text:
                    raise
                self._asks_usage = False
        return await stack.enter_async_context(create(**request))

    def _reader(self, response: Any) -> Callable[[], Awaitable[bytes]]:
        """Return what reads the response's next bytes, b"" at its end.

        aiohttp's stream is read directly: each layer over it costs as much as parsing a token.
        Where there is something else under the SDK, or a coding, the layers do it.
        """
        coding = response.headers.get("content-encoding", "identity")
        if coding != "identity":
            inflated = inflate(response.aiter_raw(), coding)
            return lambda: anext(inflated, b"")
        http = getattr(
            getattr(response.stream, "_stream", None), "_aiohttp_response", None
        )
        if http is None:
            chunks = response.aiter_raw()
            return lambda: anext(chunks, b"")

        async def read() -> bytes:
            data: bytes = await http.content.readany()
            if http.connection:  # gone once the response is read to its end
                self._rest(http.connection.transport)
            return data

        return read

    def _rest(self, transport: asyncio.Transport) -> None:
        """Let a stream's socket rest, if there are many."""
        if self._streams <= FEW_STREAMS:
            return
        loop = asyncio.get_running_loop()
        pause = min(self._streams * STREAM_PAUSE, MAX_PAUSE)
        at = int((loop.time() + pause) / PAUSE_STEP + 1) * PAUSE_STEP
        transport.pause_reading()
        if at not in self._resting:
            self._resting[at] = []
            loop.call_at(at, self._wake, at)
        self._resting[at].append(transport)

    def _wake(self, at: float) -> None:
        for transport in self._resting.pop(at):
            if not transport.is_closing():
                transport.resume_reading()


async def inflate(
    parts: AsyncIterator[bytes], coding: str
) -> AsyncGenerator[bytes, None]:
    """Yield what is in a compressed stream, a little at a time: a small part may hold a lot."""
    if coding not in {"gzip", "deflate"}:
        raise ModelError("model_error", f"the answer is coded: {coding}")
    inflater = zlib.decompressobj(wbits=47)  # gzip or zlib, as its head says
    async for part in parts:
        rest = part
        while rest:
            yield inflater.decompress(rest, INFLATED_BYTES) or b"\n"
            rest = inflater.unconsumed_tail
            await asyncio.sleep(0)


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def words_of(error: BaseException) -> str:
    """Return what happened, for the log: the SDK says "timed out" of all that it can't reach."""
    words = [f"{type(cause).__name__}: {cause}"[:300] for cause in causes_of(error)]
    return " <- ".join(dict.fromkeys(words))[:1000]


def model_code(error: Exception, *, opened: bool) -> str:
    """Return docs/protocol.md's code for what the client raised, before or after a response."""
    if isinstance(error, ModelError):
        return error.code
    if isinstance(error, openai.APIStatusError):
        if error.status_code in {400, 413, 422} and TOO_LONG.search(
            error.response.text
        ):
            return "model_context"
        codes = {401: "model_auth", 403: "model_auth", 429: "model_rate_limited"}
        return codes.get(error.status_code, "model_error")
    # Over aiohttp, refused connections come as timeouts as well: what caused it tells.
    timed_out = any(isinstance(cause, TimeoutError) for cause in causes_of(error))
    if isinstance(error, openai.APITimeoutError) and timed_out:
        return "model_timeout"
    return "model_incomplete" if opened else "model_error"


class ThinkTag:
    """Tells thinking between <think> and </think>, at the very start of a text, from the text."""

    OPEN = "<think>"
    CLOSE = "</think>"

    def __init__(self) -> None:
        self.passed = False  # all that comes now is text
        self._inside = False
        self._held = ""  # what may be, or be before, the beginning of a tag

    def split(self, piece: str, *, last: bool = False) -> tuple[str, str]:
        """Return the text and the thinking that are certain now, at the last piece all."""
        if self.passed:
            return piece, ""
        held = self._held + piece
        self._held = ""
        if self._inside:
            return self._find_end(held, last=last)
        start = held.lstrip()
        if start.startswith(self.OPEN):
            self._inside = True
            return self._find_end(start.removeprefix(self.OPEN), last=last)
        if self.OPEN.startswith(start) and not last:
            self._held = held
            return "", ""
        self.passed = True
        return held, ""

    def _find_end(self, held: str, *, last: bool) -> tuple[str, str]:
        thinking, end, text = held.partition(self.CLOSE)
        if end:
            text = text.lstrip("\r\n")
            if not text and not last:
                self._held = end  # line breaks may follow
                return "", thinking
            self.passed = True
            return text, thinking
        if not last:
            sizes = range(len(self.CLOSE) - 1, 0, -1)
            keep = next((size for size in sizes if held.endswith(self.CLOSE[:size])), 0)
            self._held = held[len(held) - keep :]
            thinking = held[: len(held) - keep]
        return "", thinking


class ChunkStream:
    """The bytes of a chat-completion stream, turned into text and reasoning.

    Server-sent events of one `data:` line each, as all servers write them; comments are passed
    over. Most lines differ from an earlier one in their plain text alone: those are not parsed.
    Where `data: {"choices":[{"delta":{"content":"Hel"}}]}` was parsed, what surrounds `Hel` is
    kept, and of a line that begins and ends just so, what is between is its text.
    """

    PLAIN = re.compile(rb'[^"\\\x00-\x1f]+')  # JSON text that stands for itself
    CONTENT = re.compile(rb'"content": ?"')

    def __init__(self, report: Report) -> None:
        self.report = report
        self.done = False
        self.fault: ModelError | None = None  # an error in the stream, or no JSON
        self._rest = b""  # of a line that isn't complete
        self._answer: bytearray | None = None  # a JSON answer instead of a stream
        self._begun = False
        self._before = b"\n"  # what surrounds the text in this stream's lines
        self._after = b""
        # Of a surrogate pair, until its other half
        self._half = {"text": "", "reasoning": ""}
        self._tag = ThinkTag()

    def feed(self, data: bytes, *, last: bool = False) -> Delta:
        """Return what `data` brings, maybe nothing; `done` after `[DONE]` or a fault."""
        # Split at \n only: str.splitlines would also split at U+2028 inside a JSON string.
        *lines, self._rest = (self._rest + data).split(b"\n")
        delta = Delta([], [], alive=False)
        try:
            for line in lines:
                if line:  # an empty one ends an event
                    delta = self._read_line(line, delta)
                if self.done:
                    break
            if len(self._rest) > MAX_LINE_BYTES:
                raise ModelError("model_error", "a line of the stream is too long")
            if last and self._answer is not None and not self.done:
                delta = self._read_chunk(bytes(self._answer), b"", delta)
        except (ModelError, UnicodeDecodeError) as error:
            self.done = True
            code = error.code if isinstance(error, ModelError) else "model_error"
            self.fault = ModelError(code, str(error))
        if self.done:
            self._rest = b""  # what follows the end, or a fault, is not read
        return self._release(delta) if last else delta

    def _read_line(self, line: bytes, delta: Delta) -> Delta:
        before = self._before
        after = self._after
        if line.startswith(before) and line.endswith(after):
            plain = self.PLAIN.fullmatch(line, len(before), len(line) - len(after))
            if plain and not self._half["text"]:
                delta.text.append(plain[0].decode())
                return delta
        if not self._begun:
            line = line.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark
            self._begun = bool(line.strip()) and not line.startswith(b":")
            if line.lstrip().startswith(b"{"):
                self._answer = bytearray()
        if self._answer is not None:
            self._collect(line)
            return delta
        if not line.startswith(b"data:"):
            return delta
        content = line[5:].strip()
        if content == b"[DONE]":
            self.done = True
        elif content:
            return self._read_chunk(content, line, delta)
        return delta

    def _collect(self, line: bytes) -> None:
        assert self._answer is not None
        self._answer += line + b"\n"
        if len(self._answer) > MAX_ANSWER_BYTES:
            raise ModelError("model_error", "the answer is too long")

    def _read_chunk(self, content: bytes, line: bytes, delta: Delta) -> Delta:
        """Add what a chunk brings to `delta`, and remember its line's form if it is plain text."""
        chunk = read_chunk(content, self.report)
        text = self._join("text", chunk.text)
        text, tagged = self._tag.split(text) if text else ("", "")
        reasoning = self._join("reasoning", chunk.reasoning) + tagged
        if text:
            delta.text.append(text)
        if reasoning:
            delta.reasoning.append(reasoning)
        raw = chunk.text.encode(errors="replace")
        if raw and self._tag.passed and not reasoning:
            key = self.CONTENT.search(line)
            if (
                key
                and line.startswith(raw + b'"', key.end())
                and line.count(b'"content"') == 1
            ):
                self._before = line[: key.end()]
                self._after = line[key.end() + len(raw) :]
        return delta._replace(alive=delta.alive or chunk.alive)

    def _join(self, kind: str, text: str) -> str:
        """Return `text` with the half pair before it, without one at its end."""
        if not text:
            return ""
        text = self._half[kind] + text
        self._half[kind] = text[-1] if "\ud800" <= text[-1] < "\udc00" else ""
        return clean(text.removesuffix(self._half[kind]))

    def _release(self, delta: Delta) -> Delta:
        """Add what was held back for a continuation that didn't come."""
        text, tagged = self._tag.split(clean(self._half["text"]), last=True)
        reasoning = tagged + clean(self._half["reasoning"])
        delta.text.extend([text] if text else [])
        delta.reasoning.extend([reasoning] if reasoning else [])
        return delta


class Chunk(NamedTuple):
    text: str
    reasoning: str
    alive: bool


def read_chunk(data: bytes, report: Report) -> Chunk:
    """Return what a chat-completion chunk, or a whole answer, says; note the rest in `report`.

    ModelError if it tells of an error, or is no chunk.
    """
    try:
        try:
            chunk = from_json(data)
        except ValueError:
            chunk = json.loads(data)  # slower, and lets half a surrogate pair through
        error = chunk.get("error")
        if error:
            code = "model_context" if TOO_LONG.search(str(error)) else "model_error"
            raise ModelError(code, f"an error in the stream: {str(error)[:500]}")
        report.model = report.model or clean(chunk.get("model")) or None
        usage = chunk.get("usage")
        if usage:
            report.prompt_tokens = whole(usage.get("prompt_tokens"))
            report.completion_tokens = whole(usage.get("completion_tokens"))
        choices = chunk.get("choices") or ()
        choice: Any = next((one for one in choices if not one.get("index")), {})
        report.finish_reason = (
            clean(choice.get("finish_reason")) or report.finish_reason
        )
        return read_choice(choice)
    except (
        ValueError,
        AttributeError,
        TypeError,
        LookupError,
        RecursionError,
    ) as error:
        raise ModelError(
            "model_error", f"not a chat-completion chunk: {error}"
        ) from None


def read_choice(choice: dict[str, Any]) -> Chunk:
    """Return what stands in a choice, wherever servers put it."""
    delta = choice.get("delta") or choice.get("message") or {}
    content = delta.get("content")
    text = flat(content, thinking=False)
    text = text or flat(delta.get("refusal")) or flat(choice.get("text"))
    reasoning = flat(content, thinking=True) if isinstance(content, list) else ""
    reasoning = (
        reasoning
        or flat(delta.get("reasoning_content"))
        or flat(delta.get("reasoning"))
    )
    at_work = any(value for name, value in delta.items() if name != "role")
    return Chunk(text, reasoning, bool(text or reasoning or at_work))


def flat(value: Any, thinking: bool | None = None) -> str:
    """Return the text in a string, or in an object or list of parts; of parts, where `thinking`
    is given, those that are thinking or those that aren't."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return ""
    texts = []
    for part in value:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        is_thinking = kind in {"thinking", "reasoning"}
        if thinking is None or thinking == is_thinking:
            inner = part
            if isinstance(part, dict):
                inner = (
                    part.get("text") or part.get("thinking") or part.get("reasoning")
                )
                inner = inner or part.get("content") or part.get("summary")
            texts.append(flat(inner))
    return "".join(texts)


def clean(text: Any) -> str:
    """Return `text` with surrogate pairs joined and lone ones replaced: nothing downstream can
    take them as they are. "" if it is no string."""
    if not isinstance(text, str) or text.isascii():
        return text if isinstance(text, str) else ""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def whole(number: Any) -> int | None:
    return number if type(number) is int and 0 <= number <= MAX_ID else None


async def demo_model(
    turns: list[Turn], _name: str, report: Report
) -> AsyncGenerator[Delta, None]:
    """Answer word by word without any model or network, and say so."""
    report.model = "demo"
    text = f"""This is the demo model: no language model is connected, so nobody has understood \
your {len(turns[-1]["content"])} characters. It streams word by word, like a real one. Stop it, \
reload the page, open a second tab: the reply goes on, and nothing is lost.

To talk to a real model, set `OPENAI_API_KEY`, or `OPENAI_BASE_URL` for any compatible server, \
and start the service again:

```sh
OPENAI_API_KEY=... uv run chat_app.py
```
"""
    for word in re.findall(r"\S+\s*", text):
        await asyncio.sleep(0.03)
        yield Delta([word], [], alive=True)
    report.finish_reason = "stop"


# --- Access: who asks, and whether they may. ---

CLOCK_SKEW_SECONDS = 30
KEYS_SECONDS = 300.0  # after which an identity provider's keys are fetched anew
KEYS_PAUSE_SECONDS = 2.0  # between two fetches, however many tokens name an unknown key
KEYS_TIMEOUT_SECONDS = 5.0
PUBLIC_KEY_ALGORITHMS = ["RS256", "ES256", "EdDSA"]


class KeySet:
    """The keys behind JWT_JWKS_URL: fetched when needed, kept, one fetch at a time."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._keys: dict[str | None, jwt.PyJWK] = {}
        self._fetched_at = -KEYS_SECONDS  # when that was last tried
        self._fetching: asyncio.Task[None] | None = None

    async def find(self, key_id: str | None) -> jwt.PyJWK | None:
        """Return the key with that id, None if there is none. Known keys are not waited for."""
        known = self._keys.get(key_id)
        is_old = time.monotonic() - self._fetched_at > KEYS_SECONDS
        if self._fetching is None and (known is None or is_old):
            self._fetching = asyncio.create_task(self._refresh())
        if known is None and self._fetching is not None:
            await asyncio.shield(self._fetching)
        return self._keys.get(key_id)

    async def _refresh(self) -> None:
        await asyncio.sleep(self._fetched_at + KEYS_PAUSE_SECONDS - time.monotonic())
        try:
            async with (
                asyncio.timeout(KEYS_TIMEOUT_SECONDS),
                httpx2.AsyncClient(follow_redirects=False) as client,
            ):
                response = await client.get(self._url)
                response.raise_for_status()
                keys = jwt.PyJWKSet.from_dict(response.json()).keys
            self._keys = {key.key_id: key for key in keys}
        except (
            httpx2.HTTPError,
            jwt.PyJWTError,
            OSError,
            ValueError,
            TypeError,
            AttributeError,
        ) as error:
            log_event("no keys", logging.WARNING, url=self._url, why=repr(error))
        finally:
            self._fetched_at = time.monotonic()
            self._fetching = None


class Access:
    """Reads tokens, hosts and origins. ChatError `unauthorized` or `forbidden`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._secret = (
            settings.jwt_secret.get_secret_value() if settings.jwt_secret else None
        )
        self._keys = KeySet(settings.jwt_jwks_url) if settings.jwt_jwks_url else None

    async def identify(self, connection: HTTPConnection) -> Asker:
        """Return who asks, by their token where the settings ask for one.

        Browsers can't set headers on a WebSocket: there the token may come as a subprotocol.
        """
        if not self._settings.asks_for_tokens:
            return ANYONE
        scheme, _, token = connection.headers.get("authorization", "").partition(" ")
        bearer = token.strip() if scheme.lower() == "bearer" else ""
        for protocol in connection.scope.get("subprotocols", ()):
            if protocol.startswith("bearer."):
                bearer = protocol.removeprefix("bearer.")
        try:
            claims = await self._claims(bearer)
            subject = claims["sub"]
            if type(subject) is int:
                subject = str(subject)
            return Asker(valid_user_id(subject), float(claims["exp"]))
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError):
            raise ChatError("unauthorized") from None

    async def _claims(self, token: str) -> dict[str, Any]:
        """Return what a token says; jwt.PyJWTError if it is not valid."""
        header = jwt.get_unverified_header(token)
        key: Any = None
        algorithms: list[str] = []
        if header.get("alg") == "HS256":
            key = self._secret
            algorithms = ["HS256"]
        elif self._keys is not None and header.get("alg") in PUBLIC_KEY_ALGORITHMS:
            key = await self._keys.find(header.get("kid"))
            algorithms = [header["alg"]]
        if key is None:
            raise jwt.InvalidTokenError("no key for it")
        claims: dict[str, Any] = jwt.decode(
            token,
            key,
            algorithms=algorithms,
            audience=self._settings.jwt_audience,
            leeway=CLOCK_SKEW_SECONDS,
            options={"require": ["exp", "sub"], "verify_sub": False},
        )
        if self._settings.jwt_audience is None and "aud" in claims:
            raise jwt.InvalidAudienceError("it is for somebody, even if for nobody")
        return claims

    def check_host(self, headers: Headers) -> None:
        """ChatError `forbidden` for a host name that somebody else's DNS could point here.

        With tokens that doesn't matter: a foreign page has none.
        """
        host = headers.get("host", "localhost").lower()
        name = re.sub(r":\d*$", "", host).strip("[]").rstrip(".")
        allowed = self._settings.hosts
        if (
            self._settings.asks_for_tokens
            or "." not in name
            or "*" in allowed
            or name in allowed
        ):
            return
        try:
            ipaddress.ip_address(name)
        except ValueError:
            raise ChatError("forbidden", "This host is not in ALLOWED_HOSTS.") from None

    def check_origin(self, headers: Headers) -> None:
        """ChatError `forbidden` if a page of a site asks that is neither ours nor listed."""
        origin = headers.get("origin")
        if origin is None or not {"*", plain_origin(origin)}.isdisjoint(
            self._settings.origins
        ):
            return
        ports = r":(80|443)$"
        host = re.sub(ports, "", headers.get("host", "").lower())
        if re.sub(ports, "", origin.lower().partition("://")[2]) != host:
            raise ChatError("forbidden", "This origin is not allowed.")


def require_user(asker: Asker, user_id: str) -> str:
    """Return `user_id` if `asker` may act for them; ChatError `forbidden` if not,
    `invalid_frame` where no user can have that id."""
    validate(NewChat, {"user_id": user_id})
    if not asker.may_see(user_id):
        raise ChatError("forbidden", "The token is for another user.")
    return user_id


# --- The WebSocket: frames in, frames out. ---


class Socket:
    """The ASGI application behind /ws/{user_id}: one call is one WebSocket, from its handshake
    to its close. Who is refused is accepted first, so that browsers see the close code."""

    def __init__(self, chats: Chats, access: Access) -> None:
        self._chats = chats
        self._access = access

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        websocket = WebSocket(scope, receive, send)
        await websocket.accept("chat" if "chat" in scope["subprotocols"] else None)
        try:
            self._access.check_host(websocket.headers)
            self._access.check_origin(websocket.headers)
            check_shard(websocket.headers, self._chats.settings.shard)
            asker = await self._access.identify(websocket)
            user_id = require_user(asker, websocket.path_params["user_id"])
            if self._chats.draining:
                await websocket.close(*RESTARTS)
                return
            with self._chats.join(user_id) as connection:
                await self._talk(websocket, connection, replace(asker, user_id=user_id))
        except ChatError as error:
            await websocket.close(FAULTS[error.code].close, error.message)

    async def _talk(
        self, websocket: WebSocket, connection: Connection, asker: Asker
    ) -> None:
        """Listen and send at once, until the client leaves or the token expires."""
        with closing_at_expiry(connection, asker):
            sender = asyncio.create_task(self._deliver(websocket, connection))
            try:
                await self._listen(websocket, connection, asker)
            finally:
                sender.cancel()

    async def _deliver(self, websocket: WebSocket, connection: Connection) -> None:
        """Send what `connection` has for its client, until it closes or the client is gone.

        By the ASGI `send` itself: Starlette's three layers over it only cost time.
        """
        send = websocket._send  # noqa: SLF001 - the one that it was made with
        with suppress(OSError, WebSocketDisconnect, RuntimeError):
            while (frame := await connection.get()) is not None:
                await send({"type": "websocket.send", "text": frame.text})
            await websocket.close(*connection.closing or ())
        connection.close(1006, "gone")  # so that nobody waits for its reading

    async def _listen(
        self, websocket: WebSocket, connection: Connection, asker: Asker
    ) -> None:
        """Do what the client asks, one frame after the other. Never waits for a reply."""
        while (received := await websocket.receive())["type"] != "websocket.disconnect":
            await connection.readable()
            if asker.expired or connection.closing is not None:
                connection.close(4401, "expired")
                continue  # nothing is done any more; the close is on its way
            await self._take(received.get("text"), connection, asker)

    async def _take(
        self, text: str | None, connection: Connection, asker: Asker
    ) -> None:
        """Do what one frame asks for, or refuse it."""
        data: dict[str, Any] = {}
        try:
            if text is None:
                raise ChatError("invalid_frame", "must be a text frame")
            data = parse_object(text.encode())
            await self._act(parse_action(data), connection, asker)
        except ChatError as error:
            connection.push(refusal(error, data))
        except Exception as error:  # noqa: BLE001 - logged; the connection goes on
            connection.push(refusal(internal_fault(error, user=asker.user_id), data))

    async def _act(self, action: Action, connection: Connection, asker: Asker) -> None:
        match action:
            case Ping(id=ping_id):
                connection.push(make_frame("pong", id=ping_id))
            case Abort(chat_id=chat_id, task_id=task_id):
                await self._chats.abort(asker, chat_id, task_id)
            case SendMessage() | Regenerate():
                assert asker.user_id is not None
                accepted = await self._chats.send(asker.user_id, action)
                if accepted.reply is None:  # sent before: echoed to whoever asks alone
                    connection.push(message_frame(accepted.message))


@contextmanager
def closing_at_expiry(connection: Connection, asker: Asker) -> Iterator[None]:
    """Close `connection` when the token of `asker` expires."""
    if asker.expires == float("inf"):
        yield
        return
    # The clock of the event loop
    seconds = min(max(0.0, asker.expires - time.time()), 10.0**8)
    expiry = asyncio.get_running_loop().call_later(
        seconds, connection.close, 4401, "expired"
    )
    try:
        yield
    finally:
        expiry.cancel()


def check_shard(headers: Headers, shard: int | None) -> None:
    """ChatError `misdirected` if the proxy meant another shard."""
    meant = headers.get("x-shard")
    if shard is not None and meant is not None and meant != str(shard):
        raise ChatError("misdirected")


def internal_fault(error: Exception, **about: Any) -> ChatError:
    """Log a fault of the service itself; return what its client is told."""
    trace = None if isinstance(error, (sqlite3.Error, TimeoutError)) else error
    log_event("a request failed", logging.ERROR, trace, **about, why=repr(error))
    return ChatError("internal")


# --- HTTP: requests turned into calls of the application. No SQL, no SDK. ---

BODY_SECONDS = 20.0  # for a request's body to arrive
HEALTH_SECONDS = 2.0  # for the database to answer
# Of silence in an event stream, before a comment keeps proxies from closing it
PING_SECONDS = 15.0
# Or clients would send a POST again when its stream ends
NEVER_RETRY = "retry: 2147483647\n\n"
CURSOR = r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z)_([1-9]\d{0,18})"
NO_STORE = {"Cache-Control": "no-store"}  # it is somebody's conversation
# nginx's word for: pass it on at once
EVENT_HEADERS = {**NO_STORE, "X-Accel-Buffering": "no"}
Handler = Callable[[Request, Asker], Awaitable[Response]]


def json_response(data: Any, status: int = 200, **headers: str) -> Response:
    return Response(to_json(data), status, {**headers, **NO_STORE}, "application/json")


def problem(error: ChatError, headers: dict[str, str] | None = None) -> Response:
    """Return RFC 9457 problem details."""
    status = FAULTS[error.code].status
    title = error.code.replace("_", " ").capitalize()
    content = {
        "type": "about:blank",
        "title": title,
        "status": status,
        "detail": error.message,
        "code": error.code,
    }
    known = {**(headers or {}), **NO_STORE}
    if status in {429, 503}:
        known["Retry-After"] = str(error.retry_after or 1)
    if status == 401:
        known["WWW-Authenticate"] = "Bearer"
    return Response(to_json(content), status, known, "application/problem+json")


async def answer_error(request: Request, error: Exception) -> Response:
    """Answer what an endpoint raised, or Starlette itself."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=400)  # nobody is there to read it
    if isinstance(error, ChatError):
        return problem(error)
    if isinstance(error, HTTPException):
        code = "method_not_allowed" if error.status_code == 405 else "not_found"
        return problem(ChatError(code), dict(error.headers or {}))
    return problem(internal_fault(error, path=request.url.path))


def path_id(request: Request) -> int:
    text = request.path_params["chat_id"]
    if not re.fullmatch("[1-9][0-9]{0,18}", text) or int(text) > MAX_ID:
        raise ChatError("chat_not_found")
    return int(text)


def query_number(request: Request, name: str, default: int, most: int) -> int:
    """Return a query parameter from 1 to `most`; ChatError `invalid_frame` that names it."""
    text = request.query_params.get(name, str(default))
    if not re.fullmatch("[0-9]{1,19}", text) or not 1 <= int(text) <= most:
        raise ChatError(
            "invalid_frame", f"{name}: must be a whole number from 1 to {most}"
        )
    return int(text)


class Endpoints:
    """The HTTP requests, each with who asks."""

    def __init__(self, chats: Chats, access: Access) -> None:
        self._chats = chats
        self._access = access
        self._settings = chats.settings

    def route(self, path: str, **handlers: Handler) -> Route:
        """Return one Route for `path` with a handler per method, so that 405 names them all."""

        async def endpoint(request: Request) -> Response:
            method = "GET" if request.method == "HEAD" else request.method
            if method != "GET":
                self._access.check_origin(request.headers)
            self._check_size(int(request.headers.get("content-length", "0")))
            asker = ANYONE
            if path.startswith("/api/"):
                check_shard(request.headers, self._settings.shard)
                asker = await self._access.identify(request)
            try:
                return await handlers[method](request, asker)
            except asyncio.CancelledError:
                # The service ends, and this has taken too long
                raise ChatError(
                    "overloaded", "The service stops.", retry_after=1
                ) from None

        return Route(path, endpoint, methods=list(handlers))

    def _check_size(self, body: int) -> None:
        most = self._settings.max_frame_bytes
        if body > most:  # Starlette's own limit answers plain text
            raise ChatError("too_large", f"A body may have {most} bytes.")

    async def _read_body(self, request: Request) -> bytes:
        """Return the body; ChatError `too_large`, or `invalid_json` if it doesn't arrive."""
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    body += chunk
                    self._check_size(len(body))
        except TimeoutError:
            raise ChatError(
                "invalid_json", "The body did not arrive in time."
            ) from None
        return bytes(body)

    async def _parse_body(
        self, request: Request, model: type[W], *, optional: bool = False, **known: Any
    ) -> W:
        """Return the JSON body as `model`, with `known` over what it says; empty if `optional`.

        ChatError `too_large`, `invalid_json`, `unsupported_media_type` or `invalid_frame`.
        """
        body = await self._read_body(request)
        media = (
            request.headers.get("content-type", "").partition(";")[0].strip().lower()
        )
        if body and not re.fullmatch(r"(application/([\w.+-]+\+)?json)?", media):
            hint = "The body must be JSON and say so: add -H 'Content-Type: application/json'."
            raise ChatError("unsupported_media_type", hint)
        data = parse_object(body) if body or not optional else {}
        return validate(model, data | known)

    def _user_of(self, request: Request, asker: Asker) -> str:
        return require_user(asker, request.path_params["user_id"])

    # Chats

    async def post_chat(self, request: Request, asker: Asker) -> Response:
        """Make a chat of the user in the body, the query or the token; a shard sends its client
        to the user's own path, by which a proxy finds the user's shard."""
        asked = request.query_params.get("user_id", asker.user_id)
        body = await self._parse_body(request, NewChat, optional=asked is not None)
        named = asked if body.user_id is None else str(body.user_id)
        if named is None:
            raise ChatError("invalid_frame", "user_id: is required")
        user_id = require_user(asker, named)
        if asked is not None:
            require_user(asker, asked)
        if self._settings.shard is not None:
            return RedirectResponse(
                f"/api/users/{quote(user_id, safe='')}/chats", 307, NO_STORE
            )
        return await self._create(user_id, body)

    async def post_user_chat(self, request: Request, asker: Asker) -> Response:
        user_id = self._user_of(request, asker)
        body = await self._parse_body(request, NewChat, optional=True, user_id=user_id)
        return await self._create(user_id, body)

    async def _create(self, user_id: str, body: NewChat) -> Response:
        chat = await self._chats.create(user_id, body)
        return json_response(chat, 201, Location=f"/api/chats/{chat.id}")

    async def get_chat(self, request: Request, asker: Asker) -> Response:
        limit = query_number(request, "limit", 100, 1000)
        before = query_number(request, "before", MAX_ID, MAX_ID)
        return json_response(
            await self._chats.history(asker, path_id(request), limit, before)
        )

    async def patch_chat(self, request: Request, asker: Asker) -> Response:
        chat_id = path_id(request)
        change = await self._parse_body(request, ChatChange)
        return json_response(await self._chats.change(asker, chat_id, change))

    async def delete_chat(self, request: Request, asker: Asker) -> Response:
        await self._chats.delete(asker, path_id(request))
        return Response(status_code=204)

    # Users

    async def get_chats(self, request: Request, asker: Asker) -> Response:
        user_id = self._user_of(request, asker)
        limit = query_number(request, "limit", 50, 200)
        cursor = request.query_params.get(
            "cursor", f"9999-12-31T23:59:59.999Z_{MAX_ID}"
        )
        found = re.fullmatch(CURSOR, cursor, re.ASCII)
        if not found:
            raise ChatError(
                "invalid_frame", "cursor: is none that this service gave out"
            )
        at = found[1]
        last = min(int(found[2]), MAX_ID)
        store = self._chats.store
        page = await store.read(lambda db: db.list_chats(user_id, at, last, limit + 1))
        if len(page) <= limit:
            return json_response(page)
        end = page[limit - 1]
        following = quote(f"{end.updated_at}_{end.id}")
        # relative: any prefix
        link = f'<chats?limit={limit}&cursor={following}>; rel="next"'
        return json_response(page[:limit], Link=link)

    async def get_search(self, request: Request, asker: Asker) -> Response:
        user_id = self._user_of(request, asker)
        limit = query_number(request, "limit", 20, 100)
        words = list(
            dict.fromkeys(request.query_params.get("q", "").casefold().split())
        )
        if not 1 <= len(words) <= SEARCH_WORDS or sum(map(len, words)) > SEARCH_CHARS:
            rule = f"1 to {SEARCH_WORDS} different words, of {SEARCH_CHARS} characters at most"
            raise ChatError("invalid_frame", f"q: must have {rule}")
        return json_response(await self._chats.store.search(user_id, words, limit))

    async def get_events(self, request: Request, asker: Asker) -> Response:
        """Stream what a WebSocket of this user would get, of one chat with ?chat_id=."""
        user_id = self._user_of(request, asker)
        chat_id = None
        if "chat_id" in request.query_params:
            chat_id = query_number(request, "chat_id", 1, MAX_ID)
            asked = Asker(user_id)
            await self._chats.store.read(lambda db: db.own_chat(asked, chat_id))
        if request.method == "HEAD":
            return Response(headers=EVENT_HEADERS, media_type="text/event-stream")
        stack = AsyncExitStack()
        connection = stack.enter_context(self._chats.join(user_id, chat_id))
        stack.enter_context(closing_at_expiry(connection, asker))
        events = self._events(connection, stack, ": welcome\n\n")
        return StreamingResponse(events, 200, EVENT_HEADERS, "text/event-stream")

    async def _events(
        self, connection: Connection, stack: AsyncExitStack, greeting: str
    ) -> AsyncIterator[str]:
        """Yield the frames of `connection` as server-sent events until it closes; leave then."""
        async with stack:
            yield greeting
            while True:
                try:
                    async with asyncio.timeout(PING_SECONDS):
                        frame = await connection.get()
                except TimeoutError:
                    yield ": still here\n\n"
                    continue
                if frame is None:
                    return
                yield server_sent(frame)

    async def get_export(self, request: Request, asker: Asker) -> Response:
        lines = self._chats.export(self._user_of(request, asker))
        return StreamingResponse(lines, 200, NO_STORE, "application/x-ndjson")

    async def delete_user(self, request: Request, asker: Asker) -> Response:
        await self._chats.erase(self._user_of(request, asker))
        return Response(status_code=204)

    # Messages

    async def post_abort(self, request: Request, asker: Asker) -> Response:
        chat_id = path_id(request)
        body = await self._parse_body(request, Abort, optional=True, chat_id=chat_id)
        task_id = body.task_id
        if task_id is None:
            task_id = request.query_params.get("task_id")
        rows = await self._chats.ended(await self._chats.abort(asker, chat_id, task_id))
        task_ids = [row.task_id for row in rows if row.status is Status.ABORTED]
        if not task_ids:
            raise ChatError(
                "not_running", "The reply ended before it could be stopped."
            )
        first = task_ids[0]
        result = {
            "status": "aborted",
            "chat_id": chat_id,
            "task_id": first,
            "task_ids": task_ids,
        }
        return json_response(result)

    async def post_message(self, request: Request, asker: Asker) -> Response:
        chat_id = path_id(request)
        action = await self._parse_body(request, SendMessage, chat_id=chat_id)
        return await self._ask(request, asker, chat_id, action)

    async def post_regenerate(self, request: Request, asker: Asker) -> Response:
        chat_id = path_id(request)
        action = await self._parse_body(
            request, Regenerate, optional=True, chat_id=chat_id
        )
        return await self._ask(request, asker, chat_id, action)

    async def _ask(
        self, request: Request, asker: Asker, chat_id: int, action: Ask
    ) -> Response:
        """Answer with the ended reply or, where events are accepted, with its frames."""
        user_id = asker.user_id
        if user_id is None:
            chat = await self._chats.store.read(lambda db: db.own_chat(ANYONE, chat_id))
            user_id = chat.user_id
        message = (await self._chats.send(user_id, action)).message
        if "text/event-stream" not in request.headers.get("accept", "").lower():
            reply = await self._chats.reply_to(message)
            return json_response({"message": message, "reply": reply}, 201)
        stack = AsyncExitStack()
        connection = await stack.enter_async_context(
            self._chats.follow(user_id, message)
        )
        events = self._events(connection, stack, NEVER_RETRY)
        return StreamingResponse(events, 200, EVENT_HEADERS, "text/event-stream")

    # The service

    async def get_models(self, _request: Request, _asker: Asker) -> Response:
        names = self._chats.model_names
        return json_response({"default": names[0], "models": names})

    async def get_health(self, _request: Request, _asker: Asker) -> Response:
        chats = self._chats
        if chats.draining:
            raise ChatError(
                "overloaded", "The service is shutting down.", retry_after=5
            )
        async with asyncio.timeout(HEALTH_SECONDS):
            await chats.store.check()
        health = {
            "status": "ok",
            "model": chats.model_names[0],
            "connections": chats.rooms.count,
            "replies": len(chats.running),
            "version": VERSION,
        }
        return json_response(health)

    async def get_metrics(self, _request: Request, _asker: Asker) -> Response:
        chats = self._chats
        metrics = chats.metrics
        metrics.connections.set(chats.rooms.count)
        metrics.running.set(len(chats.lines))
        metrics.waiting.set(len(chats.running) - len(chats.lines))
        text = prometheus.generate_latest(metrics.registry)
        return Response(text, media_type=prometheus.CONTENT_TYPE_PLAIN_0_0_4)


class CheckedHosts:
    """Refuses requests under a host name that is none of ours. (WebSockets: see Socket.)"""

    def __init__(self, app: Any, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            if scope["type"] == "http":
                self._access.check_host(Headers(scope=scope))
        except ChatError as error:
            await problem(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)


class ListedOrigins(CORSMiddleware):
    """CORS for the listed origins; for others as if there were none."""

    def is_allowed_origin(self, origin: str) -> bool:
        return super().is_allowed_origin(plain_origin(origin))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        origin = Headers(scope=scope).get("origin") if scope["type"] == "http" else None
        if origin is not None and self.is_allowed_origin(origin):
            await super().__call__(scope, receive, send)
        else:
            await self.app(scope, receive, send)


class AnyConvertor(PathConvertor):
    """Matches whatever stands for a user id, so that a / or a line break is told as its fault."""

    regex = "(?s:.*)"


class LastConvertor(AnyConvertor):
    """The same at a path's end: what belongs to a user has routes, and methods, of its own."""

    regex = "(?s:(?!.*/(?:chats|search|events|export)$).*)"


# --- Server: fair protocols. Bytes in and out; knows nothing of chats. ---

FEED_BYTES = 4096  # of one socket, parsed in one turn of the event loop
MAX_FRAGMENTS = 1000  # of one message
MESSAGES_A_TURN = 8  # of one socket, before others get their turn
# For the head of a request, once a connection or a part of it is there
HEAD_SECONDS = 20.0
LINGER_SECONDS = 1.0  # for the other side to take our last words and close
BAD_REQUEST = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\n"
    b"Connection: close\r\n\r\n"
)


class FairlyParsed(asyncio.Protocol):
    """A protocol that parses what one read brings a little at a time, others in between.

    Nor does it go further than the application has taken what was before. Meanwhile the socket
    isn't read: what waits here is no more than two reads. Stands before uvicorn's class.
    """

    transport: asyncio.Transport
    loop: asyncio.AbstractEventLoop
    _unparsed = b""
    # Once at most: each turn that is scheduled would schedule the next
    _scheduled = False
    _ending = False

    def data_received(self, data: bytes) -> None:
        if self._ending:
            return
        if self._unparsed or len(data) > FEED_BYTES:
            self._unparsed += data
            self._go_on()
        else:
            self._parse(data)

    def _parse(self, data: bytes) -> None:
        super().data_received(data)

    def _untaken(self) -> bool:
        """Return whether the application has yet to take what was before."""
        raise NotImplementedError

    def _go_on(self) -> None:
        """Parse some more soon, or read on where nothing is left."""
        if self.transport.is_closing():
            self._unparsed = b""
        elif self._unparsed:
            self.transport.pause_reading()  # uvicorn may have resumed it
            if not self._scheduled and not self._untaken():
                self._scheduled = True
                self.loop.call_soon(self._parse_some)
        elif not self._untaken():
            self.transport.resume_reading()

    def _parse_some(self) -> None:
        self._scheduled = False
        if self._unparsed and not self._untaken() and not self.transport.is_closing():
            data = self._unparsed[:FEED_BYTES]
            self._unparsed = self._unparsed[FEED_BYTES:]
            self._parse(data)
        self._go_on()

    def _end_with(self, last_words: bytes) -> None:
        """Say something, take no notice of what still comes, and close in a moment.

        A socket that is closed over bytes that it hasn't read is reset, and the other side, or a
        proxy in between, may never see what was said last (RFC 9112, 9.6).
        """
        if self._ending or self.transport.is_closing():
            return
        self._ending = True
        self._unparsed = b""
        self.transport.write(last_words)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.transport.resume_reading()
        self.loop.call_later(LINGER_SECONDS, self.transport.close)


class FairWebSocket(FairlyParsed, WebSocketsSansIOProtocol):
    """uvicorn's WebSocket, of which no flood takes more than its share of time and memory."""

    _taken = 0

    def _parse(self, data: bytes) -> None:
        try:
            super()._parse(data)
        except InvalidState:
            # Not UTF-8, and closed right behind it: uvicorn closes it again
            self._end_with(b"".join(self.conn.data_to_send()))
        if self.conn.handshake_exc is not None and not self.handshake_complete:
            # Uvicorn would leave the connection open for ever
            self.handshake_complete = True
            self._end_with(BAD_REQUEST + b"Bad handshake.")

    def handle_parser_exception(self) -> None:
        """Close with the code that the parser has chosen."""
        close = self.conn.close_sent
        assert close is not None
        self.queue.put_nowait({"type": "websocket.disconnect", "code": close.code})
        self._end_with(b"".join(self.conn.data_to_send()))

    def _end_with(self, last_words: bytes) -> None:
        super()._end_with(last_words)
        self.close_sent = True
        if self.close_timer is not None:
            self.close_timer.cancel()
        # uvicorn closes at once behind an application that has returned, but for this.
        self.close_timer = self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def _untaken(self) -> bool:
        return self.read_paused

    def handle_ping(self) -> None:
        """Answer, unless the client reads no answers (RFC 6455, 5.5.3: the latest is enough)."""
        pongs = b"".join(self.conn.data_to_send())
        if self.writable.is_set() and not self._ending:
            self.transport.write(pongs)

    def handle_cont(self, event: Any) -> None:
        if len(self.frames) >= MAX_FRAGMENTS and not self.close_sent:
            self.conn.fail(1009, "too many fragments")
            self.handle_parser_exception()
        elif not self.close_sent:
            super().handle_cont(event)

    async def receive(self) -> Any:
        message = await self.queue.get()
        if self.queue.empty() and (self.read_paused or self._unparsed):
            self.read_paused = False
            self._go_on()
        self._taken += 1
        if self._taken % MESSAGES_A_TURN == 0:
            await asyncio.sleep(0)
        return message

    def shutdown(self) -> None:
        """Close with 1012. Never raises: that would stop uvicorn's loop over the others."""
        self.stop_keepalive()
        if self.handshake_complete and self.conn.state is State.OPEN:
            self.queue.put_nowait({"type": "websocket.disconnect", "code": 1012})
            self.conn.send_close(1012)
        self._end_with(b"".join(self.conn.data_to_send()))


class ParsingFlow(FlowControl):
    """uvicorn's flow control, that lets the parser go on before the socket is read again."""

    def __init__(self, transport: asyncio.Transport, go_on: Callable[[], None]) -> None:
        super().__init__(transport)
        self._go_on = go_on

    def resume_reading(self) -> None:
        if self.read_paused:
            self.read_paused = False
            self._go_on()


class PatientHTTP(FairlyParsed, H11Protocol):
    """uvicorn's HTTP, that doesn't wait for ever for a request to go on.

    Fair, too: h11 takes 20 µs for a chunk of a body, which may hold one byte.
    """

    _upgraded = False
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = ParsingFlow(transport, self._go_on)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def _parse(self, data: bytes) -> None:
        super()._parse(data)
        self._watch()

    def _untaken(self) -> bool:
        return self.flow.read_paused

    def handle_websocket_upgrade(self, event: Any) -> None:
        self._upgraded = True
        self._unparsed = b""  # nobody may send frames before the answer
        self._unwatch()
        super().handle_websocket_upgrade(event)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP. Where an answer has begun, nothing can be said any more."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        answered = self.conn.our_state not in {h11.IDLE, h11.SEND_RESPONSE}
        self._end_with(b"" if answered else BAD_REQUEST + msg.encode())

    def shutdown(self) -> None:
        if self._ending:
            # h11 would raise, and stop uvicorn's loop over the others
            self.transport.close()
        else:
            super().shutdown()

    def on_response_complete(self) -> None:
        """Give the rest of a body that was answered before its end the time of an idle client."""
        unfinished = self.conn.their_state is h11.SEND_BODY
        super().on_response_complete()
        if unfinished and self._deadline is None:
            self._deadline = self.loop.call_later(
                self.timeout_keep_alive, self.transport.close
            )

    def _watch(self) -> None:
        """Begin to wait for a request's head, or stop to, when it has come."""
        if self._upgraded:
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self._unwatch()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _unwatch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


# --- Composition: the parts put together in order, and the process around them. ---

# From a signal to the end of the process: the drain's phases, and some air
EXIT_SECONDS = 14.5
CLOSE_SECONDS = 1  # for uvicorn to close its connections after the drain
OWN = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
# The API pages' scripts: npm packages, held by their hashes
CDN = "https://cdn.jsdelivr.net/npm/"
PAGE_POLICY = f"{OWN}; img-src 'self' data:"
API_PAGE_POLICY = (
    f"{OWN}; script-src 'self' {CDN}; style-src 'self' 'unsafe-inline' {CDN}; worker-src blob:; "
    "img-src 'self' data: https:; font-src 'self' data:"
)


FILE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


class PageFiles(StaticFiles):
    """What lies in static/, under the policy: pages of this origin run nothing else."""

    def file_response(self, *args: Any, **options: Any) -> Response:
        response = super().file_response(*args, **options)
        response.headers.update(FILE_HEADERS | {"Content-Security-Policy": PAGE_POLICY})
        return response


def page(name: str, policy: str) -> Handler:
    async def handler(_request: Request, _asker: Asker) -> Response:
        headers = FILE_HEADERS | {"Content-Security-Policy": policy}
        return FileResponse(HERE / "static" / name, headers=headers)

    return handler


def document(name: str) -> Handler:
    """Return a handler that serves a YAML file of docs/ as JSON, references to others included."""
    text = to_json(yaml.safe_load((HERE / "docs" / name).read_text("utf-8"))).decode()
    text = text.replace("openapi.yaml#", "openapi.json#")

    async def handler(_request: Request, _asker: Asker) -> Response:
        return Response(
            text, headers={"Cache-Control": "no-cache"}, media_type="application/json"
        )

    return handler


def make_routes(chats: Chats, access: Access) -> list[BaseRoute]:
    """Return every path of docs/protocol.md."""
    register_url_convertor("any", AnyConvertor())
    register_url_convertor("last", LastConvertor())
    api = Endpoints(chats, access)
    chat = "/api/chats/{chat_id}"
    user = "/api/users/{user_id:any}"
    return [
        WebSocketRoute("/ws/{user_id:any}", Socket(chats, access)),
        api.route("/api/chats", POST=api.post_chat),
        api.route(chat, GET=api.get_chat, PATCH=api.patch_chat, DELETE=api.delete_chat),
        api.route(f"{chat}/abort", POST=api.post_abort),
        api.route(f"{chat}/messages", POST=api.post_message),
        api.route(f"{chat}/regenerate", POST=api.post_regenerate),
        api.route(f"{user}/chats", GET=api.get_chats, POST=api.post_user_chat),
        api.route(f"{user}/search", GET=api.get_search),
        api.route(f"{user}/events", GET=api.get_events),
        api.route(f"{user}/export", GET=api.get_export),
        api.route("/api/users/{user_id:last}", DELETE=api.delete_user),
        api.route("/api/models", GET=api.get_models),
        api.route("/health", GET=api.get_health),
        api.route("/metrics", GET=api.get_metrics),
        api.route("/openapi.json", GET=document("openapi.yaml")),
        api.route("/asyncapi.json", GET=document("asyncapi.yaml")),
        api.route("/docs", GET=page("swagger.html", API_PAGE_POLICY)),
        api.route("/redoc", GET=page("redoc.html", API_PAGE_POLICY)),
        api.route("/", GET=page("chat.html", PAGE_POLICY)),
        Mount("/static", PageFiles(directory=HERE / "static")),
    ]


def create_app(chats: Chats, access: Access) -> Starlette:
    """Return the ASGI application."""
    cors = Middleware(
        ListedOrigins,
        allow_origins=chats.settings.origins,
        allow_methods=["GET", "POST", "PATCH", "DELETE"],
        allow_headers=["Authorization", "Content-Type"],
        expose_headers=["Link", "Location", "Retry-After"],
    )
    known = (
        ChatError,
        HTTPException,
        sqlite3.Error,
        ClientDisconnect,
        TimeoutError,
        Exception,
    )
    handlers: Any = dict.fromkeys(known, answer_error)
    app = Starlette(
        routes=make_routes(chats, access),
        middleware=[Middleware(CheckedHosts, access=access), cors],
        exception_handlers=handlers,
    )
    app.router.redirect_slashes = False
    return app


def listen(settings: Settings) -> socket.socket:
    """Return the socket that the service hears; StartError if it can't be had."""
    address = (settings.host, settings.port)
    try:
        found = socket.getaddrinfo(
            *address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family = found[0][0]
        both = settings.host == "::" and socket.has_dualstack_ipv6()  # IPv4 as well
        listener = socket.create_server(
            found[0][4][:2], family=family, backlog=2048, dualstack_ipv6=both
        )
    except (OSError, UnicodeError) as error:
        place = f"HOST, PORT: cannot listen on {settings.host}:{settings.port}"
        raise StartError(
            f"{place}: {getattr(error, 'strerror', None) or error}"
        ) from None
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # The kernel drops a reader that takes nothing (accepted sockets inherit this): neither
        # pings nor `transport.close()` get past its full buffer.
        patience = int(settings.slow_reader_seconds * 1000)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, patience)
    return listener


def address_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Server(uvicorn.Server):
    """uvicorn with promise 10: drained before it closes its connections."""

    def __init__(self, chats: Chats, app: Starlette, ready: Callable[[], None]) -> None:
        settings = chats.settings
        self._chats = chats
        self._ready = ready
        # h11: httptools would take headers of any size. No deflate: half the memory when idle.
        config = uvicorn.Config(
            app,
            http=PatientHTTP,
            h11_max_incomplete_event_size=32_768,
            ws=FairWebSocket,
            ws_max_size=settings.max_frame_bytes,
            ws_per_message_deflate=False,
            access_log=False,
            log_config=None,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=CLOSE_SECONDS,
            lifespan="off",
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        on_main_thread = threading.current_thread() is threading.main_thread()
        if on_main_thread and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self.handle_exit)  # a terminal that is closed
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        log_event("stopping")
        for server in self.servers:
            server.close()
        await self._chats.drain()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """End gently at the first signal, at once at the second Ctrl-C."""
        if self.should_exit and sig == signal.SIGINT:
            # What is committed is safe, the rest is recovered at the next start
            os._exit(130)
        # Promise 10, also where the disk does not answer.
        asyncio.get_running_loop().call_later(EXIT_SECONDS, os._exit, 0)
        super().handle_exit(sig, frame)


@asynccontextmanager
async def open_model(settings: Settings) -> AsyncIterator[tuple[Model, list[str]]]:
    """Yield the configured model, or the demo, and the names that may be asked for."""
    if settings.is_demo:
        yield demo_model, ["demo"]
        return
    model = OpenAIModel(settings)
    names = [settings.model_name, *split_list(settings.models)]
    try:
        yield model, list(dict.fromkeys(names))
    finally:
        await model.close()


async def serve(
    settings: Settings, listener: socket.socket, ready: Callable[[Server], None]
) -> None:
    """Open what the service needs, serve until a signal, close it in the opposite order.

    `ready` is called once requests are answered. StartError if something can't be had.
    """
    metrics = Metrics()
    async with (
        Store.open(settings, metrics) as store,
        open_model(settings) as (model, names),
    ):
        chats = Chats(settings, store, model, names, metrics)
        app = create_app(chats, Access(settings))
        server = Server(chats, app, lambda: ready(server))
        # If one of these fails, the process ends: it would look alive and store nothing.
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(store.write_forever())
            helpers = [
                tasks.create_task(chats.checkpoint_forever()),
                tasks.create_task(chats.purge_forever()),
                tasks.create_task(chats.tidy_forever()),
            ]
            try:
                await server.serve([listener])
            finally:
                for helper in helpers:
                    helper.cancel()
                store.stop()


# --- The command line. ---

TOKEN_SECONDS = 86_400


def load_settings() -> Settings:
    """Read the environment and `.env`; StartError that names the variable at fault."""
    try:
        return Settings(_env_file=".env", _env_file_encoding="utf-8")  # type: ignore[call-arg]
    except ValidationError as error:
        name, fault = first_fault(error)
        raise StartError(f"{name.upper()}: {fault}" if name else fault) from None
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f".env: cannot be read: {error}") from None


def unknown_settings() -> list[str]:
    """Return the names in `.env` that are no settings: misspelt ones, most likely."""
    known = {name.upper() for name in Settings.model_fields}
    return [name for name in dotenv_values(".env") if name.upper() not in known]


def run_service(settings: Settings) -> None:
    """Run the service until a signal; StartError if it can't start."""
    with logging_to_stderr(settings):
        allow_many_files()
        # A start that is stopped ends clean; so does uvicorn, which raises its signal once more.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: sys.exit(0))
        listener = listen(settings)
        for name in unknown_settings():
            log_event("an unknown setting in .env", logging.WARNING, setting=name)
        if (
            settings.host not in {"127.0.0.1", "localhost", "::1"}
            and not settings.asks_for_tokens
        ):
            hint = "set JWT_SECRET: without it everybody is believed to be who they say"
            log_event(
                "open to the network", logging.WARNING, host=settings.host, hint=hint
            )
        # A full collection would stop all for 0.03 s to look at what was imported
        gc.freeze()
        loop_factory = uvicorn.Config("", log_config=None).get_loop_factory()
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(
                serve(settings, listener, lambda _: print_banner(settings, listener))
            )


def print_banner(settings: Settings, listener: socket.socket) -> None:
    """Say where the service is and which model answers."""
    name = "demo (it understands nothing: set OPENAI_API_KEY for a model)"
    if not settings.is_demo:
        name = settings.model_name
    address = address_of(listener)
    log_event("started", address=address, version=VERSION)
    print(f"chat_app {VERSION} listens on {address}")
    print(f"  model    {name}\n  docs     {address}/docs", flush=True)


def allow_many_files() -> None:
    """Raise the limit on open files, so on connections, as far as the system allows."""
    if sys.platform != "win32":
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        with suppress(ValueError, OSError):
            # macOS says "no limit" and takes no such value
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def print_token(settings: Settings, user: str) -> None:
    """Print a token of `user` for a day; StartError without JWT_SECRET."""
    if settings.jwt_secret is None:
        raise StartError("JWT_SECRET: is needed to make a token")
    try:
        valid_user_id(user)
    except ValueError as error:
        raise StartError(f"USER: {error}") from None
    claims = {"sub": user, "exp": int(time.time()) + TOKEN_SECONDS}
    if settings.jwt_audience is not None:
        claims["aud"] = settings.jwt_audience
    print(jwt.encode(claims, settings.jwt_secret.get_secret_value(), "HS256"))


def backup(settings: Settings, target: str) -> None:
    """Copy the database as it is now into a new file, also while the service runs."""
    if Path(target).exists():
        raise StartError(f"FILE: {target} exists already")
    source = f"file:{quote(str(Path(settings.database_path).resolve()))}?mode=rw"
    try:
        with (
            contextlib.closing(sqlite3.connect(source, uri=True)) as database,
            contextlib.closing(sqlite3.connect(target)) as copy,
        ):
            database.backup(copy)
    except sqlite3.Error as error:
        raise StartError(f"FILE, DATABASE_URL: cannot back up: {error}") from None


class Arguments(argparse.ArgumentParser):
    """argparse, but a wrong command line is one sentence, as any other fault of a start."""

    def error(self, message: str) -> NoReturn:
        raise StartError(
            f"{message}; usage: chat_app.py [--help | token USER | backup FILE]"
        )


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    about = "A small real-time backend for AI chat. Settings: the environment and .env"
    parser = Arguments("chat_app.py", description=about)
    parser.add_argument("--version", action="version", version=f"chat_app {VERSION}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    token = commands.add_parser(
        "token", help="print a token for USER (needs JWT_SECRET)"
    )
    token.add_argument("user", metavar="USER")
    copy = commands.add_parser(
        "backup", help="copy the database to FILE, also while it is used"
    )
    copy.add_argument("file", metavar="FILE")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Run the command line; return the exit status: 2 for what its user can set right."""
    try:
        asked = parse_arguments(arguments)
        settings = load_settings()
        if asked.command == "token":
            print_token(settings, asked.user)
        elif asked.command == "backup":
            backup(settings, asked.file)
        else:
            run_service(settings)
    except StartError as error:
        print(f"chat_app: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
