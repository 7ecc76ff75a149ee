"""What issue 11 found in the database, the search and the start of the service, as tests.

To be appended to test_chat_app.py: `pytest_plugins` and the imports of its own names go then.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import re
import shutil
import signal
import socket
import sqlite3
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import aiohttp
import pytest
from websockets.frames import Frame, Opcode

from test_chat_app import (
    LIMIT,
    SECRET,
    Client,
    Exchange,
    Held,
    Make,
    Peer,
    Process,
    Script,
    Service,
    Upstream,
    caught_up,
    connections,
    found,
    messages,
    only_linux,
    peak_megabytes,
    post,
    says,
    text_of,
    token,
    until,
)

if sys.platform != "win32":
    import fcntl

pytest_plugins = ["test_chat_app"]


# --- Files of version 1.0.0 ---

SCHEMA_1_0_0 = """
CREATE TABLE chats (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    user_id    TEXT NOT NULL,
    title      TEXT NOT NULL DEFAULT '',
    created_at TEXT NOT NULL,
    updated_at TEXT NOT NULL
) STRICT;
CREATE INDEX chats_by_activity ON chats (user_id, updated_at, id);
CREATE TABLE messages (
    id                INTEGER PRIMARY KEY AUTOINCREMENT,
    chat_id           INTEGER NOT NULL REFERENCES chats (id) ON DELETE CASCADE,
    user_id           TEXT NOT NULL,
    content           TEXT NOT NULL,
    is_ai             INTEGER NOT NULL CHECK (is_ai IN (0, 1)),
    timestamp         TEXT NOT NULL,
    status            TEXT NOT NULL
                      CHECK (status IN ('complete', 'streaming', 'aborted', 'failed',
                                        'interrupted')),
    task_id           TEXT NOT NULL CHECK (length(task_id) = 36),
    reply_to          INTEGER REFERENCES messages (id) ON DELETE CASCADE,
    finish_reason     TEXT,
    client_msg_id     TEXT,
    model             TEXT,
    prompt_tokens     INTEGER,
    completion_tokens INTEGER,
    CHECK (is_ai = (reply_to IS NOT NULL)),
    CHECK (is_ai OR status = 'complete'),
    CHECK (client_msg_id IS NULL OR NOT is_ai)
) STRICT;
CREATE INDEX messages_by_chat ON messages (chat_id, id);
CREATE UNIQUE INDEX replies_by_task ON messages (task_id) WHERE is_ai;
CREATE INDEX replies_by_message ON messages (reply_to) WHERE reply_to IS NOT NULL;
CREATE INDEX streaming ON messages (status, chat_id) WHERE status = 'streaming';
CREATE TABLE sends (
    user_id       TEXT NOT NULL,
    client_msg_id TEXT NOT NULL,
    message_id    INTEGER NOT NULL,
    PRIMARY KEY (user_id, client_msg_id)
) STRICT, WITHOUT ROWID;
CREATE VIEW searchable AS
    SELECT id, content, 'u' || hex(user_id) AS owner FROM messages;
CREATE VIRTUAL TABLE search USING fts5 (
    content, owner, content = 'searchable', content_rowid = 'id',
    tokenize = 'unicode61 remove_diacritics 2'
);
CREATE TRIGGER message_sent AFTER INSERT ON messages WHEN new.status <> 'streaming' BEGIN
    INSERT INTO search (rowid, content, owner)
    VALUES (new.id, new.content, 'u' || hex(new.user_id));
END;
CREATE TRIGGER reply_settled AFTER UPDATE OF status ON messages
WHEN old.status = 'streaming' AND new.status <> 'streaming' BEGIN
    INSERT INTO search (rowid, content, owner)
    VALUES (new.id, new.content, 'u' || hex(new.user_id));
END;
CREATE TRIGGER message_deleted AFTER DELETE ON messages WHEN old.status <> 'streaming' BEGIN
    INSERT INTO search (search, rowid, content, owner)
    VALUES ('delete', old.id, old.content, 'u' || hex(old.user_id));
