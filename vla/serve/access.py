"""Who may reach the policy server, and over what: loopback, a Unix socket, or TLS with a token."""

from __future__ import annotations

import hmac
import ipaddress
import os
import socket
import ssl
import stat
from dataclasses import dataclass
from pathlib import Path

from vla.checks import ConfigError, require
from vla.serve.wire import PORT

TOKEN = "VLA_TOKEN"  # the environment variable; never an argument, which every user of a machine can read


@dataclass(frozen=True)
class Access:
    """Where a server listens, and what it asks of those who come.

    port 0 takes a free one; unix: a socket's path instead of host and port. Raises ConfigError when
    anyone but this machine's processes could come in without TLS and a token.
    """

    host: str = "127.0.0.1"
    port: int = PORT
    unix: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    token: str = ""

    def __post_init__(self) -> None:
        require(0 <= self.port < 2**16, "port", self.port, "0 … 65535")
        require(
            bool(self.tls_cert) == bool(self.tls_key), "tls-cert", self.tls_cert or "none",
            "a certificate together with its key", "give --tls-cert and --tls-key, or neither",
        )  # fmt: skip
        if not self.unix and not is_loopback(self.host):
            require(
                bool(self.tls_cert and self.token), "host",
                f"{self.host} {'with' if self.tls_cert else 'without'} TLS, "
                f"{'with' if self.token else 'without'} a token",
                "127.0.0.1, or both TLS and a token: whoever reaches the port could use the policy",
                f"give --tls-cert, --tls-key and --token-file (or {TOKEN}), or keep --host=127.0.0.1 "
                "and come through ssh -L",
            )  # fmt: skip

    def tls(self) -> ssl.SSLContext | None:
        """Raises ConfigError when certificate and key cannot be read or do not belong together."""
        if not self.tls_cert:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.tls_cert, self.tls_key)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError("tls-cert", str(error), "a certificate in PEM form, and its own key") from None
        return context

    def admits(self, authorization: list[str]) -> bool:
        """Whether these Authorization headers hold the token; the time taken does not tell how close they came."""
        if not self.token:
            return True
        expected = f"Bearer {self.token}".encode()
        return len(authorization) == 1 and hmac.compare_digest(authorization[0].encode(), expected)


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_token(file: str) -> str:
    """The token from a file that only its owner can read, or else from VLA_TOKEN; "" when there is none."""
    token, source = os.environ.get(TOKEN, ""), TOKEN
    if file:
        path, source = Path(file), "token-file"
        remedy = f"python -c 'import secrets; print(secrets.token_urlsafe())' > {file} && chmod 600 {file}"
        require(path.is_file(), source, file, "a file with the token", remedy)
        mode = stat.S_IMODE(path.stat().st_mode)
        require(mode & 0o077 == 0, source, f"mode {mode:04o}", "0600, closed to others", f"chmod 600 {file}")
        token = path.read_text(encoding="utf-8", errors="replace").strip()
        require(bool(token), source, "an empty file", "a token", remedy)
    fits = not token or (len(token) >= 16 and token.isascii() and token.isprintable() and " " not in token)
    require(
        fits, source, f"{len(token)} letters", "at least 16 of ASCII without spaces",
        "python -c 'import secrets; print(secrets.token_urlsafe())' makes a good one",
    )  # fmt: skip
    return token


def unix_socket(path: str) -> socket.socket:
    """A bound socket that only this user can connect to; one that a killed server left is replaced.

    Raises ConfigError when something else is there, or a server that still listens.
    """
    place = Path(path)
    if place.exists():
        require(place.is_socket(), "unix", path, "a new path, or a socket's", "choose another path")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1)
            try:
                probe.connect(path)
            except (ConnectionRefusedError, FileNotFoundError):
                place.unlink(missing_ok=True)
            except OSError as error:
                raise ConfigError("unix", f"{path}: {error}", "a socket of this user's") from None
            else:
                raise ConfigError(
                    "unix", f"{path}, where a server listens", "a free path", "stop that server"
                )
    bound = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)  # the mode from the first moment on: a chmod would come too late
    try:
        bound.bind(path)
    except OSError as error:
        bound.close()
        raise ConfigError(
            "unix", f"{path}: {error}", "a short path in a folder that can be written"
        ) from None
    finally:
        os.umask(before)
    return bound
