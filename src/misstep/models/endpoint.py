"""Models behind an OpenAI-compatible endpoint: how they are named, and whose key they get.

A name is `openai:MODEL@URL`. Keys come from the environment and go to one host each: a recipe
that somebody else wrote cannot have the key of one service sent to another. This module knows
names, keys and whether somebody answers at the address; it asks no model anything.
"""

import os
import re
from dataclasses import dataclass
from http.client import HTTPException
from importlib.util import find_spec
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from misstep import __version__
from misstep.errors import MissingExtra, ModelError
from misstep.records import digest

PREFIX = "openai:"
NAME = re.compile(r"openai:(?P<model>\S+)@(?P<url>https?://\S+)")
FORM = "openai:MODEL@URL, such as openai:Qwen/Qwen3-8B@http://localhost:8000/v1"
OPENAI = "api.openai.com"
SECONDS = 20.0
"""In which an endpoint must say something before a run begins."""


@dataclass(frozen=True)
class Endpoint:
    """A model's name at a server, and the server's address."""

    model: str
    url: str

    @property
    def host(self) -> str:
        """The server's name, without its port."""
        return urlsplit(self.url).hostname or ""

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that name model and address; the weights cannot be seen."""
        return digest([self.model, self.url])

    @property
    def variable(self) -> str:
        """The environment variable that holds the key for this host."""
        if self.host == OPENAI:
            return "OPENAI_API_KEY"
        return "MISSTEP_KEY_" + re.sub(r"[^A-Z0-9]", "_", self.host.upper())

    @property
    def key(self) -> str | None:
        """The key, where the environment has one.

        Raises:
            ModelError: it holds what no header can carry.
        """
        found = os.environ.get(self.variable, "").strip()
        if not (found.isascii() and found.isprintable()):
            raise ModelError(
                f"{self.variable}: expected a key of printable ASCII characters, found others."
            )
        return found or None


def parse_endpoint(name: str) -> Endpoint:
    """Take a name apart.

    Raises:
        ModelError: it has not the form of one, or its address holds more than an address.
    """
    found = NAME.fullmatch(name)
    if found is None:
        raise ModelError(f"model {_without_secrets(name)}: expected {FORM}.")
    url = found["url"].rstrip("/")
    try:
        parts = urlsplit(url)
        valid = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
    if not valid:
        raise ModelError(f"model {_without_secrets(name)}: expected {FORM}; no valid address.")
    if parts.username is not None or parts.query or parts.fragment:
        # The name goes into manifests and results, and so would a key in it.
        raise ModelError(
            f"model {_without_secrets(name)}: expected an address without user, password, "
            "query or fragment. A key belongs in the environment: see docs/engines.md."
        )
    return Endpoint(found["model"], url)


def _without_secrets(name: str) -> str:
    return re.sub(r"(://)[^/\s]*@|[?#].*", r"\1", name)


class _Stay(HTTPRedirectHandler):
    """Follows nobody elsewhere, since the key would go along."""

    def redirect_request(self, *_: Any) -> None:
        """Give no request to go there with."""


def check_endpoint(endpoint: Endpoint) -> None:
    """Pass if the endpoint answers and accepts the key; no model is asked.

    Raises:
        MissingExtra: the client is not installed.
        ModelError: nobody answers, or the key is refused or absent.
    """
    if find_spec("openai") is None:
        raise MissingExtra("openai", "openai")
    named = f"model {endpoint.model} at {endpoint.url}"
    # Some hosts refuse Python's own name, whatever the key.
    headers = {"User-Agent": f"misstep/{__version__}"}
    if endpoint.key:
        headers["Authorization"] = f"Bearer {endpoint.key}"
    asked = Request(f"{endpoint.url}/models", headers=headers)
    try:
        build_opener(_Stay).open(asked, timeout=SECONDS).close()
    except HTTPError as fault:
        # Any other status is a sign of life: not every server lists its models, nor to all
        # keys that may ask them.
        if fault.code == 401 or (fault.code == 403 and endpoint.key is None):
            raise ModelError(f"{named}: {refused_key(endpoint, fault.code)}") from fault
    except (OSError, HTTPException) as fault:
        raise ModelError(
            f"{named}: expected an OpenAI-compatible server, found none "
            f"({type(fault).__name__}: {fault}). Start it, or correct the address."
        ) from fault


def refused_key(endpoint: Endpoint, status: int) -> str:
    """What to do about a key that the endpoint does not take."""
    found = "was refused" if endpoint.key else "is not set"
    return (
        f"expected a valid key in the environment variable {endpoint.variable}, which {found} "
        f"(status {status})."
    )
