"""The page at `/`, in a real browser: what it shows, live, and what a person can do on it."""

from __future__ import annotations

import re
import time
from typing import Any

from playwright.sync_api import Browser, Locator, Page, expect

from tests.emulator.browser import LIVE, PATIENCE_MILLISECONDS, Open, chromium, load, open_page
from tests.emulator.support import result
from tests.emulator.test_webhooks import Receiver, receiver
from tools.emulator import Emulator, call, custom, delegate, end, error, repeat_output, say, tools

__all__ = ["chromium", "open_page", "receiver"]  # fixtures
expect.set_options(timeout=PATIENCE_MILLISECONDS)


def row(page: Page, session_id: str) -> Locator:
    return page.locator(f'#rows li[data-id="{session_id}"]')


def detail(page: Page) -> Locator:
    return page.locator("#detail")


def expect_steps(page: Page, *names: str) -> None:
    """Of the last round."""
    expect(detail(page).locator(".steps").first.locator(".step-name")).to_have_text(list(names))


def waits(page: Page, what: Any) -> None:
    """Until something in this process is true; the browser goes on meanwhile."""
    deadline = time.monotonic() + PATIENCE_MILLISECONDS / 1000
    while not what():
        assert time.monotonic() < deadline, "it never came true"
        page.wait_for_timeout(25)


# What it shows


def test_a_session_as_it_goes(emulator: Emulator, open_page: Open) -> None:
    page = open_page()
    expect(page.locator("#no-rows")).to_have_text("No sessions yet. Make one here, or with the API.")
    session_id = emulator.create_session("Say the date")
    expect(row(page, session_id)).to_contain_text("Say the date")
    expect(row(page, session_id)).to_contain_text("idle")
    expect(row(page, session_id)).to_contain_text("queued")
    row(page, session_id).click()
    expect(page).to_have_url(re.compile(rf"#/sessions/{session_id}$"))

    emulator.say(session_id, "!date")
    expect(row(page, session_id)).to_contain_text("waits for a tool")
    expect(detail(page).locator(".call")).to_contain_text("bash waits for a worker")
    emulator.claim_and_die(session_id)
    expect(row(page, session_id)).to_contain_text("active")
    emulator.send(session_id, result(emulator.pending_calls(session_id)[0], "it is noon"))
    expect(detail(page).locator(".call")).to_have_count(0)
    expect(detail(page).locator('.events li[data-type="user.tool_result"]')).to_contain_text("it is noon")
    emulator.stop_work(session_id, force=True)
    expect(row(page, session_id)).to_contain_text("stopped")
    names = ("created", "first tool", "reserved", "acked", "claimed", "first result", "idle", "stopped")
    expect_steps(page, *names)

    shown = detail(page).locator(".events > li").count()
    assert shown == len(emulator.events(session_id))
    types = detail(page).locator(".event-type").all_inner_texts()
    assert types[::-1] == [event["type"] for event in emulator.events(session_id)]  # the newest on top


def test_another_message_is_another_round(emulator: Emulator, open_page: Open) -> None:
    session_id = emulator.create_session()
    emulator.stop_work(session_id, force=True)
    page = open_page(f"/sessions/{session_id}")
    expect(detail(page).locator(".steps")).to_have_count(1)
    emulator.say(session_id, "!ls")
    expect(detail(page).locator(".steps")).to_have_count(2)
    expect_steps(page, "queued", "first tool")
    expect(detail(page).locator("summary", has_text="Round 1")).to_be_visible()


def test_a_lease_counts_down_and_lapses(emulator: Emulator, open_page: Open) -> None:
    session_id = emulator.create_session()
    emulator.claim_and_die(session_id)
    page = open_page(f"/sessions/{session_id}")
    lease = row(page, session_id).locator(".lease")
    expect(lease).to_have_text(re.compile(r"^(5:00|4:\d\d)$"))
    before = lease.inner_text()
    expect(lease).not_to_have_text(before)  # by itself
    emulator.advance(240)
    expect(lease).to_have_text(re.compile(r"^(1:00|0:\d\d)$"))
    emulator.advance(121)
    expect(row(page, session_id)).to_contain_text("stopped")
    expect(lease).to_have_text("")
    expect_steps(page, "created", "reserved", "acked", "claimed", "lapsed", "stopped")


