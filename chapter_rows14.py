"""What PROTOCOL.md promises beyond version 1.0.0, as tests; to be appended to test_chat_app.py."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import sqlite3
import time
from typing import TYPE_CHECKING, Any, Self

import aiohttp
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

import chat_app
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


# --- What the model is sent ---


async def test_the_turns_alternate(settings: Make, upstream: Upstream) -> None:
    """PROTOCOL.md, What the model is sent: replies without visible text are left out, neighbours
    of one role are joined by an empty line, the first and the last turn are the user's."""
    upstream.scripts = [refuses, says(" \n\u200b"), says("seen"), says("end")]
    async with Service(settings(system_prompt="Be kind.")) as service:
        await conversation(service, "One", "Two", "Three", "Four")
    assert upstream.prompts[-1] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "One\n\nTwo\n\nThree"},
        {"role": "assistant", "content": "seen"},
        {"role": "user", "content": "Four"},
    ]


async def test_replies_before_the_first_user_message_are_dropped(
    settings: Make, upstream: Upstream
) -> None:
    """The budget may end between a message and its reply: then the reply isn't sent either."""
    upstream.scripts = [says("bb")]
    async with Service(settings(max_context_chars=10)) as service:
        await conversation(service, "aaaaaaaa", "cccc")
    assert upstream.prompts[-1] == [{"role": "user", "content": "cccc"}]


TOO_LONG = json.dumps({"error": {"message": "too long", "code": "context_length_exceeded"}})


async def too_long(exchange: Exchange) -> None:
    await exchange.problem("400 Bad Request", TOO_LONG)


async def test_a_context_that_is_too_long_is_halved(service: Service, upstream: Upstream) -> None:
    """A server that refuses the request as too long is asked again with half, and then the
    reply is like any other; the message that is answered is always whole."""
    chat_id, _ = await conversation(service, *(str(number) * 100 for number in range(6)))
    upstream.scripts = [too_long, too_long, says("fine")]
    reply = await post(service, chat_id, "last " * 30)
    assert (reply["status"], reply["content"]) == ("complete", "fine")
    sizes = [sum(len(turn["content"]) for turn in prompt) for prompt in upstream.prompts[-3:]]
    assert sizes[1] <= sizes[0] / 2
    assert sizes[2] <= sizes[0] / 4
    for prompt in upstream.prompts[-3:]:
        assert prompt[-1]["content"].endswith("last " * 30)
        assert prompt[0]["role"] == "user"


async def test_a_context_that_stays_too_long_fails(service: Service, upstream: Upstream) -> None:
    """After three further requests the reply fails with `model_context`."""
    chat_id, _ = await conversation(service, *(str(number) * 100 for number in range(9)))
    asked = len(upstream.exchanges)
    upstream.scripts = [too_long] * 9
    reply = await post(service, chat_id)
    assert (reply["status"], reply["finish_reason"]) == ("failed", "model_context")
    assert 2 <= len(upstream.exchanges) - asked <= 4


# --- A chat's model and instructions ---


async def test_a_chat_has_a_model_and_instructions(settings: Make, upstream: Upstream) -> None:
    """PROTOCOL.md, Chat and What the model is sent: the request names the chat's model; one
    system message has SYSTEM_PROMPT and then the chat's instructions."""
    async with Service(settings(system_prompt="Be kind.", models="small, large")) as service:
        listed = await service.http("GET", "/api/models")
        assert listed.status == 200
        assert listed.json["default"] == "scripted"
        assert set(listed.json["models"]) == {"scripted", "small", "large"}
        body = {"user_id": "alice", "model": "large", "instructions": "In verse."}
        chat = (await service.http("POST", "/api/chats", body)).json
        assert (chat["model"], chat["instructions"]) == ("large", "In verse.")
        await post(service, chat["id"])
        plain = await service.new_chat()
        await post(service, plain)
        shown = (await service.http("GET", f"/api/chats/{plain}")).json
        assert (shown["model"], shown["instructions"]) == (None, None)
    first, second = upstream.exchanges
    assert (first.body["model"], second.body["model"]) == ("large", "scripted")
    roles = [turn["role"] for turn in upstream.prompts[0]]
    assert roles == ["system", "user"]
    system = upstream.prompts[0][0]["content"]
    assert system.startswith("Be kind.")
    assert system.endswith("In verse.")
    assert upstream.prompts[1][0]["content"] == "Be kind."


async def test_instructions_are_a_system_message_of_their_own(
    service: Service, upstream: Upstream
) -> None:
    """Without SYSTEM_PROMPT the instructions stand alone; without either there is none."""
    chat_id = await service.new_chat()
    await service.http("PATCH", f"/api/chats/{chat_id}", {"instructions": "In verse."})
    await post(service, chat_id)
    await service.http("PATCH", f"/api/chats/{chat_id}", {"instructions": ""})
    await post(service, chat_id)
    assert upstream.prompts[0][0] == {"role": "system", "content": "In verse."}
    assert [turn["role"] for turn in upstream.prompts[1]] == ["user", "assistant", "user"]


