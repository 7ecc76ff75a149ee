"""What PROTOCOL.md promises, as tests.

Real parts: uvicorn on a socket, SQLite on a file, the openai client over HTTP to a scripted
upstream. The service runs in a thread of its own (`Service`), or as a process (`Process`) where
it is killed or reads its environment.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Self

import aiohttp
import pytest
import websockets
from websockets.asyncio.client import ClientConnection

import chat_app
from chat_app import Settings

HERE = Path(__file__).parent
LIMIT = 20.0  # seconds that anything may take before a test gives up; never a measure of speed
NAMES = [name.upper() for name in Settings.model_fields]


# --- The parts: a scripted model, the service, its clients, a look into its file ---


class Exchange:
    """One request to the scripted model, and what is answered, byte by byte if need be."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: str, body: Any
    ) -> None:
        self.reader, self.writer = reader, writer
        self.head, self.body = head, body
        self.left = asyncio.Event()  # the service has closed this connection

    async def raw(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def start(self, status: str = "200 OK", *headers: str, kind: str = "text/event-stream") -> None:
        """Send a response head. The body ends when the connection is closed."""
        lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", "Connection: close", *headers]
        await self.raw(("\r\n".join(lines) + "\r\n\r\n").encode())

    async def event(self, data: Any) -> None:
        text = data if isinstance(data, str) else json.dumps(data)
        await self.raw(f"data: {text}\n\n".encode())

    async def say(self, *pieces: str) -> None:
        for piece in pieces:
            await self.event({"model": "scripted-1", "choices": [{"index": 0, "delta": {"content": piece}}]})

    async def finish(self, reason: str = "stop", *, usage: bool = True, done: bool = True) -> None:
        await self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
        if usage:
            await self.event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}})
        if done:
            await self.event("[DONE]")

    async def answer(self, *pieces: str) -> None:
        """Answer as a model does when nothing is wrong."""
        await self.start()
        await self.say(*pieces)
        await self.finish()

    async def problem(self, status: str, body: str = '{"error": {"message": "no"}}', *headers: str) -> None:
        """Answer with an HTTP error."""
        await self.start(status, f"Content-Length: {len(body.encode())}", *headers, kind="application/json")
        await self.raw(body.encode())


Script = Callable[[Exchange], Awaitable[None]]


class Upstream:
    """A scripted model server on a real socket.

    `scripts` are used one per request; when they are used up, `otherwise` answers. A script
    that returns has its connection closed.
    """

    def __init__(self) -> None:
        self.scripts: list[Script] = []
        self.exchanges: list[Exchange] = []
        self.url = ""
        self._arrived = asyncio.Condition()

    async def otherwise(self, exchange: Exchange) -> None:
        await exchange.answer("Hello", ", ", "world")

    @property
    def prompts(self) -> list[list[dict[str, str]]]:
        return [exchange.body["messages"] for exchange in self.exchanges]

    async def exchange(self, number: int = 0) -> Exchange:
        """Wait for the request with that number."""
        async with asyncio.timeout(LIMIT), self._arrived:
            await self._arrived.wait_for(lambda: len(self.exchanges) > number)
        return self.exchanges[number]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = int(head.lower().partition("content-length:")[2].split("\r\n")[0] or 0)
            body = json.loads(await reader.readexactly(length) or b"null")
            exchange = Exchange(reader, writer, head, body)
            watch = asyncio.create_task(self._watch(exchange))
            async with self._arrived:
                self.exchanges.append(exchange)
                self._arrived.notify_all()
            try:
                await (self.scripts.pop(0) if self.scripts else self.otherwise)(exchange)
            finally:
                watch.cancel()
        writer.close()

    async def _watch(self, exchange: Exchange) -> None:
        with contextlib.suppress(ConnectionError):
            await exchange.reader.read(1)
        exchange.left.set()


class Client:
    """One WebSocket of a user. Every frame received is kept in `frames`."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.frames: list[dict[str, Any]] = []

    async def send(self, action: str, **fields: Any) -> None:
        await self.socket.send(json.dumps({"action": action, **fields}))

    async def get(self) -> dict[str, Any]:
        """Return the next frame."""
        async with asyncio.timeout(LIMIT):
            text = await self.socket.recv()
        self.frames.append(json.loads(text))
        return self.frames[-1]

    async def until(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Read on until a frame of that type with those fields."""
        while True:
            frame = await self.get()
            if frame["type"] == kind and all(frame.get(k) == v for k, v in fields.items()):
                return frame

    async def say(self, content: str, **fields: Any) -> dict[str, Any]:
        """Send a message and return it as echoed."""
        await self.send("send_message", content=content, **fields)
        while True:
            message = (await self.until("message"))["message"]
            if not message["is_ai"] and message["content"] == content:
                return message

    async def reply(self) -> dict[str, Any]:
        """Read on until a reply's `message`."""
        while True:
            message = (await self.until("message"))["message"]
            if message["is_ai"]:
                return message

    async def refusal(self) -> dict[str, Any]:
        return await self.until("error")

    async def closed(self) -> int:
        """Read until the connection is closed and return the close code."""
        with contextlib.suppress(websockets.ConnectionClosed):
            while True:
                await self.get()
        assert self.socket.close_code is not None
        return self.socket.close_code


