"""What one core of the service can carry, next to the same work done the usual way.

    python bench.py                                  all tables at modest sizes, about five minutes
    python bench.py relay --users 10 150 --rate 50 --seconds 10
    python bench.py saturation --users 200 400 800 --target chat_app
    python bench.py durable --senders 1 10 50
    python bench.py connections --idle 2000
    python bench.py history --messages 1000000
    python bench.py shards --users 150                one and two shards, each with so many users
    python bench.py relay --json                     the same figures for machines

Three parties, each its own process: an upstream that speaks the model's HTTP, a server under test,
and raw WebSocket clients (this process). Where the machine allows, the server alone has the first
core and the other two share the rest; the column `load` says how busy those were, in percent of
one core: where it nears all that they have, they set the pace and not the server.

Targets, so that every figure is a ratio:

    chat_app      the service, as `python chat_app.py` starts it
    conventional  the usual way: Starlette, the SDK's typed stream, `send_json` per token, one
                  commit per write, uvicorn's defaults (FastAPI, which costs more, is no dependency)
    bare          the least that Python can do: asyncio protocols, no framework, nothing stored
    nginx         the same stream relayed over plain HTTP in C, where installed (not in every table)
    --also        NAME=COMMAND: any other server of the protocol that takes PORT, OPENAI_BASE_URL
                  and DATABASE_URL from its environment

What is measured, and what holds:

- A token's text is the time at which the upstream sent it, on the clock that all processes share.
  So a client knows the latency added to each token, also if several came in one frame.
- CPU is what the kernel charged to the server's threads from when every reply runs until the first
  one ends, over the tokens that arrived in that window.
- Nothing is left out: latencies are of all tokens, and a reply is complete only if its final
  `message` says so and its content is the joined tokens, as many as the upstream was to send.
- `shards` has nginx in front in every row, as deploy/nginx-shards.conf configures it. What one
  core for each shard would carry is the shards' number over their CPU time a token.
- Databases are on disk, in a temporary directory that the output names. Nothing outlives the run.
"""

# ruff: noqa: PLC0415 - a baseline's packages are imported where it runs, not by the clients
# ruff: noqa: S311, S603 - random phases are no secrets, commands come from the command line

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import functools
import hashlib
import http.client
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from array import array
from collections import defaultdict, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence

    import aiosqlite
    from openai import AsyncOpenAI
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.websockets import WebSocket

new_event_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
with contextlib.suppress(ImportError):  # uvicorn[standard] leaves it out on Windows
    from uvloop import new_event_loop

Row = dict[str, Any]

HERE = Path(__file__).resolve().parent
HOST = "127.0.0.1"
START_SECONDS = 30  # for a server to listen
STEP_SECONDS = 30  # for one handshake or one echo, also from an overloaded server
RAMP_SECONDS = 1.0  # users begin within this time, not all in one millisecond
TICKS_PER_SECOND = 1000  # of the upstream's timer wheel
CHAT_MESSAGES = 10_000  # in the chat whose history is read
HOLD = "hold the reply"  # a prompt with these words is never answered
# As many replies as the service runs, and keeps waiting in a chat
HELD_CHATS, WAITING = 1000, 8
NO_LIMITS = {
    "MESSAGES_PER_MINUTE": "0",
    "MAX_CONNECTIONS": "100000",
    "MAX_CONNECTIONS_PER_USER": "100",
    "MODEL_TIMEOUT_SECONDS": "600",
}


def now_us() -> int:
    """Microseconds on the monotonic clock, which all processes of a machine share."""
    return time.monotonic_ns() // 1000


def tell(text: str) -> None:
    """Show progress on stderr: one changing line on a terminal, plain lines elsewhere."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


def percentile(values: Iterable[float], share: float) -> float | None:
    ordered = sorted(values)
    return (
        ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else None
    )


class Link(asyncio.Protocol):
    """One end of a TCP connection."""

    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's is none by its class
        self.transport = cast("asyncio.Transport", transport)


# --- Upstream: the model's side. Knows HTTP and the time, nothing of any server. ---


def chunk(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(body), body)


def event(delta: str, finish_reason: str = "null", more: str = "") -> bytes:
    """One chunk of the chat completions stream, with the fields that OpenAI sends."""
    return chunk(
        b'data: {"id":"chatcmpl-bench","object":"chat.completion.chunk","created":1700000000,'
        b'"model":"bench","system_fingerprint":"fp_bench","choices":[{"index":0,"delta":%b,'
        b'"logprobs":null,"finish_reason":%b}]%b}\n\n'
        % (delta.encode(), finish_reason.encode(), more.encode())
    )


STAMP_ZERO = b"0" * 13
BEFORE_STAMP, AFTER_STAMP = event('{"content":" ' + STAMP_ZERO.decode() + '"}').split(
    STAMP_ZERO
)
STAMP = re.compile(rb'"content":" (\d{13})"')
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    + event('{"role":"assistant","content":""}')
)
USAGE = ',"usage":{"prompt_tokens":9,"completion_tokens":%d,"total_tokens":9}'


def chat_request(content: str) -> bytes:
    body = json.dumps({"messages": [{"role": "user", "content": content}]}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nContent-Length: %d\r\n\r\n"
    return head % len(body) + body


class Wheel:
    """Streams in the slots of one turn, each visited once a turn: one timer for all of them."""

    def __init__(self, rate: float) -> None:
        slots = max(1, round(TICKS_PER_SECOND / rate))
        self._slots: list[list[Stream]] = [[] for _ in range(slots)]
        self._tick_seconds = 1 / (rate * slots)

    def add(self, stream: Stream) -> None:
        random.choice(self._slots).append(stream)

    async def turn(self) -> None:
        """Turn forever. A late tick is made up for at once, so that the rate holds."""
        clock = asyncio.get_running_loop().time
        start, done = clock(), 0
        while True:
            due = int((clock() - start) / self._tick_seconds)
            for tick in range(done, due):
                at = tick % len(self._slots)
                self._slots[at] = [
                    stream for stream in self._slots[at] if stream.emit()
                ]
            done = due
            await asyncio.sleep(self._tick_seconds)


class Stream(Link):
    """One keep-alive connection: each request is answered with `tokens` stamped tokens."""

    def __init__(self, wheel: Wheel, tokens: int) -> None:
        self._wheel, self._tokens = wheel, tokens
        self._left = 0
        self._tail = b""
        self._buffer = bytearray()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, blank, body = self._buffer.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: *(\d+)", head)
        if blank and len(body) >= (size := int(length[1]) if length else 0):
            self._buffer = bytearray(body[size:])
            self._begin(json.loads(body[:size]))

    def _begin(self, request: dict[str, Any]) -> None:
        self.transport.write(STREAM_HEAD)
        if HOLD in str(request["messages"][-1]["content"]):
            return
        asked = (request.get("stream_options") or {}).get("include_usage")
        usage = USAGE % self._tokens if asked else ""
        self._tail = (
            event("{}", '"stop"', usage) + chunk(b"data: [DONE]\n\n") + chunk(b"")
        )
        self._left = self._tokens
        if self.emit():  # the first token at once: all delay of it is the server's
            self._wheel.add(self)

    def emit(self) -> bool:
        """Send the next token, and the stream's end with the last; False after that."""
        if self.transport.is_closing():
            return False
        self._left -= 1
        token = BEFORE_STAMP + b"%013d" % now_us() + AFTER_STAMP
        self.transport.write(token if self._left else token + self._tail)
        return self._left > 0


