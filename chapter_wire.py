"""What the HTTP and WebSocket parsers do with floods and with what isn't HTTP or WebSocket."""

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable

import pytest

from test_chat_app import KEY_13, LIMIT, UPGRADE, Process, Service, bytes_to, masked

pytest_plugins = ("test_chat_app",)  # its fixtures; to go when this chapter stands there

# --- Promise 7: no flood takes more than its share, over HTTP either ---

CHUNKED = "HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
HTTP_FLOODS = {
    "a body in chunks of one byte": f"POST /api/chats {CHUNKED}",
    "a body that nobody reads": f"POST /nothing {CHUNKED}",
}
NOT_UTF8 = masked(0x81, b"\xff")
CLOSE = masked(0x88, b"\x03\xe8")


@pytest.mark.parametrize("name", HTTP_FLOODS)
async def test_a_flood_over_http_costs_others_little(
    process: Callable[..., Process], name: str
) -> None:
    """While a body of tiny chunks arrives, each of which costs the parser as much as a big one,
    another user's ping is answered soon (a quarter of a second; a busy machine gets more)."""
    async with process() as service, service.connect("bob") as bob, bytes_to(service) as (_, flood):
        flood.write(HTTP_FLOODS[name].encode())
        sent = 0

        async def send_forever() -> None:
            nonlocal sent
            with contextlib.suppress(ConnectionError):
                while True:
                    flood.write(b"1\r\nx\r\n" * 20_000)
                    await flood.drain()
                    sent += 1

        flooding = asyncio.create_task(send_forever())
        worst = 0.0
        number = 0
        async with asyncio.timeout(LIMIT):
            while number < 30 or sent < 3:
                begun = time.monotonic()
                await bob.send("ping", id=str(number))
                await bob.until("pong", id=str(number))
                worst = max(worst, time.monotonic() - begun)
                number += 1
        flooding.cancel()
    assert worst < 2, worst


@pytest.mark.parametrize(
    "frames",
    [NOT_UTF8 + CLOSE, masked(0x89) * 2_000 + NOT_UTF8 + CLOSE, NOT_UTF8 * 3],
    ids=["and a close", "behind a flood, and a close", "three times"],
)
async def test_text_that_is_not_utf8_closes_whatever_follows(
    process: Callable[..., Process], frames: bytes
) -> None:
    """In one packet with a close frame, too: the connection ends at once, nothing is logged."""
    async with process() as service:
        async with bytes_to(service) as (reader, writer), asyncio.timeout(LIMIT):
            writer.write(f"{UPGRADE}{KEY_13}\r\n".encode())
            await reader.readuntil(b"\r\n\r\n")
            writer.write(frames)
            assert (await reader.read())[-4:-2] == b"\x88\x02"
        service.process.send_signal(signal.SIGTERM)
        status, _, err = await service.ended()
        assert (status, "Traceback" in err) == (0, False), err


@pytest.mark.parametrize(
    ("path", "answered"),
    [("/nothing", True), ("/nothing", False), ("/api/chats", False)],
    ids=["answered", "not yet answered", "read"],
)
async def test_a_body_that_is_no_longer_http_closes(
    process: Callable[..., Process], path: str, answered: bool
) -> None:
    """Before the answer it gets the 400, after it there is nothing to say; nothing is logged."""
    async with process() as service:
        async with bytes_to(service) as (reader, writer), asyncio.timeout(LIMIT):
            writer.write(f"POST {path} {CHUNKED}".encode())
            head = b""
            if answered:
                head = await reader.readuntil(b"\r\n\r\n")
            writer.write(b"no chunk\r\n")
            answer = head + await reader.read()
        assert answer.startswith(b"HTTP/1.1 4"), answer
        assert answer.count(b"HTTP/1.1 ") == 1, answer
        service.process.send_signal(signal.SIGTERM)
        status, _, err = await service.ended()
        assert (status, "Traceback" in err) == (0, False), err


async def test_a_large_frame_between_small_ones_is_read_whole(shared: Service) -> None:
    """What is parsed a little at a time comes out as it was sent, and in order."""
    async with shared.connect("wire") as client:
        text = "é🎉" * 15_000
        for number in range(3):
            await client.send("ping", id=f"before {number}")
            await client.send("send_message", content=text)
            await client.send("ping", id=f"after {number}")
        for number in range(3):
            await client.until("pong", id=f"before {number}")
            while (message := (await client.until("message"))["message"])["is_ai"]:
                pass  # of an earlier chat
            assert message["content"] == text
            await client.until("pong", id=f"after {number}")


async def test_a_body_that_trickles_in_behind_its_answer_is_closed_soon(
    process: Callable[..., Process],
) -> None:
    """The time for a body is not given a second time after it is over: 30 seconds in all
    (here the second time would be longer than the test waits)."""
    service = process()
    service.constants = "chat_app.BODY_SECONDS = 0.5; chat_app.HEAD_SECONDS = 2 * 60"
    async with service, bytes_to(service) as (reader, writer), asyncio.timeout(LIMIT):
        head = "POST /api/chats HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: 1000\r\n\r\n".encode())
        answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 400"), answer

        async def trickle() -> None:
            with contextlib.suppress(ConnectionError):
                while True:
                    writer.write(b" ")
                    await asyncio.sleep(0.1)

        trickling = asyncio.create_task(trickle())
        with contextlib.suppress(ConnectionError):
            await reader.read()
        trickling.cancel()
