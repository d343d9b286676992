"""Keys that are moved to other positions are those that the model makes there."""

import copy
import pickle

import pytest
import torch
import transformers
from helpers import tiny
from packaging.version import Version
from test_architectures import chosen
from tolerances import FLOAT32, SHIFTED, SUMS
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from zoo import build

from pikv_hf.attach.binding import _innermost
from pikv_hf.model.latent import LatentQuery
from pikv_hf.model.modules import attention_modules
from pikv_hf.model.rotary import Rotary, rotaries
from pikv_hf.model.versions import cache_in

TOKENS, SHIFT = 24, 77
# A head of Mistral 4 is longer than its rotary part, on which the zoo's tiny heads are modelled.
FIELDS = {"mistral4": {"head_dim": 24}}
# Their full-attention layers do not see positions, or the whole model has no rotary embedding.
WITHOUT = {
    *("afmoe", "beam", "cohere2_moe", "exaone_moe", "flint", "kolibri1"),
    *("granitemoehybrid", "jamba", "kimi_linear", "nemotron_h"),
}
# Their first tokens see other things when all positions are greater: blocks, a temperature.
NOT_RELATIVE = {"minimax_m3_vl", "beam"}
# Half and partial, interleaved, latents (permuted and complex), ordered by axis.
LAYOUTS = ("mixtral", "glm4_moe", "ernie4_5_moe", "deepseek_v3", "deepseek_v2", "ernie4_5_vl_moe")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", chosen(metafunc.config))


def decoder_of(model):
    """The text decoder of a model and its pageable attention modules."""
    attention = attention_modules(model)
    paged = [module for modules in attention.values() for module in modules]
    return (_innermost(model, paged) if paged else None), attention


@torch.no_grad()
def keys_of(decoder, attention, ids: Tensor, positions: Tensor) -> dict[int, Tensor]:
    """Keys [1, H, T, D] that the decoder caches for tokens at `positions` [T]; latents whole."""
    embeds = decoder.get_input_embeddings()(ids[None])
    out = decoder(inputs_embeds=embeds, position_ids=positions[None], use_cache=True)
    keys = {}
    for idx, (module, *_) in attention.items():
        layer = cache_in(out).layers[idx]
        latent = hasattr(module, "kv_b_proj") and layer.keys.shape[1] == 1
        keys[idx] = torch.cat([layer.keys, layer.values], -1) if latent else layer.keys
    return keys


def some_ids(count: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 100, (count,), generator=torch.Generator().manual_seed(seed))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"differs by {error:.1e}"


def test_keys_of_every_architecture(name) -> None:
    """All tokens later by the same number: the same hidden states, so the same keys, turned."""
    if name == "doge" and Version(transformers.__version__) < Version("5.18"):
        pytest.skip("doge runs since transformers 5.18: before, its MoE gives a tuple to dropout")
    model = build(name, **FIELDS.get(name, {}))
    decoder, attention = decoder_of(model)
    if decoder is None:
        pytest.skip("no layer can be paged")
    if model.config.is_encoder_decoder:
        with pytest.raises(ValueError, match="encoder-decoder"):
            rotaries(decoder, attention)
        return
    positions = torch.arange(TOKENS)
    before = keys_of(decoder, attention, some_ids(TOKENS), positions)
    found = rotaries(decoder, attention)
    assert found.keys() == attention.keys()
    assert all(rotary.is_identity for rotary in found.values()) == (name in WITHOUT)
    if name in NOT_RELATIVE:
        return
    after = keys_of(decoder, attention, some_ids(TOKENS), positions + SHIFT)
    for idx, rotary in found.items():
        assert_close(rotary.rotate(before[idx], positions, positions + SHIFT), after[idx], SHIFTED)
        assert torch.equal(rotary.rotate(before[idx], positions, positions), before[idx])


