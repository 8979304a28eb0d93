"""What travels between the controller and the policy server: typed, versioned msgpack, never pickle.

The server says Hello first and a Beat every few hundredths of a second, busy or not. The client
sends one Ask at a time and gets a Chunk or a Refusal with its seq. Times are the sender's
CLOCK_MONOTONIC in nanoseconds: they come back unchanged and are never compared across machines.
Numbers travel as little-endian bytes with their shape, so that a message of two 224 px images costs a
copy, not a parse.

    T n_obs_steps   H chunk_size   A action_dim   P state_dim   d length of the committed prefix

`decode` is strict: unknown fields, other types, wrong sizes, numbers that are not finite and messages
above MAX_BYTES are refused with a WireError, whatever the bytes. What only the policy's sizes can
tell, `fit_ask` and `fit_chunk` check. Imports neither torch nor timm.
"""

from __future__ import annotations

import functools
import io
import math
from typing import Annotated, Any, Literal, NoReturn

import msgspec
import numpy as np
from msgspec import Meta

VERSION = 1
MAX_BYTES = 4 * 2**20
MAX_DECODED = 64 * 2**20  # bytes of all pictures of an Ask: a JPEG of 100 kB can unfold into 50 MB
MAX_TASK = 1000  # characters of an instruction
MAX_REASON = 500  # characters of a Refusal
MAX_CAMERAS, MAX_SIDE = 16, 4096
PORT = 8765
FLOAT32 = np.dtype("<f4")

# Whole numbers that every language's doubles can hold, and nanoseconds, which pass 2**53 after 104 days.
Count = Annotated[int, Meta(ge=0, lt=2**53)]
Nanoseconds = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Side = Annotated[int, Meta(ge=1, le=MAX_SIDE)]
Size = Annotated[int, Meta(ge=1, le=4096)]
Steps = Annotated[int, Meta(ge=1, le=64)]
Name = Annotated[str, Meta(min_length=1, max_length=100)]
Digest = Annotated[str, Meta(min_length=1, max_length=64)]
Cameras = Meta(min_length=1, max_length=MAX_CAMERAS)


class WireError(ValueError):
    """Bytes that are no message of this version: got, expected, remedy."""


def refuse(what: str, got: Any, expected: Any) -> NoReturn:
    remedy = "send what the server's Hello asks for; both sides need the same version of vla"
    raise WireError(f"{what}: got {got}, expected {expected}. remedy: {remedy}.")


def require_floats(what: str, data: bytes) -> None:
    """Raise WireError unless the bytes are finite float32 numbers."""
    if len(data) % 4:
        refuse(what, f"{len(data)} bytes", "float32 numbers of 4 bytes")
    if not np.isfinite(np.frombuffer(data, FLOAT32)).all():
        refuse(what, "a number that is not finite", "finite numbers")


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """What every message has in common: its type's name under "type", and no field but its own."""


