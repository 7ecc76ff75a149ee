"""What PROTOCOL.md promises beyond version 1.0.0, as tests; to be appended to test_chat_app.py."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import sqlite3
import sys
import time
import uuid
from typing import TYPE_CHECKING, Any, Self

import aiohttp
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from test_chat_app import (  # noqa: F401 - the fixtures are named by the tests
    HERE,
    LIMIT,
    SECRET,
    STREAM,
    Client,
    Exchange,
    Held,
    Make,
    Peer,
    Process,
    Service,
    Upstream,
    bearer,
    breaks,
    caught_up,
    clean_environment,
    frame_conforms,
    messages,
    post,
    process,
    refuses,
    says,
    service,
    settings,
    shared,
    story,
    text_of,
    token,
    until,
    upstream,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path


# --- Reasoning ---


async def thinks(exchange: Exchange, *pieces: str, field: str = "reasoning_content") -> None:
    """Send pieces of what the model thinks aloud, in one of the fields that servers use."""
    for piece in pieces:
        await exchange.event({"choices": [{"index": 0, "delta": {field: piece}}]})


class Thinking:
    """A script that thinks aloud, waits for `go`, then says `text` and finishes."""

    def __init__(self, *thoughts: str, text: tuple[str, ...] = ("42",)) -> None:
        self.thoughts = thoughts
        self.text = text
        self.go = asyncio.Event()

    async def __call__(self, exchange: Exchange) -> None:
        await exchange.start()
        await thinks(exchange, *self.thoughts)
        waits = [asyncio.ensure_future(event.wait()) for event in (self.go, exchange.left)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        await exchange.say(*self.text)
        await exchange.finish()


def thoughts_of(client: Client, task_id: str) -> str:
    """Return the thoughts that a connection has of a reply: `sync` and the tokens after it."""
    thoughts = ""
    for frame in client.frames:
        if frame.get("task_id") == task_id and frame["type"] == "sync":
            thoughts = frame["reasoning"] or ""
        elif frame.get("task_id") == task_id and frame["type"] == "token":
            thoughts += frame.get("reasoning") or ""
    return thoughts


async def test_reasoning_is_streamed_synced_stored_and_never_sent_back(
    service: Service, upstream: Upstream
) -> None:
    """PROTOCOL.md, Message.reasoning and token.reasoning: it has a `seq` like text, a later
    connection gets it by `sync`, it is in the reply's message and in history, and the model is
    never sent it."""
    upstream.scripts = [thinking := Thinking("Six ", "by nine")]
    async with service.connect() as early:
        message = await early.say("Hi")
        task_id = message["task_id"]
        while thoughts_of(early, task_id) != "Six by nine":
            frame = await early.get()
        assert frame["type"] == "token"
        assert (frame["token"], frame["seq"]) == ("", 2)
        running = (await messages(service, message["chat_id"]))[1]
        assert (running["content"], running["reasoning"]) == ("", "Six by nine")
        async with service.connect() as late:
            sync = await late.get()
            assert sync == {
                "type": "sync", "chat_id": message["chat_id"], "task_id": task_id,
                "message_id": message["id"] + 1, "content": "", "reasoning": "Six by nine",
                "seq": 2,
            }  # fmt: skip
            thinking.go.set()
            replies = [await early.reply(), await late.reply()]
            for client in (early, late):
                assert text_of(client, task_id) == "42"
                assert thoughts_of(client, task_id) == "Six by nine"
                plain = [f for f in client.frames if f["type"] == "token" and f["token"]]
                assert all("reasoning" not in f for f in plain), "only where there is any"
    assert replies[0] == replies[1]
    assert (replies[0]["content"], replies[0]["reasoning"]) == ("42", "Six by nine")
    assert await messages(service, message["chat_id"]) == [message, replies[0]]
    assert message["reasoning"] is None
    await post(service, message["chat_id"], "Why?")
    assert upstream.prompts[1] == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "42"},
        {"role": "user", "content": "Why?"},
    ]


THOUGHT_DELTAS: dict[str, list[dict[str, Any]]] = {
    "reasoning_content": [{"reasoning_content": "Hm"}, {"reasoning_content": "m", "content": None}],
    "reasoning": [{"reasoning": "Hmm", "content": ""}],
    "list parts": [
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "Hmm"}]}]},
        {"content": [{"type": "text", "text": "Y"}]},
        {"content": "es"},
    ],
    "<think>": [{"content": "<think>Hmm</think>Yes"}],
    "<think> in pieces": [{"content": piece} for piece in "<think>Hmm</think>Yes"],
}


@pytest.mark.parametrize("form", THOUGHT_DELTAS)
async def test_reasoning_is_found_where_servers_put_it(
    service: Service, upstream: Upstream, form: str
) -> None:
    """PROTOCOL.md, Message.reasoning: from the fields that servers use for it, or between
    `<think>` and `</think>` at the very start of the text, however that is cut."""
    deltas = THOUGHT_DELTAS[form]

    async def script(exchange: Exchange) -> None:
        await exchange.start()
        for fields in deltas:
            await exchange.event({"choices": [{"index": 0, "delta": fields}]})
        if form in {"reasoning_content", "reasoning"}:
            await exchange.say("Yes")
        await exchange.finish()

    upstream.scripts = [script]
    async with service.connect() as client:
        message = await client.say("Hi")
        reply = await client.reply()
    assert (reply["content"], reply["reasoning"]) == ("Yes", "Hmm")
    assert text_of(client, message["task_id"]) == "Yes"
    assert thoughts_of(client, message["task_id"]) == "Hmm"


@pytest.mark.parametrize(
    "text", ["a <think>b</think>", "<thin", "<thinking>b</thinking>", "&lt;think>b</think>"]
)
async def test_what_is_no_think_at_the_very_start_is_text(
    service: Service, upstream: Upstream, text: str
) -> None:
    """Only `<think>` at the very start begins reasoning; nothing that looks like it is lost."""
    upstream.scripts = [says(*text)]
    async with service.connect() as client:
        message = await client.say("Hi")
        reply = await client.reply()
    assert (reply["content"], reply["reasoning"]) == (text, None)
    assert text_of(client, message["task_id"]) == text


@pytest.mark.parametrize("ends", ["complete", "aborted", "failed"])
async def test_a_reply_may_have_reasoning_only(
    service: Service, upstream: Upstream, ends: str
) -> None:
    """Its `message` comes also where there is no text, because there is reasoning; it leaves
    the model's context, as it has no visible text."""

    async def script(exchange: Exchange) -> None:
        await exchange.start()
        await thinks(exchange, "Hmm")
        if ends == "aborted":
            await exchange.left.wait()
        elif ends == "complete":
            await exchange.finish()

    upstream.scripts = [script]
    async with service.connect() as client:
        message = await client.say("Hi")
        if ends == "aborted":
            await client.until("token")
            await client.send("abort", task_id=message["task_id"])
        reply = await client.reply()
        assert (reply["status"], reply["content"], reply["reasoning"]) == (ends, "", "Hmm")
        await caught_up(client)
    told = ["user", "token", "reply"]
    told += {"complete": [], "aborted": ["aborted"], "failed": ["error"]}[ends]
    assert story(client, message["task_id"]) == told
    await post(service, message["chat_id"], "Well?")
    assert upstream.prompts[1] == [{"role": "user", "content": "Hi\n\nWell?"}]


