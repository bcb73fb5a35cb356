"""SANDBOX_ALLOWED_HOSTS means the same in every folder that has it: whoever moves to another keeps their `.env`. What
each platform is asked for is in the tests of its folder."""

from __future__ import annotations

from typing import Any

import pytest

from tests.folders import load_folder

FOLDERS = ("daytona", "docker", "modal", "vercel")
OF_OTHER_SETTINGS = {"DAYTONA_API_KEY": "a-key"}

pytestmark = pytest.mark.parametrize("folder", FOLDERS)


def allowed(folder: str, value: str) -> Any:
    loaded = load_folder(folder)
    own = getattr(loaded.module(f"{folder}_settings"), f"{folder.capitalize()}Settings")
    return loaded.shared("settings").load(own, {**OF_OTHER_SETTINGS, "SANDBOX_ALLOWED_HOSTS": value}).allowed_hosts


@pytest.mark.parametrize(
    ("value", "hosts"),
    [
        ("", ()),
        ("example.com", ("example.com",)),
        (" *.example.com , a-b.example.org,", ("*.example.com", "a-b.example.org")),
        ("*", ("*",)),
        ("localhost,xn--bcher-kva.example,_srv.1.example", ("localhost", "xn--bcher-kva.example", "_srv.1.example")),
    ],
)
def test_a_list_is_host_names_and_nothing_when_it_is_unset(folder: str, value: str, hosts: tuple[str, ...]) -> None:
    assert allowed(folder, value) == hosts


@pytest.mark.parametrize(
    "value",
    [
        ",",
        "https://example.com",
        "a b",
        "example.com/path",
        "*.",
        "*.*.com",
        "ex*.com",
        "-a.b",
        ".a",
        "a..b",
        "b\u00fc.de",
    ],
)
def test_what_is_no_list_is_refused_by_the_settings_name_and_not_quoted(folder: str, value: str) -> None:
    with pytest.raises(load_folder(folder).shared("errors").SettingsError) as refused:
        allowed(folder, value)
    assert "SANDBOX_ALLOWED_HOSTS is unusable: expected hos" in str(refused.value)
    assert len(value) < 3 or value not in str(refused.value)


@pytest.mark.parametrize("value", ["10.1.2.3", "[fd00::1]", "example.com:8443"])
def test_addresses_and_ports_are_for_the_proxy_of_our_own(folder: str, value: str) -> None:
    if folder == "docker":
        assert allowed(folder, value) == (value,)
    else:
        with pytest.raises(load_folder(folder).shared("errors").SettingsError, match="expected host names"):
            allowed(folder, value)