class Pixels(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Pictures of one camera (T, h, w, 3) uint8, oldest first; jpeg: T files of known sizes instead."""

    shape: tuple[Steps, Side, Side, Literal[3]]
    data: bytes
    # sizes of the T files in data; empty: raw
    jpeg: Annotated[tuple[Annotated[int, Meta(ge=1, le=MAX_BYTES)], ...], Meta(max_length=64)] = ()

    def __post_init__(self) -> None:
        if self.jpeg and len(self.jpeg) != self.shape[0]:
            refuse("jpeg", f"{len(self.jpeg)} files", f"{self.shape[0]}, one for every step")
        expected = sum(self.jpeg) if self.jpeg else math.prod(self.shape)
        if len(self.data) != expected:
            refuse("pixels", f"{len(self.data)} bytes", f"{expected} of shape {self.shape}")


class Hello(Message, frozen=True):
    """Who answers, and what it takes. cameras: name -> (height, width) that the policy was trained on;
    pictures of another size are welcome, other names are not.
    """

    version: Count
    model: Digest  # sha256 of the weights
    cameras: Annotated[dict[Name, tuple[Side, Side]], Cameras]
    state_dim: Size
    action_dim: Size
    fps: Annotated[int, Meta(ge=1, le=10_000)]
    chunk_size: Size
    n_obs_steps: Steps
    max_prefix: Annotated[int, Meta(ge=0, le=4096)]


class Ask(Message, frozen=True):
    """One observation. start: the policy step that the chunk's first action belongs to; its first
    len(prefix) actions are committed already.
    """

    episode: Count
    seq: Count
    captured_ns: Nanoseconds
    start: Count
    task: Annotated[str, Meta(max_length=MAX_TASK)]
    images: Annotated[dict[Name, Pixels], Cameras]
    state: bytes  # (T, P) float32
    prefix: bytes = b""  # (d, A) float32, robot units

    def __post_init__(self) -> None:
        require_floats("state", self.state)
        require_floats("prefix", self.prefix)


class Chunk(Message, frozen=True):
    """The answer to Ask number obs_seq: (H, A) float32 in robot units, from step `start` on."""

    episode: Count
    obs_seq: Count
    captured_ns: Nanoseconds
    start: Count
    model: Digest
    actions: bytes
    inference_ns: Nanoseconds  # how long the policy took

    def __post_init__(self) -> None:
        require_floats("actions", self.actions)


class Refusal(Message, frozen=True):
    """Why Ask number obs_seq got no chunk; -1 when not even its number could be read."""

    obs_seq: Annotated[int, Meta(ge=-1, lt=2**53)]
    reason: Annotated[str, Meta(max_length=MAX_REASON)]


class Beat(Message, frozen=True):
    """The server is alive; busy: with an inference."""

    count: Count
    busy: bool


class Greeting(msgspec.Struct, frozen=True, tag="Hello"):
    """The one field of a Hello that every version has."""

    version: int


AnyMessage = Hello | Ask | Chunk | Refusal | Beat
_encoder = msgspec.msgpack.Encoder()


@functools.cache
def _decoder(types: tuple[type[Message], ...]) -> msgspec.msgpack.Decoder[Any]:
    union: Any = functools.reduce(lambda a, b: a | b, types) if types else AnyMessage
    return msgspec.msgpack.Decoder(union, strict=True)


def encode(message: AnyMessage) -> bytes:
    """Raises WireError above MAX_BYTES."""
    data = _encoder.encode(message)
    if len(data) > MAX_BYTES:
        raise WireError(
            f"message: got {len(data)} bytes, expected at most {MAX_BYTES}. "
            "remedy: send smaller pictures (the policy resizes them anyway), or JPEG."
        )
    return data


def decode(data: bytes | str, *types: type[Message]) -> Any:
    """The message in these bytes, of one of these types (none given: of any). Raises WireError."""
    if isinstance(data, str) or len(data) > MAX_BYTES:
        refuse("message", f"{len(data)} {'letters' if isinstance(data, str) else 'bytes'}",
               f"at most {MAX_BYTES} bytes")  # fmt: skip
    decoder = _decoder(types)
    try:
        return decoder.decode(data)
    except (ValueError, RecursionError, OverflowError, MemoryError) as error:
        if isinstance(error.__cause__, WireError):  # a message's own check: msgspec wraps it
            raise WireError(str(error.__cause__)) from None
        names = " or ".join(kind.__name__ for kind in types) or "a message"
        refuse("message", first_line(error), f"{names} of version {VERSION}")


def version_of(data: bytes | str) -> int | None:
    """The version in a Hello of whatever version; None when it is none."""
    try:
        return msgspec.msgpack.decode(data, type=Greeting).version if isinstance(data, bytes) else None
    except (ValueError, RecursionError, OverflowError, MemoryError):
        return None


def first_line(error: BaseException | str) -> str:
    """What fits a Refusal: one line of valid text, cut to MAX_REASON."""
    line = next(iter(str(error).splitlines()), "")
    return line.encode("utf-8", "replace").decode()[:MAX_REASON]


def make_pixels(images: np.ndarray, jpeg_quality: int = 0) -> Pixels:
    """Pictures (T, h, w, 3) uint8 for the wire; jpeg_quality 1 … 95 makes them small and lossy (pillow)."""
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        refuse("images", f"{images.dtype} {images.shape}", "uint8 (T, h, w, 3)")
    shape: Any = images.shape
    if jpeg_quality == 0:
        return Pixels(shape, images.tobytes())
    from PIL import Image

    files = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=jpeg_quality)
        files.append(file.getvalue())
    return Pixels(shape, b"".join(files), tuple(map(len, files)))


def read_pixels(pixels: Pixels) -> np.ndarray:
    """(T, h, w, 3) uint8, a read-only view when raw. Raises WireError for a JPEG that is not as declared."""
    if not pixels.jpeg:
        return np.frombuffer(pixels.data, np.uint8).reshape(pixels.shape)
    from PIL import Image

    out, start = np.empty(pixels.shape, np.uint8), 0
    for i, size in enumerate(pixels.jpeg):
        try:
            with Image.open(io.BytesIO(pixels.data[start : start + size]), formats=["JPEG"]) as image:
                got = (image.height, image.width, image.mode)  # of its header: nothing is unfolded yet
                if got != (*pixels.shape[1:3], "RGB"):
                    refuse("jpeg", got, (*pixels.shape[1:3], "RGB"))
                out[i] = np.asarray(image)
        except WireError:
            raise
        except Exception as error:  # pillow raises half a dozen types for broken files
            refuse("jpeg", f"{type(error).__name__} {first_line(error)}", "a JPEG file")
        start += size
    return out


def make_ask(
    *, episode: int, seq: int, captured_ns: int, start: int, task: str, images: dict[str, np.ndarray],
    state: np.ndarray, prefix: np.ndarray | None = None, jpeg_quality: int = 0,
) -> Ask:  # fmt: skip
    """images: camera -> (T, h, w, 3) uint8; state: (T, P); prefix: (d, A). Raises WireError."""
    return Ask(
        episode, seq, captured_ns, start, task,
        {name: make_pixels(image, jpeg_quality) for name, image in images.items()},
        pack_floats(state), b"" if prefix is None else pack_floats(prefix),
    )  # fmt: skip


def pack_floats(array: np.ndarray) -> bytes:
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes inf, which is refused
        return np.asarray(array).astype(FLOAT32).tobytes()


def fit_ask(ask: Ask, hello: Hello) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Images camera -> (T, h, w, 3) uint8, state (T, P) and prefix (d, A) float32, read-only.

    Raises WireError unless they fit the policy; which cameras it can do without, it knows itself.
    """
    if unknown := sorted(set(ask.images) - set(hello.cameras)):
        refuse("cameras", unknown, f"some of {sorted(hello.cameras)}")
    for name, pixels in ask.images.items():
        if pixels.shape[0] != hello.n_obs_steps:
            refuse(f"camera {name}", f"{pixels.shape[0]} pictures", hello.n_obs_steps)
    if (unfolded := sum(math.prod(pixels.shape) for pixels in ask.images.values())) > MAX_DECODED:
        refuse("images", f"{unfolded} bytes", f"at most {MAX_DECODED}")
    if len(ask.state) != 4 * hello.n_obs_steps * hello.state_dim:
        refuse("state", f"{len(ask.state) // 4} numbers", (hello.n_obs_steps, hello.state_dim))
    d, rest = divmod(len(ask.prefix), 4 * hello.action_dim)
    if rest or d > hello.max_prefix:
        got = f"{len(ask.prefix) // 4} numbers"
        refuse("prefix", got, f"at most {hello.max_prefix} actions of {hello.action_dim}")
    state = np.frombuffer(ask.state, FLOAT32).reshape(hello.n_obs_steps, hello.state_dim)
    prefix = np.frombuffer(ask.prefix, FLOAT32).reshape(d, hello.action_dim)
    return {name: read_pixels(pixels) for name, pixels in ask.images.items()}, state, prefix


def fit_chunk(chunk: Chunk, hello: Hello) -> np.ndarray:
    """The actions (H, A) float32. Raises WireError unless they are this model's, and as many as it says."""
    if chunk.model != hello.model:
        refuse("model", chunk.model[:12], hello.model[:12])
    if len(chunk.actions) != 4 * hello.chunk_size * hello.action_dim:
        refuse("actions", f"{len(chunk.actions) // 4} numbers", (hello.chunk_size, hello.action_dim))
    return np.frombuffer(chunk.actions, FLOAT32).reshape(hello.chunk_size, hello.action_dim)
