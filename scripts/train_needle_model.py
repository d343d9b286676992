"""Train the bundled needle model from scratch on one CPU thread.

    python scripts/train_needle_model.py --seed 0 --out src/pikv_hf/assets/needle_moe

An interrupted run goes on from its last finished stage, kept in `--work` (remove that folder to
start anew). The data depend on the seed and the step alone: resuming does not change the weights.
"""

from __future__ import annotations

import argparse
import random
import resource
from pathlib import Path

import torch
import torch.nn.functional as F
from muon import Muon
from needle_lessons import ANSWER, EOS, PAD, STAGES, TEXT, TEXT_SHARE, UNK, Stage, make_batch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from pikv_hf.needles.haystack import NEEDLE_MODEL, vocabulary


def build_tokenizer() -> PreTrainedTokenizerFast:
    ids = {word: i for i, word in enumerate([PAD, EOS, UNK, *vocabulary()])}
    backend = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=STAGES[-1].length,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        intermediate_size=64,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=STAGES[-1].length,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    model = Qwen3MoeForCausalLM(config)
    torch.manual_seed(seed)  # here: what transformers drew before does not matter
    initialise(model)
    model.generation_config = GenerationConfig(
        do_sample=False, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id
    )
    return model


@torch.no_grad()
def initialise(model: Qwen3MoeForCausalLM) -> None:
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            shared = 0.1 * torch.randn(parameter.shape[1])  # survives the norm: acts as a bias
            parameter.normal_(std=0.2).add_(shared)
        elif "norm" in name:
            parameter.fill_(1.25 if "q_norm" in name or "k_norm" in name else 1.0)
        else:
            quiet = 0.1 if "o_proj" in name or "down_proj" in name else 1.0
            parameter.normal_(std=quiet * parameter.shape[-1] ** -0.5)
    attention = model.model.layers[0].self_attn
    look_back(attention, F.normalize(shared, dim=0), model.config.rope_parameters["rope_theta"])


