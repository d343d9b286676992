"""Methods that need all heads or all layers are refused where a rank has some of them."""

import pytest
from cases import JOBS, Job

OTHER_HEADS = (
    "whose result for a KV head depends on the other heads or on its number, but the attention heads "
    "of the model are divided over 2 ranks: use a method whose KV heads choose independently"
)
QUERIES = "which may read queries, but the attention heads of the model are divided over 2 ranks"
OTHER_LAYERS = (
    "whose choice in a layer depends on other layers, but the layers of the model are divided over 2 "
    "ranks: use a method that chooses in each layer alone."
)
HEADS_AT_ONCE = {
    *("scheduler_tova", "scheduler_adakv", "scheduler_fastv", "scheduler_random"),
    *("scheduler_chunkkv", "scheduler_criticalkv", "scheduler_pikv_layer_sum"),
    *("scheduler_pikv_adakv", "scheduler_adakv_of_keydiff", "scheduler_pyramidkv_of_tova"),
    *("compressor_pyramid", "compressor_pikv"),
    *("router_random", "router_balanced", "router_cache_aware", "router_pikv"),
}
QUERY_READERS = {
    *("scheduler_h2o", "scheduler_snapkv", "scheduler_pyramidkv", "scheduler_kvzip"),
    *("scheduler_expected_attention", "scheduler_lru", "scheduler_lru_plus", "compressor_think"),
    *("router_hash", "router_round_robin", "router_quest", "router_topk", "router_entropy"),
    *("router_adaptive", "router_hierarchical", "router_clusters", "router_oracle"),
}
LAYERS_AT_ONCE = {
    *("scheduler_fastv", "scheduler_pikv_layer_sum", "scheduler_pyramidkv", "scheduler_kvzip"),
    *("scheduler_pyramidkv_of_tova", "router_topk", "router_balanced", "router_cache_aware"),
    *("router_pikv", "router_entropy"),
}
EXPECTED = {
    "tp": {**dict.fromkeys(HEADS_AT_ONCE, OTHER_HEADS)},
    "pp": {**dict.fromkeys(LAYERS_AT_ONCE, OTHER_LAYERS)},
    "tp_of_latents": {
        **dict.fromkeys(HEADS_AT_ONCE, OTHER_HEADS),
        **dict.fromkeys(QUERY_READERS, QUERIES),
    },
}
METHODS = [job for job in JOBS if job.case.startswith(("scheduler_", "compressor_", "router_"))]


@pytest.mark.parametrize("job", METHODS, ids=str)
def test_only_methods_that_would_differ_are_refused(job: Job, returned):
    expected = EXPECTED[job.loading].get(job.case)
    for found in returned(job):
        if expected is None:
            assert "refused" not in found
        else:
            assert found["refused"].startswith(f"`{job.case.split('_')[0]}` is ")
            assert expected in found["refused"]
