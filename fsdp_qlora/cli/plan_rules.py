"""Rules on the settings of `plan` that need its tables of devices and links; imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from fsdp_qlora.config.facts import value_of
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.errors import ConfigError
from fsdp_qlora.plan.devices import find_device, find_interconnect
from fsdp_qlora.plan.sizes import parse_bytes

_READ: dict[str, Callable[[str], object]] = {
    "plan.gpu": parse_bytes,
    "plan.device": find_device,
    "plan.interconnect": find_interconnect,
}


def _readable(key: str, config: RunConfig) -> Iterator[str]:
    value = value_of(config, key)
    try:
        if value is not None:
            _READ[key](value)
    except ConfigError as error:
        yield str(error)


PLAN_RULES = tuple(partial(_readable, key) for key in _READ)