async def upstream(port: int, rate: float, tokens: int) -> None:
    wheel = Wheel(rate)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: Stream(wheel, tokens), HOST, port, backlog=4096
    )
    async with server:
        await wheel.turn()


# --- WebSocket by hand (RFC 6455): whole messages only, no extensions. ---


def take_frames(buffer: bytearray) -> list[tuple[int, bytes]]:
    """Remove the complete frames from the buffer's front: (opcode, payload) of each."""
    frames, at = [], 0
    while len(buffer) >= at + 2:
        length, head = buffer[at + 1] & 127, at + 2
        if length >= 126:
            head += 2 if length == 126 else 8
            length = int.from_bytes(buffer[at + 2 : head], "big")
        # Clients mask; ours with zeros, which changes nothing
        head += buffer[at + 1] >> 7 << 2
        if len(buffer) < head + length:
            break
        frames.append((buffer[at] & 15, bytes(buffer[head : head + length])))
        at = head + length
    del buffer[:at]
    return frames


def frame(payload: bytes, opcode: int = 1, masked: bool = False) -> bytes:
    bit, key = (128, bytes(4)) if masked else (0, b"")
    if len(payload) < 126:
        return bytes((128 | opcode, bit | len(payload))) + key + payload
    if len(payload) < 65536:
        return (
            bytes((128 | opcode, bit | 126))
            + len(payload).to_bytes(2, "big")
            + key
            + payload
        )
    return (
        bytes((128 | opcode, bit | 127))
        + len(payload).to_bytes(8, "big")
        + key
        + payload
    )


# --- Clients: raw and cheap, so that the server is what is measured. ---


@dataclass
class Seen:
    """What all clients of one run received."""

    tokens: int = 0
    frames: int = 0
    added_ms: array[float] = field(default_factory=lambda: array("d"))
    first_ms: array[float] = field(default_factory=lambda: array("d"))

    def frame(self, stamps: Sequence[str | bytes]) -> None:
        now = now_us()
        self.frames += 1
        self.tokens += len(stamps)
        for stamp in stamps:
            self.added_ms.append((now - int(stamp)) / 1000)


class Turn:
    """One message on its way: its echo, and whether its reply came whole."""

    def __init__(self, tokens: int) -> None:
        loop = asyncio.get_running_loop()
        self.echo: asyncio.Future[Row] = loop.create_future()
        self.whole: asyncio.Future[bool] = loop.create_future()
        self.sent_us = now_us()
        self.pieces: list[str] = []
        self._tokens = tokens

    def end(self, reply: Row) -> None:
        text = "".join(self.pieces)
        right = reply["content"] == text and len(text.split()) == self._tokens
        if not self.whole.done():
            self.whole.set_result(right and reply.get("status") == "complete")

    def fail(self, why: str) -> None:
        if not self.echo.done():
            self.echo.set_exception(RuntimeError(why))
            self.echo.exception()  # seen, even if nobody waits any more
        if not self.whole.done():
            self.whole.set_result(False)


