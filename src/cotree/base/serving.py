"""Helpers of cotree's HTTP servers: listening sockets, and Host and Origin checks against DNS rebinding."""

from __future__ import annotations

import hmac
import socket

from cotree.base.errors import UsageError

TOKEN = "COTREE_TOKEN"  # noqa: S105 - the variable's name
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def listen(host: str, port: int) -> tuple[socket.socket, str]:
    """Open a listening socket; returns it with its URL, "http://127.0.0.1:8000". Port 0 picks a free one.

    Raises:
        UsageError: the host is not of this machine, or the port is in use.
    """
    shown, family = (f"[{host}]", socket.AF_INET6) if ":" in host else (host, socket.AF_INET)
    try:
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise UsageError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from None
    return listening, f"http://{shown}:{listening.getsockname()[1]}"


def is_foreign(host: str, asked: str, origin: str | None) -> bool:
    """Whether a request has an unknown host name (DNS rebinding), or comes from another server's page.

    Args:
        host: the server's host. asked, origin: the request's headers Host and Origin.
    """
    from yarl import URL

    try:
        # A proxy in front may add TLS, so the scheme of the page's origin is accepted.
        page = None if origin is None else URL(origin).origin()
        own = URL(f"{page.scheme if page else 'http'}://{asked}").origin()
    except ValueError:
        return True
    of_another = page is not None and (page.host, page.port) != (own.host, own.port)
    return of_another or (host in LOOPBACK and own.host not in LOOPBACK)


def is_same_secret(sent: str, token: str) -> bool:
    """Compare a client's token in constant time."""
    return hmac.compare_digest(sent.encode("utf-8", "surrogateescape"), token.encode())
