"""A cache that ranks share is made on all of them, or on none."""

import contextlib
import re
from collections.abc import Generator, Mapping
from typing import Any

import torch
import transformers

from ..placements.ranks import Ranks


@contextlib.contextmanager
def agreed(ranks: Ranks | None, model: Any, options: Mapping[str, Any]) -> Generator[None]:
    """Run the block, which makes the part of a rank, on all `ranks`, with equal `options`.

    Raises:
        ValueError: on all ranks, if the model or an option of one rank differs, or its block fails.
    """
    if ranks is None:
        yield
        return
    try:
        yield
    except (TypeError, ValueError) as error:
        with contextlib.suppress(ValueError):  # it is raised on the other ranks
            ranks.agree(f"error: {error}")
        raise
    given = ", ".join(f"{k}={_shown(v)}" for k, v in options.items() if v is not None)
    config = model.config.to_json_string(use_diff=True)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    ranks.agree(f"PiKVCache({type(model).__name__}, {given}) with {versions}", config)


def _shown(value: Any) -> str:
    """Return the text of an option, without addresses, which differ between processes."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
