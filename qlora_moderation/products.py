"""Products of one input with frozen weights and their adapters.

In: x [T, in]. Out: y_i = x W_i' + bias_i + scale_i (x A_i') B_i' for each linear layer i that reads x, and the way back.
Part of step 6.

The adapters' inner products of all layers are one product, the adapter's share is added to y in place, and the gradients
towards x are summed in place. A weight in NF4 is unpacked once in the forward and once in the backward pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

Factors = tuple[torch.Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Product:
    """A linear layer and its adapter, if it has one."""

    layer: Any
    adapter: LoraLayer | None = None

    @property
    def factors(self) -> Factors:
        """A [r, in] and B [out, r], or nothing."""
        if self.adapter is None:
            return ()
        return self.adapter.lora_A["default"].weight, self.adapter.lora_B["default"].weight

    @property
    def scale(self) -> float:
        """What the adapter's product is multiplied by."""
        return 0.0 if self.adapter is None else self.adapter.scaling["default"]

    def weight(self) -> torch.Tensor:
        """Return [out, in] in the compute type; asked for in each pass, as sharding replaces it and NF4 is unpacked."""
        state = getattr(self.layer, "quant_state", None)
        if state is None:
            return self.layer.weight
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.layer.weight, state)

    def can_run(self, x: torch.Tensor) -> bool:
        """Say whether weight and bias are frozen and of the input's type, and the adapter switched on and not merged."""
        compute = self.layer.compute_dtype if hasattr(self.layer, "quant_state") else self.layer.weight.dtype
        frozen = not (torch.is_grad_enabled() and any(p.requires_grad for p in self.layer.parameters(recurse=False)))
        off = self.adapter is not None and (self.adapter.disable_adapters or self.adapter.merged)
        return frozen and x.dtype == compute and not off


def has_plain_adapter(module: nn.Module) -> bool:
    """Say whether a module is a linear layer with LoRA alone: no dropout, no bias, no variant such as DoRA."""
    return (
        isinstance(module, LoraLayer)
        and isinstance(module.base_layer, nn.Linear)
        and list(module.lora_A) == ["default"]
        and not module.lora_variant
        and not module.lora_bias["default"]
        and isinstance(module.lora_dropout["default"], nn.Identity)
    )


def find_product(module: nn.Module) -> Product | None:
    """Return the product that a module computes, or None where it computes more than one."""
    if isinstance(module, LoraLayer):
        return Product(module.base_layer, module) if has_plain_adapter(module) else None
    return Product(module) if isinstance(module, nn.Linear) else None


def collect_factors(products: Sequence[Product]) -> list[torch.Tensor]:
    """Return the factors of all products in their order."""
    return [factor for product in products for factor in product.factors]


def deal_factors(products: Sequence[Product], factors: Sequence[torch.Tensor]) -> list[Factors]:
    """Give each product its own of what `collect_factors` returned."""
    rest = iter(factors)
    return [() if product.adapter is None else (next(rest), next(rest)) for product in products]


def multiply(
    products: Sequence[Product], x: torch.Tensor, factors: Sequence[Factors]
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Return y_i [T, out_i], and h [T, sum of r_i], the scaled inner products, which the way back needs."""
    outputs = [torch.nn.functional.linear(x, product.weight(), product.layer.bias) for product in products]
    inner = _stack_inner(factors, x.dtype)
    if inner is None:
        return outputs, None
    h = x @ inner.t()
    for product, own, y, part in zip(products, factors, outputs, _split(h, factors), strict=True):
        if own:
            y.addmm_(part.mul_(product.scale), own[1].to(x.dtype).t())
    return outputs, h


def pull_back(
    products: Sequence[Product],
    gradients: Sequence[torch.Tensor],
    x: torch.Tensor,
    h: torch.Tensor | None,
    factors: Sequence[Factors],
    wants_dx: bool,
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """Return the gradient of x, None where it is not wanted, and those of the factors in the order of `collect_factors`."""
    dx = None
    if wants_dx:
        for product, dy in zip(products, gradients, strict=True):
            dx = dy @ product.weight() if dx is None else dx.addmm_(dy, product.weight())
    inner = _stack_inner(factors, x.dtype)
    if inner is None or h is None:
        return dx, []
    dh = torch.empty_like(h)
    for product, own, dy, part in zip(products, factors, gradients, _split(dh, factors), strict=True):
        if own:
            part.copy_(dy @ own[1].to(x.dtype)).mul_(product.scale)
    if dx is not None:
        dx.addmm_(dh, inner)
    of_inner = _split((dh.t() @ x).t(), factors)
    found = []
    for own, dy, part, of_a in zip(factors, gradients, _split(h, factors), of_inner, strict=True):
        if own:
            found += [of_a.t().to(own[0].dtype), (dy.t() @ part).to(own[1].dtype)]
    return dx, found


def _stack_inner(factors: Sequence[Factors], dtype: torch.dtype) -> torch.Tensor | None:
    """Return all A_i, one below the other, in the compute type."""
    inner = [own[0].to(dtype) for own in factors if own]
    return torch.cat(inner) if len(inner) > 1 else inner[0] if inner else None


def _split(columns: torch.Tensor, factors: Sequence[Factors]) -> list[torch.Tensor]:
    """Return views on the columns that belong to each product; none for one without adapter."""
    return list(columns.split([own[0].shape[0] if own else 0 for own in factors], dim=1))
