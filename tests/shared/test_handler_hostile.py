"""`handle()` against requests from a grammar of hostility: never a 5xx, never a poll for a stranger.

FUZZ_REQUESTS says how many (`make fuzz`: 100,000), FUZZ_SEED which. Every request is made from the seed and its number
alone, so a failure names both and the request can be made again.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import math
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from shared.handler import MAX_BODY_BYTES, Request, handle
from shared.webhook import Verifier, WebhookEvent
from tests.shared.support import event_body, sign

REQUESTS = int(os.environ.get("FUZZ_REQUESTS", "3000"))
SEED = int(os.environ.get("FUZZ_SEED", "20261123"))

KEYS = (bytes(range(224, 256)), hashlib.sha256(b"the next key").digest())
STRANGER = hashlib.sha256(b"a stranger's key").digest()
WAKING = "session.status_run_started"
ALLOWED = {200, 401, 405, 413}
BIG = 40_000  # a chunk; two of them are over the cap


@dataclass
class Hostile:
    """One request. `pristine` is true while nothing about it is wrong: then it must be accepted."""

    method: str = "POST"
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    pieces: list[bytes] = field(default_factory=list)
    pristine: bool = True

    async def stream(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            yield piece


def spell(text: bytes) -> str:
    """Bytes as a server passes header values on: latin-1, so anything a byte can be."""
    return text.decode("latin-1")


def noise(rng: random.Random, longest: int = 40) -> str:
    pool = rng.choice(
        ["abc,. =", "\x00\x01\t\r\n", "\u00e4\u00ff\u0080", "\ud800\udcff", "\u202e\u0661\u00b2", "+-_/=", "v1, "]
    )
    return "".join(rng.choice(pool) for _ in range(rng.randint(0, longest)))


def make_body(rng: random.Random) -> tuple[bytes, bool]:
    """A body, and whether it is a webhook that wakes."""
    kind = rng.randrange(14)
    if kind < 6:
        return event_body(f"sesn_{rng.randrange(5)}", WAKING), True
    if kind == 6:
        return event_body(
            type_=rng.choice(["session.status_idled", "", "x" * 2000, noise(rng).encode("utf-8", "replace").decode()])
        ), False
    if kind == 7:
        return event_body(noise(rng), WAKING), True  # an id that is none
    if kind == 8:
        deep = rng.choice([b"[", b'{"a":', b"[{"]) * rng.randint(1, 20_000)
        return deep, False
    if kind == 9:
        return rng.choice(
            [b"", b"null", b"[]", b'""', b"5", b"1e999", b"NaN", b"{}", b'{"data":[]}', b'{"data":{"type":5}}']
        ), False
    if kind == 10:
        return rng.randbytes(rng.randint(0, 300)), False
    if kind == 11:
        return b"\xef\xbb\xbf" + event_body(), False
    if kind == 12:
        return event_body(padding="x" * rng.choice([MAX_BODY_BYTES, MAX_BODY_BYTES - 300, 2 * MAX_BODY_BYTES])), True
    return json.dumps(
        {"data": {"type": rng.choice([None, [], {}, 1.5, True]), "id": rng.choice([None, {}, 3])}}
    ).encode(), False


def make_timestamp(rng: random.Random, now: int) -> tuple[str, bool]:
    kind = rng.randrange(10)
    if kind < 6:
        return str(now - rng.randint(-280, 280)), True
    if kind == 6:
        return str(now - rng.choice([-86400, -3600, -320, 320, 3600, 10**7])), False
    if kind == 7:
        return f"{now}.{rng.randrange(1000):03}", False  # a fraction: accepted or not, but never an accident
    odd = [
        "nan",
        "inf",
        "-inf",
        "1e400",
        "9" * 400,
        "-1",
        "0",
        "",
        "0x1",
        "1_0",
        "\u0661\u0662",
        f" {now}",
        f"{now}\x00",
        f"+{now}",
        noise(rng),
    ]
    return rng.choice(odd), False


def make_request(seed: int, number: int) -> Hostile:
    rng = random.Random(f"{seed}:{number}")  # noqa: S311 - reproducible on purpose
    made = Hostile()
    made.body, wakes = make_body(rng)
    made.pristine = wakes and len(made.body) <= MAX_BODY_BYTES
    timestamp, fresh = make_timestamp(rng, int(time.time()))
    made.pristine &= fresh
    webhook_id = rng.choice(["whe_1", "whe_1", f"whe_{number}", "a.b", "x" * 500])
    made.headers = {"webhook-id": webhook_id, "webhook-timestamp": timestamp}
    sign_request(rng, made)
    send_request(rng, made)
    return made


def sign_request(rng: random.Random, made: Hostile) -> None:
    webhook_id, timestamp = made.headers["webhook-id"], made.headers["webhook-timestamp"]
    stamp = timestamp.encode("utf-8", "replace").decode()
    ours = sign(rng.choice(KEYS), webhook_id, stamp, made.body)
    foreign = sign(STRANGER, webhook_id, stamp, made.body)
    kind = rng.randrange(12)
    if kind < 5:
        value, good = ours, True
    elif kind == 5:
        value, good = " ".join([foreign] * rng.randint(1, 200) + [ours]), True
    elif kind == 6:
        value, good = " ".join([foreign] * rng.randint(1, 2000)), False
    elif kind == 7:
        value, good = ours.replace("v1,", rng.choice(["v1a,", "v2,", "V1,", "", "v1,,", "v1, "])), False
    elif kind == 8:
        cut = rng.randrange(len(ours))
        value, good = ours[:cut] + noise(rng, 3) + ours[cut + 1 :], False
    elif kind == 9:
        value, good = noise(rng, 2000), False
    elif kind == 10:
        value, good = f"{noise(rng)} {ours}", False  # rubbish beside a good one: accepted or not
    else:
        value, good = sign(rng.choice(KEYS), webhook_id, stamp, made.body + b" "), False
    made.headers["webhook-signature"] = value
    made.pristine &= good


def send_request(rng: random.Random, made: Hostile) -> None:
    """Everything around the signed part: method, length, pieces, other headers."""
    length = len(made.body)
    kind = rng.randrange(12)
    if kind == 0:
        made.method = rng.choice(["GET", "HEAD", "PUT", "TRACE", "post", "", "PO\x00ST", "po\u017ft", noise(rng)])
        made.pristine = False
    elif kind == 1:
        name = rng.choice(sorted(made.headers))
        made.headers[name] = rng.choice(["", spell(rng.randbytes(rng.randint(1, 50))), noise(rng)])
        made.pristine = False
    elif kind == 2:
        del made.headers[rng.choice(sorted(made.headers))]
        made.pristine = False
    elif kind == 3:
        lies = [str(MAX_BODY_BYTES + 1), str(10**12), "9" * 5000]
        made.headers["content-length"] = rng.choice(
            [*lies, "-5", "abc", "", "0", "\u0661", "\u00b2", "1e3", noise(rng)]
        )
        made.pristine &= made.headers["content-length"] not in lies
    elif kind == 4:
        made.body += b"x" * (BIG * 2)  # more than was signed, and chunked: no length to go by
        made.pristine = False
    elif kind < 9:
        made.headers["content-length"] = str(length)
    for _ in range(rng.choice([0, 0, 1, 30])):
        made.headers[noise(rng, 8).lower() + "x"] = noise(rng)
    step = rng.choice([length + 1, 1 + length // 3, BIG])
    made.pieces = [made.body[at : at + step] for at in range(0, len(made.body), step)]
    if rng.randrange(5) == 0:
        made.pieces.insert(0, b"")


def decoded(signature: str) -> bytes:
    """Base64 may hold what is no base64, by its standard; the bytes it says are what counts."""
    try:
        return base64.b64decode(signature)
    except ValueError:
        return b""


def may_wake(request: Hostile) -> bool:
    """Whether one of our keys really signed this, written down a second time and without the library."""
    headers = request.headers
    try:
        timestamp = float(headers["webhook-timestamp"])
        signed = f"{headers['webhook-id']}.{math.floor(timestamp)}.".encode() + request.body
        given = [part[3:] for part in headers["webhook-signature"].split(" ") if part.startswith("v1,")]
    except (KeyError, ValueError, OverflowError):
        return False
    expected = {hmac.new(key, signed, hashlib.sha256).digest() for key in KEYS}
    is_signed = not expected.isdisjoint(map(decoded, given))
    is_fresh = abs(time.time() - timestamp) <= 300
    return request.method == "POST" and len(request.body) <= MAX_BODY_BYTES and is_signed and is_fresh


@pytest.mark.timeout(60 + REQUESTS // 100)
async def test_no_request_is_answered_with_a_5xx_and_no_stranger_is_let_in(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    caplog.set_level(logging.ERROR, logger="shared.handler")
    spellings = (
        "whsec_" + base64.urlsafe_b64encode(KEYS[0]).decode().rstrip("="),
        "whsec_" + base64.b64encode(KEYS[1]).decode(),
    )
    verifier = Verifier(spellings)
    woken: list[WebhookEvent] = []
    seen: Counter[str] = Counter()
    for number in range(REQUESTS):
        request = make_request(SEED, number)
        woken.clear()
        described = f"FUZZ_SEED={SEED}, request {number}: {request!r:.4000}"
        try:
            reply = await handle(
                Request(request.method, request.headers, request.stream()), verifier=verifier, wake=woken.append
            )
        except Exception as error:
            raise AssertionError(f"{described}\nraised {error!r}") from error
        assert reply.status in ALLOWED, f"{described}\nwas answered {reply.status}"
        json.loads(reply.body)
        if woken:
            assert may_wake(request), f"{described}\nwoke the host"
            assert reply.status == 200, described
        if request.pristine:
            assert woken, f"{described}\nwas refused ({reply.status})"
        seen["woken" if woken else f"answered {reply.status}"] += 1
    # The grammar reaches every answer, or this test says nothing.
    for answer in ("woken", "answered 200", "answered 401", "answered 405", "answered 413"):
        assert seen[answer] >= REQUESTS // 200, seen


def test_a_request_can_be_made_again() -> None:
    assert make_request(1, 17).pieces == make_request(1, 17).pieces
    assert make_request(1, 17).pieces != make_request(2, 17).pieces
