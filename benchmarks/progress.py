"""What a long benchmark has measured so far, kept in a file until it is published."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

from common import ROOT, environment, git


class Progress:
    """Named results; only a run of the same code, software and settings takes them up again."""

    def __init__(self, name: str, *settings: object) -> None:
        code = [git(*command) for command in (("rev-parse", "HEAD"), ("status", "-s"), ("diff",))]
        software = [environment()[part] for part in ("python", "torch", "transformers")]
        key = hashlib.sha256(repr((code, software, settings)).encode()).hexdigest()[:12]
        self.path = ROOT / "build" / f"{name}-{key}.json"
        self.results = json.loads(self.path.read_text()) if self.path.exists() else {}

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """What `measure` returned, now or in the run that was interrupted: ready for JSON."""
        if name not in self.results:
            self.results[name] = measure()
            self.path.parent.mkdir(exist_ok=True)
            self.path.write_text(json.dumps(self.results))
        return self.results[name]

    def done(self) -> None:
        self.path.unlink(missing_ok=True)
