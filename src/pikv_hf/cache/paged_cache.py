"""The data of a cache: its parts, its layers, and what they say together."""

from typing import Any

from transformers import Cache, DynamicCache, PreTrainedModel

from ..attach.contract import AttachableCache
from ..layer.padding import Padding
from ..layer.paged_layer import PagedLayer
from ..layer.reading import Reading
from ..layer.settings import Settings
from ..layer.state import CacheParts, LayerFacts, LayerState
from ..layer.step import Step
from .held_elsewhere import HeldElsewhere
from .token_log import TokenLog, num_kept_ids


class PagedCache(Cache, AttachableCache):
    """A cache with paged layers among those of transformers, and what they have in common.

    Attributes:
        settings: its methods and numbers.
        step: what is being done to it, or has failed.
        reading: what of the text is prompt.
        padding: columns that were hidden when they left the tail.
        elsewhere: the layers, as each of the paged ones sees the others.
        log: the token ids that it has seen.
        config: the config of its model.
        note: why it is not used any more.
    """

    config: Any
    layers: list[Any]  # ours and every kind of transformers'
    note: str | None = None
    # Set where the model insists on a cache class of its own (MiniMax), which is then mixed in.
    native_class: type[DynamicCache] | None = None

    def make_parts(self, settings: Settings) -> None:
        """Start with no layers and no tokens."""
        self.settings, self.step, self.reading = settings, Step(), Reading()
        self.padding, self.elsewhere = Padding(), HeldElsewhere()
        self.log = TokenLog(num_kept_ids(settings))

    def paged_layer(self, facts: LayerFacts) -> PagedLayer:
        """A new layer of this cache."""
        parts = (self.settings, self.step, self.reading, self.padding, self.elsewhere)
        state = LayerState(facts, self.config, CacheParts(*parts))
        self.elsewhere.add(state)
        return PagedLayer(state)

    def start(self, layers: list[Any]) -> None:
        """Initialise the base classes, with these layers.

        A model's own cache class expects layers to appear as they are first written.
        """
        self._unwritten: list[Any] = []
        # Before 5.23 a block of nemotron_h without attention has a layer for states, always empty.
        types = getattr(self.config.get_text_config(decoder=True), "layer_types", None) or ()
        empty = {idx for idx, layer_type in enumerate(types) if layer_type in ("moe", "mlp")}
        unpaged = (idx for idx, layer in enumerate(layers) if not isinstance(layer, PagedLayer))
        others = [layers[idx] for idx in unpaged if idx not in empty]
        native: Any = self.native_class
        if native is not None:
            native.__init__(self)
            layers, self._unwritten = [], layers
        Cache.__init__(self, layers=layers)
        ours = {id(self.layers), id(self._unwritten)}
        others += [v for v in vars(self).values() if isinstance(v, list) and id(v) not in ours]
        self.elsewhere.set_others(others)

    def layer_at(self, layer_idx: int) -> Any:
        """The layer that is written to next, made to appear if the model's own class wants that."""
        while len(self.layers) <= layer_idx and self._unwritten:
            self.layers.append(self._unwritten.pop(0))
        return self.layers[layer_idx]

    def stand_in(self, layers: list[Any], log: TokenLog) -> None:
        """Use other layers, and another log, for a repetition that is taken back."""
        self.layers, self.log = layers, log

    @property
    def model(self) -> PreTrainedModel | None:
        """The model that this cache is attached to."""
        return None if self.binding is None else self.binding.model()

    @property
    def layers_to_be(self) -> list[Any]:
        """All layers, those that a model's own cache class has not yet got included."""
        return self.layers + self._unwritten

    @property
    def paged_layers(self) -> list[PagedLayer]:
        """The layers of ours, those that turned out not to be ours to read included."""
        return [layer for layer in self.layers_to_be if isinstance(layer, PagedLayer)]

    @property
    def paged_indices(self) -> list[int]:
        """The numbers of `paged_layers` among all layers."""
        return [state.layer_idx for state in self.states]

    @property
    def states(self) -> list[LayerState]:
        """The states of `paged_layers`."""
        return [layer.state for layer in self.paged_layers]

    @property
    def unpaged(self) -> dict[int, str]:
        """Why layers are not paged: from the start, or since their first tokens."""
        late = {s.layer_idx: s.unpaged_reason for s in self.states if s.unpaged_reason is not None}
        return self.unpaged_from_start | late

    unpaged_from_start: dict[int, str]

    @property
    def is_paged(self) -> bool:
        """Whether the attention of some layer reads pages."""
        return any(state.unpaged_reason is None for state in self.states)

    @property
    def rows(self) -> int | None:
        """Batch rows that the cache holds, as far as its paged layers tell."""
        return next((state.tail.batch for state in self.states if state.is_written), None)

    @property
    def prompt_end(self) -> int:
        """Tokens up to the end of the newest prompt, as far as paged layers tell; 0 = unknown."""
        return next((state.prompt_end for state in self.states if state.is_written), 0)

    @property
    def is_drafting(self) -> bool:
        """Whether drafted tokens are being verified, which may be taken back."""
        return any(getattr(layer, "record_past", False) for layer in self.layers)
