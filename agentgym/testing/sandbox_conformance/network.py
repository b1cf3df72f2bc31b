"""What a box with an allow-list reaches, asked from inside and heard by a server of the host."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Iterator

from agentgym.sandbox.spec import SandboxSpec
from agentgym.testing.sandbox_conformance.questions import Opener, answer

ASK = """
import http.client, json, os, socket
proxy = os.environ["http_proxy"].removeprefix("http://").split(":")
def asked(url, tunnel=None):
    connection = http.client.HTTPConnection(proxy[0], int(proxy[1]), timeout=20)
    if tunnel: connection.set_tunnel(*tunnel)
    try:
        connection.request("GET", url)
        response = connection.getresponse()
        return [response.status, response.read().decode()]
    except OSError as error: return [int(str(error).split("failed: ")[1].split()[0]), ""] if "failed: " in str(error) else [0, str(error)]
    finally: connection.close()
listed, other = %d, %d
said = {
    "plain": asked(f"http://127.0.0.1:{listed}/plain"),
    "tunnel": asked("/tunnel", ("127.0.0.1", listed)),
    "port": asked(f"http://127.0.0.1:{other}/"),
    "host": asked("http://example.org/"),
    "metadata": asked("http://169.254.169.254/latest/meta-data/"),
    "private": asked(f"http://localhost:{other}/"),
    "tunnel to another": asked("/", ("127.0.0.1", other)),
}
try: socket.create_connection(("127.0.0.1", listed), 3).close(); said["direct"] = True
except OSError: said["direct"] = False
try: socket.getaddrinfo("example.org", 80); said["names"] = True
except OSError: said["names"] = False
said["interfaces"] = [name for _, name in socket.if_nameindex()]
said["https_proxy"] = os.environ["https_proxy"]
print(json.dumps(said))
"""  # noqa: E501
TUNNELS = {"tunl0", "sit0", "ip6tnl0", "gre0", "erspan0", "gretap0", "ip6gre0", "ip_vti0", "ip6_vti0"}  # never up


class HostServer(http.server.ThreadingHTTPServer):
    """Answers with the path that was asked for, and remembers it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.heard: list[str] = []

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    @contextlib.contextmanager
    def serving(self) -> Iterator[HostServer]:
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()
            thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: HostServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        self.server.heard.append(self.path)
        data = self.path.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


def reaches_what_is_listed_and_nothing_else(open_box: Opener) -> None:
    with HostServer().serving() as listed, HostServer().serving() as other:
        # the second is listed by a name, which leads to an address that is not public and not listed
        allow = (f"127.0.0.1:{listed.port}", f"localhost:{other.port}")
        with open_box(SandboxSpec(allow_network=allow)) as box:
            said = answer(box, ASK % (listed.port, other.port))
            assert isinstance(said, dict)
            assert said["plain"] == [200, "/plain"]
            assert said["tunnel"] == [200, "/tunnel"]
            assert [said[name][0] for name in ("port", "host", "metadata", "private")] == [403] * 4, said
            assert "is not public and not listed itself" in said["private"][1]
            assert said["tunnel to another"][0] == 403
            assert (said["direct"], said["names"]) == (False, False)
            assert set(said["interfaces"]) - TUNNELS <= {"lo"}
            assert said["https_proxy"].startswith("http://127.0.0.1:")
            assert listed.heard == ["/plain", "/tunnel"]
            assert other.heard == []
            assert box.limits["network"].startswith("relaxed: ")
            assert all(entry in box.limits["network"] for entry in allow)
            assert box.spec.relaxations == (f"allow_network={' '.join(allow)}",)
            box.exec("kill -KILL -1")  # what carries it is the worker, which stays
            assert answer(box, ASK % (listed.port, other.port))["plain"] == [200, "/plain"]  # type: ignore[index]
        seen = box.network
        assert (seen.connections, seen.refused) == (14, 10)
        assert {(one.host, one.decision) for one in seen.recent} >= {
            ("127.0.0.1", "allowed"),
            ("169.254.169.254", "refused"),
            ("localhost", "refused"),
        }
