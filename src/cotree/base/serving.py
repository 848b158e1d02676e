"""What every server of cotree needs: a port to listen on, and who may ask.

A page in a browser cannot reach a loopback server through a name of its own (Host and Origin are checked).
"""

from __future__ import annotations

import hmac
import socket

from cotree.base.errors import UsageError

TOKEN = "COTREE_TOKEN"  # noqa: S105 - the variable's name
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def listen(host: str, port: int) -> tuple[socket.socket, str]:
    """A listening socket and its address, "http://127.0.0.1:8000"; port 0 is a free one.

    Raises:
        UsageError: the host is none of this machine's, or the port is taken.
    """
    shown, family = (f"[{host}]", socket.AF_INET6) if ":" in host else (host, socket.AF_INET)
    try:
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise UsageError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from None
    return listening, f"http://{shown}:{listening.getsockname()[1]}"


def is_foreign(host: str, asked: str, origin: str | None) -> bool:
    """Whether a request comes under a name of the server that a page made up (DNS rebinding), or from another server's
    page.

    Args:
        host: that the server listens on. asked, origin: the request's headers Host and Origin.
    """
    from yarl import URL

    try:
        # A proxy before this server may speak TLS where this server does not, so a page's scheme is taken.
        page = None if origin is None else URL(origin).origin()
        own = URL(f"{page.scheme if page else 'http'}://{asked}").origin()
    except ValueError:
        return True
    of_another = page is not None and (page.host, page.port) != (own.host, own.port)
    return of_another or (host in LOOPBACK and own.host not in LOOPBACK)


def is_same_secret(sent: str, token: str) -> bool:
    """Whether a client sent the token, compared in equal time whatever it sent."""
    return hmac.compare_digest(sent.encode("utf-8", "surrogateescape"), token.encode())
