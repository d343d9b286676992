"""Arguments of `Offload`: which are refused, and how they are written on the command line."""

import pytest
from helpers import tiny

from pikv_hf import PiKVCache
from pikv_hf.cache.from_text import parse_cache
from pikv_hf.placements import Offload


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"device_bytes": -1}, r"`device_bytes` is -1; it must be a number of bytes"),
        ({"device_bytes": True}, r"`device_bytes` is True"),
        ({"device_bytes": None}, r"`device_bytes` is None"),
        ({"device_bytes": 0.5}, r"`device_bytes` is 0.5"),
        ({"device_bytes": "half"}, r"`device_bytes` is 'half'.*'2GiB'"),
        ({"ram_bytes": "2", "offload_folder": "/tmp"}, r"`ram_bytes` is '2'"),
        ({"ram_bytes": 5}, r"`ram_bytes` is 5 and `offload_folder` is None"),
        ({"offload_folder": "/tmp"}, r"`ram_bytes` is None and `offload_folder` is '/tmp'"),
        (
            {"ram_bytes": 0, "offload_folder": "/nowhere"},
            r"`offload_folder` is '/nowhere'; it must be a folder that exists",
        ),
    ],
)
def test_wrong_arguments(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        Offload(**arguments)


def test_without_a_model_there_are_no_pages_to_place() -> None:
    with pytest.raises(ValueError, match=r"`placement`.*PiKVCache\(model"):
        PiKVCache(config=tiny("mixtral").config, placement="offload")


def test_on_the_command_line() -> None:
    option = parse_cache("compressor=int8,placement=offload(device_bytes='2MiB')")
    assert option.arguments["placement"] == Offload("2MiB")
    option = parse_cache("placement=offload(ram_bytes=0, offload_folder='/tmp')")
    cache = option.make(tiny("mixtral"))
    assert cache.settings.placement == Offload(0, 0, "/tmp")
    with pytest.raises(ValueError, match="`placement` is offload"):
        parse_cache("placement=offload(gpu_bytes=3)")
