"""Who really called, when a proxy of ours stands in front: address, scheme and host, taken from forwarding headers.

Anybody can write such a header. It counts only in a request that one of the known proxies has sent, and only as far
as known proxies have written it: what stands to the left of them is the caller's own invention.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

from werkzeug.middleware.proxy_fix import ProxyFix

from portal.settings import UNIX_SOCKET, networks, words

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment


class KnownProxies:
    """WSGI middleware. Each proxy must add the address that called it to the end of `X-Forwarded-For`.

    `trusted` is the setting TRUSTED_PROXIES: addresses, networks, and `unix` for whoever may open the portal's socket.
    """

    def __init__(self, app: WSGIApplication, trusted: str) -> None:
        self._proxies, self._is_socket_ours = networks(trusted, but=UNIX_SOCKET), UNIX_SOCKET in words(trusted)
        self._app, self._behind_proxy = app, ProxyFix(app, x_for=0, x_proto=1, x_host=1)
        self._is_ours = lru_cache(1024)(self._look_up)  # few proxies call often; strangers have no end of addresses

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        sender = environ.get("REMOTE_ADDR", "")
        if not self._is_ours(sender):
            return self._app(environ, start_response)
        environ["REMOTE_ADDR"] = self._caller(sender, environ.get("HTTP_X_FORWARDED_FOR", ""))
        return self._behind_proxy(environ, start_response)

    def _caller(self, sender: str, forwarded: str) -> str:
        """The nearest address that is none of our proxies."""
        for step in reversed([part.strip() for part in forwarded.split(",")]):
            if _address(step) is None:
                break
            sender = step
            if not self._look_up(step):
                break
        return sender

    def _look_up(self, text: str) -> bool:
        if not text:
            return self._is_socket_ours  # a UNIX socket has no address
        address = _address(text)
        return address is not None and any(address in network for network in self._proxies)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address  # a socket for both writes IPv4 as IPv6
