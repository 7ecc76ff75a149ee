"""The page's new chapter: what people do on it. To be appended to test_chat_app.py."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest
from axe_playwright_python.async_playwright import Axe  # type: ignore[import-untyped]
from playwright.async_api import Locator, Page, expect

from test_chat_app import (
    DESKTOP,
    LIMIT,
    PHONE,
    SECRET,
    UNKNOWN,
    Exchange,
    Peer,
    Service,
    Tab,
    Upstream,
    ask,
    clean_environment,
    echo,
    hold,
    is_online,
    refuse_400,
    reply,
    says,
    service,
    settings,
    shows,
    tab,
    token,
    upstream,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from chat_app import Settings

__all__ = ["clean_environment", "service", "settings", "tab", "upstream"]

# --- The page: what people do on it ---


class Proxy(Peer):
    """Serves a service under /chat/, strips that prefix, and can fall silent as a lost network."""

    def __init__(self, service: Peer) -> None:
        self.service = service
        self.heard = asyncio.Event()  # else nothing passes, and nothing is answered
        self.heard.set()
        self.upgrades = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()
        self.address = f"http://{host}:{port}/chat"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        ends = (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError)
        with contextlib.suppress(*ends):
            await self._relay(reader, writer)
        writer.close()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        method, path, rest = head.split(" ", 2)
        assert path.startswith("/chat/"), path
        if "\r\nUpgrade:" in rest:
            self.upgrades += 1
            await self.heard.wait()
        else:
            rest = re.sub("(?i)Connection: .*", "Connection: close", rest)
        address = self.service.address.removeprefix("http://").split(":")
        inward, outward = await asyncio.open_connection(*address)
        outward.write(f"{method} {path.removeprefix('/chat')} {rest}".encode())
        up = asyncio.create_task(self._pipe(reader, outward))
        try:
            await self._pipe(inward, writer)
        finally:
            up.cancel()
            await asyncio.gather(up, return_exceptions=True)
            outward.close()

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            if self.heard.is_set():
                writer.write(data)
                await writer.drain()


async def think(exchange: Exchange, *thoughts: str) -> None:
    for thought in thoughts:
        delta = {"reasoning_content": thought}
        await exchange.event({"choices": [{"index": 0, "delta": delta}]})


async def is_accessible(page: Page) -> None:
    """Check that axe-core finds nothing in the page as it is."""
    found = (await Axe().run(page)).response["violations"]
    assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found] == []


def asked(page: Page, number: int = -1) -> Locator:
    return page.locator("#messages > .message.user").nth(number)


def composer(page: Page) -> Locator:
    return page.locator("#composer")


async def test_the_first_visit_is_a_new_chat_under_a_name_that_is_kept(
    service: Service, tab: Tab
) -> None:
    """Without a token to ask for nobody is asked who they are."""
    async with tab(service, "/") as page:
        await is_online(page)
        await expect(page.locator("#sign-in")).to_be_hidden()
        await expect(page.locator("#title")).to_have_text("New chat")
        await expect(composer(page)).to_be_focused()
        name = await page.inner_text("#who")
        assert re.fullmatch("guest-[0-9a-f-]{13}", name)
        await ask(page, "Good morning!")
        await shows(page, "Hello, world", "complete")
        await page.goto(f"{service.address}/")
        await expect(page.locator("#who")).to_have_text(name)
        await expect(page.locator("#chats a")).to_contain_text(["Good morning!"])
    assert service.stored("SELECT DISTINCT user_id FROM chats") == [(name,)]


RICH = """\
# Plan

### Details

| Name | Remark |
|:-----|:-------|
| Tea  | first<br>second |
| Milk | A remark of some length, that should not be broken into one word a line |

