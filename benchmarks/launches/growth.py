"""Kernels of a plain step, and page stores of a layer, against the number of generated tokens.

Tokens are written to the layers a page at a time, which seals as often as single steps do.
"""

import census  # first: it puts the other folders on the path
import torch
from common import Result, random_states, start, write
from decoding import DTYPE, HEAD_DIM, KV_HEADS, Decoding, layer_kernels, new_cache, tiny_model

LAYERS, PAGE, PROMPT = 2, 64, 64
FEW, FAR, MOST = 64, 8192, 32768
GENERATED = (FEW, 1024, FAR, MOST)
GROWTH_GOAL, STORES_GOAL = 1.1, 4


def attention_kernels(decoding: Decoding) -> float:
    """Return the kernels of the attention module of a layer in the next plain step."""
    kind, counted = decoding.step()
    while kind != "plain":
        kind, counted = decoding.step()
    return layer_kernels(counted, LAYERS, "self_attn.")


def write_page(decoding: Decoding, seed: int) -> None:
    """Write a page of tokens to all layers."""
    for layer in decoding.cache.layers:
        states = random_states(seed, PAGE, (KV_HEADS, HEAD_DIM, HEAD_DIM), DTYPE)
        write(layer, *map(census.on_device, states))


def main() -> None:
    quick = start(__doc__)
    counts = GENERATED[:-1] if quick else GENERATED
    result = Result(
        "launches/growth",
        "Kernels and page stores against generated tokens",
        f"kernels of a layer's attention module in a plain step, projections included; {LAYERS} layers, "
        f"{2 * KV_HEADS} query and {KV_HEADS} KV heads of {HEAD_DIM}, bf16, batch 1, prompt of {PROMPT} "
        "tokens; counted on a logical accelerator",
        ["method", "generated tokens", "kernels", "page stores"],
    )
    for method in ("lossless", "int4"):
        model = tiny_model(LAYERS)
        decoding = Decoding(model, new_cache(model, method))
        decoding.read(torch.ones(1, PROMPT, dtype=torch.long))
        kernels, stores = {}, {}
        for count in counts:
            while decoding.cache.get_seq_length() < PROMPT + count:
                write_page(decoding, decoding.cache.get_seq_length())
            decoding.resume()
            kernels[count] = attention_kernels(decoding)
            stores[count] = len(decoding.cache.layers[-1].state.pages.slabs)
            result.add(method, count, kernels[count], stores[count])
        growth = kernels[FAR] / kernels[FEW]
        text = f"{method}: kernels after {FAR} tokens <= {GROWTH_GOAL} of those after {FEW}"
        result.goal(text, growth, growth <= GROWTH_GOAL)
        if not quick:
            text = f"{method}: page stores after {MOST} tokens <= {STORES_GOAL}"
            result.goal(text, stores[MOST], stores[MOST] <= STORES_GOAL)
    result.publish(quick)


if __name__ == "__main__":
    main()
