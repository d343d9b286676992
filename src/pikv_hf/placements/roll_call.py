"""Tells which rank has stopped when a collective fails."""

import os
import secrets
import socket
import threading
from collections.abc import Callable
from typing import Any

# Seconds that a rank has to answer, and bytes of a message.
PATIENCE, LONGEST = 5.0, 1024


class RollCall:
    """Lets ranks ask each other, after a collective has failed, which of them still run.

    A thread of each rank answers on a port of its own, even while the rank waits for a collective, for
    as long as the process lives. The first rank that finds who has stopped tells the others, as it
    will stop, too.
    """

    def __init__(self, rank: int, gather: Callable[[Any], list[Any]]) -> None:
        """Open the port of `rank`; `gather` returns the values that all ranks pass to it, in order."""
        self.rank = rank
        self._has_failed = False
        self._told: str | None = None
        self._token = secrets.token_hex(16)
        self._server = socket.create_server((_own_host(), 0))
        self._peers = gather((*self._server.getsockname()[:2], self._token))
        threading.Thread(target=self._answer, daemon=True, name="pikv roll call").start()

    def note_failure(self) -> None:
        """Answer from now on that this rank has failed."""
        self._has_failed = True

    def verdict(self) -> str | None:
        """Ask all ranks, and return which have failed or stopped; None = all run."""
        if self._told is not None:
            return self._told
        found: dict[str, list[int]] = {"failed": [], "stopped": [], "runs": []}
        for rank in range(len(self._peers)):
            if rank != self.rank:
                found[self._ask(rank, "ask") or "stopped"].append(rank)
        parts = [f"{_named(found[k])} {k}" for k in ("failed", "stopped") if found[k]]
        verdict = " and ".join(parts) or None
        if verdict is not None and self._told is None:
            for rank in found["runs"]:
                self._ask(rank, verdict)
        return self._told or verdict

    def _ask(self, rank: int, message: str) -> str | None:
        """Return the answer of a rank to `message`; None if it does not answer."""
        host, port, token = self._peers[rank]
        try:
            with socket.create_connection((host, port), timeout=PATIENCE) as peer:
                peer.sendall(f"{token}{message}".encode())
                peer.shutdown(socket.SHUT_WR)
                return peer.recv(LONGEST).decode() or None
        except OSError:
            return None

    def _answer(self) -> None:
        while True:
            peer, _ = self._server.accept()
            with peer:
                try:
                    peer.settimeout(PATIENCE)
                    message = peer.recv(LONGEST).decode()
                    if message.startswith(self._token):
                        text = message.removeprefix(self._token)
                        self._told = self._told if text == "ask" else self._told or text
                        peer.sendall(b"failed" if self._has_failed else b"runs")
                except (OSError, UnicodeDecodeError):
                    continue


def _named(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]} has"
    return f"ranks {', '.join(map(str, ranks))} have"


def _own_host() -> str:
    """Return the address by which this machine reaches the master of the process group."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 1))  # sends nothing
        except OSError:
            return "127.0.0.1"
        return probe.getsockname()[0]
