"""Names of a sweep's jobs, and the values that an override stands for."""

from __future__ import annotations

import pytest

from fsdp_qlora.cli.jobs import job_name
from fsdp_qlora.cli.overrides import parsed
from fsdp_qlora.cli.sweep import values_of
from fsdp_qlora.errors import ConfigError


def test_the_same_overrides_are_the_same_folder_and_others_another():
    assert (
        job_name(["optim.lr=0.001", "lora.r=8"])
        == job_name(["lora.r=8", "optim.lr=0.001"])
        == "lora.r=8,optim.lr=0.001"
    )
    alike = ["a=[q,k]", "a=[q/k]", "a=[q:k]", "a=" + 200 * "x", "a=" + 201 * "x"]
    names = {job_name([choice]) for choice in alike}
    assert len(names) == len(alike) and all(len(name) <= 120 and "/" not in name for name in names)


@pytest.mark.full
@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("lora.r=8,16", ["8", "16"]),
        ("lora.r=range(4,17,4)", ["4", "8", "12", "16"]),
        ("optim.lr=1e-4,3e-4", ["0.0001", "0.0003"]),
        ("quant=glob(*,exclude=none)", ["fp4", "int8", "nf4"]),
    ],
)
def test_values_of_an_override(text, values):
    assert values_of(parsed([text])[0], None) == values


@pytest.mark.full
def test_an_interval_has_no_list_of_values():
    with pytest.raises(ConfigError, match=r"optim\.lr: an interval has no list of values"):
        values_of(parsed(["optim.lr=interval(1e-5,1e-3)"])[0], None)
