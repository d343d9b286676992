"""Questions about the memory behind a tensor."""

import torch
from torch import Tensor


def is_writable(tensor: Tensor) -> bool:
    """Tensors made under `torch.inference_mode` cannot be written outside of it."""
    return not tensor.is_inference() or torch.is_inference_mode_enabled()


def own(tensor: Tensor) -> Tensor:
    """`tensor`, dense and alone in its storage, so that nothing larger is kept alive by it."""
    tensor = tensor.contiguous()
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if alone else tensor.clone()
