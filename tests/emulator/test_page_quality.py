"""The page at `/`: nothing that an agent says becomes markup, keys get everywhere, five hundred sessions stay quick."""

from __future__ import annotations

import re
import time
from itertools import product

import pytest
from playwright.sync_api import Page, expect

from tests.emulator.browser import PATIENCE_MILLISECONDS, Open, chromium, open_page
from tests.emulator.support import result
from tests.emulator.test_webhooks import Receiver, receiver
from tools.emulator import Emulator, Step, call, custom, delegate, end, error, repeat_output, say, tools

__all__ = ["chromium", "open_page", "receiver"]  # fixtures
expect.set_options(timeout=PATIENCE_MILLISECONDS)

HOSTILE = (
    """<img src=x onerror="window.hit=1"><script>window.hit=1</script>"'><svg/onload=window.hit=1>{{7*7}}&lt;b&gt;"""
)
VIEWS = ("/sessions", "/workers", "/webhooks", "/trouble")
CROWD = 500
WATCH_ROWS = """() => {
    window.touched = new Set();
    window.rows = [...document.querySelectorAll("#rows li")];
    const isOwn = ({ target, attributeName }) => attributeName !== "tabindex" && !target.classList?.contains("lease");
    const note = (record) => window.touched.add(record.target.closest?.("li")?.dataset.id ?? "the list");
    new MutationObserver((records) => records.filter(isOwn).forEach(note))
        .observe(document.getElementById("rows"), { subtree: true, childList: true, attributes: true });
}"""
"""Which rows change; leases count down in all of them."""


def test_what_agents_workers_and_people_say_is_text(emulator: Emulator, receiver: Receiver, open_page: Open) -> None:
    """In every place that shows something of theirs; the fixture also fails on any complaint of the browser's."""
    emulator.set_webhook_url(receiver.url)
    session_id = emulator.create_session(HOSTILE, {"note": HOSTILE})
    steps: list[Step] = [
        say(HOSTILE),
        tools(call(HOSTILE, command=HOSTILE), call("bash", permission="ask", **{HOSTILE: HOSTILE})),
        repeat_output,
        delegate(HOSTILE, HOSTILE, say(HOSTILE)),
        tools(custom(HOSTILE, text=HOSTILE)),
        error(HOSTILE),
        end(),
    ]
    emulator.set_script(session_id, steps)
    emulator.say(session_id, HOSTILE)
    with emulator.hold() as now:
        emulator._world.queue(emulator.environment_id).note_poll(HOSTILE, now)
    emulator.create_environment(HOSTILE)
    emulator.cut_stream(HOSTILE)
    page = open_page(f"/sessions/{session_id}")
    detail = page.locator("#detail")
    expect(detail.get_by_role("heading", name=HOSTILE)).to_be_visible()
    expect(detail.locator(".facts")).to_contain_text(HOSTILE)
    expect(detail.locator(".call")).to_have_count(2)
    first, asked = emulator.pending_calls(session_id)
    emulator.send(session_id, result(first, HOSTILE, is_error=True))
    deny = {"type": "user.tool_confirmation", "tool_use_id": asked, "result": "deny", "deny_message": HOSTILE}
    emulator.send(session_id, deny)
    expect(detail.locator(".call")).to_have_count(1)
    expect(detail.locator(".call")).to_contain_text(f"A tool of the client's own, {HOSTILE}")
    answer = {"type": "user.custom_tool_result", "custom_tool_use_id": emulator.pending_calls(session_id)[0]}
    emulator.send(session_id, {**answer, "content": [{"type": "text", "text": HOSTILE}]})
    expect(detail.locator('.events li[data-type="session.error"]')).to_contain_text(HOSTILE)
    for summary in detail.locator(".events summary").all():
        summary.click()
    for view in VIEWS:
        page.goto(f"{emulator.url}/#{view}")
        page.wait_for_timeout(50)
    expect(page.locator("#view-workers .workers").first).to_contain_text(HOSTILE)
    expect(page.locator("#view-trouble .faults")).to_contain_text(HOSTILE)
    assert page.locator("img, svg, main script, iframe, b").count() == 0
    assert page.evaluate("() => window.hit") is None


