"""Settings: everything wrong is said at once, nothing secret is ever said."""

from __future__ import annotations

import logging
from dataclasses import FrozenInstanceError, fields

import pytest

from shared.errors import SettingsError
from shared.settings import Settings

KEY = "sk-ant-oat01-hush"
NEEDED = {"ANTHROPIC_ENVIRONMENT_ID": "env_1", "ANTHROPIC_ENVIRONMENT_KEY": KEY}


def problems_of(environ: dict[str, str]) -> str:
    with pytest.raises(SettingsError) as raised:
        Settings.from_env(environ)
    return str(raised.value)


def test_two_settings_are_enough() -> None:
    settings = Settings.from_env(NEEDED)
    assert (settings.environment_id, settings.environment_key) == ("env_1", KEY)
    assert settings.base_url == "https://api.anthropic.com"
    assert settings.webhook_keys == ()
    assert settings.allow_environment_key_in_sandbox is False


def test_every_problem_is_named_at_once() -> None:
    text = problems_of({"SANDBOX_MAX_LIVE": "many", "ANTHROPIC_BASE_URL": "ftp://x", "ANTHROPIC_API_KEY": "sk-ant-api"})
    for name in (
        "ANTHROPIC_API_KEY",
        "ANTHROPIC_ENVIRONMENT_ID",
        "ANTHROPIC_ENVIRONMENT_KEY",
        "SANDBOX_MAX_LIVE",
        "ANTHROPIC_BASE_URL",
    ):
        assert name in text


@pytest.mark.parametrize("blank", ["", "   ", "\n"])
def test_a_blank_value_counts_as_unset(blank: str) -> None:
    assert "ANTHROPIC_ENVIRONMENT_ID is not set" in problems_of(NEEDED | {"ANTHROPIC_ENVIRONMENT_ID": blank})
    assert Settings.from_env(NEEDED | {"SANDBOX_MAX_LIVE": blank}).max_live == 100


def test_a_value_is_taken_without_the_space_around_it() -> None:
    assert Settings.from_env(NEEDED | {"ANTHROPIC_ENVIRONMENT_ID": " env_2\n"}).environment_id == "env_2"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SANDBOX_MAX_LIVE", "0"),
        ("SANDBOX_MAX_LIVE", "-3"),
        ("SANDBOX_MAX_LIVE", "unusable-value"),
        ("SANDBOX_LAUNCH_CONCURRENCY", "1.5"),
        ("SANDBOX_LAUNCH_CONCURRENCY", "9" * 5000),
        ("SANDBOX_MAX_IDLE_SECONDS", "-1"),
        ("SANDBOX_MAX_IDLE_SECONDS", "nan"),
        ("SANDBOX_MAX_WAIT_SECONDS", "inf"),
        ("SANDBOX_RETENTION_SECONDS", "inf"),
        ("SANDBOX_KEEP_WARM_SECONDS", "soon-enough"),
        ("ALLOW_ENVIRONMENT_KEY_IN_SANDBOX", "perhaps"),
        ("ANTHROPIC_BASE_URL", "api.anthropic.com"),
        ("ANTHROPIC_BASE_URL", "https://:443"),
        ("ANTHROPIC_BASE_URL", "https://[::1"),
        ("ANTHROPIC_BASE_URL", "https://host:port"),
        ("ANTHROPIC_ENVIRONMENT_KEY", "sk-ant-oat01-hush hush"),
        ("ANTHROPIC_ENVIRONMENT_KEY", "sk-ant-oat01-\u00e4"),
    ],
)
def test_an_unusable_value_is_refused_by_name_and_never_quoted(name: str, value: str) -> None:
    text = problems_of(NEEDED | {name: value})
    assert f"{name} is unusable: expected" in text
    assert value not in text


@pytest.mark.parametrize("value", ["a b", "deploy;ticket", "n\u00e9", "x" * 129])
def test_names_are_words_with_commas_between(value: str) -> None:
    assert Settings.from_env({**NEEDED, "SANDBOX_TOOL_NAMES": "deploy , ticket,"}).tool_names == ("deploy", "ticket")
    with pytest.raises(SettingsError, match="SANDBOX_TOOL_NAMES is unusable: expected names"):
        Settings.from_env({**NEEDED, "SANDBOX_TOOL_NAMES": value})


@pytest.mark.parametrize(
    ("value", "parsed"), [("true", True), ("YES", True), ("1", True), ("off", False), ("0", False)]
)
def test_flags(value: str, parsed: bool) -> None:
    settings = Settings.from_env(NEEDED | {"ALLOW_ENVIRONMENT_KEY_IN_SANDBOX": value})
    assert settings.allow_environment_key_in_sandbox is parsed


def test_no_secret_prints() -> None:
    secrets = {
        "ANTHROPIC_ENVIRONMENT_KEY": KEY,
        "ANTHROPIC_WEBHOOK_SIGNING_KEY": "whsec_first",
        "ANTHROPIC_WEBHOOK_SIGNING_KEY_NEXT": "whsec_second",
    }
    settings = Settings.from_env(NEEDED | secrets)
    for value in secrets.values():
        assert value not in f"{settings} {settings!r}"


def test_what_may_hold_a_secret_is_marked_as_one() -> None:
    marked = {declared.metadata["name"] for declared in fields(Settings) if declared.metadata["secret"]}
    assert marked == {
        declared.metadata["name"] for declared in fields(Settings) if "KEY" in declared.metadata["name"]
    } - {"ALLOW_ENVIRONMENT_KEY_IN_SANDBOX"}


def test_both_webhook_keys_are_accepted_the_current_one_first() -> None:
    keys = {"ANTHROPIC_WEBHOOK_SIGNING_KEY": "whsec_1", "ANTHROPIC_WEBHOOK_SIGNING_KEY_NEXT": "whsec_2"}
    assert Settings.from_env(NEEDED | keys).webhook_keys == ("whsec_1", "whsec_2")


def test_the_old_name_works_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings.from_env(NEEDED | {"ANTHROPIC_WEBHOOK_SECRET": "whsec_old"})
    assert settings.webhook_keys == ("whsec_old",)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "ANTHROPIC_WEBHOOK_SIGNING_KEY" in record.getMessage()
    assert "whsec_old" not in record.getMessage()


def test_the_new_name_wins_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    both = {"ANTHROPIC_WEBHOOK_SECRET": "whsec_old", "ANTHROPIC_WEBHOOK_SIGNING_KEY": "whsec_new"}
    assert Settings.from_env(NEEDED | both).webhook_keys == ("whsec_new",)
    assert caplog.records == []


def test_settings_do_not_change() -> None:
    settings = Settings.from_env(NEEDED)
    with pytest.raises(FrozenInstanceError):
        settings.max_live = 2  # type: ignore[misc]
