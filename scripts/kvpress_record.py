"""What kvpress keeps: run by `compare_kvpress.py` with the python of kvpress's own environment."""

import argparse
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kvpress
import torch
from kvpress.presses import kvzip_press
from kvpress_cases import CASES, REPEAT, ROWS, SMALL, Case, Row
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


def states(model: PreTrainedModel, prompt: Tensor) -> dict[str, Tensor]:
    """What a press is given in each layer: keys and values [L, H, T, D], inputs [L, T, hidden]."""
    hidden: list[Tensor] = []

    def note(module, args, kwargs):
        hidden.append(kwargs["hidden_states"][0])

    hooks = [
        layer.self_attn.register_forward_pre_hook(note, with_kwargs=True)
        for layer in model.model.layers
    ]
    cache = DynamicCache()
    model(prompt, past_key_values=cache)
    for hook in hooks:
        hook.remove()
    return {
        "keys": torch.stack([layer.keys[0] for layer in cache.layers]),
        "values": torch.stack([layer.values[0] for layer in cache.layers]),
        "hidden": torch.stack(hidden),
    }


class Words:
    """Stands in for the tokenizer that `KVzipPress` asks for its prompt."""

    chat_template = None

    @classmethod
    def from_pretrained(cls, name: str) -> "Words":
        return cls()

    def encode(self, text: str, **options: Any) -> Tensor:
        """No token for no text, the last of `REPEAT` for the suffix, the others for the prompt."""
        return torch.tensor([{"": [], "\n": REPEAT[-1:]}.get(text, REPEAT[:-1])], dtype=torch.long)


def kept(model: PreTrainedModel, prompt: Tensor, row: Row, share: float, keys: Tensor) -> Tensor:
    """[L, H, T] bool: which of `keys` [L, H, T, D] are there after the press has run."""
    press = eval(row.press, vars(kvpress))
    press.compression_ratio = 1 - share
    cache = DynamicCache()
    with press(model):
        model(prompt, past_key_values=cache)
    found = torch.ones(keys.shape[:3], dtype=torch.bool)
    for at, (layer, module) in enumerate(zip(cache.layers, model.model.layers, strict=True)):
        masked = getattr(module.self_attn, "masked_key_indices", None)
        if masked is not None:  # presses with budgets per head hide keys, and drop none
            found[at][masked[1:]] = False
            continue
        same = (keys[at][:, :, None] == layer.keys[0][:, None]).all(-1)
        found[at] = same.any(-1)
        assert (found[at].sum(-1) == layer.keys.shape[2]).all(), f"{row.name}: keys were changed"
    return found


def record(case: Case, folder: Path) -> None:
    prompt, tensors = case.prompt(), {}
    for attention in dict.fromkeys(row.attention for row in ROWS):
        model = case.model(attention)
        given = states(model, prompt)
        for row in ROWS:
            if row.attention == attention and case.length % row.chunk == 0:
                tensors[row.name] = kept(model, prompt, row, case.share, given["keys"])
        if attention == "sdpa" and case != SMALL:
            tensors |= given
    versions = {name: version(name) for name in ("kvpress", "torch", "transformers")}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / f"{case.name}.safetensors", versions)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    kvzip_press.AutoTokenizer = Words
    kvzip_press.logger.setLevel("ERROR")
    for case in track([SMALL, *CASES], "kvpress"):
        record(case, folder)
