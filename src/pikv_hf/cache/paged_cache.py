"""The data of a cache: its parts and its layers."""

from typing import Any

from transformers import Cache, DynamicCache, PreTrainedModel

from ..attach.contract import AttachableCache
from ..layer.columns import Columns
from ..layer.paged_layer import PagedLayer
from ..layer.reading import Reading
from ..layer.settings import Settings
from ..layer.state import CacheParts, LayerFacts, LayerState
from ..layer.step import Step
from ..model.versions import CacheLayerMixin
from ..placements.site import NO_SITE, Site
from .finite_flags import FiniteFlags
from .held_elsewhere import HeldElsewhere
from .token_log import TokenLog, num_kept_ids


class PagedCache(Cache, AttachableCache):
    """A cache with paged layers beside layers of transformers, and the parts that they share.

    Attributes:
        settings: the methods and numbers of the cache.
        step: the forward pass that runs, or has failed half-way.
        reading: which part of the text is the prompt.
        columns: which columns of the sequence are tokens, and which are padding.
        elsewhere: all layers, so that a paged layer can ask about the others.
        log: the token ids that the cache has seen.
        finite: whether sealed keys and values are finite, as an accelerator tells later.
        config: the config of its model.
        stage: the layers that this rank runs, if others run the rest; None = all.
        note: why the model no longer uses the cache; None if it does.
    """

    config: Any
    layers: list[Any]  # PagedLayer, and any layer class of transformers
    stage: range | None = None
    note: str | None = None
    # The cache class that the model insists on (MiniMax), mixed in as a second base; else None.
    native_class: type[DynamicCache] | None = None
    # Where the model runs, if pages are dealt to places.
    site: Site = NO_SITE

    def make_parts(self, settings: Settings) -> None:
        """Make the parts of a cache without layers and tokens."""
        self.settings, self.step, self.reading = settings, Step(), Reading()
        self.columns, self.elsewhere = Columns(), HeldElsewhere()
        self.log = TokenLog(num_kept_ids(settings))
        self.finite = FiniteFlags()

    def paged_layer(self, facts: LayerFacts) -> PagedLayer:
        """Return a new paged layer of this cache."""
        parts = (self.settings, self.step, self.reading, self.columns, self.elsewhere, self.site)
        state = LayerState(facts, self.config, CacheParts(*parts))
        self.elsewhere.paged.append(state)
        return PagedLayer(state)

    def start(self, layers: list[Any]) -> None:
        """Initialise the base classes with `layers`.

        With a model's own cache class, layers are added only when they are first written to.
        """
        self._unwritten: list[Any] = []
        # Before 5.23 a block of nemotron_h without attention has a layer for states, always empty.
        types = getattr(self.config.get_text_config(decoder=True), "layer_types", None) or ()
        empty = {idx for idx, layer_type in enumerate(types) if layer_type in ("moe", "mlp")}
        paged = {state.layer_idx for state in self.states}
        others = [x for i, x in enumerate(layers) if i not in empty | paged and self.runs(i)]
        native: Any = self.native_class
        if native is not None:
            native.__init__(self)
            layers, self._unwritten = [], layers
        Cache.__init__(self, layers=layers)
        ours = {id(self.layers), id(self._unwritten)}
        others += [v for v in vars(self).values() if isinstance(v, list) and id(v) not in ours]
        self.elsewhere.others = others

    def runs(self, layer_idx: int) -> bool:
        """Return whether this rank runs the layer."""
        return self.stage is None or layer_idx in self.stage

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens ever seen; of a layer of this rank if another runs the layer."""
        return super().get_seq_length(self._like(layer_idx))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the length and offset of the mask of a layer, or of one like it on this rank."""
        return super().get_mask_sizes(query_length, self._like(layer_idx))

    def _like(self, layer_idx: int) -> int:
        """Return the index of a layer on this rank that has the same lengths.

        Every rank of a pipeline makes positions and masks, and asks the first layers of the model.
        """
        if self.stage is None or layer_idx in self.stage:
            return layer_idx
        is_sliding = getattr(self.layers[layer_idx], "is_sliding", False)
        layers = [(i, self.layers[i]) for i in self.stage]
        sized = [(i, layer) for i, layer in layers if isinstance(layer, CacheLayerMixin)]
        alike = [i for i, layer in sized if layer.is_sliding == is_sliding]
        return next(iter(alike or [i for i, _ in sized]), layer_idx)

    def layer_at(self, layer_idx: int) -> Any:
        """Return the layer that is written to next; add it first if `start` has not."""
        while len(self.layers) <= layer_idx and self._unwritten:
            self.layers.append(self._unwritten.pop(0))
        return self.layers[layer_idx]

    def stand_in(self, layers: list[Any], log: TokenLog) -> None:
        """Use other `layers` and another `log`, as while the model repeats the text."""
        self.layers, self.log = layers, log

    @property
    def model(self) -> PreTrainedModel | None:
        """The model that this cache is attached to."""
        return None if self.binding is None else self.binding.model()

    @property
    def layers_to_be(self) -> list[Any]:
        """All layers, including layers that are added when they are first written to."""
        return self.layers + self._unwritten

    @property
    def states(self) -> list[LayerState]:
        """The states of all `PagedLayer` objects, also of layers that turned out to be unpaged."""
        return self.elsewhere.paged

    @property
    def unpaged(self) -> dict[int, str]:
        """Reasons, by layer, why it is not paged: from the start, or since its first tokens."""
        late = {s.layer_idx: s.unpaged_reason for s in self.states if s.unpaged_reason is not None}
        return self.unpaged_from_start | late

    unpaged_from_start: dict[int, str]

    @property
    def is_paged(self) -> bool:
        """True if the attention of some layer reads pages."""
        return any(state.unpaged_reason is None for state in self.states)

    @property
    def rows(self) -> int | None:
        """Batch rows that the cache holds; None if no paged layer has tokens."""
        return next((state.tail.batch for state in self.states if state.is_written), None)

    @property
    def starts(self) -> tuple[int, ...]:
        """The first column of each row that has not left its tail; () if no layer has pages."""
        paged = (state for state in self.states if state.unpaged_reason is None)
        return next((state.starts for state in paged if state.is_written), ())

    @property
    def prompt_end(self) -> int:
        """Tokens up to the end of the newest prompt; 0 if no paged layer has tokens."""
        return next((state.prompt_end for state in self.states if state.is_written), 0)

    @property
    def is_drafting(self) -> bool:
        """True if drafted tokens are being verified, which may be removed again."""
        return any(getattr(layer, "record_past", False) for layer in self.layers)
