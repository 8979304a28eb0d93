"""The wire: what is encoded comes back, what is not a message is refused, whatever the bytes."""

from __future__ import annotations

import contextlib
import math
import random
import resource
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from proxy import flipped

from vla.serve import wire
from vla.serve.wire import (
    MAX_BYTES,
    MAX_REASON,
    MAX_TASK,
    Ask,
    Beat,
    Chunk,
    Hello,
    Message,
    Pixels,
    Refusal,
    WireError,
    decode,
    encode,
    first_line,
    fit_ask,
    fit_chunk,
    make_ask,
    make_pixels,
    pack_floats,
    read_pixels,
    version_of,
)

T, H, A, P = 2, 3, 2, 4
MODEL = "ab" * 32
HELLO = Hello(wire.VERSION, MODEL, {"front": (5, 6), "wrist": (5, 6)}, P, A, 10, H, T, 2)

counts = st.integers(0, 2**53 - 1)
times = st.integers(0, 2**63 - 1)
floats = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=20).map(
    lambda values: np.array(values, "<f4").tobytes()
)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.just(3))
raw_pixels = shapes.flatmap(
    lambda shape: st.binary(min_size=math.prod(shape), max_size=math.prod(shape)).map(
        lambda data: Pixels(shape, data)
    )
)
files = st.lists(st.binary(min_size=1, max_size=9), min_size=1, max_size=3)
jpegs = files.map(lambda parts: Pixels((len(parts), 4, 4, 3), b"".join(parts), tuple(map(len, parts))))
names = st.text(min_size=1, max_size=20)
sizes = st.integers(1, 4096)
MESSAGES = {
    Hello: st.builds(
        Hello, counts, st.text(min_size=1, max_size=64),
        st.dictionaries(names, st.tuples(sizes, sizes), min_size=1, max_size=16),
        sizes, sizes, st.integers(1, 10_000), sizes, st.integers(1, 64), st.integers(0, 4096),
    ),
    Ask: st.builds(
        Ask, counts, counts, times, counts, st.text(max_size=MAX_TASK),
        st.dictionaries(names, raw_pixels | jpegs, min_size=1, max_size=16), floats, floats,
    ),
    Chunk: st.builds(Chunk, counts, counts, times, counts, st.just(MODEL), floats, times),
    Refusal: st.builds(Refusal, st.integers(-1, 2**53 - 1), st.text(max_size=MAX_REASON)),
    Beat: st.builds(Beat, counts, st.booleans()),
}  # fmt: skip


def an_ask(**changes: Any) -> Ask:
    source = np.random.default_rng(0)
    arguments: dict[str, Any] = dict(
        episode=1, seq=2, captured_ns=3, start=4, task="pick",
        images={name: source.integers(0, 256, (T, 5, 6, 3), np.uint8) for name in HELLO.cameras},
        state=source.normal(size=(T, P)), prefix=source.normal(size=(1, A)),
    )  # fmt: skip
    return make_ask(**arguments | changes)


def a_chunk(**changes: Any) -> Chunk:
    actions = pack_floats(np.arange(H * A).reshape(H, A))
    arguments: dict[str, Any] = dict(
        episode=1, obs_seq=2, captured_ns=3, start=4, model=MODEL, actions=actions, inference_ns=5
    )
    return Chunk(**arguments | changes)


def tampered(message: Any, **changes: Any) -> bytes:
    """A message with other fields, past the checks that making one does."""
    tree: Any = msgspec.msgpack.decode(msgspec.msgpack.encode(message))
    return msgspec.msgpack.encode(tree | changes)


@pytest.mark.parametrize("kind", MESSAGES)
def test_every_message_comes_back(kind: type[Message]) -> None:
    @settings(max_examples=100, deadline=None)
    @given(MESSAGES[kind])
    def comes_back(message: Any) -> None:
        data = encode(message)
        assert decode(data) == message
        assert decode(data, kind) == message
        for other in set(MESSAGES) - {kind}:
            with pytest.raises(WireError):
                decode(data, other)

    comes_back()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_message_or_refused(data: bytes) -> None:
    with contextlib.suppress(WireError):
        assert isinstance(decode(data), Message)
    version_of(data)