class Peer(Link):
    """One WebSocket client with one message on its way at a time."""

    def __init__(self, seen: Seen, user: str, deflate: bool = False) -> None:
        self._seen, self._user, self._deflate = seen, user, deflate
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.turn: Turn | None = None
        self._buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        offer = (
            "Sec-WebSocket-Extensions: permessage-deflate\r\n" if self._deflate else ""
        )
        self.transport.write(
            f"GET /ws/{self._user} HTTP/1.1\r\nHost: {HOST}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {base64.b64encode(bytes(16)).decode()}\r\n"
            f"Sec-WebSocket-Version: 13\r\n{offer}\r\n".encode()
        )

    def connection_lost(self, _exc: Exception | None) -> None:
        if not self.ready.done():
            self.ready.set_exception(ConnectionError("the handshake was refused"))
        if self.turn:
            self.turn.fail("the connection was lost")

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self.ready.done():
            head, blank, rest = self._buffer.partition(b"\r\n\r\n")
            if not blank:
                return
            if not head.startswith(b"HTTP/1.1 101 "):
                self.transport.abort()
                return
            self._buffer = rest
            self.ready.set_result(None)
        for opcode, payload in take_frames(self._buffer):
            if opcode == 1 and self.turn:
                self._take(json.loads(payload), self.turn)
            elif opcode == 9:
                self.transport.write(frame(payload, opcode=10, masked=True))

    def _take(self, event: Row, turn: Turn) -> None:
        if event["type"] == "token":
            self._got(turn, event["token"].split(), event["token"])
        elif event["type"] == "message" and event["message"]["is_ai"]:
            turn.end(event["message"])
        elif event["type"] == "message":
            if not turn.echo.done():
                turn.echo.set_result(event["message"])
        elif event["type"] == "error":
            turn.fail(f"the server said: {event['message']}")

    def _got(self, turn: Turn, stamps: Sequence[str | bytes], text: str) -> None:
        if not turn.pieces:
            self._seen.first_ms.append((now_us() - turn.sent_us) / 1000)
        turn.pieces.append(text)
        self._seen.frame(stamps)

    def say(self, content: str, tokens: int = 0, chat_id: int | None = None) -> Turn:
        """Send a message; without `chat_id` to a new chat."""
        self.turn = Turn(tokens)
        action = {"action": "send_message", "content": content, "chat_id": chat_id}
        self.transport.write(frame(json.dumps(action).encode(), masked=True))
        return self.turn


