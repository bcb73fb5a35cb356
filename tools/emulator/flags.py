"""The command line: what it takes, and the faults and switches that its flags spell."""

from __future__ import annotations

import argparse
import re
from typing import Any, TypeVar

import yaml

from .admin_params import CutBody, FaultBody, WebhookFaultBody
from .emulator import Emulator
from .errors import Invalid
from .params import Params, parse
from .scenario import shipped
from .switches import parse_switch

P = TypeVar("P", bound=Params)


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError("a port is between 0 and 65535")
    return port


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError("between 1 and 86400 seconds")
    return seconds


def _switch(text: str) -> tuple[str, Any]:
    try:
        return parse_switch(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _variable(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: its value is not YAML: put it into quotes") from error


def _environment_id(text: str) -> str:
    if not re.fullmatch(r"[\w\-]+", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r}: letters, digits, _ and - only: it is a part of paths")
    return text


def _fault(text: str) -> FaultBody:
    """`work.ack=lose_response,count=2,after=1`."""
    operation, _, rest = text.partition("=")
    return _spelled(FaultBody, f"kind={rest}", {"operation": operation}, "OPERATION=KIND[,NAME=VALUE…]")


def _webhook_fault(text: str) -> WebhookFaultBody:
    """`lose,count=2`."""
    return _spelled(WebhookFaultBody, f"kind={text}", {}, "KIND[,NAME=VALUE…]")


def _spelled(model: type[P], text: str, values: dict[str, Any], usage: str) -> P:
    for pair in text.split(","):
        name, equals, value = pair.partition("=")
        if not equals or not value:
            raise argparse.ArgumentTypeError(f"{pair!r} is not NAME=VALUE in {usage}")
        values[name] = None if value == "none" else value
    try:
        return parse(model, values, "fault")
    except Invalid as error:
        raise argparse.ArgumentTypeError(error.message) from error


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}",
        description="A local control plane for self-hosted environments. Prints one JSON line when it is ready: url, "
        "environment_id, environment_key, api_key, webhook_key, agent_id. What is not given is made up.",
        allow_abbrev=False,
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=8700, help="0 picks a free one (default: %(default)s)")
    parser.add_argument("--allow-remote", action="store_true", help="permit a --host other machines can reach")
    parser.add_argument("--environment-id", type=_environment_id, metavar="ID")
    parser.add_argument("--environment-key", metavar="KEY", help="what workers poll with")
    parser.add_argument("--api-key", metavar="KEY", help="what creates sessions")
    parser.add_argument("--webhook-url", metavar="URL", help="where webhooks go, http and loopback allowed")
    parser.add_argument("--webhook-key", metavar="KEY", help="whsec_<base64>, signs the webhooks")
    parser.add_argument(
        "--lease-ttl", type=_seconds, default=300.0, metavar="SECONDS", help="lease of a work item (default: 300)"
    )
    trouble = parser.add_argument_group("trouble", "each may be given more than once; the README lists the values")
    trouble.add_argument(
        "--switch", type=_switch, action="append", default=[], metavar="NAME=VALUE", help="an open fact"
    )
    trouble.add_argument(
        "--fault",
        type=_fault,
        action="append",
        default=[],
        metavar="OPERATION=KIND[,NAME=VALUE]",
        help="as work.ack=lose_response,count=2,after=1 or events.send=fail,status=503,count=none",
    )
    trouble.add_argument(
        "--cut-stream",
        type=int,
        action="append",
        default=[],
        metavar="EVENTS",
        help="break a stream after so many events",
    )
    trouble.add_argument(
        "--webhook-fault",
        type=_webhook_fault,
        action="append",
        default=[],
        metavar="KIND[,NAME=VALUE]",
        help="as lose,count=2 or delay,seconds=30",
    )
    trouble.add_argument("--skew", type=float, default=0.0, metavar="SECONDS", help="how far the clock it shows is off")
    story = parser.add_argument_group("scenario")
    story.add_argument(
        "--scenario", metavar="NAME|FILE", help=f"play one: {', '.join(shipped())}, or a YAML file of yours"
    )
    story.add_argument(
        "--set", type=_variable, action="append", default=[], metavar="NAME=VALUE", help="one of the scenario's vars"
    )
    story.add_argument("--exit-when-done", action="store_true", help="end with the scenario: 0 when it passed, else 1")
    return parser


def make_trouble(emulator: Emulator, options: argparse.Namespace) -> None:
    """What the flags ask for; ValueError for what cannot be."""
    emulator.switch(**dict(options.switch))
    emulator.skew(options.skew)
    for each in options.fault:
        values = each.model_dump()
        emulator.fault(values.pop("operation"), values.pop("kind"), values.pop("count"), **values)
    for after_events in options.cut_stream:
        emulator.cut_stream(**CutBody(after_events=after_events).model_dump())
    for each in options.webhook_fault:
        emulator.webhook_fault(each.kind, each.count, seconds=each.seconds)
