"""Parser of the text of `--cache`, whose names and values are arguments of `PiKVCache`."""

import ast
import re
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from ..compressors import COMPRESSORS, Compressor
from ..placements import PLACEMENTS, Placement
from ..routers import ROUTERS, Router
from ..schedulers import SCHEDULERS, Scheduler
from ..validation import hint, resolve
from .arguments import check_budget
from .pikv_cache import PiKVCache

METHODS: dict[str, tuple[dict[str, Any], type]] = {
    "scheduler": (SCHEDULERS, Scheduler),
    "compressor": (COMPRESSORS, Compressor),
    "router": (ROUTERS, Router),
    "placement": (PLACEMENTS, Placement),
}
NUMBERS = ("budget", "page_size", "window", "sinks", "interval", "hold_prompt")
DYNAMIC, LOSSLESS = "dynamic", "lossless"
WORDS = {"true": True, "false": False, "none": None}


@dataclass(frozen=True)
class CacheOption:
    """A cache as a user types it: arguments of PiKVCache, or None for transformers' own cache."""

    text: str
    arguments: dict[str, Any] | None

    @property
    def name(self) -> str:
        if self.arguments is None:
            return "DynamicCache"
        return f"PiKVCache({', '.join(f'{name}={value}' for name, value in self._parts())})"

    @property
    def label(self) -> str:
        """Short name, for tables and pictures."""
        if self.arguments is None:
            return "DynamicCache"
        words = [value if name in METHODS else f"{name}={value}" for name, value in self._parts()]
        return ", ".join(words) or "PiKVCache, lossless"

    def make(self, model: PreTrainedModel) -> PiKVCache | None:
        """Return a new cache attached to `model`; None leaves the choice to `generate`."""
        return None if self.arguments is None else PiKVCache(model, **self.arguments)

    def probed(self) -> "CacheOption":
        """Return this option with `probe=True`; transformers' own cache stays as it is."""
        if self.arguments is None:
            return self
        return replace(self, arguments=self.arguments | {"probe": True})

    def _parts(self) -> list[tuple[str, str]]:
        """Return names and values as they were typed."""
        return [(str(pair.arg), ast.unparse(pair.value)) for pair in _call(self.text).keywords]


def parse_cache(text: str) -> CacheOption:
    """Parse a text such as `scheduler=streaming_llm(sinks=8),budget=0.25`, `lossless` or `dynamic`.

    Raises:
        ValueError: one sentence says what is wrong with `text`. No model is needed for that.
    """
    text = text.strip()
    if text == DYNAMIC:
        return CacheOption(text, None)
    body = "" if text == LOSSLESS else text
    call = _call(body)
    arguments = {str(pair.arg): _value(str(pair.arg), pair.value) for pair in call.keywords}
    scheduler = arguments.get("scheduler")
    if scheduler is not None and "budget" not in arguments and scheduler.budget(0) is None:
        raise ValueError(
            f"{text!r} needs a budget: add budget=25% (a share), budget=512 (tokens) or budget=2GiB."
        )
    check_budget(arguments.get("budget"), scheduler)
    if scheduler is not None and scheduler.needs.repetition is not None:
        arguments.setdefault("hold_prompt", True)  # a scheduler that repeats refuses other prompts
    return CacheOption(body, arguments)


def _call(text: str) -> ast.Call:
    """Parse `text` as keyword arguments of a call; `keydiff` alone is `scheduler=keydiff`."""
    try:
        call = ast.parse(f"f({_as_python(text)})", mode="eval").body
    except SyntaxError:
        call = None
    if isinstance(call, ast.Call) and not any(isinstance(node, ast.Starred) for node in call.args):
        named = [ast.keyword(_kind_of(node), node) for node in call.args]
        names = [pair.arg for pair in (*named, *call.keywords)]
        if None not in names and len(set(names)) == len(names):
            return ast.Call(call.func, [], [*named, *call.keywords])
    raise ValueError(
        f"{text!r} is not name=value[,name=value...], such as 'scheduler=keydiff,budget=25%', nor "
        f"{LOSSLESS!r} or {DYNAMIC!r}."
    )


def _as_python(text: str) -> str:
    """Rewrite 25% in `text` as 0.25, and put 2GiB in quotes."""
    parts = re.split(r"('[^']*'|\"[^\"]*\")", text)
    for number, part in enumerate(parts):
        if number % 2 == 0:  # outside of quotes
            part = re.sub(r"\b(\d+(?:\.\d+)?)\s*%", lambda m: repr(float(m[1]) / 100), part)
            parts[number] = re.sub(
                r"\b(\d+(?:\.\d+)?\s*[KMGT]?i?B)\b", r"'\1'", part, flags=re.IGNORECASE
            )
    return "".join(parts)


def _kind_of(node: ast.expr) -> str:
    """Return the argument that takes a method: `scheduler` for `keydiff` and `KeyDiff()`."""
    text = ast.unparse(node.func if isinstance(node, ast.Call) else node)
    for kind, (registry, _) in METHODS.items():
        if _known(text, registry) in registry:
            return kind
    names = [name for registry, _ in METHODS.values() for name in registry]
    raise ValueError(
        f"{text!r} is no method, nor name=value.{hint(text, [*names, DYNAMIC, LOSSLESS])}"
    )


def _known(name: str, registry: dict[str, type]) -> str:
    """Return `name`, or the registered name of the method whose class is called `name`."""
    return next((key for key, method in registry.items() if method.__name__ == name), name)


def _value(name: str, node: ast.expr) -> Any:
    if name in NUMBERS:
        return _literal(name, node)
    if name not in METHODS:
        names = [*METHODS, *NUMBERS]
        raise ValueError(f"{name!r} is no option of a cache; it has {names}.{hint(name, names)}")
    try:
        return _method(name, node)
    except TypeError as error:  # an argument that the method does not have
        reason = str(error).rstrip(".")
        raise ValueError(f"`{name}` is {ast.unparse(node)}: {reason}.") from error


def _method(name: str, node: ast.expr) -> Any:
    """Make the method that `node` names, or calls with literals and other methods of its kind."""
    registry, base = METHODS[name]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        method = type(resolve(name, _known(node.func.id, registry), registry, base))
        keywords = {str(pair.arg): _argument(name, pair.value) for pair in node.keywords}
        return method(*(_argument(name, part) for part in node.args), **keywords)
    is_name = isinstance(node, ast.Name) and node.id.lower() not in WORDS
    value = _known(node.id, registry) if is_name else _literal(name, node)
    return resolve(name, value, registry, base)


def _argument(name: str, node: ast.expr) -> Any:
    if isinstance(node, ast.Call) or (isinstance(node, ast.Name) and node.id.lower() not in WORDS):
        return _method(name, node)
    if isinstance(node, ast.Tuple):
        return tuple(_argument(name, part) for part in node.elts)
    return _literal(name, node)


def _literal(name: str, node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id.lower() in WORDS:
        return WORDS[node.id.lower()]
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"`{name}` is {ast.unparse(node)}, which is not a plain value.") from None