async def test_patch_changes_what_it_names(settings: Make) -> None:
    """PROTOCOL.md, PATCH: `null` or `""` takes model or instructions away; what is left out
    stays; nothing at all is fine, too. Every change is told to every connection."""
    async with Service(settings(models="large")) as service, service.connect() as client:
        chat_id = await service.new_chat(title="T")
        await client.until("chat")
        state: dict[str, Any] = {"title": "T", "model": None, "instructions": None}
        for change in (
            {"model": "large"},
            {"instructions": "In verse."},
            {"title": "U"},
            {"model": None},
            {"model": "large", "instructions": None},
            {"model": "", "instructions": "x" * 8000},
            {"instructions": ""},
            {"title": None, "later": 1, "model": "scripted"},
        ):
            answer = await service.http("PATCH", f"/api/chats/{chat_id}", change)
            assert answer.status == 200, change
            for name in state.keys() & change.keys():
                if name != "title" or change[name]:
                    state[name] = change[name] or None
            assert answer.json == answer.json | state, change
            assert await client.until("chat") == {"type": "chat", "chat": answer.json}
        same = await service.http("PATCH", f"/api/chats/{chat_id}", {})
        assert (same.status, same.json) == (200, answer.json)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"model": "unknown"}, "model"),
        ({"model": 1}, "model"),
        ({"model": ["large"]}, "model"),
        ({"instructions": 1}, "instructions"),
        ({"instructions": "x" * 8001}, "instructions"),
        ({"title": "x" * 201, "model": None}, "title"),
    ],
)
async def test_a_bad_model_or_instruction_names_its_field(
    shared: Service, body: dict[str, Any], field: str
) -> None:
    """422, for a new chat as for a change; nothing is made or changed."""
    chat_id = await shared.new_chat("models", "T")
    before = shared.stored("SELECT * FROM chats WHERE user_id = 'models'")
    for method, path, more in (
        ("PATCH", f"/api/chats/{chat_id}", {}),
        ("POST", "/api/chats", {"user_id": "models"}),
        ("POST", "/api/users/models/chats", {}),
    ):
        answer = await shared.http(method, path, body | more)
        assert (answer.status, answer.json["code"]) == (422, "invalid_frame"), (method, path)
        assert field in answer.json["detail"]
    assert shared.stored("SELECT * FROM chats WHERE user_id = 'models'") == before


# --- Titles ---

FAMILY = "👨\u200d👩\u200d👧"


@pytest.mark.parametrize(
    ("content", "title"),
    [
        ("\u200b\n \u2060 \nTides\nmore", "Tides"),
        ("x" * 59 + "e\u0301" + "y", "x" * 59),
        ("x" * 59 + "ye\u0301", "x" * 59 + "y"),
        ("x" * 58 + FAMILY + "y", "x" * 58),
        ("x" * 59 + "👍🏽", "x" * 59),
        ("x" * 59 + "🇩🇪", "x" * 59),
        ("x" * 58 + "🇩🇪🇫🇷", "x" * 58 + "🇩🇪"),
    ],
)
async def test_a_title_is_the_first_line_that_shows_anything(
    service: Service, content: str, title: str
) -> None:
    """PROTOCOL.md, Chat: 60 characters, none cut in half."""
    async with service.connect() as client:
        await client.say(content)
        await client.reply()
        assert client.frames[0]["chat"]["title"] == title


# --- Ping and pong ---


async def test_a_ping_is_answered_to_the_asker_alone(service: Service) -> None:
    """PROTOCOL.md, `ping`: `pong` with the `id` as it was given; nobody else gets it."""
    async with service.connect() as client, service.connect() as other:
        await client.send("ping", id="p1")
        pong = await client.get()
        assert (pong["type"], pong["id"]) == ("pong", "p1")
        for fields in ({}, {"id": None}):
            await client.send("ping", **fields)
            pong = await client.get()
            assert pong["type"] == "pong"
            assert pong.get("id") is None
        for odd in (1, True, ["a"], "x" * 65):
            await client.send("ping", id=odd)
            refusal = await client.get()
            assert (refusal["type"], refusal["code"]) == ("error", "invalid_frame")
            assert "id" in refusal["message"]
        await client.send("ping", id="x" * 64)
        assert (await client.get())["id"] == "x" * 64
        assert [frame["type"] for frame in await caught_up(other)] == ["error"]


async def test_an_abort_that_names_both_needs_both_to_fit(
    service: Service, upstream: Upstream
) -> None:
    """PROTOCOL.md, `abort`: with `task_id` and `chat_id` the task must be of that chat."""
    upstream.scripts = [Held("half")]
    other_chat = await service.new_chat()
    async with service.connect() as client:
        message = await client.say("Hi")
        await client.until("token")
        await client.send("abort", task_id=message["task_id"], chat_id=other_chat)
        assert (await client.refusal())["code"] == "task_not_found"
        await client.send("abort", task_id=message["task_id"], chat_id=message["chat_id"])
        await client.until("aborted", task_id=message["task_id"])


# --- The user in the path ---


async def test_a_chat_is_made_under_its_user(service: Service) -> None:
    """PROTOCOL.md, POST /api/users/{user_id}/chats: as POST /api/chats; told to connections."""
    async with service.connect("zo%C3%AB") as client:
        made = await service.http("POST", "/api/users/zo%C3%AB/chats", {"title": "Mine"})
        assert (made.status, made.headers["Location"]) == (201, f"/api/chats/{made.json['id']}")
        assert (made.json["user_id"], made.json["title"]) == ("zoë", "Mine")
        assert await client.get() == {"type": "chat", "chat": made.json}
    bare = await service.http("POST", "/api/users/42/chats")
    assert (bare.status, bare.json["user_id"], bare.json["title"]) == (201, "42", "")


@pytest.mark.parametrize("user", [".", ".."])
async def test_a_user_is_no_dots(shared: Service, user: str) -> None:
    """PROTOCOL.md: browsers and proxies take `.` and `..` out of paths; 422 and 4403."""
    answer = await shared.http("POST", "/api/chats", {"user_id": user})
    assert (answer.status, answer.json["code"]) == (422, "invalid_frame")
    assert "user_id" in answer.json["detail"]
    head = f"GET /ws/{user} HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    key = base64.b64encode(b"0123456789abcdef").decode()
    host = shared.address.removeprefix("http://")
    head += f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\nHost: {host}\r\n\r\n"
    name, _, port = host.rpartition(":")
    reader, writer = await asyncio.open_connection(name, int(port))
    async with asyncio.timeout(LIMIT):
        writer.write(head.encode())
        assert b" 101 " in await reader.readline()
        await reader.readuntil(b"\r\n\r\n")
        frame = await reader.readexactly(4)
    writer.close()
    assert (frame[0], int.from_bytes(frame[2:4])) == (0x88, 4403), "a close frame"


