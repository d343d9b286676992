"""From a user's arguments to the settings of a cache; what is wrong with them is said here."""

from typing import Any

from .compressors import COMPRESSORS, Compressor, Identity, MixedCompressor
from .methods import resolve
from .placement import PLACEMENTS, Local, Placement
from .routers import ROUTERS, All, Router
from .schedulers import SCHEDULERS, Scheduler
from .shared import Shared

DEFAULT_WINDOW = 128
LOSSLESS_WINDOW = 512


def check_count(argument: str, value: Any) -> int:
    """`value` as it is, if it is a positive whole number."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{argument}` is {value!r}; it must be a positive whole number.")
    return value


def check_budget(budget: Any, scheduler: Scheduler | None) -> None:
    if budget is None:
        if scheduler is not None and scheduler.budget(0) is None:
            raise ValueError(
                f"`scheduler` is {scheduler}, which needs a `budget`: a number of tokens (int) or a "
                "share of them (float in (0, 1])."
            )
        return
    if scheduler is None:
        raise ValueError(f"`budget` is {budget!r}, but there is no `scheduler` to keep to it.")
    is_share = isinstance(budget, float) and 0 < budget <= 1
    is_count = isinstance(budget, int) and not isinstance(budget, bool) and budget > 0
    if not (is_share or is_count):
        raise ValueError(
            f"`budget` is {budget!r}; it must be a positive number of tokens (int) or a share of "
            "them (float in (0, 1])."
        )


def default_window(window: int | None, budget: int | float | None, saves_memory: bool) -> int:
    """The newest tokens that stay open; they must fit into a budget given in tokens.

    Where pages save no memory, a longer tail is read in one piece and sealed less often.
    """
    if window is None:
        default = DEFAULT_WINDOW if saves_memory else LOSSLESS_WINDOW
        return default if not isinstance(budget, int) else min(default, max(budget // 2, 1))
    check_count("window", window)
    if isinstance(budget, int) and window >= budget:
        raise ValueError(
            f"`window` is {window}, which leaves nothing of a budget of {budget} tokens; it must be "
            "smaller."
        )
    return window


def make_shared(
    scheduler: str | Scheduler | None,
    budget: int | float | None,
    compressor: str | Compressor | None,
    router: str | Router | None,
    placement: str | Placement | None,
    page_size: int,
    window: int | None,
    probe: bool,
) -> Shared:
    """The arguments of `PiKVCache`, checked and with names resolved."""
    scheduler = resolve("scheduler", scheduler, SCHEDULERS, Scheduler)
    compressor = resolve("compressor", compressor, COMPRESSORS, Compressor) or Identity()
    router = resolve("router", router, ROUTERS, Router)
    check_budget(budget, scheduler)
    if not isinstance(probe, bool):
        raise TypeError(f"`probe` is {probe!r}; it must be True or False.")
    if scheduler is not None and not compressor.is_idempotent:
        raise ValueError(
            f"`compressor` is {compressor}, whose pages cannot be encoded again when a scheduler "
            "drops tokens: use another compressor, or no scheduler."
        )
    selects = router is not None and not isinstance(router, All)
    if selects and isinstance(compressor, MixedCompressor):
        raise ValueError(
            f"`router` is {router}, which selects pages, but those of {compressor} are all read: use "
            "router='all', or another compressor."
        )
    tokens = scheduler.budget(0) if scheduler is not None and budget is None else budget
    shared = Shared(
        compressor=compressor,
        scheduler=scheduler,
        router=router,
        placement=resolve("placement", placement, PLACEMENTS, Placement) or Local(),
        page_size=check_count("page_size", page_size),
        window=0,
        budget=budget,
        probe=probe,
    )
    shared.window = default_window(window, tokens, shared.saves_memory)
    return shared
