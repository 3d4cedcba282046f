"""Quantized frozen weights for LoRA training: fp8 (faster on Ada and newer), int8 and nf4 (arXiv 2305.14314; smaller).

Quantizes the linear layers of attention and feed-forward in the blocks, which are applied to every token. adaLN,
embeddings and the output layer act on one vector per sample or run once per step: they stay as they are, 14 % of a
5b's weights and 21 % of a 2b's. Axes: M tokens, K input features, N output features.
"""

import functools
import logging
from collections.abc import Sequence

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional as F

from base.errors import UsageError


logger = logging.getLogger(__name__)

BASE_LINEARS = (".to_q", ".to_k", ".to_v", ".to_out.0", ".ff.net.0.proj", ".ff.net.2")
FP8, FP8_MAX = torch.float8_e4m3fn, 448.0
FP8_CAPABILITY = (8, 9)  # Ada: the first GPUs with fp8 matmul, and the first that torch compiles fp8 kernels for
MIN_AMAX = 1e-30  # divisor for rows of zeros; below any bf16 gradient
INT8_MAX = 127
NF4_BLOCK, NF4_STATISTICS_BLOCK = 64, 256  # weights per scale, scales per second-level scale


# ---------------------------------------------------------------- the model


def quantize_base(transformer: nn.Module, precision: str, device: torch.device | None = None) -> None:
    """Replace the frozen linear layers of all blocks, plain or under a LoRA, by layers quantized to `precision`.

    One layer at a time, computed on `device` and stored where the weights were: the model never exists twice. Adapters
    must be added before, because peft cannot adapt the quantized layers.
    """
    kind = {"fp8": Fp8Linear, "int8": Int8Linear, "nf4": Nf4Linear}[precision]
    blocks, before, after, total = transformer.transformer_blocks, 0, 0, num_bytes(transformer)
    # Names, not modules: a list of modules would keep the replaced weights alive
    for name in [name for name, _ in blocks.named_modules() if name.endswith(BASE_LINEARS)]:
        name = f"{name}.base_layer" if isinstance(blocks.get_submodule(name), LoraLayer) else name
        linear = blocks.get_submodule(name)
        before += num_bytes(linear)
        home = linear.weight.device
        small = kind(linear.to(device or home)).to(home)
        after += num_bytes(small)
        parent, _, own_name = name.rpartition(".")
        setattr(blocks.get_submodule(parent), own_name, small)
    logger.info(
        "--base_precision %s: frozen weights take %.2f GiB instead of %.2f; layers that run on one vector per sample, "
        "%.0f %% of all weights, keep their precision",
        precision,
        (total - before + after) / 2**30,
        total / 2**30,
        100 * (total - before) / total,
    )


def num_bytes(module: nn.Module) -> int:
    """Bytes of the frozen parameters."""
    return sum(param.nbytes for param in module.parameters() if not param.requires_grad)


def unquantized_bytes(transformer: nn.Module) -> int:
    """Bytes of all parameters, quantized layers counted at their original size."""
    num_bytes = sum(param.nbytes for param in transformer.parameters())
    for layer in transformer.modules():
        if isinstance(layer, FrozenLinear):
            num_bytes += layer.in_features * layer.out_features * layer.compute_dtype.itemsize
            num_bytes -= sum(part.nbytes for part in layer.stored())
    return num_bytes


def check_base_precision(precision: str, dtype: torch.dtype, device: torch.device) -> None:
    """Raise UsageError for what this machine cannot compute; called before anything is loaded."""
    if precision == "fp8":
        check_fp8(dtype, device)
    if precision == "nf4":
        import_bitsandbytes()


def check_fp8(dtype: torch.dtype, device: torch.device) -> None:
    if device.type != "cuda":
        logger.warning("--base_precision fp8: only a GPU computes in fp8; here its rounding is emulated in fp32")
        return
    if dtype != torch.bfloat16:
        raise UsageError("--base_precision fp8: its matmuls return bf16 only; give --mixed_precision bf16")
    if torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        raise UsageError(
            f"--base_precision fp8 needs a GPU of compute capability 8.9 (Ada, Hopper) or newer, this one has "
            f"{capability}; use int8 or nf4"
        )


def import_bitsandbytes():
    try:
        import bitsandbytes
    except ImportError as error:
        raise UsageError(f"--base_precision nf4: needs bitsandbytes ({error}); pip install bitsandbytes") from error
    return bitsandbytes


# ---------------------------------------------------------------- layers


