"""Which tokens stay: one file per method."""

from .base import Scheduler, Tokens
from .streaming_llm import StreamingLLM

SCHEDULERS: dict[str, type[Scheduler]] = {"streaming_llm": StreamingLLM}

__all__ = ["SCHEDULERS", "Scheduler", "StreamingLLM", "Tokens"]
