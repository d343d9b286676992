"""Which lines of pikv_hf ask for kernels, synchronizations and uploads, in each kind of step."""

import argparse
from collections import Counter

import census  # first: it puts the other folders on the path
import torch
from decoding import METHODS, Decoding, new_cache, tiny_model
from steps import LAYERS, PROMPTS, counted_steps, rarest_kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("prompt", choices=PROMPTS)
    parser.add_argument("--lines", type=int, default=15, help="lines to print of each kind")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    model = tiny_model(LAYERS)
    decoding = Decoding(model, new_cache(model, arguments.method))
    decoding.read(PROMPTS[arguments.prompt])
    newest: dict[str, census.Census] = {}
    for kind, counted in counted_steps(decoding, rarest_kind(arguments.method)):
        newest[kind] = counted
    for kind, counted in newest.items():
        print(f"{kind}, {LAYERS} layers:")
        for what in ("kernel", "sync", "upload"):
            ours = Counter({k: n for k, n in counted.sites(what).items() if k.startswith("pikv")})
            for site, number in ours.most_common(arguments.lines):
                print(f"  {number:5} {what:6} {site}")


if __name__ == "__main__":
    main()
