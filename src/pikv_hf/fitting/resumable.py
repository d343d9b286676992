"""Runs that can be interrupted: their state in the file that they then leave."""

import contextlib
import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..model.artifact import METADATA, FileKind, ModelIdentity, read_factors, read_metadata

SAVE_EVERY_S = 300.0


class Resumable(ABC):
    """The state of a run that writes the file `out` of a `kind` at its end.

    It begins with what an interrupted run has left in `out` + ".partial", if that is there. `job`
    is a dataclass of arguments; `source` identifies the texts.

    Raises:
        ValueError: a run with other arguments has left the partial file.
    """

    def __init__(
        self, kind: FileKind, model: PreTrainedModel, out: Path, job: Any, source: str
    ) -> None:
        self.kind, self.out, self.path = kind, out, out.with_name(out.name + ".partial")
        identity = asdict(ModelIdentity.of(model))
        self.arguments = {"model": identity, "job": asdict(job), "source": source}
        self._saved_at = time.monotonic()
        if self.path.exists():
            found, expected = read_metadata(self.path, kind), json.loads(json.dumps(self.arguments))
            if any(found[name] != expected[name] for name in expected):
                raise ValueError(
                    f"`{self.path}` was left by a {kind.argument} of another model, other texts or "
                    "other options: delete it, or write to another file."
                )
            self.restore(read_factors(self.path, ""), found)

    @abstractmethod
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors and the metadata that a partial file holds beside the arguments."""

    @abstractmethod
    def restore(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Take over a state from the tensors and the metadata of a partial file."""

    def save_sometimes(self) -> None:
        if time.monotonic() - self._saved_at > SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        tensors, metadata = self.state()
        write(self.path, tensors, self.arguments | metadata, self.kind.key)
        self._saved_at = time.monotonic()

    @contextlib.contextmanager
    def saved_if_interrupted(self) -> Generator[None]:
        """Save the state if the block raises, unless resuming would fail again."""
        try:
            yield
        except ValueError:
            raise
        except BaseException:
            self.save()
            raise

    def finish(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Write the file of the completed run, and remove the partial one."""
        write(self.out, tensors, self.arguments | metadata, self.kind.key)
        self.path.unlink(missing_ok=True)


def write(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any], key: str = METADATA
) -> None:
    """Write a safetensors file to `path` atomically, with `metadata` as JSON under `key`."""
    unfinished = path.with_name(path.name + ".unfinished")
    save_file(tensors, unfinished, {key: json.dumps(metadata)})
    os.replace(unfinished, path)