# --- Events for a user ---


class Events:
    """An event stream of a user. `get` returns its next frame, held to the schema."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self.comments: list[str] = []
        self.retry = ""
        self.frames: list[dict[str, Any]] = []

    async def block(self) -> list[str]:
        """Return the lines up to the next empty one; none at the end of the stream."""
        lines: list[str] = []
        async with asyncio.timeout(LIMIT):
            while line := await self.response.content.readline():
                text = line.decode().rstrip("\r\n")
                if not text and lines:
                    break
                lines += [text] if text else []
        return lines

    async def get(self) -> dict[str, Any] | None:
        """Return the next frame, or None where the stream has ended."""
        while lines := await self.block():
            kind = ""
            data = ""
            for line in lines:
                name, _, value = line.partition(":")
                value = value.removeprefix(" ")
                if not name:
                    self.comments.append(value)
                elif name == "event":
                    kind = value
                elif name == "data":
                    data += value
                else:
                    assert name == "retry", line
                    self.retry = value
            if data:
                frame: dict[str, Any] = json.loads(data)
                assert frame["type"] == kind
                frame_conforms(frame)
                self.frames.append(frame)
                return frame
        return None

    async def until(self, kind: str) -> dict[str, Any]:
        while frame := await self.get():
            if frame["type"] == kind:
                return frame
        pytest.fail(f"the stream ended without {kind}")


@contextlib.asynccontextmanager
async def listening(
    service: Peer, user: str = "alice", query: str = "", **headers: str
) -> AsyncIterator[Events]:
    """Open a user's event stream."""
    timeout = aiohttp.ClientTimeout(None, sock_read=LIMIT)
    path = f"/api/users/{user}/events{query}"
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.get(service.address + path, headers=headers) as response,
    ):
        assert response.status == 200, await response.text()
        assert response.headers["Content-Type"].startswith("text/event-stream")
        yield Events(response)


async def test_events_are_what_a_socket_gets(service: Service, upstream: Upstream) -> None:
    """PROTOCOL.md, GET /api/users/{user_id}/events: the frames of a WebSocket, `sync` at the
    start included; it counts as a connection."""
    upstream.scripts = [held := Held("half ", rest=("whole",))]
    async with service.connect() as client:
        message = await client.say("Hi")
        await client.until("token")
        async with service.connect() as late, listening(service) as events:
            assert await events.get() == await late.get()
            assert events.frames[0]["type"] == "sync"
            assert events.frames[0]["content"] == "half "
            assert (await service.http("GET", "/health")).json["connections"] == 3
            held.go.set()
            ended = await events.until("message")
            assert ended["message"] == await late.reply()
            tokens = [frame["token"] for frame in events.frames if frame["type"] == "token"]
            assert "".join(tokens) == "whole"
            await service.http("PATCH", f"/api/chats/{message['chat_id']}", {"title": "New"})
            assert await events.until("chat") == await late.until("chat")
            await service.http("DELETE", f"/api/chats/{message['chat_id']}")
            assert await events.until("chat_deleted") == await late.until("chat_deleted")

    async def nobody() -> bool:
        return bool((await service.http("GET", "/health")).json["connections"] == 0)

    await until(nobody)


async def test_events_of_one_chat(service: Service, upstream: Upstream) -> None:
    """`?chat_id=` keeps to that chat, from the `sync` on; another user's, a missing one is 404,
    what is no id is 422."""
    upstream.scripts = [Held("other"), Held("mine")]
    foreign = await service.new_chat("bob")
    async with service.connect() as client:
        other = await client.say("Other")
        mine = await client.say("Mine")
        seen: set[str] = set()
        while len(seen) < 2:
            seen.add((await client.until("token"))["task_id"])
        async with listening(service, query=f"?chat_id={mine['chat_id']}") as events:
            sync = await events.get()
            assert sync is not None
            assert (sync["type"], sync["task_id"]) == ("sync", mine["task_id"])
            for task_id in (other["task_id"], mine["task_id"]):
                await client.send("abort", task_id=task_id)
                await client.until("aborted", task_id=task_id)
            assert (await events.until("aborted"))["task_id"] == mine["task_id"]
            chats = {f.get("chat_id") or f["message"]["chat_id"] for f in events.frames}
            assert chats == {mine["chat_id"]}
    path = "/api/users/alice/events?chat_id="
    for chat_id in (foreign, 999_999):
        answer = await service.http("GET", f"{path}{chat_id}")
        assert (answer.status, answer.json["code"]) == (404, "chat_not_found")
    for odd in ("0", "x", "1.0", ""):
        answer = await service.http("GET", path + odd)
        assert answer.status == 422
        assert "chat_id" in answer.json["detail"]


@pytest.mark.parametrize("limit", ["max_connections", "max_connections_per_user"])
async def test_events_count_as_a_connection(settings: Make, limit: str) -> None:
    """Over the limits it is 503, and a WebSocket 1013 where streams have taken the places."""
    async with Service(settings(**{limit: 1})) as service, listening(service) as events:
        answer = await service.http("GET", "/api/users/alice/events")
        assert (answer.status, answer.json["code"]) == (503, "overloaded")
        assert int(answer.headers["Retry-After"]) >= 1
        async with service.connect() as client:
            assert await client.closed() == 1013
        await service.new_chat()
        assert (await events.until("chat"))["type"] == "chat"


