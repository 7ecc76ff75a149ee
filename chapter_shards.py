"""What PROTOCOL.md promises, kept by three shards behind nginx (README, "Growing")."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import websockets
import yaml

import test_chat_app as suite
from test_chat_app import (
    HERE,
    LIMIT,
    NAMES,
    Client,
    Held,
    Peer,
    Tab,
    Upstream,
    messages,
    tab,
    upstream,
)

__all__ = ["tab", "upstream"]  # fixtures

# --- Shards: three of them, replicated by Litestream, behind nginx ---

SHARDS = (10, 11, 12)
SHARD_IDS = 10**12
NGINX = shutil.which("nginx", path=os.environ.get("PATH", "") + os.pathsep + "/usr/sbin")
LITESTREAM = shutil.which("litestream", path=str(Path(sys.executable).parent))
DEPLOY = HERE / "deploy"
NGINX_AROUND = """daemon off;
user root root;
pid nginx.pid;
error_log stderr;
worker_processes 1;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
{configuration}
}}
"""

needs_parts = pytest.mark.skipif(
    NGINX is None or LITESTREAM is None,
    reason="needs nginx (apt-get install nginx) and litestream (`uv sync` brings it)",
)


def unit_command() -> list[str]:
    """Return the words of ExecStart in deploy/chat@.service."""
    unit = (DEPLOY / "chat@.service").read_text("utf-8")
    line = re.search(r"^ExecStart=(.+)$", unit, re.MULTILINE)
    assert line is not None
    return shlex.split(line[1])


def shard_command(file: Path, replica: Path) -> list[str]:
    """Return the unit's own command with this machine's programs and these files."""
    assert LITESTREAM is not None
    here = {
        "/opt/chat-app/.venv/bin/litestream": LITESTREAM,
        "/opt/chat-app/.venv/bin/python chat_app.py": f"{sys.executable} {HERE / 'chat_app.py'}",
        "${FILE}": str(file),
        "${REPLICA}": f"file://{replica}",
    }
    return [here.get(word, word) for word in unit_command()]


def replaced(text: str, *pairs: tuple[str, str]) -> str:
    """Return `text` with each first part, which must be in it, replaced by its second."""
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new)
    return text


def free_prefix() -> int:
    """Return the first three of five digits of ports that are all free."""
    for prefix in random.sample(range(110, 320), 200):
        with contextlib.ExitStack() as stack:
            try:
                for last in (*SHARDS, 98, 99):
                    probe = stack.enter_context(socket.socket())
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("127.0.0.1", prefix * 100 + last))
            except OSError:
                continue
            return prefix
    raise AssertionError("no free ports")


def answers(address: str) -> bool:
    """Whether a service says that it is well."""
    with contextlib.suppress(OSError):  # not up yet; HTTPError is one
        return bool(urllib.request.urlopen(f"{address}/health", timeout=5).status == 200)
    return False


class Shards(Peer):
    """Three shards, each run by Litestream as deploy/chat@.service does, and nginx before them.

    To a test it is one service. `terms` has the term that each shard is in.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.prefix = free_prefix()
        self.address = f"http://127.0.0.1:{self.prefix}99"
        self.model_port = self.prefix * 100 + 98
        self.terms = dict.fromkeys(SHARDS, 1)
        self.running: dict[int, subprocess.Popen[bytes]] = {}
        self.nginx: subprocess.Popen[bytes] | None = None

    def stored(self, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Read all shards' files as an outsider does."""
        rows: list[tuple[Any, ...]] = []
        for shard in SHARDS:
            with contextlib.closing(sqlite3.connect(self.file(shard))) as db:
                rows += db.execute(sql, parameters).fetchall()
        return rows

    def configuration(self) -> str:
        """Return deploy/nginx-shards.conf for three shards, on these ports, without TLS."""
        text = (DEPLOY / "nginx-shards.conf").read_text("utf-8")
        text = re.sub(r"(\$home \{).*?(\})", r"\1 33% 10; 33% 11; * 12; \2", text, flags=re.DOTALL)
        text = re.sub(r" +ssl_certificate.*\n", "", text)
        return replaced(
            text,
            (r"1\d|2[0-5]", "1[0-2]"),
            ("127.0.0.1:81", f"127.0.0.1:{self.prefix}"),
            ("listen 443 ssl;", f"listen 127.0.0.1:{self.prefix}99;"),
            ("unix:/run/nginx-chat.sock", f"unix:{self.folder}/nginx.sock"),
            ("rate=20r/s", "rate=1000r/s"),
        )

    def name(self, shard: int) -> str:
        return f"{shard}-{self.terms[shard]}"

    def file(self, shard: int) -> Path:
        return self.folder / f"{self.name(shard)}.db"

    def replica(self, shard: int) -> Path:
        return self.folder / "replicas" / self.name(shard)

    def own_address(self, shard: int) -> str:
        return f"http://127.0.0.1:{self.prefix}{shard}"

    def environment(self, shard: int, **more: str) -> dict[str, str]:
        known = {name: text for name, text in os.environ.items() if name not in NAMES}
        return known | {
            "SHARD": str(shard),
            "PORT": f"{self.prefix}{shard}",
            "DATABASE_URL": f"sqlite:///{self.file(shard)}",
            "OPENAI_BASE_URL": f"http://127.0.0.1:{self.model_port}/v1",
            "OPENAI_API_KEY": "sk-x",
            "MESSAGES_PER_MINUTE": "0",
            "DRAIN_SECONDS": "0",
            **more,
        }

    def begin(self, shard: int, **more: str) -> None:
        """Start a shard, in a group of its own, as a machine of its own would be."""
        with (self.folder / f"{shard}.log").open("ab") as log:
            self.running[shard] = subprocess.Popen(
                shard_command(self.file(shard), self.replica(shard)),
                cwd=self.folder, env=self.environment(shard, **more),
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def wait(self, shard: int) -> None:
        """Wait until a shard serves."""
        end = time.monotonic() + LIMIT
        while not answers(self.own_address(shard)):
            log = (self.folder / f"{shard}.log").read_text("utf-8")
            assert time.monotonic() < end, log
            assert self.running[shard].poll() is None, log
            time.sleep(0.05)

    def kill(self, shard: int) -> None:
        """End a shard and its Litestream as a power cut does."""
        process = self.running.pop(shard)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def stop(self, shard: int) -> int:
        """Stop a shard as systemd does and return its exit status."""
        process = self.running.pop(shard)
        process.terminate()
        return process.wait(LIMIT)

    def forget(self, shard: int) -> None:
        """Delete a shard's file and all that is beside it."""
        for each in self.folder.glob(f"*{self.name(shard)}.db*"):
            if each.is_dir():
                shutil.rmtree(each)
            else:
                each.unlink()

    def proxy(self) -> None:
        """Start nginx and wait until it answers."""
        text = NGINX_AROUND.format(configuration=self.configuration())
        (self.folder / "nginx.conf").write_text(text, "utf-8")
        assert NGINX is not None
        with (self.folder / "nginx.log").open("wb") as log:
            self.nginx = subprocess.Popen(
                [NGINX, "-p", str(self.folder), "-c", "nginx.conf"],
                stdout=log, stderr=log,
            )  # fmt: skip
        end = time.monotonic() + LIMIT
        while not answers(self.address):
            assert time.monotonic() < end, (self.folder / "nginx.log").read_text("utf-8")
            time.sleep(0.05)

    def end(self) -> None:
        for shard in list(self.running):
            self.kill(shard)
        if self.nginx is not None:
            self.nginx.terminate()
            self.nginx.wait(LIMIT)

    async def user_of(self, shard: int) -> str:
        """Return a new user whose home is that shard, as nginx has it."""
        for number in itertools.count():
            user = f"user-{shard}-{number}-{random.random()}"
            if await self.new_chat(user) // SHARD_IDS == shard:
                return user
        raise AssertionError


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shards]:
    """Three shards behind nginx for a whole chapter."""
    running = Shards(tmp_path_factory.mktemp("shards"))
    try:
        for shard in SHARDS:
            running.begin(shard)
        for shard in SHARDS:
            running.wait(shard)
        running.proxy()
        yield running
    finally:
        running.end()


@pytest.fixture
async def shards_model(shards: Shards) -> AsyncIterator[Upstream]:
    """The scripted model of all shards, in which the suite's users have nothing yet."""
    for user in ("alice", "bob"):
        answer = await shards.http("DELETE", f"/api/users/{user}")
        assert answer.status == 204
    model = Upstream()
    where = ("127.0.0.1", shards.model_port)
    async with await asyncio.start_server(model._serve, *where) as server:
        yield model
        server.close()
        await model.stop()


BEHIND_NGINX: list[Callable[..., Awaitable[None]]] = [
    suite.test_a_client_that_knows_only_the_starred_rows,
    suite.test_a_message_and_its_reply_are_stored_together,
    suite.test_a_send_without_a_chat_makes_one,
    suite.test_sync_brings_a_connection_up_to_date,
    suite.test_regenerate_answers_the_last_message_anew,
    suite.test_messages_wait_for_their_turn,
    suite.test_promise_4_closing_every_tab_stops_nothing,
    suite.test_promise_5_abort_in_the_same_tick_as_the_send,
    suite.test_promise_5_aborting_a_chat_stops_all_of_it_and_nothing_else,
    suite.test_abort_of_what_does_not_run_is_refused,
    suite.test_promise_8_users_do_not_see_each_other,
    suite.test_a_chat_is_made_and_found,
    suite.test_a_message_over_http_can_be_streamed,
    suite.test_search_finds_finished_text_by_all_words,
    suite.test_a_text_frame_that_is_no_utf_8_closes_with_1007,
    suite.test_a_frame_over_the_limit_closes_with_1009,
    suite.test_two_tabs_are_in_step_token_by_token,
    suite.test_stop_is_a_button_and_a_key_also_before_the_first_token,
]


@needs_parts
@pytest.mark.parametrize("test", BEHIND_NGINX, ids=lambda test: test.__name__[5:])
async def test_the_protocol_through_nginx(
    test: Callable[..., Awaitable[None]], shards: Shards, shards_model: Upstream, tab: Tab
) -> None:
    """To a client three shards behind nginx are one service: its own tests pass there."""
    known = {"service": shards, "shared": shards, "upstream": shards_model, "tab": tab}
    await test(**{name: known[name] for name in inspect.signature(test).parameters})


OTHER_NAMES = ["Zoë", "😀 emoji", "a b", "a?b#c%41", "...", "ann@example.com", "x" * 128]


@needs_parts
@pytest.mark.usefixtures("shards_model")
@pytest.mark.parametrize("user", [*OTHER_NAMES, 7, 12345678901234567890], ids=str)
async def test_however_a_user_is_named_the_shard_is_the_same(
    shards: Shards, user: str | int
) -> None:
    """POST /api/chats by body (escaped or not), query and path, the WebSocket and the list of
    chats go to one shard; a client sees the 201 and never the 307."""
    path = f"/api/users/{quote(str(user), safe='')}"
    plain = json.dumps({"user_id": user}, ensure_ascii=False).encode()
    kind = {"Content-Type": "application/json"}
    answers = [
        await shards.http("POST", "/api/chats", {"user_id": user}),
        await shards.http("POST", "/api/chats", plain, headers=kind),
        await shards.http("POST", f"/api/chats?user_id={quote(str(user), safe='')}"),
        await shards.http("POST", f"{path}/chats"),
    ]
    assert [answer.status for answer in answers] == [201] * 4
    assert {answer.json["user_id"] for answer in answers} == {str(user)}
    ids = [answer.json["id"] for answer in answers]
    assert [answer.headers["Location"] for answer in answers] == [f"/api/chats/{i}" for i in ids]
    async with shards.connect(quote(str(user), safe="")) as client:
        ids.append((await client.say("Hi"))["chat_id"])
        await client.reply()
    assert len({i // SHARD_IDS for i in ids}) == 1
    assert all(10**13 <= i < 10**14 for i in ids), "14 digits"
    listed = (await shards.http("GET", f"{path}/chats?limit=200")).json
    assert set(ids) <= {chat["id"] for chat in listed}


@needs_parts
@pytest.mark.parametrize("shard", SHARDS)
async def test_every_way_to_a_chat_leads_to_its_shard(
    shards: Shards, shards_model: Upstream, shard: int
) -> None:
    """By id and by user: read, send, edit, rename, abort, search, export, events, delete."""
    user = await shards.user_of(shard)
    held = Held("half")
    shards_model.scripts = [held]
    chat_id = await shards.new_chat(user)
    path = f"/api/chats/{chat_id}"
    async with shards.connect(user) as client:
        message = await client.say("What are tides?", chat_id=chat_id)
        await client.until("token")
        async with shards.connect(user) as late:
            assert (await late.get())["type"] == "sync"
        assert (await shards.http("POST", f"{path}/abort")).status == 200
        await client.until("aborted", task_id=message["task_id"])
        await client.say("And waves?", chat_id=chat_id, replaces=message["id"])
        await client.reply()
        assert (await shards.http("PATCH", path, {"title": "Sea"})).json["title"] == "Sea"
        found = (await shards.http("GET", f"/api/users/{user}/search?q=waves")).json
        assert [each["chat_id"] for each in found] == [chat_id]
        export = (await shards.http("GET", f"/api/users/{user}/export")).body.splitlines()
        assert chat_id in [json.loads(line)["id"] for line in export]
        assert (await shards.http("DELETE", path)).status == 204
        await client.until("chat_deleted", chat_id=chat_id)
    assert (await shards.http("GET", path)).status == 404


@needs_parts
async def test_events_pass_nginx_as_they_happen(shards: Shards, shards_model: Upstream) -> None:
    """An event stream is not buffered: a token arrives while its reply still runs."""
    shards_model.scripts = [held := Held("first")]
    url = f"{shards.address}/api/users/alice/events"
    async with (
        aiohttp.ClientSession() as session,
        session.get(url) as stream,
        shards.connect() as client,
    ):
        assert stream.headers["Content-Type"].startswith("text/event-stream")
        await client.say("Hi")
        async with asyncio.timeout(LIMIT):
            while b"first" not in await stream.content.readline():
                pass
        held.go.set()
        await client.reply()


@needs_parts
@pytest.mark.parametrize(
    "path", ["/", "/docs", "/redoc", "/openapi.json", "/asyncapi.json", "/static/chat.css",
             "/static/chat.js", "/health", "/api/models"]
)  # fmt: skip
async def test_what_is_nobodys_any_shard_answers(shards: Shards, path: str) -> None:
    """Whatever names no user and no chat is asked of any shard, without an X-Shard."""
    async with aiohttp.ClientSession() as session, session.get(shards.address + path) as answer:
        assert answer.status == 200


@needs_parts
async def test_metrics_are_for_the_inside(shards: Shards) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{shards.address}/metrics") as outside,
        session.get(f"{shards.own_address(10)}/metrics") as inside,
    ):
        assert (outside.status, inside.status) == (403, 200)


@needs_parts
async def test_a_shard_that_is_asked_for_another_answers_421(shards: Shards) -> None:
    """A wrong line in the proxy's map must not give a user chats on a second shard."""
    async with aiohttp.ClientSession() as session:
        for name, status in (("10", 200), ("11", 421), ("ten", 421)):
            url = f"{shards.own_address(10)}/api/users/alice/chats"
            async with session.get(url, headers={"X-Shard": name}) as answer:
                assert answer.status == status


class Talk:
    """One user who sends message after message, and keeps what was acknowledged, and when."""

    def __init__(self, shards: Shards, user: str) -> None:
        self.shards = shards
        self.user = user
        self.acknowledged: list[tuple[float, dict[str, Any]]] = []
        self.faults: list[str] = []
        self.over = False
        self._news = asyncio.Event()

    async def run(self) -> None:
        """Send until `over`. A lost connection is a fault, and another is made."""
        while not self.over:
            try:
                async with self.shards.connect(self.user) as client:
                    await self._talk(client)
            except (OSError, TimeoutError, websockets.WebSocketException) as error:
                self.faults.append(repr(error))
                await asyncio.sleep(0.05)  # a client's pause before it connects again

    async def _talk(self, client: Client) -> None:
        while not self.over:
            message = await client.say(f"{len(self.acknowledged)} of {self.user}")
            self.acknowledged.append((time.monotonic(), message))
            self._news.set()
            await client.until("message")  # the reply's, also one that failed
            await asyncio.sleep(0.02)

    async def said(self, more: int) -> None:
        """Wait until that many more were acknowledged."""
        enough = len(self.acknowledged) + more
        async with asyncio.timeout(2 * LIMIT):
            while len(self.acknowledged) < enough:
                await self._news.wait()
                self._news.clear()

    async def lost(self, before: float) -> list[int]:
        """Return the ids acknowledged before that moment that are not there any more.

        An id that is there with other words than its own fails.
        """
        missing = []
        for at, message in self.acknowledged:
            if at < before:
                answer = await self.shards.http("GET", f"/api/chats/{message['chat_id']}")
                there = answer.json.get("messages", [])
                found = [each for each in there if each["id"] == message["id"]]
                assert [each["content"] for each in found] in ([], [message["content"]])
                missing += [] if found else [message["id"]]
        return missing


@contextlib.asynccontextmanager
async def talking(shards: Shards) -> AsyncIterator[dict[int, Talk]]:
    """A user of each shard who talks until the block ends."""
    talks = {shard: Talk(shards, await shards.user_of(shard)) for shard in SHARDS}
    async with asyncio.TaskGroup() as group:
        for talk in talks.values():
            group.create_task(talk.run())
        try:
            yield talks
        finally:
            for talk in talks.values():
                talk.over = True


def ids_are_single(talks: dict[int, Talk]) -> None:
    """Every id that was given out means one message, of the shard that it begins with."""
    for shard, talk in talks.items():
        ids = [message["id"] for _, message in talk.acknowledged]
        assert len(ids) == len(set(ids)), "no id means two things"
        assert {i // SHARD_IDS for i in ids} == {shard}


@needs_parts
@pytest.mark.slow
@pytest.mark.usefixtures("shards_model")
async def test_a_dead_machine_costs_its_users_a_moment(shards: Shards) -> None:
    """A shard is killed -9 with its Litestream and its file is deleted. Started again, it is
    restored: all that was acknowledged more than two seconds before is there, no id means two
    things, and the users of the other shards notice nothing."""
    async with talking(shards) as talks:
        async with asyncio.timeout(2 * LIMIT):
            first = time.monotonic()
            while time.monotonic() < first + 4:  # so that there is something two seconds old
                await talks[11].said(1)
        killed = time.monotonic()
        await asyncio.to_thread(shards.kill, 11)
        shards.forget(11)
        for shard in (10, 12):
            await talks[shard].said(5)
        shards.begin(11)
        await asyncio.to_thread(shards.wait, 11)
        for talk in talks.values():
            await talk.said(5)
    assert [talks[shard].faults for shard in (10, 12)] == [[], []]
    assert talks[11].faults
    ids_are_single(talks)
    assert await talks[11].lost(killed - 2) == []
    assert [await talks[shard].lost(time.monotonic()) for shard in (10, 12)] == [[], []]
    after = [message for at, message in talks[11].acknowledged if at > killed]
    assert sum(at < killed - 2 for at, _ in talks[11].acknowledged) > 3
    assert await messages(shards, after[-1]["chat_id"])


@needs_parts
@pytest.mark.slow
@pytest.mark.usefixtures("shards_model")
async def test_a_planned_move_loses_nothing(shards: Shards) -> None:
    """README, "Growing": stop, restore under the next term, start. Nothing that was acknowledged
    is lost, and the old term's file and replica are left alone."""
    assert LITESTREAM is not None
    async with talking(shards) as talks:
        await talks[12].said(10)
        assert await asyncio.to_thread(shards.stop, 12) == 0
        stopped = time.monotonic()
        old_file, old_replica = shards.file(12), shards.replica(12)
        before = old_file.read_bytes()
        shards.terms[12] += 1
        words = ["restore", "-o", str(shards.file(12)), f"file://{old_replica}"]
        restore = await asyncio.create_subprocess_exec(
            LITESTREAM, *words, stdout=asyncio.subprocess.DEVNULL
        )
        assert await asyncio.wait_for(restore.wait(), LIMIT) == 0
        shards.begin(12)
        await asyncio.to_thread(shards.wait, 12)
        assert shards.nginx is not None
        shards.nginx.send_signal(signal.SIGHUP)  # as `nginx -s reload` does
        for talk in talks.values():
            await talk.said(5)
    assert [talks[shard].faults for shard in (10, 11)] == [[], []]
    assert await talks[12].lost(stopped) == []
    ids_are_single(talks)
    assert old_file.read_bytes() == before
    assert shards.replica(12).exists()


def refused_start(shards: Shards, shard: int, **more: str) -> tuple[int, str]:
    """Start the service itself on a shard's file; return its status and what it said."""
    environment = shards.environment(shard, **more) | {"PORT": "0"}
    program = [sys.executable, str(HERE / "chat_app.py")]
    done = subprocess.run(
        program, cwd=shards.folder, env=environment, capture_output=True, text=True,
        timeout=2 * LIMIT, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr


@needs_parts
@pytest.mark.slow
async def test_two_services_never_serve_one_shard(shards: Shards) -> None:
    """A shard's file has one owner: a second service waits for it, then says so and ends."""
    status, said = await asyncio.to_thread(refused_start, shards, 10)
    assert status == 2
    assert "another service uses" in said
    assert answers(shards.own_address(10))


async def test_a_file_is_of_one_shard_for_ever(tmp_path: Path, upstream: Upstream) -> None:
    """The file of another shard, an unsharded one under SHARD, and a shard's without it stop the
    start with one sentence and are left as they were."""
    shard = {"SHARD": "17"}
    async with suite.start(tmp_path, upstream, **shard) as service:
        assert await service.new_chat() == 17 * SHARD_IDS + 10**6 + 1
        service.process.terminate()
        assert (await service.ended())[0] == 0
    async with suite.start(tmp_path, upstream, **shard) as service:
        assert await service.new_chat() == 17 * SHARD_IDS + 2 * 10**6 + 2
        service.process.terminate()
        assert (await service.ended())[0] == 0
    plain = tmp_path / "plain"
    plain.mkdir()
    async with suite.start(plain, upstream) as service:
        assert await service.new_chat() == 1
        service.process.terminate()
        assert (await service.ended())[0] == 0
    wrong: list[tuple[Path, dict[str, str]]] = [
        (tmp_path, {"SHARD": "18"}),
        (tmp_path, {}),
        (plain, shard),
    ]
    for folder, environment in wrong:
        service = await suite.start(folder, upstream, **environment).start()
        status, _, said = await service.ended()
        assert (status, len(said.splitlines())) == (2, 1), said
        assert "SHARD" in said


@pytest.mark.parametrize("shard", ["9", "100", "x"])
async def test_a_shard_has_two_digits(tmp_path: Path, upstream: Upstream, shard: str) -> None:
    """Ids of 14 digits stay exact in JavaScript, and ids below 10^12 free for unsharded files."""
    service = await suite.start(tmp_path, upstream, SHARD=shard).start()
    status, _, said = await service.ended()
    assert status == 2
    assert "SHARD" in said


# --- Shards: what the files in deploy/ say ---


def kubernetes() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text("utf-8")))


def test_kubernetes_takes_every_part_of_its_file() -> None:
    """deploy/kubernetes.yaml keeps Kubernetes' own schemas, unknown fields refused."""
    for part in kubernetes():
        kubernetes_validate.validate(part, "1.31", strict=True)


def test_kubernetes_runs_the_command_that_systemd_runs() -> None:
    """So what the tests here run is what both run."""
    (shard,) = (part for part in kubernetes() if part["kind"] == "StatefulSet")
    words = shard["spec"]["template"]["spec"]["containers"][0]["command"]
    programs = [word.replace("/opt/chat-app/.venv/bin/", "") for word in unit_command()]
    assert words == [re.sub(r"\$\{(\w+)\}", r"$(\1)", word) for word in programs]


def test_the_term_is_in_every_name() -> None:
    """A stale file or a forgotten process of an older term then harms nobody."""
    (shard,) = (part for part in kubernetes() if part["kind"] == "StatefulSet")
    variables = shard["spec"]["template"]["spec"]["containers"][0]["env"]
    values = {each["name"]: each.get("value", "") for each in variables}
    assert values["FILE"].endswith("/$(SHARD)-1.db")
    assert values["REPLICA"].endswith("/$(SHARD)-1")
    unit = (DEPLOY / "chat@.service").read_text("utf-8")
    for name in ("FILE", "DATABASE_URL", "REPLICA"):
        assert re.search(rf"^# +{name}=\S+/17-1(\.db)?$", unit, re.MULTILINE), name


@pytest.mark.skipif(NGINX is None, reason="needs nginx (apt-get install nginx)")
def test_nginx_takes_what_kubernetes_makes_of_its_configuration(tmp_path: Path) -> None:
    """The Deployment's own words turn deploy/nginx-shards.conf into one for pods."""
    assert NGINX is not None
    (door,) = (part for part in kubernetes() if part["kind"] == "Deployment")
    script = door["spec"]["template"]["spec"]["containers"][0]["command"][2]
    made = tmp_path / "default.conf"
    script = replaced(
        script,
        ("/config", str(DEPLOY)),
        ("/etc/nginx/conf.d/default.conf", str(made)),
        ("exec nginx -g 'daemon off;'", ""),
    )
    subprocess.run(["/bin/sh", "-ec", script], check=True, timeout=LIMIT)
    text = made.read_text("utf-8")
    assert "ssl" not in text
    assert "default chat-shard-$shard.chat-shard.default.svc.cluster.local:8005;" in text
    here = replaced(
        text,
        ("kube-dns.kube-system.svc.cluster.local", "127.0.0.1"),
        ("server chat-any:8005", "server 127.0.0.1:8005"),
        ("unix:/run/", f"unix:{tmp_path}/"),
    )
    (tmp_path / "nginx.conf").write_text(NGINX_AROUND.format(configuration=here), "utf-8")
    test = [NGINX, "-t", "-p", str(tmp_path), "-c", "nginx.conf"]
    done = subprocess.run(test, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 0, done.stderr