async def test_reasoning_counts_towards_the_length_of_a_reply(
    settings: Make, upstream: Upstream
) -> None:
    """PROTOCOL.md: it counts towards MAX_REPLY_CHARS, over which a reply ends with `length`."""
    thinking = Thinking("12345", text=("67890", "more"))
    thinking.go.set()
    upstream.scripts = [thinking]
    async with Service(settings(max_reply_chars=8)) as service:
        chat_id = await service.new_chat()
        reply = await post(service, chat_id)
    assert (reply["status"], reply["finish_reason"]) == ("complete", "length")
    assert (reply["reasoning"], reply["content"]) == ("12345", "678")


# --- Editing ---


async def contents(service: Peer, chat_id: int) -> list[str]:
    """Return what history shows, in its order, each message once."""
    found = await messages(service, chat_id)
    ids = [message["id"] for message in found]
    assert ids == sorted(set(ids))
    return [message["content"] for message in found]


async def conversation(service: Peer, *texts: str, title: str = "") -> tuple[int, list[int]]:
    """Hold a conversation; return the chat and the ids of the user's messages."""
    chat_id = await service.new_chat(title=title)
    for text in texts:
        await post(service, chat_id, text)
    return chat_id, [m["id"] for m in await messages(service, chat_id) if not m["is_ai"]]


