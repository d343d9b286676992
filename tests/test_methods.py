"""One method of every other stage, against a computation that knows nothing of pages."""

import pytest
import torch
from helpers import (
    PADDED,
    SMALL,
    assert_close,
    chunks,
    dynamic,
    forward,
    generate,
    page_contents,
    paged,
    rows_of,
    sealed,
    slabs_of,
    tail_labels,
    tail_length,
    tiny,
    two_layers,
)
from zoo import build, prompt

from pikv_hf import PiKVCache
from pikv_hf.model.versions import with_cache
from pikv_hf.schedulers import StreamingLLM
from pikv_hf.storage.memory import storage_bytes
from pikv_hf.storage.uniform_pages import Block, UniformPages

# ---- streaming_llm ------------------------------------------------------------------------------


def streaming(mask, seen, sinks, window):
    """Who stays, [B, seen] bool, when rows are cut down: the first `sinks`, the last `window`."""
    real = mask[:, :seen].bool()
    number = real.cumsum(-1)
    is_recent = number > number[:, -1:] - window
    return real & ((number <= sinks) | is_recent)


def kept(cache, mask):
    """Who is held, [layer, B, seen] bool, and that all heads hold the same."""
    out = []
    for layer in paged(cache):
        seen = torch.zeros(rows_of(layer), layer.state.num_seen, dtype=torch.int64)
        for row, start in enumerate(layer.state.starts):
            seen[row, start:] += mask[row, start:]
            at = torch.tensor(sealed(layer, row), dtype=torch.int64)
            seen[row].index_add_(0, at, torch.ones_like(at))
        assert seen.max() <= 1, "a token is held twice"
        out.append(seen.bool())
    return torch.stack(out)


STREAMS = {
    "exact": {"sinks": 3, "window": 11, "page_size": 1, "open": 4, "prefill": 26},
    "pages": {"sinks": 4, "window": 12, "page_size": 4, "open": 4, "prefill": 26},
    "window_is_open": {"sinks": 2, "window": 8, "page_size": 3, "open": 8, "prefill": 31},
    "no_sinks": {"sinks": 0, "window": 10, "page_size": 5, "open": 5, "prefill": 18},
    "short_prompt": {"sinks": 4, "window": 12, "page_size": 2, "open": 6, "prefill": 5},
    "many_sinks": {"sinks": 20, "window": 9, "page_size": 4, "open": 5, "prefill": 24},
}


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "olmoe"])
@pytest.mark.parametrize("lengths", [(48,), (48, 41, 30)], ids=["one_row", "left_padded"])
@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("case", STREAMS)
def test_streaming_llm(name, lengths, step, case) -> None:
    """Tokens and logits of a full cache under a mask that shows exactly the tokens that stay."""
    case = STREAMS[case]
    sinks, window, size, open_ = (case[k] for k in ("sinks", "window", "page_size", "open"))
    model = two_layers(name)
    inputs = prompt(model, lengths)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    method = StreamingLLM(sinks, window)
    cache = PiKVCache(model, scheduler=method, page_size=size, window=open_)
    reference = dynamic(model)
    stays, due = torch.ones(len(ids), 0, dtype=torch.bool), 0
    for start, end in chunks(48, case["prefill"], step):
        new = end - start
        visible = torch.cat([stays, mask[:, start:end].bool()], dim=1)
        causal = torch.arange(end) <= torch.arange(start, end)[:, None]
        shown = visible[:, None, None] & causal
        bias = torch.zeros(shown.shape).masked_fill_(~shown, torch.finfo(torch.float32).min)
        positions = (mask[:, :end].cumsum(-1) - 1).clamp(min=0)[:, start:]
        with torch.no_grad():
            expected = model(
                ids[:, start:end],
                attention_mask=bias,
                position_ids=positions,
                **with_cache(reference),
            ).logits
        actual = forward(model, ids[:, start:end], mask[:, :end], cache)
        real = mask[:, start:end].bool()
        assert_close(actual[real], expected[real])
        # Who was dropped before stays dropped: a late and long chunk cannot bring it back.
        stays = torch.cat([stays, mask[:, start:end].bool()], dim=1)
        if new > 1 or end >= due:  # rows are cut down after several tokens, then once a page
            stays &= streaming(mask, end, sinks, window)
            due = end + size
        assert torch.equal(kept(cache, mask[:, :end]), stays.expand(len(paged(cache)), -1, -1))
        assert cache.get_seq_length() == end
    assert not stays.all(), "nothing was dropped"


