"""Every optimizer makes the updates of its original on one rank, keeps the bytes that the plan counts, and its blocks
can be told on any number of ranks."""

from __future__ import annotations

from dataclasses import replace

import bitsandbytes
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fsdp_qlora.checkpoint.resume import blocking_settings
from fsdp_qlora.cli.compose import compose_config
from fsdp_qlora.config import choices
from fsdp_qlora.config.convert import to_dict
from fsdp_qlora.config.rules import failures
from fsdp_qlora.config.schema import OptimSettings, RunConfig, from_dict
from fsdp_qlora.distributed.shards import row_range
from fsdp_qlora.errors import ConfigError, PlanError
from fsdp_qlora.model.skeleton import read_shapes
from fsdp_qlora.optim.blockwise import absmax_of_elements, borders_coincide, fit_blocks, quantize_state, table_shape
from fsdp_qlora.optim.bnb import BlockwiseOptimizer
from fsdp_qlora.optim.optimizers import ShardedOptimizer
from fsdp_qlora.optim.sizes import keeps_8bit, state_bytes
from fsdp_qlora.optim.state import Blocks, LocalOptimizer, parts_of
from fsdp_qlora.plan.plan import make_plan
from fsdp_qlora.plan.recipe import RATES
from fsdp_qlora.run.decide import planned_skeleton
from fsdp_qlora.simulate.step import simulate
from tests.build import config_of

OPTIMIZERS = choices.OPTIMIZERS.shipped
IN_8_BIT = tuple(name for name in OPTIMIZERS if name.endswith("_8bit"))
SHAPES = {"a": (16, 576), "b": (576, 16), "small": (8, 100), "odd": (70, 67), "vector": (5000,), "stack": (3, 40, 50)}
NEW_KEYS = ("optim.beta3", "optim.alpha", "optim.t_alpha", "optim.t_beta3", "optim.override_32bit")


def settings_of(name: str, **more) -> OptimSettings:
    """Return settings under which every part of an update counts."""
    schedules = {"t_alpha": 5, "t_beta3": 5} if name == "ademamix_8bit" else {}
    return OptimSettings(name=name, lr=1e-2, weight_decay=0.01, **schedules, **more)  # type: ignore[arg-type]


def original(name: str, parameters: list[nn.Parameter], settings: OptimSettings) -> torch.optim.Optimizer:
    """Return the upstream optimizer of that name, on whole tensors."""
    theirs = bitsandbytes.optim
    plain = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    betas = {"betas": (settings.beta1, settings.beta2)}
    match name:
        case "adamw":
            return torch.optim.AdamW(parameters, **plain, **betas)
        case "sgd":
            return torch.optim.SGD(parameters, **plain, momentum=settings.beta1)
        case "adafactor":
            return torch.optim.Adafactor(parameters, **plain)
        case "ademamix_8bit":
            three = (settings.beta1, settings.beta2, settings.beta3)
            return theirs.AdEMAMix8bit(
                parameters, **plain, betas=three, alpha=settings.alpha, t_alpha=settings.t_alpha,
                t_beta3=settings.t_beta3,
            )  # fmt: skip
    classes = {
        "adamw_8bit": theirs.AdamW8bit, "paged_adamw_8bit": theirs.PagedAdamW8bit,
        "paged_adamw_32bit": theirs.PagedAdamW32bit, "lion_8bit": theirs.Lion8bit,
    }  # fmt: skip
    return classes[name](parameters, **plain, **betas)


def gradients(shapes: dict[str, tuple[int, ...]], step: int) -> dict[str, torch.Tensor]:
    """Return gradients whose sizes are spread over some two orders of magnitude."""
    generator = torch.Generator().manual_seed(step)
    draw = lambda shape: torch.randn(shape, generator=generator)  # noqa: E731
    return {name: 1e-2 * draw(shape) * 10 ** (0.5 * draw(shape)) for name, shape in shapes.items()}


def parameters(shapes: dict[str, tuple[int, ...]]) -> dict[str, nn.Parameter]:
    """Return parameters, always the same."""
    return {name: nn.Parameter(5 * value) for name, value in gradients(shapes, 0).items()}


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_those_of_the_original(name):
    ours, theirs, settings = parameters(SHAPES), parameters(SHAPES), settings_of(name)
    optimizer, reference = ShardedOptimizer(ours.items(), settings), original(name, list(theirs.values()), settings)
    for step in range(1, 5):
        for key, gradient in gradients(SHAPES, step).items():
            ours[key].grad, theirs[key].grad = gradient.clone(), gradient.clone()
        optimizer.step(settings.lr)
        reference.step()
    for key in SHAPES:
        if name == "adafactor":  # sums in another order
            moved = (theirs[key] - parameters(SHAPES)[key]).detach().abs().max()
            assert float((ours[key] - theirs[key]).detach().abs().max() / moved) < 1e-5
        else:
            assert torch.equal(ours[key], theirs[key]), key
    planned = sum(state_bytes(settings, key, shape) for key, shape in SHAPES.items())
    assert optimizer.state_bytes() == planned


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_prepared_state_is_zero_and_as_large_as_a_used_one(name):
    ours, settings = parameters(SHAPES), settings_of(name)
    optimizer = ShardedOptimizer(ours.items(), settings)
    assert optimizer.state_bytes() == 0 and optimizer.state_tensors() == {}
    optimizer.prepare_state(7)
    assert optimizer.state_bytes() == sum(state_bytes(settings, key, shape) for key, shape in SHAPES.items())
    inner = optimizer.inner
    assert isinstance(inner, LocalOptimizer) and optimizer.state_tensors()
    for leaf, part in parts_of(optimizer._leaves, inner):
        if isinstance(part, Blocks):
            assert not part.absmax.any() and not part.table_of_codes[part.codes.long()].any()
        else:
            assert not part.local.any(), leaf.name


