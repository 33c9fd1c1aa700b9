"""Applies `fully_shard` to the plan's units, with mixed precision and sums (not means) as the reduction."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.errors import NumericsError, PlanError
from fsdp_qlora.quant.linear import QuantLinear
from fsdp_qlora.quant.matrices import QuantMatrices
from fsdp_qlora.quant.packing import STORAGE_DTYPE
from fsdp_qlora.shapes.tokens import TOKEN_ROWS

Precision = Literal["bf16", "fp32"]


def model_dtype(precision: Precision) -> torch.dtype:
    """Return the dtype of the unquantized base parameters."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def mixed_precision(precision: Precision) -> MixedPrecisionPolicy:
    """Return FSDP's mixed-precision policy; gradients are always reduced in float32.

    ``fp32`` means *no cast* (``param_dtype=None``): a float32 ``param_dtype`` would convert packed bytes as numbers.
    """
    param_dtype = torch.bfloat16 if precision == "bf16" else None
    return MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)


def shard_model(
    model: nn.Module,
    units: Sequence[Sequence[nn.Module]],
    ranks: Ranks,
    policy: MixedPrecisionPolicy,
    reshard_after_forward: bool = True,
    offload_parameters: bool = False,
    replicated: Iterable[nn.Parameter] = (),
    on_host: Iterable[nn.Module] = (),
) -> None:
    """Shard ``model`` in place: each unit, then the model itself as the root.

    Adapters must already be attached: any attached later would be neither sharded nor reduced. With
    ``offload_parameters``, shards, gradients and optimizer states are kept in (pinned) host memory.

    Parameters in ``replicated`` stay whole and unchanged on every rank. FSDP does not reduce their gradients;
    `fsdp_qlora.adapters.replicated.ReplicatedGradients` does.

    The shards of modules in ``on_host`` are kept in host memory; see `keep_on_host`. Such a module is a unit, or part
    of a unit, in which case it becomes a unit of its own.

    Raises:
        PlanError: if the policy would cast packed bytes as if they were numbers, or copy them as such.
    """
    _refuse_casting(model, policy)
    pinned = ranks.device.type != "cpu"  # pinning requires an accelerator
    to_host = CPUOffloadPolicy(pin_memory=pinned)
    offload = to_host if offload_parameters else OffloadPolicy()
    ignored, apart = set(replicated), set(on_host)
    whole_units = {module for unit in units for module in unit}
    inside = [[module] for module in model.modules() if module in apart and module not in whole_units]
    for unit in (*inside, *units):
        fully_shard(
            list(unit), mesh=ranks.mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward,
            offload_policy=to_host if apart.intersection(unit) else offload, ignored_params=ignored,
        )  # fmt: skip
    fully_shard(
        model, mesh=ranks.mesh, mp_policy=policy, reshard_after_forward=False, offload_policy=offload,
        ignored_params=ignored,
    )  # fmt: skip
    _require_gathered_as_bytes(model, policy, ignored)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is a sum over target tokens divided by their global count, so FSDP must only add. The order of
            # these two lines matters: without the first, the second requires an operation that gloo lacks.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def keep_whole(model: nn.Module, ranks: Ranks, policy: MixedPrecisionPolicy) -> None:
    """Make ``model`` an FSDP root that manages no parameter: each rank keeps all of them, and nothing is copied.

    For one rank, or one copy of the parameters per rank. `fsdp_qlora.adapters.replicated.ReplicatedGradients` reduces
    the gradients.
    """
    fully_shard(model, mesh=ranks.mesh, mp_policy=policy, ignored_params=set(model.parameters()))


def untie_across(model: nn.Module, units: Sequence[Sequence[nn.Module]]) -> None:
    """Give each unit its own copy of a frozen meta parameter that several units share: FSDP cannot shard it twice.

    (BERT's head and the module around it share a bias.) The copies are loaded from the same tensor and never change.
    Parameters shared within one unit, such as the weight of a tied embedding and head, stay shared.
    """
    unit_of = {inner: i for i, unit in enumerate(units) for module in unit for inner in module.modules()}
    owners: dict[nn.Parameter, int] = {}
    for module in model.modules():
        mine = unit_of.get(module, -1)
        for name, parameter in list(module.named_parameters(recurse=False)):
            if owners.setdefault(parameter, mine) != mine and not parameter.requires_grad:
                setattr(module, name, nn.Parameter(torch.empty_like(parameter), requires_grad=False))