async def test_events_end_with_the_token(settings: Make) -> None:
    """PROTOCOL.md: the stream ends with its token, and needs one; another's path is 403."""
    async with Service(settings(jwt_secret=SECRET)) as service:
        bare = await service.http("GET", "/api/users/alice/events")
        assert bare.status == 401
        foreign = await service.http("GET", "/api/users/alice/events", headers=bearer("bob"))
        assert foreign.status == 403
        expires = int(time.time()) + 3 - 30  # 30 s of clock skew are allowed
        signed = {"Authorization": f"Bearer {token(exp=expires)}"}
        async with listening(service, **signed) as events:
            assert await events.get() is None


async def test_events_end_with_the_service(service: Service, upstream: Upstream) -> None:
    """After the last endings: what still runs is told as `interrupted`, then the stream ends."""
    upstream.scripts = [Held("half")]
    async with service.connect() as client, listening(service) as events:
        message = await client.say("Hi")
        await client.until("token")
        stopping = asyncio.create_task(service.stop())
        error = await events.until("error")
        assert (error["code"], error["task_id"]) == ("interrupted", message["task_id"])
        assert await events.get() is None
        await stopping


async def test_a_silent_event_stream_has_comments(service: Service) -> None:
    """A comment after 15 s of silence tells proxies, and the reader, that it is alive."""
    async with listening(service) as events:
        async with asyncio.timeout(LIMIT + 15):
            line = b""
            while not line.startswith(b":"):
                line = await events.response.content.readline()
                assert line, "the stream has ended"


async def test_a_stream_of_a_task_is_not_to_be_reconnected(service: Service) -> None:
    """PROTOCOL.md, POST messages: a browser's EventSource that reconnected would send again, so
    the stream of one task begins with `retry: 2147483647`."""
    path = f"/api/chats/{await service.new_chat()}/messages"
    answer = await service.http("POST", path, {"content": "Hi"}, headers=STREAM)
    assert answer.body.startswith(b"retry: 2147483647\n")
    assert answer.body.rstrip().rpartition(b"event: ")[2].startswith(b"message\n")


# --- Export and erasure ---


async def test_a_user_can_take_everything_along(settings: Make, upstream: Upstream) -> None:
    """PROTOCOL.md, export: a line of JSON for each chat, as GET of the chat, with all of its
    messages; nothing of other users."""
    upstream.scripts = [says("a\nb"), refuses]
    async with Service(settings(messages_per_minute=0)) as service:
        chats = [await service.new_chat() for _ in range(3)]
        for chat_id in chats[:2]:
            await post(service, chat_id)
        for number in range(60):
            await post(service, chats[0], f"message {number}")
        await post(service, await service.new_chat("bob"), "secret of Bob")
        answer = await service.http("GET", "/api/users/alice/export")
        assert answer.status == 200
        assert answer.headers["Content-Type"].startswith("application/x-ndjson")
        exported = {chat["id"]: chat for chat in map(json.loads, answer.body.splitlines())}
        assert exported.keys() == set(chats)
        for chat_id in chats:
            shown = (await service.http("GET", f"/api/chats/{chat_id}?limit=1000")).json
            assert exported[chat_id]["messages"] == shown["messages"]
            assert exported[chat_id]["title"] == shown["title"]
        assert b"Bob" not in answer.body
        empty = await service.http("GET", "/api/users/nobody/export")
        assert (empty.status, empty.body) == (200, b"")


async def test_a_user_can_be_erased(service: Service, upstream: Upstream) -> None:
    """PROTOCOL.md, DELETE of a user: as DELETE for each chat, and the `client_msg_id`s are
    forgotten; nobody else loses anything; a second time is fine, too."""
    upstream.scripts = [says("done"), Held("half")]
    quiet = await service.new_chat()
    await post(service, quiet, "Findme", client_msg_id="m1")
    kept = await service.new_chat("bob")
    async with service.connect() as client:
        message = await client.say("Running")
        await client.until("token")
        assert (await service.http("DELETE", "/api/users/alice")).status == 204
        gone = {(await client.until("chat_deleted"))["chat_id"] for _ in range(2)}
        assert gone == {quiet, message["chat_id"]}
        assert story(client, message["task_id"]) == ["user", "token", "reply", "aborted"]
        assert (await service.http("GET", "/api/users/alice/chats")).json == []
        assert (await service.http("GET", "/api/users/alice/search?q=findme")).json == []
        assert (await service.http("GET", "/api/users/alice/export")).body == b""
        again = await client.say("Anew", client_msg_id="m1")
        assert again["id"] > message["id"]
    assert (await service.http("GET", f"/api/chats/{kept}")).status == 200
    assert (await service.http("DELETE", "/api/users/nobody")).status == 204


async def test_only_oneself_can_be_exported_or_erased(settings: Make) -> None:
    """Another user's path is 403; without a token it is 401."""
    async with Service(settings(jwt_secret=SECRET)) as service:
        await service.http("POST", "/api/chats", {}, headers=bearer("alice"))
        for method, path in (
            ("GET", "/api/users/alice/export"),
            ("DELETE", "/api/users/alice"),
            ("POST", "/api/users/alice/chats"),
        ):
            assert (await service.http(method, path)).status == 401
            answer = await service.http(method, path, headers=bearer("bob"))
            assert (answer.status, answer.json["code"]) == (403, "forbidden")
        assert (await service.http("GET", "/api/models")).status == 401
        assert service.stored("SELECT count(*) FROM chats") == [(1,)]


# --- Keys of an identity provider ---

