"""Private names of upstream that we use are still there."""

from __future__ import annotations

import importlib
from pkgutil import resolve_name

import pytest

from tests.conftest import ROOT
from tools.private_names import PRIVATE, WHOLE_MODULES


@pytest.mark.parametrize("name", PRIVATE)
def test_a_private_name_is_still_there(name):
    _, holder, test = PRIVATE[name]
    if name.startswith("torch._"):
        importlib.import_module(name)
    else:
        path, called, more = holder.partition("()")
        found = resolve_name(path)() if called else resolve_name(path)
        assert hasattr(getattr(found, more[1:]) if more else found, name), f"{holder} has no {name} any more"
    assert list(ROOT.glob(f"tests/*/{test}")), test


@pytest.mark.parametrize("place", WHOLE_MODULES)
def test_a_module_of_private_names_has_a_test(place):
    assert (ROOT / "fsdp_qlora" / place).is_file() and list(ROOT.glob(f"tests/*/{WHOLE_MODULES[place]}"))
