"""Logical accelerators on the CPU: test placement over several devices without a GPU.

Importing this module registers the devices ``fakegpu:0`` .. ``fakegpu:3``. Their tensors hold real values (kept in
CPU memory), an operation that mixes devices raises the error that CUDA raises, and every byte that crosses a device
boundary is counted. It is built on PyTorch's PrivateUse1 Python backend and one wrapper subclass: no C++, no GPU.

What it is for: ``from_pretrained(device_map=...)``, ``accelerate.dispatch_model``, cpu and disk offload, and a KV cache
whose pools live on several devices of one process. Greedy ``generate`` gives the same tokens as on the CPU, so a test
can check values, placement and traffic at once.

How a test uses it::

    import fakegpu                                   # first: before the model is built

    fakegpu.reset()
    model = AutoModelForCausalLM.from_pretrained(path, device_map=device_map, experts_implementation="eager")
    out = model.generate(ids.to("fakegpu:0"), cache=cache)
    assert torch.equal(out.cpu(), expected)          # same tokens as on one device
    assert fakegpu.bytes_moved("fakegpu:0", "fakegpu:1") <= bound
    with pytest.raises(fakegpu.DeviceMismatch):      # and a misplaced layer is caught
        ...

Limits:

- It finds wrong devices and needless traffic. It cannot find races: no streams, no asynchrony, no Triton, no timing.
- ``experts_implementation="eager"`` is needed: the grouped experts of transformers branch on the device type and call
  ``torch.histc`` on integers, which the CPU underneath refuses.
- ``device_map="auto"`` and ``infer_auto_device_map`` do not see the devices (accelerate's ``get_max_memory`` knows
  CUDA-like integers, ``cpu`` and ``disk``): pass an explicit ``device_map``.
- Weights offloaded to disk: call ``patch_safetensors()`` first, because safetensors loads to real devices only.
- accelerate picks its main device from a set of device *names*, in hash order: set ``PYTHONHASHSEED`` where a test
  compares exact byte counts over several devices.
- A parameter on a fake device is a ``FakeGpuTensor`` and no longer an ``nn.Parameter``.
- The registration holds for the whole process (there is one PrivateUse1 backend): ``torch.accelerator`` and integer
  device ids then mean ``fakegpu``. Import it only in the tests that need it, in a process of their own.
- The PyTorch function behind it is experimental (used here with torch 2.13.0). Where it is missing the import fails:
  ``fakegpu = pytest.importorskip("fakegpu", exc_type=ImportError)``.
"""

from collections import Counter

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

DEVICE_COUNT = 4
MEMORY_BYTES = 8 << 30  # what each device reports as free and as total memory

MOVED = Counter()  # (source, destination) -> bytes copied between the two devices
DISPATCHED = Counter()  # device -> operators run there

# As on CUDA, the indices of these operators may be CPU tensors.
CPU_INDEX_OPS = {"index.Tensor", "index_put.default", "index_put_.default", "_unsafe_index.Tensor"}


class DeviceMismatch(RuntimeError):
    """Tensors of different devices met in one operator."""


def reset():
    """Set both counters to zero."""
    MOVED.clear()
    DISPATCHED.clear()


def bytes_moved(source=None, destination=None):
    """Bytes copied from `source` to `destination`; None stands for any device."""
    return sum(
        n for (src, dst), n in MOVED.items() if source in (None, src) and destination in (None, dst)
    )


# ---------------------------------------------------------------------------------------------------- the backend


class Backend:
    """The functions that PyTorch, accelerate and transformers look for in the module `torch.fakegpu`."""

    index = 0

    def is_initialized(self):
        return True

    def is_available(self):
        return True

    def device_count(self):
        return DEVICE_COUNT

    def current_device(self):
        return self.index

    def set_device(self, device):
        self.index = torch.device(device).index or 0

    def mem_get_info(self, device=None):
        return MEMORY_BYTES, MEMORY_BYTES

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]

    def get_rng_state(self, device=None):
        return torch.get_rng_state()

    def set_rng_state(self, state, device=None):
        torch.set_rng_state(state)

    def manual_seed(self, seed):
        pass

    def manual_seed_all(self, seed):
        pass

    def synchronize(self, device=None):
        pass

    def empty_cache(self):
        pass

    def _is_in_bad_fork(self):
        return False


BACKEND = Backend()
_setup_privateuseone_for_python_backend("fakegpu", backend_module=BACKEND)


def with_index(device):
    """`device` as torch.device, where a bare "fakegpu" means the current device."""
    device = torch.device(device)
    if device.type == "fakegpu" and device.index is None:
        return torch.device("fakegpu", BACKEND.index)
    return device


# ------------------------------------------------------------------------------------------------------ the tensor


class FakeGpuTensor(torch.Tensor):
    """A tensor that reports a fake device and keeps its values in the CPU tensor `inner`."""

    @staticmethod
    def __new__(cls, inner, device=None, requires_grad=False, **kwargs):
        # accelerate rebuilds a parameter with type(parameter)(value, requires_grad=...): here `inner` is any tensor.
        if isinstance(inner, FakeGpuTensor):
            inner, device = inner.inner, inner.device
        elif device is None:
            return torch.nn.Parameter(inner, requires_grad=requires_grad)
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
            requires_grad=inner.requires_grad,
        )

    def __init__(self, inner, device=None, requires_grad=False, **kwargs):
        self.inner = unwrap(inner)

    def __repr__(self, **kwargs):
        return f"FakeGpuTensor({self.inner}, device='{self.device}')"

    def tolist(self):
        return self.cpu().tolist()  # which is counted

    def numpy(self):
        raise TypeError("can't convert a fakegpu tensor to numpy: copy it to the CPU first")

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def unwrap(x):
    return x.inner if isinstance(x, FakeGpuTensor) else x


