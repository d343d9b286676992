"""`pikv plan`: tables and maps of models of which there is only a config."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from command_line import pikv
from transformers import DeepseekV3Config, GptOssConfig, PreTrainedConfig, Qwen3MoeConfig

from pikv_hf.cache.device_plan import GIB

# Published sizes; defaults of the config classes of gpt-oss-120b and DeepSeek-V3 are theirs.
QWEN3_30B = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "max_position_embeddings": 262144,
}
DEEPSEEK_V3 = {"num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
GPT_OSS_120B = {
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "quantization_config": {"quant_method": "mxfp4"},
}


def saved(folder: Path, config: PreTrainedConfig, architecture: str) -> Path:
    config.architectures = [architecture]
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    return folder


@pytest.fixture
def qwen3(tmp_path: Path) -> Path:
    return saved(tmp_path / "qwen3", Qwen3MoeConfig(**QWEN3_30B), "Qwen3MoeForCausalLM")


def planned(*args: object) -> dict[str, Any]:
    """The file that the command writes, with what it prints checked against it."""
    path = Path(str(args[args.index("--model") + 1])).parent / "plan.json"
    result = pikv("plan", *args, "--json", path)
    assert result.exit_code == 0, result.output
    plan = json.loads(path.read_text())
    script = path.with_name("maps.py")
    script.write_text("\n".join(re.findall(r"(?m)^(?:kv_)?device_map = .*$", result.output)))
    namespace = runpy.run_path(str(script))
    assert namespace["device_map"] == plan["device_map"]
    assert namespace["kv_device_map"] == plan["kv_device_map"]
    for load in plan["devices"]:
        sizes = [load["weight_bytes"], load["kv_bytes"], load["weight_bytes"] + load["kv_bytes"]]
        assert all(f"{size / GIB:.2f}" in result.output for size in (*sizes, load["max_bytes"]))
    return plan | {"output": " ".join(result.output.split())}


def total(plan: dict[str, Any], name: str) -> float:
    return sum(load[name] for load in plan["devices"]) / GIB


def test_plan_of_qwen3(qwen3):
    args = ("--model", qwen3, "--gpus", "4x80GiB", "--length", "131072", "--batch", "4")
    plan = planned(*args)
    # 2 * 4 heads * 128 dims * 2 bytes * 48 layers of 4 * 131072 tokens, in GiB; 30.5 * 10^9 weights.
    assert total(plan, "kv_bytes") == pytest.approx(48, rel=0.01)
    assert total(plan, "weight_bytes") == pytest.approx(2 * 30.53e9 / GIB, rel=0.01)
    layers = ["layers.0-11", "layers.12-23", "layers.24-35", "layers.36-47"]
    assert plan["kv_device_map"] == {key: device for device, key in enumerate(layers)}
    assert plan["device_map"]["model.embed_tokens"] == 0 and plan["device_map"]["lm_head"] == 3
    small = planned(*args, "--scheduler", "snapkv", "--budget", "25%", "--compressor", "int4")
    assert total(small, "kv_bytes") < total(plan, "kv_bytes") / 12
    assert "SnapKV" in small["cache"] or "snapkv" in small["cache"]


def test_plan_of_gpt_oss_counts_windows_and_names_the_quantization(tmp_path):
    config = GptOssConfig(**GPT_OSS_120B)
    folder = saved(tmp_path / "gpt_oss", config, "GptOssForCausalLM")
    args = ("--model", folder, "--gpus", "4x80GiB", "--length", "131072", "--batch", "4")
    plan = planned(*args)
    # 18 full layers of 2 * 8 heads * 64 dims * 2 bytes; sliding ones hold 127 tokens.
    assert total(plan, "kv_bytes") == pytest.approx(18, rel=0.01)
    assert "weights are quantized (mxfp4); here they are counted in bfloat16." in plan["output"]


def test_plan_of_deepseek_v3_counts_latents(tmp_path):
    folder = saved(tmp_path / "deepseek", DeepseekV3Config(**DEEPSEEK_V3), "DeepseekV3ForCausalLM")
    args = ("--gpus", "24x80GiB,2x40GiB", "--length", "131072", "--batch", "4")
    plan = planned("--model", folder / "config.json", *args)
    # 576 numbers of 2 bytes in 61 layers of 4 * 131072 tokens.
    assert total(plan, "kv_bytes") == pytest.approx(34.3, rel=0.01)
    assert [load["max_bytes"] // GIB for load in plan["devices"]] == [80] * 24 + [40] * 2


def test_plan_of_the_bundled_model_reads_no_weights(monkeypatch):
    monkeypatch.setattr("safetensors.safe_open", None)
    result = pikv("plan", "--gpus", "2x1GiB", "--length", "1024", "--cache", "keydiff,budget=256")
    assert result.exit_code == 0, result.output
    assert "bundled model: 1 row of 1024 tokens, keydiff, budget=256" in " ".join(
        result.output.split()
    )
    assert 'kv_device_map = {"layers.0": 0, "layers.1": 1}' in result.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--gpus", "four"), "--gpus: 'four' is not understood; give 4x80GiB"),
        (("--gpus", "0x80GiB"), "--gpus: '0x80GiB' is not understood"),
        (("--gpus", "80GiB,"), "--gpus: '80GiB,' is not understood"),
        (("--gpus", "1GiB", "--cache", "dynamic"), "'dynamic' is not planned; give a PiKVCache"),
        (("--gpus", "1GiB", "--compressor", "int5"), "`compressor` is 'int5'"),
        (("--gpus", "1GiB", "--scheduler", "snapkv"), "needs a budget"),
        (("--gpus", "2x1MB"), "do not fit: each device lacks"),
        (("--gpus", "1GiB", "--model", "/nowhere"), "--model: /nowhere could not be loaded"),
        (("--gpus", "1GiB", "--json", "/nowhere/plan.json"), "--json: /nowhere/plan.json cannot"),
    ],
)
def test_wrong_use_is_one_sentence(args, message):
    result = pikv("plan", "--length", "4096", *args)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