def test_a_message_that_waits_moves_up_when_its_turn_comes(emulator: Emulator, open_page: Open) -> None:
    session_id = emulator.create_session()
    emulator.say(session_id, "!first")
    emulator.say(session_id, "!second")
    emulator.say(session_id, "!third")
    page = open_page(f"/sessions/{session_id}")
    message = detail(page).locator(".events li", has_text="!second").first
    expect(message.locator(".event-at")).to_have_text("waits")
    expect(detail(page).locator(".facts")).to_contain_text("2 messages waiting")
    emulator.send(session_id, result(emulator.pending_calls(session_id)[0]))
    expect(message.locator(".event-at")).not_to_have_text("waits")
    types = [event["type"] for event in emulator.events(session_id)]
    expect(detail(page).locator(".event-type")).to_have_text(types[::-1])


def test_what_a_sub_agent_does_is_shown_with_its_name(emulator: Emulator, open_page: Open) -> None:
    session_id = emulator.create_session()
    emulator.set_script(session_id, [delegate("researcher", "look", say("Found it.")), end()])
    emulator.say(session_id, "go")
    page = open_page(f"/sessions/{session_id}")
    said = detail(page).locator('.events li[data-type="agent.message"]')
    expect(said).to_contain_text("[researcher] Found it.")


def test_an_event_opens_to_its_json(emulator: Emulator, open_page: Open) -> None:
    session_id = emulator.create_session()
    emulator.set_script(session_id, [error("The model is overloaded"), end()])
    emulator.say(session_id, "go")
    page = open_page(f"/sessions/{session_id}")
    event = detail(page).locator('.events li[data-type="session.error"]')
    expect(event).to_contain_text("The model is overloaded")
    event.locator("summary").click()
    expect(event.locator("pre")).to_contain_text('"retry_status"')
    detail(page).get_by_label("Without bookkeeping").check()
    expect(detail(page).locator('.events li[data-type="session.usage"]')).to_be_hidden()
    expect(event).to_be_visible()


