"""What is wrong with a folder's own settings is told with what is wrong with the shared ones, in one error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.folders import load_folder

OWN = {
    "local": "LOCAL_PIDS",
    "docker": "DOCKER_PIDS",
    "daytona": "DAYTONA_ARCHIVE_MINUTES",
    "vercel": "VERCEL_SANDBOX_SECONDS",
    "modal": "SANDBOX_CPU",
}


def open_host(folder: str, environ: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """As the folder's entry point does."""
    if folder == "modal":
        app = load_folder(folder).module("app")
        monkeypatch.setattr(app.os, "environ", environ)
        return app._dispatcher.__wrapped__()
    main = load_folder(folder).module("main")
    return main.open_host(environ) if folder == "vercel" else main.server.open(environ)


@pytest.mark.parametrize("folder", OWN)
def test_everything_wrong_is_named_and_no_value_shown(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"SANDBOX_MAX_LIVE": "plenty", OWN[folder]: "a lot"}
    if folder != "modal":  # it has no status page
        wrong["STATUS_KEY"] = "two words"
    with pytest.raises(load_folder(folder).shared("errors").SettingsError) as caught:
        open_host(folder, wrong, monkeypatch)
    for name in ("ANTHROPIC_ENVIRONMENT_ID", "ANTHROPIC_ENVIRONMENT_KEY", *wrong):
        assert name in str(caught.value)
    for value in wrong.values():
        assert value not in str(caught.value)