def test_8_bit_states_take_about_a_quarter():
    shapes = {"a": (16, 4096), "b": (4096, 16), "c": (14336, 16), "d": (16, 14336)}
    plain = sum(state_bytes(OptimSettings(), key, shape) for key, shape in shapes.items())
    for name, share in {"adamw_8bit": 0.26, "paged_adamw_8bit": 0.26, "lion_8bit": 0.13, "ademamix_8bit": 0.39}.items():
        found = sum(state_bytes(settings_of(name), key, shape) for key, shape in shapes.items())
        assert share - 0.01 < found / plain <= share, name
    assert sum(state_bytes(settings_of("adafactor"), key, shape) for key, shape in shapes.items()) < 0.05 * plain
    assert state_bytes(OptimSettings(name="sgd", beta1=0.0), "a", (16, 4096)) == 0


@pytest.mark.parametrize("name", IN_8_BIT)
def test_which_states_have_8_bits(name):
    settings = settings_of(name, override_32bit=["*.q_proj.*"])
    assert keeps_8bit(settings, "x.v_proj.lora_A.weight", 4096)
    assert not keeps_8bit(settings, "x.v_proj.lora_A.weight", 4095)
    assert not keeps_8bit(settings, "x.q_proj.lora_A.weight", 4096)
    assert not keeps_8bit(settings, "x.embed_tokens.weight", 10**6)
    assert not keeps_8bit(replace(settings, name="adamw"), "x.v_proj.lora_A.weight", 4096)
    ours = {"x.q_proj.w": nn.Parameter(torch.ones(64, 64)), "x.v_proj.w": nn.Parameter(torch.ones(64, 64))}
    optimizer = ShardedOptimizer(ours.items(), settings)
    optimizer.prepare_state(1)
    dtypes = {key.rpartition(".")[0]: t.dtype for key, t in optimizer.state_tensors().items() if "absmax" not in key}
    assert dtypes == {"x.q_proj.w": torch.float32, "x.v_proj.w": torch.uint8}


class _Watch(TorchDispatchMode):
    """Notes the elements of every gradient that an 8-bit update is given."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "optimizer_update_8bit_blockwise" in str(func):
            self.sizes.append(args[1].numel())
        return func(*args, **(kwargs or {}))


def test_ademamix_is_given_whole_blocks_only():
    """Its CUDA kernel looks for the slow moment's absmax at elements / 256, which must not be the last of the fast."""
    ours = parameters({"odd": (70, 67)})
    optimizer = ShardedOptimizer(ours.items(), settings_of("ademamix_8bit"))
    ours["odd"].grad = torch.ones(70, 67)
    with _Watch() as watch:
        optimizer.step(1e-2)
    assert watch.sizes == [19 * 256]


def test_states_are_made_in_the_memory_there_is():
    ours = parameters(SHAPES)
    optimizer = ShardedOptimizer(ours.items(), settings_of("paged_adamw_8bit"))
    optimizer.prepare_state(1)
    inner = optimizer.inner
    assert isinstance(inner, BlockwiseOptimizer) and optimizer.notice is not None
    before = [s["state1"].data_ptr() for s in inner.state.values()]
    optimizer.prepare_state(2)
    assert [s["state1"].data_ptr() for s in inner.state.values()] == before
    assert {s["step"] for s in inner.state.values()} == {2}


def test_where_borders_coincide():
    assert borders_coincide((16, 4096), 2) and borders_coincide((16, 4096), 3) and borders_coincide((4096, 16), 8)
    assert borders_coincide((576, 16), 2) and not borders_coincide((576, 8), 4) and not borders_coincide((70, 67), 2)
    assert borders_coincide((1, 100), 4)  # one row is one rank's
    assert borders_coincide((5000,), 1)