def test_the_keyboard_gets_everywhere(emulator: Emulator, open_page: Open) -> None:
    ids = [emulator.create_session(f"Session {number}") for number in range(5)]
    page = open_page()
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to the content")).to_be_focused()
    page.get_by_label("Filter sessions").focus()
    page.keyboard.press("ArrowDown")
    expect(page.get_by_role("link", name="Session 4")).to_be_focused()  # the youngest is on top
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    expect(page.get_by_role("link", name="Session 2")).to_be_focused()
    page.keyboard.press("End")
    expect(page.get_by_role("link", name="Session 0")).to_be_focused()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Session 1")).to_be_visible()
    assert page.url.endswith(ids[1])
    expect(page.locator('#rows a[tabindex="0"]')).to_have_count(1)  # one stop for the whole list
    expect(page.locator('#rows a[tabindex="0"]')).to_contain_text("Session 1")
    page.keyboard.press("Tab")
    expect(page.get_by_label("Message to the agent")).to_be_focused()
    page.get_by_role("button", name="New session").press("Enter")
    expect(page.get_by_label("Title")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="New session")).to_be_focused()
    page.get_by_label("Filter sessions").fill("session 3")
    page.keyboard.press("ArrowDown")
    expect(page.get_by_role("link", name="Session 3")).to_be_focused()