```python
def double(x):  # twice
    return "2" * x
```"""


async def test_axe_finds_nothing(service: Service, upstream: Upstream, tab: Tab) -> None:
    """A new chat, a conversation with a table, code and headings, the search, and the dialogs, in
    the light and in the dark."""
    upstream.scripts = [echo]
    async with tab(service, color_scheme="light", **DESKTOP) as page:
        await is_online(page)
        await is_accessible(page)
        await ask(page, RICH)
        await shows(page, re.compile("Plan"), "complete")
        await is_accessible(page)
        await page.emulate_media(color_scheme="dark")
        await is_accessible(page)
        await asked(page).get_by_label("Edit message").click()
        await is_accessible(page)
        await page.keyboard.press("Escape")
        await page.fill("#search", "remark")
        await expect(page.locator("#results mark").first).to_be_visible()
        await is_accessible(page)
        await page.fill("#search", "")
        await page.click("#help")
        await is_accessible(page)
        await page.keyboard.press("Escape")


async def test_the_settings_of_a_chat_are_chosen(
    settings: Callable[..., Settings], upstream: Upstream, tab: Tab
) -> None:
    """GET /api/models and PATCH: a chat's model and instructions reach the model; for a new chat
    they make it. Axe finds nothing in the dialog."""
    async with Service(settings(models="large")) as running, tab(running) as page:
        await is_online(page)
        for model, text in [("", "Be kind"), ("large", "Be brief")]:
            await page.click("#settings-open")
            await is_accessible(page)
            await page.select_option("#model", model)
            await page.fill("#instructions", text)
            await page.get_by_role("button", name="Save").click()
            await expect(page.locator("#settings")).to_be_hidden()
            await expect(page.locator("#chats li.open")).to_have_count(1)
            await page.click("#settings-open")
            await expect(page.locator("#model")).to_have_value(model)
            await expect(page.locator("#instructions")).to_have_value(text)
            await page.click("#settings-cancel")
        stored = running.stored("SELECT model, instructions FROM chats")
        assert stored == [("large", "Be brief")]
        await ask(page, "Hello")
        await shows(page, "Hello, world", "complete")
    asked_for = (await upstream.exchange()).body
    assert asked_for["model"] == "large"
    assert "Be brief" in asked_for["messages"][0]["content"]


async def test_a_message_is_edited_and_sent_again(
    service: Service, upstream: Upstream, tab: Tab
) -> None:
    """`replaces`: the new version takes the place of the earlier one and of what followed, which
    can be unfolded and stays so in every tab and after a reload."""
    upstream.scripts = [echo] * 4
    async with tab(service) as page, tab(service) as other:
        for text in ["one", "two"]:
            await ask(page, text)
            await shows(page, text, "complete")
        await other.click("#chats a")
        await asked(page, 0).get_by_label("Edit message").click()
        await expect(page.get_by_role("textbox", name="Edit message")).to_be_focused()
        await page.keyboard.press("Escape")
        await expect(page.locator("form.edit")).to_have_count(0)
        for number, text in [(1, "uno"), (2, "eins")]:
            await asked(page, 0).get_by_label("Edit message").click()
            await page.fill(".edit textarea", text)
            await page.press(".edit textarea", "Enter")
            await shows(page, text, "complete")
            for seen in (page, other):
                summary = seen.locator("#messages > details > summary")
                await expect(summary).to_have_text(f"Earlier versions ({number})")
                await expect(seen.locator("#messages > .message .body")).to_have_text([text] * 2)
        await page.reload()
        await page.click("#messages > details > summary")
        await expect(page.locator("#messages details .body")).to_have_text(
            ["one", "one", "two", "two", "uno", "uno"]
        )
        await is_accessible(page)
    assert upstream.prompts[-1][-1]["content"] == "eins"
    assert "one" not in str(upstream.prompts[-1])


async def test_what_the_model_thinks_aloud_is_folded(
    service: Service, upstream: Upstream, tab: Tab
) -> None:
    """`reasoning`: it streams, says how long it took, and is there after a reload, without."""
    upstream.scripts = [hold]
    async with tab(service) as page:
        await ask(page, "Think!")
        model = await upstream.exchange()
        await model.start()
        await think(model, "Let me ")
        summary = reply(page).locator(".thinking summary")
        thoughts = reply(page).locator(".thinking div")
        await expect(summary).to_have_text("Thinking")
        await expect(thoughts).to_be_hidden()
        await is_accessible(page)
        await summary.click()
        await expect(thoughts).to_have_text("Let me ")
        await think(model, "see.")
        await expect(thoughts).to_have_text("Let me see.")
        await page.reload()
        await expect(thoughts).to_have_text("Let me see.")
        await think(model, " Yes.")
        await model.say("Hello")
        await model.finish()
        await shows(page, "Hello", "complete")
        await expect(summary).to_have_text(re.compile(r"Thought for \d+ s"))
        await page.reload()
        await expect(summary).to_have_text("Thoughts")
        await expect(thoughts).to_have_text("Let me see. Yes.")


async def test_a_failed_reply_that_is_not_the_last_can_be_had_again(
    service: Service, upstream: Upstream, tab: Tab
) -> None:
    """Its question is sent again in its own place."""
    upstream.scripts = [refuse_400, says("second"), echo]
    async with tab(service) as page:
        await ask(page, "first")
        await shows(page, "", "failed")
        await ask(page, "second")
        await shows(page, "second", "complete")
        await reply(page, 0).get_by_role("button", name="Try again").click()
        await expect(page.locator("#messages > .message .body")).to_have_text(["first"] * 2)
        await expect(page.locator("#messages > details")).to_have_count(1)


async def test_a_message_is_copied_and_a_chat_saved_as_markdown(
    service: Service, upstream: Upstream, tab: Tab
) -> None:
    """Each message has its Copy; the export is a file with what is on the page. What a reply
    cost is read on hover."""
    upstream.scripts = [echo]
    async with tab(service) as page:
        await page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        await ask(page, "**Hello** there")
        await shows(page, "Hello there", "complete")
        await asked(page).get_by_label("Copy").click()
        await expect(asked(page).get_by_label("Copied")).to_be_visible()
        assert await page.evaluate("navigator.clipboard.readText()") == "**Hello** there"
        await reply(page).hover()
        await expect(reply(page).locator(".usage")).to_have_css("opacity", "1")
        await expect(reply(page).locator(".usage")).to_have_text("scripted-1 · tokens: 7 in, 3 out")
        await page.click("#settings-open")
        async with page.expect_download() as download:
            await page.click("#export")
        path: Path = await (await download.value).path()
        text = "**Hello** there"
        assert (
            await asyncio.to_thread(path.read_text, "utf-8")
            == f"# {text}\n\n## You\n\n{text}\n\n## Reply\n\n{text}\n"
        )


async def test_a_draft_belongs_to_its_chat(service: Service, tab: Tab) -> None:
    """What is being written stays where it is written, also over a reload, and goes along into
    the chat that a new one becomes."""
    async with tab(service) as page:
        await is_online(page)
        await ask(page, "Apples")
        await shows(page, "Hello, world", "complete")
        await page.fill("#composer", "about apples")
        await page.click("#new-chat")
        await expect(composer(page)).to_have_value("")
        await page.fill("#composer", "something new")
        await page.reload()
        await expect(composer(page)).to_have_value("something new")
        await page.click("#chats a")
        await expect(composer(page)).to_have_value("about apples")
        await page.reload()
        await expect(composer(page)).to_have_value("about apples")
        await composer(page).press("Enter")
        await shows(page, "Hello, world", "complete")
        await page.click("#new-chat")
        await expect(composer(page)).to_have_value("something new")
        await composer(page).press("Enter")
        await shows(page, "Hello, world", "complete")
        await page.click("#new-chat")
        await expect(composer(page)).to_have_value("")


ENTER_OF_SAFARI = """(node) => node.dispatchEvent(new KeyboardEvent(
    "keydown", { key: "Enter", keyCode: 229, bubbles: true, cancelable: true }))"""


async def test_the_enter_that_ends_a_conversion_sends_nothing(service: Service, tab: Tab) -> None:
    """Safari gives it keyCode 229 and isComposing false."""
    async with tab(service) as page:
        await is_online(page)
        await page.fill("#composer", "日本語")
        assert await composer(page).evaluate(ENTER_OF_SAFARI)  # and the browser has its way
        await expect(composer(page)).to_have_value("日本語")
        await composer(page).press("Enter")
        await expect(asked(page).locator(".body")).to_have_text("日本語")


async def test_it_works_under_a_prefix_that_a_proxy_strips(service: Service, tab: Tab) -> None:
    """Every address is relative to the page, the next page of the list of chats included; the
    proxy and the fixture know of no other path."""
    for number in range(60):
        await service.new_chat(title=f"Chat {number}")
    async with Proxy(service) as proxy, tab(proxy) as page:
        await is_online(page)
        await expect(page.locator("#chats li")).to_have_count(50)
        await page.click("#more-chats")
        await expect(page.locator("#chats li")).to_have_count(60)
        await ask(page, "Hello")
        await shows(page, "Hello, world", "complete")


async def test_a_connection_that_died_without_a_word_is_noticed(service: Service, tab: Tab) -> None:
    """`ping`: every 25 s and when the page is seen again; without a pong for 5 s it reconnects,
    and a handshake gets 10 s."""
    async with Proxy(service) as proxy, tab(proxy) as page:
        sent: list[Any] = []
        page.on("websocket", lambda ws: ws.on("framesent", lambda data: sent.extend([data])))
        await page.clock.install()
        await page.reload()
        await is_online(page)
        sent.clear()
        await page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        async with asyncio.timeout(LIMIT):
            while not sent:
                await page.evaluate("1")
        assert sent == ['{"action":"ping"}']
        await page.clock.fast_forward(6_000)
        await is_online(page)
        proxy.heard.clear()
        before = proxy.upgrades
        await page.clock.fast_forward(26_000)
        await is_online(page)
        await page.clock.fast_forward(6_000)
        await expect(page.locator("#state")).to_have_text("Connecting…")
        await page.clock.fast_forward(11_000)
        async with asyncio.timeout(LIMIT):
            while proxy.upgrades < before + 2:
                await page.evaluate("1")
        proxy.heard.set()
        await is_online(page)
        await ask(page, "Are you there?")
        await shows(page, "Hello, world", "complete")


async def test_formulas_line_breaks_in_cells_and_wide_tables(
    service: Service, upstream: Upstream, tab: Tab
) -> None:
    r"""`\(E = mc^2\)` keeps its backslashes, `<br>` in a cell breaks the line, a cell holds words
    beside each other, code is coloured and unchanged."""
    formulas = r"So \(E_1 = m*c*\), \[x_1 * y_1 * z\], $$a_1 _b_$$ and \(never closed."
    upstream.scripts = [echo, echo]
    async with tab(service, **DESKTOP) as page:
        await ask(page, RICH)
        await shows(page, re.compile("Plan"), "complete")
        body = reply(page).locator(".body")
        await expect(body.locator("h2, h3")).to_have_text(["Plan", "Details"])
        assert await body.locator("td").nth(1).inner_text() == "first\nsecond"
        heights = await body.locator("tr").evaluate_all("(all) => all.map((tr) => tr.offsetHeight)")
        assert heights[2] < 100
        await expect(body.locator(".code-keyword")).to_have_text(["def", "return"])
        await expect(body.locator(".code-comment")).to_have_text("# twice")
        code = 'def double(x):  # twice\n    return "2" * x'
        assert await body.locator("pre").text_content() == code
        await ask(page, formulas)
        await shows(page, formulas.replace(r"\(never", "(never"), "complete")


async def test_the_search_shows_what_it_found(
    service: Service, upstream: Upstream, tab: Tab
) -> None:
    """The word is marked and in the lines that are shown; titles of chats are found as well."""
    upstream.scripts = [echo]
    await service.new_chat(title="A needle in a title")
    async with tab(service, **DESKTOP) as page:
        await ask(page, "some hay " * 40 + "Needle " + "more hay " * 40)
        await shows(page, re.compile("Needle"), "complete")
        await page.fill("#search", "needle")
        await expect(page.locator("#results a")).to_have_count(3)
        await expect(page.locator("#results a").first).to_have_text("A needle in a title")
        marks = page.locator("#results mark")
        await expect(marks).to_have_text(["needle", "Needle", "Needle"])
        for mark in await marks.all():
            await expect(mark).to_be_in_viewport(ratio=1)
            inside = "(m) => m.offsetTop + m.offsetHeight <= m.closest('a').parentElement.offsetTop"
            assert await mark.evaluate(f"{inside} + m.closest('li').offsetHeight")


SMALL = """() => [...document.querySelectorAll("button, select, input, summary, nav li a")]
    .filter((node) => node.checkVisibility() && Math.min(node.offsetHeight, 44) < 44)
    .map((node) => node.outerHTML)"""


async def test_fingers_have_room_and_enter_breaks_the_line(service: Service, tab: Tab) -> None:
    """On a touch device the keyboard stays away until it is wanted; all buttons are 44 pixels
    high, and axe finds nothing."""
    async with tab(service, **PHONE) as page:
        await is_online(page)
        await expect(composer(page)).not_to_be_focused()
        await page.tap("#composer")
        await page.keyboard.type("Line one")
        await page.keyboard.press("Enter")
        await page.keyboard.type("line two")
        await expect(composer(page)).to_have_value("Line one\nline two")
        await page.tap("#send")
        await shows(page, "Hello, world", "complete")
        assert await page.evaluate(SMALL) == []
        await is_accessible(page)
        await page.tap("#menu")
        assert await page.evaluate(SMALL) == []
        await is_accessible(page)


async def test_the_theme_is_the_systems_or_chosen(service: Service, tab: Tab) -> None:
    async with tab(service, color_scheme="dark") as page:
        dark, light = "rgb(23, 24, 27)", "rgb(252, 252, 250)"
        body = page.locator("body")
        await expect(body).to_have_css("background-color", dark)
        for chosen, ground in [("light", light), ("dark", dark), ("", dark), ("light", light)]:
            await page.select_option("#theme", chosen)
            await expect(body).to_have_css("background-color", ground)
        await page.reload()
        await expect(body).to_have_css("background-color", light)
        await expect(page.locator("#theme")).to_have_value("light")


async def test_shortcuts_are_shown_by_a_question_mark(service: Service, tab: Tab) -> None:
    """But not where one is writing."""
    async with tab(service) as page:
        await is_online(page)
        await page.focus("#composer")
        await page.keyboard.type("What?")
        await expect(page.locator("#shortcuts")).to_be_hidden()
        await page.fill("#composer", "")
        await ask(page, "Hello")
        await shows(page, "Hello, world", "complete")
        await composer(page).press("ArrowUp")
        await expect(page.locator(".edit textarea")).to_have_value("Hello")
        await page.keyboard.press("Escape")
        await expect(composer(page)).to_be_focused()
        await page.focus("#messages")
        await page.keyboard.press("?")
        await expect(page.locator("#shortcuts")).to_be_visible()
        await page.keyboard.press("Escape")
        await expect(page.locator("#shortcuts")).to_be_hidden()
        await page.keyboard.press("/")
        await expect(page.locator("#search")).to_be_focused()


async def test_print_shows_everything(service: Service, tab: Tab) -> None:
    """The whole conversation, however long, and nothing that can only be clicked."""
    async with tab(service) as page:
        await ask(page, "\n".join(f"Line {number}" for number in range(200)))
        await shows(page, "Hello, world", "complete")
        await page.emulate_media(media="print")
        await expect(page.locator("nav")).to_be_hidden()
        await expect(page.locator("#write")).to_be_hidden()
        look = "(log) => log.scrollHeight === log.clientHeight && log.clientHeight > 4000"
        assert await page.locator("#messages").evaluate(look)


OPENER = """(token) => new Promise((resolve) => {
    const opened = window.open("/");
    onmessage = ({ data }) => {
        if (data.type !== "chat-token?") return;
        opened.postMessage({ type: "chat-token", token }, location.origin);
        resolve();
    };
})"""


async def test_a_sign_in_lasts_and_can_be_handed_over(
    settings: Callable[..., Settings], tab: Tab
) -> None:
    """By `#token=` in the address, which is gone at once; from another tab of the browser; by
    postMessage from the page that opened this one."""
    async with (
        Service(settings(jwt_secret=SECRET)) as running,
        tab(running, f"/#token={token('zoë')}", forgive=f"{UNKNOWN}|404") as page,
    ):
        await expect(page.locator("#who")).to_have_text("zoë")
        await is_online(page)
        assert page.url == f"{running.address}/"
        other = await page.context.new_page()
        await other.goto(running.address)
        await expect(other.locator("#who")).to_have_text("zoë")
        await is_online(other)
        await page.close()
        await other.goto(f"{running.address}/health")
        await other.evaluate("sessionStorage.clear()")
        async with other.expect_popup() as popup:
            await other.evaluate(OPENER, token("ada"))
        opened = await popup.value
        await expect(opened.locator("#who")).to_have_text("ada")
        await is_online(opened)


RIDDLE = "A bat and a ball cost €1.10; the bat costs a euro more than the ball. What is the ball?"


@pytest.mark.skipif("SCREENSHOTS" not in os.environ, reason="SCREENSHOTS names no folder")
async def test_more_pictures_for_the_readme(service: Service, upstream: Upstream, tab: Tab) -> None:
    """Thinking aloud, unfolded, on a phone in the dark; an edited message with its earlier version
    ."""
    folder = Path(os.environ["SCREENSHOTS"])
    answer = "**5 cents.** The bat is then €1.05, and together they are €1.10."

    async def ponders(exchange: Exchange) -> None:
        await exchange.start()
        await think(exchange, "If the ball were 10 cents, the bat would be €1.10, and both €1.20: ")
        await think(exchange, "too much. So x + (x + 1) = 1.10, and x = 0.05.")
        await exchange.say(answer)
        await exchange.finish()

    upstream.scripts = [says("10 cents."), ponders]
    await service.new_chat("ada", "Trip to Lisbon in May")
    chat_id = await service.new_chat("ada", "A riddle")
    path = f"/?user=ada#{chat_id}"
    async with (
        tab(service, path, **DESKTOP) as desktop,
        tab(service, path, **PHONE, color_scheme="dark") as phone,
    ):
        await ask(desktop, "What is the ball, if both are €1.10?")
        await shows(desktop, "10 cents.", "complete")
        await asked(desktop).get_by_label("Edit message").click()
        await desktop.fill(".edit textarea", RIDDLE)
        await desktop.press(".edit textarea", "Enter")
        for page, name in [(desktop, "editing"), (phone, "thinking")]:
            await shows(page, re.compile("5 cents"), "complete")
            await reply(page).locator(".thinking summary").click()
            if page is desktop:
                await page.click("#messages > details > summary")
                await asked(page).hover()
            picture = folder / f"{name}.png"
            await page.screenshot(path=picture, animations="disabled")
            assert picture.stat().st_size < 150_000