class FrozenLinear(nn.Module):
    """A frozen linear layer; subclasses quantize its weight [N, K] and dequantize it for each matmul.

    `qweight` and `compute_dtype` are the names by which peft finds device and dtype for further adapters. There is no
    `weight` on purpose: peft would merge an adapter into the dequantized copy, and the result would be lost.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.compute_dtype = linear.weight.dtype
        self.bias = linear.bias

    def store(self, **tensors: torch.Tensor) -> None:
        """Register as frozen parameters, so that they are moved, streamed and counted like any weight."""
        for name, tensor in tensors.items():
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return frozen_linears(x, [self])[0]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Fp8Linear(FrozenLinear):
    """e4m3 weight with a scale per row; inputs and gradients are rounded to e4m3 too, with a scale per token."""

    @torch.no_grad()
    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        qweight, scale = round_rows(linear.weight)
        self.store(qweight=qweight, scale=scale)  # [N, K], [N, 1]

    def stored(self) -> tuple[torch.Tensor, ...]:
        return self.qweight, self.scale

    @staticmethod
    def unpack(dtype: torch.dtype, qweight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (qweight.float() * scale).to(dtype)


class Int8Linear(FrozenLinear):
    """int8 weight with a scale per row."""

    @torch.no_grad()
    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        weight = linear.weight.float()
        scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(MIN_AMAX) / INT8_MAX
        self.store(qweight=(weight / scale).round().to(torch.int8), scale=scale)  # [N, K], [N, 1]

    def stored(self) -> tuple[torch.Tensor, ...]:
        return self.qweight, self.scale

    @staticmethod
    def unpack(
        dtype: torch.dtype, qweight: torch.Tensor, scale: torch.Tensor, in_backward: bool = False
    ) -> torch.Tensor:
        return (scale * qweight if in_backward else qweight * scale).to(dtype)


class Nf4Linear(FrozenLinear):
    """bitsandbytes' 4-bit NormalFloat in blocks of 64 with 8-bit scales: 0.516 bytes per weight."""

    @torch.no_grad()
    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        functional = import_bitsandbytes().functional
        # compress_statistics: the absmax of a block is itself quantized to 8 bits, with a scale per 256 of them
        packed, state = functional.quantize_4bit(
            linear.weight.detach(), blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=True
        )
        self.store(
            qweight=packed.view(self.out_features, -1),  # [N, K / 2]
            statistics=state.absmax,  # uint8 per block, an index into `code`
            code=state.state2.code.clone(),  # [256]; cloned, since bitsandbytes shares one between all layers
            statistics_scale=state.state2.absmax,  # per 256 statistics
            statistics_mean=state.offset,  # []
        )

    def stored(self) -> tuple[torch.Tensor, ...]:
        return self.qweight, self.statistics, self.code, self.statistics_scale, self.statistics_mean

    @staticmethod
    def unpack(dtype: torch.dtype, qweight, statistics, code, scale, mean, in_backward: bool = False) -> torch.Tensor:
        shape = (qweight.shape[0], 2 * qweight.shape[1])
        scales = scale.repeat_interleave(NF4_STATISTICS_BLOCK)[: len(statistics)]
        absmax = code[statistics.int()] * scales + mean  # [N K / 64]
        # The shape asked for differs in backward, so that the compiler does not see the same call twice
        asked = (1, shape[0] * shape[1]) if in_backward else shape
        weight = torch.ops.bitsandbytes.dequantize_4bit(qweight, absmax, NF4_BLOCK, "nf4", asked, dtype)
        return weight.view(shape)


# ---------------------------------------------------------------- products


def frozen_linears(x: torch.Tensor, layers: Sequence[nn.Module]) -> list[torch.Tensor]:
    """Outputs [..., N] of `layers` for the same input [..., K], sharing work between them where possible."""
    products = frozen_products(x, layers)
    if len(products) == len(layers):
        return products
    return list(products[0].split([layer.out_features for layer in layers], dim=-1))


def frozen_products(x: torch.Tensor, layers: Sequence[nn.Module]) -> list[torch.Tensor]:
    """One output per layer; or a single one with all of them concatenated, if one matmul computes them.

    Plain frozen linear layers are fused as well. Only the stored weights are saved for the backward pass, which
    returns the gradient of `x` alone.
    """
    kind = type(layers[0])
    if any(type(layer) is not kind for layer in layers):
        return [layer(x) for layer in layers]
    if kind is Fp8Linear:
        stored = [tensor for layer in layers for tensor in (layer.qweight, layer.scale, layer.bias)]
        return list(Fp8Products.apply(x, *stored))
    if issubclass(kind, FrozenLinear):
        stored = [tensor for layer in layers for tensor in (layer.bias, *layer.stored())]
        return [WeightOnlyProduct.apply(x, kind.unpack, len(layers), *stored)]
    if kind is not nn.Linear or any(layer.weight.requires_grad for layer in layers):
        return [layer(x) for layer in layers]
    stored = [tensor for layer in layers for tensor in (layer.bias, layer.weight)]
    return [WeightOnlyProduct.apply(x, keep_weight, len(layers), *stored)]


def keep_weight(dtype: torch.dtype, weight: torch.Tensor, in_backward: bool = False) -> torch.Tensor:
    return weight