def last_prompt(upstream: Upstream) -> list[str]:
    return [turn["content"] for turn in upstream.prompts[-1]]


async def test_an_edit_stands_in_the_place_of_a_message(
    service: Service, upstream: Upstream
) -> None:
    """PROTOCOL.md, Editing: the named message and its replies leave the model's context and stay
    readable; history shows every message once, in order; the title is kept."""
    upstream.scripts = [says("a"), says("b"), says("c"), says("d")]
    chat_id, (_, second) = await conversation(service, "One", "Two")
    async with service.connect() as client:
        edit = await client.say("Zwei", chat_id=chat_id, replaces=second)
        await client.reply()
        assert edit["replaces"] == second
        assert {frame["type"] for frame in client.frames} == {"message", "token"}
    assert last_prompt(upstream) == ["One", "a", "Zwei"]
    await post(service, chat_id, "Three")
    assert last_prompt(upstream) == ["One", "a", "Zwei", "c", "Three"]
    assert await contents(service, chat_id) == [
        "One", "a", "Two", "b", "Zwei", "c", "Three", "d",
    ]  # fmt: skip
    out = [m["replaces"] for m in await messages(service, chat_id)]
    assert out == [None] * 4 + [second] + [None] * 3
    assert service.stored("SELECT title FROM chats") == [("One",)]


async def test_an_edit_takes_out_all_that_followed(service: Service, upstream: Upstream) -> None:
    """All from the replaced message up to the new one is out, whoever said it; a chain of edits
    leaves the last one."""
    upstream.scripts = [says(letter) for letter in "abcdef"]
    chat_id, (first, _, _) = await conversation(service, "One", "Two", "Three")
    reply = await post(service, chat_id, "Eins", replaces=first)
    assert last_prompt(upstream) == ["Eins"]
    assert (reply["content"], reply["replaces"]) == ("d", None)
    await post(service, chat_id, "Un", replaces=reply["reply_to"])
    assert last_prompt(upstream) == ["Un"]
    await post(service, chat_id, "Deux")
    assert last_prompt(upstream) == ["Un", "e", "Deux"]
    assert await contents(service, chat_id) == [
        "One", "a", "Two", "b", "Three", "c", "Eins", "d", "Un", "e", "Deux", "f",
    ]  # fmt: skip


async def test_what_an_edit_of_an_older_message_replaced_stays_out(
    service: Service, upstream: Upstream
) -> None:
    """One, Two, an edit of Two, then an edit of One: of all before, nothing is sent any more."""
    chat_id, (first, second) = await conversation(service, "One", "Two")
    await post(service, chat_id, "Zwei", replaces=second)
    await post(service, chat_id, "Eins", replaces=first)
    assert last_prompt(upstream) == ["Eins"]
    await post(service, chat_id, "And")
    assert last_prompt(upstream) == ["Eins", "Hello, world", "And"]


@pytest.mark.parametrize(
    ("name", "code", "status"),
    [
        ("of another chat", "message_not_found", 404),
        ("of another user", "message_not_found", 404),
        ("a reply", "message_not_found", 404),
        ("none", "message_not_found", 404),
        ("replaced", "not_current", 409),
        ("after a replaced one", "not_current", 409),
    ],
)
async def test_an_edit_of_what_can_not_be_edited_is_refused(
    service: Service, name: str, code: str, status: int
) -> None:
    """PROTOCOL.md, Refusals: `message_not_found` where it is no user message of that chat,
    `not_current` where another stands in its place already; nothing is changed."""
    chat_id, (first, second) = await conversation(service, "One", "Two")
    other_chat, (other, third) = await conversation(service, "Other", "Third")
    await post(service, other_chat, "Andere", replaces=other)
    foreign = await post(service, await service.new_chat("bob"), "Mine")
    target_chat, target = {
        "of another chat": (chat_id, third),
        "of another user": (chat_id, foreign["reply_to"]),
        "a reply": (chat_id, first + 1),
        "none": (chat_id, second + 1000),
        "replaced": (other_chat, other),
        "after a replaced one": (other_chat, third),
    }[name]
    before = service.stored("SELECT * FROM messages ORDER BY id")
    async with service.connect() as client:
        await client.send("send_message", chat_id=target_chat, content="x", replaces=target)
        refusal = await client.get()
        assert (refusal["type"], refusal["code"]) == ("error", code)
        assert refusal["chat_id"] == target_chat
    body = {"content": "x", "replaces": target}
    answer = await service.http("POST", f"/api/chats/{target_chat}/messages", body)
    assert (answer.status, answer.json["code"]) == (status, code)
    assert service.stored("SELECT * FROM messages ORDER BY id") == before


