"""Every name of transformers that we use, and every private name of it or of torch, with its reason.

`src/pikv_hf/model/` alone may name what is not public: a new version is then one folder's work.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src" / "pikv_hf"
MODEL = SRC / "model"
FILES = sorted([*SRC.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])

# Public classes of the top-level package: any file may import them.
PUBLIC = {
    "AutoConfig": "`pikv plan` reads configs by name",
    "AutoModelForCausalLM": "the commands load models by name",
    "AutoModelForImageTextToText": "`pikv plan` makes models that read images, too",
    "AutoTokenizer": "the commands load tokenizers by name",
    "Cache": "the base class of PiKVCache",
    "DynamicCache": "layers as transformers makes them, and the peer of the demo",
    "EncoderDecoderCache": "may hold a PiKVCache",
    "PreTrainedConfig": "the type of configs",
    "PreTrainedModel": "the type of models",
    "PreTrainedTokenizerBase": "the type of tokenizers",
    "TextStreamer": "`pikv generate` shows tokens as they come",
}
# What only `model/versions.py` imports.
INTERNAL = {
    "transformers.cache_utils.CacheLayerMixin": "tells layers that read masks from states",
    "transformers.cache_utils.DynamicLayer": "the base class of paged layers, and what is paged",
    "transformers.cache_utils.DynamicSlidingWindowLayer": "what a failed pass can be cropped from",
    "transformers.generation.streamers.BaseStreamer": "the demo's clock, and its type for generate",
    "transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS": "whose masks can be read",
    "transformers.masking_utils.eager_mask": "masks that we read",
    "transformers.masking_utils.flash_attention_mask": "masks that we read",
    "transformers.masking_utils.sdpa_mask": "masks that we read",
    "transformers.modeling_outputs.BaseModelOutputWithPast": "tells what the cache is called",
    "transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS": "where our attention is registered",
    "transformers.utils.logging": "the commands hide its progress bars",
}
# Private names, and the files that may use them.
PRIVATE = {
    "_attn_implementation": ("model/versions.py", "which attention function a module calls"),
    "_attn_implementation_internal": ("model/versions.py", "to set it on a copied config"),
    "_can_record_outputs": ("model/versions.py", "declares the gates of a model"),
    "_device_mesh": ("model/parallel.py", "over which ranks transformers has divided a model"),
    "_mesh_manager": ("model/parallel.py", "the mesh of its experts"),
    "_pp_stage": ("model/parallel.py", "the layers that this rank of a pipeline runs"),
    "_hf_hook": (
        "model/output_projection.py model/devices.py",
        "accelerate brings the weights of a module when it is called, to the device that it names",
    ),
    "_no_split_modules": ("model/blocks.py", "the classes of modules that stay on one device"),
    "_local_scalar_dense": ("model/without_weights.py", "reads a number of a tensor"),
    "_prefill": ("model/versions.py", "reads the prompt: how long it is, also in pieces"),
    "_orig_mod": ("model/wrappers.py", "the module inside of a compiled one"),
    "_sliding_window_tensor": (
        "cache/pikv_cache.py",
        "`iter(cache)` yields what DynamicCache yields",
    ),
    "_is_mkldnn_bf16_supported": ("weighted_attention.py", "optional: is bf16 fast on this CPU"),
    "_scaled_dot_product_flash_attention_for_cpu": (
        "fused_attention.py",
        "optional: the fused CPU attention that returns its log-sum-exp",
    ),
    "_scaled_dot_product_flash_attention": (
        "fused_attention.py",
        "optional: CUDA's flash attention that returns its log-sum-exp",
    ),
    "_scaled_dot_product_efficient_attention": (
        "fused_attention.py",
        "optional: CUDA's attention with a mask that returns its log-sum-exp",
    ),
    # Private to namedtuples, which document it as public.
    "_asdict": ("fitting/profile.py fitting/calibration_state.py", "named tuples as dicts"),
}


def imported(file: Path) -> Iterator[tuple[str, str]]:
    """Module and name of each import from transformers; the name is empty for the module itself."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "transformers":
            yield from ((str(node.module), alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            yield from ((name, "") for name in names if name.split(".")[0] == "transformers")


def private(file: Path) -> Iterator[str]:
    """Private names that a file reads of other objects, by attribute, text or import."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"getattr", "hasattr"}:
            yield from (a.value for a in node.args if isinstance(a, ast.Constant))
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            yield str(node.value.value)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (alias.name for alias in node.names)


def our_own() -> set[str]:
    """Private names that our files define."""
    found: set[str] = set()
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found |= {node.attr} if ast.unparse(node.value) == "self" else set()
    return found | {"_pikv_original"}  # which we set on configs


def test_imports_of_transformers_are_listed():
    public, internal = set(), set()
    for file in FILES:
        for module, name in imported(file):
            if module == "transformers":
                public.add(name)
            else:
                assert file == MODEL / "versions.py", f"{file.name} imports {module}"
                internal.add(f"{module}.{name}")
    assert public - {""} == set(PUBLIC)
    assert internal == set(INTERNAL)


def test_private_names_of_transformers_and_torch_are_listed():
    ours, found = our_own(), {}
    for file in FILES:
        for name in map(str, private(file)):
            if re.match(r"_[a-z]", name) and name not in ours:
                found.setdefault(name, set()).add(file)
    for name, files in found.items():
        assert name in PRIVATE, f"{name} in {sorted(file.name for file in files)}"
        allowed = PRIVATE[name][0].split()
        for file in files:
            assert any(file.as_posix().endswith(end) for end in allowed), f"{name} in {file}"
    assert set(found) == set(PRIVATE), "a listed name is not used any more"


def test_only_one_folder_knows_what_older_versions_call_the_cache():
    for file in FILES:
        if file.parent != MODEL:
            assert "past_key_values" not in file.read_text(encoding="utf-8"), file