class HttpPeer(Peer):
    """A client of nginx: the upstream's own stream over plain HTTP."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        Link.connection_made(self, transport)
        self.ready.set_result(None)

    def data_received(self, data: bytes) -> None:
        whole, _, rest = (self._buffer + data).rpartition(b"\n")
        self._buffer = bytearray(rest)
        if self.turn and (stamps := STAMP.findall(whole)):
            self._got(self.turn, stamps, b" ".join([b"", *stamps]).decode())
        if self.turn and b"[DONE]" in whole:
            self.turn.end({"content": "".join(self.turn.pieces), "status": "complete"})

    def say(self, content: str, tokens: int = 0, chat_id: int | None = None) -> Turn:
        assert chat_id is None
        self.turn = Turn(tokens)
        self.transport.write(chat_request(content))
        return self.turn


async def connect(server: Server, seen: Seen, user: str, deflate: bool = False) -> Peer:
    loop = asyncio.get_running_loop()
    peer = (HttpPeer if server.name == "nginx" else Peer)(seen, user, deflate)
    async with asyncio.timeout(STEP_SECONDS):
        await loop.create_connection(lambda: peer, HOST, server.port)
        await peer.ready
    return peer


# --- The bare minimum: a relay without a framework and without storage. ---


class BareConnection(Link):
    """A client of the bare relay. One reply at a time, like everywhere."""

    def __init__(self, upstream_port: int) -> None:
        self._upstream_port = upstream_port
        self._open = False
        self._buffer = bytearray()
        self._waiting: deque[str] = deque()
        self._reply: asyncio.Task[Any] | None = None

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._open:
            self._shake_hands()
        for opcode, payload in take_frames(self._buffer) if self._open else ():
            if opcode == 1:
                content = json.loads(payload)["content"]
                self.send(
                    {"type": "message", "message": baseline_message(1, content, False)}
                )
                self._waiting.append(content)
                if not self._reply:
                    self.next_reply()

    def _shake_hands(self) -> None:
        head, _, self._buffer[:] = self._buffer.partition(b"\r\n\r\n")
        key = re.search(rb"(?i)sec-websocket-key: *(\S+)", head)
        assert key, "our clients send their handshake in one piece"
        digest = hashlib.sha1(
            key[1] + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11", usedforsecurity=False
        ).digest()
        self._open = True
        self.transport.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: %b\r\n\r\n" % base64.b64encode(digest)
        )

    def send(self, event: Row) -> None:
        self.transport.write(frame(json.dumps(event).encode()))

    def next_reply(self) -> None:
        self._reply = None
        if self._waiting and not self.transport.is_closing():
            reply = BareReply(self, self._waiting.popleft())
            loop = asyncio.get_running_loop()
            self._reply = loop.create_task(
                loop.create_connection(lambda: reply, HOST, self._upstream_port)
            )


class BareReply(Link):
    """One request to the upstream, which sends whole events in each chunk: no more is parsed."""

    def __init__(self, client: BareConnection, content: str) -> None:
        self._client, self._content = client, content
        self._pieces: list[str] = []
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.write(chat_request(self._content))

    def data_received(self, data: bytes) -> None:
        *events, self._buffer = (self._buffer + data).split(b"\n\n")
        for text in (event.partition(b"data: ")[2] for event in events):
            if text == b"[DONE]":
                self._end()
            elif piece := json.loads(text)["choices"][0]["delta"].get("content"):
                self._pieces.append(piece)
                self._client.send({"type": "token", "token": piece})

    def _end(self) -> None:
        self.transport.close()
        message = baseline_message(2, "".join(self._pieces), True)
        self._client.send({"type": "message", "message": message})
        self._client.next_reply()


def baseline_message(chat_id: int, content: str, is_ai: bool) -> Row:
    return {
        "chat_id": chat_id,
        "content": content,
        "is_ai": is_ai,
        "status": "complete",
    }


async def bare(port: int, upstream_port: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: BareConnection(upstream_port), HOST, port, backlog=4096
    )
    async with server:
        await server.serve_forever()


# --- The conventional backend: as tutorials write it, but with a task per reply and WAL. ---

CONVENTIONAL_SCHEMA = """
CREATE TABLE IF NOT EXISTS chats (id INTEGER PRIMARY KEY, user_id TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS messages (
    id INTEGER PRIMARY KEY, chat_id INTEGER NOT NULL REFERENCES chats (id), content TEXT NOT NULL,
    is_ai INTEGER NOT NULL, timestamp TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP);
CREATE INDEX IF NOT EXISTS messages_by_chat ON messages (chat_id, id);
"""


class Conventional:
    """All tasks share one connection, as usual: under load a commit often publishes what others
    have written, which is fast, and why it is no model for anything but speed."""

    db: aiosqlite.Connection
    model: AsyncOpenAI

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        import aiosqlite
        from openai import AsyncOpenAI

        path = os.environ["DATABASE_URL"].removeprefix("sqlite:///")
        async with aiosqlite.connect(path) as self.db, AsyncOpenAI() as self.model:
            await self.db.executescript(
                "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;"
                + CONVENTIONAL_SCHEMA
            )
            yield

    async def insert(self, sql: str, *values: object) -> int:
        cursor = await self.db.execute(sql, values)
        await self.db.commit()
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    async def add_message(self, chat_id: int, content: str, is_ai: bool) -> Row:
        sql = "INSERT INTO messages (chat_id, content, is_ai) VALUES (?, ?, ?)"
        message_id = await self.insert(sql, chat_id, content, is_ai)
        return {"id": message_id} | baseline_message(chat_id, content, is_ai)

    async def websocket(self, socket: WebSocket) -> None:
        await socket.accept()
        turns: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)
        async for action in socket.iter_json():
            content, chat_id = action["content"], action.get("chat_id")
            if chat_id is None:
                user_id = socket.path_params["user_id"]
                chat_id = await self.insert(
                    "INSERT INTO chats (user_id) VALUES (?)", user_id
                )
            message = await self.add_message(chat_id, content, False)
            await socket.send_json({"type": "message", "message": message})
            task = asyncio.create_task(
                self.reply(socket, chat_id, content, turns[chat_id])
            )
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def reply(
        self, socket: WebSocket, chat_id: int, content: str, turn: asyncio.Lock
    ) -> None:
        async with turn:  # one reply of a chat at a time
            stream = await self.model.chat.completions.create(
                model="bench",
                messages=[{"role": "user", "content": content}],
                stream=True,
            )
            text = ""
            async for part in stream:
                if piece := part.choices[0].delta.content:
                    text += piece
                    await socket.send_json({"type": "token", "token": piece})
            message = await self.add_message(chat_id, text, True)
            await socket.send_json({"type": "message", "message": message})

    async def history(self, request: Request) -> JSONResponse:
        from starlette.responses import JSONResponse

        chat_id = request.path_params["chat_id"]
        rows = await self.db.execute_fetchall(
            "SELECT id, content, is_ai, timestamp FROM messages"
            " WHERE chat_id = ? ORDER BY id DESC LIMIT 100",
            (chat_id,),
        )
        names = ("id", "content", "is_ai", "timestamp")
        messages = [dict(zip(names, row, strict=True)) for row in reversed(list(rows))]
        return JSONResponse({"id": chat_id, "messages": messages})


def conventional(port: int) -> None:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.routing import Route, WebSocketRoute

    backend = Conventional()
    routes = [
        WebSocketRoute("/ws/{user_id}", backend.websocket),
        Route("/api/chats/{chat_id:int}", backend.history),
    ]
    app = Starlette(routes=routes, lifespan=backend.lifespan)
    uvicorn.run(app, host=HOST, port=port, log_level="warning")


# --- Processes: where each runs, what it costs, and that it ends. ---


def cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


INHERITED = {
    name: os.environ[name]
    for name in ("PATH", "HOME", "SYSTEMROOT")
    if name in os.environ
}
LINUX = Path("/proc/self/schedstat").exists()
SERVER_CORES = cores()[:1] if len(cores()) > 1 else []


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    port: int
    name: str
    shards: Sequence[Server] = ()  # behind this one, which is nginx then

    def cpu_us(self) -> float:
        """CPU time of all threads, as the scheduler counts it (finer than 10 ms ticks)."""
        if not LINUX:
            return math.nan
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()
        return (
            sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)
            / 1000
        )

    def resident_kib(self) -> float:
        if not LINUX:
            return math.nan
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1024


@contextlib.contextmanager
def running(
    name: str,
    command: Sequence[str],
    port: int,
    folder: Path,
    env: Row,
    pin: bool = True,
) -> Iterator[Server]:
    """Start a server, wait until it listens, and end it whatever happens.

    Raises RuntimeError with the end of its output if it does not listen in START_SECONDS.
    """
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=INHERITED | env, stdout=output, stderr=output
        )
    try:
        if pin and SERVER_CORES:
            os.sched_setaffinity(process.pid, SERVER_CORES)
        deadline = time.monotonic() + START_SECONDS
        while not listens(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{name} does not listen: {log.read_text()[-400:]}")
            time.sleep(0.05)
        yield Server(process, port, name)
    finally:
        process.kill()  # what it has stored dies with its folder
        process.wait()


def listens(port: int) -> bool:
    with (
        contextlib.suppress(OSError),
        socket.create_connection((HOST, port), timeout=1),
    ):
        return True
    return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


NGINX_CONF = """
daemon off; master_process off; pid nginx.pid; error_log stderr;
events {{ worker_connections 8192; }}
http {{
    access_log off; client_body_temp_path body; proxy_temp_path proxy;
    fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
    upstream model {{ server {host}:{upstream}; keepalive 64; }}
    server {{
        listen {host}:{port};
        location / {{
            proxy_pass http://model; proxy_http_version 1.1; proxy_set_header Connection "";
            proxy_buffering off;
        }}
    }}
}}
"""


def environment(port: int, model: int, database: Path) -> dict[str, str]:
    """What every server under test is told."""
    return NO_LIMITS | {
        "HOST": HOST, "PORT": str(port), "DATABASE_URL": f"sqlite:///{database}",
        "OPENAI_BASE_URL": f"http://{HOST}:{model}/v1", "OPENAI_API_KEY": "bench",
        "MODEL_NAME": "bench", "LOG_LEVEL": "WARNING",
    }  # fmt: skip


@contextlib.contextmanager
def serving(
    options: argparse.Namespace,
    target: str,
    rate: float,
    tokens: int,
    fill: Callable[[Path], None],
) -> Iterator[tuple[Server, Server]]:
    """A target and its upstream in a new folder, whose database `fill` may prepare."""
    own = [sys.executable, str(Path(__file__).resolve())]
    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.directory) as name:
        folder, port, model = Path(name), free_port(), free_port()
        database = folder / "bench.db"
        fill(database)
        (folder / "nginx.conf").write_text(
            NGINX_CONF.format(host=HOST, port=port, upstream=model)
        )
        commands = {
            "chat_app": [sys.executable, str(options.app.resolve())],
            "conventional": [*own, "conventional-server", str(port)],
            "bare": [*own, "bare-server", str(port), str(model)],
            "nginx": ["nginx", "-p", name, "-c", "nginx.conf"],
        } | {other: shlex.split(command) for other, command in options.also}
        env = environment(port, model, database)
        source = [*own, "upstream-server", str(model), str(rate), str(tokens)]
        with (
            running(
                "upstream", source, model, folder, {}, pin=False
            ) as upstream_server,
            running(target, commands[target], port, folder, env) as server,
        ):
            yield server, upstream_server


NGINX_AROUND = """
{user} daemon off; master_process off; pid nginx.pid; error_log stderr;
events {{ worker_connections 8192; }}
http {{
    access_log off; client_body_temp_path body; proxy_temp_path proxy;
    fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
{configuration}
}}
"""


def shards_conf(ports: Sequence[int], port: int, folder: Path) -> str:
    """deploy/nginx-shards.conf for these shards, without TLS and limits per address."""
    text = (HERE / "deploy" / "nginx-shards.conf").read_text("utf-8")
    homes = [
        *(f"{100 / len(ports):.2f}% {10 + part};" for part in range(len(ports) - 1))
    ]
    homes.append(f"* {9 + len(ports)};")
    places = [f"{10 + part} {HOST}:{each};" for part, each in enumerate(ports)]
    for pattern, new in (
        (r"(?s)(\$home \{).*?\}", rf"\1 {' '.join(homes)} }}"),
        (r" default 127\.0\.0\.1:81\$shard;", " " + " ".join(places)),
        (r" server 127\.0\.0\.1:8110;", f" server {HOST}:{ports[0]};"),
        (r" server 127\.0\.0\.1:81\d\d;", ""),
        (r" +(ssl_certificate|limit_).*\n", ""),
        (r"(?m)^limit_.*\n", ""),
        (r"listen 443 ssl;", f"listen {HOST}:{port};"),
        (r"unix:/run/", f"unix:{folder}/"),
    ):
        text, times = re.subn(pattern, new, text)
        if not times:
            raise RuntimeError(f"deploy/nginx-shards.conf has no {pattern}")
    return NGINX_AROUND.format(
        user="user root root;" * (os.getuid() == 0), configuration=text
    )


@contextlib.contextmanager
def serving_shards(
    options: argparse.Namespace, count: int, rate: float, tokens: int
) -> Iterator[tuple[Server, Server]]:
    """So many shards behind nginx, and their upstream, in a new folder."""
    own = [sys.executable, str(Path(__file__).resolve())]
    with (
        tempfile.TemporaryDirectory(prefix="bench-", dir=options.directory) as name,
        contextlib.ExitStack() as stack,
    ):
        folder, port, model = Path(name), free_port(), free_port()
        source = [*own, "upstream-server", str(model), str(rate), str(tokens)]
        upstream_server = stack.enter_context(
            running("upstream", source, model, folder, {}, pin=False)
        )
        shards: list[Server] = []
        for number in range(10, 10 + count):
            env = environment(free_port(), model, folder / f"{number}.db")
            shard = running(
                f"shard{number}", [sys.executable, str(options.app.resolve())], int(env["PORT"]),
                folder, env | {"SHARD": str(number)},
            )  # fmt: skip
            shards.append(stack.enter_context(shard))
        text = shards_conf([shard.port for shard in shards], port, folder)
        (folder / "nginx.conf").write_text(text)
        front = stack.enter_context(
            running(
                "proxy", ["nginx", "-p", name, "-c", "nginx.conf"], port, folder, {}
            )
        )
        front.shards = shards
        yield front, upstream_server


# --- Measurements: each makes one row of its table. ---


@dataclass
class Sample:
    """Counters at one moment; two of them make a window."""

    at: float
    server_us: float
    front_us: float  # of nginx, where the server is shards behind it
    load_us: float
    tokens: int
    frames: int

    @classmethod
    def take(cls, seen: Seen, server: Server, source: Server) -> Sample:
        load_us = source.cpu_us() + time.process_time() * 1e6
        front_us = server.cpu_us() if server.shards else 0
        server_us = sum(shard.cpu_us() for shard in server.shards or [server])
        return cls(
            time.monotonic(), server_us, front_us, load_us, seen.tokens, seen.frames
        )


async def relay(
    server: Server, source: Server, users: int, rate: float, seconds: float
) -> Row:
    """Stream a reply to each user at the same time, and see what it costs and adds."""
    seen, tokens = Seen(), int(rate * seconds)
    peers = [await connect(server, seen, f"u{user}") for user in range(users)]

    async def whole_reply(peer: Peer, delay: float) -> bool:
        await asyncio.sleep(delay)
        return await peer.say("Stream!", tokens).whole

    replies = [
        asyncio.create_task(whole_reply(peer, random.uniform(0, RAMP_SECONDS)))
        for peer in peers
    ]
    await asyncio.sleep(RAMP_SECONDS + 0.5)
    before = Sample.take(seen, server, source)
    await asyncio.sleep(seconds - RAMP_SECONDS - 0.6)
    after = Sample.take(seen, server, source)
    done, late = await asyncio.wait(replies, timeout=2 * seconds + 10)
    for reply in late:
        reply.cancel()
    for peer in peers:
        peer.transport.abort()
    whole = sum(reply.result() for reply in done)
    got, took = max(1, after.tokens - before.tokens), after.at - before.at
    front = {"nginx_us_per_token": (after.front_us - before.front_us) / got}
    return (front if server.shards else {}) | {
        "offered_per_s": users * rate,
        "cpu_us_per_token": (after.server_us - before.server_us) / got,
        "delivered_per_s": got / took,
        "frames_per_token": (after.frames - before.frames) / got,
        "added_p50_ms": percentile(seen.added_ms, 0.5),
        "added_p99_ms": percentile(seen.added_ms, 0.99),
        "first_p50_ms": percentile(seen.first_ms, 0.5),
        "first_p99_ms": percentile(seen.first_ms, 0.99),
        "incomplete": users - whole,
        "core_percent": (after.server_us - before.server_us) / took / 1e4,
        "load_percent": (after.load_us - before.load_us) / took / 1e4,
    }


async def turns(server: Server, senders: int, seconds: float) -> Row:
    """Turns of one token, each in a chat of its own: echo, request to the model, stored reply."""
    peers = [await connect(server, Seen(), f"t{sender}") for sender in range(senders)]
    end, ended = time.monotonic() + seconds, []

    async def talk(peer: Peer) -> None:
        while time.monotonic() < end:
            async with asyncio.timeout(STEP_SECONDS):
                ended.append(await peer.say("Answer!", 1).whole)

    await asyncio.gather(*(talk(peer) for peer in peers))
    for peer in peers:
        peer.transport.abort()
    return {"turns_per_s": sum(ended) / seconds, "incomplete": len(ended) - sum(ended)}


async def accepted(server: Server, senders: int, seconds: float) -> Row:
    """Messages stored and echoed, apart from the replies to them: the model holds those.

    First HELD_CHATS chats are made, each with a reply that runs; then messages are sent to them,
    which wait: WAITING in each chat. So the service's limits are kept, and reached.
    """
    peers = [await connect(server, Seen(), f"a{sender}") for sender in range(senders)]
    echo_ms = array("d")

    async def say(peer: Peer, chat_id: int | None = None) -> int:
        turn = peer.say(HOLD, chat_id=chat_id)
        async with asyncio.timeout(STEP_SECONDS):
            echo = await turn.echo
        echo_ms.append((now_us() - turn.sent_us) / 1000)
        return int(echo["chat_id"])

    async def open_chats(peer: Peer) -> list[int]:
        return [await say(peer) for _ in range(HELD_CHATS // senders)]

    async def talk(peer: Peer, chats: list[int]) -> None:
        for chat_id in chats * WAITING:
            if time.monotonic() < end:
                await say(peer, chat_id)

    chats = await asyncio.gather(*(open_chats(peer) for peer in peers))
    await asyncio.sleep(1)  # for the requests to the model
    echo_ms, start = array("d"), time.monotonic()
    end = start + seconds
    await asyncio.gather(*map(talk, peers, chats))
    took = time.monotonic() - start
    for peer in peers:
        peer.transport.abort()
    return {
        "accepted_per_s": len(echo_ms) / took,
        "echo_p50_ms": percentile(echo_ms, 0.5),
        "echo_p99_ms": percentile(echo_ms, 0.99),
    }


async def idle(server: Server, count: int) -> Row:
    """Open sockets that do nothing. They offer deflate, as browsers do."""
    seen, doors = Seen(), asyncio.Semaphore(50)
    for _ in range(20):  # what the first connections load is not theirs
        (await connect(server, seen, "warm", deflate=True)).transport.abort()

    async def enter(user: int) -> Peer:
        async with doors:
            return await connect(server, seen, f"i{user}", deflate=True)

    await asyncio.sleep(1)
    before, start = server.resident_kib(), time.monotonic()
    peers = await asyncio.gather(*(enter(user) for user in range(count)))
    took = time.monotonic() - start
    await asyncio.sleep(1)
    grown = server.resident_kib() - before
    still_open = sum(not peer.transport.is_closing() for peer in peers)
    for peer in peers:
        peer.transport.abort()
    return {
        "kib_each": grown / count,
        "connects_per_s": count / took,
        "closed": count - still_open,
    }


def read_history(server: Server, reads: int) -> Row:
    """Time the newest page of the long chat over one kept-alive connection."""
    read_ms = array("d")
    link = http.client.HTTPConnection(HOST, server.port, timeout=STEP_SECONDS)
    with contextlib.closing(link):
        for _ in range(reads):
            start = now_us()
            link.request("GET", "/api/chats/1")
            response = link.getresponse()
            body = response.read()
            read_ms.append((now_us() - start) / 1000)
            if response.status != http.HTTPStatus.OK:
                raise RuntimeError(f"the history was refused: {body[:200]!r}")
    return {
        "page": len(json.loads(body)["messages"]),
        "bytes": len(body),
        "read_p50_ms": percentile(read_ms, 0.5),
        "read_p99_ms": percentile(read_ms, 0.99),
    }


FILL = (
    """INSERT INTO chats (id, user_id, created_at, updated_at)
       VALUES (:chat, :user, :time, :time) ON CONFLICT DO NOTHING""",
    """INSERT INTO messages (id, chat_id, user_id, content, is_ai, timestamp, status, task_id)
       VALUES (:id, :chat, :user, :text, 0, :time, 'complete', :task)""",
    """INSERT INTO messages
           (id, chat_id, user_id, content, is_ai, timestamp, status, task_id, reply_to)
       VALUES (:id + 1, :chat, :user, :text, 1, :time, 'complete', :task, :id)""",
)


def fill_history(schema: str, messages: int, database: Path) -> None:
    """Chat 1 with CHAT_MESSAGES among `messages`, scattered as a busy service scatters them."""
    every = max(1, messages // CHAT_MESSAGES)
    text = (
        "Words of a conversation that has been going on for quite a while already. " * 3
    )
    with contextlib.closing(sqlite3.connect(database)) as db:
        db.executescript(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = OFF;" + schema
        )
        for pair in range(messages // 2):
            chat = pair * 7919 % CHAT_MESSAGES + 2 if pair % every else 1
            row = {
                "id": 2 * pair + 1,
                "chat": chat,
                "user": f"u{chat}",
                "task": str(uuid.uuid4()),
            }
            for sql in FILL:
                db.execute(
                    sql, row | {"text": text, "time": "2026-01-01T00:00:00.000Z"}
                )
        db.commit()


# --- Tables: which rows they have, and ratios to the baselines. ---

BASELINES = ("conventional", "bare", "nginx")
ALL = ("chat_app", *BASELINES)


@dataclass(frozen=True)
class Table:
    title: str
    targets: tuple[str, ...]
    case: str  # the option whose values make the rows of each target
    ratio: str  # the figure that is compared with the baselines'


TABLES = {
    "relay": Table(
        "server CPU per relayed token, and the latency that is added",
        ALL, "users", "cpu_us_per_token",
    ),
    "saturation": Table(
        "ever more users, until one core delivers less than they are sent",
        ALL, "users", "delivered_per_s",
    ),
    "durable": Table(
        "messages stored and echoed; whole turns of one token", ALL[:3], "senders", "accepted_per_s"
    ),
    "connections": Table("sockets that do nothing", ALL[:3], "idle", "kib_each"),
    "shards": Table(
        "so many shards behind nginx: what one core for each would carry, in all",
        ALL[:1], "shards", "carried_per_s",
    ),
    "history": Table(
        f"the newest page of a chat with {CHAT_MESSAGES:,} messages",
        ALL[:2], "messages", "read_p50_ms",
    ),
}  # fmt: skip


def shards_row(options: argparse.Namespace, count: int, tokens: int) -> Row:
    """What so many shards behind nginx cost, each with as many users."""
    users = (options.users or [150])[0] * count
    with (
        serving_shards(options, count, options.rate, tokens) as (front, source),
        asyncio.Runner(loop_factory=new_event_loop) as runner,
    ):
        row = runner.run(relay(front, source, users, options.rate, options.seconds))
    return {
        "users": users,
        "carried_per_s": count * 1e6 / row["cpu_us_per_token"],
    } | row


def measure(options: argparse.Namespace, table: str, target: str, case: int) -> Row:
    """One row's figures, from a server of its own."""
    rate, seconds = options.rate, options.seconds
    tokens = 1 if table == "durable" else int(rate * seconds)
    if table == "shards":
        return shards_row(options, case, tokens)
    fill: Callable[[Path], None] = Path.touch
    if table == "history":
        fill = functools.partial(fill_history, (HERE / "schema.sql").read_text(), case)
    with (
        serving(options, target, rate, tokens, fill) as (server, source),
        asyncio.Runner(loop_factory=new_event_loop) as runner,
    ):
        match table:
            case "relay" | "saturation":
                return runner.run(relay(server, source, case, rate, seconds))
            case "durable":
                row = runner.run(turns(server, case, seconds / 2))
                return runner.run(accepted(server, case, seconds / 2)) | row
            case "connections":
                return runner.run(idle(server, case))
            case _:
                return read_history(server, options.reads)


def rows_of(options: argparse.Namespace, name: str) -> Iterator[Row]:
    """The table's rows. A target that fails is told and left; the others go on."""
    table = TABLES[name]
    others = [other for other, _ in options.also if name not in {"history", "shards"}]
    for target in [*table.targets, *others]:
        if options.target and target not in options.target:
            continue
        if (target == "nginx" or name == "shards") and not shutil.which("nginx"):
            tell("nginx is not installed: left out\n")
            continue
        for case in getattr(options, table.case) or DEFAULT_USERS[name]:
            tell(f"{name}: {target}, {case:,} {table.case}")
            try:
                row = measure(options, name, target, case)
            except (RuntimeError, OSError, TimeoutError) as error:
                tell(f"{name}: {target} failed with {case:,} {table.case}: {error!r}\n")
                options.failed = True
                break
            yield {"target": target, table.case: case} | row
            if (
                name == "saturation"
                and row["delivered_per_s"] < 0.8 * row["offered_per_s"]
            ):
                break  # saturated: more users tell nothing new


def with_ratios(rows: list[Row], table: Table) -> list[Row]:
    """Each row, and its figure divided by that of each baseline in the same case."""
    figures = {(row["target"], row[table.case]): row[table.ratio] for row in rows}
    present = [name for name in BASELINES if any(row["target"] == name for row in rows)]
    for row in rows:
        for name in present:
            figure = figures.get((name, row[table.case]))
            row[f"vs_{name}"] = row[table.ratio] / figure if figure else None
        if table.case == "shards":
            row["vs_one"] = row[table.ratio] / rows[0][table.ratio]
    return [{key: known(value) for key, value in row.items()} for row in rows]


def known(value: object) -> object:
    """None for NaN, which JSON has not: what could not be measured here."""
    return None if isinstance(value, float) and math.isnan(value) else value


def cell(value: object) -> str:
    if not isinstance(value, float):
        return (
            "-"
            if value is None
            else f"{value:,}"
            if isinstance(value, int)
            else str(value)
        )
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def rendered(rows: list[Row]) -> str:
    """The rows as a Markdown table that also reads well on a terminal."""
    lines = [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return "\n".join(
        f"| {' | '.join(map(str.rjust, line, widths))} |" for line in lines
    )


def machine(options: argparse.Namespace) -> Row:
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        cpu = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[0]
    return {
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "machine": f"{cpu}, {os.cpu_count()} cores, {platform.platform()}",
        "python": platform.python_version(),
        "server runs on": f"core {SERVER_CORES[0]} alone"
        if SERVER_CORES
        else "any core",
        "databases in": str(options.directory),
    }


DEFAULT_USERS = {"relay": [10, 150], "saturation": [200, 400, 800]}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def named(text: str) -> list[str]:
        return text.split("=", 1)

    add = parser.add_argument
    add(
        "tables",
        nargs="*",
        metavar="TABLE",
        help=f"of {', '.join(TABLES)}; default: all",
    )
    add("--target", nargs="+", help="which servers; default: all of the table")
    add("--users", nargs="+", type=int, help=f"default: {DEFAULT_USERS}")
    add("--rate", type=float, default=50, help="tokens per second and user")
    add(
        "--seconds",
        type=float,
        default=8,
        help="of streaming; of sending, half of it each",
    )
    add("--senders", nargs="+", type=int, default=[1, 10, 50])
    add("--shards", nargs="+", type=int, default=[1, 2], help="with --users each (150)")
    add("--idle", nargs="+", type=int, default=[1000], help="connections")
    add("--messages", nargs="+", type=int, default=[100_000], help="in the database")
    add("--reads", type=int, default=500, help="of the history")
    add("--app", type=Path, default=HERE / "chat_app.py", help="the service's file")
    add("--also", action="append", type=named, default=[], metavar="NAME=COMMAND")
    add(
        "--directory",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="for databases",
    )
    add("--json", action="store_true")
    options = parser.parse_args(arguments, argparse.Namespace(failed=False))
    if unknown := set(options.tables) - set(TABLES):
        parser.error(f"no such table: {', '.join(sorted(unknown))}")
    if options.seconds < 3 or not 1 <= options.rate <= TICKS_PER_SECOND:
        parser.error(f"--seconds is at least 3, --rate from 1 to {TICKS_PER_SECOND}")
    return options


def serve(kind: str, *numbers: str) -> None:
    """Be one of this file's servers, in a process that `serving` started."""
    if kind == "conventional-server":
        return conventional(int(numbers[0]))
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        if kind == "bare-server":
            return runner.run(bare(int(numbers[0]), int(numbers[1])))
        return runner.run(upstream(int(numbers[0]), float(numbers[1]), int(numbers[2])))


def claim_machine() -> None:
    """Leave the first core to the server, and let each connection have its descriptors."""
    # So that what we started ends too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if not LINUX:
        print(
            "CPU time and memory are read from Linux's /proc: left out.",
            file=sys.stderr,
        )
    if SERVER_CORES:
        os.sched_setaffinity(0, set(cores()) - set(SERVER_CORES))
    with contextlib.suppress(ImportError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main() -> int:
    if sys.argv[1:] and sys.argv[1].endswith("-server"):
        serve(*sys.argv[1:])
        return 0
    options = parse(sys.argv[1:])
    claim_machine()
    about, results = machine(options), {}
    if not options.json:
        print("\n".join(f"{key}: {value}" for key, value in about.items()), flush=True)
    for name in options.tables or TABLES:
        results[name] = with_ratios(list(rows_of(options, name)), TABLES[name])
        tell("")
        if not options.json and results[name]:
            print(
                f"\n{name}: {TABLES[name].title}\n\n{rendered(results[name])}",
                flush=True,
            )
    if options.json:
        print(json.dumps({"machine": about, "tables": results}, indent=2))
    return int(options.failed)


if __name__ == "__main__":
    sys.exit(main())
