"""What goes wrong between controller and policy server: every fault is noticed, named and survived."""

from __future__ import annotations

import random
import re
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from proxy import Proxy
from serving import (
    PATIENCE_S,
    StubServer,
    answer,
    connected,
    fake_server,
    observation,
    replies,
    stub_server,
    wait_until,
)
from test_wire import mutated
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from vla.serve.client import Client
from vla.serve.wire import VERSION, Beat, Chunk, Hello, Refusal, encode, make_ask, pack_floats

HELLO = Hello(VERSION, "ab" * 32, {"front": (32, 32), "wrist": (32, 32)}, 7, 2, 10, 3, 1, 0)


@pytest.fixture(scope="module")
def server() -> Iterator[StubServer]:
    with stub_server("--port=0") as server:
        yield server


def a_chunk(seq: int, asked: dict[str, Any], **changes: Any) -> bytes:
    """The right answer to an observation by a server that says HELLO."""
    fields: dict[str, Any] = dict(
        episode=1, obs_seq=seq, captured_ns=asked["captured_ns"], start=asked["start"], model=HELLO.model,
        actions=bytes(4 * 6), inference_ns=1,
    )  # fmt: skip
    return encode(Chunk(**fields | changes))


# --- the server's process ---


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_killed_server_is_noticed_and_its_successor_found(kind: str, tmp_path: Path) -> None:
    option = f"--unix={tmp_path / 'policy'}" if kind == "unix" else "--port=0"
    with stub_server(option) as server, connected(server.url) as client:
        client.ask(**observation(1, "sleep 5"))
        wait_until(lambda: client.counts["sent"])
        server.end(signal.SIGKILL)
        (reply,) = replies(client)
        assert (reply.kind, reply.seq) == ("lost", 1)
        wait_until(lambda: not client.connected)
        client.ask(**observation(2))
        assert [(r.kind, r.seq) for r in replies(client)] == [("lost", 2)]  # at once, not when one is back
        if kind == "tcp":
            option = f"--port={server.url.rpartition(':')[2]}"
        with stub_server(option):
            wait_until(lambda: client.connected)
            assert answer(client, 3).kind == "chunk"
            assert client.poll() == []
            assert client.counts["reconnects"] == 1
            assert not client.changed
            assert client.error is None


def test_a_stopped_server_is_noticed_and_goes_on(server: StubServer) -> None:
    with connected(server.url, reply_timeout_s=0.5, connect_timeout_s=0.3) as client:
        server.send(signal.SIGSTOP)
        try:
            began = time.monotonic()
            client.ask(**observation(1))
            (reply,) = replies(client)
            assert (reply.kind, reply.seq) == ("lost", 1)
            assert "got nothing for 0.5 s" in reply.reason
            assert 0.3 < time.monotonic() - began < 5
            wait_until(lambda: client.error and "timed out" in client.error)
            assert not client.connected
        finally:
            server.send(signal.SIGCONT)
        wait_until(lambda: client.connected)
        assert answer(client, 2).kind == "chunk"
        assert client.counts["timeouts"] >= 1


def test_a_silent_server_is_noticed_without_asking(server: StubServer) -> None:
    with connected(server.url, reply_timeout_s=0.4, connect_timeout_s=0.3) as client:
        time.sleep(0.6)
        assert client.connected  # beats are enough
        server.send(signal.SIGSTOP)
        try:
            wait_until(lambda: not client.connected)
            assert time.monotonic() - client.heard >= 0.4
        finally:
            server.send(signal.SIGCONT)


def test_an_answer_that_takes_too_long_is_lost_though_the_server_beats(server: StubServer) -> None:
    with connected(server.url, reply_timeout_s=0.3) as client:
        client.ask(**observation(1, "sleep 0.8"))
        (reply,) = replies(client)
        assert reply.kind == "lost"
        assert reply.received - client.heard < 0.3  # it was heard until the end
        wait_until(lambda: client.connected)
        time.sleep(0.6)  # the old inference ends
        assert client.poll() == []
        assert answer(client, 2).kind == "chunk"


def test_a_server_that_takes_nothing_does_not_hold_the_client() -> None:
    def talk(connection: Any) -> None:
        connection.send(encode(HELLO))
        connection.recv_flow_control.acquire()  # never reads again
        time.sleep(2)
        connection.recv_flow_control.release()

    with fake_server(talk) as url, connected(url, reply_timeout_s=0.4) as client:
        images = {name: np.zeros((1, 700, 900, 3), np.uint8) for name in ("front", "wrist")}
        began = time.monotonic()
        client.ask(**observation(1, images=images))
        assert time.monotonic() - began < 0.2
        assert replies(client)[0].kind == "lost"