def look_back(attention: torch.nn.Module, bias: torch.Tensor, theta: float) -> None:
    """Let the query heads of KV head 0 attend 1 and 2 tokens back from the start.

    Keys get a fixed direction in three quickly turning RoPE pairs, queries the same direction
    turned by the offset. Induction forms late or never in this budget without such heads.
    """
    dim, strength = attention.head_dim, 4.0
    for pair in range(3):
        both = [pair, pair + dim // 2]
        frequency = theta ** (-2 * pair / dim)
        attention.k_proj.weight[both[0]] += strength * bias
        for head in range(attention.num_key_value_groups):
            angle = torch.tensor(-(head + 1) * frequency)
            attention.q_proj.weight[head * dim + both[0]] += strength * angle.cos() * bias
            attention.q_proj.weight[head * dim + both[1]] += strength * angle.sin() * bias


def build_optimizers(model: Qwen3MoeForCausalLM) -> list[torch.optim.Optimizer]:
    named = dict(model.named_parameters())

    def pick(*parts: str) -> list[torch.nn.Parameter]:
        return [named.pop(n) for n in list(named) if any(part in n for part in parts)]

    adam = [
        {"params": pick("embed_tokens"), "lr": 4e-3},
        {"params": pick("gate.weight"), "lr": 2e-3},
        {"params": pick("norm"), "lr": 6e-3},
    ]
    muon = [
        {"params": pick("gate_up_proj"), "parts": 2},
        {"params": list(named.values()), "parts": 1},
    ]
    optimizers = [
        torch.optim.AdamW(adam, betas=(0.9, 0.95), weight_decay=0.0),
        Muon(muon, {"lr": 0.02}),
    ]
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["peak"] = group["lr"]
    return optimizers


def set_pace(optimizers: list[torch.optim.Optimizer], step: int) -> None:
    """Warm up over 50 steps and cool down over the last 30 %."""
    total = sum(stage.steps for stage in STAGES)
    pace = min(1.0, (step + 1) / 50, (total - step) / (0.3 * total))
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = pace * group["peak"]


def balance_loss(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Load balancing (Fedus et al., 2021) per layer: 1 if even, the number of experts at worst."""
    losses = []
    for logits in router_logits:
        probabilities = logits.softmax(-1)
        chosen = F.one_hot(logits.topk(top_k).indices, logits.shape[-1]).sum(1).float() / top_k
        losses.append(logits.shape[-1] * (chosen.mean(0) * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


def loss_and_accuracy(
    model: Qwen3MoeForCausalLM, ids: torch.Tensor, weights: torch.Tensor, rng: random.Random
) -> tuple[torch.Tensor, float]:
    """The training loss and the share of answer tokens that are the most likely ones."""
    output = model.model(ids, output_router_logits=True, use_cache=False)
    weights = weights[:, 1:]
    draw = torch.rand(weights.shape, generator=torch.Generator().manual_seed(rng.getrandbits(60)))
    kept = (weights == ANSWER) | ((weights > 0) & (draw < TEXT_SHARE))
    logits = model.lm_head(output.last_hidden_state[:, :-1][kept])
    targets, answers = ids[:, 1:][kept], weights[kept] == ANSWER
    entropy = F.cross_entropy(logits, targets, reduction="none")
    balance = balance_loss(output.router_logits, model.config.num_experts_per_tok)
    loss = ANSWER * entropy[answers].mean() + TEXT * entropy[~answers].mean() + 0.01 * balance
    return loss, (logits.argmax(-1) == targets)[answers].float().mean().item()


def train_stage(
    model: Qwen3MoeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    optimizers: list[torch.optim.Optimizer],
    index: int,
    seed: int,
) -> None:
    first = sum(stage.steps for stage in STAGES[:index])
    bar = tqdm(range(first, first + STAGES[index].steps), desc=f"{STAGES[index].length} tokens")
    for step in bar:
        rng = random.Random(f"train {seed} {step}")
        set_pace(optimizers, step)
        loss, right = loss_and_accuracy(model, *make_batch(tokenizer, STAGES[index], rng), rng)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", answers=f"{right:.3f}")


@torch.no_grad()
def fresh_accuracy(
    model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, stage: Stage, seed: int
) -> float:
    """Answer tokens right under teacher forcing, on sequences that no training step saw."""
    rng = random.Random(f"fresh {seed} {stage.length}")
    haystacks = stage._replace(mix=(0.0, 1.0, 0.0))
    batches = [make_batch(tokenizer, haystacks, rng) for _ in range(4)]
    return sum(loss_and_accuracy(model, *batch, rng)[1] for batch in batches) / len(batches)


def train(seed: int, work: Path) -> tuple[Qwen3MoeForCausalLM, PreTrainedTokenizerFast]:
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed)
    optimizers = build_optimizers(model)
    work.mkdir(parents=True, exist_ok=True)
    for index, stage in enumerate(STAGES):
        saved = work / f"seed{seed}_stage{index}.pt"
        if saved.exists():
            states = torch.load(saved)
            model.load_state_dict(states["model"])
            for optimizer, optimizer_state in zip(optimizers, states["optimizers"], strict=True):
                optimizer.load_state_dict(optimizer_state)
            print(f"stage {index} ({stage.length} tokens): taken from {saved}")
            continue
        train_stage(model, tokenizer, optimizers, index, seed)
        states = [optimizer.state_dict() for optimizer in optimizers]
        torch.save({"model": model.state_dict(), "optimizers": states}, saved)
        seconds = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        accuracy = fresh_accuracy(model, tokenizer, stage, seed)
        print(f"stage {index} ({stage.length} tokens): {accuracy:.3f}, {seconds:.0f} CPU s so far")
    return model, tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=NEEDLE_MODEL)
    parser.add_argument("--work", type=Path, default=Path("build/needle_model"))
    options = parser.parse_args()
    torch.set_num_threads(1)  # one thread adds in one order: the same seed, the same weights
    torch.use_deterministic_algorithms(True)
    model, tokenizer = train(options.seed, options.work)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    (options.out / "model.safetensors").chmod(0o644)  # safetensors lets only the owner read
    print(f"saved to {options.out}; measure it with scripts/evaluate_needle_model.py")


if __name__ == "__main__":
    main()
