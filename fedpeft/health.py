"""A health endpoint: GET /health says in JSON how a server or a client is doing. For supervisors and containers.

python -m fedpeft.health HOST:PORT     asks one; exit code 0 when it answers
"""

from __future__ import annotations

import json
import sys
import threading
import urllib.request
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from fedpeft.addresses import parsed


class Health:
    """Answers at `address` (HOST:PORT) while its block runs; None: nowhere. `says` is called for every question."""

    def __init__(self, address: str | None) -> None:
        self.address = address
        self.says: Callable[[], Mapping[str, Any]] = dict
        self._server: ThreadingHTTPServer | None = None

    def __enter__(self) -> Health:
        if self.address is None:
            return self
        health = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path != "/health":
                    self.send_error(404)
                    return
                body = json.dumps({"status": "ok", **health.says()}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                """Questions are no news."""

        self._server = ThreadingHTTPServer(parsed(self.address, "--health"), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *reason: object) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()


def ask(address: str) -> dict[str, Any]:
    """What the endpoint at `address` says. Raises OSError when nobody answers."""
    with urllib.request.urlopen(f"http://{address}/health", timeout=5) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


if __name__ == "__main__":
    try:
        print(json.dumps(ask(sys.argv[1])))
    except OSError as error:
        sys.exit(f"{sys.argv[1]}: {error}")
