"""Tells which rank has stopped when a collective fails."""

import atexit
import socket
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:
    from .ranks import Ranks

# Seconds that ranks have to answer, and between two looks at the alarm.
PATIENCE, PAUSE = 5.0, 0.5


class RollCall:
    """Lets ranks ask each other, after a collective has failed, which of them still run.

    A thread of each rank looks for the alarm in a store that rank 0 serves, and answers even while the
    rank waits for a collective. It lives as long as the process.
    """

    def __init__(self, ranks: "Ranks") -> None:
        self.rank, self.size = ranks.rank, ranks.size
        self._has_failed = False
        address: list[Any] = [None]
        server = None
        if self.rank == 0:
            host = socket.gethostname() if _is_reachable(socket.gethostname()) else "127.0.0.1"
            server = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
            address = [(host, server.port)]
        for group in reversed(ranks.groups):
            source = dist.get_global_rank(group, 0)
            dist.broadcast_object_list(address, src=source, group=group)
        self._server = server
        self._host, self._port = address[0]
        self._verdict: str | None = None
        self._is_decided, self._is_over = threading.Event(), threading.Event()
        thread = threading.Thread(target=self._watch, daemon=True, name="pikv roll call")
        thread.start()
        atexit.register(self._stop, thread)

    def _stop(self, thread: threading.Thread) -> None:
        """End the thread before the interpreter ends, which a call to the store would not survive."""
        self._is_over.set()
        thread.join()

    def note_failure(self) -> None:
        """Answer from now on that this rank has failed."""
        self._has_failed = True

    def verdict(self) -> str | None:
        """Raise the alarm, and return which ranks do not answer; None = all do."""
        try:
            self._client().set("alarm", "1")
        except (RuntimeError, dist.DistError):
            return "rank 0 has stopped"
        self._is_decided.wait(2 * PATIENCE)
        return self._verdict

    def _client(self) -> dist.TCPStore:
        return dist.TCPStore(
            self._host,
            self._port,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=PATIENCE),
        )

    def _watch(self) -> None:
        """Wait for the alarm, answer it, and find who does not answer."""
        try:
            store = self._client()
            while not store.check(["alarm"]):
                if self._is_over.wait(PAUSE):
                    return
            store.set(f"answer {self.rank}", "failed" if self._has_failed else "runs")
            self._verdict = self._heard(store)
        except (RuntimeError, dist.DistError):
            self._verdict = "rank 0 has stopped"
        self._is_decided.set()

    def _heard(self, store: dist.TCPStore) -> str | None:
        """Return which ranks have failed, or do not answer in time; None = all run."""
        keys = [f"answer {rank}" for rank in range(self.size)]
        end = time.monotonic() + PATIENCE
        while not store.check(keys) and time.monotonic() < end:
            time.sleep(PAUSE / 5)
        silent = [rank for rank, key in enumerate(keys) if not store.check([key])]
        heard = ((rank, key) for rank, key in enumerate(keys) if rank not in silent)
        failed = [rank for rank, key in heard if store.get(key) == b"failed"]
        parts = ((failed, "failed"), (silent, "stopped"))
        return " and ".join(f"{_named(ranks)} {what}" for ranks, what in parts if ranks) or None


def _named(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]} has"
    return f"ranks {', '.join(map(str, ranks))} have"


def _is_reachable(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True
