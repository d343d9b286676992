"""Whether a layer's buffers keep their addresses over plain steps and seals, as a CUDA graph needs."""

import census  # first: it puts the other folders on the path
from common import Result, start
from one_layer import OneLayer, new_tokens
from torch import Tensor

from pikv_hf.layer.state import LayerState

TOKENS, PAGES, PAGE = (1024, 8192), 8, 64
COMPRESSORS = ("identity", "int4")


def tail_buffers(state: LayerState) -> list[Tensor]:
    return [state.tail.keys, state.tail.values]


def append_buffers(state: LayerState) -> list[Tensor]:
    """Return the fields of the page store that new pages are written to."""
    return [*state.pages.slabs[-1].fields.values()]


class Moves:
    """Counts how often any of some buffers is elsewhere than before."""

    def __init__(self, buffers: list[Tensor]) -> None:
        self.now = buffers
        # Buffers are kept alive: an address that is free may be given to another one.
        self.before: list[list[Tensor]] = []
        self.count = 0

    def see(self, buffers: list[Tensor]) -> None:
        places, now = (list(map(census.address, held)) for held in (self.now, buffers))
        if places != now:
            self.count += 1
            self.before.append(self.now)
        self.now = buffers


def measure(tokens: int, compressor: str) -> dict[str, int]:
    """Decode `PAGES` pages of tokens; return how many steps there were, and how many moved what."""
    layer = OneLayer(tokens, census.DEVICE, compressor=compressor)
    state, token = layer.layer.state, new_tokens(1)
    tail, store = Moves(tail_buffers(state)), Moves(append_buffers(state))
    seen = {"plain": 0, "plain, tail": 0, "seals": 0, "seals, tail": 0, "stores": 0}
    for _ in range(PAGES * PAGE):
        departed, moves = state.num_departed[0], tail.count
        layer.attend(*token)
        tail.see(tail_buffers(state))
        store.see(append_buffers(state))
        kind = "plain" if state.num_departed[0] == departed else "seals"
        seen[kind] += 1
        seen[f"{kind}, tail"] += tail.count - moves
    return seen | {"stores": store.count}


def main() -> None:
    quick = start(__doc__)
    result = Result(
        "launches/addresses",
        "Steps after which a buffer of a layer is elsewhere",
        f"{PAGES * PAGE} steps of one token after so many tokens; append: the page store that new pages "
        "are written to, another one included; tensors on a logical accelerator",
        [
            "compressor",
            "tokens",
            "plain steps",
            "move the tail",
            "seals",
            "move the tail",
            "move append",
        ],
    )
    for method in COMPRESSORS:
        for tokens in TOKENS[:1] if quick else TOKENS:
            seen = measure(tokens, method)
            result.add(method, tokens, *seen.values())
            tail = seen["plain, tail"] + seen["seals, tail"]
            result.goal(f"{method}, {tokens} tokens: the tail never moves", tail, tail == 0)
            stores = seen["stores"]
            result.goal(f"{method}, {tokens} tokens: appends never move", stores, stores == 0)
    result.publish(quick)


if __name__ == "__main__":
    main()
