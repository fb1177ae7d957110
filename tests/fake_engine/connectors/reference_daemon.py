"""The reference connectors' daemon: it says which blocks are there. `reference_daemon SOCKET DIRECTORY`.

Bytes lie in the directory, where engines read and write them without the daemon, as an engine does with host memory
that is mapped into it. A block counts once the daemon has committed it.
"""

from __future__ import annotations

import os
import socketserver
import sys
from multiprocessing import connection
from pathlib import Path


class Handler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        directory = Path(self.server.directory)  # type: ignore[attr-defined]
        pipe = connection.Connection(os.dup(self.request.fileno()))
        try:
            while True:
                what, names = pipe.recv()
                if what == "has":
                    pipe.send([(directory / name).exists() for name in names])
                else:
                    (directory / f"part.{names[0]}").rename(directory / names[0])
                    pipe.send(True)
        except (EOFError, OSError):
            pass


class Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


def main() -> None:
    path, directory = sys.argv[1:]
    Path(path).unlink(missing_ok=True)
    Path(directory).mkdir(exist_ok=True)
    with Server(path, Handler) as server:
        server.directory = directory  # type: ignore[attr-defined]
        server.serve_forever(poll_interval=0.1)


if __name__ == "__main__":
    main()
