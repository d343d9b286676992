from dataclasses import dataclass, field, replace

from torch import Tensor

from ..validation import check_count, check_number
from .attention_mass import attention_mass
from .base import Candidates, Needs, RowState, Scheduler, Traits
from .snapkv import SnapKV
from .top_tokens import best_of_each_head
from .wrapper import Wrapper


@dataclass(frozen=True)
class PiKVAdaKV(Wrapper, RowState):
    """Keeps as much of the budget as attention needs (PiKV's "AdaKV", arXiv 2508.06526).

    A controller for each row and layer moves theta, the share of the budget that is used, which is
    1 at first: theta <- theta + rate * (target - recall). The recall is the share of the newest
    queries' attention that kept tokens get. The method of the Ada-KV paper is `adakv`.

    Args:
        scorer: scheduler whose scores choose the tokens to keep.
        target: recall to reach, in (0, 1).
        rate: step of the controller, in (0, 1].
        window_size: newest tokens whose queries measure the recall.
    """

    scorer: Scheduler = field(default_factory=SnapKV)
    target: float = 0.95
    rate: float = 0.1
    window_size: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scorer.traits.is_ragged:
            raise ValueError(
                f"`scorer` is {self.scorer!r}; it must be one whose heads keep equally many tokens."
            )
        check_number("target", self.target, "(0, 0.999]")
        check_number("rate", self.rate, "(0, 1]")
        check_count("window_size", self.window_size)

    @property
    def needs(self) -> Needs:
        return super().needs | Needs(queries=self.window_size, row_state=self)

    @property
    def traits(self) -> Traits:  # rows keep different numbers of tokens
        return replace(super().traits, is_ragged=True, decides_by_scores=False)

    def keep(self, tokens: Candidates, budget: int) -> Tensor:
        assert tokens.row_state is not None, "it is among the needs"
        scored = tokens.with_newest_queries(self.scorer.needs.queries)
        ranked = self.ranked(scored, budget)
        theta = 1 - tokens.row_state  # the row state is zero at first
        counts = (theta * budget).ceil().long().clamp(1, budget).expand(ranked.shape[:2])
        if tokens.valid is not None:
            counts = counts.minimum(tokens.valid.sum(-1))
        return best_of_each_head(self.reranked(scored, ranked, counts), counts)

    def next_row_state(self, tokens: Candidates, keep: Tensor) -> Tensor:
        assert tokens.row_state is not None, "it is among the needs"
        mass = attention_mass(tokens.with_newest_queries(self.window_size)).mean(2)
        kept = mass.gather(2, keep.clamp_min(0)).masked_fill(keep < 0, 0.0).sum(-1)
        recall = 1 - (mass.sum(-1) - kept).mean(1, keepdim=True)
        return (tokens.row_state - self.rate * (self.target - recall)).clamp(0, 1)
