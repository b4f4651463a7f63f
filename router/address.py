"""Addresses of servers, as people type them."""


def base_url(address: str) -> str:
    """The base URL of an OpenAI-style server; the address may end in `/` or, as clients want it, in `/v1`."""
    return address.rstrip("/").removesuffix("/v1").rstrip("/")
