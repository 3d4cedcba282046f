"""The attention of every block: what it computes, its kernels, what checkpointing keeps of it, and the choice of one."""

import functools
import json
import logging
import re
import sys
import types

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from attention import choose_kernel, kernels, processor
from attention.kernels import SAVED_OPS, make_attend
from attention.processor import JointAttention
from base.errors import UsageError
from cogvideox import loading


CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NUM_TEXT, NUM_VIDEO = 13, 30
FORWARD = {  # the operator that a kernel runs once a forward pass, as the profiler names it
    "sdpa": "aten::_scaled_dot_product_flash_attention_for_cpu",
    "math": "aten::_scaled_dot_product_flash_attention_for_cpu",
    "flash": "aten::_scaled_dot_product_flash_attention",
    "cudnn": "aten::_scaled_dot_product_cudnn_attention",
    "fa4": "cogvideox::fa4_forward",
}


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rotation(tokens, head_dim):
    """(cos, sin) [tokens, head_dim] in fp32 of random angles, one a pair."""
    angles = random(tokens, head_dim // 2, seed=9).repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


def agree(results, expected, bound):
    """Equal bit for bit, or where a bound is given to that part of the largest value."""
    for found, right in zip(results, expected, strict=True):
        if bound:
            torch.testing.assert_close(found, right, rtol=0, atol=bound * right.abs().max().item())
        else:
            assert torch.equal(found, right)


# ---------------------------------------------------------------- what diffusers computes


@pytest.fixture
def block_of(tiny):
    """kind, dtype -> a block of the tiny transformer with every weight trained, and its inputs."""

    def build(kind, dtype=torch.float32):
        transformer = loading.load_transformer(tiny(kind), torch.float32)
        block = torch.nn.Module.to(transformer.transformer_blocks[0], dtype).requires_grad_(True).train()
        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        rotary = rotation(NUM_VIDEO, transformer.config.attention_head_dim) if kind != "2b" else None
        video, text = random(2, NUM_VIDEO, width, dtype=dtype), random(2, NUM_TEXT, width, seed=1, dtype=dtype)
        return block, (video, text, random(2, 32, seed=2, dtype=dtype), rotary)

    return build


def run_block(block, inputs):
    """Outputs, gradients of the inputs, and those of the weights by name."""
    block.zero_grad()
    video, text = (states.clone().requires_grad_() for states in inputs[:2])
    outputs = block(video, text, *inputs[2:])
    weights = [random(*out.shape, seed=3, dtype=out.dtype) for out in outputs]
    sum((out * weight).sum() for out, weight in zip(outputs, weights, strict=True)).backward()
    states = [out.detach() for out in outputs] + [video.grad, text.grad]
    return states, {name: weight.grad.clone() for name, weight in block.named_parameters()}


@pytest.mark.parametrize("kind", ["2b", "5b", "1.5-5b"])
@pytest.mark.parametrize("name", ["sdpa", "math"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_computes_what_diffusers_computes(kind, name, dtype, block_of):
    block, inputs = block_of(kind, dtype)
    expected, expected_grads = run_block(block, inputs)
    block.attn1.set_processor(JointAttention(make_attend(name)))
    results, grads = run_block(block, inputs)
    # Bit for bit with the same kernel, but for the sums over tokens in the gradient of q/k norm, whose order differs.
    # In fp64 diffusers turns the video's tokens in fp32, and this does not.
    rounded = 2e-6 if dtype == torch.float32 or kind != "2b" else 1e-14
    exact = name == "sdpa" and (dtype == torch.float32 or kind == "2b")
    agree(results, expected, 0 if exact else rounded)
    assert grads.keys() == expected_grads.keys()
    for weight, grad in grads.items():
        if "attn1.norm_k.bias" not in weight:  # softmax takes no notice of it: its gradient is rounding alone
            agree([grad], [expected_grads[weight]], 0 if exact and "attn1.norm" not in weight else rounded)


def test_the_whole_transformer_is_as_it_was(tiny):
    """One processor in every block; outputs of the real forward pass, text and video split again at the right token."""
    transformer = loading.load_transformer(tiny("5b"), torch.float32)
    head_dim = transformer.config.attention_head_dim
    latents, text = random(1, 3, 16, 8, 12), random(1, 226, 32)
    rotary = rotation(3 * 4 * 6, head_dim)
    call = functools.partial(transformer, latents, text, torch.tensor([500]), image_rotary_emb=rotary)
    with torch.no_grad():
        expected = call(return_dict=False)[0]
        transformer.set_attn_processor(JointAttention(make_attend("sdpa")))
        assert torch.equal(call(return_dict=False)[0], expected)
        transformer.set_attn_processor(JointAttention(lambda query, key, value: value))
        assert not torch.equal(call(return_dict=False)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_rope_turns_the_video_and_leaves_text_as_it_is(dtype):
    states, rotary = random(2, NUM_TEXT + NUM_VIDEO, 4, 32, dtype=dtype), rotation(NUM_VIDEO, 32)
    turned = processor.rotate(states, *processor.extend_rotary_to_text(rotary, NUM_TEXT))
    assert turned.dtype == dtype
    assert torch.equal(turned[:, :NUM_TEXT], states[:, :NUM_TEXT])
    expected = apply_rotary_emb(states[:, NUM_TEXT:], rotary, sequence_dim=1)
    agree([turned[:, NUM_TEXT:]], [expected], 1e-6 if dtype == torch.float64 else 0)


def test_layers_are_projected_together_and_may_be_fused(block_of):
    """What takes the place of the projections gets the layers; it may answer with parts of one product."""
    block, inputs = block_of("5b")
    attn, asked = block.attn1, []
    expected, _ = run_block(block, inputs)

    def project(states, layers):
        asked.append(layers)
        weight = torch.cat([layer.weight for layer in layers])
        return F.linear(states, weight, torch.cat([layer.bias for layer in layers])).chunk(len(layers), dim=-1)

    attn.set_processor(JointAttention(make_attend("sdpa"), project))
    agree(run_block(block, inputs)[0], expected, 2e-6)
    assert asked == [[attn.to_q, attn.to_k, attn.to_v], [attn.to_out[0]]]


def test_a_mask_is_refused(block_of):
    block, (video, text, *_) = block_of("2b")
    block.attn1.set_processor(JointAttention(make_attend("sdpa")))
    with pytest.raises(ValueError, match="mask"):
        block.attn1(video, encoder_hidden_states=text, attention_mask=torch.ones(2, 1, NUM_TEXT + NUM_VIDEO))


# ---------------------------------------------------------------- FlashAttention-4
# A stand-in for its module: the same calls, plain formulas on any device.


class FakeFlash:
    """`flash_attn.cute.interface` as far as it is used; `calls` has what was asked."""

    def __init__(self):
        self.calls = []

    def _flash_attn_fwd(self, query, key, value, return_lse):
        assert return_lse
        self.calls.append("forward")
        scores = torch.einsum("bshd,bthd->bhst", query, key) / query.shape[-1] ** 0.5
        out = torch.einsum("bhst,bthd->bshd", scores.softmax(-1), value).contiguous()
        return out, scores.logsumexp(-1).float(), None, None, None

    def _flash_attn_bwd(self, query, key, value, out, grad, lse, deterministic):
        self.calls.append(f"backward, deterministic={deterministic}")
        scale = query.shape[-1] ** -0.5
        weights = (torch.einsum("bshd,bthd->bhst", query, key) * scale - lse[..., None]).exp()
        inner = (grad * out).sum(-1).transpose(1, 2)[..., None]
        scores = weights * (torch.einsum("bshd,bthd->bhst", grad, value) - inner) * scale
        return (
            torch.einsum("bhst,bthd->bshd", scores, key),
            torch.einsum("bhst,bshd->bthd", scores, query),
            torch.einsum("bhst,bshd->bthd", weights, grad),
        )


@pytest.fixture
def flash(monkeypatch):
    fake = FakeFlash()
    package = types.SimpleNamespace(interface=fake)
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(cute=package))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", package)
    return fake


@pytest.fixture
def inputs():
    return choose_kernel.make_inputs((2, 40, 3, 16), torch.float32, CPU)


def test_flash_attention_4_is_called_as_it_expects(flash, inputs):
    assert not inputs[2].is_contiguous()  # value is a view of a fused projection
    expected = choose_kernel.run(make_attend("math"), inputs)
    agree(choose_kernel.run(make_attend("fa4"), inputs), expected, 1e-5)
    assert flash.calls == ["forward", "backward, deterministic=False"]


def test_flash_attention_4_is_asked_for_equal_gradients_where_torch_is(flash, inputs):
    torch.use_deterministic_algorithms(True)
    try:
        choose_kernel.run(make_attend("fa4"), inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert flash.calls[-1] == "backward, deterministic=True"


def test_flash_attention_4_is_a_proper_operator(flash, inputs):
    """torch's own check: schema, shapes and strides of the fake tensors, gradients, tracing."""
    leaves = [part.detach().requires_grad_() for part in inputs[:3]]
    torch.library.opcheck(kernels.fa4_forward, tuple(leaves))
    out, lse = kernels.fa4_forward(*inputs[:3])
    torch.library.opcheck(kernels.fa4_backward, (inputs[3], *inputs[:3], out, lse))


def test_flash_attention_4_that_is_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(UsageError, match="pip install flash-attn-4=="):
        make_attend("fa4")


# ---------------------------------------------------------------- compiling and checkpointing


def saving(ops):
    """The policy of selective checkpointing that keeps the outputs of `ops`."""

    def policy(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op in ops else CheckpointPolicy.PREFER_RECOMPUTE

    return functools.partial(create_selective_checkpoint_contexts, policy)


def checkpointed(block, ops):
    """`block`, computed again in the backward pass but for the outputs of `ops`."""
    inner = type(block)

    class Checkpointed(inner):
        def forward(self, *inputs):
            return checkpoint(super().forward, *inputs, use_reentrant=False, context_fn=saving(ops))

    block.__class__ = Checkpointed
    return block


class Seen(TorchDispatchMode):
    """The operators that run, outside of graphs."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func)
        return func(*args, **(kwargs or {}))


def runs_of(op, function):
    """What `function` returns, and how often the operator ran in it, in a compiled graph."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = function()
    return result, sum(event.count for event in profile.key_averages() if event.key == op)


@pytest.mark.parametrize("name", ["sdpa", "fa4"])
@pytest.mark.parametrize(("ops", "forwards"), [(SAVED_OPS, 1), (frozenset(), 2)], ids=["saved", "computed again"])
def test_what_checkpointing_keeps_of_it_is_computed_once(name, ops, forwards, block_of, flash):
    block, inputs = block_of("5b")
    block.attn1.set_processor(JointAttention(make_attend(name)))
    expected = run_block(block, inputs)[0]
    flash.calls.clear()
    checkpointed(block, ops)
    with Seen() as seen:
        agree(run_block(block, inputs)[0], expected, 0)
    assert sum(op in SAVED_OPS for op in seen.ops) == forwards
    assert len(flash.calls) == (forwards + 1 if name == "fa4" else 0)


@pytest.mark.parametrize("name", ["sdpa", "fa4", "math"])
def test_a_compiled_block_is_one_graph_and_keeps_it_too(name, block_of, flash):
    torch.compiler.reset()
    block, inputs = block_of("5b")
    block.attn1.set_processor(JointAttention(make_attend(name)))
    expected, expected_grads = run_block(block, inputs)
    checkpointed(block, SAVED_OPS).compile(fullgraph=True, dynamic=False, backend="aot_eager")
    run_block(block, inputs)
    flash.calls.clear()
    (results, grads), count = runs_of(FORWARD[name], lambda: run_block(block, inputs))
    agree(results, expected, 1e-6)
    agree(grads.values(), expected_grads.values(), 1e-5)
    if name == "fa4":  # torch's profilers do not all name an operator in Python: forward, and backward
        count = len(flash.calls) - 1
    assert count == (name != "math")  # which is made of plain products


def test_no_inplace_write_is_in_the_graph(block_of):
    """They become copies of whole tensors in the backward pass, and end a fused kernel."""
    torch.compiler.reset()
    block, inputs = block_of("5b")
    block.attn1.set_processor(JointAttention(make_attend("sdpa")))
    targets = []

    def record(graph, example_inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=record, bw_compiler=record)
    torch.compile(block, fullgraph=True, backend=backend)(*inputs)
    assert "aten._scaled_dot_product_flash_attention_for_cpu.default" in targets
    assert not [target for target in targets if "copy_" in target or "slice_scatter" in target or "index" in target]


# ---------------------------------------------------------------- SageAttention


@pytest.fixture
def sage(monkeypatch):
    package = types.SimpleNamespace(
        sageattn=lambda *heads, tensor_layout, is_causal: F.scaled_dot_product_attention(*heads)
    )
    monkeypatch.setitem(sys.modules, "sageattention", package)


def test_sage_attention_computes_by_the_same_projections_in_compiled_blocks_too(block_of, sage):
    torch.compiler.reset()
    block, inputs = block_of("5b")
    halved = []

    def project(states, layers):
        halved.append(len(layers))
        return [layer(states) / 2 for layer in layers]

    block.attn1.set_processor(JointAttention(make_attend("sdpa"), project))
    block.compile(fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = block(*inputs)
        halved.clear()
        with kernels.sage_attention(block):
            agree(block(*inputs), expected, 1e-6)
    assert halved == [3, 1]


def test_sage_attention_does_not_train_in_silence(sage, inputs):
    with pytest.raises(RuntimeError, match="no autograd formula"):
        choose_kernel.run(kernels.sage_attend, inputs)


# ---------------------------------------------------------------- which kernel


SHAPE = (1, 24, 2, 16)


def right(query, key, value):
    return kernels.heads_first(F.scaled_dot_product_attention)(query, key, value)


def wrong(query, key, value):
    return right(key, query, value)


def not_finite(query, key, value):
    """A right output whose gradient of query is NaN, as cuDNN had it."""
    return right(query, key, value) + (query * 0).sqrt()


def failing(query, key, value):
    raise RuntimeError("no kernel image is available\nand so on")


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A card on which kernels are `kernels` and take `times`; both can be changed."""
    setup = types.SimpleNamespace(
        kernels={"flash": right, "cudnn": lambda *parts: right(*parts), "fa4": lambda *parts: right(*parts)},
        times={"flash": 47.5, "cudnn": 31.7, "fa4": 24.7},
        timings=0,
        path=tmp_path / "cogvideox-factory" / "attention.json",
        name="card",
    )

    def milliseconds(attend, inputs):
        setup.timings += 1
        [name] = [name for name, kernel in setup.kernels.items() if kernel is attend]
        return setup.times[name] + 30 * (setup.timings <= 3)  # the first round is slow

    make_inputs = choose_kernel.make_inputs
    monkeypatch.setattr(choose_kernel, "make_inputs", lambda shape, dtype, device: make_inputs(shape, dtype, CPU))
    monkeypatch.setattr(choose_kernel, "make_attend", lambda name: setup.kernels[name])
    monkeypatch.setattr(choose_kernel, "milliseconds", milliseconds)
    monkeypatch.setattr(choose_kernel, "candidates", lambda device: list(setup.kernels))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: setup.name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return setup


def pick(name="auto", shape=SHAPE, dtype=torch.bfloat16, device=CUDA):
    return choose_kernel.pick_attention(name, shape, dtype, device)


def lines(caplog):
    return [record.getMessage() for record in caplog.records]


def test_the_fastest_is_chosen_and_said(card, caplog):
    caplog.set_level(logging.INFO)
    assert pick() == "fa4"
    assert lines(caplog) == ["attention: fa4 (flash 47.5, cudnn 31.7, fa4 24.7 ms forward and backward)"]
    assert card.timings == 3 * choose_kernel.ROUNDS


def test_the_random_state_is_left_alone(card):
    before = torch.random.get_rng_state()
    pick()
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (wrong, r"its results differ from those of flash \(cosine"),
        (not_finite, "its output or gradients are not finite"),
        (failing, "no kernel image is available$"),
    ],
)
def test_a_kernel_that_fails_or_disagrees_is_left_out_and_tried_again_next_time(kernel, reason, card, caplog):
    card.kernels["fa4"] = kernel
    assert pick() == "cudnn"
    [line] = lines(caplog)
    assert line.startswith("attention: fa4 is left out: ")
    assert re.search(reason, line)
    assert not card.path.exists()
    card.kernels["fa4"] = lambda *parts: right(*parts)
    assert pick() == "fa4"


def test_without_any_kernel_torch_chooses(card, caplog):
    card.kernels = dict.fromkeys(card.kernels, failing)
    assert pick() == "sdpa"
    assert lines(caplog)[-1] == "attention: none of flash, cudnn, fa4 runs here; torch chooses"
    card.kernels = {}
    assert pick() == "sdpa"


def test_a_choice_is_kept_for_its_card_shape_and_dtype(card, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    pick()
    timings, card.times["fa4"] = card.timings, 99.0
    assert pick() == "fa4" and card.timings == timings
    assert lines(caplog)[-1].startswith("attention: fa4 (timed before: flash 47.5, ")
    for change in [{"shape": (1, 25, 2, 16)}, {"dtype": torch.float16}]:
        assert pick(**change) == "cudnn"
    card.name = "another card"
    assert pick() == "cudnn"
    monkeypatch.setattr(choose_kernel, "fa4_version", lambda: "5.0")
    assert pick() == "cudnn"
    assert len(json.loads(card.path.read_text())) == 5
    assert [path.name for path in card.path.parent.iterdir()] == ["attention.json"]
    timings = card.timings
    card.name = "card"
    monkeypatch.setattr(choose_kernel, "fa4_version", lambda: None)
    assert pick() == "fa4" and card.timings == timings


@pytest.mark.parametrize("text", ["", "{", "[]", '"fa4"', "\xff"])
def test_a_damaged_file_is_said_and_written_anew(text, card, caplog):
    card.path.parent.mkdir()
    card.path.write_bytes(text.encode("latin-1"))
    assert pick() == "fa4"
    [line] = lines(caplog)
    assert line.startswith(str(card.path)) and line.endswith("attention is timed again")
    assert pick() == "fa4" and card.timings == 3 * choose_kernel.ROUNDS
    assert len(lines(caplog)) == 1


@pytest.mark.parametrize("entry", [None, "fa4", {"fa4": 1.0}, {"flash": "1", "cudnn": 2.0, "fa4": 3.0}])
def test_an_entry_of_another_form_is_timed_again(entry, card):
    pick()
    [key] = json.loads(card.path.read_text())
    card.path.write_text(json.dumps({key: entry}))
    card.times["fa4"] = 99.0
    assert pick() == "cudnn"


def test_a_file_that_cannot_be_written_stops_nothing(card, caplog):
    card.path.parent.write_text("a file where the folder should be")
    assert pick() == "fa4"
    assert "cannot be written" in lines(caplog)[-1]


def test_on_the_cpu_and_in_fp32_torch_chooses_without_a_trial(card):
    assert pick(device=CPU, dtype=torch.float32) == "sdpa"
    assert pick(dtype=torch.float32) == "sdpa"
    assert card.timings == 0


@pytest.mark.parametrize("name", ["cudnn", "flash", "fa4"])
@pytest.mark.parametrize(("device", "dtype"), [(CPU, torch.bfloat16), (CUDA, torch.float32)], ids=str)
def test_a_named_kernel_on_the_wrong_device_or_dtype_is_refused(name, device, dtype):
    with pytest.raises(UsageError, match=f"--attention {name}: computes on CUDA in bf16 or fp16 only"):
        pick(name, device=device, dtype=dtype)


def test_a_named_kernel_is_tried_and_not_timed(card):
    assert pick("cudnn") == "cudnn"
    assert pick("math", device=CPU, dtype=torch.float32) == "math"
    card.kernels["cudnn"] = failing
    with pytest.raises(UsageError, match="^--attention cudnn does not run here: no kernel image is available$"):
        pick("cudnn")
    card.kernels["cudnn"] = not_finite
    with pytest.raises(UsageError, match="not finite"):
        pick("cudnn")
    assert card.timings == 0


def test_candidates_are_those_installed_for_the_card(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    for capability, version, names in [
        ((7, 5), "4.0", []),
        ((8, 9), "4.0", ["flash", "cudnn"]),
        ((9, 0), "4.0", ["flash", "cudnn", "fa4"]),
        ((9, 0), None, ["flash", "cudnn"]),
    ]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        monkeypatch.setattr(choose_kernel, "fa4_version", lambda found=version: found)
        assert choose_kernel.candidates(CUDA) == names
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert choose_kernel.candidates(CUDA) == ["flash"]


# ---------------------------------------------------------------- on a GPU


def skip_unless_it_runs(name):
    if name not in choose_kernel.candidates(CUDA):
        pytest.skip(f"{name} is not installed or not for this card")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flash", "cudnn", "fa4", "sdpa"])
@pytest.mark.parametrize("tokens", [192, 333, 1024])  # 192 is 64 more than 128: cuDNN's NaN with a mask
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kernels_agree_with_the_formula(name, tokens, dtype):
    """On value as a strided view, whose rows are three times as long."""
    if name != "sdpa":
        skip_unless_it_runs(name)
    inputs = choose_kernel.make_inputs((2, tokens, 4, 64), dtype, CUDA)
    assert inputs[2].stride(1) == 3 * 4 * 64
    results = choose_kernel.try_kernel(name, inputs)
    assert not isinstance(results, str), results
    exact = choose_kernel.run(make_attend("math"), [part.float() for part in inputs])
    assert choose_kernel.min_cosine(results, exact) > 0.9999
    agree([result.float() for result in results], exact, 0.03)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flash", "cudnn", "fa4"])
def test_a_compiled_block_on_the_gpu_computes_attention_once(name):
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock

    skip_unless_it_runs(name)
    torch.compiler.reset()
    torch.manual_seed(0)
    block = CogVideoXBlock(256, 4, 64, time_embed_dim=32).to(CUDA, torch.bfloat16)
    cos, sin = rotation(300, 64)
    states = [random(1, 300, 256), random(1, 100, 256, seed=1), random(1, 32, seed=2)]
    inputs = (*(part.to(CUDA, torch.bfloat16) for part in states), (cos.to(CUDA), sin.to(CUDA)))

    def run():
        video = inputs[0].clone().requires_grad_()
        out = block(video, *inputs[1:])[0]
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), video)]

    expected = run()
    block.attn1.set_processor(JointAttention(make_attend(name)))
    checkpointed(block, SAVED_OPS).compile(fullgraph=True, dynamic=False)
    run()
    results, count = runs_of(FORWARD[name], run)
    assert choose_kernel.min_cosine(results, expected) > 0.999
    assert count == 1


@pytest.mark.gpu
def test_the_trial_on_a_gpu_chooses_keeps_and_says(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    chosen = pick(shape=(1, 1024, 8, 64))
    assert chosen in choose_kernel.candidates(CUDA)
    assert pick(shape=(1, 1024, 8, 64)) == chosen
    assert "timed before" in lines(caplog)[-1]
    for name in choose_kernel.candidates(CUDA):
        assert pick(name, shape=(1, 1024, 8, 64)) == name


def test_an_error_of_the_device_ends_the_trial(monkeypatch):
    """What runs after it fails too: another kernel must not be blamed."""

    def broken(query, key, value):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(choose_kernel, "make_attend", lambda name: broken)
    inputs = [torch.ones(1, 4, 2, 8) for _ in range(4)]
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        choose_kernel.try_kernel("flash", inputs)