# --------------------------------------------------------------------------------------------------- the operators


def run(func, args, kwargs):
    """Run one ATen operator as the devices of its tensors demand."""
    name = func.__name__
    if name == "_to_copy.default":
        return copy_to_device(func, args[0], kwargs)
    if name == "copy_.default":
        return copy_into(args[0], args[1])
    if name == "_copy_from.default":
        return copy_into(args[1], args[0])
    return compute(func, args, kwargs)


def count_move(source, destination, tensor):
    if source != destination and "meta" not in (source.type, destination.type):
        MOVED[str(source), str(destination)] += tensor.numel() * tensor.element_size()


def copy_to_device(func, source, kwargs):
    destination = kwargs.get("device")
    destination = source.device if destination is None else with_index(destination)
    options = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking", "pin_memory")}
    values = func(unwrap(source), **options)
    count_move(source.device, destination, values)
    return (
        FakeGpuTensor(values, destination)
        if destination.type == "fakegpu"
        else values.to(destination)
    )


def copy_into(destination, source):
    unwrap(destination).copy_(unwrap(source))
    count_move(source.device, destination.device, source)
    return destination


def compute(func, args, kwargs):
    leaves, spec = tree_flatten((args, kwargs))
    device = device_of_result(func, args, kwargs, leaves)
    DISPATCHED[str(device)] += 1
    inner_args, inner_kwargs = tree_unflatten([unwrap(leaf) for leaf in leaves], spec)
    if "device" in kwargs:
        inner_kwargs["device"] = torch.device("cpu")
    out = func(*inner_args, **inner_kwargs)
    if device.type != "fakegpu":
        return out
    # An in-place operator returns its argument: give back the wrapper that the caller holds, not a new one.
    wrappers = {id(t.inner): t for t in leaves if isinstance(t, FakeGpuTensor)}

    def wrap(x):
        if not isinstance(x, torch.Tensor):
            return x
        return wrappers[id(x)] if id(x) in wrappers else FakeGpuTensor(x, device)

    return wrap(out) if isinstance(out, torch.Tensor) else tree_map(wrap, out)


def device_of_result(func, args, kwargs, leaves):
    """The one device of all tensors (0-dim CPU tensors may join any device), unless `device=` names another."""
    tensors = [t for t in leaves if isinstance(t, torch.Tensor)]
    fake = {t.device for t in tensors if isinstance(t, FakeGpuTensor)}
    cpu = [t for t in tensors if not isinstance(t, FakeGpuTensor) and t.dim() > 0]
    if func.__name__ in CPU_INDEX_OPS:
        cpu = [t for t in cpu if not any(t is index for index in args[1])]
    if len(fake) > 1 or (fake and cpu):
        raise DeviceMismatch(
            "Expected all tensors to be on the same device, but found at least two devices: "
            f"{sorted({str(t.device) for t in tensors})} (in {func.__name__})"
        )
    if kwargs.get("device") is not None:
        return with_index(kwargs["device"])
    return next(iter(fake), torch.device("cpu"))


# Factories have no tensor argument, so they reach these kernels instead of FakeGpuTensor.__torch_dispatch__.


def empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return FakeGpuTensor(torch.empty(size, dtype=dtype), with_index(device))


def empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    return FakeGpuTensor(torch.empty_strided(size, stride, dtype=dtype), with_index(device))


def arange(start, end, step=1, *, dtype=None, layout=None, device=None, pin_memory=None):
    return FakeGpuTensor(torch.arange(start, end, step, dtype=dtype), with_index(device))


def eye(n, *, dtype=None, layout=None, device=None, pin_memory=None):
    return FakeGpuTensor(torch.eye(n, dtype=dtype), with_index(device))


def arange_from_zero(end, **options):
    return arange(0, end, **options)


def copy_from(source, destination, non_blocking=False):
    return copy_into(destination, source)


LIBRARY = torch.library.Library("aten", "IMPL")  # the kernels live as long as this object
LIBRARY.impl("empty.memory_format", empty, "PrivateUse1")
LIBRARY.impl("empty_strided", empty_strided, "PrivateUse1")
LIBRARY.impl("eye", eye, "PrivateUse1")
LIBRARY.impl("arange", arange_from_zero, "PrivateUse1")
LIBRARY.impl("arange.start", arange, "PrivateUse1")
LIBRARY.impl("arange.start_step", arange, "PrivateUse1")
LIBRARY.impl("_copy_from", copy_from, "PrivateUse1")


def patch_safetensors():
    """Let accelerate read weights offloaded to disk: safetensors loads them to the CPU, accelerate moves them."""
    from accelerate.utils import offload

    real = offload.safe_open

    def safe_open(file, framework="pt", device="cpu", **kwargs):
        return real(file, framework=framework, device="cpu", **kwargs)

    offload.safe_open = safe_open