class _Reached(torch.autograd.Function):
    """The identity, which also gives a zero gradient to parameters that the layer may not use."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*parameters)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grads[0], *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


def reach_all_experts(layers: Iterable[nn.Module]) -> None:
    """Give every adapter in a layer a gradient on every rank, even for experts that none of the rank's tokens chose.

    FSDP reduces whatever gradients a rank has, in order: if experts are separate modules, ranks whose tokens chose
    different ones would add up gradients of different experts. Call it after `shard_model`.
    """

    def reach(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if not torch.is_grad_enabled():
            return None
        trained = [p for p in layer.parameters() if p.requires_grad]
        if args:
            return (_Reached.apply(args[0], *trained), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": _Reached.apply(kwargs["hidden_states"], *trained)}

    for layer in layers:
        lists = [m for m in layer.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
        if any(p.requires_grad for each in lists for p in each.parameters()):
            layer.register_forward_pre_hook(reach, with_kwargs=True)


def reach_beside_texts(base: PreTrainedModel) -> None:
    """Give whatever is trained outside a model's decoder a gradient in each forward, even of a text without images.

    Otherwise ranks with images would reduce gradients that the others lack. Call it after `shard_model`.
    """
    table, head = base.get_input_embeddings(), base.get_output_embeddings()
    inside = {module for part in (base.get_decoder(), table, head) if part is not None for module in part.modules()}
    outside = [module for module in base.modules() if module not in inside]

    def trained() -> list[nn.Parameter]:  # FSDP puts other tensors in their place while they are gathered
        return [p for module in outside for p in module.parameters(recurse=False) if p.requires_grad]

    def reach(_: nn.Module, args: tuple[Any, ...], hidden: torch.Tensor) -> torch.Tensor:
        return _Reached.apply(hidden, *trained()) if torch.is_grad_enabled() else hidden  # type: ignore[return-value]

    if trained():
        table.register_forward_hook(reach)


def host_modules(base: nn.Module, names: Collection[str]) -> list[nn.Module]:
    """Return the modules of ``base`` that own the parameters ``names`` (names before adapters were attached)."""
    found = []
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in names):
        module = base.get_submodule(owner)
        while hasattr(module, "base_layer"):  # below its adapters
            module = module.base_layer  # type: ignore[assignment]
        found.append(module)
    return found


def keep_on_host(modules: Iterable[nn.Module]) -> None:
    """Make the frozen weights of ``modules``, on meta, float32; gathering rounds them to the compute dtype.

    Values stored as bfloat16 in the files come back unchanged, so no result changes.
    """
    for module in modules:
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.float()


def set_prefetch(layers: Sequence[nn.Module], depth: int) -> None:
    """Let each layer, once gathered, start gathering the next ``depth`` layers, in forward and in backward.

    ``layers`` are sharded units in forward order. A depth of 1 is FSDP's default; with 0 a layer waits for its own
    gather, and no second layer is held.
    """
    if depth == 1:
        return
    units: list[FSDPModule] = [layer for layer in layers if isinstance(layer, FSDPModule)]
    for place, unit in enumerate(units):
        if depth == 0:  # an empty list would mean FSDP's default; prefetching the gathered unit itself does nothing
            unit.set_modules_to_backward_prefetch([unit])
            continue
        unit.set_modules_to_forward_prefetch(units[place + 1 : place + 1 + depth])
        unit.set_modules_to_backward_prefetch(units[max(0, place - depth) : place][::-1])


def skip_gather_in_backward(units: Iterable[Sequence[nn.Module]]) -> None:
    """Gather the units of a frozen embedding and of the loss head for forward only; unsharded rows may be trained.

    Nothing before a frozen embedding needs a gradient, and the head computes the gradient of its input in forward.
    FSDP cannot know this: it would gather both again and hold them while the layers compute. Tied modules are one unit:
    what is trained in one of them is needed in backward, and it is the whole unit that is gathered or not.
    """
    for unit in units:
        if not any(p.requires_grad and isinstance(p, DTensor) for module in unit for p in module.parameters()):
            for module in unit:
                if isinstance(module, FSDPModule):
                    module.set_unshard_in_backward(False)


def _refuse_casting(model: nn.Module, policy: MixedPrecisionPolicy) -> None:
    if policy.param_dtype in (None, STORAGE_DTYPE):
        return
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            raise PlanError(
                f"{name}: param_dtype={policy.param_dtype} would convert its packed bytes ({STORAGE_DTYPE}) as if they "
                "were numbers. Use precision=bf16 or precision=fp32; storage follows from it."
            )


def _require_gathered_as_bytes(model: nn.Module, policy: MixedPrecisionPolicy, ignored: Collection[object]) -> None:
    """Check that each unit with packed bytes is gathered as bytes, not as floating-point numbers.

    FSDP copies a unit's parameters into one tensor: of their dtype, if they share one after its cast, else of bytes.
    On CUDA, a copy of floating-point numbers by ``torch._foreach_copy_`` turns every NaN pattern into the same one
    (https://github.com/pytorch/pytorch/issues/159333). Statistics, which are integers, keep units with packed bytes
    from sharing one dtype.

    Raises:
        PlanError: naming the first unit that would be copied as numbers.
    """
    dtypes: dict[nn.Module, set[torch.dtype]] = {}
    packed: dict[nn.Module, str] = {}

    def visit(module: nn.Module, name: str, unit: nn.Module) -> None:
        unit = module if isinstance(module, FSDPModule) else unit
        for key, parameter in module.named_parameters(recurse=False):
            if parameter in ignored:
                continue
            cast = parameter.is_floating_point() and policy.param_dtype is not None
            dtypes.setdefault(unit, set()).add(policy.param_dtype if cast else parameter.dtype)  # type: ignore[arg-type]
            if isinstance(module, QuantMatrices) and key == "packed" and parameter.is_floating_point():
                packed[unit] = f"{name}.{key}"
        for key, child in module.named_children():
            visit(child, f"{name}.{key}" if name else key, unit)

    visit(model, "", model)
    for unit, name in packed.items():
        if len(dtypes[unit]) == 1:
            raise PlanError(
                f"{name}: its FSDP unit would be gathered as {dtypes[unit].pop()}, so CUDA would copy packed bytes as "
                "numbers and change those that are not a number. Shard it together with its statistics, which are "
                "integers."
            )


def require_sharded(model: nn.Module, ranks: Ranks, replicated: bool = False) -> None:
    """Check that every trainable parameter is a float32 DTensor on our mesh, or if ``replicated``, a whole float32 one.

    The rows of added tokens are whole in any case.

    Raises:
        NumericsError: naming the first parameter that is not; each rank would train its own copy of it.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        whole = replicated or name.endswith(TOKEN_ROWS)
        if whole and isinstance(parameter, DTensor):
            raise NumericsError(f"{name} is trained and sharded, but fsdp.adapters=replicated keeps adapters whole.")
        if not whole and (not isinstance(parameter, DTensor) or parameter.device_mesh != ranks.mesh):
            raise NumericsError(f"{name} is trained but not sharded: attach adapters before shard_model().")
        if parameter.dtype != torch.float32:
            raise NumericsError(f"{name} is trained in {parameter.dtype}; adapters are kept in float32.")


def synchronize_gradients(model: nn.Module, enabled: bool) -> None:
    """Set whether the next backward reduces gradients over the ranks or accumulates them locally.

    Until it reduces, units that stay gathered (`stay_gathered`) also stay so from one micro-batch to the next.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
    for unit in _gathered_units(model):
        unit.set_reshard_after_backward(enabled, recurse=False)


def synchronizer(trains_masters: bool) -> Callable[[nn.Module, bool], None]:
    """Return what is called before each backward with whether it is a step's last (`synchronize_gradients`).

    With ``trains_masters`` it reduces them after each micro-batch: accumulated locally, all gradients would be whole.
    """
    return (lambda model, _: synchronize_gradients(model, True)) if trains_masters else synchronize_gradients


_GATHERED = "fsdp_qlora_stays_gathered"


def stay_gathered(units: Iterable[nn.Module]) -> None:
    """Keep ``units`` gathered for the rest of the step once they are, so that they are gathered once per step."""
    for unit in units:
        if isinstance(unit, FSDPModule):
            unit.set_reshard_after_forward(False, recurse=False)
            setattr(unit, _GATHERED, True)


def release_gathered(model: nn.Module) -> None:
    """Free what `stay_gathered` holds; for forwards without a backward, which would otherwise free it."""
    for unit in _gathered_units(model):
        unit.reshard()


def release_all(model: nn.Module) -> None:
    """Free all that forwards without a backward left gathered: the root, and what `stay_gathered` holds.

    While a unit is gathered, its modules' parameters are tensors that will be freed, not those that stay.
    """
    if isinstance(model, FSDPModule):
        model.reshard()
    release_gathered(model)


def _gathered_units(model: nn.Module) -> list[FSDPModule]:
    return [m for m in model.modules() if isinstance(m, FSDPModule) and getattr(m, _GATHERED, False)]
