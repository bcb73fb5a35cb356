"""Log lines: a fixed set of keys, one line each, and no secret in any of them."""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Iterator

import pytest

from shared import log
from shared.runner_secrets import redact

SECRETS = [
    "sk-ant-api03-AbC_d-1.2",
    "sk-ant-oat01-AbCd",
    "sk-ant-req-AbC-d_e",
    "whsec_AbC+/d-_e=",
    base64.urlsafe_b64encode(json.dumps({"sessions_token": "sk-ant-req-x"}).encode()).decode(),
    base64.urlsafe_b64encode(json.dumps({"sessions_token": "sk-ant-req-x"}).encode()).decode().rstrip("="),
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3",
]


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """The root logger, configured as an entry point does it, and put back."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    stream = io.StringIO()
    log.configure(stream=stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.parametrize("secret", SECRETS)
def test_every_shape_of_secret_is_redacted(secret: str) -> None:
    for text in (secret, f"key={secret}", f'{{"key": "{secret}"}}', f"https://host/?k={secret}&x=1", f"a {secret}, b"):
        redacted = redact(text)
        assert "[redacted]" in redacted
        assert secret not in redacted
        assert secret[10:] not in redacted


@pytest.mark.parametrize("header", ["Authorization: Bearer opaque-token", "authorization: bearer opaque-token"])
def test_a_bearer_token_of_any_shape_is_redacted(header: str) -> None:
    assert "opaque-token" not in redact(header)


def test_ids_are_not_redacted() -> None:
    text = "session=sesn_01AbC work=work_01 sandbox=sb-eye reason=skipped"
    assert redact(text) == text


def test_messages_arguments_and_tracebacks_are_redacted(stream: io.StringIO) -> None:
    logger = logging.getLogger("anybody")

    def fail(secret: str) -> None:
        raise ValueError(f"400 for {secret}")

    for secret in SECRETS:
        try:
            fail(secret)
        except ValueError as error:
            logger.error("cannot: %s", secret, exc_info=error)
    written = stream.getvalue()
    assert written.count("Traceback") == len(SECRETS)
    assert [secret for secret in SECRETS if secret in written] == []


def test_a_chained_exception_is_redacted(stream: io.StringIO) -> None:
    cause = ValueError("sk-ant-oat01-inner")
    error = RuntimeError("outer")
    error.__cause__ = cause
    logging.getLogger("anybody").error("failed", exc_info=error)
    assert "direct cause" in stream.getvalue()
    assert "sk-ant-oat01-inner" not in stream.getvalue()


def test_configure_replaces_what_was_there(stream: io.StringIO) -> None:
    log.configure(stream=stream)
    logging.getLogger("anybody").info("once")
    assert stream.getvalue().count("once") == 1


def test_http_libraries_are_not_heard(stream: io.StringIO) -> None:
    logging.getLogger("httpx2").info("HTTP Request: GET https://api.anthropic.com/v1/...")
    assert stream.getvalue() == ""


def test_the_keys_come_in_one_order_whatever_the_call() -> None:
    line = log.line("launched", ms=12, session="sesn_1", provider="p", work="w", sandbox="s", attempt=1)
    assert line == "action=launched provider=p session=sesn_1 work=w sandbox=s attempt=1 ms=12"


def test_what_is_none_is_left_out_and_zero_is_not() -> None:
    assert log.line("launched", session=None, ms=0) == "action=launched ms=0"


def test_an_unknown_key_is_refused() -> None:
    with pytest.raises(ValueError, match="colour"):
        log.line("launched", colour="red")


def test_an_exception_is_logged_by_type() -> None:
    assert log.line("poll", error=KeyError("request with a token")) == "action=poll error=KeyError"


@pytest.mark.parametrize(
    "value",
    ["two words", 'a "quote"', "a=b", "line\nbreak", "", "\x1b[2J", "\x9b2J", "\u202e", "\ud800", "\u00e4", "\x00"],
)
def test_a_value_cannot_forge_a_line_a_key_or_a_control_sequence(value: str) -> None:
    written = log.line("refused", reason=value)
    assert written.isascii()
    assert written.isprintable()
    assert json.loads(written.partition("reason=")[2]) == value