@pytest.mark.parametrize("layout", [*LAYOUTS, "qwen3_vl_moe", "minimax_m3_vl"])
def test_keys_behind_other_tokens(layout) -> None:
    """Keys of a first layer depend on nothing but token and position: exact to rounding."""
    decoder, attention = decoder_of(tiny(layout))
    attention = {0: attention[0]}
    rotary = rotaries(decoder, attention)[0]
    ids, everywhere = some_ids(TOKENS), torch.arange(SHIFT + TOKENS)
    behind = torch.cat([some_ids(SHIFT, seed=1), ids])
    before = keys_of(decoder, attention, ids, everywhere[:TOKENS])[0]
    after = keys_of(decoder, attention, behind, everywhere)[0][:, :, SHIFT:]
    assert_close(rotary.rotate(before, everywhere[:TOKENS], everywhere[SHIFT:]), after, FLOAT32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keys_far_away(layout) -> None:
    """At any positions, each token at its own, in either direction; and without a position."""
    decoder, attention = decoder_of(tiny(layout))
    rotary = rotaries(decoder, attention)[0]
    draw = torch.Generator().manual_seed(1)
    source, target = (torch.randint(0, 100_000, (TOKENS,), generator=draw) for _ in range(2))
    before, after = (
        keys_of(decoder, attention, some_ids(TOKENS), at)[0] for at in (source, target)
    )
    assert not torch.allclose(before, after, atol=0.1)
    assert_close(rotary.rotate(before, source, target), after, FLOAT32)
    free = keys_of(decoder, attention, some_ids(TOKENS), torch.zeros_like(source))[0]
    assert_close(rotary.unrotate(before, source), free, FLOAT32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_queries_are_turned_like_keys(layout, monkeypatch) -> None:
    """Queries at two places are the same without their positions; so are those of latents."""
    decoder, attention = decoder_of(build(layout, "sdpa"))
    rotary = rotaries(decoder, attention)[0]
    asked = []
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def record(module, query, key, value, mask, **options):
        latent = hasattr(module, "kv_b_proj")
        absorbed = (
            LatentQuery(module, query, module.kv_lora_rank).absorb(query) if latent else query
        )
        asked.append(absorbed)
        return sdpa(module, query, key, value, mask, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", record)
    positions, free = torch.arange(TOKENS), []
    for shift in (0, SHIFT):
        asked.clear()
        keys_of(decoder, attention, some_ids(TOKENS), positions + shift)
        free.append(rotary.unrotate(asked[0], positions + shift))
    assert not torch.allclose(free[0], asked[0], atol=0.1)
    assert_close(free[0], free[1], SUMS)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "phimoe", "gemma4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_found_in_16_bits(family, dtype) -> None:
    """The same rotation as in float32, whatever 16 bits round; it gives back what it is given."""
    expected = rotaries(*decoder_of(build(family)))
    found = rotaries(*decoder_of(build(family, dtype=dtype)))
    for idx, rotary in found.items():
        same = expected[idx].offset, expected[idx].interleaved
        assert (rotary.offset, rotary.interleaved) == same and not rotary.is_identity
        assert torch.equal(rotary.frequencies, expected[idx].frequencies)
    assert rotary.rotate(torch.ones(3, 64, dtype=dtype), torch.zeros(3), 5).dtype == dtype


def test_rope_by_layer_type() -> None:
    """Where sliding layers turn by other angles, a full layer gets its own, not the first ones."""
    decoder, attention = decoder_of(build("gemma4"))
    found = rotaries(decoder, attention)
    full, sliding = (
        getattr(decoder.rotary_emb, f"{t}_attention_inv_freq") for t in ("full", "sliding")
    )
    assert not torch.equal(full[: len(sliding)], sliding)
    assert all(torch.equal(rotary.frequencies, full) for rotary in found.values())


def rope(**fields) -> dict:
    return {"rope_parameters": {"rope_theta": 10000.0, **fields}}


LONG = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 64}
LENGTH_DEPENDENT = {
    "dynamic": rope(rope_type="dynamic", factor=2.0),
    "longrope": rope(rope_type="longrope", **LONG),
}


@pytest.mark.parametrize("rope_type", LENGTH_DEPENDENT)
def test_refuses_angles_that_depend_on_the_length(rope_type) -> None:
    """With the type of the embedding; and leaves the model as it was."""
    model = build("mixtral", **LENGTH_DEPENDENT[rope_type])
    before = copy.deepcopy(dict(model.named_buffers()))
    with pytest.raises(
        ValueError, match=f"MixtralModel is of type {rope_type!r}, whose angles change with"
    ):
        rotaries(*decoder_of(model))
    assert before and all(torch.equal(t, before[name]) for name, t in model.named_buffers())


def test_refuses_keys_that_change_after_their_rotation() -> None:
    """HunYuan scales each dim of a key behind its rotary embedding: what is left is no rotation."""
    model = build("hunyuan_v1_moe")
    decoder, attention = decoder_of(model)
    assert not rotaries(decoder, attention)[2].is_identity  # of fresh weights: all ones
    norm = attention[2][0].key_layernorm
    norm.weight.data = torch.linspace(0.5, 2, len(norm.weight))
    with pytest.raises(ValueError, match="layer 2: no rotary embedding of the model explains"):
        rotaries(decoder, attention)


def test_leaves_no_hook() -> None:
    """Neither after success nor when the model's forward fails; an object can be copied, too."""
    model = build("mixtral")
    decoder, attention = decoder_of(model)
    rotary = rotaries(decoder, attention)[0]
    model.model.layers[1].mlp = None
    with pytest.raises(TypeError):
        rotaries(decoder, attention)
    assert not any(module._forward_pre_hooks for module in model.modules())
    again = pickle.loads(pickle.dumps(rotary))
    assert torch.equal(again.frequencies, rotary.frequencies)


def test_mean_of_rotations() -> None:
    rotary = Rotary(torch.tensor([1.0, 0.1, 0.003]), offset=1)
    free = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0))
    turned = [rotary.rotate(free, torch.zeros(5), at) for at in range(30, 70)]
    expected = torch.stack(turned).double().mean(0)
    assert (rotary.ahead(free, 30, 40) - expected).abs().max() <= FLOAT32
    assert expected.norm() < 0.95 * free.norm()
    assert torch.equal(rotary.ahead(free, 30, 40)[..., 7:], free[..., 7:])
    assert torch.equal(rotary.ahead(free, 30, 40)[..., :1], free[..., :1])