HUGE = 2**53
WRONG: dict[str, tuple[Any, dict[str, Any]]] = {
    "an unknown field": (Beat(1, True), {"more": 1}),
    "another type": (Beat(1, True), {"busy": 1}),
    "text for a number": (Beat(1, True), {"count": "1"}),
    "a fraction for a number": (Beat(1, True), {"count": 1.0}),
    "an unknown message": (Beat(1, True), {"type": "Pickle"}),
    "a negative seq": (an_ask(), {"seq": -1}),
    "an absurd seq": (an_ask(), {"seq": HUGE}),
    "a negative episode": (an_ask(), {"episode": -1}),
    "an absurd episode": (an_ask(), {"episode": HUGE}),
    "a negative start": (an_ask(), {"start": -1}),
    "an absurd start": (an_ask(), {"start": HUGE}),
    "a negative time": (an_ask(), {"captured_ns": -1}),
    "a time beyond 63 bits": (an_ask(), {"captured_ns": 2**63}),
    "a long task": (an_ask(), {"task": "a" * (MAX_TASK + 1)}),
    "no cameras": (an_ask(), {"images": {}}),
    "17 cameras": (an_ask(), {"images": {str(i): make_pixels(np.zeros((1, 1, 1, 3), np.uint8)) for i in range(17)}}),
    "a wide picture": (an_ask(), {"images": {"front": {"shape": [1, 1, 4097, 3], "data": bytes(3 * 4097)}}}),
    "a flat picture": (an_ask(), {"images": {"front": {"shape": [1, 0, 4, 3], "data": b""}}}),
    "four channels": (an_ask(), {"images": {"front": {"shape": [1, 1, 1, 4], "data": bytes(4)}}}),
    "five axes": (an_ask(), {"images": {"front": {"shape": [1, 1, 1, 1, 3], "data": bytes(3)}}}),
    "a byte too few": (an_ask(), {"images": {"front": {"shape": [1, 1, 2, 3], "data": bytes(5)}}}),
    "a byte too many": (an_ask(), {"images": {"front": {"shape": [1, 1, 2, 3], "data": bytes(7)}}}),
    "a dtype": (an_ask(), {"images": {"front": {"shape": [1, 1, 1, 3], "data": bytes(3), "dtype": "|O"}}}),
    "two JPEGs for one step": (
        an_ask(), {"images": {"front": {"shape": [1, 4, 4, 3], "data": bytes(4), "jpeg": [2, 2]}}}),
    "JPEGs of other sizes": (
        an_ask(), {"images": {"front": {"shape": [2, 4, 4, 3], "data": bytes(4), "jpeg": [2, 3]}}}),
    "an empty JPEG": (
        an_ask(), {"images": {"front": {"shape": [2, 4, 4, 3], "data": bytes(4), "jpeg": [0, 4]}}}),
    "half a number": (an_ask(), {"state": bytes(4 * T * P - 1)}),
    "nan in the state": (an_ask(), {"state": np.float32(np.nan).tobytes()}),
    "inf in the prefix": (an_ask(), {"prefix": np.float32(-np.inf).tobytes()}),
    "nan in a chunk": (a_chunk(), {"actions": np.float32(np.nan).tobytes()}),
    "inf in a chunk": (a_chunk(), {"actions": np.float32(np.inf).tobytes()}),
    "actions as a list": (a_chunk(), {"actions": [1.0]}),
    "an absurd number of actions": (HELLO, {"action_dim": 4097}),
    "no actions": (HELLO, {"action_dim": 0}),
    "a long reason": (Refusal(1, ""), {"reason": "a" * (MAX_REASON + 1)}),
    "seq below -1": (Refusal(1, ""), {"obs_seq": -2}),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_refused(what: str) -> None:
    message, changes = WRONG[what]
    decode(tampered(message))  # as it was, it is fine
    with pytest.raises(WireError, match=r"got .*expected .*remedy: "):
        decode(tampered(message, **changes))


@pytest.mark.parametrize("field", ["captured_ns", "inference_ns"])
def test_a_machine_may_run_for_a_year(field: str) -> None:
    year = 365 * 24 * 3600 * 10**9
    assert getattr(decode(tampered(a_chunk(), **{field: year})), field) == year > HUGE


def test_too_large_on_the_way_out_and_on_the_way_in() -> None:
    side = 700
    images = {name: np.zeros((1, side, side, 3), np.uint8) for name in HELLO.cameras}
    encode(an_ask(images={"front": images["front"]}))
    images["third"] = images["front"]
    with pytest.raises(WireError, match="remedy: send smaller pictures"):
        encode(an_ask(images=images))
    with pytest.raises(WireError, match=f"at most {MAX_BYTES}"):
        decode(bytes(MAX_BYTES + 1))
    with pytest.raises(WireError, match="letters"):
        decode("text")


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\xc1", b"\x91" * 100_000, b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff",
        b"\x82\xa4type\xa3Ask\xa6images\xdf\x7f\xff\xff\xff", encode(Beat(1, True)) + b"\x00",
        b"\x83\xa4type\xa4Beat\xa5count\x01\xa4bus\xff\xc3",
    ],
    ids=["empty", "unused", "deep", "array", "map", "bin", "images", "trailing", "utf-8"],
)  # fmt: skip
def test_claims_of_four_gigabytes_and_other_tricks_are_refused(data: bytes) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(WireError):
        decode(data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_what_an_ask_holds_is_what_was_seen() -> None:
    source = np.random.default_rng(1)
    images = {name: source.integers(0, 256, (T, 5, 6, 3), np.uint8) for name in HELLO.cameras}
    state, prefix = source.normal(size=(T, P)), source.normal(size=(2, A))
    ask = decode(encode(an_ask(images=images, state=state, prefix=prefix)), Ask)
    got_images, got_state, got_prefix = fit_ask(ask, HELLO)
    assert set(got_images) == set(images)
    for name, image in images.items():
        np.testing.assert_array_equal(got_images[name], image)
    np.testing.assert_array_equal(got_state, state.astype(np.float32))
    np.testing.assert_array_equal(got_prefix, prefix.astype(np.float32))
    assert fit_ask(an_ask(prefix=None), HELLO)[2].shape == (0, A)
    upside = {name: image[:, ::-1] for name, image in images.items()}  # not contiguous
    np.testing.assert_array_equal(fit_ask(an_ask(images=upside), HELLO)[0]["front"], upside["front"])


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("cameras", {"images": {"back": np.zeros((T, 5, 6, 3), np.uint8)}}),
        ("camera front", {"images": {"front": np.zeros((T + 1, 5, 6, 3), np.uint8)}}),
        ("state", {"state": np.zeros((T, P + 1))}),
        ("state", {"state": np.zeros((1, P))}),
        ("prefix", {"prefix": np.zeros((3, A))}),
        ("prefix", {"prefix": np.zeros(A + 1)}),
    ],
)
def test_an_ask_must_fit_the_policy(what: str, changes: dict[str, Any]) -> None:
    with pytest.raises(WireError, match=f"^{what}: got"):
        fit_ask(decode(encode(an_ask(**changes)), Ask), HELLO)