def _saved(shape: tuple[int, ...], num_ranks: int, codes_of: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a tensor as ``num_ranks`` ranks would; return codes and table."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    codes, table = torch.empty(shape, dtype=torch.uint8), torch.zeros(table_shape(shape, num_ranks))
    for rank in range(num_ranks):
        start, stop = row_range(shape[0], rank, num_ranks)
        if start < stop:
            codes[start:stop], absmax = quantize_state(values[start:stop], codes_of)
            table[rank, : absmax.numel()] = absmax
    return codes, table


@pytest.mark.parametrize("shape", [(16, 576), (70, 67), (5000,), (3, 2000)], ids=str)
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (3, 2), (4, 1)])
def test_blocks_of_other_ranks(shape, before, after):
    codes_of = bitsandbytes.functional.create_dynamic_map(signed=True)
    codes, table = _saved(shape, before, codes_of)
    meant = codes_of[codes.long()].flatten() * absmax_of_elements(table, shape, (0, shape[0]))
    again, wanted = torch.empty_like(meant).view(shape), torch.empty_like(meant).view(shape)
    for rank in range(before):  # what the elements mean is what bitsandbytes says
        rows = slice(*row_range(shape[0], rank, before))
        if codes[rows].numel():
            wanted[rows] = bitsandbytes.functional.dequantize_blockwise(
                codes[rows], absmax=table[rank, : -(-codes[rows].numel() // 256)], code=codes_of, blocksize=256
            )
    assert torch.equal(meant.view(shape), wanted)
    new_table = torch.zeros(table_shape(shape, after))
    for rank in range(after):
        start, stop = row_range(shape[0], rank, after)
        mine, absmax = codes[start:stop].clone(), torch.zeros(-(-codes[start:stop].numel() // 256))
        fit_blocks(mine, absmax, codes_of, table, shape, rank, after)
        new_table[rank, : absmax.numel()] = absmax
        again[start:stop] = mine
    now_meant = codes_of[again.long()].flatten() * absmax_of_elements(new_table, shape, (0, shape[0]))
    if borders_coincide(shape, before) and borders_coincide(shape, after):
        assert torch.equal(again.to(torch.uint8), codes) and torch.equal(now_meant, meant)
    largest = torch.maximum(
        absmax_of_elements(table, shape, (0, shape[0])), absmax_of_elements(new_table, shape, (0, shape[0]))
    )
    assert float(((now_meant - meant).abs() / largest).max()) < 0.0075  # half of the widest gap between two codes


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_has_settings(name):
    config = compose_config("train", [f"optim={name}"])
    assert config.optim.name == name
    assert config.optim.lr == ("auto" if "adamw" in name else RATES[name])  # what auto takes for the others


def test_an_unknown_optimizer_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match=r"optim: 'adamw_9bit' is not one of .*Did you mean 'adamw_8bit'") as raised:
        compose_config("train", ["optim=adamw_9bit"])
    assert raised.value.exit_code == 2
    odd = from_dict({"optim": {"name": "ademamix_8bit", "t_beta3": 9, "beta1": 0.0, "alpha": -1.0}})
    assert {message.partition(":")[0] for message in failures(odd)} == {"optim.t_beta3", "optim.alpha"}


def test_a_pattern_that_matches_nothing_is_named(tiny_model):
    patterns = ["*.q_proj.*", "q_proj", "*.w_proj.*"]
    config, base = planned_skeleton(config_of(str(tiny_model), optim={"name": "adamw_8bit"}))
    shapes = read_shapes(base)
    with pytest.raises(PlanError, match=r"optim.override_32bit: 'q_proj', '\*.w_proj.\*' matches none") as raised:
        make_plan(replace(config, optim=replace(config.optim, override_32bit=patterns)), shapes, 2)
    assert raised.value.exit_code == 2
    make_plan(replace(config, optim=replace(config.optim, override_32bit=patterns[:1])), shapes, 2)


def test_settings_that_an_optimizer_does_not_read_block_no_resume():
    found = {name: blocking_settings(to_dict(RunConfig(optim=OptimSettings(name=name)))) for name in OPTIMIZERS}  # type: ignore[arg-type]
    assert not any(key in found["adamw"] for key in NEW_KEYS)  # as before these keys were there
    assert [key for key in NEW_KEYS if key in found["adamw_8bit"]] == ["optim.override_32bit"]
    assert all(key in found["ademamix_8bit"] for key in NEW_KEYS)


@pytest.mark.parametrize(
    "name", [n if n in ("adamw_8bit", "adafactor") else pytest.param(n, marks=pytest.mark.full) for n in OPTIMIZERS]
)
def test_a_step_can_be_simulated(tiny_model, name):
    config = config_of(str(tiny_model), optim={"name": name}, lora={"r": 32})
    found = simulate(config, 2)
    planned = make_plan(config, read_shapes(planned_skeleton(config)[1]), 2).bytes.optimizer
    # more are torch's step counters and the tables of codes
    assert planned <= found.places["forward of the embedding"].optimizer <= planned + 2048 + 4 * 14 * 4


def test_adamw_on_a_cpu_is_not_fused():
    """Its bits are promised, and there is no launch to save."""
    inner = ShardedOptimizer({"a": nn.Parameter(torch.ones(2, 2))}.items(), settings_of("adamw")).inner
    assert inner.defaults["fused"] is False and inner.defaults["foreach"] is True
