"""Webhook signatures: what the SDK's check leaves open, closed."""

from __future__ import annotations

import base64
import time

import pytest
from anthropic import Anthropic
from standardwebhooks.webhooks import WebhookVerificationError

from shared.errors import SettingsError, WebhookRejected
from shared.webhook import Verifier, WebhookEvent, normalise_key
from tests.shared.support import event_body, sign, signed_headers

KEY = bytes(range(224, 256))  # its base64 has + and /, so the URL-safe alphabet differs
OTHER = bytes(range(32))


def standard(key: bytes = KEY) -> str:
    return "whsec_" + base64.b64encode(key).decode()


def url_safe(key: bytes = KEY) -> str:
    return "whsec_" + base64.urlsafe_b64encode(key).decode()


SPELLINGS = [standard(), standard().rstrip("="), url_safe(), url_safe().rstrip("="), f" {standard()}\n", standard()[6:]]


def test_the_key_of_these_tests_tells_the_alphabets_apart() -> None:
    assert set("+/") & set(standard()[6:])
    assert set("-_") & set(url_safe()[6:])


@pytest.mark.parametrize("key", SPELLINGS)
def test_a_key_in_any_spelling_checks_with_all_its_bytes(key: str) -> None:
    body = event_body()
    event = Verifier([key]).verify(body, signed_headers(KEY, body))
    assert event == WebhookEvent(id="whe_1", type="session.status_run_started", session_id="sesn_1")


def test_the_sdk_alone_does_not_take_a_url_safe_key() -> None:
    """Why `normalise_key` exists; when this fails, it need not any more."""
    body = event_body()
    client = Anthropic(auth_token="unused", base_url="http://unused.invalid")
    headers = signed_headers(KEY, body)
    assert client.beta.webhooks.unwrap(body.decode(), headers=headers, key=standard()).id == "whe_1"
    with pytest.raises((ValueError, WebhookVerificationError)):
        client.beta.webhooks.unwrap(body.decode(), headers=headers, key=url_safe())


@pytest.mark.parametrize(
    "key", ["whsec_", "", "whsec_!!!!", "whsec_abcd", "\u00e4" * 43, standard() + "AAAA", standard()[:-3]]
)
def test_an_unusable_key_is_a_settings_error_that_does_not_quote_it(key: str) -> None:
    with pytest.raises(SettingsError) as raised:
        normalise_key(key)
    encoded = key.removeprefix("whsec_")
    assert not encoded or encoded not in str(raised.value)


def test_without_a_key_there_is_no_verifier() -> None:
    with pytest.raises(SettingsError, match="ANTHROPIC_WEBHOOK_SIGNING_KEY"):
        Verifier([])


def test_during_a_rotation_both_keys_check_and_no_third() -> None:
    body = event_body()
    verifier = Verifier([standard(), url_safe(OTHER)])
    for key in (KEY, OTHER):
        assert verifier.verify(body, signed_headers(key, body)).id == "whe_1"
    with pytest.raises(WebhookRejected):
        verifier.verify(body, signed_headers(b"x" * 32, body))
    with pytest.raises(WebhookRejected):
        Verifier([standard()]).verify(body, signed_headers(OTHER, body))


def test_one_good_signature_among_several_is_enough() -> None:
    body = event_body()
    headers = signed_headers(KEY, body)
    wrong = sign(OTHER, headers["webhook-id"], headers["webhook-timestamp"], body)
    headers["webhook-signature"] = f"{wrong} v1a,AAAA {headers['webhook-signature']}"
    assert Verifier([standard()]).verify(body, headers).session_id == "sesn_1"


@pytest.mark.parametrize("age", [-290, 0, 290])
def test_five_minutes_either_way_are_accepted(age: float) -> None:
    body = event_body()
    assert Verifier([standard()]).verify(body, signed_headers(KEY, body, age=age)).id == "whe_1"


@pytest.mark.parametrize("age", [310, -310, 86400 * 365])
def test_a_stale_or_future_webhook_is_rejected(age: float) -> None:
    body = event_body()
    with pytest.raises(WebhookRejected):
        Verifier([standard()]).verify(body, signed_headers(KEY, body, age=age))


@pytest.mark.parametrize(
    "timestamp", ["nan", "inf", "-inf", "1e400", "9" * 400, "", "soon", "0x10", "1_0", "\u0661", "-1"]
)
def test_a_timestamp_that_is_none_is_rejected(timestamp: str) -> None:
    body = event_body()
    headers = signed_headers(KEY, body) | {"webhook-timestamp": timestamp}
    headers["webhook-signature"] = sign(KEY, "whe_1", timestamp, body)
    with pytest.raises(WebhookRejected):
        Verifier([standard()]).verify(body, headers)


@pytest.mark.parametrize(
    "signature",
    [
        "v1",
        ",",
        "v1,",
        "v1,!",
        "v1,\u00e4",
        "v1,A",
        "v1,AAAA",
        "v2,AAAA",
        " ",
        "v1,a,b",
        "\x00",
        "\ud800",
        "v1,\udcff",
        "," * 9999,
    ],
)
def test_a_malformed_signature_is_rejected_and_nothing_else(signature: str) -> None:
    body = event_body()
    with pytest.raises(WebhookRejected):
        Verifier([standard()]).verify(body, signed_headers(KEY, body) | {"webhook-signature": signature})


@pytest.mark.parametrize("name", ["webhook-id", "webhook-timestamp", "webhook-signature"])
def test_every_header_is_needed(name: str) -> None:
    body = event_body()
    headers = signed_headers(KEY, body)
    del headers[name]
    with pytest.raises(WebhookRejected):
        Verifier([standard()]).verify(body, headers)


@pytest.mark.parametrize("name", ["webhook-id", "webhook-timestamp"])
def test_the_signature_covers_id_and_timestamp(name: str) -> None:
    body = event_body()
    headers = signed_headers(KEY, body)
    headers[name] = {"webhook-id": "whe_2", "webhook-timestamp": str(int(time.time()) - 7)}[name]
    with pytest.raises(WebhookRejected):
        Verifier([standard()]).verify(body, headers)


def test_the_signature_covers_the_body() -> None:
    body = event_body()
    with pytest.raises(WebhookRejected):
        Verifier([standard()]).verify(body + b" ", signed_headers(KEY, body))


@pytest.mark.parametrize("body", [b"\xff\xfe", b"", b"{", b"not json", b"[" * 60_000])
def test_a_signed_body_that_is_no_json_is_rejected(body: bytes) -> None:
    with pytest.raises(WebhookRejected):
        Verifier([standard()]).verify(body, signed_headers(KEY, body))


@pytest.mark.parametrize(
    "body", [b"null", b"5", b"[]", b'""', b"{}", b'{"data": 5}', b'{"data": []}', b'{"data": {"type": {"a": 1}}}']
)
def test_signed_json_of_another_shape_is_an_event_that_says_nothing(body: bytes) -> None:
    event = Verifier([standard()]).verify(body, signed_headers(KEY, body))
    assert event.type != "session.status_run_started"


def test_an_event_type_newer_than_the_sdk_is_passed_on() -> None:
    body = event_body(type_="session.invented_tomorrow")
    assert Verifier([standard()]).verify(body, signed_headers(KEY, body)).type == "session.invented_tomorrow"
