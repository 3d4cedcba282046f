"""Frozen weights in fp8, int8 and nf4: how near they are, what they keep, and that a LoRA trains and saves over them."""

import contextlib
import csv
import sys
import weakref

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition

import exactness
from base.errors import UsageError
from cogvideox.config import TEXT_TO_VIDEO_PIPELINE
from cogvideox.loading import load_transformer
from engine.lora import ADAPTER, add_lora, check_saved_lora, load_lora, lora_layers, project, save_lora
from memory import quantization
from memory.quantization import (
    BASE_LINEARS,
    Fp8Linear,
    FrozenLinear,
    Int8Linear,
    Nf4Linear,
    check_base_precision,
    frozen_linears,
    num_bytes,
    quantize_base,
    unquantized_bytes,
)
from memory.recompute import checkpoint_blocks, compile_blocks
from random_dataset import write_dataset
from random_pipeline import real_sizes
from test_lora import example_inputs
from tiny_pipeline import kind_transformer


KINDS = {"fp8": Fp8Linear, "int8": Int8Linear, "nf4": Nf4Linear}
# Relative errors of a product of normal numbers, and of its gradient: e4m3 has 3 bits after the point, in both factors
OUTPUT_ERROR = {"fp8": 0.045, "int8": 0.01, "nf4": 0.11}
BYTES = {"fp8": 1, "int8": 1, "nf4": 0.5 + 1 / 64 + 4 / 64 / 256}  # a weight, without the scales of rows
# Of the loss, and the cosine of each tensor of the LoRA's gradient, on tiny random models
LOSS_CHANGE = {"fp8": 0.005, "int8": 0.001, "nf4": 0.01}
COSINE = {"fp8": 0.99, "int8": 0.999, "nf4": 0.95}
everywhere = pytest.mark.parametrize("precision", list(KINDS))
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def make_layers(sizes=(128, 192, 64), dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    return [nn.Linear(128, size, bias=bias).to(dtype).requires_grad_(False) for size in sizes]


def make_input(dtype=torch.float32):
    return torch.randn(2, 33, 128, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def outputs_and_gradient(compute, x):
    """All outputs of `compute(x)` and the gradient of x, in fp32, for a gradient that differs in every element."""
    x.grad = None
    outputs = compute(x)
    sum(output.float().sin().sum() for output in outputs).backward()
    return [tensor.detach().float() for tensor in (*outputs, x.grad)]


def relative_errors(ours, theirs):
    return [((a - b).norm() / b.norm()).item() for a, b in zip(ours, theirs, strict=True)]


# ---------------------------------------------------------------- layers


@everywhere
def test_bytes_of_a_weight(precision):
    layer = nn.Linear(1024, 1024, bias=False).to(torch.bfloat16)
    small = KINDS[precision](layer)
    assert num_bytes(small) == pytest.approx(BYTES[precision] * layer.weight.numel(), rel=0.005)
    assert not any(param.requires_grad for param in small.parameters()) and not list(small.buffers())


def weight_of(layer):
    """The weight [N, K] that a frozen layer computes with."""
    return layer.unpack(layer.compute_dtype, *layer.stored())


@both_dtypes
@everywhere
def test_outputs_and_gradients_are_near_those_of_the_exact_weights(precision, dtype):
    layers, x = make_layers(dtype=dtype), make_input(dtype)
    small = [KINDS[precision](layer) for layer in layers]
    exact = outputs_and_gradient(lambda x: [layer(x) for layer in layers], x)
    for compute in (lambda x: [layer(x) for layer in small], lambda x: frozen_linears(x, small)):
        errors = relative_errors(outputs_and_gradient(compute, x), exact)
        assert max(errors) < 1.3 * OUTPUT_ERROR[precision]  # the gradient starts from outputs that differ already
        assert max(errors[:-1]) < OUTPUT_ERROR[precision] and min(errors) > 1e-4


@both_dtypes
@pytest.mark.parametrize("bias", [True, False])
@everywhere
def test_gradients_are_those_of_the_dequantised_weights(precision, bias, dtype):
    """Bit for bit in int8 and nf4; fp8 rounds input and gradient too."""
    small, x = [KINDS[precision](layer) for layer in make_layers(dtype=dtype, bias=bias)], make_input(dtype)
    for layer in small:
        plain = nn.Linear(layer.in_features, layer.out_features, bias=bias).to(dtype).requires_grad_(False)
        plain.weight.data, plain.bias = weight_of(layer), layer.bias
        assert plain.weight.dtype == dtype
        ours = outputs_and_gradient(lambda x, layer=layer: [layer(x)], x)
        theirs = outputs_and_gradient(lambda x, plain=plain: [plain(x)], x)
        if precision == "fp8":
            assert max(relative_errors(ours, theirs)) < 0.04
        else:
            assert all(map(torch.equal, ours, theirs))


@both_dtypes
@pytest.mark.parametrize("precision", ["plain", *KINDS])
def test_layers_of_one_input_together_are_the_layers_alone(precision, dtype):
    """The gradient of the input is rounded once instead of once a layer; fp8 rounds it to e4m3 in one go as well."""
    layers, x = make_layers(dtype=dtype), make_input(dtype)
    layers = layers if precision == "plain" else [KINDS[precision](layer) for layer in layers]
    together = outputs_and_gradient(lambda x: frozen_linears(x, layers), x)
    alone = outputs_and_gradient(lambda x: [layer(x) for layer in layers], x)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert max(relative_errors(together[:-1], alone[:-1])) < (1e-6 if dtype == torch.float32 else tolerance)
    assert relative_errors(together, alone)[-1] < (0.03 if precision == "fp8" else tolerance)
    assert [len(output[0, 0]) for output in together] == [128, 192, 64, 128]


def test_layers_that_are_trained_or_of_two_kinds_are_computed_one_by_one():
    first, second, third = make_layers()
    second.requires_grad_(True)
    x = make_input()
    outputs = frozen_linears(x, [first, second])
    assert torch.equal(outputs[1], second(x))
    outputs[1].sum().backward()
    assert second.weight.grad is not None
    mixed = frozen_linears(x, [first, Int8Linear(third)])
    assert torch.equal(mixed[0], first(x)) and torch.equal(mixed[1], Int8Linear(third)(x))


def test_fp8_keeps_small_gradients_zeros_and_nan():
    """Gradients of a mean over a video are 1e-9 and less, of which rounding to e4m3 without a scale leaves nothing."""
    (layer,) = make_layers(sizes=[64])
    small, x = Fp8Linear(layer), make_input()
    gradient = torch.randn(2, 33, 64, generator=torch.Generator().manual_seed(2)) * 1e-18
    exact, ours = (torch.autograd.grad(module(x), x, gradient)[0] for module in (layer, small))
    assert relative_errors([ours * 1e18], [exact * 1e18])[0] < 0.05
    x = x.detach()
    x[0, 0], x[0, 1, 5] = 0, float("nan")
    output = small(x)
    torch.testing.assert_close(output[0, 0], layer.bias)
    assert output[0, 1].isnan().all() and output.isnan().sum() == 64


def test_fp8_takes_inputs_of_any_strides():
    """The kernels want rows that lie together; gradients of sums are one number seen everywhere."""
    (layer,) = make_layers(sizes=[64])
    small, x = Fp8Linear(layer), make_input().detach()
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(small(turned), small(x))
    rows, _ = quantization.round_rows(torch.randn(128, 33).t())
    assert rows.is_contiguous()
    x = make_input()
    small(x).sum().backward()
    assert relative_errors([x.grad], [layer.weight.sum(dim=0).expand_as(x)])[0] < 0.05


# ---------------------------------------------------------------- what is kept


@contextlib.contextmanager
def kept_tensors():
    """Everything that autograd saves meanwhile."""
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


@pytest.mark.parametrize("precision", ["plain", *KINDS])
def test_nothing_is_kept_for_the_backward_pass_but_what_is_stored(precision):
    layers = make_layers()
    layers = layers if precision == "plain" else [KINDS[precision](layer) for layer in layers]
    stored = {param.data_ptr() for layer in layers for param in layer.parameters()}
    with kept_tensors() as kept:
        frozen_linears(make_input(), layers)
    assert kept and {tensor.data_ptr() for tensor in kept} <= stored


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("precision", ["plain", *KINDS])
def test_the_compiler_keeps_no_weight_either(precision, together):
    """It may find in the backward pass what the forward pass made; 2 bytes a weight would be kept for it."""
    torch.compiler.reset()
    layers = make_layers(sizes=(128, 128, 128), dtype=torch.bfloat16)
    layers = layers if precision == "plain" else [KINDS[precision](layer) for layer in layers]
    x = torch.randn(1, 3, 128, dtype=torch.bfloat16, requires_grad=True)
    kept = []  # sizes of what a forward graph hands to its backward graph, beside the three outputs and its inputs

    def look(graph, inputs):
        results = next(node for node in graph.graph.nodes if node.op == "output").args[0]
        kept.append([node.meta["val"].numel() for node in results[3:] if node.op != "placeholder"])
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=look,
        bw_compiler=lambda graph, inputs: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
    )
    compute = (lambda x: frozen_linears(x, layers)) if together else (lambda x: [layer(x) for layer in layers])
    compiled = outputs_and_gradient(torch.compile(compute, backend=backend, fullgraph=True), x)
    assert all(map(torch.equal, compiled, outputs_and_gradient(compute, x)))
    assert len(kept) == 1 and max(kept[0], default=0) <= 128 * 128 // 64  # the scales of nf4


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("precision", ["plain", *KINDS])
def test_layers_compile_where_no_gradient_is_recorded(precision, num_layers):
    """Validation, and inputs that need none."""
    torch.compiler.reset()
    layers = make_layers(sizes=(128, 192, 64)[:num_layers])
    layers = layers if precision == "plain" else [KINDS[precision](layer) for layer in layers]
    compiled = torch.compile(lambda x: frozen_linears(x, layers), backend="aot_eager", fullgraph=True)
    x = make_input().detach()
    exact = frozen_linears(x, layers)
    with torch.no_grad():
        assert all(map(torch.equal, compiled(x), exact))
    assert all(map(torch.equal, compiled(x), exact))


# ---------------------------------------------------------------- the model


def quantized_transformer(model_dir, precision, dtype=torch.float32, **lora):
    """With an adapter that does something."""
    transformer = load_transformer(model_dir, dtype)
    params = add_lora(transformer, 4, 4.0, 0, **lora)
    generator = torch.Generator().manual_seed(1)
    for param in params:
        param.data += torch.randn(param.shape, generator=generator) * 0.05
    quantize_base(transformer, precision)
    return transformer, params


def names_of(transformer, kind):
    return {name for name, module in transformer.named_modules() if isinstance(module, kind)}


@pytest.mark.parametrize("names", [["to_q", "to_v"], ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2"]])
def test_the_linear_layers_of_attention_and_feed_forward_are_replaced(names, tiny):
    """With and without an adapter over them; all others stay as they were."""
    before = names_of(load_transformer(tiny("5b"), torch.float32), nn.Linear)
    transformer, _ = quantized_transformer(tiny("5b"), "int8", target_modules=names)
    replaced = {name.removesuffix(".base_layer") for name in names_of(transformer, FrozenLinear)}
    assert replaced == {name for name in before if name.endswith(BASE_LINEARS)} and len(replaced) == 2 * 6
    assert before - replaced <= names_of(transformer, nn.Linear)
    adapted = names_of(transformer, LoraLayer)
    assert adapted == {name for name in before if name.endswith(tuple(f".{name}" for name in names))}


@everywhere
def test_bytes_of_the_exact_model_are_known_afterwards(precision, tiny):
    """What a merged model takes on the disk."""
    exact = sum(param.nbytes for param in load_transformer(tiny("5b"), torch.bfloat16).parameters())
    transformer = load_transformer(tiny("5b"), torch.bfloat16)
    quantize_base(transformer, precision)
    assert unquantized_bytes(transformer) == exact > num_bytes(transformer)


@pytest.mark.parametrize("with_lora", [True, False])
def test_weights_are_replaced_one_at_a_time(with_lora, tiny, monkeypatch):
    """Of a 5b two whole copies are 16 GiB."""
    transformer = load_transformer(tiny("5b"), torch.float32)
    if with_lora:
        add_lora(transformer, 4, 4.0, 0)
    named = {name.removesuffix(".base_layer"): module for name, module in transformer.named_modules()}
    weights = [weakref.ref(module.weight) for name, module in named.items() if name.endswith(BASE_LINEARS)]
    del named
    alive = []

    def counted(linear):
        alive.append(sum(weight() is not None for weight in weights))
        return Int8Linear(linear)

    monkeypatch.setattr(quantization, "Int8Linear", counted)
    quantize_base(transformer, "int8")
    assert alive == list(range(12, 0, -1))


@pytest.mark.parametrize(("kind", "share"), [("2b", 0.21), ("5b", 0.14), ("1.5-5b-i2v", 0.14)])
def test_the_share_of_weights_that_stay_as_they_are(kind, share):
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel(**kind_transformer(kind), **real_sizes(kind)["transformer"])
    linears = [module for name, module in transformer.named_modules() if name.endswith(BASE_LINEARS)]
    total = sum(param.numel() for param in transformer.parameters())
    replaced = sum(param.numel() for module in linears for param in module.parameters())
    assert 1 - replaced / total == pytest.approx(share, abs=0.01)


@both_dtypes
@everywhere
def test_peft_saves_checks_and_loads_over_quantised_weights(precision, dtype, tiny, tmp_path):
    transformer, _ = quantized_transformer(tiny("5b"), precision, dtype)
    inputs = example_inputs(transformer, dtype)
    with torch.no_grad():
        trained = transformer(**inputs)[0]
    frozen = {name: param.clone() for name, param in transformer.named_parameters() if not param.requires_grad}
    save_lora(transformer, tmp_path, TEXT_TO_VIDEO_PIPELINE)

    seen = []
    delete = transformer.delete_adapters
    transformer.delete_adapters = lambda name: (seen.extend(adapter_dtypes(transformer, name)), delete(name))
    check_saved_lora(transformer, tmp_path)
    assert seen and set(seen) <= {torch.float32, dtype}
    assert set(adapter_dtypes(transformer, ADAPTER)) == {torch.float32}
    with torch.no_grad():
        assert torch.equal(transformer(**inputs)[0], trained)
    assert all(torch.equal(frozen[name], param) for name, param in transformer.named_parameters() if name in frozen)

    other, params = quantized_transformer(tiny("5b"), precision, dtype)
    for param in params:
        param.data.zero_()
    load_lora(other, tmp_path)
    with torch.no_grad():
        assert torch.equal(other(**inputs)[0], trained)


def adapter_dtypes(transformer, name):
    layers = lora_layers(transformer).values()
    return [part[name].weight.dtype for layer in layers for part in (layer.lora_A, layer.lora_B)]


def test_a_saved_adapter_that_differs_is_still_found(tiny, tmp_path):
    transformer, params = quantized_transformer(tiny("5b"), "fp8")
    save_lora(transformer, tmp_path, TEXT_TO_VIDEO_PIPELINE)
    params[0].data[0, 0] += 1
    with pytest.raises(RuntimeError, match="differs after saving"):
        check_saved_lora(transformer, tmp_path)


def test_an_adapter_is_not_merged_into_weights_that_cannot_take_it(tiny):
    transformer, _ = quantized_transformer(tiny("5b"), "int8")
    with pytest.raises(AttributeError, match="weight"):
        transformer.fuse_lora()


@everywhere
def test_training_changes_the_adapter_alone(precision, tiny):
    transformer, params = quantized_transformer(tiny("5b"), precision, torch.bfloat16)
    frozen = {name: param.clone() for name, param in transformer.named_parameters() if not param.requires_grad}
    start = [param.clone() for param in params]
    optimizer = torch.optim.AdamW(params, lr=1e-3)
    losses = []
    for _ in range(3):
        loss = transformer(**example_inputs(transformer, torch.bfloat16))[0].float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    assert not any(torch.equal(before, param) for before, param in zip(start, params, strict=True))
    now = dict(transformer.named_parameters())
    assert all(torch.equal(before, now[name]) and now[name].grad is None for name, before in frozen.items())


# ---------------------------------------------------------------- checkpointing, compiling, adapters in few products


def loss_and_gradients(transformer, dtype=torch.float32):
    transformer.zero_grad()
    loss = transformer(**example_inputs(transformer, dtype))[0].float().square().mean()
    loss.backward()
    grads = [param.grad.clone() for param in transformer.parameters() if param.requires_grad]
    return [loss.detach()[None], *grads]


def train_as_balanced(transformer, backend):
    """Checkpointing inside of what is compiled, with the attention's output kept."""
    torch.compiler.reset()
    blocks = transformer.transformer_blocks
    checkpoint_blocks(blocks, [torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default])
    if backend:
        compile_blocks(blocks, backend)


@pytest.mark.parametrize(
    "precision", ["int8", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("fp8", "nf4"))]
)
def test_blocks_compile_with_checkpointing_inside(precision, tiny):
    transformer, _ = quantized_transformer(tiny("5b"), precision, target_modules=["to_q", "to_v", "ff.net.2"])
    plain = loss_and_gradients(transformer)
    train_as_balanced(transformer, None)
    assert all(map(torch.equal, plain, loss_and_gradients(transformer)))
    train_as_balanced(transformer, "aot_eager")
    compiled = loss_and_gradients(transformer)
    assert len(plain) == 1 + 2 * 3 * 2
    # A last bit that differs before rounding to e4m3 is a step of it afterwards
    assert max(relative_errors(compiled, plain)) < (0.01 if precision == "fp8" else 1e-5)


@pytest.mark.slow
@everywhere
def test_inductor_computes_the_same(precision, tiny):
    transformer, _ = quantized_transformer(tiny("5b"), precision)
    plain = loss_and_gradients(transformer)
    train_as_balanced(transformer, "inductor")
    assert max(relative_errors(loss_and_gradients(transformer), plain)) < (0.03 if precision == "fp8" else 1e-4)


@both_dtypes
@everywhere
def test_adapters_in_few_products_over_quantised_layers(precision, dtype, tiny):
    """As peft's own path, layer by layer, has it."""
    transformer, _ = quantized_transformer(tiny("5b"), precision, dtype)
    attention, x = transformer.transformer_blocks[0].attn1, make_input(dtype)
    layers = [attention.to_q, attention.to_k, attention.to_v]

    def gradients(compute):
        transformer.zero_grad()
        result = outputs_and_gradient(compute, x)
        return result + [param.grad.clone() for layer in layers for param in layer.parameters() if param.requires_grad]

    few = gradients(lambda x: project(x, layers, frozen_linears))
    errors = relative_errors(few, gradients(lambda x: [layer(x) for layer in layers]))
    assert len(errors) == 3 + 1 + 6
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert errors.pop(3) < (0.03 if precision == "fp8" else tolerance)  # of x: rounded to e4m3 once, not three times
    assert max(errors) < tolerance


# ---------------------------------------------------------------- its price


LARGER = [
    pytest.param(*case, marks=pytest.mark.slow) for case in (("2b", (9, 64, 96)), ("1.5-5b-i2v", (17, 128, 128)))
]


@pytest.mark.parametrize(("kind", "size"), [("5b", (9, 64, 96)), *LARGER])
def test_the_price_of_each_precision(kind, size, tiny, tmp_path, capsys):
    write_dataset(tmp_path / "data", 3, *size, text_shape=(226, 32))
    command = [str(tiny(kind)), "--data", str(tmp_path / "data"), "--rank", "8", "--num_samples", "4", "--steps", "4"]
    rows = [f"balanced+{precision}" for precision in KINDS]
    exactness.main([*command, "--label", kind, "--csv", str(tmp_path / "rows.csv"), "--rows", "balanced", *rows])
    assert len(capsys.readouterr().out.splitlines()) == 1 + 5
    with open(tmp_path / "rows.csv", newline="") as file:
        rows = {row["row"].removeprefix("balanced+"): row for row in csv.DictReader(file)}
    assert list(rows) == ["reference", "balanced", *KINDS]
    reference, exact = rows.pop("reference"), rows.pop("balanced")
    assert float(reference["loss_change"]) == 0 and float(reference["cosine_min"]) == pytest.approx(1)
    assert float(exact["cosine_min"]) > 0.999 and float(exact["largest_step_change"]) < 0.002
    for precision, row in rows.items():
        assert 0 < float(row["largest_loss_change"]) < LOSS_CHANGE[precision]
        assert COSINE[precision] < float(row["cosine_min"]) <= float(row["cosine_median"]) < 1
        assert float(row["norm_ratio"]) == pytest.approx(1, abs=0.1)
        assert 0 < float(row["largest_step_change"]) < 2 * LOSS_CHANGE[precision]
        assert float(row["weights_gib"]) < float(reference["weights_gib"])


# ---------------------------------------------------------------- refused


def test_fp8_is_refused_where_it_cannot_be_computed(monkeypatch, caplog):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(UsageError, match="compute capability 8.9 .* this one has 8.6; use int8 or nf4"):
        check_base_precision("fp8", torch.bfloat16, cuda)
    check_base_precision("int8", torch.float16, cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    check_base_precision("fp8", torch.bfloat16, cuda)
    for dtype in (torch.float16, torch.float32):
        with pytest.raises(UsageError, match="give --mixed_precision bf16"):
            check_base_precision("fp8", dtype, cuda)
    assert not caplog.records
    check_base_precision("fp8", torch.float32, torch.device("cpu"))
    assert "emulated" in caplog.text


def test_nf4_without_bitsandbytes_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match="--base_precision nf4: needs .*; pip install bitsandbytes"):
        check_base_precision("nf4", torch.bfloat16, torch.device("cpu"))
    check_base_precision("int8", torch.bfloat16, torch.device("cpu"))


# ---------------------------------------------------------------- on a GPU


def needs_fp8(precision):
    if precision == "fp8" and torch.cuda.get_device_capability() < quantization.FP8_CAPABILITY:
        pytest.skip("fp8 needs Ada or newer")


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [17, 1111, 2048])
@everywhere
def test_the_gpu_computes_what_the_cpu_does(precision, tokens):
    """fp8's kernels against the same rounded values multiplied in fp32; any number of tokens."""
    needs_fp8(precision)
    small = [KINDS[precision](layer) for layer in make_layers(sizes=(256, 512, 64), dtype=torch.bfloat16)]
    x = torch.randn(1, tokens, 128, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    for compute in (lambda x: frozen_linears(x, small), lambda x: [layer(x) for layer in small]):
        on_cpu = outputs_and_gradient(compute, x)
        for layer in small:
            layer.to("cuda")
        on_gpu = outputs_and_gradient(compute, x.detach().cuda().requires_grad_())
        for layer in small:
            layer.to("cpu")
        assert max(relative_errors([tensor.cpu() for tensor in on_gpu], on_cpu)) < 0.01


@pytest.mark.gpu
@everywhere
def test_quantising_on_the_gpu_stores_the_same(precision, tiny):
    needs_fp8(precision)
    here, there = (load_transformer(tiny("5b"), torch.bfloat16) for _ in range(2))
    quantize_base(here, precision)
    quantize_base(there, precision, torch.device("cuda"))
    # Of e4m3's coarse steps some are ties, and a scale's last bit, which is another on the GPU, decides them
    bound = 0.01 if precision == "fp8" else 1e-3
    assert {param.device.type for param in there.parameters()} == {"cpu"}
    for layer, other in zip(here.modules(), there.modules(), strict=True):
        if isinstance(layer, FrozenLinear):
            assert relative_errors([weight_of(other).float()], [weight_of(layer).float()])[0] < bound


@pytest.mark.gpu
@everywhere
def test_compiled_blocks_on_the_gpu(precision, tiny):
    needs_fp8(precision)
    torch.compiler.reset()
    transformer, _ = quantized_transformer(tiny("5b"), precision, torch.bfloat16)
    transformer.to("cuda")
    inputs = {
        name: value.cuda() if isinstance(value, torch.Tensor) else value
        for name, value in example_inputs(transformer, torch.bfloat16).items()
    }

    def gradients():
        transformer.zero_grad()
        transformer(**inputs)[0].float().square().mean().backward()
        return [param.grad.clone() for param in transformer.parameters() if param.requires_grad]

    plain = gradients()
    compile_blocks(transformer.transformer_blocks)
    assert max(relative_errors(gradients(), plain)) < 0.05