def test_workers_and_health_checks(emulator: Emulator, open_page: Open) -> None:
    page = open_page("/workers")
    expect(page.locator(".workers")).to_have_text("No worker has polled in the last 30 s.")
    with emulator.hold() as now:
        emulator._world.queue(emulator.environment_id).note_poll("worker-7", now)
    expect(page.locator(".workers")).to_contain_text("worker-7")
    expect(page.locator("#count-workers")).to_have_text("1")
    expect(page.get_by_label("Settings of a worker")).to_contain_text(emulator.environment_key)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    copied = page.evaluate("() => navigator.clipboard.readText()")
    assert copied.startswith(f"export ANTHROPIC_BASE_URL={emulator.url}\n")
    page.evaluate("() => Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    page.get_by_role("button", name=re.compile("^Cop")).click()
    assert page.evaluate("() => String(getSelection())").strip() == copied
    page.get_by_role("button", name="Queue a health check").click()
    expect(page.locator(".checks li")).to_contain_text("queued")
    expect(page.locator(".stats")).to_contain_text("1 item waiting")
    emulator.advance(31)
    expect(page.locator(".workers")).to_have_text("No worker has polled in the last 30 s.")


def test_a_session_that_is_deleted(emulator: Emulator, open_page: Open) -> None:
    session_id = emulator.create_session("short")
    page = open_page(f"/sessions/{session_id}")
    expect(row(page, session_id)).to_be_visible()
    emulator.delete_session(session_id)
    expect(row(page, session_id)).to_have_count(0)
    expect(detail(page)).to_contain_text("This session has been deleted.")
    page.wait_for_timeout(1200)  # longer than what lets a lease count down, which must not wake it again
    expect(detail(page)).to_contain_text("This session has been deleted.")
    expect(detail(page).get_by_role("button", name="Send")).to_be_disabled()
    expect(detail(page).get_by_role("button", name="Force stop")).to_be_disabled()


def test_a_session_that_never_was(emulator: Emulator, chromium: Browser) -> None:
    page = chromium.new_page()
    load(page, f"{emulator.url}/#/sessions/<b>sesn_none", LIVE)
    expect(detail(page)).to_contain_text("There is no such session")
    expect(detail(page)).to_contain_text("<b>sesn_none")
    page.close()


# What one can do


def test_create_say_interrupt_and_stop(emulator: Emulator, open_page: Open) -> None:
    page = open_page()
    page.get_by_role("button", name="New session").click()
    page.get_by_label("Title").fill("By hand")
    page.get_by_label("First message").fill("!ls")
    page.get_by_role("button", name="Create").click()
    expect(detail(page).get_by_role("heading", name="By hand")).to_be_visible()
    (session_id,) = emulator.session_ids()
    assert emulator.is_in(session_id, "requires_action")

    detail(page).get_by_label("Message to the agent").fill("!pwd")
    page.keyboard.press("Enter")
    waits(page, lambda: len(emulator.events(session_id, "user.message")) == 2)
    expect(detail(page).get_by_label("Message to the agent")).to_have_value("")
    detail(page).get_by_role("button", name="Interrupt").click()
    waits(page, lambda: emulator.events(session_id, "user.interrupt"))

    emulator.claim_and_die(session_id)
    detail(page).get_by_role("button", name="Stop item").click()
    expect(row(page, session_id)).to_contain_text("stopping")
    expect(detail(page).get_by_role("button", name="Stop item")).to_be_disabled()
    detail(page).get_by_role("button", name="Force stop").click()
    waits(page, lambda: not emulator.is_in(session_id, "stopping"))
    assert [each.operation for each in emulator.requests] == []  # the page leaves no trace in the log


def test_confirm_deny_and_answer(emulator: Emulator, open_page: Open) -> None:
    session_id = emulator.create_session("Deploy")
    calls = [call("bash", command="make deploy", permission="ask"), call("bash", command="rm -r /", permission="ask")]
    emulator.set_script(session_id, [tools(*calls), tools(custom("page_somebody", who="me")), repeat_output, end()])
    emulator.say(session_id, "go")
    page = open_page()
    page.get_by_role("button", name=re.compile("^Asking you")).click()
    row(page, session_id).click()
    cards = detail(page).locator(".call")
    expect(cards).to_have_count(2)
    cards.filter(has_text="rm -r /").get_by_label("Why not").fill("are you mad?")
    cards.filter(has_text="rm -r /").get_by_role("button", name="Deny").click()
    expect(cards).to_have_count(1)
    cards.get_by_role("button", name="Allow").click()
    expect(cards).to_contain_text("bash waits for a worker")
    verdicts = emulator.events(session_id, "user.tool_confirmation")
    assert [(each["result"], each["deny_message"]) for each in verdicts] == [("deny", "are you mad?"), ("allow", None)]

    emulator.send(session_id, result(emulator.pending_calls(session_id)[0]))
    detail(page).get_by_label("Result of page_somebody").fill("she comes")
    detail(page).get_by_role("button", name="Answer").click()
    waits(page, lambda: emulator.is_in(session_id, "idle"))
    assert emulator.events(session_id, "agent.message")[-1]["content"][0]["text"] == "she comes"


def test_a_refusal_is_shown_in_the_emulators_words(emulator: Emulator, chromium: Browser) -> None:
    session_id = emulator.create_session()
    emulator.say(session_id, "!ls")
    emulator.switch(message_to_stranded_session="400")
    emulator.stop_work(session_id, force=True)
    page = chromium.new_page()
    load(page, f"{emulator.url}/#/sessions/{session_id}", LIVE)
    detail(page).get_by_label("Message to the agent").fill("hello")
    detail(page).get_by_role("button", name="Send").click()
    expect(page.get_by_role("alert")).to_contain_text("interrupt it first")
    expect(detail(page).get_by_label("Message to the agent")).to_have_value("hello")  # nothing typed is lost
    page.close()


def test_faults_go_on_and_off(emulator: Emulator, open_page: Open) -> None:
    page = open_page("/trouble")
    expect(page.get_by_text("Nothing is armed.")).to_be_visible()
    page.get_by_label("Operation").fill("work.poll")
    page.get_by_label("Fault").select_option("fail")
    page.get_by_label("Status").fill("503")
    page.get_by_label("How many").fill("")
    page.get_by_role("button", name="Switch on").click()
    expect(page.locator(".faults li")).to_contain_text("fail work.poll")
    (fault,) = emulator.faults()
    assert {**fault.shown(), "id": ""} == {
        "on": "request",
        "operation": "work.poll",
        "kind": "fail",
        "count": None,
        "status": 503,
        "seconds": 0.0,
        "after": 0,
        "hits": 0,
        "id": "",
    }
    page.locator("select[name=on]").select_option("webhook")
    page.get_by_label("Fault").select_option("delay")
    page.get_by_label("How many").fill("2")
    page.get_by_label("Seconds", exact=True).fill("30")
    page.get_by_role("button", name="Switch on").click()
    page.locator("select[name=on]").select_option("stream")
    page.get_by_label("After so many events").fill("4")
    page.get_by_role("button", name="Switch on").click()
    expect(page.locator(".faults li")).to_have_count(3)
    page.locator(".faults li").first.get_by_role("button").click()
    expect(page.locator(".faults li")).to_have_count(2)
    assert sorted(each.shown()["on"] for each in emulator.faults()) == ["stream", "webhook"]
    page.get_by_role("button", name="Switch all off").click()
    expect(page.get_by_text("Nothing is armed.")).to_be_visible()
    assert emulator.faults() == []


def test_switches_and_the_clock(emulator: Emulator, open_page: Open) -> None:
    page = open_page("/trouble")
    page.get_by_label("lease_lapse").select_option("requeue")
    page.get_by_label("stop_reply").select_option("204")
    waits(page, lambda: emulator.switches.stop_reply == 204)
    assert emulator.switches.lease_lapse == "requeue"
    emulator.switch(lease_lapse="stop")
    expect(page.get_by_label("lease_lapse")).to_have_value("stop")  # set by a test, seen on the page
    before = emulator.now()
    page.get_by_label("Go forward").fill("361")
    page.get_by_role("button", name="Advance").click()
    expect(page.get_by_role("heading", name="Clock")).to_contain_text("361 seconds ahead")
    assert (emulator.now() - before).total_seconds() > 361
    page.get_by_label("Shown off by").fill("-90")
    page.get_by_role("button", name="Show it so").click()
    expect(page.get_by_role("heading", name="Clock")).to_contain_text("shown -90 s off")


def test_an_endpoint_that_was_disabled_is_enabled_again(
    emulator: Emulator, receiver: Receiver, open_page: Open
) -> None:
    receiver.statuses = [302]
    page = open_page("/webhooks")
    expect(page.locator("#view-webhooks .state").first).to_have_text("none")
    page.get_by_label("URL").fill(receiver.url)
    page.get_by_role("button", name="Save").click()
    expect(page.locator("#view-webhooks .state").first).to_have_text("enabled")
    session_id = emulator.create_session()
    emulator.say(session_id, "!ls")
    expect(page.locator("#view-webhooks .state").first).to_have_text("disabled")
    expect(page.locator(".reason")).to_have_text("auto-disabled: endpoint URL returned a redirect (3xx)")
    expect(page.locator("#count-webhooks")).to_have_text("disabled")
    expect(page.locator("tbody tr", has_text="302 after")).to_have_count(1)
    page.get_by_role("button", name="Re-enable").click()
    expect(page.locator("#view-webhooks .state").first).to_have_text("enabled")
    assert emulator.webhook_disabled_reason is None
    page.get_by_role("button", name="Pause").click()
    expect(page.locator("#view-webhooks .state").first).to_have_text("paused")
    assert emulator.webhooks_paused
