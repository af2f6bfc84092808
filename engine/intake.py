"""How many bytes of requests may be on their way: in all, from one address, and of one tenant.

Bytes are charged as they arrive, so a length that is only declared takes no room from anybody. A body is charged until
what it asks for was admitted (`scheduler.admission` counts it from then on), or its request has ended. Large answers
are charged to the same accounts until their clients have read them.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable

from core.errors import Overloaded

COME_BACK = 5.0  # seconds that a client is told to stay away
WHOSE = {
    "server": "the requests and answers that are on their way now",
    "address": "the requests and answers of your address that are on their way",
    "tenant": "your requests and answers that are on their way",
}
UNREAD = "; read the answers that you were sent, then send this request again"


class _Account:
    """The bytes of all bodies and answers of one kind: of the server, an address or a tenant."""

    __slots__ = ("bodies", "bytes", "kind", "most", "name")

    def __init__(self, kind: str, name: str, most: int) -> None:
        self.kind, self.name, self.most = kind, name, most
        self.bodies = self.bytes = 0


class Charge:
    """What has come of one body, or is sent of one answer (`leaving`). Close it once; a second time does nothing."""

    __slots__ = ("_accounts", "_intake", "_leaving", "size")

    def __init__(self, intake: Intake, *accounts: _Account, leaving: bool = False) -> None:
        self._intake, self._accounts, self._leaving = intake, accounts, leaving
        self.size = 0
        for account in accounts:
            account.bodies += 1

    def add(self, size: int) -> None:
        """So many bytes more have come. Raises `Overloaded` when they are too many; they are not counted then. An
        account's only body is never too much: each is bounded by itself."""
        for account in self._accounts:
            if account.bytes + size > account.most and account.bodies > 1:
                raise self._intake._over(account, self._leaving)
        for account in self._accounts:
            account.bytes += size
        self.size += size

    def __enter__(self) -> Charge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """The bytes are somewhere else now, or gone."""
        for account in self._accounts:
            account.bytes -= self.size
            account.bodies -= 1
            if not account.bodies:
                self._intake._accounts.pop((account.kind, account.name), None)
        self._accounts = ()
        self.size = 0


class Intake:
    """At most `most` bytes at once; of these one address and one tenant may have the part that their share says (0-1].
    `refused(reason)` hears of each refusal: "bodies_server", "bodies_address" or "bodies_tenant", and of an answer
    "answers_server", and so on."""

    def __init__(
        self, most: int, *, address_share: float = 1.0, tenant_share: float = 1.0,
        refused: Callable[[str], None] = lambda _: None,
    ) -> None:
        if most < 1 or not 0 < address_share <= 1 or not 0 < tenant_share <= 1:
            raise ValueError("there must be room for at least one byte, and a share is above 0 and up to 1")
        self.most = most
        self._shares = {"address": address_share, "tenant": tenant_share}
        self._refused = refused
        self._server = _Account("server", "", most)
        self._accounts: dict[tuple[str, str], _Account] = {}

    @property
    def bytes(self) -> int:
        """What is on its way now."""
        return self._server.bytes

    @property
    def bodies(self) -> int:
        """Of how many requests that is."""
        return self._server.bodies

    def charge(self, address: str, tenant: str, *, leaving: bool = False) -> Charge:
        """For one body, or, `leaving`, one answer; `address` as `network` gives it."""
        known = self._accounts
        whose = known.get(("address", address)) or self._open("address", address)
        who = known.get(("tenant", tenant)) or self._open("tenant", tenant)
        return Charge(self, self._server, whose, who, leaving=leaving)

    def _open(self, kind: str, name: str) -> _Account:
        account = self._accounts[kind, name] = _Account(kind, name, int(self.most * self._shares[kind]))
        return account

    def _over(self, account: _Account, leaving: bool) -> Overloaded:
        self._refused(f"{'answers' if leaving else 'bodies'}_{account.kind}")
        told = f"{WHOSE[account.kind]} already hold {account.bytes >> 20} MiB"
        advice = UNREAD if leaving and account.kind != "server" else f"; try again in about {COME_BACK:.0f} s"
        return Overloaded(told + advice, retry_after=COME_BACK)

    def check(self) -> None:
        """The server's sums are those of the addresses, and those of the tenants; nothing empty is kept."""
        for kind in ("address", "tenant"):
            accounts = [account for account in self._accounts.values() if account.kind == kind]
            assert sum(account.bytes for account in accounts) == self.bytes
            assert sum(account.bodies for account in accounts) == self.bodies
            assert all(account.bodies > 0 <= account.bytes for account in accounts)

    def __repr__(self) -> str:
        return f"<Intake {self.bytes}/{self.most} bytes of {self.bodies} bodies>"


def network(host: str) -> str:
    """Whose bytes an address's are: an IPv4 address stands for itself, an IPv6 one for its /64, of which a client has
    all; what is no address (a socket of this host) for itself."""
    if ":" not in host:
        return host
    try:
        address = ipaddress.IPv6Address(host.partition("%")[0])
    except ValueError:
        return host
    return str(address.ipv4_mapped or ipaddress.IPv6Network((int(address) >> 64 << 64, 64)))
