"""Checks of the arguments of `PiKVCache`, and the settings made from them."""

import math
from dataclasses import replace
from typing import Any

from ..compressors import COMPRESSORS, Compressor, Identity
from ..layer.budget import ACCEPTED, Budget, make_budget
from ..layer.settings import Settings
from ..placements import PLACEMENTS, DeviceMap, Local, Placement, Sharding, Spread
from ..routers import ROUTERS, PageRouter, Router
from ..schedulers import SCHEDULERS, Scheduler
from ..validation import check_count, check_flag, check_whole, resolve

DEFAULT_WINDOW = 128
LOSSLESS_WINDOW = 512
# Pages that a query is assumed to read, where the router does not say it.
READ_PAGES = 64


def check_budget(given: Any, scheduler: Scheduler | None) -> Budget | None:
    """Return `given` as a budget for `scheduler`, or refuse it; None = the scheduler's own."""
    if given is None:
        if scheduler is not None and scheduler.budget(0) is None:
            raise ValueError(f"`scheduler` is {scheduler}, which needs a `budget`: {ACCEPTED}.")
        return None
    if scheduler is None:
        raise ValueError(f"`budget` is {given!r}, but there is no `scheduler` to keep to it.")
    if scheduler.traits.has_lengths:
        raise ValueError(
            f"`budget` is {given!r}, but the heads of {scheduler} have lengths of their own: leave it "
            "out."
        )
    budget = make_budget(given)
    if budget.is_in_bytes and scheduler.traits.exceeds_budget:
        raise ValueError(
            f"`budget` is {given!r}, but {scheduler} keeps some layers whole, whatever they take: "
            "give a number of tokens or a share of them."
        )
    return budget


def default_window(window: int | None, count: int | None, saves_memory: bool, sinks: int) -> int:
    """Return the number of newest tokens that are not sealed.

    They must fit into a budget of `count` tokens beside the sinks. If pages save no memory, the
    default is larger: a longer tail is read in one piece and sealed less often.
    """
    if window is None:
        default = DEFAULT_WINDOW if saves_memory else LOSSLESS_WINDOW
        return default if count is None else min(default, max(min(count // 2, count - sinks), 1))
    check_count("window", window)
    if count is not None and window >= count:
        raise ValueError(
            f"`window` is {window}, which leaves nothing of a budget of {count} tokens; it must be "
            "smaller."
        )
    return window


def best_page_size(config: Any, router: Router | None) -> int:
    """Return the page size that `page_size="auto"` stands for in a model with `config`.

    In a text of L tokens a query reads the digests of L / S pages, and the S tokens of each of K
    pages: on one device this is least at S = sqrt(L / K) (PiKV, arXiv 2508.06526). L is the longest
    text of the model, K the router's `top_pages`, or 64. The nearest power of two from 16 to 64 is
    used.
    """
    longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is None:
        raise ValueError(
            f"`page_size` is 'auto', but {type(config).__name__} has no `max_position_embeddings`: "
            "give a number of tokens."
        )
    pages = getattr(router, "top_pages", None) or READ_PAGES
    return 2 ** min(max(round(math.log2(longest / pages) / 2), 4), 6)


def check_placement(given: Any, process_group: Any, kv_device_map: Any) -> Placement:
    """Return the placement that the arguments of these names stand for."""
    placement = resolve("placement", given, PLACEMENTS, Placement)
    if kv_device_map is not None:
        if not (placement in (None, Local()) and process_group is None):
            raise ValueError(
                f"`kv_device_map` is given with `placement` {placement} or `process_group`, but each names "
                "the places of pages: give one of them."
            )
        return DeviceMap(kv_device_map=kv_device_map)
    if process_group is None:
        return placement or Local()
    placement = placement or Spread()
    if isinstance(placement, Sharding) and placement.process_group in (None, process_group):
        return replace(placement, process_group=process_group)
    raise ValueError(
        f"`process_group` is given, but `placement` is {placement}, which keeps pages in one process or has "
        "a group of its own: use 'spread', 'experts' or 'pikv_xor'."
    )


def make_settings(given: dict[str, Any], config: Any) -> Settings:
    """Return the arguments of `PiKVCache`, by name, as settings: checked, with names resolved.

    `config` is the config of the model.
    """
    scheduler = resolve("scheduler", given["scheduler"], SCHEDULERS, Scheduler)
    compressor = resolve("compressor", given["compressor"], COMPRESSORS, Compressor) or Identity()
    router = resolve("router", given["router"], ROUTERS, Router)
    budget = check_budget(given["budget"], scheduler)
    sinks, interval = given["sinks"], given["interval"]
    check_whole("sinks", sinks)
    check_flag("probe", given["probe"])
    check_flag("hold_prompt", given["hold_prompt"])
    if interval is not None:
        check_count("interval", interval)
    _check_together(scheduler, compressor)
    places = (given[name] for name in ("placement", "process_group", "kv_device_map"))
    placement = check_placement(*places)
    if placement.copies(1) is not None and not isinstance(router, PageRouter):
        raise ValueError(
            f"`placement` is {placement}, whose `residency` is for pages that a router selects, but "
            f"`router` is {router}: give a router such as 'quest', or no `residency`."
        )
    page_size = given["page_size"]
    if page_size == "auto":
        page_size = best_page_size(config, router)
    own = None if scheduler is None else scheduler.budget(0)
    count = own if budget is None else budget.min_count
    settings = Settings(
        compressor=compressor,
        scheduler=scheduler,
        router=router,
        placement=placement,
        page_size=check_count("page_size", page_size),
        window=0,
        has_given_window=given["window"] is not None,
        budget=budget,
        sinks=sinks,
        interval=interval,
        holds_prompts=given["hold_prompt"],
        probe=given["probe"],
    )
    window = default_window(given["window"], count, settings.saves_memory, settings.num_sinks)
    settings = replace(settings, window=window)
    if count is not None and settings.num_sinks + settings.window > count:
        what = f"`sinks` is {sinks}, which"
        if settings.num_sinks > sinks:
            what = f"`scheduler` is {scheduler}, whose number of sinks, {settings.num_sinks},"
        raise ValueError(
            f"{what} with a window of {settings.window} tokens exceeds a budget of {count} tokens; "
            "it must be smaller."
        )
    return settings


def _check_together(scheduler: Scheduler | None, compressor: Compressor) -> None:
    """Refuse methods that cannot be combined in one cache."""
    if scheduler is not None and not (compressor.is_per_token or compressor.is_idempotent):
        raise ValueError(
            f"`compressor` is {compressor}, whose pages cannot be encoded again when {scheduler} "
            "moves tokens: use another compressor, or no scheduler."
        )