def test_another_model_shows(server: StubServer) -> None:
    port = "--port=0"
    with stub_server(port) as first, connected(first.url) as client:
        port = f"--port={first.url.rpartition(':')[2]}"
        assert not client.changed
        first.end()
        wait_until(lambda: not client.connected)
        with stub_server(port, name="another"):
            wait_until(lambda: client.connected)
            assert client.changed
        wait_until(lambda: not client.connected)
        assert client.changed
        with stub_server(port, name="stub"):
            wait_until(lambda: client.connected)
            assert not client.changed


# --- what arrives ---


def test_late_answers_are_dropped(server: StubServer) -> None:
    with Proxy(server.url) as proxy, connected(proxy.url, reply_timeout_s=0.3) as client:
        assert answer(client, 1).kind == "chunk"
        proxy.delay_s = 0.5
        client.ask(**observation(2))
        (reply,) = replies(client)
        assert (reply.kind, reply.seq) == ("lost", 2)
        proxy.delay_s = 0.0
        wait_until(lambda: client.connected)
        time.sleep(0.5)
        assert client.poll() == []
        assert answer(client, 3, value=3.0).actions[0, 0] == 3.0  # type: ignore[index]


def test_duplicates_are_dropped(server: StubServer) -> None:
    with Proxy(server.url, duplicate=1.0) as proxy, connected(proxy.url) as client:
        for seq in range(20):
            reply = answer(client, seq, value=float(seq))
            assert reply.kind == "chunk"
            assert reply.actions is not None
            assert reply.actions[0, 0] == seq
        wait_until(lambda: client.counts["dropped"] == 20)
        assert client.poll() == []


def test_through_a_bad_network_every_ask_has_its_own_answer_or_none(server: StubServer) -> None:
    bad = dict(duplicate=0.3, reorder=0.3, flip=0.1, drop=0.05, delay_s=0.002)
    got = {"chunk": 0, "refused": 0, "lost": 0}
    with Proxy(server.url, **bad, asks=True) as proxy, connected(proxy.url, reply_timeout_s=0.2) as client:
        for seq in range(40):
            wait_until(lambda: client.connected)
            client.ask(**observation(seq, value=float(seq)))
            (reply,) = replies(client)
            assert reply.seq == seq
            got[reply.kind] += 1
        assert all(proxy.counts[name] for name in ("duplicate", "reorder", "flip", "drop"))
        proxy.drop = proxy.flip = proxy.duplicate = proxy.reorder = 0
        wait_until(lambda: client.connected)
        wait_until(lambda: answer(client, 100 + client.counts["sent"]).kind == "chunk")
        assert got["chunk"] > 10
        assert got["lost"] > 0
    assert answer_directly(server)


def answer_directly(server: StubServer) -> bool:
    with connected(server.url) as client:
        return answer(client, 1).kind == "chunk"