class Answer:
    """A whole HTTP response."""

    def __init__(self, response: aiohttp.ClientResponse, body: bytes) -> None:
        self.status, self.headers, self.body = response.status, response.headers, body

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Peer:
    """What tests talk to: an address, and ways to talk to it."""

    address: str
    database: Path

    @contextlib.asynccontextmanager
    async def connect(self, user: str = "alice", **options: Any) -> AsyncIterator[Client]:
        url = self.address.replace("http", "ws", 1) + f"/ws/{user}"
        async with websockets.connect(url, max_size=None, ping_interval=None, **options) as socket:
            yield Client(socket)

    async def http(self, method: str, path: str, body: Any = None, **options: Any) -> Answer:
        """Make one request; `body` is sent as JSON unless it is bytes."""
        headers = dict(options.pop("headers", {}))
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers.setdefault("Content-Type", "application/json")
        timeout = aiohttp.ClientTimeout(LIMIT)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.request(method, self.address + path, data=body, headers=headers, **options) as response,
        ):
            return Answer(response, await response.read())

    async def new_chat(self, user: str = "alice", title: str = "") -> int:
        answer = await self.http("POST", "/api/chats", {"user_id": user, "title": title})
        assert answer.status == 201, answer.body
        return int(answer.json["id"])

    def stored(self, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Read the file as an outsider does."""
        with contextlib.closing(sqlite3.connect(self.database)) as db:
            return db.execute(sql, parameters).fetchall()


class Service(Peer):
    """The service in a thread of this process, with its own event loop, on a real socket."""

    def __init__(self, settings: Settings) -> None:
        self.server, self._listener = chat_app.make_server(settings)
        self.address = self.server.app.state.address
        self.database = settings.database
        self._thread = threading.Thread(target=self.server.run, args=([self._listener],))

    async def __aenter__(self) -> Self:
        self._thread.start()
        async with asyncio.timeout(LIMIT):
            while not self.server.started:
                await asyncio.sleep(0.01)
                assert self._thread.is_alive()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Shut down as a signal does."""
        self.server.should_exit = True
        await asyncio.to_thread(self._thread.join)


class Process(Peer):
    """The service as its users start it: `python chat_app.py` with an environment."""

    def __init__(self, folder: Path, **environment: Any) -> None:
        self.folder = folder
        self.database = folder / "chat.db"
        known = {name: text for name, text in os.environ.items() if name not in NAMES}
        settings = {"PORT": "0", **{name: str(value) for name, value in environment.items()}}
        self.environment = known | settings
        self.process: asyncio.subprocess.Process
        self.banner: list[str] = []

    async def start(self, *arguments: str) -> Self:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, str(HERE / "chat_app.py"), *arguments,
            cwd=self.folder, env=self.environment,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        return self

    async def __aenter__(self) -> Self:
        await self.start()
        assert self.process.stdout is not None
        async with asyncio.timeout(LIMIT):
            first = (await self.process.stdout.readline()).decode()
        assert "listens on" in first, first + (await self.process.communicate())[1].decode()
        self.address = first.split()[-1]
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.communicate()

    async def ended(self) -> tuple[int, str, str]:
        """Wait for the end; return the exit status and what was printed on both streams."""
        async with asyncio.timeout(LIMIT):
            out, err = await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode, out.decode(), err.decode()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the developer's own settings out of the tests."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    model = Upstream()
    async with await asyncio.start_server(model._serve, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        model.url = f"http://{host}:{port}/v1"
        yield model
        server.close()


@pytest.fixture
def settings(tmp_path: Path, upstream: Upstream) -> Callable[..., Settings]:
    """Make settings for a service on a new file and the scripted model."""

    def make(**changes: Any) -> Settings:
        defaults = {
            "database_url": f"sqlite:///{tmp_path / 'chat.db'}",
            "port": 0,
            "openai_base_url": upstream.url,
            "openai_api_key": "sk-secret-of-the-test",
            "model_name": "scripted",
            "drain_seconds": 0,
        }
        return Settings(**(defaults | changes))

    return make


@pytest.fixture
async def service(settings: Callable[..., Settings]) -> AsyncIterator[Service]:
    async with Service(settings()) as running:
        yield running


# --- The conversation ---


async def test_a_client_that_knows_only_the_starred_rows(service: Service) -> None:
    """The mission's own frames and endpoints work unchanged."""
    chat_id = await service.new_chat()
    async with service.connect() as client:
        await client.send("send_message", chat_id=chat_id, content="Your message here")
        echo = await client.until("message")
        assert {"id", "content", "is_ai", "timestamp"} <= echo["message"].keys()
        reply = await client.reply()
        tokens = [frame["token"] for frame in client.frames if frame["type"] == "token"]
        assert "".join(tokens) == reply["content"] == "Hello, world"
    answer = await service.http("GET", f"/api/chats/{chat_id}")
    assert [m["content"] for m in answer.json["messages"]] == ["Your message here", "Hello, world"]