Key = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


def new_key(method: str) -> Key:
    if method == "RS256":
        return rsa.generate_private_key(65_537, 2048)
    if method == "ES256":
        return ec.generate_private_key(ec.SECP256R1())
    return ed25519.Ed25519PrivateKey.generate()


class Provider:
    """An identity provider: its keys are served on a real socket, and can be changed."""

    def __init__(self) -> None:
        self.keys: dict[str, tuple[str, Key]] = {}
        self.fetched = 0
        self.hangs = False
        self.asked = asyncio.Event()
        self.url = ""
        self._server: asyncio.Server

    def rotate(self, kid: str, method: str) -> None:
        """Leave one key, a new one."""
        self.keys = {kid: (method, new_key(method))}

    def token(self, kid: str, user: Any = "alice", **claims: Any) -> str:
        method, key = self.keys[kid]
        now = int(time.time())
        body = {"sub": user, "exp": now + 60} | claims
        return jwt.encode(body, key, method, headers={"kid": kid})

    def headers(self, kid: str, user: Any = "alice", **claims: Any) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token(kid, user, **claims)}"}

    def document(self) -> bytes:
        makers: dict[str, Callable[[Any], Any]] = {
            "RS256": jwt.algorithms.RSAAlgorithm.to_jwk,
            "ES256": jwt.algorithms.ECAlgorithm.to_jwk,
            "EdDSA": jwt.algorithms.OKPAlgorithm.to_jwk,
        }
        keys = []
        for kid, (method, key) in self.keys.items():
            public: Any = key.public_key()
            keys.append(json.loads(makers[method](public)) | {"kid": kid, "use": "sig"})
        return json.dumps({"keys": keys}).encode()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            self.fetched += 1
            self.asked.set()
            if self.hangs:
                await reader.read()
            body = self.document()
            head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            await writer.drain()
        writer.close()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()
        self.url = f"http://{host}:{port}/jwks"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()


