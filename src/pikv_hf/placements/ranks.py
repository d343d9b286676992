"""Ranks that share one cache: what they send each other, and how they fail together.

Shapes: B batch rows, H KV heads, R queries of each, Dv value dim.
"""

import math
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from pikv_kernels import merge_with_lse
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..storage.places import Exchange
from ..storage.row_map import Partial
from .roll_call import RollCall

# The name since torch 2.13, and the one before.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
# Fields begin at multiples of so many bytes in a message.
ALIGNED = 16

_KNOWN: dict[Any, "Ranks"] = {}


class Sent(NamedTuple):
    """Checks of all ranks on their way to the CPU; `arrived` follows them."""

    arrived: torch.Event
    checks: Tensor


class Ranks(Exchange):
    """The ranks of one or two levels of process groups, the inner level first.

    Attributes:
        rank, size: the number of this rank, and how many there are.
        bytes_sent: bytes that this rank has sent: an all-gather among n ranks sends each message n - 1
            times.
    """

    def __init__(self, groups: tuple[Any, ...]) -> None:
        self.groups = groups
        sizes, ranks = (
            [of(group) for group in groups] for of in (dist.get_world_size, dist.get_rank)
        )
        if any(rank < 0 for rank in ranks):
            raise ValueError("`process_group` does not contain this rank: give a group that does.")
        self.size = math.prod(sizes)
        self.rank = ranks[0] + sum(n * size for n, size in zip(ranks[1:], sizes, strict=False))
        self.bytes_sent = 0
        self._sent: list[Sent] = []
        self._roll_call = RollCall(self.rank, self._all)

    @classmethod
    def of(cls, given: Any) -> "Ranks":
        """Return the ranks of a `ProcessGroup`, or of a `DeviceMesh` of one or two dimensions.

        All ranks must call this together for a group that is new to them.
        """
        if isinstance(given, DeviceMesh):
            if given.ndim > 2:
                raise ValueError(
                    f"`process_group` is a DeviceMesh of {given.ndim} dimensions; it must have one, or "
                    "two: (node, rank)."
                )
            groups = tuple(given.get_group(dim) for dim in reversed(range(given.ndim)))
        elif isinstance(given, dist.ProcessGroup):
            groups = (given,)
        else:
            raise TypeError(
                f"`process_group` is {given!r}; it must be a ProcessGroup or a DeviceMesh."
            )
        if groups not in _KNOWN:
            _KNOWN[groups] = cls(groups)
        return _KNOWN[groups]

    def partials(self, out: Tensor, lse: Tensor, check: Tensor | None) -> list[Partial]:
        shape, dim = lse.shape, out.shape[3]
        parts = [(out, lse)]
        for group in self.groups:
            out, lse = merge_with_lse(parts)
            message = torch.cat([out.to(lse.dtype), lse[..., None]], dim=-1).flatten()
            if check is not None:
                message = torch.cat([message, check.view(1)])
            received = self._gathered(message, group)
            if check is not None:
                self._compare(received[:, -1])
                received = received[:, :-1]
            both = received.unflatten(1, (*shape, dim + 1))
            parts = [(part[..., :dim], part[..., dim]) for part in both]
        return parts

    def fields(
        self, fields: list[dict[str, Tensor]], owners: list[int], device: torch.device
    ) -> list[dict[str, Tensor]]:
        sizes = [0] * self.size
        for each, owner in zip(fields, owners, strict=True):
            sizes[owner] += sum(_aligned(tensor.nbytes) for tensor in each.values())
        message = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
        start = 0
        for each, owner in zip(fields, owners, strict=True):
            for tensor in each.values() if owner == self.rank else ():
                own = tensor.to(device).contiguous().view(-1).view(torch.uint8)
                message[start : start + tensor.nbytes] = own
                start += _aligned(tensor.nbytes)
        received = message[None]
        for group in self.groups:
            received = self._gathered(received, group).flatten(0, 1)
        starts = [0] * self.size
        found = []
        for each, owner in zip(fields, owners, strict=True):
            own = {}
            for name, tensor in each.items():
                data = received[owner, starts[owner] :][: tensor.nbytes]
                own[name] = data.view(tensor.dtype).view(tensor.shape)
                starts[owner] += _aligned(tensor.nbytes)
            found.append(own)
        return found

    def agree(self, text: str, unshown: str = "") -> None:
        """Raise ValueError on all ranks unless `text` and `unshown` are equal on all.

        A `text` that begins with "error: " is raised on all ranks.
        """
        try:
            found = self._all((text, unshown))
        except RuntimeError as error:
            self._fail(error)
        texts = [each for each, _ in found]
        failed = next((rank for rank, t in enumerate(texts) if t.startswith("error: ")), None)
        if failed is not None:
            raise ValueError(
                f"rank {failed} cannot make its part of this PiKVCache: "
                f"{texts[failed].removeprefix('error: ')}"
            )
        other = next((rank for rank, each in enumerate(found) if each != found[0]), None)
        if other is not None:
            what = f"has {texts[other]}, but rank 0 has {texts[0]}"
            if texts[other] == texts[0]:
                what = "has a model with another config than rank 0"
            raise ValueError(f"the ranks of this PiKVCache differ: rank {other} {what}.")

    def note_failure(self) -> None:
        """Let other ranks know, when they ask, that this rank has failed in a forward pass."""
        self._roll_call.note_failure()

    def _all(self, value: Any) -> list[Any]:
        """Return the values that all ranks call this with, in order of rank."""
        found = [value]
        for group in self.groups:
            gathered: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(gathered, found, group=group)
            found = [each for some in gathered for each in some]
        return found

    @torch.no_grad()
    def _gathered(self, message: Tensor, group: Any) -> Tensor:
        """Return the messages [n, ...] of the n ranks of a group."""
        self._read_checks()
        size = dist.get_world_size(group)
        received = message.new_empty(size * message.numel())
        try:
            _all_gather(received, message.flatten(), group=group)
        except RuntimeError as error:
            self._fail(error)
        self.bytes_sent += (size - 1) * message.nbytes
        return received.view(size, *message.shape)

    def _compare(self, checks: Tensor) -> None:
        """Compare the `checks` of all ranks: at once on a CPU, else when they have arrived."""
        if checks.device.type == "cpu":
            _refuse_if_apart(checks)
            return
        arrived = torch.Event(checks.device)
        self._sent.append(Sent(arrived, checks.to("cpu", non_blocking=True)))
        arrived.record(torch.accelerator.current_stream(checks.device))

    def _read_checks(self) -> None:
        while self._sent and self._sent[0].arrived.query():
            _refuse_if_apart(self._sent.pop(0).checks)

    def _fail(self, error: RuntimeError) -> NoReturn:
        """Raise an error that names the ranks that have stopped."""
        why = self._roll_call.verdict() or "their connection failed"
        raise RuntimeError(
            f"the ranks that share this PiKVCache cannot go on, because {why}: {error}"
        ) from error

    def __deepcopy__(self, memo: dict[int, Any]) -> "Ranks":
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a PiKVCache that ranks share cannot be pickled: each holds a part of it.")


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNED) * ALIGNED


def _refuse_if_apart(checks: Tensor) -> None:
    """Raise RuntimeError unless the checks of all ranks are the same bits."""
    numbers = (
        checks.contiguous().view(torch.int32 if checks.itemsize == 4 else torch.int64).tolist()
    )
    if len(set(numbers)) == 1:
        return
    usual = max(numbers, key=numbers.count)
    apart = [rank for rank, number in enumerate(numbers) if number != usual]
    who = f"rank {apart[0]} sees" if len(apart) == 1 else f"ranks {apart} see"
    what = f"{who} other tokens than the rest of {len(numbers)}"
    if 2 * numbers.count(usual) <= len(numbers):
        what = f"ranks {list(range(len(numbers)))} see different tokens"
    raise RuntimeError(
        f"the ranks that share this PiKVCache have drifted apart: {what}. Give all ranks the same "
        "inputs and weights, and the same seed if tokens are sampled."
    )
