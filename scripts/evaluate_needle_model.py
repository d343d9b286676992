"""Measure the needle model: exact answers over `generate`, expert load, routing by word type.

python scripts/evaluate_needle_model.py --json build/needle_model/evaluation.json
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from pikv_hf.needles import haystack as needles
from pikv_hf.needles.haystack import KINDS, NEEDLE_MODEL, REPLY_ROOM, is_exact, make_haystack

WORD_TYPES = {
    "noun": needles.NOUNS,
    "number": needles.TENS + needles.ONES,
    "name": needles.NAMES,
    "adjective": needles.ADJECTIVES,
    "verb": needles.MOVES + needles.STANDS + needles.DEEDS,
    "place": needles.PLACES,
    "mark": [".", "?"],
    "other": ["the", "and", "met", "counted", "stars", "what", "is", "for", "magic", "secret"],
}


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a share."""
    share, spread = right / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return middle - half, middle + half


@torch.no_grad()
def exact_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    kind: str,
    length: int,
    options: argparse.Namespace,
) -> int:
    """Right answers to `options.questions` questions, each about a text of its own."""
    seeds = range(options.seed, options.seed + options.questions)
    rows, right = max(1, 16384 // length), 0
    for start in tqdm(range(0, len(seeds), rows), desc=f"{kind}, {length} tokens", leave=False):
        stacks = [
            make_haystack(length=length, needles=options.needles, seed=seed, kinds=(kind,))
            for seed in seeds[start : start + rows]
        ]
        batch = tokenizer([s.prompt() for s in stacks], padding=True, return_tensors="pt")
        output = model.generate(**batch, max_new_tokens=REPLY_ROOM)[:, batch.input_ids.shape[1] :]
        replies = tokenizer.batch_decode(output, skip_special_tokens=True)
        right += sum(is_exact(r, s.answers[0]) for r, s in zip(replies, stacks, strict=True))
    return right


@torch.no_grad()
def expert_load(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, options: argparse.Namespace
) -> list[dict[str, list[float]]]:
    """Per layer and word type (and "all"), the share of each expert in the routed tokens."""
    prompts = [
        make_haystack(length=1024, needles=options.needles, seed=seed, kinds=KINDS).prompt()
        for seed in range(options.seed, options.seed + 16)
    ]
    ids = tokenizer(prompts, padding=True, return_tensors="pt").input_ids
    routed = model(ids, output_router_logits=True).router_logits
    of_type = {name: tokenizer.convert_tokens_to_ids(words) for name, words in WORD_TYPES.items()}
    masks = {name: torch.isin(ids.flatten(), torch.tensor(t)) for name, t in of_type.items()}
    masks["all"] = torch.isin(ids.flatten(), torch.tensor(tokenizer.pad_token_id), invert=True)
    loads = []
    for logits in routed:
        chosen = logits.topk(model.config.num_experts_per_tok).indices
        counts = {name: chosen[mask].flatten() for name, mask in masks.items()}
        loads.append({name: _shares(c, logits.shape[-1]) for name, c in counts.items()})
    return loads


def _shares(chosen: torch.Tensor, num_experts: int) -> list[float]:
    return (chosen.bincount(minlength=num_experts) / max(1, len(chosen))).tolist()


def print_load(loads: list[dict[str, list[float]]]) -> None:
    for layer, load in enumerate(loads):
        print(f"layer {layer}: share of the routed tokens per expert; |.| = distance from all")
        for name in ("all", *WORD_TYPES):
            distance = sum(abs(a - b) for a, b in zip(load[name], load["all"], strict=True)) / 2
            shares = " ".join(f"{share:5.3f}" for share in load[name])
            print(f"  {name:10} {shares}   |{distance:.2f}|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(NEEDLE_MODEL))
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--needles", type=int, default=8, help="hidden per text; one is asked for")
    parser.add_argument("--questions", type=int, default=500, help="per kind and length")
    parser.add_argument("--seed", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path, default=Path("build/needle_model/evaluation.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = []
    print(f"{options.needles} needles, {options.questions} questions: exact answers, 95 % interval")
    for length in options.lengths:
        for kind in KINDS:
            right = exact_answers(model, tokenizer, kind, length, options)
            low, high = wilson(right, options.questions)
            rows.append({"length": length, "kind": kind, "right": right, "low": low, "high": high})
            share = right / options.questions
            print(f"{length:6} {kind:14} {right:5} {share:.3f} [{low:.3f}, {high:.3f}]")
    loads = expert_load(model, tokenizer, options)
    print_load(loads)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(options, name) for name in ("model", "needles", "questions", "seed")}
    report = {"settings": settings, "exact": rows, "expert_load": loads}
    options.json.write_text(json.dumps(report, indent=1))
    print(f"written to {options.json}")


if __name__ == "__main__":
    main()
