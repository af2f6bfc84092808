"""A real server before crowds of connections: who is let in, who makes room, and what is kept of them."""

from __future__ import annotations

import asyncio
import contextlib
import re
import resource
import selectors
import socket
from collections.abc import Iterator

import door_kit
import psutil
import pytest
import uvloop
from door_kit import listen
from kit import RunningServer, photo, running
from starlette.responses import Response

from api.serve import many_handles
from core.settings import Settings

# A request whose body does not come.
HALF = b"POST /run/echo HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\nContent-Length: 9\r\n"
LIVE = b"GET /health/live HTTP/1.1\r\nHost: 127.0.0.1\r\n"


@pytest.fixture(autouse=True)
def many_files() -> Iterator[None]:
    """This process may open as many as the crowd has members; the server is started as under `ulimit -Sn 1024`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def serving(tmp_path, *args: str) -> Iterator[RunningServer]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    with running(tmp_path / "outputs", *args, ready=False, devices="cpu:1", models="echo") as started:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        yield started


def dial(server: RunningServer, address: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), 30, (address, 0))


def answer(line: socket.socket) -> tuple[int, str]:
    """Status and head of the next answer; 0 when the connection has ended."""
    line.settimeout(30)
    data = b""
    with contextlib.suppress(ConnectionError):
        while b"\r\n\r\n" not in data and (more := line.recv(1 << 16)):
            data += more
    return (int(data.split()[1]), data.decode("latin-1")) if data else (0, "")


def ask(line: socket.socket, *headers: str) -> int:
    line.sendall(LIVE + "".join(f"{header}\r\n" for header in headers).encode() + b"\r\n")
    return answer(line)[0]


def open_connections(server: RunningServer) -> int:
    found = re.search(r"^imagepool_http_connections (\d+)", server.get("/metrics").text, re.MULTILINE)
    assert found is not None
    return int(found[1])


def test_two_thousand_connections_of_which_two_hundred_are_active_are_served(tmp_path):
    image = photo(1)
    post = b"POST /run/echo HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n%b"
    with serving(tmp_path) as server, contextlib.ExitStack() as stack:
        lines = [stack.enter_context(dial(server)) for _ in range(2_000)]
        assert {ask(line) for line in lines[::10]} == {200}
        active = lines[:200]
        for line in active:
            line.sendall(post % (len(image), image))
        assert {answer(line)[0] for line in active} == {200}
        assert open_connections(server) > 2_000
        assert {ask(line) for line in lines[1000::10]} == {200}


def test_idle_connections_make_room_and_busy_ones_are_left(tmp_path):
    with serving(tmp_path, "--max-connections", "40", "--connections-per-address", "30") as server:
        with contextlib.ExitStack() as stack:
            mine = stack.enter_context(dial(server, "127.0.0.2"))
            assert ask(mine) == 200
            crowd = [stack.enter_context(dial(server, "127.0.0.3")) for _ in range(100)]
            others = [stack.enter_context(dial(server, f"127.0.1.{number}")) for number in range(1, 15)]
            assert {ask(line) for line in others} == {200}
            assert ask(mine) == 200, "it holds least, so it is closed last"
            assert ask(crowd[-1]) == 200 and ask(crowd[0]) == 0
            assert open_connections(server) <= 40
        with contextlib.ExitStack() as stack:
            busy = [stack.enter_context(dial(server, "127.0.0.4")) for _ in range(20)]
            for line in busy:
                line.sendall(HALF + b"\r\n")
            for _ in busy:  # the server has read every head once it has answered this
                assert ask(stack.enter_context(dial(server, "127.0.0.5"))) == 200
            status, head = answer(stack.enter_context(dial(server, "127.0.0.4")))
            assert status == 503 and "retry-after: 1" in head and "connection: close" in head


def test_whoever_is_turned_away_is_told_why_however_many_they_are(tmp_path):
    with serving(tmp_path, "--max-connections", "20") as server, contextlib.ExitStack() as stack:
        for number in range(20):
            line = stack.enter_context(dial(server, f"127.0.0.{number % 4 + 2}"))
            line.sendall(HALF + b"Expect: 100-continue\r\n\r\n")
            assert answer(line)[0] == 100  # it is busy with this one
        away = [stack.enter_context(dial(server, "127.0.0.9")) for _ in range(150)]
        assert [answer(line)[0] for line in away] == [503] * 150


def test_of_an_address_that_sends_slowly_there_is_room_for_others(tmp_path):
    with serving(tmp_path, "--max-connections", "60") as server, contextlib.ExitStack() as stack:
        slow = [stack.enter_context(dial(server, "127.0.0.5")) for _ in range(100)]
        for line in slow:
            with contextlib.suppress(ConnectionError):
                line.sendall(HALF + b"\r\n")
        others = [stack.enter_context(dial(server, "127.0.0.6")) for _ in range(25)]
        assert {ask(line) for line in others} == {200}


def test_the_address_that_a_trusted_proxy_names_is_the_one_that_counts(tmp_path):
    flags = "--trusted-proxies", "127.0.0.2/32", "--tiers", "anonymous=2/-/-/-", "--connections-per-address", "5"
    with serving(tmp_path, *flags) as server:
        def post(address: str, *headers: str) -> int:
            with dial(server, address) as line:
                head = "POST /run/echo HTTP/1.1", "Host: 127.0.0.1", "Content-Length: 0", *headers
                line.sendall("\r\n".join(head).encode() + b"\r\n\r\n")
                return answer(line)[0]

        for client in ("1.2.3.4", "1.2.3.5"):
            told = f"X-Forwarded-For: 9.9.9.9, {client}"
            assert [post("127.0.0.2", told) == 429 for _ in range(3)] == [False, False, True]
        spoofed = [post("127.0.0.3", f"X-Forwarded-For: 7.7.7.{number}") == 429 for number in range(3)]
        assert spoofed == [False, False, True], "from a stranger the header is not heard"
        with contextlib.ExitStack() as stack:
            proxied = [stack.enter_context(dial(server, "127.0.0.2")) for _ in range(20)]
            assert {ask(line, f"X-Forwarded-For: 1.1.1.{number}") for number, line in enumerate(proxied)} == {200}
            for line in proxied[:5]:
                line.sendall(HALF + b"X-Forwarded-For: 8.8.8.8\r\n\r\n")
            assert {ask(line, "X-Forwarded-For: 1.1.1.1") for line in proxied[5:10]} == {200}
            assert ask(proxied[10], "X-Forwarded-For: 8.8.8.8") == 503
            assert ask(proxied[10], "X-Forwarded-For: 8.8.8.9") == 200, "the connection itself lives on"


def test_who_opens_connections_faster_than_he_may_waits_or_is_closed_and_others_are_served(tmp_path):
    flags = "--new-connections", "2", "--trusted-proxies", "127.0.0.4/32"
    with serving(tmp_path, *flags) as server, contextlib.ExitStack() as stack:
        fast = [stack.enter_context(dial(server, "127.0.0.2")) for _ in range(60)]
        assert ask(stack.enter_context(dial(server, "127.0.0.3"))) == 200
        for line in fast:
            with contextlib.suppress(ConnectionError):
                line.sendall(LIVE + b"\r\n")
        told = [answer(line)[0] for line in fast]
        assert set(told[:10]) == {200}, "a burst may come at once"
        assert 0 < told.count(0) < 50 and set(told) == {0, 200}
        assert {ask(stack.enter_context(dial(server, "127.0.0.4"))) for _ in range(60)} == {200}
        assert server.log.read_text().count("--new-connections") == 1


def test_requests_sent_on_and_on_without_reading_an_answer_do_not_fill_memory(tmp_path):
    with serving(tmp_path) as server:
        master = psutil.Process(server.process.pid)
        before = master.memory_info().rss
        with dial(server) as line, selectors.DefaultSelector() as ready:
            line.setblocking(False)
            ready.register(line, selectors.EVENT_WRITE)
            data, sent = (LIVE + b"\r\n") * 20_000, 0
            while sent < 26 << 20 and ready.select(1):
                sent += line.send(data)
            assert server.get("/health/live").status_code == 200
            assert master.memory_info().rss - before < 32 << 20
        assert "Traceback" not in server.log.read_text()


def test_who_waits_outside_is_let_in_many_at_a_time():
    """On the loop that serves. With one handle it would take a turn for each."""
    door = socket.create_server(("127.0.0.1", 0), backlog=256)
    clients = [socket.create_connection(door.getsockname()) for _ in range(128)]
    made = []

    class Connection(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            made.append(transport)

    async def turns() -> int:
        loop = asyncio.get_running_loop()
        servers = [await loop.create_server(Connection, sock=handle) for handle in many_handles([door])]
        count = 0
        while len(made) < len(clients):
            await asyncio.sleep(0)
            count += 1
        for one in servers:
            one.close()
        for transport in made:
            transport.close()
        return count

    assert uvloop.run(turns()) <= len(clients) // 4
    for client in clients:
        client.close()


def test_who_comes_too_soon_is_not_heard_before_his_time(tmp_path):
    """On the loop that serves: uvloop reads whatever `connection_made` says."""
    settings = Settings(outputs=tmp_path / "outputs", new_connections=1)
    began: list[float] = []

    async def app(scope, receive, send) -> None:
        began.append(asyncio.get_running_loop().time())
        await Response()(scope, receive, send)

    async def ask_all() -> float:
        async with listen(app, settings) as port, contextlib.AsyncExitStack() as stack:
            start = asyncio.get_running_loop().time()
            lines = [await stack.enter_async_context(door_kit.dial(port)) for _ in range(6)]
            for _, writer in lines:
                writer.write(LIVE + b"\r\n")
            for reader, _ in lines:
                assert (await door_kit.read_answer(reader))[0] == 200
            return max(began) - start

    assert uvloop.run(ask_all()) > 0.99
