"""The parts of a decoder layer, each as one differentiable operation that keeps and copies less than the stock ones.

In: a decoder whose backbone is frozen, with or without adapters. Out: the same modules, computing the same. Part of step 6.

Queries, keys and values are one operation, rotated in place; so is the feed-forward part, of which only the outputs of its gate
and up products are kept; so is a norm, which keeps its input and one number a row.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qlora_moderation.last_layer import ATTENTIONS
from qlora_moderation.products import (
    Product,
    collect_factors,
    deal_factors,
    find_product,
    has_plain_adapter,
    multiply,
    pull_back,
)

_NORMS = {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"}
_FEED_FORWARDS = {"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP"}
_SILU = {"SiLU", "SiLUActivation"}

Products = tuple[Product, ...]


class _Linear(torch.autograd.Function):
    """One product with a frozen weight and its adapter."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, product: Product, *factors: torch.Tensor) -> torch.Tensor:
        (y,), h = multiply((product,), x, [factors])
        ctx.product = product
        ctx.save_for_backward(x, h, *factors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        x, h, *factors = ctx.saved_tensors
        dx, gradients = pull_back((ctx.product,), (dy,), x, h, [tuple(factors)], ctx.needs_input_grad[0])
        return dx, None, *gradients


class _QueriesKeysValues(torch.autograd.Function):
    """Queries and keys, rotated by their positions (Su et al. 2021, arXiv:2104.09864), and values: each [T, heads, size]."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, products: Products, *factors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        outputs, h = multiply(products, x, deal_factors(products, factors))
        parts = [y.view(len(x), -1, 2 * cos.shape[-1]) for y in outputs]
        for part in parts[:2]:
            _rotate(part, cos, sin, part)
        ctx.products = products
        ctx.save_for_backward(x, h, cos, sin, *factors)
        return tuple(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        x, h, cos, sin, *factors = ctx.saved_tensors
        dq, dk, dv = gradients
        turned = [_rotate(part, cos, -sin, torch.empty_like(part)).reshape(len(x), -1) for part in (dq, dk)]
        own = deal_factors(ctx.products, factors)
        dx, found = pull_back(ctx.products, (*turned, dv.reshape(len(x), -1)), x, h, own, ctx.needs_input_grad[0])
        return dx, None, None, None, *found


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x_i, x_{i + size / 2}) by its angle; [T, heads, size], cos and sin [T, size / 2], `out` may be x."""
    first, second = x.chunk(2, dim=-1)
    out_first, out_second = out.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    turned = (first * cos).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    out_first.copy_(turned)
    return out


class _FeedForward(torch.autograd.Function):
    """y = down(silu(gate(x)) * up(x))."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, products: Products, *factors: torch.Tensor) -> torch.Tensor:
        own = deal_factors(products, factors)
        (g, u), h = multiply(products[:2], x, own[:2])
        (y,), h_down = multiply(products[2:], torch.nn.functional.silu(g).mul_(u), own[2:])
        ctx.products = products
        ctx.save_for_backward(x, g, u, h, h_down, *factors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        x, g, u, h, h_down, *factors = ctx.saved_tensors
        products, own = ctx.products, deal_factors(ctx.products, factors)
        activated = torch.nn.functional.silu(g)
        inner, of_down = pull_back(products[2:], (dy,), activated * u, h_down, own[2:], True)
        assert inner is not None
        du = activated.mul_(inner)
        dg = torch.ops.aten.silu_backward(inner.mul_(u), g)
        dx, of_both = pull_back(products[:2], (dg, du), x, h, own[:2], ctx.needs_input_grad[0])
        return dx, None, *of_both, *of_down


class _Norm(torch.autograd.Function):
    """y = w x / sqrt(mean(x²) + eps) (Zhang and Sennrich 2019, arXiv:1910.07467), w frozen."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        x, weight, scale = ctx.saved_tensors
        wide = x.float()
        dx = dy.float() * weight
        along = torch.linalg.vecdot(dx, wide).unsqueeze(-1).mul_(scale.pow(3)).div_(-x.shape[-1])
        return dx.mul_(scale).addcmul_(wide, along).to(x.dtype), None, None


def _find_products(x: torch.Tensor, *modules: nn.Module) -> Products:
    """Return the products of all modules; none where one of them must run as it stands."""
    found = [find_product(module) for module in modules]
    products = tuple(product for product in found if product is not None and product.can_run(x))
    return products if len(products) == len(modules) else ()


def _run_linear(self: Any, x: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
    product = find_product(self)  # another adapter may have come since
    if arguments or keywords or product is None or not product.can_run(x):
        return type(self).forward(self, x, *arguments, **keywords)
    with torch.autocast(x.device.type, enabled=False):
        y = _Linear.apply(x.reshape(-1, x.shape[-1]), product, *product.factors)
    return y.view(*x.shape[:-1], -1)


def _run_attention(
    self: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    segments: Any = None,
    **keywords: Any,
) -> tuple[torch.Tensor, None]:
    x = hidden_states
    products = _find_products(x, self.q_proj, self.k_proj, self.v_proj)
    if segments is None or position_embeddings is None or not products or position_embeddings[0].dtype != x.dtype:
        more = keywords if segments is None else {**keywords, "segments": segments}
        return type(self).forward(self, hidden_states, position_embeddings, attention_mask, **more)
    half = self.head_dim // 2
    cos, sin = (part[0, :, :half] for part in position_embeddings)
    with torch.autocast(x.device.type, enabled=False):
        parts = _QueriesKeysValues.apply(x[0], cos, sin, products, *collect_factors(products))
    queries, keys, values = (part.transpose(0, 1)[None] for part in parts)
    dropout = self.attention_dropout if self.training else 0.0
    attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
    attended, _ = attend(
        self, queries, keys, values, attention_mask, scaling=self.scaling, dropout=dropout, segments=segments
    )
    return self.o_proj(attended.reshape(*x.shape[:-1], -1)), None


def _run_feed_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    products = _find_products(x, self.gate_proj, self.up_proj, self.down_proj)
    if not products:
        return type(self).forward(self, x)
    with torch.autocast(x.device.type, enabled=False):
        y = _FeedForward.apply(x.reshape(-1, x.shape[-1]), products, *collect_factors(products))
    return y.view(x.shape)


def _run_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    if (torch.is_grad_enabled() and self.weight.requires_grad) or x.dtype != self.weight.dtype:
        return type(self).forward(self, x)
    with torch.autocast(x.device.type, enabled=False):
        if x.is_cuda:  # one kernel each way
            return torch.nn.functional.rms_norm(x, (x.shape[-1],), self.weight, self.variance_epsilon)
        return _Norm.apply(x, self.weight, self.variance_epsilon)


def fuse_layers(network: nn.Module) -> int:
    """Let the layers of a decoder compute as described above, wherever that gives what the stock layers give.

    Dropout, DoRA, trainable weights and other kinds of layers stay as they are; so does, call by call, what another type of
    inputs, the padded layout, a switched off or a merged adapter asks for.

    Args:
        network: a stock classifier, or PEFT's wrapper around one.

    Returns:
        The number of modules that changed.
    """
    count = 0
    for module in network.modules():
        run = _choose(module)
        if run is not None and "forward" not in vars(module):
            module.forward = types.MethodType(run, module)
            count += 1
    return count


def _choose(module: nn.Module) -> Callable[..., Any] | None:
    kind = type(module).__name__
    if kind in _NORMS:
        return _run_norm
    if kind in ATTENTIONS:
        return _run_attention
    if kind in _FEED_FORWARDS and type(module.act_fn).__name__ in _SILU:
        return _run_feed_forward
    return _run_linear if has_plain_adapter(module) else None
