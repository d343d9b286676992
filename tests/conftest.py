"""Shared by all tests: one thread, the options, and what the architecture sweep prints at its end."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

SWEEP = pytest.StashKey[dict[str, dict[str, str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-architectures",
        action="store_true",
        help="test every MoE architecture of transformers instead of the main families and a few",
    )


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    config.stash[SWEEP] = {}


@pytest.fixture
def sweep(pytestconfig: pytest.Config) -> dict[str, dict[str, str]]:
    """Notes to print after the run: heading -> architecture -> text."""
    return pytestconfig.stash[SWEEP]


@pytest.fixture
def poisoned() -> Iterator[None]:
    """`torch.empty` gives NaN, so that a read of uninitialized memory shows."""
    from zoo import poisoned_memory

    with poisoned_memory():
        yield


@pytest.fixture(scope="module")
def bundled() -> Any:
    """The model and the tokenizer that come with the package."""
    from pikv_hf.model import loading
    from pikv_hf.needles.haystack import NEEDLE_MODEL

    return loading.load(str(NEEDLE_MODEL))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands its notes to the process that prints."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["sweep"] = session.config.stash[SWEEP]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    for heading, notes in getattr(node, "workeroutput", {}).get("sweep", {}).items():
        node.config.stash[SWEEP].setdefault(heading, {}).update(notes)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    for heading, notes in config.stash[SWEEP].items():
        terminalreporter.section(f"{heading}: {len(notes)}")
        for name, text in sorted(notes.items()):
            terminalreporter.line(f"{name}: {text}")
