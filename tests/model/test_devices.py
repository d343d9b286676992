"""Where layers run: hooks of accelerate, and weights where there is none."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import remove_hook_from_submodules
from test_placement import run_on_fakegpu
from zoo import build

from pikv_hf.model.devices import layer_devices
from pikv_hf.model.modules import attention_modules

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_a_model_without_hooks_runs_where_its_weights_are(name):
    model = build(name)
    attention = attention_modules(model)
    assert layer_devices(attention, model) == dict.fromkeys(attention, CPU)


@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_offloaded_weights_are_on_meta_but_their_layer_is_not(how, tmp_path):
    model = build("mixtral")
    attention = attention_modules(model)
    model = cpu_offload(model, CPU) if how == "cpu" else disk_offload(model, tmp_path, CPU)
    assert all(weight.is_meta for weight in attention[0][0].parameters())
    assert layer_devices(attention, model) == dict.fromkeys(attention, CPU)
    remove_hook_from_submodules(model)


def test_a_model_that_is_not_loaded_has_no_devices():
    model = build("mixtral").to("meta")
    attention = attention_modules(model)
    with pytest.raises(
        ValueError, match="`model` is a MixtralForCausalLM whose layer 0 has no wei"
    ):
        layer_devices(attention, model)


def test_several_devices():
    """Dispatched and offloaded models, beside the devices of the keys that they make."""
    run_on_fakegpu("layer_devices_on_fakegpu.py")