@pytest.mark.parametrize(
    "wrong",
    [{"obs_seq": 6}, {"obs_seq": 8}, {"episode": 2}, {"captured_ns": 1}, {"start": 0}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_an_answer_to_another_question_is_dropped(wrong: dict[str, int]) -> None:
    asked = observation(7)

    def talk(connection: Any) -> None:
        connection.send(encode(HELLO))
        connection.recv()
        connection.send(a_chunk(7, asked, **wrong))
        connection.send(encode(Refusal(6, "of another")))
        connection.send(a_chunk(7, asked, actions=pack_floats_of(5.0)))
        connection.send(a_chunk(7, asked))
        connection.recv()

    with fake_server(talk) as url, connected(url) as client:
        client.ask(**asked)
        (reply,) = replies(client)
        assert reply.kind == "chunk"
        assert reply.actions is not None
        assert (reply.actions == 5.0).all()
        wait_until(lambda: client.counts["dropped"] == 3)
        assert client.poll() == []


def pack_floats_of(value: float) -> bytes:
    return pack_floats(np.full((3, 2), value))


@pytest.mark.parametrize(
    ("reason", "data"),
    [
        ("^model: ", lambda asked: a_chunk(7, asked, model="cd" * 32)),
        ("^actions: got 5 numbers", lambda asked: a_chunk(7, asked, actions=bytes(20))),
        ("not finite", lambda asked: a_chunk(7, asked).replace(bytes(24), struct.pack("<f", float("nan")) * 6)),
        ("^message: ", lambda asked: b"\xc1"),
        ("because", lambda asked: encode(Refusal(-1, "because"))),
    ],
)  # fmt: skip
def test_a_wrong_chunk_is_refused(reason: str, data: Any) -> None:
    asked = observation(7)

    def talk(connection: Any) -> None:
        connection.send(encode(HELLO))
        connection.recv()
        connection.send(data(asked))
        connection.recv()

    with fake_server(talk) as url, connected(url) as client:
        client.ask(**asked)
        (reply,) = replies(client)
        assert (reply.kind, reply.actions) == ("refused", None)
        assert re.search(reason, reply.reason)
        assert client.counts["refused"] == 1
        assert client.connected


# --- strangers ---


@pytest.mark.parametrize("n", [300, pytest.param(20_000, marks=pytest.mark.slow)])
def test_the_server_survives_mutated_messages(n: int) -> None:
    source = random.Random(1)
    good = encode(make_ask(**observation(1)))
    with stub_server("--port=0") as server, connected(server.url) as client:
        process = psutil.Process(server.process.pid)
        before = 0
        for part in range(4):
            with connect(server.url, compression=None, proxy=None, close_timeout=0.2) as connection:
                for i in range(n // 4):
                    connection.send(mutated(good, source))
                    if i % 10 == 0:
                        while b"Beat" in connection.recv(PATIENCE_S, decode=False):
                            pass
            assert answer(client, part).kind == "chunk"
            before = before or process.memory_info().rss
        assert server.process.poll() is None
        assert process.memory_info().rss - before < 30 * 2**20
        assert client.counts["reconnects"] == 0


def test_the_server_survives_those_who_speak_no_websocket(
    server: StubServer, capfd: pytest.CaptureFixture[str]
) -> None:
    port = int(server.url.rpartition(":")[2])
    source = random.Random(2)
    for data in (b"", b"\x00" * 100, b"GET / HTTP/1.1\r\n\r\n", b"POST /health HTTP/1.1\r\n\r\n", *(
        source.randbytes(200) for _ in range(20)
    )):  # fmt: skip
        with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as stranger:
            stranger.sendall(data)
    assert answer_directly(server)
    assert "Traceback" not in capfd.readouterr().err


def test_the_client_survives_anything_a_server_says() -> None:
    source = random.Random(3)
    asked = observation(7)
    said = [encode(HELLO), encode(Beat(1, False)), encode(Refusal(7, "no")), a_chunk(7, asked)]
    visits = []

    def talk(connection: Any) -> None:
        visits.append(1)
        try:
            connection.send(mutated(said[0], source) if len(visits) % 3 == 0 else said[0])
            for _ in range(30):
                data = mutated(source.choice(said), source)
                connection.send(source.choice([data, data, data, data, "text", [data, data]]))
            connection.socket.sendall(source.randbytes(50))  # below the websocket
        except (ConnectionClosed, OSError):
            pass

    with fake_server(talk) as url, Client(url, reply_timeout_s=0.3) as client:
        began = len(visits)
        for seq in range(40):
            client.ask(**asked | {"seq": seq})
            time.sleep(0.01)
        wait_until(lambda: len(visits) >= began + 8)
        assert client._thread.is_alive()
        assert {reply.kind for reply in client.poll()} <= {"chunk", "refused", "lost"}


@pytest.mark.parametrize("answers", [b"", b"HTTP/1.1 200 OK\r\n\r\n", b"\x00" * 1000, b"H" * 10**6])
def test_the_client_survives_what_is_no_policy_server(answers: bytes) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    done = threading.Event()

    def talk() -> None:
        while not done.is_set():
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            with peer:
                try:
                    peer.sendall(answers)
                    peer.recv(1000)
                except OSError:
                    pass

    thread = threading.Thread(target=talk, daemon=True)
    thread.start()
    try:
        url = f"ws://127.0.0.1:{listener.getsockname()[1]}"
        with Client(url, connect_timeout_s=0.2) as client:
            error = wait_until(lambda: client.error)
            assert error.startswith("policy server: got ")
            assert "remedy: " in error
            assert not client.connected
    finally:
        done.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def test_nobody_there(tmp_path: Path) -> None:
    with Client(f"unix://{tmp_path}/none") as client:
        error = wait_until(lambda: client.error)
        assert "No such file" in error
        client.ask(**observation(1))
        assert [reply.kind for reply in client.poll()] == ["lost"]
    client.ask(**observation(2))  # closed: no error either
    assert [reply.kind for reply in client.poll()] == ["lost"]
