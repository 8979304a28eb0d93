"""The policy server and its client: what they say to each other, who may come in, how they end."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stub_server as stub
from load_script import load_script
from serving import (
    PATIENCE_S,
    STUB,
    StubServer,
    answer,
    connected,
    fake_server,
    observation,
    replies,
    stub_server,
    wait_until,
)
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from vla.checks import ConfigError
from vla.serve.access import Access, read_token
from vla.serve.client import Client
from vla.serve.local import LocalServer
from vla.serve.wire import MAX_BYTES, Beat, Chunk, Hello, Refusal, decode, encode, make_ask

ROOT = Path(__file__).parents[1]
TOKEN = "correct-horse-battery"


@pytest.fixture(scope="module")
def server() -> Iterator[StubServer]:
    with stub_server("--port=0") as server:
        yield server


def raw(url: str, **options: Any) -> ClientConnection:
    """A bare websocket."""
    return connect(url, compression=None, proxy=None, close_timeout=1, **options)


def hear(connection: ClientConnection) -> Any:
    """The next message that is no Beat."""
    while isinstance(message := decode(connection.recv(PATIENCE_S)), Beat):
        pass
    return message


def until_busy(connection: ClientConnection) -> None:
    while not decode(connection.recv(PATIENCE_S), Beat).busy:
        pass


def say(connection: ClientConnection, seq: int, task: str = "pick", **changes: Any) -> None:
    connection.send(encode(make_ask(**observation(seq, task, **changes))))


def health(url: str, **headers: str) -> Any:
    request = urllib.request.Request(url.replace("ws:", "http:") + "/health", headers=headers)
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
        assert response.headers["Content-Type"] == "application/json"
        return json.load(response)


# --- what is said ---


def test_a_chunk_for_an_observation(server: StubServer) -> None:
    with connected(server.url) as client:
        before = time.monotonic()
        reply = answer(client, 5, value=2.5)
        assert reply.kind == "chunk"
        assert reply.actions is not None
        np.testing.assert_array_equal(reply.actions, np.tile(2.5 + np.arange(stub.H)[:, None], stub.A))
        assert reply.actions.dtype == np.float32
        assert before < reply.received < time.monotonic()
        assert reply.inference_ns > 0
        assert reply.hello == client.hello
        assert client.hello is not None
        assert client.hello.model == hashlib.sha256(b"stub").hexdigest()
        assert (client.hello.chunk_size, client.hello.action_dim, client.hello.max_prefix) == (
            stub.H,
            stub.A,
            4,
        )
        assert client.poll() == []


@pytest.mark.parametrize("d", [1, 4])
def test_what_is_committed_reaches_the_policy(server: StubServer, d: int) -> None:
    prefix = np.random.default_rng(d).normal(size=(d, stub.A)).astype(np.float32)
    with connected(server.url) as client:
        actions = answer(client, 1, value=9.0, prefix=prefix).actions
    assert actions is not None
    np.testing.assert_array_equal(actions[:d], prefix)
    np.testing.assert_array_equal(actions[d:, 0], 9.0 + np.arange(d, stub.H))


def test_jpeg_reaches_the_policy(server: StubServer) -> None:
    with connected(server.url, jpeg_quality=80) as client:
        assert answer(client, 1).kind == "chunk"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"task": "nan"}, "not finite"),
        ({"task": "shape"}, r"ValueError: the policy's actions: got \(1, 7, 7\)"),
        ({"task": "raise no such word"}, "^RuntimeError: no such word$"),
        ({"state": np.zeros((1, 6))}, "^state: got 6 numbers"),
        ({"prefix": np.zeros((5, stub.A))}, "^prefix: "),
        ({"images": {"other": np.zeros((1, 2, 2, 3), np.uint8)}}, "^cameras: "),
        ({"task": "a" * 1001}, "length <= 1000"),  # of those that the server cannot even read
        ({"state": np.full((1, 7), np.nan)}, "^WireError: state: "),  # of those that are never sent
        ({"seq": "one"}, "Expected `int`"),
    ],
)
def test_what_is_wrong_is_refused_with_its_reason_and_the_connection_goes_on(
    server: StubServer, changes: dict[str, Any], reason: str
) -> None:
    with connected(server.url) as client:
        client.ask(**observation(1) | changes)
        (reply,) = replies(client)
        assert reply.kind == "refused"
        assert reply.actions is None
        assert re.search(reason, reply.reason)
        assert "Traceback" not in reply.reason
        assert answer(client, 2).kind == "chunk"
        assert client.counts["refused"] == 1
        assert client.counts["reconnects"] == 0


def test_the_server_beats_while_it_thinks(server: StubServer) -> None:
    with raw(server.url) as connection:
        assert isinstance(decode(connection.recv()), Hello)
        say(connection, 1, "sleep 0.5")
        beats = []
        while isinstance(message := decode(connection.recv(PATIENCE_S)), Beat):
            beats.append(message)
        assert isinstance(message, Chunk)
        assert sum(beat.busy for beat in beats) >= 4  # of ten
        assert [beat.count for beat in beats] == list(range(len(beats)))
        assert not decode(connection.recv(PATIENCE_S), Beat).busy


def test_health_answers_while_it_thinks(server: StubServer) -> None:
    with connected(server.url) as client:
        before = health(server.url)
        client.ask(**observation(1, "sleep 0.5"))
        wait_until(lambda: client.counts["sent"] == 1)
        after = wait_until(lambda: (now := health(server.url))["requests"] > before["requests"] and now)
        assert after["inference_ms"] == before["inference_ms"]  # it is not done
        assert replies(client)[0].kind == "chunk"
        answer(client, 2, task="raise x")
        last = health(server.url)
        assert after["ready"] is True
        assert after["model"] == hashlib.sha256(b"stub").hexdigest()
        assert last["requests"] == before["requests"] + 2
        assert last["refused"] == before["refused"] + 1
        assert 0 < last["inference_ms"]["median"] <= last["inference_ms"]["p99"]
        assert last["inference_ms"]["p99"] > before["inference_ms"]["median"]


def test_the_newest_supersedes_the_one_that_waits(server: StubServer) -> None:
    with raw(server.url) as connection:
        hear(connection)
        say(connection, 1, "sleep 0.4")
        until_busy(connection)
        say(connection, 2)
        say(connection, 3)
        first, second, third = (hear(connection) for _ in range(3))
        assert first == Refusal(2, "superseded")
        assert (second.obs_seq, third.obs_seq) == (1, 3)


def test_clients_take_turns(server: StubServer) -> None:
    with raw(server.url) as busy, raw(server.url) as other:
        hear(busy)
        hear(other)
        say(busy, 1, "sleep 0.4")
        until_busy(busy)
        say(busy, 2, "sleep 0.4")  # before the other one's, but it had its turn
        time.sleep(0.1)
        say(other, 7)
        assert hear(other).obs_seq == 7
        served = time.monotonic()
        assert [(type(m), m.obs_seq) for m in (hear(busy), hear(busy))] == [(Chunk, 1), (Chunk, 2)]
        assert time.monotonic() - served > 0.2  # the second of busy came after


def test_the_newest_observation_is_sent_next(server: StubServer) -> None:
    with connected(server.url) as client:
        client.ask(**observation(1, "sleep 0.3"))
        wait_until(lambda: client.counts["sent"] == 1)
        for seq in (2, 3, 4):
            client.ask(**observation(seq))
        assert [reply.seq for reply in replies(client, 2)] == [1, 4]
        assert client.counts["superseded"] == 2
        assert client.counts["sent"] == 2


def test_asking_never_waits(server: StubServer) -> None:
    with connected(server.url) as client:
        request = observation(1, "sleep 0.5")
        began = time.monotonic()
        for _ in range(20):
            client.ask(**request)
            client.poll()
        assert time.monotonic() - began < 0.25


def test_malformed_messages_are_refused_and_the_connection_goes_on(server: StubServer) -> None:
    with raw(server.url) as connection:
        hear(connection)
        for data in (b"", b"\x00", "text", encode(Beat(1, True)), b"\x80\x04K\x01."):  # the last a pickle
            connection.send(data)
            refusal = hear(connection)
            assert isinstance(refusal, Refusal)
            assert refusal.obs_seq == -1
            assert "expected" in refusal.reason
        say(connection, 3)
        assert hear(connection).obs_seq == 3


def test_too_large_a_message_ends_the_connection(server: StubServer) -> None:
    with raw(server.url) as connection:
        hear(connection)
        with pytest.raises(ConnectionClosed):  # noqa: PT012
            connection.send(bytes(MAX_BYTES + 1))
            while True:
                hear(connection)
        assert connection.close_code == 1009
    with connected(server.url) as client:
        assert answer(client, 1).kind == "chunk"


def test_a_browser_has_no_business_here(server: StubServer) -> None:
    with pytest.raises(InvalidStatus, match="403"):
        raw(server.url, origin="http://127.0.0.1:8000")


# --- who may come in ---


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"host": "0.0.0.0"}, "without TLS"),
        ({"host": ""}, "without TLS"),
        ({"host": "192.0.2.1", "token": TOKEN}, "without TLS, with a token"),
        ({"host": "::", "tls_cert": "a", "tls_key": "b"}, "with TLS, without a token"),
        ({"tls_cert": "a"}, "tls-cert"),
        ({"tls_key": "a"}, "tls-cert"),
        ({"port": 70000}, "port"),
    ],
)
def test_no_door_is_left_open(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?s){word}.*expected.*remedy"):
        Access(**options)


def test_doors_that_may_be_opened() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.7"):
        Access(host)
    Access("0.0.0.0", tls_cert="a", tls_key="b", token=TOKEN)
    Access("0.0.0.0", unix="/run/policy")  # the host is not used


def test_the_program_refuses_an_open_door() -> None:
    done = subprocess.run(
        [*STUB, "stub", "--host=0.0.0.0"], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 1
    assert re.fullmatch(r"serve: host: got .*, expected .* remedy: .*\n", done.stderr)


def test_a_token_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    file.chmod(0o600)
    with stub_server("--port=0", f"--token-file={file}") as server:
        for headers in (
            {},
            {"Authorization": "Bearer " + TOKEN + "x"},
            {"Authorization": TOKEN},
            {"Authorization": "Bearer \u00e9"},
            [("Authorization", "Bearer " + TOKEN)] * 2,
        ):
            with pytest.raises(InvalidStatus, match="401"):
                raw(server.url, additional_headers=headers)
        with pytest.raises(urllib.error.HTTPError, match="401"):
            health(server.url)
        assert health(server.url, Authorization=f"Bearer {TOKEN}")["ready"]
        with connected(server.url, token=TOKEN) as client:
            assert answer(client, 1).kind == "chunk"
        with Client(server.url, token="another") as client:
            assert "401" in wait_until(lambda: client.error)
            assert "remedy: give the client the server's token" in str(client.error)


def test_a_token_from_the_environment() -> None:
    with stub_server("--port=0", env=dict(os.environ, VLA_TOKEN=TOKEN)) as server:
        with pytest.raises(InvalidStatus, match="401"):
            raw(server.url)
        with connected(server.url, token=TOKEN) as client:
            assert answer(client, 1).kind == "chunk"


@pytest.mark.parametrize(
    ("text", "mode", "word"),
    [
        (TOKEN, 0o640, "mode 0640"), (TOKEN, 0o604, "mode 0604"), ("", 0o600, "an empty file"),
        ("short", 0o600, "5 letters"), ("two words of a token", 0o600, "spaces"), ("ü" * 20, 0o600, "ASCII"),
    ],
)  # fmt: skip
def test_a_token_file_is_private_and_good(tmp_path: Path, text: str, mode: int, word: str) -> None:
    file = tmp_path / "token"
    file.write_text(text)
    file.chmod(mode)
    with pytest.raises(ConfigError, match=word):
        read_token(str(file))


def test_no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("VLA_TOKEN", raising=False)
    assert read_token("") == ""
    with pytest.raises(ConfigError, match="a file with the token"):
        read_token(str(tmp_path / "none"))


def test_tls(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    with stub_server("--port=0", f"--tls-cert={cert}", f"--tls-key={key}") as server:
        assert server.url.startswith("wss://127.0.0.1:")
        with connected(server.url, ca=str(cert)) as client:
            large = {name: np.zeros((1, 500, 600, 3), np.uint8) for name in ("front", "wrist")}
            for seq in range(3):
                assert answer(client, seq, images=large).kind == "chunk"
        with Client(server.url) as stranger:
            assert "the authority that signed" in wait_until(lambda: stranger.error)
            assert not stranger.connected
        with Client(server.url.replace("wss:", "ws:")) as plain:
            wait_until(lambda: plain.error)
    with pytest.raises(ConfigError, match="its own key"):
        Access(tls_cert=str(cert), tls_key=str(cert)).tls()


def certificate(folder: Path) -> tuple[Path, Path]:
    """A throw-away certificate of 127.0.0.1 and its key."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "vla test")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(1))
        .not_valid_after(now + datetime.timedelta(1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return folder / "cert.pem", folder / "key.pem"


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1", "ws://", "unix://", "ws://192.0.2.1:8765", "127.0.0.1:8765", "ws://127.0.0.1:many"],
)
def test_addresses_that_no_client_goes_to(url: str) -> None:
    with pytest.raises(ConfigError, match="remedy"):
        Client(url)


# --- the Unix socket, and the end ---


def test_a_unix_socket_is_its_owners(tmp_path: Path) -> None:
    path = tmp_path / "policy"
    with stub_server(f"--unix={path}") as server:
        assert server.url == f"unix://{path}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with connected(server.url) as client:
            assert answer(client, 1).kind == "chunk"
        second = [*STUB, "stub", f"--unix={path}"]
        done = subprocess.run(second, capture_output=True, text=True, timeout=PATIENCE_S)
        assert (done.returncode, "where a server listens" in done.stderr) == (1, True)
        with connected(server.url) as client:
            assert answer(client, 1).kind == "chunk"
        server.end(signal.SIGKILL)
        assert path.exists()
    with stub_server(f"--unix={path}") as server:  # in the place of the dead one
        with connected(server.url) as client:
            assert answer(client, 1).kind == "chunk"
        assert server.end(signal.SIGTERM) == 0
        assert not path.exists()


def test_a_file_is_not_mistaken_for_a_socket(tmp_path: Path) -> None:
    path = tmp_path / "thesis.tex"
    path.write_text("precious")
    command = [*STUB, "stub", f"--unix={path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1
    assert path.read_text() == "precious"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_in_order(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    with stub_server("--port=0") as server, connected(server.url) as client:
        client.ask(**observation(1, "sleep 0.3"))
        wait_until(lambda: client.counts["sent"])
        assert server.end(number) == 0
        assert [reply.kind for reply in replies(client)] == ["lost"]
    assert capfd.readouterr().err == ""


def test_an_address_in_use(server: StubServer) -> None:
    port = server.url.rpartition(":")[2]
    done = subprocess.run([*STUB, "a", f"--port={port}"], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1


def test_help_and_client_need_no_torch() -> None:
    code = (
        "import sys, runpy, vla.serve.client, vla.serve.local\n"
        "sys.argv = ['serve', '--help']\n"
        "try: runpy.run_path('scripts/serve.py', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "assert not {'torch', 'timm', 'lerobot'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    for option in (
        "CHECKPOINT",
        "--host",
        "--port",
        "--unix",
        "--device",
        "--threads",
        "--tls-cert",
        "--token-file",
    ):
        assert option in done.stdout


def test_a_server_of_ones_own() -> None:
    with LocalServer(["stub"], STUB) as server:
        path = Path(server.url.removeprefix("unix://"))
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert server.process is not None
        assert os.getsid(server.process.pid) != os.getsid(0)
        with connected(server.url) as client:
            assert answer(client, 1).kind == "chunk"
    assert server.process.returncode == 0
    assert not path.parent.exists()


def test_a_server_of_ones_own_that_cannot_start() -> None:
    with pytest.raises(ConnectionError, match="exit code 2"), LocalServer(["stub", "--no-such-option"], STUB):
        pass
    with (
        pytest.raises(ConnectionError, match="nothing within 0.3 s"),
        LocalServer(["-c", "import time; time.sleep(60)"], [sys.executable], timeout_s=0.3),
    ):
        pass


def test_it_dies_with_its_owner() -> None:
    code = (
        "import sys, time; from vla.serve.local import LocalServer\n"
        f"with LocalServer(['stub'], {STUB!r}) as server:\n"
        "    print(server.url, flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        url = owner.stdout.readline().strip()
        path = url.removeprefix("unix://")
        with connected(url) as client:
            assert answer(client, 1).kind == "chunk"
            owner.kill()
            owner.wait()
            wait_until(lambda: not client.connected)

    def is_dead() -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(path) != 0

    wait_until(is_dead)
    shutil.rmtree(Path(path).parent)  # which nobody was left to do


def test_another_version_is_named_and_nothing_raises() -> None:
    def talk(connection: Any) -> None:
        connection.send(b"\x83\xa4type\xa5Hello\xa7version\x07\xa3new\x01")
        connection.recv()

    with fake_server(talk) as url, Client(url) as client:
        error = wait_until(lambda: client.error)
        assert re.match(r"version: got 7, expected 1\. remedy: ", error)
        assert not client.connected
        client.ask(**observation(1))
        assert replies(client)[0].kind == "lost"


def test_round_trips_are_measured_both_ways_in_both_places() -> None:
    script = load_script("roundtrip")
    rows = script.round_trips(20)
    assert [row["name"] for row in rows] == [
        "client, loopback", "bare websocket, loopback", "client, Unix socket", "bare websocket, Unix socket"
    ]  # fmt: skip
    for row in rows:
        assert row["n"] == len(row["samples_ms"]) == 20
        assert 0 < min(row["samples_ms"]) <= row["p50_ms"] <= row["p99_ms"] <= row["p999_ms"] <= row["max_ms"]
    assert script.row("x", [1.0, 3.0, 2.0])["p50_ms"] == 2.0
    assert script.table(rows).count("\n") == 5


@pytest.mark.slow
def test_a_checkpoint_is_served_as_it_is_and_a_damaged_one_is_not(tmp_path: Path) -> None:
    from toy_run import toy_job, toy_store

    from vla.policy import Policy
    from vla.training import checkpoint
    from vla.training.loop import train

    train(toy_job(tmp_path / "run", steps=1, save_every=1), toy_store())
    folder = checkpoint.find(tmp_path / "run")
    policy, store = Policy.load(folder, "cpu"), toy_store()
    images, state = {"front": store.images["front"][:1]}, store.state[:1]
    prefix = np.tile(store.action[:1], (2, 1))
    padded = np.zeros((1, policy.chunk_size, policy.features.action_dim), np.float32)
    padded[0, :2] = prefix
    with LocalServer([str(folder), "--device=cpu", "--threads=1"]) as server, connected(server.url) as client:
        hello = client.hello
        assert hello is not None
        assert hello.model == checkpoint.verify(folder)["model.safetensors"] == policy.model_sha256
        assert (hello.chunk_size, hello.max_prefix) == (policy.chunk_size, policy.max_prefix) == (4, 2)
        arguments = dict(images=images, state=state, task="reach red")
        free, committed = answer(client, 1, **arguments), answer(client, 2, prefix=prefix, **arguments)
    stacked = {name: image[None] for name, image in images.items()}
    expected = policy.predict_chunk(stacked, state[None], ["reach red"])
    np.testing.assert_allclose(free.actions, expected[0], atol=1e-5)
    expected = policy.predict_chunk(stacked, state[None], ["reach red"], padded, np.array([2]))
    np.testing.assert_allclose(committed.actions, expected[0], atol=1e-5)

    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    command = [sys.executable, str(ROOT / "scripts" / "serve.py"), str(folder), "--port=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert re.fullmatch(r"serve: checkpoint .*model.safetensors is damaged.*\n", done.stderr)