async def test_an_edit_needs_its_chat_and_a_quiet_one(service: Service, upstream: Upstream) -> None:
    """`invalid_frame` without a `chat_id`; `busy` while a reply of the chat runs or waits."""
    chat_id, (first,) = await conversation(service, "One")
    upstream.scripts = [held := Held("half")]
    async with service.connect() as client:
        await client.send("send_message", content="x", replaces=first)
        refusal = await client.refusal()
        assert refusal["code"] == "invalid_frame"
        assert "chat_id" in refusal["message"]
        await client.say("Two", chat_id=chat_id)
        await client.send("send_message", chat_id=chat_id, content="x", replaces=first)
        assert (await client.refusal())["code"] == "busy"
        body = {"content": "x", "replaces": first}
        answer = await service.http("POST", f"/api/chats/{chat_id}/messages", body)
        assert (answer.status, answer.json["code"]) == (409, "busy")
        held.go.set()
        await client.reply()
        await client.say("Eins", chat_id=chat_id, replaces=first)
    assert len(service.stored("SELECT id FROM chats")) == 1


@pytest.mark.parametrize("value", ["0", "-1", "true", "1.0", '"1"', "[1]", str(2**63)])
async def test_replaces_is_an_id(shared: Service, value: str) -> None:
    """PROTOCOL.md, Refusals: a bool or `1.0` is no id; the message names the field."""
    chat_id = await shared.new_chat("hostile edit")
    body = f'{{"content": "Hi", "replaces": {value}}}'
    path = f"/api/chats/{chat_id}/messages"
    headers = {"Content-Type": "application/json"}
    answer = await shared.http("POST", path, body.encode(), headers=headers)
    assert (answer.status, answer.json["code"]) == (422, "invalid_frame")
    assert "replaces" in answer.json["detail"]
    async with shared.connect("hostile%20edit") as client:
        frame = f'{{"action": "send_message", "chat_id": {chat_id}, {body[1:]}'
        await client.socket.send(frame)
        refusal = await client.refusal()
        assert refusal["code"] == "invalid_frame"
        assert "replaces" in refusal["message"]


async def test_a_retried_edit_gets_what_is_stored(service: Service, upstream: Upstream) -> None:
    """Promise 9 for an edit: sent again with its `client_msg_id` it is echoed, not stored anew,
    and not refused as `not_current` or `busy`."""
    chat_id, (first,) = await conversation(service, "One")
    fields: dict[str, Any] = {"chat_id": chat_id, "replaces": first, "client_msg_id": "e1"}
    upstream.scripts = [held := Held("half")]
    async with service.connect() as client:
        edit = await client.say("Eins", **fields)
        await client.until("token")
        assert await client.say("Eins", **fields) == edit, "while it is answered"
        held.go.set()
        await client.reply()
        assert await client.say("Eins", **fields) == edit, "and after that"
    assert len(upstream.exchanges) == 2
    assert len(await messages(service, chat_id)) == 4


async def test_regenerate_after_an_edit_answers_the_edit(
    service: Service, upstream: Upstream
) -> None:
    """It is the chat's last user message; its older reply leaves the context as ever."""
    upstream.scripts = [says("a"), says("b"), says("c"), says("d"), says("e")]
    chat_id, (_, second) = await conversation(service, "One", "Two")
    await post(service, chat_id, "Zwei", replaces=second)
    answer = await service.http("POST", f"/api/chats/{chat_id}/regenerate")
    assert last_prompt(upstream) == ["One", "a", "Zwei"]
    assert answer.json["message"]["content"] == "Zwei"
    assert answer.json["message"]["replaces"] == second
    await post(service, chat_id, "Three")
    assert last_prompt(upstream) == ["One", "a", "Zwei", "d", "Three"]


async def test_old_versions_are_found(service: Service) -> None:
    """PROTOCOL.md, Editing: search still finds old versions."""
    chat_id, (first,) = await conversation(service, "Originally")
    await post(service, chat_id, "Lately", replaces=first)
    for word in ("originally", "lately"):
        found = (await service.http("GET", f"/api/users/alice/search?q={word}")).json
        assert [message["content"].lower() for message in found] == [word]