def test_a_camera_may_be_missing_and_pictures_of_another_size() -> None:
    images, _, _ = fit_ask(an_ask(images={"wrist": np.zeros((T, 9, 7, 3), np.uint8)}), HELLO)
    assert images["wrist"].shape == (T, 9, 7, 3)


@pytest.mark.parametrize(
    "images",
    [np.zeros((T, 5, 6, 3), np.float32), np.zeros((5, 6, 3), np.uint8), np.zeros((T, 5, 6, 4), np.uint8)],
)
def test_what_is_no_picture_is_refused_before_it_is_sent(images: np.ndarray) -> None:
    with pytest.raises(WireError, match="uint8"):
        make_pixels(images)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_a_state_that_is_not_finite_is_refused_before_it_is_sent(value: float) -> None:
    with pytest.raises(WireError, match="^state: .*not finite"):
        an_ask(state=np.full((T, P), value))


def test_a_chunk_is_this_models_and_of_its_size() -> None:
    actions = fit_chunk(a_chunk(), HELLO)
    np.testing.assert_array_equal(actions, np.arange(H * A, dtype=np.float32).reshape(H, A))
    with pytest.raises(WireError, match="^model: "):
        fit_chunk(a_chunk(model="cd" * 32), HELLO)
    for n in (H * A - 1, H * A + A, 0):
        with pytest.raises(WireError, match="^actions: "):
            fit_chunk(a_chunk(actions=bytes(4 * n)), HELLO)