END;
PRAGMA user_version = 1;
"""
WHEN = "2026-01-01T00:00:00.000Z"
Talk = tuple[str, Iterable[str]]  # a user, and the texts of a chat: a message, its reply, …


def write_old_file(database: Path, *talks: Talk) -> None:
    """Make a file as version 1.0.0 left it, with one chat (1, 2, …) for each of `talks`."""
    insert = """INSERT INTO messages (id, chat_id, user_id, content, is_ai, timestamp, status,
                task_id, reply_to) VALUES (?, ?, ?, ?, ?, ?, 'complete', ?, ?)"""
    tables, separator, triggers = SCHEMA_1_0_0.partition("CREATE TRIGGER")
    with contextlib.closing(sqlite3.connect(database)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript(tables)
        last = 0
        for chat_id, (user, texts) in enumerate(talks, 1):
            db.execute("INSERT INTO chats VALUES (?, ?, 'old', ?, ?)", (chat_id, user, WHEN, WHEN))
            rows: list[tuple[Any, ...]] = []
            for number, text in enumerate(texts):
                last += 1
                is_ai = number % 2
                task_id = str(uuid.UUID(int=last - is_ai))
                asked = last - 1 if is_ai else None
                rows.append((last, chat_id, user, text, is_ai, WHEN, task_id, asked))
            db.executemany(insert, rows)
        db.execute("INSERT INTO search (search) VALUES ('rebuild')")  # what the triggers would do
        db.commit()
        db.executescript(separator + triggers)


class Patient(Process):
    """A service that may take long to start: it has a large file to bring to its version."""

    async def __aenter__(self) -> Self:
        await self.start()
        assert self.process.stdout is not None
        async with asyncio.timeout(10 * LIMIT):
            first = (await self.process.stdout.readline()).decode()
        assert "listens on" in first, first + (await self.process.communicate())[1].decode()
        self.address = first.split()[-1]
        return self


@pytest.fixture
def patient(tmp_path: Path, upstream: Upstream) -> Callable[..., Patient]:
    """Make a patient process on the file in `tmp_path` and the scripted model."""

    def make(**changes: Any) -> Patient:
        usual = {"OPENAI_BASE_URL": upstream.url, "MESSAGES_PER_MINUTE": 0, "DRAIN_SECONDS": 0}
        return Patient(tmp_path, **(usual | changes))

    return make


def wal_megabytes(service: Peer) -> float:
    return service.database.with_name(f"{service.database.name}-wal").stat().st_size / 2**20


async def within(seconds: float, condition: Callable[[], bool]) -> None:
    """Wait until that is so; TimeoutError after `seconds`."""
    ends = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > ends:
            raise TimeoutError
        await asyncio.sleep(0.05)


async def worst_turn(client: Client, chat_id: int, until_done: Callable[[], bool]) -> float:
    """Send messages one after the other until that is so; return the longest whole turn."""
    worst = 0.0
    number = 0
    while number < 10 or not until_done():
        number += 1
        start = time.monotonic()
        message = await client.say(f"message {number}", chat_id=chat_id)
        while (await client.reply())["task_id"] != message["task_id"]:
            pass
        worst = max(worst, time.monotonic() - start)
    return worst


# --- Tokens that expire ---


async def test_nothing_is_done_after_a_token_has_expired(
    settings: Make, upstream: Upstream
) -> None:
    """Who may do what: nothing that a socket sends after `exp` is done, also while so much waits
    for it that the close can't be sent."""
    upstream.scripts = [says("x" * 90_000)] * 30
    changes = {"jwt_secret": SECRET, "messages_per_minute": 0, "slow_reader_seconds": 12}
    loop = asyncio.get_running_loop()
    async with Service(settings(**changes)) as service:
        headers = {"Authorization": f"Bearer {token()}"}
        async with service.connect(additional_headers=headers) as client:
            expires = int(time.time()) + 6
            short = {"Authorization": f"Bearer {token(exp=expires)}"}
            with stall_with(service.address, short) as stalled:
                for _ in range(30):
                    await client.say("at length")
                    await client.reply()
                await asyncio.sleep(expires + 1 - time.time())
                for number in range(12):
                    frame = {"action": "send_message", "content": f"late {number}"}
                    data = Frame(Opcode.TEXT, json.dumps(frame).encode())
                    with contextlib.suppress(OSError, TimeoutError):
                        wire = data.serialize(mask=True)
                        await asyncio.wait_for(loop.sock_sendall(stalled, wire), LIMIT)

                async def dropped() -> bool:
                    return await connections(service) == 1

                await until(dropped)  # so all that it sent has been taken or thrown away
            await caught_up(client)
        late = service.stored("SELECT count(*) FROM messages WHERE content LIKE 'late %'")
        assert late == [(0,)]


