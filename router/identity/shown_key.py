"""The API key that a call or an HTTP request shows, read in one place for the router's door and the edge. Pure.

Two readings would let a caller be checked by one key and served under another.
"""

from __future__ import annotations

from collections.abc import Iterable

from megatoken.errors import AuthError


def secret_in(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    """The key in `authorization: Bearer KEY` or `x-api-key: KEY`, names in lower case; empty when there is none.

    The same key may be shown more than once. Raises AuthError for keys that differ.
    """
    found = ""
    for name, value in metadata or ():
        if not isinstance(value, str):
            continue
        if name == "authorization" and value[:7].lower() == "bearer ":
            secret = value[7:].strip()
        elif name == "x-api-key":
            secret = value.strip()
        else:
            continue
        if secret and found and secret != found:
            raise AuthError("more than one API key is shown; send one, as authorization: Bearer KEY")
        found = secret or found
    return found
