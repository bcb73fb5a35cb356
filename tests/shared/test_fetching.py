"""A file from the internet (R12): https only, public addresses only, whatever a name says later."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from shared.errors import FetchRefused
from shared.fetching import Fetcher, is_public

HOST = "files.example"


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.100.100.200"),
        "0.0.0.0",  # noqa: S104 - nothing is bound
        *("224.0.0.1", "255.255.255.255", "168.63.129.16", "192.0.0.192", "198.18.0.1"),
        *("::1", "::", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "2001:db8::1"),
        *("::ffff:127.0.0.1", "::ffff:a9fe:a9fe", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::1", "2002:7f00:1::"),
        "2001:0:0:0:0:0:80ff:fffe",  # Teredo for 127.0.0.1
    ],
)
def test_an_address_of_a_machine_a_network_or_a_cloud_is_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8"])
def test_an_address_of_the_internet_is(address: str) -> None:
    assert is_public(address)


class Site:
    """A web server with a certificate for HOST, on loopback."""

    def __init__(self, directory: Path) -> None:
        self.asked: list[tuple[str, str]] = []
        self.release = threading.Event()
        key, certificate = str(directory / "key.pem"), str(directory / "certificate.pem")
        make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        names = ["-subj", f"/CN={HOST}", "-addext", f"subjectAltName=DNS:{HOST},DNS:other.example"]
        subprocess.run(
            [*make, "-keyout", key, "-out", certificate, "-days", "2", *names], check=True, capture_output=True
        )
        server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server_side.load_cert_chain(certificate, key)
        self.trusting = ssl.create_default_context(cafile=certificate)
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                site.asked.append((self.headers["host"], self.path))
                site.answer(self)

            def log_message(self, format: str, *arguments: Any) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.socket = server_side.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = handler.path.partition("?")[0]
        redirects = {
            "/moved": "/data.csv",
            "/to-http": f"http://{HOST}/data.csv",
            "/inside": "https://inside.example/secret",
            "/circle": "/circle",
        }
        if path == "/drip":
            handler.send_response(200)
            handler.send_header("content-length", "1000")
            handler.end_headers()
            while not self.release.wait(0.05):
                handler.wfile.write(b"x")
            return
        body = b"" if path in redirects else {"/data.csv": b"a,b\n", "/big": b"x" * 101}.get(path, b"nothing here")
        handler.send_response(302 if path in redirects else 200 if path in ("/data.csv", "/big", "/short") else 404)
        if path in redirects:
            handler.send_header("location", redirects[path])
        handler.send_header("content-length", str(len(body) + (10 if path == "/short" else 0)))
        handler.end_headers()
        handler.wfile.write(body)
        handler.close_connection = True

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed: it makes the certificate")
    site = Site(tmp_path_factory.mktemp("site"))
    yield site
    site.close()


class Names:
    """What names resolve to. `looks` counts."""

    def __init__(self, **known: list[str]) -> None:
        self.known = known
        self.looks: list[str] = []

    def resolve(self, host: str, port: int, *_: object, **__: object) -> list[Any]:
        self.looks.append(host)
        if host not in self.known:
            raise socket.gaierror
        found = self.known[host]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (found[0], port))] + [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in found[1:]
        ]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """`socket.create_connection` resolves too, so it sees the same names: a second look would be counted."""
        real = socket.getaddrinfo

        def resolve(host: Any, port: Any, *arguments: Any, **options: Any) -> Any:
            if str(host).endswith(".example"):
                return self.resolve(str(host), port)
            return real(host, port, *arguments, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(socket, "getaddrinfo", resolve)
            yield


PUBLIC = {HOST: ["127.0.0.1"], "inside.example": ["10.0.0.1"], "other.example": ["127.0.0.1"]}


@pytest.fixture
def names() -> Iterator[Names]:
    names = Names(**PUBLIC)
    with names.installed():
        yield names


def fetcher(site: Site, **options: Any) -> Fetcher:
    """Here, loopback is the internet."""
    return Fetcher(is_allowed=lambda address: address == "127.0.0.1", context=site.trusting, **options)


async def refusal(fetcher: Fetcher, url: str, max_bytes: int = 100) -> str:
    with pytest.raises(FetchRefused) as raised:
        await fetcher.fetch(url, max_bytes)
    assert "hush" not in str(raised.value)
    return str(raised.value)


async def test_a_file_is_fetched_from_the_address_that_was_checked(site: Site, names: Names) -> None:
    url = f"https://{HOST}:{site.port}"
    assert await fetcher(site).fetch(f"{url}/data.csv?signature=hush", 100) == b"a,b\n"
    assert site.asked[-1] == (f"{HOST}:{site.port}", "/data.csv?signature=hush")
    assert await fetcher(site).fetch(f"{url}/moved", 100) == b"a,b\n"
    assert names.looks == [HOST] * 3  # once for each address: nothing asks the name again


async def test_a_name_that_changes_its_mind_changes_nothing(site: Site, names: Names) -> None:
    """DNS rebinding: public when it is checked, another machine when it is connected to."""

    def allowed(address: str) -> bool:
        names.known[HOST] = ["10.0.0.1"]
        return address == "127.0.0.1"

    fetch = Fetcher(is_allowed=allowed, context=site.trusting).fetch
    assert await fetch(f"https://{HOST}:{site.port}/data.csv", 100) == b"a,b\n"


async def test_a_name_with_one_address_inside_is_refused(site: Site, names: Names) -> None:
    names.known[HOST] = ["127.0.0.1", "10.0.0.1"]
    asked = len(site.asked)
    assert "not public" in await refusal(fetcher(site), f"https://{HOST}:{site.port}/data.csv?hush")
    assert len(site.asked) == asked


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        (f"http://{HOST}/hush", "not https"),
        ("file:///etc/hush", "not https"),
        ("https://user:hush@files.example/", "password"),
        ("https:///hush", "no host"),
        ("https://files.example:hush/", "no usable address"),
        ("https://[hush/", "no usable address"),
        ("https://unknown.example/hush", "not known"),
        ("https://inside.example/hush", "not public"),
        ("https://127.0.0.2/hush", "not public"),
        ("https://2130706434/hush", "not public"),  # 127.0.0.2 in one number
        ("https://[::ffff:127.0.0.1]/hush", "not public"),
    ],
)
async def test_what_is_no_public_https_address_is_refused(site: Site, names: Names, url: str, reason: str) -> None:
    assert reason in await refusal(fetcher(site), url)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/to-http", "not https"),
        ("/inside", "not public"),
        ("/circle", "redirects more than 3 times"),
        ("/gone?hush", "answered 404"),
        ("/big", "larger than 100 bytes"),
        ("/short", "could not be read: IncompleteRead"),
        ("/sp ace", "could not be read: InvalidURL"),
        ("/\u00e9", "could not be read: UnicodeEncodeError"),
    ],
)
async def test_an_answer_that_is_no_file_is_refused(site: Site, names: Names, path: str, reason: str) -> None:
    assert reason in await refusal(fetcher(site), f"https://{HOST}:{site.port}{path}")


@pytest.mark.parametrize("seconds", [0.4, 0.0], ids=["on the way", "before there is a connection to end"])
async def test_a_server_that_takes_its_time_byte_by_byte_does_not_keep_us(
    site: Site, names: Names, seconds: float
) -> None:
    text = await refusal(fetcher(site, seconds=seconds), f"https://{HOST}:{site.port}/drip")
    assert text == f"it did not arrive within {seconds:g} s"


async def test_the_certificate_must_be_the_names(site: Site, names: Names) -> None:
    names.known["wrong.example"] = ["127.0.0.1"]
    url = f"https://wrong.example:{site.port}/data.csv"
    assert "no certificate for that name" in await refusal(fetcher(site), url)
    strangers = Fetcher(is_allowed=lambda _: True)  # the machine's own certificates
    assert "no certificate for that name" in await refusal(strangers, f"https://{HOST}:{site.port}/data.csv")


async def test_without_a_tests_leave_loopback_is_not_public(site: Site, names: Names) -> None:
    assert "not public" in await refusal(Fetcher(context=site.trusting), f"https://{HOST}:{site.port}/data.csv")