def test_everything_to_operate_has_a_name(emulator: Emulator, open_page: Open) -> None:
    session_id = emulator.create_session()
    emulator.set_script(session_id, [tools(call("bash", command="x", permission="ask"), custom("mine"))])
    emulator.say(session_id, "go")
    page = open_page(f"/sessions/{session_id}")
    expect(page.locator(".call")).to_have_count(2)
    for view in (f"/sessions/{session_id}", *VIEWS[1:]):
        page.goto(f"{emulator.url}/#{view}")
        named = page.evaluate(
            """() => [...document.querySelectorAll("button, a, input, select, summary")]
                .filter((each) => each.checkVisibility())
                .map((each) => [each.outerHTML.slice(0, 80),
                    (each.getAttribute("aria-label") ?? [...(each.labels ?? [])].map((one) => one.innerText).join()
                    ) || (["INPUT", "SELECT"].includes(each.tagName) ? "" : each.innerText)])"""
        )
        assert len(named) > 5
        assert [what for what, name in named if not name.strip()] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(open_page: Open, scheme: str) -> None:
    """WCAG AA, 4.5 to 1, of each colour that text has on each ground that it stands on."""
    page = open_page(scheme=scheme)
    pairs = [*product(("text", "muted", "accent", "bad"), ("ground", "surface", "sunken")), ("on-accent", "accent")]
    pairs += [(tone, f"{tone}-soft") for tone in ("good", "wait", "ask", "bad")] + [("text", "accent-soft")]
    pairs += [("muted", "accent-soft"), *product(("good",), ("ground", "sunken"))]
    colours: dict[str, str] = page.evaluate(
        """(names) => Object.fromEntries(names.map((name) =>
            [name, getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim()]))""",
        sorted({name for pair in pairs for name in pair}),
    )
    low = {pair: contrast(colours[pair[0]], colours[pair[1]]) for pair in pairs}
    assert {pair: ratio for pair, ratio in low.items() if ratio < 4.5} == {}


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    """Relative, of #rrggbb, as WCAG has it."""
    channels = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    red, green, blue = (one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("width", [360, 820, 1360])
def test_it_fits_every_width(emulator: Emulator, receiver: Receiver, open_page: Open, width: int) -> None:
    emulator.set_webhook_url(receiver.url)
    session_id = emulator.create_session("A title that goes on and on, longer than any phone is wide " * 3)
    emulator.say(session_id, "!echo " + "x" * 400)
    emulator.fault("work.ack", "lose_response", count=None)
    page = open_page(f"/sessions/{session_id}", size=(width, 800))
    expect(page.locator(".call")).to_be_visible()
    for view in (f"/sessions/{session_id}", *VIEWS):
        page.goto(f"{emulator.url}/#{view}")
        page.locator("main .view:not([hidden])").wait_for()
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width, view
    is_beside = width > 1080
    expect(page.locator("#view-trouble")).to_be_visible()
    page.goto(f"{emulator.url}/#/sessions/{session_id}")
    expect(page.get_by_label("Filter sessions")).to_be_visible(visible=is_beside)
    expect(page.get_by_role("link", name="All sessions")).to_be_visible(visible=not is_beside)


def test_a_tab_that_nobody_looks_at_gives_its_connections_back(emulator: Emulator, open_page: Open) -> None:
    session_id, gone = emulator.create_session("Seen"), emulator.create_session("Gone")
    page = open_page(f"/sessions/{session_id}")
    expect(page.locator("#detail h2")).to_have_text("Seen")
    look(page, is_hidden=True)
    expect(page.locator("#live")).to_have_text("paused")
    other = emulator.create_session("Meanwhile")
    emulator.delete_session(gone)
    emulator.say(session_id, "!ls")
    page.wait_for_timeout(300)
    assert page.locator(f'[data-id="{other}"]').count() == 0
    look(page, is_hidden=False)
    expect(page.locator(f'[data-id="{other}"]')).to_be_visible()
    expect(page.locator(f'[data-id="{gone}"]')).to_have_count(0)
    expect(page.locator("#detail .call")).to_be_visible()


def look(page: Page, *, is_hidden: bool) -> None:
    page.evaluate(
        """(value) => {
            Object.defineProperty(document, "hidden", {value, configurable: true});
            document.dispatchEvent(new Event("visibilitychange"));
        }""",
        is_hidden,
    )


def test_five_hundred_sessions(emulator: Emulator, open_page: Open) -> None:
    ids = []
    for number in range(CROWD):
        ids.append(emulator.create_session(f"Load {number:03}"))
        emulator.say(ids[-1], "!make")
        if number % 2:
            emulator.claim_and_die(ids[-1])
    page = open_page(f"/sessions/{ids[250]}")
    rows = page.locator("#rows li")
    expect(rows).to_have_count(CROWD)
    expect(page.locator(f'#rows [data-id="{ids[250]}"]')).to_be_in_viewport()  # the chosen one is scrolled to

    # One session goes on: one row is touched, and nothing is made anew.
    page.evaluate(WATCH_ROWS)
    emulator.send(ids[7], result(emulator.pending_calls(ids[7])[0]))
    row = page.locator(f'#rows [data-id="{ids[7]}"]')
    expect(row).to_contain_text("idle")
    assert page.evaluate("() => [...window.touched]") == [ids[7]]

    # All of them go on, some times over: the page keeps up, with the rows it had, and never freezes for long.
    page.evaluate(
        """() => {
            window.frozen = [];
            new PerformanceObserver((list) => window.frozen.push(...list.getEntries().map((each) => each.duration)))
                .observe({entryTypes: ["longtask"]});
        }"""
    )
    for _ in range(3):
        for session_id in ids:
            for call_id in emulator.pending_calls(session_id):
                emulator.send(session_id, result(call_id))
            emulator.say(session_id, "!again")
    last = str(len(emulator.events(ids[3])))
    expect(page.locator(f'#rows [data-id="{ids[3]}"] .event-count')).to_have_text(last)
    assert page.evaluate('() => [...document.querySelectorAll("#rows li")].every((row, index) => row === rows[index])')
    assert max(page.evaluate("() => window.frozen"), default=0) < 10_000  # ms, also on a busy machine

    # The filter, by words of the title or a part of an id, and with the chips.
    began = time.monotonic()
    page.get_by_label("Filter sessions").fill("load 12")
    expect(page.locator("#rows li:not([hidden])")).to_have_count(10)
    assert time.monotonic() - began < 10
    page.get_by_role("button", name=re.compile("^Queued")).click()
    expect(page.locator("#rows li:not([hidden])")).to_have_count(5)
    page.get_by_role("button", name=re.compile("^All")).click()
    page.get_by_label("Filter sessions").fill(ids[42][:20])
    expect(page.locator("#rows li:not([hidden])")).to_have_count(1)
    page.get_by_label("Filter sessions").fill("no such thing")
    expect(page.get_by_text("No session matches.")).to_be_visible()