@pytest.mark.parametrize("method", ["RS256", "ES256", "EdDSA"])
async def test_tokens_of_an_identity_provider_are_taken(
    settings: Make, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PROTOCOL.md, JWT_JWKS_URL: fetched when needed, kept, fetched anew for an unknown `kid`;
    what no key of it has signed is 401 and 4401."""
    monkeypatch.setattr(chat_app, "KEYS_PAUSE_SECONDS", 0.0)  # or it rotates too soon
    async with Provider() as provider:
        provider.rotate("one", method)
        async with Service(settings(jwt_jwks_url=provider.url)) as service:
            for _ in range(3):
                answer = await service.http(
                    "GET", "/api/users/alice/chats", headers=provider.headers("one")
                )
                assert answer.status == 200
            assert provider.fetched == 1, "kept"
            provider.rotate("two", method)
            headers = provider.headers("two")
            async with service.connect(additional_headers=headers) as client:
                await caught_up(client)
            assert provider.fetched == 2, "anew for an unknown kid"
            stranger = Provider()
            stranger.rotate("two", method)
            for bad in (stranger.token("two"), token(), token(key="", method="none")):
                headers = {"Authorization": f"Bearer {bad}"}
                answer = await service.http("GET", "/api/users/alice/chats", headers=headers)
                assert answer.status == 401
                async with service.connect(additional_headers=headers) as client:
                    assert await client.closed() == 4401


async def test_a_secret_and_a_provider_go_together(settings: Make) -> None:
    """HS256 by the secret stays good beside JWT_JWKS_URL; a public key is no secret."""
    async with Provider() as provider:
        provider.rotate("one", "RS256")
        both = settings(jwt_secret=SECRET, jwt_jwks_url=provider.url)
        async with Service(both) as service:
            for headers in (bearer("alice"), provider.headers("one")):
                answer = await service.http("GET", "/api/users/alice/chats", headers=headers)
                assert answer.status == 200


async def test_a_provider_that_hangs_holds_up_nobody_else(
    settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PROTOCOL.md: the keys are never awaited by others. Who has a known key, and /health, are
    answered while an unknown `kid` waits for a provider that never answers."""
    monkeypatch.setattr(chat_app, "KEYS_PAUSE_SECONDS", 0.0)  # or it rotates too soon
    monkeypatch.setattr(chat_app, "KEYS_TIMEOUT_SECONDS", LIMIT)
    async with Provider() as provider:
        provider.rotate("one", "ES256")
        known = provider.headers("one", exp=int(time.time()) + 600)
        async with Service(settings(jwt_jwks_url=provider.url)) as service:
            path = "/api/users/alice/chats"
            assert (await service.http("GET", path, headers=known)).status == 200
            provider.rotate("two", "ES256")
            provider.hangs = True
            provider.asked.clear()
            unknown = provider.headers("two")
            waiting = asyncio.create_task(service.http("GET", path, headers=unknown))
            async with asyncio.timeout(LIMIT):
                await provider.asked.wait()
            assert (await service.http("GET", path, headers=known)).status == 200
            assert (await service.http("GET", "/health")).status == 200
            assert not waiting.done()
            waiting.cancel()
            await asyncio.wait([waiting])


@pytest.mark.parametrize(
    ("audience", "claims", "status"),
    [
        (None, {"aud": "chat"}, 401),
        (None, {"aud": ["chat"]}, 401),
        ("chat", {"aud": "chat"}, 200),
        ("chat", {"aud": ["other", "chat"]}, 200),
        ("chat", {"aud": "other"}, 401),
        ("chat", {}, 401),
        (None, {"iat": 1}, 200),
        (None, {"iat": 10**10}, 401),
    ],
)
async def test_a_token_is_for_this_service(
    settings: Make, audience: str | None, claims: dict[str, Any], status: int
) -> None:
    """PROTOCOL.md, JWT_AUDIENCE: what `aud` must hold; without it one with `aud` is refused."""
    changes = {"jwt_audience": audience} if audience else {}
    async with Service(settings(jwt_secret=SECRET, **changes)) as service:
        headers = {"Authorization": f"Bearer {token(**claims)}"}
        answer = await service.http("GET", "/api/users/alice/chats", headers=headers)
        assert answer.status == status


@pytest.mark.parametrize(
    ("shift", "status"),
    [
        ({"iat": 1}, 200),
        ({"iat": 20}, 200),
        ({"nbf": 20}, 200),
        ({"exp": -15}, 200),
        ({"exp": -45}, 401),
        ({"nbf": 90}, 401),
    ],
)
async def test_clocks_may_differ_by_30_seconds(
    settings: Make, shift: dict[str, Any], status: int
) -> None:
    """PROTOCOL.md: 30 s of clock skew allowed, in both directions."""
    async with Service(settings(jwt_secret=SECRET)) as service:
        claims = {name: int(time.time()) + seconds for name, seconds in shift.items()}
        headers = {"Authorization": f"Bearer {token(**claims)}"}
        answer = await service.http("GET", "/api/users/alice/chats", headers=headers)
        assert answer.status == status


async def test_the_subject_may_be_an_integer(settings: Make) -> None:
    """PROTOCOL.md: `sub` is a string or an integer; a bool or a float is neither."""
    async with Service(settings(jwt_secret=SECRET)) as service:
        for subject, status in ((42, 200), ("42", 200), (True, 401), (4.2, 401), (["42"], 401)):
            encoded = jwt.api_jws.encode(
                json.dumps({"sub": subject, "exp": int(time.time()) + 60}).encode(), SECRET, "HS256"
            )
            headers = {"Authorization": f"Bearer {encoded}"}
            answer = await service.http("GET", "/api/users/42/chats", headers=headers)
            assert answer.status == status, subject


# --- Hosts and origins ---


@pytest.mark.parametrize(
    ("allowed", "host", "admitted"),
    [
        ("", "evil.example", False),
        ("", "evil.example:8005", False),
        ("", "localhost.evil.example", False),
        ("", "127.0.0.1.evil.example", False),
        ("", "localhost:8005", True),
        ("", "192.168.1.7", True),
        ("", "[::1]:8005", True),
        ("", "chat", True),
        ("chat.example, b.example", "b.example:8005", True),
        ("chat.example", "CHAT.example", True),
        ("chat.example", "a.chat.example", False),
        ("*", "evil.example", True),
    ],
)
async def test_a_host_of_somebody_elses_dns_is_refused(
    settings: Make, allowed: str, host: str, admitted: bool
) -> None:
    """PROTOCOL.md, Host: without tokens only IP addresses, `localhost`, names without a dot and
    ALLOWED_HOSTS are answered: 403 and 4403 for others."""
    async with Service(settings(allowed_hosts=allowed)) as service:
        headers = {"Host": host}
        answer = await service.http("GET", "/api/users/alice/chats", headers=headers)
        assert answer.status == (200 if admitted else 403)
        if not admitted:
            assert answer.json["code"] == "forbidden"
    async with Service(settings(allowed_hosts=allowed, jwt_secret=SECRET)) as service:
        headers = {"Host": host} | bearer("alice")
        answer = await service.http("GET", "/api/users/alice/chats", headers=headers)
        assert answer.status == 200, "with tokens the host doesn't matter"


async def handshake(service: Peer, host: str, origin: str = "") -> int:
    """Open a WebSocket by hand, for a Host of one's own; return the close code, 0 if it stays."""
    lines = ["GET /ws/alice HTTP/1.1", "Upgrade: websocket", "Connection: Upgrade"]
    lines += [f"Sec-WebSocket-Key: {base64.b64encode(bytes(16)).decode()}"]
    lines += ["Sec-WebSocket-Version: 13", f"Host: {host}"]
    lines += [f"Origin: {origin}"] if origin else []
    name, _, port = service.address.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(name, int(port))
    ping = b'{"action": "x"}'  # is answered by a frame where the connection stays
    masked = bytes([0x81, 0x80 | len(ping)]) + bytes(4) + ping
    async with asyncio.timeout(LIMIT):
        writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
        assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
        writer.write(masked)
        first = await reader.readexactly(4)
    writer.close()
    return int.from_bytes(first[2:4]) if first[0] == 0x88 else 0


async def test_a_socket_for_a_foreign_host_is_closed_with_4403(service: Service) -> None:
    """PROTOCOL.md, Host: 4403 on the WebSocket."""
    assert await handshake(service, "evil.example") == 4403
    assert await handshake(service, "localhost:8005") == 0


@pytest.mark.parametrize(
    ("host", "origin", "admitted"),
    [
        ("example.com:443", "https://example.com", True),
        ("example.com", "https://example.com:443", True),
        ("example.com:80", "http://example.com", True),
        ("EXAMPLE.com", "https://example.COM", True),
        ("example.com:8443", "https://example.com", False),
        ("example.com", "https://example.com.evil.example", False),
    ],
)
async def test_an_own_origin_may_leave_its_port_out(
    settings: Make, host: str, origin: str, admitted: bool
) -> None:
    """PROTOCOL.md, Origin: the service's own host, ports 80 and 443 left out or not."""
    async with Service(settings(allowed_hosts="*")) as service:
        headers = {"Host": host, "Origin": origin}
        answer = await service.http("POST", "/api/users/alice/chats", {}, headers=headers)
        assert answer.status == (201 if admitted else 403)
        assert await handshake(service, host, origin) == (0 if admitted else 4403)


async def test_a_listed_origin_is_found_whatever_its_capitals(settings: Make) -> None:
    """Capitals and default ports in ALLOWED_ORIGINS don't matter; the listed one gets CORS."""
    async with Service(settings(allowed_origins="HTTPS://Chat.Example:443")) as service:
        headers = {"Origin": "https://chat.example"}
        answer = await service.http("POST", "/api/chats", {"user_id": 7}, headers=headers)
        assert (answer.status, answer.json["user_id"]) == (201, "7")
        assert answer.headers["Access-Control-Allow-Origin"] == "https://chat.example"


@pytest.mark.parametrize("odd", ["https://*.example.com", "https://a*", "https://a.example,*b"])
async def test_a_star_inside_an_origin_stops_the_start(tmp_path: Path, odd: str) -> None:
    """PROTOCOL.md, Origin: it would never match; one sentence names the variable."""
    refused = await Process(tmp_path, ALLOWED_ORIGINS=odd).start()
    try:
        status, out, err = await refused.ended()
    finally:
        await refused.__aexit__()  # where it has not ended
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("chat_app: ALLOWED_ORIGINS")


# --- A file of version 1.0.0, and other things of the file ---

# schema.sql as it was, but for three line breaks
OLD_SCHEMA = """
-- The whole database. chat_app.py runs this file once, on an empty database, in one transaction.
-- Ids are never used twice (AUTOINCREMENT): a link to a deleted chat can't open somebody else's.
-- Timestamps are text as on the wire (PROTOCOL.md): they sort as they read.

CREATE TABLE chats (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    user_id    TEXT NOT NULL,
    title      TEXT NOT NULL DEFAULT '',
    created_at TEXT NOT NULL,
    updated_at TEXT NOT NULL
) STRICT;

-- A user's chats, newest activity first.
CREATE INDEX chats_by_activity ON chats (user_id, updated_at, id);

-- A message and its reply are inserted together, the reply right after it: ids are in
-- conversation order.
CREATE TABLE messages (
    id                INTEGER PRIMARY KEY AUTOINCREMENT,
    chat_id           INTEGER NOT NULL
                      REFERENCES chats (id) ON DELETE CASCADE,
    user_id           TEXT NOT NULL,  -- the chat's owner: tasks and searches are theirs alone
    content           TEXT NOT NULL,
    is_ai             INTEGER NOT NULL CHECK (is_ai IN (0, 1)),
    timestamp         TEXT NOT NULL,
    status            TEXT NOT NULL
                      CHECK (status IN
                      ('complete', 'streaming', 'aborted', 'failed', 'interrupted')),
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
-- What runs or waits: a few rows at any time. Admission counts them, recovery ends them.
CREATE INDEX streaming ON messages (status, chat_id) WHERE status = 'streaming';

-- Promise 9: what was sent under a client_msg_id. It outlives the message, so that a retry
-- after the chat was deleted is not billed a second time.
CREATE TABLE sends (
    user_id       TEXT NOT NULL,
    client_msg_id TEXT NOT NULL,
    message_id    INTEGER NOT NULL,
    PRIMARY KEY (user_id, client_msg_id)
) STRICT, WITHOUT ROWID;

-- Full-text search. The index holds no text of its own; the owner is one token, so that a
-- search never walks through other users' hits. Only finished text is in it.
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
OLD_ROWS = """
INSERT INTO chats VALUES
    (1, 'alice', 'Old', '2026-01-01T00:00:00.000Z', '2026-01-02T00:00:00.000Z'),
    (2, 'bob', '', '2026-01-01T00:00:00.000Z', '2026-01-01T00:00:00.000Z');
INSERT INTO messages VALUES
    (1, 1, 'alice', 'One', 0, '2026-01-01T00:00:01.000Z', 'complete',
     '00000000-0000-4000-8000-000000000001', NULL, NULL, 'm1', NULL, NULL, NULL),
    (2, 1, 'alice', 'Answer', 1, '2026-01-01T00:00:01.000Z', 'complete',
     '00000000-0000-4000-8000-000000000001', 1, 'stop', NULL, 'gpt', 7, 3),
    (3, 1, 'alice', 'Two', 0, '2026-01-01T00:00:02.000Z', 'complete',
     '00000000-0000-4000-8000-000000000002', NULL, NULL, NULL, NULL, NULL, NULL),
    (4, 1, 'alice', 'Stopp', 1, '2026-01-01T00:00:02.000Z', 'aborted',
     '00000000-0000-4000-8000-000000000002', 3, NULL, NULL, 'gpt', NULL, NULL),
    (5, 1, 'alice', 'Three', 0, '2026-01-01T00:00:03.000Z', 'complete',
     '00000000-0000-4000-8000-000000000003', NULL, NULL, NULL, NULL, NULL, NULL),
    (6, 1, 'alice', '', 1, '2026-01-01T00:00:03.000Z', 'failed',
     '00000000-0000-4000-8000-000000000003', 5, 'model_error', NULL, NULL, NULL, NULL),
    (7, 1, 'alice', 'Four', 0, '2026-01-01T00:00:04.000Z', 'complete',
     '00000000-0000-4000-8000-000000000004', NULL, NULL, NULL, NULL, NULL, NULL),
    (8, 1, 'alice', 'Cut', 1, '2026-01-01T00:00:04.000Z', 'interrupted',
     '00000000-0000-4000-8000-000000000004', 7, NULL, NULL, 'gpt', NULL, NULL),
    (9, 1, 'alice', 'Five', 0, '2026-01-01T00:00:05.000Z', 'complete',
     '00000000-0000-4000-8000-000000000005', NULL, NULL, NULL, NULL, NULL, NULL),
    (10, 1, 'alice', 'Half', 1, '2026-01-01T00:00:05.000Z', 'streaming',
     '00000000-0000-4000-8000-000000000005', 9, NULL, NULL, 'gpt', NULL, NULL);
INSERT INTO sends VALUES ('alice', 'm1', 1);
"""


async def test_a_file_of_version_1_0_0_opens_with_everything(
    settings: Make, tmp_path: Path, upstream: Upstream
) -> None:
    """Issue 14: all chats and messages are there, with the new fields null; what it left
    streaming is `interrupted`; search, retries and the conversation go on."""
    with contextlib.closing(sqlite3.connect(tmp_path / "chat.db")) as old:
        old.executescript(OLD_SCHEMA + OLD_ROWS)
    async with Service(settings()) as service:
        chat = (await service.http("GET", "/api/chats/1")).json
        assert (chat["title"], chat["model"], chat["instructions"]) == ("Old", None, None)
        shown = [(m["content"], m["status"], m["reasoning"]) for m in chat["messages"][1::2]]
        assert shown == [
            ("Answer", "complete", None),
            ("Stopp", "aborted", None),
            ("", "failed", None),
            ("Cut", "interrupted", None),
            ("Half", "interrupted", None),
        ]
        assert [m["replaces"] for m in chat["messages"]] == [None] * 10
        assert chat["messages"][1]["prompt_tokens"] == 7
        for word in ("answer", "stopp", "half"):
            found = (await service.http("GET", f"/api/users/alice/search?q={word}")).json
            assert len(found) == 1, word
        async with service.connect() as client:
            echo = await client.say("One", chat_id=1, client_msg_id="m1")
            assert echo["id"] == 1
        await post(service, 1, "Zwei", replaces=3)
        assert last_prompt(upstream) == ["One", "Answer", "Zwei"]
        listed = (await service.http("GET", "/api/users/bob/chats")).json
        assert [c["id"] for c in listed] == [2]


async def test_a_chats_activity_never_goes_back(service: Service) -> None:
    """PROTOCOL.md, Chat.updated_at: it moves, but never back, whatever the clock does."""
    chat_id = await service.new_chat()
    ahead = "2999-01-01T00:00:00.000Z"
    with contextlib.closing(sqlite3.connect(service.database)) as db, db:
        db.execute("UPDATE chats SET updated_at = ?", (ahead,))
    await post(service, chat_id)
    changed = await service.http("PATCH", f"/api/chats/{chat_id}", {"title": "New"})
    assert changed.json["updated_at"] >= ahead


async def test_a_page_of_history_is_bounded(settings: Make, upstream: Upstream) -> None:
    """PROTOCOL.md, GET of a chat: fewer messages where they would be over 2 million characters,
    one at least; `before` finds the rest."""
    upstream.scripts = [says("x" * 900_000)] * 3 + [says("y" * 2_100_000)]
    async with Service(settings(max_reply_chars=3_000_000)) as service:
        chat_id, _ = await conversation(service, "One", "Two", "Three", "Four")
        ids: list[int] = []
        query = ""
        more = True
        while more:
            page = (await service.http("GET", f"/api/chats/{chat_id}?limit=1000{query}")).json
            sizes = [len(m["content"]) for m in page["messages"]]
            assert sum(sizes) <= 2_000_000 or len(sizes) == 1
            ids = [m["id"] for m in page["messages"]] + ids
            query = f"&before={ids[0]}"
            more = page["has_more"]
        assert ids == list(range(ids[0], ids[0] + 8))


# --- The command line ---


async def test_the_command_line_helps(tmp_path: Path) -> None:
    """`--help` and `--version` are answers, on standard output with status 0."""
    for argument, told in (("--help", "backup"), ("--version", "1.")):
        process = await Process(tmp_path).start(argument)
        status, out, err = await process.ended()
        assert (status, err) == (0, "")
        assert told in out
    assert not process.database.exists(), "nothing is made"


async def test_a_backup_is_made_while_the_service_runs(
    process: Callable[..., Process], tmp_path: Path
) -> None:
    """`backup FILE` is SQLite's own backup: a whole file, of what was committed; a service
    opens it."""
    async with process() as running:
        chat_id = await running.new_chat(title="Kept")
        await post(running, chat_id)
        copy = tmp_path / "copy" / "chat.db"
        copy.parent.mkdir()
        status, _, err = await (await process().start("backup", str(copy))).ended()
        assert (status, err) == (0, "")
        await post(running, chat_id, "Still here")
    with contextlib.closing(sqlite3.connect(copy)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert db.execute("SELECT title FROM chats").fetchall() == [("Kept",)]
        assert db.execute("SELECT count(*) FROM messages").fetchone() == (2,)


# --- A client of the starred rows ---


async def test_a_client_of_the_starred_rows_works_beside_the_new_ones(
    service: Service, upstream: Upstream
) -> None:
    """PROTOCOL.md: it ignores what it doesn't know, and what it knows means what it meant: its
    tokens joined are the text, also where the model thinks aloud."""
    thinking = Thinking("Hm", "m", text=("4", "2"))
    thinking.go.set()
    upstream.scripts = [thinking]
    chat = await service.http("POST", "/api/chats", {"user_id": "alice", "title": "T"})
    async with service.connect() as client:
        await client.send("send_message", chat_id=chat.json["id"], content="Hi")
        reply = await client.reply()
        tokens = [frame["token"] for frame in client.frames if frame["type"] == "token"]
        assert "".join(tokens) == reply["content"] == "42"
    shown = (await service.http("GET", f"/api/chats/{chat.json['id']}")).json["messages"]
    assert [(m["content"], m["is_ai"]) for m in shown] == [("Hi", False), ("42", True)]