def test_streaming_llm_budget_given_to_the_cache() -> None:
    """`budget` overrides the method's own: sinks and the newest, together `budget` tokens."""
    model = tiny("mixtral")
    ids, mask = prompt(model, (60,))["input_ids"], torch.ones(1, 60, dtype=torch.int64)
    cache = PiKVCache(model, scheduler=StreamingLLM(3, 999), budget=20, page_size=1, window=5)
    for start, end in chunks(60, 40):
        forward(model, ids[:, start:end], mask[:, :end], cache)
        assert torch.equal(kept(cache, mask[:, :end])[0], streaming(mask, end, 3, 17))


@pytest.mark.parametrize("name, router", [("mixtral", None), ("deepseek_v3", "all")])
def test_constant_bytes(name, router) -> None:
    """1,200 tokens one by one: after the window is full the layers' bytes never change again."""
    model = build(name, num_hidden_layers=2)
    cache = PiKVCache(model, scheduler=StreamingLLM(4, 60), page_size=8, window=16, router=router)
    ids = torch.randint(3, 100, (1200, 1, 1), generator=torch.Generator().manual_seed(0))
    layer_bytes, totals = [], []
    with torch.no_grad():
        for token in ids:
            model(token, **with_cache(cache))
            layer_bytes.append(
                sum(storage_bytes([*layer.state.tensors()]) for layer in paged(cache))
            )
            totals.append(cache.nbytes)
    assert cache.get_seq_length() == 1200
    assert max(layer_bytes[200:700]) == max(layer_bytes[700:])
    assert max(layer_bytes) == max(layer_bytes[:200]) or max(layer_bytes[200:]) <= max(
        layer_bytes[:200]
    )
    ids_held = totals[-1] - layer_bytes[-1]
    assert ids_held <= 5 * 1200 + 1024, "more than the ids of the tokens grows with the text"
    held = max(row.tokens_held for row in cache.report().layers)
    assert held <= 64 + 8


# ---- labels -------------------------------------------------------------------------------------

GATED = [
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "jamba"),
    *("qwen3_next", "granitemoe", "glm4_moe", "phimoe", "dbrx", "llama4"),
]

BOUNDED = ("gpt_oss", "jamba", "qwen3_next", "llama4")  # with layers that cannot always be cropped


class Witness:
    """Records what the model's gates return, by hooks that know nothing of pikv_hf."""

    def __init__(self, model) -> None:
        self.calls: dict[int, list] = {}
        self.handles = []
        decoder = getattr(model, "model", None) or model.transformer
        for idx, block in enumerate(getattr(decoder, "layers", None) or decoder.blocks):
            gate = gate_of(block)
            if gate is not None:
                self.handles.append(gate.register_forward_hook(self._recorder(idx)))

    def _recorder(self, idx):
        def record(module, args, output):
            self.calls.setdefault(idx, []).append(output)

        return record

    def choice(self, idx, batch, top_k):
        """Experts and weights [B, T, k] of a block, over all forwards."""
        chosen = [read(output, top_k) for output in self.calls[idx]]
        parts = [[t.reshape(batch, -1, t.shape[-1]) for t in pair] for pair in chosen]
        return [torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)]


def gate_of(block):
    for name, module in block.named_modules():
        if name.rpartition(".")[2] in ("gate", "router") and name.count(".") <= 2:
            return module
    return None


def read(output, top_k):
    """What this family's gate says: (logits, weights, ids), (scores, logits) or logits alone."""
    if isinstance(output, tuple) and output[-1].dtype == torch.int64:
        return output[-1], output[-2]
    if isinstance(output, tuple):
        return output[0].topk(top_k, dim=-1)[::-1]
    weights, experts = output.softmax(-1).topk(top_k, dim=-1)
    return experts, weights / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    "name, mode",
    [(name, mode) for name in GATED for mode in ("steps", "padded")]
    + [(name, "drafts") for name in GATED if name not in BOUNDED],
)
def test_labels(name, mode) -> None:
    """Experts and weights of every held token, in pages and in the tail, are the gate's own."""
    model = build(name)
    inputs = prompt(model, PADDED if mode == "padded" else (30,))
    cache = PiKVCache(model, router="all", **SMALL)
    witness = Witness(model)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    batch = len(ids)
    columns: list[int] = []  # of the witness's tokens, those that are still in the text
    if mode == "drafts":
        cache.activate_past_recording()
    told = 0
    for start, end in chunks(30, 17, 3 if mode == "drafts" else 1):
        forward(model, ids[:, start:end], mask[:, :end], cache)
        columns += range(told, told + end - start)
        told += end - start
        if mode == "drafts":
            cache.crop(-2)
            del columns[-2:]
            forward(model, ids[:, end - 2 : end], mask[:, :end], cache)
            cache.crop(0)
            columns += range(told, told + 2)
            told += 2
    checked = 0
    for layer in paged(cache):
        if not layer.state.facts.has_gate:
            assert layer.state.layer_idx not in witness.calls
            continue
        experts, weights = witness.choice(
            layer.state.layer_idx, batch, tail_labels(layer)["experts"].shape[-1]
        )
        experts, weights = experts[:, columns], weights[:, columns]
        sealed_end = layer.state.num_seen - tail_length(layer)
        assert torch.equal(tail_labels(layer)["experts"][:, 0].long(), experts[:, sealed_end:])
        assert_close(tail_labels(layer)["weights"][:, 0], weights[:, sealed_end:])
        assert slabs_of(layer)
        for row, tokens in page_contents(layer):
            at = tokens["positions"][0].long()
            assert mask[row, at].all(), "padding was sealed"
            assert torch.equal(tokens["experts"][0].long(), experts[row, at])
            assert_close(tokens["weights"][0], weights[row, at])
            checked += len(at)
    assert checked


