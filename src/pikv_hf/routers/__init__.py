"""Routers, which select the pages that a query reads: one file per method."""

from .all import All
from .base import Router

ROUTERS: dict[str, type[Router]] = {"all": All}

__all__ = ["ROUTERS", "All", "Router"]
