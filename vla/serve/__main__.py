"""Serve a checkpoint: python -m vla.serve CHECKPOINT [--host=127.0.0.1] [--port=8765]."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import threading
import time

from vla.serve.access import TOKEN, Access, read_token
from vla.serve.server import ServedPolicy, serve_policy
from vla.serve.wire import PORT


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "serve", description="Serve a checkpoint's policy to controllers, on this machine unless told otherwise.",
        epilog=f"Other machines need --host, --tls-cert, --tls-key and a token, from --token-file or {TOKEN}. "
        "GET /health on the same port says how it is.",
    )  # fmt: skip
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="its folder, a training's output folder, or an export"
    )
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=PORT, help="0 takes a free one (%(default)s)")
    parser.add_argument("--unix", default="", metavar="PATH", help="a Unix socket instead")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, … (%(default)s)")
    parser.add_argument(
        "--threads", type=int, default=0, help="of the processor, for the network; 0: all cores"
    )
    parser.add_argument(
        "--launch", default="auto", choices=("auto", "eager", "graph", "compiled"),
        help="a checkpoint's network on a GPU: compiled first (auto), only captured, or kernel by kernel",
    )  # fmt: skip
    parser.add_argument("--tls-cert", default="", metavar="FILE", help="certificate chain (PEM)")
    parser.add_argument("--tls-key", default="", metavar="FILE", help="its private key (PEM)")
    parser.add_argument("--token-file", default="", metavar="FILE", help="what clients must know; mode 0600")
    parser.add_argument("--dataset", default="", help="of a checkpoint trained on data.mix, whose policy")
    parser.add_argument(
        "--with-parent",
        action="store_true",
        help="end when standard input closes, as it does when the parent dies",
    )
    return parser.parse_args(argv)


def load(path: str, device: str, threads: int, launch: str, dataset: str) -> ServedPolicy:
    """The policy of a checkpoint or an export. Raises ValueError when it is missing, damaged or of another kind."""
    from vla.export.load import load_policy

    return load_policy(path, device, threads, launch, dataset)


def end_with_parent() -> None:
    """Watch standard input in a thread; when it closes, end in order, and in any case."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        os._exit(1)  # an inference that hangs

    threading.Thread(target=watch, daemon=True).start()


def main(argv: list[str]) -> int:
    """The exit code: 0 after SIGTERM or Ctrl-C, 1 with one line on what is wrong."""
    arguments = parse(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # while it loads, too
    try:
        if arguments.with_parent:
            end_with_parent()
        access = Access(
            arguments.host, arguments.port, arguments.unix, arguments.tls_cert, arguments.tls_key,
            read_token(arguments.token_file),
        )  # fmt: skip
        access.tls()  # what is wrong with it shows before the network is loaded
        policy = load(
            arguments.checkpoint, arguments.device, arguments.threads, arguments.launch, arguments.dataset
        )
        model = policy.model_sha256[:12]
        serve_policy(
            policy,
            access,
            lambda url, ms: print(f"ready: {url} model {model} warm-up {ms:.0f} ms", flush=True),
        )
    except KeyboardInterrupt:
        return 0
    except ImportError as error:
        print(
            f"serve: got no package {error.name!r}, expected what this policy runs on. remedy: pip install "
            "'vla[serve]' for checkpoints, 'vla[control,onnx]' for ONNX exports.", file=sys.stderr,
        )  # fmt: skip
        return 1
    except (ValueError, OSError, RuntimeError) as error:
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        remedy = " remedy: end the server that is there, or choose another --port." if taken else ""
        print(f"serve: {error}{remedy}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