def test_labels_follow_what_a_scheduler_keeps() -> None:
    model = build("mixtral")
    inputs = prompt(model, (40, 33))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = PiKVCache(model, router="all", scheduler=StreamingLLM(3, 12), **SMALL)
    witness = Witness(model)
    for start, end in chunks(40, 25):
        forward(model, ids[:, start:end], mask[:, :end], cache)
    for layer in paged(cache):
        experts, weights = witness.choice(layer.state.layer_idx, 2, 2)
        for row, tokens in page_contents(layer):
            for head, at in enumerate(tokens["positions"].long()):
                own = [tokens[k].expand(2, -1, -1)[head] for k in ("experts", "weights")]
                assert torch.equal(own[0].long(), experts[row, at])
                assert torch.equal(own[1], weights[row, at])


def test_no_labels_without_a_router() -> None:
    model = build("mixtral")
    cache = PiKVCache(model, **SMALL)
    generate(model, prompt(model, PADDED), cache)
    assert all(tail_labels(layer) is None for layer in paged(cache))
    assert all("experts" not in slab.meta for layer in paged(cache) for slab in slabs_of(layer))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3", "jamba"])
def test_a_gate_that_never_fires_is_an_error(name) -> None:
    """As with kernels that compute the routing themselves: the block runs, its gate does not."""
    model = build(name)
    cache = PiKVCache(model, router="all", **SMALL)
    for owner in list(model.modules()):
        for key, part in list(owner.named_children()):
            if key in ("gate", "router", "experts"):
                setattr(owner, key, Bypassed(part))
    ids = prompt(model, (20,))["input_ids"]
    match = r"layer \d.*did not see the experts.*router=None"
    with pytest.raises(RuntimeError, match=match), torch.no_grad():
        model(ids, **with_cache(cache))
    with torch.no_grad():  # without labels the same model works
        plain = PiKVCache(model, **SMALL)
        assert_close(
            model(ids, **with_cache(plain)).logits,
            model(ids, **with_cache(dynamic(model))).logits,
        )


class Bypassed(torch.nn.Module):
    """Calls the `forward` of a module past its hooks."""

    def __init__(self, module) -> None:
        super().__init__()
        self.inner = module

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args, **kwargs):
        return self.inner.forward(*args, **kwargs)


def test_a_lost_page_is_seen(monkeypatch) -> None:
    """The comparison of logits fails when attention does not read the oldest page."""
    model = tiny("mixtral")
    inputs = prompt(model, (29,))
    expected = generate(model, inputs, dynamic(model))
    blocks = UniformPages.blocks

    def short(slab, *args):
        for fields, tokens, start in blocks(slab, *args):
            lost = 1 if tokens > 4 else 0
            pages = {name: pages[:, :, lost:] for name, pages in fields.items()}
            yield Block(pages, tokens - 4 * lost, start)

    monkeypatch.setattr(UniformPages, "blocks", short)
    with pytest.raises(AssertionError, match="differs by|assert"):
        assert_close(generate(model, inputs, PiKVCache(model, **SMALL)).logits, expected.logits)


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("lengths", [(29,), PADDED], ids=["one_row", "left_padded"])
def test_a_budget_that_the_window_fills(lengths, sinks) -> None:
    """The sinks stay beside the window, and without sinks no empty page is made."""
    model = tiny("mixtral")
    scheduler = StreamingLLM(sinks=sinks)
    cache = PiKVCache(model, scheduler=scheduler, budget=0.01, page_size=4, window=8)
    generate(model, prompt(model, lengths), cache)
    for layer in paged(cache):
        kept = [slab.length for slab in slabs_of(layer)]
        assert set(kept) <= {sinks} and bool(kept) == bool(sinks)
