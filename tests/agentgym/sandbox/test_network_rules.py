"""What an allow-list lets through, and what counts as a request; both without a network."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym.errors import InputError
from agentgym.sandbox import SandboxSpec
from agentgym.sandbox.network.allow_list import AllowList, Rule, canonical, is_public
from agentgym.sandbox.network.request_head import BadRequest, parse

LISTED = AllowList(("pypi.org:443", "*.pythonhosted.org:443", "10.0.0.5:8080", "[fd00::7]:80"))


@pytest.mark.parametrize(
    ("host", "port", "is_listed"),
    [
        ("pypi.org", 443, True),
        ("pypi.org", 80, False),
        ("www.pypi.org", 443, False),
        ("evil-pypi.org", 443, False),
        ("pypi.org.evil.net", 443, False),
        ("files.pythonhosted.org", 443, True),
        ("a.b.pythonhosted.org", 443, True),
        ("pythonhosted.org", 443, False),
        ("evilpythonhosted.org", 443, False),
        ("10.0.0.5", 8080, True),
        ("10.0.0.5", 80, False),
        ("fd00::7", 80, True),
    ],
)
def test_what_is_listed(host: str, port: int, is_listed: bool) -> None:
    assert (LISTED.refusal(host, port) is None) is is_listed


@pytest.mark.parametrize(
    "entry",
    [
        "pypi.org", "pypi.org:", "pypi.org:0", "pypi.org:65536", "pypi.org:+1", "pypi.org:४४३", ":443", "", "*:443",
        "*.*.org:443",
        "*.10.0.0.5:80", "a*.org:443", "http://pypi.org:443", "pypi.org/x:443", "user@pypi.org:443", "fd00::7:80",
        "[10.0.0.5]:80", "py pi.org:443", "pypi..org:443", "127.1:80", "0x7f000001:80", "2130706433:80",
        "0177.0.0.1:80",
        "fe80::1%eth0:80", "pypi.org:443\n", 443, None,
    ],
)  # fmt: skip
def test_what_is_no_entry(entry: str) -> None:
    with pytest.raises(InputError, match=r"sandbox\.allow_network takes entries such as"):
        SandboxSpec(allow_network=(entry,))


def test_the_spec_checks_and_shows_it() -> None:
    spec = SandboxSpec(allow_network=("pypi.org:443", "*.pythonhosted.org:443"))
    assert spec.relaxations == ("allow_network=pypi.org:443 *.pythonhosted.org:443",)
    assert spec.needs_container == ()
    assert SandboxSpec(network="bridge", writable_root=True).needs_container == ("network=bridge", "writable_root")
    with pytest.raises(InputError, match="give one of the two"):
        SandboxSpec(allow_network=("pypi.org:443",), network="bridge")
    with pytest.raises(InputError, match="is a list of entries, got the text"):
        SandboxSpec(allow_network="pypi.org:443")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="network_mb must be finite and > 0"):
        SandboxSpec(network_mb=0)


@pytest.mark.parametrize(
    "text",
    [
        "127.0.0.1", "127.8.9.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254",
        "169.254.170.2",
        "100.64.0.1", "100.100.100.200", "168.63.129.16", "192.0.2.1", "198.18.0.1", "224.0.0.251", "240.0.0.1",
        "255.255.255.255",
        "::", "::1", "fe80::1", "fd00:ec2::254", "ff02::1", "2001:db8::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1",
        "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "2002:a00:1::1", "2001:0:a00:1::",
        "2001:0:808:808:0:0:80ff:fffe",
    ],
)  # fmt: skip
def test_what_is_no_public_address(text: str) -> None:
    assert not is_public(ipaddress.ip_address(text))


@pytest.mark.parametrize("text", ["1.1.1.1", "151.101.0.223", "2a04:4e42::223", "::ffff:1.1.1.1", "64:ff9b::101:101"])
def test_what_is_public(text: str) -> None:
    assert is_public(ipaddress.ip_address(text))


def test_a_private_address_is_reached_only_where_it_is_listed() -> None:
    inside, metadata = ipaddress.ip_address("10.0.0.5"), ipaddress.ip_address("169.254.169.254")
    assert LISTED.address_refusal(inside, 8080) is None
    assert "10.0.0.5 is not public" in str(LISTED.address_refusal(inside, 443))
    assert "169.254.169.254 is not public" in str(LISTED.address_refusal(metadata, 443))
    assert LISTED.address_refusal(ipaddress.ip_address("1.1.1.1"), 443) is None


def test_names_are_written_one_way() -> None:
    assert canonical("PyPI.org.") == "pypi.org"
    assert canonical("[FD00:0::7]") == "fd00::7"
    assert canonical("10.0.0.5") == "10.0.0.5"
    for other in (
        "127.1",
        "0x7f.0.0.1",
        "0x7f000001",
        "2130706433",
        "010.0.0.1",
        "1.2.3.4.5",
        "a b",
        "ü.org",
        "a%2eb.org",
    ):
        assert canonical(other) is None, other


# ------------------------------------------------------------------------------------------------------------ requests


def head(*lines: str) -> bytes:
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def test_a_tunnel() -> None:
    request = parse(head("CONNECT Files.PythonHosted.org:443 HTTP/1.1", "Host: something.else"))
    assert (request.host, request.port, request.is_tunnel) == ("files.pythonhosted.org", 443, True)
    assert parse(head("CONNECT [fd00::7]:80 HTTP/1.0")).host == "fd00::7"


def test_a_plain_request_goes_on_with_the_host_that_was_checked() -> None:
    request = parse(
        head(
            "POST http://Mirror.test:8080/a/b?c=d#e HTTP/1.1",
            "Host: inner.secret",
            "Proxy-Authorization: Basic eDp5",
            "Proxy-Connection: keep-alive",
            "Connection: keep-alive, x-mine",
            "Upgrade: websocket",
            "Content-Length: 5",
            "X-Mine: a\tb ",
        )
    )
    assert (request.host, request.port, request.body_bytes) == ("mirror.test", 8080, 5)
    assert request.head is not None
    assert request.head.split(b"\r\n") == [
        b"POST /a/b?c=d HTTP/1.1",
        b"Host: mirror.test:8080",
        b"Content-Length: 5",
        b"X-Mine: a\tb",
        b"Connection: close",
        b"",
        b"",
    ]
    assert parse(head("GET http://mirror.test HTTP/1.0")).head == head(
        "GET / HTTP/1.1", "Host: mirror.test", "Connection: close"
    )
    assert parse(head("GET http://mirror.test?q HTTP/1.1")).head == head(
        "GET /?q HTTP/1.1", "Host: mirror.test", "Connection: close"
    )


@pytest.mark.parametrize(
    "lines",
    [
        ["CONNECT pypi.org HTTP/1.1"],
        ["CONNECT pypi.org:443@evil.net:80 HTTP/1.1"],
        ["CONNECT user:x@pypi.org:443 HTTP/1.1"],
        ["CONNECT http://pypi.org:443 HTTP/1.1"],
        ["CONNECT pypi.org:443/../evil HTTP/1.1"],
        ["CONNECT pypi.org%00.evil.net:443 HTTP/1.1"],
        ["CONNECT pypi.org:443 evil.net:80 HTTP/1.1"],
        ["CONNECT pypi.org:443\tHTTP/1.1"],
        ["CONNECT pypi.org:443 HTTP/2.0"],
        ["CONNECT fd00::7:80 HTTP/1.1"],
        ["CONNECT [10.0.0.5]:80 HTTP/1.1"],
        ["CONNECT pypi.org:0443443 HTTP/1.1"],
        ["connect pypi.org:443 HTTP/1.1"],
        ["GET / HTTP/1.1", "Host: pypi.org"],
        ["GET https://pypi.org/ HTTP/1.1"],
        ["GET ftp://pypi.org/ HTTP/1.1"],
        ["GET http://pypi.org@evil.net/ HTTP/1.1"],
        ["GET http://pypi.org\\@evil.net/ HTTP/1.1"],
        ["GET http:///evil HTTP/1.1"],
        ["GET http://pypi.org/\nHost:evil HTTP/1.1"],
        ["GET http://pypi.org/ HTTP/1.1", "X: a\nHost: evil.net"],
        ["GET http://pypi.org/ HTTP/1.1", "X: a\rHost: evil.net"],
        ["GET http://pypi.org/ HTTP/1.1", "X: a\0b"],
        ["GET http://pypi.org/ HTTP/1.1", " folded: line"],
        ["GET http://pypi.org/ HTTP/1.1", "no colon"],
        ["GET http://pypi.org/ HTTP/1.1", "Host : evil.net"],
        ["POST http://pypi.org/ HTTP/1.1", "Transfer-Encoding: chunked"],
        ["POST http://pypi.org/ HTTP/1.1", "Content-Length: 3", "Transfer-Encoding: chunked"],
        ["POST http://pypi.org/ HTTP/1.1", "Content-Length: 3", "Content-Length: 4"],
        ["POST http://pypi.org/ HTTP/1.1", "Content-Length: 3, 4"],
        ["POST http://pypi.org/ HTTP/1.1", "Content-Length: -1"],
        ["POST http://pypi.org/ HTTP/1.1", "Content-Length: 0x10"],
        [""],
    ],
)
def test_what_is_no_request(lines: list[str]) -> None:
    with pytest.raises(BadRequest):
        parse(head(*lines))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_refused(data: bytes) -> None:
    for text in (
        data + b"\r\n\r\n",
        b"CONNECT " + data + b" HTTP/1.1\r\n\r\n",
        b"GET http://" + data + b"/ HTTP/1.1\r\n\r\n",
    ):
        try:
            request = parse(text)
        except BadRequest:
            continue
        assert canonical(request.host if ":" not in request.host else f"[{request.host}]") == request.host
        assert 0 < request.port < 65_536
        if request.head is not None:
            assert request.head.index(b"\r\n\r\n") == len(request.head) - 4
            assert request.head.lower().count(b"\nhost:") == 1


def test_rules_are_read_once() -> None:
    assert Rule.parsed("*.Example.org:443") == Rule("example.org", 443, below=True)
