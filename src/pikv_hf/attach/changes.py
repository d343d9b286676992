"""Changes to a module that can be undone, and that its copies and pickles do not contain."""

import weakref
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

_REDUCE = "__reduce_ex__"  # the method by which copy.deepcopy and pickle read an object
_ABSENT = object()


def is_changed(module: nn.Module) -> bool:
    """Return whether there are changes of `module` that have not been undone."""
    return isinstance(vars(module).get(_REDUCE), Changes)


class Changes:
    """Attributes and hooks that attaching has put on `module`, until `undo`.

    Until then this object is the module's `__reduce_ex__`: a copy or pickle of the module has its
    original attributes and none of the hooks.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._values: dict[str, Any] = {}
        self._before: dict[str, Any] = {}
        self._hooks: list[RemovableHandle] = []
        self.put(_REDUCE, self)

    def put(self, name: str, value: Any) -> None:
        """Set an attribute of the module."""
        state = vars(self._module())
        self._before[name] = state.get(name, _ABSENT)
        self._values[name] = state[name] = value

    def add(self, hook: RemovableHandle) -> None:
        """Add `hook`, which was registered on the module, to the changes."""
        self._hooks.append(hook)

    def undo(self) -> None:
        """Undo all changes, except attributes that somebody else has set since."""
        for hook in self._hooks:
            hook.remove()
        module = self._module()
        if module is not None:
            self._restore(vars(module))

    def __call__(self, protocol: Any) -> tuple[Any, ...]:
        """Return what `__reduce_ex__` of the unchanged module would return."""
        module: Any = self._module()
        make, arguments, state, *rest = type(module).__reduce_ex__(module, protocol)
        state = dict(state)
        self._restore(state)
        ours = {hook.id for hook in self._hooks}
        for name, value in state.items():
            if "hooks" in name and isinstance(value, dict):
                state[name] = type(value)((k, v) for k, v in value.items() if k not in ours)
        return make, arguments, state, *rest

    def _restore(self, state: dict[str, Any]) -> None:
        """Restore in `state` the attributes that nobody else has set since."""
        for name, value in self._values.items():
            if state.get(name) is not value:
                continue
            if self._before[name] is _ABSENT:
                del state[name]
            else:
                state[name] = self._before[name]