def stall_with(address: str, headers: dict[str, str]) -> socket.socket:
    """Open a WebSocket of Alice's with those headers; it reads nothing after its handshake."""
    host, port = address.removeprefix("http://").split(":")
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    reader.settimeout(LIMIT)
    reader.connect((host, int(port)))
    lines = [
        "GET /ws/alice HTTP/1.1", f"Host: {host}:{port}", "Upgrade: websocket",
        "Connection: Upgrade", "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]  # fmt: skip
    reader.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
    received = b""
    while b"\r\n\r\n" not in received:
        received += reader.recv(1)
    assert received.startswith(b"HTTP/1.1 101 ")
    reader.setblocking(False)
    return reader


# --- Long histories ---


@pytest.mark.timeout(300)
async def test_a_page_of_history_is_bounded(patient: Callable[..., Patient]) -> None:
    """At most 2 million characters a page, one message at least, and the pages are all of it."""
    service = patient()
    texts = ["z" * 2_100_000, *(f"{number} " + "y" * 60_000 for number in range(99))]
    write_old_file(service.database, ("alice", texts))
    async with service:
        path = "/api/chats/1?limit=1000"
        ids: list[int] = []
        while True:
            before = f"&before={ids[0]}" if ids else ""
            chat = (await service.http("GET", path + before)).json
            sizes = [len(message["content"]) for message in chat["messages"]]
            assert len(sizes) == 1 or sum(sizes) <= 2_000_000
            ids[:0] = [message["id"] for message in chat["messages"]]
            if not chat["has_more"]:
                break
        assert ids == list(range(1, 101))


@only_linux
@pytest.mark.timeout(300)
async def test_pages_that_nobody_reads_are_bounded(patient: Callable[..., Patient]) -> None:
    """Promise 7: memory per connection is bounded, whatever it leaves unread."""
    service = patient()
    write_old_file(service.database, ("alice", ("y" * 60_000 for _ in range(400))))
    async with service:
        await service.http("GET", "/api/chats/1?limit=10")
        before = peak_megabytes(service)
        host, port = service.address.removeprefix("http://").split(":")
        with contextlib.ExitStack() as stack:
            for _ in range(12):
                reader = stack.enter_context(socket.socket())
                reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                reader.settimeout(LIMIT)
                reader.connect((host, int(port)))
                head = f"GET /api/chats/1?limit=1000 HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n"
                reader.sendall(head.encode())
                assert await asyncio.to_thread(reader.recv, 9) == b"HTTP/1.1 "
            assert (await service.http("GET", "/health")).status == 200
            assert peak_megabytes(service) - before < 150


# --- Search ---

SCRIPTS = [
    ("light", "Two lighthouses in the fog", True),
    ("LIGHT fo", "Two lighthouses in the fog", True),
    ("houses", "Two lighthouses in the fog", False),
    ("fog sea", "Two lighthouses in the fog", False),
    ("数据库", "我们把数据库搬到了新的服务器", True),
    ("数", "我们把数据库搬到了新的服务器", True),
    ("据库", "我们把数据库搬到了新的服务器", True),
    ("库数", "我们把数据库搬到了新的服务器", False),
    ("数据 服务", "我们把数据库搬到了新的服务器", True),
    ("sqlite", "使用SQLite数据库存储", True),
    ("lighth 数据", "The lighthouses' 数据库", True),
    ("🎉", "It is done 🎉", True),
    ("🎉", "party🎉time", True),
    ("👩‍💻", "a 👩‍💻 at work", True),
    ("🎉", "It is done 🎈", False),
    ("ข้าวผัด", "ฉันชอบกินข้าวผัดมาก", True),
    ("ผัด", "ฉันชอบกินข้าวผัดมาก", True),
    ("図書館", "昨日は図書館で本を読みました", True),
    ("ベース", "このデータベースは速い", True),
    ("データ", "このデータベースは速い", True),
    ("ខ្មែរ", "ខ្ញុំរៀនភាសាខ្មែរ", True),
    ("데이터", "데이터베이스를 옮겼다", True),
]


@pytest.mark.parametrize(("words", "text", "is_found"), SCRIPTS)
async def test_search_knows_the_beginnings_of_words_and_scripts_without_blanks(
    service: Service, words: str, text: str, is_found: bool
) -> None:
    """Each word is the beginning of a word, or any part of text in scripts without blanks and of
    emoji. Nobody else finds it."""
    await post(service, await service.new_chat(), text)
    assert await found(service, words) == [text] * is_found
    assert await found(service, words, user="bob") == []


async def test_search_shows_the_newest_first(service: Service) -> None:
    """However much better an older message fits."""
    chat_id = await service.new_chat()
    texts = ["sea sea sea", "once upon a time there was the sea, and it was wide", "sea sea"]
    for text in texts:
        await post(service, chat_id, text)
    assert await found(service, "sea") == texts[::-1]
    assert await found(service, "sea", more="&limit=1") == texts[-1:]


async def test_a_word_counts_once_in_a_search(service: Service) -> None:
    """At most 10 words are looked for, each once."""
    text = "the one two three four five six seven eight nine"
    await post(service, await service.new_chat(), text)
    assert await found(service, "the " * 250) == [text]
    assert await found(service, f"{text} " * 20) == [text]
    more = quote(" ".join(f"word{number}" for number in range(250)))
    answer = await service.http("GET", f"/api/users/alice/search?q={more}")
    assert answer.status in {200, 422}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file of 100,000 messages of 20 words, all of Alice's, brought to this version."""
    folder = tmp_path_factory.mktemp("large")
    words = ["the", "tide", "than", "that", *(f"word{number}" for number in range(200))]
    texts = (
        "the tide than that " + " ".join(words[4 + (7 * n + 13 * i) % 200] for i in range(16))
        for n in range(100_000)
    )
    write_old_file(folder / "chat.db", ("alice", texts))

    async def migrate() -> None:
        async with Patient(folder) as service:
            service.process.send_signal(signal.SIGTERM)
            await service.process.wait()

    asyncio.run(migrate())
    yield folder / "chat.db"
    shutil.rmtree(folder)


HEAVY = ["the " * 250, "t", "the tide than that word", "the tide than that w wo wor word t th"]


@only_linux
@pytest.mark.timeout(400)
async def test_heavy_searches_are_nobodys_slowness(
    patient: Callable[..., Patient], large: Path
) -> None:
    """Four at once: another user's messages go on, /health too, and the WAL is kept small."""
    service = patient()
    shutil.copy(large, service.database)
    async with service, service.connect("bob") as bob, aiohttp.ClientSession() as session:
        chat_id = await service.new_chat("bob")
        quiet = await worst_turn(bob, chat_id, lambda: True)
        statuses: list[int] = []

        async def search(words: str) -> None:
            url = f"{service.address}/api/users/alice/search"
            for _ in range(3):
                limit = aiohttp.ClientTimeout(5 * LIMIT)
                async with session.get(url, params={"q": words}, timeout=limit) as answer:
                    await answer.read()
                    statuses.append(answer.status)

        health: list[int] = []

        async def look(done: Callable[[], bool]) -> None:
            while not done():
                health.append((await service.http("GET", "/health")).status)

        searches = asyncio.gather(*(search(words) for words in HEAVY))
        looking = asyncio.create_task(look(searches.done))
        worst = await worst_turn(bob, chat_id, searches.done)
        await searches
        await looking
        assert set(statuses) <= {200, 503}
        assert set(health) == {200}
        assert worst < quiet + 2, (worst, quiet)
        assert wal_megabytes(service) < 16


@pytest.mark.timeout(400)
async def test_a_search_has_its_time(patient: Callable[..., Patient], large: Path) -> None:
    """One that takes longer is answered with 503 and a Retry-After, and leaves nothing behind."""
    service = patient()
    shutil.copy(large, service.database)
    service.constants = """
names = [n for n in vars(chat_app) if "SEARCH" in n and "SECONDS" in n]
assert names, "no constant for the time of a search"
for name in names: setattr(chat_app, name, 0.001)
"""
    async with service:
        answer = await service.http("GET", "/api/users/alice/search?q=the+tide+than&limit=100")
        assert (answer.status, answer.json["code"]) == (503, "overloaded")
        assert int(answer.headers["Retry-After"]) >= 1
        assert (await post(service, await service.new_chat("bob")))["status"] == "complete"
        assert (await service.http("GET", "/health")).status == 200


# --- What is deleted ---


@pytest.mark.parametrize("way", ["the chat", "the user"])
async def test_deleted_words_leave_the_index_and_the_file(
    process: Callable[..., Process], upstream: Upstream, way: str
) -> None:
    """DELETE: the words of what was deleted can't be read out of the file either, once the service
    has settled; also those of a title, of a reply, and of a running reply's checkpoints."""
    words = {what: f"zq{uuid.uuid4().hex}" for what in ("title", "message", "reply")}
    upstream.scripts = [says(words["reply"][:9], words["reply"][9:], " is a word")]
    async with process() as service:
        other = await service.new_chat("bob")
        chat_id = await service.new_chat(title=words["title"])
        await post(service, chat_id, f"What is {words['message']}?")
        await post(service, other, "stays")
        path = f"/api/chats/{chat_id}" if way == "the chat" else "/api/users/alice"
        assert (await service.http("DELETE", path)).status == 204
        for word in words.values():
            assert await found(service, word) == []

        def is_gone() -> bool:
            files = service.database.parent.glob("chat.db*")
            data = b"".join(file.read_bytes() for file in files)
            return not any(word[12:].encode() in data for word in words.values())

        await within(2 * LIMIT, is_gone)
        assert await found(service, "stays", user="bob") == ["stays"]


MANY = 150_000  # messages of a chat that is deleted
SLOW_SLICES = """
for name, value in {"SLICE_ROWS": 100, "PURGE_SECONDS": 0.1}.items():
    assert hasattr(chat_app, name), name
    setattr(chat_app, name, value)
"""


def left_of(service: Peer, chat_id: int) -> int:
    return int(service.stored("SELECT count(*) FROM messages WHERE chat_id = ?", chat_id)[0][0])


async def is_hidden(service: Peer, chat_id: int) -> None:
    """Assert that nobody can see anything of a chat of Alice's, the only one that she has."""
    path = f"/api/chats/{chat_id}"
    assert (await service.http("GET", path)).status == 404
    assert (await service.http("POST", f"{path}/abort")).status == 404
    assert (await service.http("PATCH", path, {"title": "Back"})).status == 404
    assert (await service.http("DELETE", path)).status == 404
    assert (await service.http("POST", f"{path}/messages", {"content": "Hi"})).status == 404
    assert (await service.http("GET", "/api/users/alice/chats")).json == []
    assert await found(service, "lighthouse") == []
    async with service.connect() as client:
        await client.send("send_message", chat_id=chat_id, content="Hi")
        assert (await client.refusal())["code"] == "chat_not_found"
    async with aiohttp.ClientSession() as session:
        url = f"{service.address}/api/users/alice/export"
        async with session.get(url) as answer:
            assert (answer.status, await answer.read()) == (200, b"")


@pytest.fixture
def crowded(patient: Callable[..., Patient]) -> Patient:
    """A service with a chat of very many messages of Alice's (1), and one of Bob's (2)."""
    service = patient()
    long = (f"The lighthouse number {number} stands in the sea " * 4 for number in range(MANY))
    write_old_file(service.database, ("alice", long), ("bob", ["stays"]))
    return service


@pytest.mark.timeout(400)
async def test_a_large_chat_is_deleted_beside_the_others(crowded: Patient) -> None:
    """It is gone at once for all who look; on the disk it goes in slices that hold nobody up."""
    async with crowded as service, service.connect("bob") as bob, service.connect() as alice:
        quiet = await worst_turn(bob, 2, lambda: True)
        deleting = asyncio.create_task(service.http("DELETE", "/api/chats/1"))
        ends = time.monotonic() + 5 * LIMIT
        worst = await worst_turn(
            bob, 2, lambda: deleting.done() and (not left_of(service, 1) or time.monotonic() > ends)
        )
        assert (await deleting).status == 204
        assert left_of(service, 1) == 0
        print(f"longest turn: {worst:.2f} s, otherwise {quiet:.2f}")
        assert worst < quiet + 1, (worst, quiet)
        await alice.until("chat_deleted", chat_id=1)
        await is_hidden(service, 1)


@pytest.mark.timeout(400)
async def test_a_deletion_goes_on_after_a_crash(crowded: Patient, patient: Any) -> None:
    """Killed between two slices, it is finished after the restart, and nothing else is lost."""
    crowded.constants = SLOW_SLICES
    async with crowded as service, service.connect("bob") as bob:
        assert (await service.http("DELETE", "/api/chats/1")).status == 204
        await is_hidden(service, 1)
        await within(LIMIT, lambda: left_of(service, 1) < MANY)
        message = await bob.say("echoed", chat_id=2)
        service.process.kill()
        await service.process.wait()
        assert 0 < left_of(service, 1) < MANY
    async with patient() as service:
        await is_hidden(service, 1)
        await within(5 * LIMIT, lambda: not left_of(service, 1))
        texts = {each["id"]: each["content"] for each in await messages(service, 2)}
        assert texts[MANY + 1] == "stays"
        assert texts[message["id"]] == "echoed"
        assert await found(service, "stays", user="bob") == ["stays"]
        assert service.stored("PRAGMA integrity_check") == [("ok",)]
        assert service.stored("PRAGMA foreign_key_check") == []


# --- Checkpoints of running replies ---


def trickling(text: str, counts: list[int]) -> Script:
    """A model that says `text` and then a number every fifth of a second, for ever."""

    async def script(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.say(text)
        number = 0
        while not exchange.left.is_set():
            number += 1
            await exchange.say(f" {number}")
            counts[0] += 1
            await asyncio.sleep(0.2)

    return script


def written_megabytes(service: Process) -> float:
    """Return what the process has written to files (and pipes, which is little), ever."""
    io = Path(f"/proc/{service.process.pid}/io").read_text()
    return int(io.partition("wchar:")[2].split()[0]) / 2**20


def has_grown(counts: list[int], size: int) -> bool:
    return counts[0] >= size


@only_linux
@pytest.mark.timeout(200)
async def test_the_cost_of_a_checkpoint_goes_with_the_new_text(
    process: Callable[..., Process], upstream: Upstream
) -> None:
    """200 replies of 60,000 characters that go on slowly cost next to nothing to keep."""
    counts = [0]
    upstream.scripts = [trickling("x" * 60_000, counts)] * 200
    async with process() as service:
        async with service.connect() as client:
            tasks = set()
            for _ in range(200):
                tasks.add((await client.say("at length"))["task_id"])
            heard = {f["task_id"] for f in client.frames if f["type"] == "token"}
            while heard != tasks:
                heard.add((await client.until("token"))["task_id"])
        lowest = float("inf")
        for _ in range(20):
            said, written = counts[0], written_megabytes(service)
            await within(
                LIMIT, functools.partial(has_grown, counts, said + 400)
            )  # two new pieces of each
            lowest = min(lowest, written_megabytes(service) - written)
        assert lowest < 3


@pytest.mark.timeout(200)
async def test_after_a_crash_the_text_is_joined(
    process: Callable[..., Process], upstream: Upstream
) -> None:
    """Promise 6: all but the last second's (another one is for the machine), a prefix of what was
    shown, with nothing left over in the table of new text."""
    upstream.scripts = [trickling("x" * 30_000, [0])] * 20
    seen: dict[str, list[tuple[float, int]]] = {}
    async with process() as service, service.connect() as client:
        for _ in range(20):
            seen[(await client.say("at length"))["task_id"]] = []
        lengths = dict.fromkeys(seen, 0)
        lengths |= {task: len(text_of(client, task)) for task in seen}
        ends = time.monotonic() + 5
        while time.monotonic() < ends:
            frame = await client.until("token")
            lengths[frame["task_id"]] += len(frame["token"])
            seen[frame["task_id"]].append((time.monotonic(), lengths[frame["task_id"]]))
        service.process.kill()
        killed = time.monotonic()
        await service.process.wait()
    async with process() as service:
        for task_id, marks in seen.items():
            sql = "SELECT status, content FROM messages WHERE task_id = ? AND is_ai"
            [(status, text)] = service.stored(sql, task_id)
            assert status == "interrupted"
            whole = "x" * 30_000 + "".join(f" {number}" for number in range(1, 1000))
            assert whole.startswith(text)
            assert len(text) >= max(length for at, length in marks if at < killed - 2)
        if service.stored("SELECT name FROM sqlite_master WHERE name = 'pieces'"):
            assert service.stored("SELECT count(*) FROM pieces") == [(0,)]


# --- One file, one service ---


@only_linux
async def test_the_lock_is_on_a_file_beside_the_database(process: Callable[..., Process]) -> None:
    """Where flock and SQLite's own locks share a table (macOS, NFS), a lock on the file itself
    would keep SQLite out."""
    service = process()
    service.constants = "chat_app.OWNER_SECONDS = 0.5"
    with service.database.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        async with service:
            assert service.database.with_name("chat.db.lock").exists()
            second = process()
            second.constants = service.constants
            await second.start()
            status, out, err = await second.ended()
            assert (status, out, err.count("\n")) == (2, "", 1)
            assert err.startswith("chat_app: DATABASE_URL: ")
            assert (await service.http("GET", "/health")).status == 200


@only_linux
@pytest.mark.parametrize("what", ["removed", "replaced"])
async def test_a_database_that_is_no_longer_there_is_told(
    process: Callable[..., Process], what: str
) -> None:
    """GET /health: 503 where the file is not the one that was opened: all would be lost at the
    next start."""
    async with process() as service:
        assert (await service.http("GET", "/health")).status == 200
        copy = service.database.with_name("other.db")
        shutil.copy(service.database, copy)
        if what == "removed":
            service.database.unlink()
        else:
            copy.replace(service.database)

        async def is_ill() -> bool:
            return (await service.http("GET", "/health")).status == 503

        await until(is_ill)


async def test_the_file_alone_has_the_tables(process: Callable[..., Process]) -> None:
    """A copy of chat.db without its WAL, made right after the first start, is a database."""
    async with process() as service:
        copy = service.database.with_name("copy.db")
        shutil.copy(service.database, copy)
        with contextlib.closing(sqlite3.connect(copy)) as db:
            names = {row[0] for row in db.execute("SELECT name FROM sqlite_master")}
        assert {"chats", "messages"} <= names


async def test_a_backup_is_made_beside_the_running_service(process: Callable[..., Process]) -> None:
    """`chat_app.py backup FILE`: one whole file that a service starts with."""
    async with process() as service:
        chat_id = await service.new_chat()
        await post(service, chat_id, "to be kept")
        maker = await process().start("backup", "backup.db")
        status, _, err = await maker.ended()
        assert status == 0, err
        await post(service, chat_id, "too late")
    assert not service.database.with_name("backup.db-wal").exists()
    async with process(DATABASE_URL="sqlite:///./backup.db") as service:
        texts = [message["content"] for message in await messages(service, chat_id)]
        assert texts == ["to be kept", "Hello, world"]
        assert (await post(service, chat_id))["status"] == "complete"
        assert await found(service, "kept") == ["to be kept"]


async def test_the_wal_shrinks_again(process: Callable[..., Process]) -> None:
    """What a long reader made grow is given back when nobody needs it any more."""
    async with process() as service, service.connect() as client:
        chat_id = await service.new_chat()
        with contextlib.closing(sqlite3.connect(service.database)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM messages").fetchall()
            while wal_megabytes(service) < 8:
                await client.say("0123456789" * 3_000, chat_id=chat_id)
                await client.reply()
        ends = time.monotonic() + 2 * LIMIT
        while wal_megabytes(service) > 6 and time.monotonic() < ends:
            await post(service, chat_id, "Hi")
        assert wal_megabytes(service) <= 6


async def test_the_clock_goes_back(process: Callable[..., Process]) -> None:
    """`updated_at` never goes back, and the chat just written to is listed first."""
    service = process()
    service.constants = """
import datetime, pathlib
honest = chat_app.now
def now():
    hour = datetime.timedelta(hours=1)
    then = datetime.datetime.fromisoformat(honest()) - hour
    late = then.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return late if pathlib.Path("back").exists() else honest()
chat_app.now = now
"""
    async with service:
        first = await service.new_chat(title="first")
        second = await service.new_chat(title="second")
        await post(service, first)
        await post(service, second)
        path = f"/api/chats/{first}"
        before = (await service.http("GET", path)).json["updated_at"]
        (service.folder / "back").touch()
        await post(service, first)
        chats = (await service.http("GET", "/api/users/alice/chats")).json
        assert [chat["id"] for chat in chats] == [first, second]
        assert chats[0]["updated_at"] >= before
        answer = await service.http("PATCH", f"/api/chats/{second}", {"title": "Second"})
        assert answer.json["updated_at"] >= chats[1]["updated_at"]
        chats = (await service.http("GET", "/api/users/alice/chats")).json
        assert [chat["id"] for chat in chats] == [second, first]


@pytest.mark.timeout(200)
async def test_a_writer_that_breaks_is_told(process: Callable[..., Process]) -> None:
    """A fault in the writer itself ends the process, or /health says 503: somebody has to know."""
    service = process()
    service.constants = """
import pathlib
works = chat_app.Database.commit
def commit(*args, **options):
    if pathlib.Path("broken").exists():
        raise RuntimeError("cannot even roll back")
    return works(*args, **options)
chat_app.Database.commit = commit
"""
    async with service:
        await service.new_chat()
        (service.folder / "broken").touch()

        async def is_told() -> bool:
            try:
                async with asyncio.timeout(LIMIT / 4):
                    await service.http("POST", "/api/chats", {"user_id": "alice"})
            except (aiohttp.ClientError, TimeoutError):
                pass
            if service.process.returncode is not None:
                return True
            try:
                return (await service.http("GET", "/health")).status == 503
            except aiohttp.ClientError:
                return False  # it is about to end

        await until(is_told)


# --- Starting and ending ---


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


@pytest.mark.skipif(not has_ipv6(), reason="needs IPv6")
async def test_every_address_means_ipv4_too(process: Callable[..., Process]) -> None:
    """HOST=:: hears both."""
    async with process(HOST="::") as service:
        port = service.address.rpartition(":")[2]
        for host in ("[::1]", "127.0.0.1"):
            service.address = f"http://{host}:{port}"
            assert (await service.http("GET", "/health")).status == 200


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs SIGHUP")
async def test_a_closed_terminal_is_gentle(
    process: Callable[..., Process], upstream: Upstream
) -> None:
    """SIGHUP: it ends as with SIGTERM, or goes on."""
    upstream.scripts = [Held("half")]
    async with process() as service, service.connect() as client:
        await client.say("Hi")
        await client.until("token")
        service.process.send_signal(signal.SIGHUP)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(service.process.wait(), LIMIT / 4)
        if service.process.returncode is None:
            await caught_up(client)
            service.process.send_signal(signal.SIGTERM)
        assert await client.closed() == 1012
        assert [f["code"] for f in client.frames if f["type"] == "error"][-1] == "interrupted"
        assert (await service.ended())[0] == 0


async def test_a_message_of_escaped_emoji_fits(service: Service) -> None:
    """MAX_FRAME_BYTES: 32,000 emoji that a client has escaped are a message like others."""
    text = "🎉" * 32_000
    async with service.connect() as client:
        assert len(json.dumps(text)) > 380_000
        message = await client.say(text)
        await client.reply()
    await post(service, message["chat_id"], text)


async def log_of(service: Process) -> str:
    """Start and stop a service; return its log."""
    async with service:
        service.process.send_signal(signal.SIGTERM)
        status, _, err = await service.ended()
    assert status == 0, err
    return err


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])
@pytest.mark.parametrize("secret", ["", SECRET])
async def test_an_open_door_is_told(
    process: Callable[..., Process], host: str, secret: str
) -> None:
    """Whoever lets the network in without tokens reads a warning in the log; nobody else does."""
    log = await log_of(process(HOST=host, JWT_SECRET=secret))
    is_warned = any("WARNING" in line and "JWT_SECRET" in line for line in log.splitlines())
    assert is_warned == (host == "0.0.0.0" and not secret), log
    assert SECRET not in log


async def test_misspelt_settings_are_told(process: Callable[..., Process]) -> None:
    """A line of .env that looks like a setting and is none is named in a warning, not its value."""
    lines = ["OPENAI_API_KEYS=sk-typo", "MAX_MESAGE_CHARS=5", "MODEL_NAME=fine"]
    service = process()
    (service.folder / ".env").write_text("\n".join(lines))
    log = await log_of(service)
    warnings = "\n".join(line for line in log.splitlines() if "WARNING" in line)
    assert "OPENAI_API_KEYS" in warnings
    assert "MAX_MESAGE_CHARS" in warnings
    assert "MODEL_NAME" not in warnings
    assert "sk-typo" not in log


async def test_the_log_says_start_and_stop(process: Callable[..., Process]) -> None:
    """Whoever reads only the log sees when it was there."""
    log = await log_of(process())
    assert re.search(r"(?im)^\S+ INFO .*\b(start|listen)", log), log
    assert re.search(r"(?im)^\S+ INFO .*\b(stop|end|shut)", log), log


async def test_a_model_named_demo_is_not_the_demo(process: Callable[..., Process]) -> None:
    """The built-in demo answers only where there is neither a key nor a base URL."""
    async with process(MODEL_NAME="demo") as service:
        assert service.process.stdout is not None
        async with asyncio.timeout(LIMIT):
            line = (await service.process.stdout.readline()).decode()
        assert "understands nothing" not in line
        reply = await post(service, await service.new_chat())
        assert reply["content"] == "Hello, world"


async def test_what_curl_sends_by_default_is_explained(service: Service) -> None:
    """415 says which header is missing."""
    kind = {"Content-Type": "application/x-www-form-urlencoded"}
    chat_id = await service.new_chat()
    for path in ("/api/chats", f"/api/chats/{chat_id}/messages"):
        answer = await service.http("POST", path, b'{"content": "Hi"}', headers=kind)
        assert (answer.status, answer.json["code"]) == (415, "unsupported_media_type")
        assert "Content-Type: application/json" in answer.json["detail"]