def smooth(h: int = 32, w: int = 48) -> np.ndarray:
    y, x = np.mgrid[:h, :w]
    return np.stack([np.stack([4 * y, 4 * x, x + y + 50 * t], axis=-1) for t in range(T)]).astype(np.uint8)


def test_jpeg_is_small_and_nearly_the_same() -> None:
    images = smooth()
    pixels = decode(encode(an_ask(images={"front": images}, jpeg_quality=90)), Ask).images["front"]
    assert len(pixels.data) < images.nbytes / 2
    got = read_pixels(pixels)
    assert got.shape == images.shape
    assert np.abs(got.astype(int) - images.astype(int)).mean() < 8
    assert np.abs(got[1].astype(int) - got[0].astype(int)).mean() > 10  # each step its own picture


def test_a_jpeg_must_be_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    good = make_pixels(smooth(), 90)
    with pytest.raises(WireError, match="jpeg"):  # of another size than declared
        read_pixels(Pixels((T, 48, 32, 3), good.data, good.jpeg))
    with pytest.raises(WireError, match="jpeg"):
        read_pixels(Pixels((1, 4, 4, 3), b"GIF89a" + bytes(100), (106,)))
    cut = good.data[: good.jpeg[0] // 2]
    with pytest.raises(WireError, match="jpeg"):
        read_pixels(Pixels((1, 32, 48, 3), cut, (len(cut),)))
    bomb = Ask(1, 1, 1, 1, "", {"front": Pixels((T, 4096, 4096, 3), good.data, good.jpeg)}, bytes(4 * T * P))
    with pytest.raises(WireError, match=f"at most {wire.MAX_DECODED}"):
        fit_ask(bomb, HELLO)


def test_versions_are_told_apart_before_anything_else() -> None:
    assert version_of(encode(HELLO)) == wire.VERSION
    assert version_of(tampered(HELLO, version=7, something="new")) == 7
    assert version_of(encode(Beat(1, True))) is None
    assert version_of("text") is None


def test_a_reason_is_one_line_of_valid_text() -> None:
    line = first_line(ValueError("a\ud800" * MAX_REASON + "\nmore"))
    assert len(line) == MAX_REASON
    assert "more" not in line
    assert decode(encode(Refusal(1, line))).reason == line
    assert first_line("") == ""


def mutated(data: bytes, source: random.Random) -> bytes:
    """One to three of: a turned bit, bytes cut out, put in or repeated, the end cut off."""
    for _ in range(source.randint(1, 3)):
        kind, at = source.randrange(5), source.randrange(len(data) or 1)
        some = source.randbytes(source.randint(1, 9))
        if kind == 0 and data:
            data = flipped(data, source)
        elif kind == 1:
            data = data[:at] + data[at + len(some) :]
        elif kind == 2:
            data = data[:at] + some + data[at:]
        elif kind == 3:
            data = data[:at] + data[source.randrange(len(data) or 1) :]
        else:
            data = data[:at]
    return data


def examples() -> list[bytes]:
    tiny = {"front": np.zeros((T, 2, 2, 3), np.uint8)}
    asks = [an_ask(), an_ask(images=tiny), an_ask(images={"front": smooth()}, jpeg_quality=50)]
    return [*map(encode, [HELLO, *asks, a_chunk(), Refusal(3, "superseded"), Beat(4, False)])]


def fuzz(n: int) -> int:
    """Mutate n messages; how many were still messages. Anything but a WireError escapes."""
    source, alive, data = random.Random(0), 0, examples()
    for i in range(n):
        try:
            message = decode(mutated(data[i % len(data)], source))
            alive += 1
            if isinstance(message, Ask):
                fit_ask(message, HELLO)
            elif isinstance(message, Chunk):
                fit_chunk(message, HELLO)
        except WireError:
            pass
    return alive


@pytest.mark.parametrize("n", [3_000, pytest.param(300_000, marks=pytest.mark.slow)])
def test_mutated_messages_are_refused_and_forgotten(n: int) -> None:
    fuzz(500)  # caches, pillow
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert 0 < fuzz(n) < n
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000  # kB, of its peak