class WeightOnlyProduct(torch.autograd.Function):
    """x W^T + b for layers of one kind, concatenated into one matmul; W is dequantized in each pass and never saved.

    Inputs: x, `unpack`, the number of layers; then per layer the bias or None, and the arguments of `unpack`. The
    backward pass dequantizes W with `in_backward`, written differently from the forward pass: otherwise common-subexpression
    elimination keeps the first W alive, 2 bytes per weight.
    """

    @staticmethod
    def forward(ctx, *inputs):  # one *inputs: with further names, dynamo counts them as for a forward without ctx
        x, unpack, num_layers, *stored = inputs
        ctx.save_for_backward(*stored)
        ctx.unpack, ctx.num_layers = unpack, num_layers
        biases, parts = by_layer(stored, num_layers)
        weights = [unpack(x.dtype, *tensors) for tensors in parts]  # each [N, K]
        bias = None if biases[0] is None else join(biases)
        return F.linear(x, join(weights), bias)

    @staticmethod
    def backward(ctx, grad):
        stored = ctx.saved_tensors  # read once: checkpointing raises on a second read
        _, parts = by_layer(stored, ctx.num_layers)
        weights = [ctx.unpack(grad.dtype, *tensors, in_backward=True) for tensors in parts]
        # Pairwise concatenation, for the same reason as `in_backward`
        joined = functools.reduce(lambda first, second: torch.cat([first, second]), weights)
        return grad @ joined, None, None, *[None] * len(stored)


def by_layer(stored: Sequence, num_layers: int) -> tuple[list, list]:
    """(the first tensor of each layer, the remaining tensors of each layer)."""
    size = len(stored) // num_layers
    parts = [stored[start : start + size] for start in range(0, len(stored), size)]
    return [part[0] for part in parts], [part[1:] for part in parts]


def join(tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


class Fp8Products(torch.autograd.Function):
    """x W^T + b of each layer in fp8; inputs: x, then per layer qweight, scale and bias (or None).

    Plain operations, so that the compiler fuses the rounding with whatever produces x and the gradients.
    """

    @staticmethod
    def forward(ctx, *inputs):
        x, *stored = inputs
        qweights, scales, biases = stored[0::3], stored[1::3], stored[2::3]
        ctx.save_for_backward(*qweights, *scales)
        rows, row_scales = round_rows(x.flatten(0, -2))  # [M, K], [M, 1]: once for all layers
        return tuple(
            scaled_matmul(rows, row_scales, qweight, scale, bias, x.dtype).view(*x.shape[:-1], -1)
            for qweight, scale, bias in zip(qweights, scales, biases, strict=True)
        )

    @staticmethod
    def backward(ctx, *grads):
        """One matmul for all layers: the weights' scales are folded into the gradients before those are rounded."""
        stored, num_layers = ctx.saved_tensors, len(grads)
        qweights, scales = stored[:num_layers], stored[num_layers:]
        # [M, sum of N]: gradients of all layers side by side
        rows, row_scales = round_rows(*(grad.flatten(0, -2) * s.t() for grad, s in zip(grads, scales, strict=True)))
        # fp8 kernels need the second operand contiguous along the reduction, here N: a copy, 1 % of the matmul's time
        transposed = join(qweights).t().contiguous()  # [K, N]
        ones = torch.ones(len(transposed), 1, dtype=torch.float32, device=transposed.device)
        grad = scaled_matmul(rows, row_scales, transposed, ones, None, grads[0].dtype)
        return grad.view(*grads[0].shape[:-1], -1), *[None] * 3 * num_layers


def round_rows(*values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(values / scale in e4m3, concatenated; scale [M, 1] in fp32). The largest value of a row maps to e4m3's maximum.

    NaN stays NaN. Concatenated after rounding: in fp32, q, k, v gradients would make another round trip to memory.
    """
    largest = [part.abs().amax(dim=-1, keepdim=True).float() for part in values]
    scale = functools.reduce(torch.maximum, largest).clamp_min(MIN_AMAX) / FP8_MAX
    return join([(part.float() / scale).to(FP8) for part in values], dim=-1).contiguous(), scale


def scaled_matmul(a, a_scale, b, b_scale, bias, dtype: torch.dtype) -> torch.Tensor:
    """(a * a_scale) (b * b_scale)^T + bias [M, N] in `dtype`, for e4m3 a [M, K], b [N, K]; scales [M, 1] and [N, 1].

    Any M; K and N must be multiples of 16. On the CPU the same rounded values are multiplied in fp32.
    """
    if a.is_cuda:
        return torch._scaled_mm(a, b.t(), a_scale, b_scale.t(), bias=bias, out_dtype=dtype, use_fast_accum=True)
    bias = None if bias is None else bias.float()
    return F.linear(a.float() * a_scale, b.float() * b_scale, bias).to(dtype)
