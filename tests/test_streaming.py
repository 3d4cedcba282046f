"""Offloaded activations and streamed weights: the same bits as with everything in place, and no more memory each step.

On the CPU every copy is done at once. `late_copies` has each done as late as it may be instead, when somebody waits for
it: a wait that is missing, or memory given back too early, then shows here and not only on a GPU.
"""

import functools
import gc
import multiprocessing
import weakref
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from args import parse_training_args
from base.errors import UsageError
from base.tensor_file import weight_files
from cogvideox.config import IMAGE_TO_VIDEO_PIPELINE, TEXT_TO_VIDEO_PIPELINE, load_scheduler
from cogvideox.inputs import rotary_embeddings
from cogvideox.loading import load_transformer, load_vae
from cogvideox.pipeline import make_pipeline
from engine import compose
from engine.lora import add_lora, check_saved_lora, save_lora
from memory import activations as activations_module
from memory import host as host_module
from memory import streaming
from memory.activations import offload_activations
from memory.quantization import quantize_base
from memory.recompute import checkpoint_blocks, compile_blocks
from memory.streaming import load_blocks, stream_weights


CPU = torch.device("cpu")
NUM_BLOCKS = 5
SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "num_layers": NUM_BLOCKS,
    "time_embed_dim": 16,
    "text_embed_dim": 16,
    "use_rotary_positional_embeddings": True,
}
SAVED_OPS = [
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
]
LEVELS = ["offload", "weights", "stream"]  # activations alone, weights alone, both


def make_transformer(dtype=torch.float32, device="cpu", checkpoints=True, compiled=None, **changes):
    """A frozen transformer with a LoRA, the same weights each time."""
    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(**SIZES | changes).to(dtype).requires_grad_(False)
    params = add_lora(transformer, 4, 4, seed=0, init="orthogonal")
    if checkpoints:
        checkpoint_blocks(transformer.transformer_blocks, SAVED_OPS)
    if compiled:
        compile_blocks(transformer.transformer_blocks, compiled)
    return transformer.train(), params


def apply_level(level, transformer, device=CPU, min_bytes=2048):
    """(activations, ring), None for what the level leaves in place."""
    blocks, activations, ring = transformer.transformer_blocks, None, None
    if level in ("offload", "stream"):
        activations = offload_activations(blocks, device, min_bytes)
    if level in ("weights", "stream"):
        ring = stream_weights(blocks, device)
    transformer.to(device)
    return activations, ring


def make_batch(width, transformer, batch_size=2, num_text=8):
    generator = torch.Generator().manual_seed(width)
    param = transformer.proj_out.weight
    latents = torch.randn(batch_size, 2, 16, 8, width, generator=generator).to(param)
    text = torch.randn(batch_size, num_text, 16, generator=generator).to(param)
    return latents, text, torch.tensor([300, 700][:batch_size], device=param.device)


def run_model(transformer, width, **shape):
    latents, text, timestep = make_batch(width, transformer, **shape)
    rotary = rotary_embeddings(transformer.config, latents)
    output = transformer(latents, text, timestep, image_rotary_emb=rotary, return_dict=False)[0]
    return torch.nn.functional.mse_loss(output.float(), latents.float())


def train(transformer, params, num_steps=4, widths=(8, 12), accumulation=2, optimizer=None):
    """Losses and gradient norms; micro-steps alternate between two sizes."""
    optimizer = optimizer or torch.optim.AdamW(params, lr=1e-2)
    numbers = []
    for step in range(num_steps):
        for micro_step in range(accumulation):
            loss = run_model(transformer, widths[(step + micro_step) % len(widths)])
            (loss / accumulation).backward()
            numbers.append(float(loss))
        numbers.append(float(torch.nn.utils.clip_grad_norm_(params, 0.1)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return numbers


def saved_bytes(transformer, directory):
    directory.mkdir()
    return save_lora(transformer, directory, TEXT_TO_VIDEO_PIPELINE).read_bytes()


class LateEvent:
    def __init__(self, queue=None, count=0):
        self.queue, self.count = queue, count

    def wait(self):
        while self.queue is not None and self.queue.done < self.count:
            self.queue.copy_next()


class LateCopies(host_module.TransferStream):
    """Copies happen when their event is waited for, in order, and only from memory that somebody has kept."""

    def __init__(self, device):
        super().__init__(device)
        self.waiting, self.done, self.started = deque(), 0, 0

    def mark(self):
        return LateEvent()

    def start(self, pairs, after):
        self.waiting.append(([(target, weakref.ref(source)) for target, source in pairs], after))
        self.started += 1
        return LateEvent(self, self.started)

    def copy_next(self):
        pairs, after = self.waiting.popleft()
        for event in after:
            event.wait()
        for target, source in pairs:
            assert source() is not None, "given back before it was copied"
            target.copy_(source())
        self.done += 1


@pytest.fixture(params=["at once", "late"])
def copies(request, monkeypatch):
    if request.param == "late":
        monkeypatch.setattr(activations_module, "TransferStream", LateCopies)
        monkeypatch.setattr(streaming, "TransferStream", LateCopies)
    return request.param


# ---------------------------------------------------------------- the same bits


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """(numbers, LoRA file) of a run with everything in place; checkpointing does not change them on the CPU."""
    transformer, params = make_transformer()
    numbers = train(transformer, params)
    return numbers, saved_bytes(transformer, tmp_path_factory.mktemp("reference") / "lora")


@pytest.mark.parametrize("checkpoints", [True, False])
@pytest.mark.parametrize("level", LEVELS)
def test_training_is_the_same_to_the_byte(level, checkpoints, copies, reference, tmp_path):
    transformer, params = make_transformer(checkpoints=checkpoints)
    apply_level(level, transformer)
    assert train(transformer, params) == reference[0]
    assert saved_bytes(transformer, tmp_path / "lora") == reference[1]


@pytest.mark.slow
def test_compiled_blocks_train_the_same_and_compile_no_oftener(tmp_path, monkeypatch):
    monkeypatch.setattr(activations_module, "TransferStream", LateCopies)
    monkeypatch.setattr(streaming, "TransferStream", LateCopies)
    results = {}
    for level in ["balanced", "stream"]:
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        transformer, params = make_transformer(compiled=counter)
        apply_level(level, transformer)
        numbers = train(transformer, params)
        results[level] = numbers, saved_bytes(transformer, tmp_path / level), counter.frame_count
    assert results["balanced"] == results["stream"]
    assert results["stream"][2] == 2  # one a size


@pytest.mark.parametrize("level", LEVELS)
def test_evaluation_between_steps_changes_nothing(level, copies, reference):
    transformer, params = make_transformer()
    apply_level(level, transformer)
    optimizer = torch.optim.AdamW(params, lr=1e-2)
    numbers = train(transformer, params, num_steps=2, optimizer=optimizer)
    with torch.no_grad():
        evaluated = [float(run_model(transformer, 12)) for _ in range(2)]
    numbers += train(transformer, params, num_steps=2, optimizer=optimizer)
    assert numbers == reference[0]
    assert evaluated[0] == evaluated[1]


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("num_slots", [2, 3])
def test_any_number_of_blocks_and_slots(num_blocks, num_slots, copies):
    outcomes = []
    for streams in (False, True):
        transformer, params = make_transformer(num_layers=num_blocks)
        if streams:
            offload_activations(transformer.transformer_blocks, CPU, 2048)
            stream_weights(transformer.transformer_blocks, CPU, num_slots)
        numbers = train(transformer, params, num_steps=1)
        with torch.no_grad():
            outcomes.append(numbers + [float(run_model(transformer, 8)) for _ in range(2)])
    assert outcomes[0] == outcomes[1]


# ---------------------------------------------------------------- order, and memory


def test_each_block_is_fetched_at_most_twice_a_step(monkeypatch):
    transformer, params = make_transformer(num_layers=7)
    ring = stream_weights(transformer.transformer_blocks, CPU, 3)
    fetched = []
    names = {home.data_ptr(): index for index, home in enumerate(ring.host)}
    start = ring.copies.start
    monkeypatch.setattr(
        ring.copies, "start", lambda pairs, after: fetched.append(names[pairs[0][1].data_ptr()]) or start(pairs, after)
    )
    train(transformer, params, num_steps=1, accumulation=1)
    assert fetched == [0, 3, 1, 4, 2, 5, 6, 3, 2, 1, 0]  # 2 x blocks - slots
    fetched.clear()
    train(transformer, params, num_steps=1, accumulation=1)
    assert fetched == [3, 4, 5, 6, 3, 2, 1, 0]  # the first three are there, and the last three at the turn
    fetched.clear()
    with torch.no_grad():
        run_model(transformer, 8)
        run_model(transformer, 8)
    assert fetched == [3, 4, 5, 6, 1, 2, 0] * 2


def test_large_activations_leave_once_and_nothing_else_does():
    transformer, _ = make_transformer()
    activations, _ = apply_level("stream", transformer)
    sent = []
    start = activations.outward.start

    def count(pairs, after):
        sent.append(sum(source.nbytes for _, source in pairs))
        return start(pairs, after)

    activations.outward.start = count
    loss = run_model(transformer, 8, batch_size=1)
    tokens, width = 2 * 4 * 4, 64
    # Block 0 is given parts of one piece of memory; the text states [1, 8, 64] of the others are worth a copy here
    assert sent == [(tokens + 8) * width * 4] * (NUM_BLOCKS - 1)
    loss.backward()


def test_memory_that_two_blocks_save_is_sent_once(copies):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, states):
            return torch.tanh(self.linear(states))  # tanh saves its result, and the next block's linear its input

    torch.manual_seed(0)
    blocks = nn.ModuleList(Block() for _ in range(4))
    states = torch.randn(32, 64)

    def gradients():
        output = states
        for block in blocks:
            output = block(output)
        return torch.autograd.grad(output.sum(), list(blocks.parameters()))

    expected = gradients()
    activations = offload_activations(blocks, CPU, 1024)
    assert all(map(torch.equal, gradients(), expected))
    assert [host.nbytes for host in activations.host[:3]] == [2 * states.nbytes, states.nbytes, states.nbytes]


@pytest.mark.parametrize("level", LEVELS)
def test_buffers_grow_for_a_larger_video_alone(level):
    transformer, params = make_transformer()
    activations, ring = apply_level(level, transformer)

    def addresses():
        held = [*activations.host[:-1], *activations.slots] if activations else []
        return [tensor.data_ptr() for tensor in held + (ring.slots + ring.host if ring else [])]

    train(transformer, params, num_steps=1, widths=(8,))
    small = addresses()
    train(transformer, params, num_steps=2, widths=(12, 8))
    large = addresses()
    train(transformer, params, num_steps=3, widths=(8, 12))
    assert addresses() == large
    assert (small == large) == (level == "weights")


def test_activations_leave_the_device_during_the_forward_pass():
    """Of each block's input, only those of the last two blocks are still in place when the forward pass is over."""
    transformer, _ = make_transformer()
    inputs = []
    for block in transformer.transformer_blocks:
        block.register_forward_pre_hook(
            lambda block, args, kwargs: inputs.append(weakref.ref(kwargs["hidden_states"].untyped_storage())),
            with_kwargs=True,
        )
    activations, _ = apply_level("offload", transformer)
    loss = run_model(transformer, 8)
    assert [block.pieces != {} for block in activations.saved] == [True] * (NUM_BLOCKS - 1) + [False]
    pieces = [piece for block in activations.saved for piece in block.pieces.values()]
    assert all(piece.source is None for piece in pieces)
    loss.backward()
    assert activations.saved == [None] * NUM_BLOCKS


# ---------------------------------------------------------------- errors in the middle of a step


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_step_after_an_error_is_right(level, where, copies, reference):
    transformer, params = make_transformer()
    apply_level(level, transformer)
    layer = transformer.transformer_blocks[2].ff.net[2]

    def fail(*args):
        raise MemoryError("full")

    add_hook = layer.register_forward_pre_hook if where == "forward" else layer.register_full_backward_hook
    handle = add_hook(fail)
    with pytest.raises(MemoryError, match="full"):
        train(transformer, params, num_steps=1)
    handle.remove()
    for param in params:
        param.grad = None
    assert train(transformer, params) == reference[0]


def test_a_backward_pass_that_comes_too_late_says_so():
    transformer, _ = make_transformer()
    apply_level("offload", transformer)
    first = run_model(transformer, 8)
    run_model(transformer, 8)
    with pytest.raises(RuntimeError, match="each forward pass has one backward pass"):
        first.backward()


@pytest.mark.parametrize("level", LEVELS)
def test_checkpoints_around_the_blocks_are_refused(level):
    transformer, params = make_transformer(checkpoints=False)
    transformer.enable_gradient_checkpointing()
    apply_level(level, transformer)
    with pytest.raises(RuntimeError, match="checkpoints are inside of the blocks"):
        train(transformer, params, num_steps=1)


# ---------------------------------------------------------------- the model as others see it


def test_streamed_weights_stay_where_they_are_and_as_they_are(copies, tmp_path):
    transformer, params = make_transformer()
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    names = [name for name, _ in transformer.named_parameters()]
    _, ring = apply_level("weights", transformer)
    transformer.to(torch.float64)
    streamed = transformer.transformer_blocks[1].ff.net[2].weight
    assert (streamed.dtype, transformer.proj_out.weight.dtype) == (torch.float32, torch.float64)
    assert transformer.transformer_blocks[1].attn1.to_q.lora_A["default"].weight.dtype == torch.float64
    transformer.to(torch.float32)
    with torch.no_grad():
        run_model(transformer, 8)
    run_model(transformer, 8).backward()
    after = transformer.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [name for name, _ in transformer.named_parameters()] == names
    slots = {slot.untyped_storage().data_ptr() for slot in ring.slots}
    assert not slots & {tensor.untyped_storage().data_ptr() for tensor in after.values()}


def test_a_saved_lora_is_checked_beside_streamed_weights(tmp_path):
    transformer, params = make_transformer()
    apply_level("stream", transformer)
    train(transformer, params, num_steps=1)
    saved_bytes(transformer, tmp_path / "lora")
    check_saved_lora(transformer, tmp_path / "lora")
    with torch.no_grad():
        params[0].add_(1)
    with pytest.raises(RuntimeError, match="differs after saving"):
        check_saved_lora(transformer, tmp_path / "lora")
    params[0].grad = None
    assert train(transformer, params, num_steps=1)


def test_buffers_of_a_block_are_streamed_too(copies):
    """Quantised layers keep their weights in buffers, of any dtype and strides."""

    class Block(nn.Module):
        def __init__(self, seed):
            super().__init__()
            generator = torch.Generator().manual_seed(seed)
            codes = torch.randint(-127, 128, (16, 16), generator=generator, dtype=torch.int8)
            self.register_buffer("codes", codes.t())
            self.register_buffer("scale", torch.rand(1, generator=generator))
            self.bias = nn.Parameter(torch.zeros(16))

        def forward(self, states):
            return states @ (self.codes * self.scale / 1000) + self.bias

    blocks = nn.ModuleList(Block(seed) for seed in range(5))
    states = torch.randn(4, 16)

    def run():
        output = states
        for block in blocks:
            output = block(output)
        return output, *torch.autograd.grad(output.sum(), list(blocks.parameters()))

    expected = run()
    ring = stream_weights(blocks, CPU, 2)
    assert all(map(torch.equal, run(), expected))
    assert blocks[0].codes.stride() == (1, 16)
    assert ring.host[0].nbytes == 2 * 512


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_weights_in_fewer_bits_are_streamed_too(precision, copies):
    numbers = []
    for level in ["balanced", "stream"]:
        transformer, params = make_transformer()
        quantize_base(transformer, precision)
        apply_level(level, transformer)
        numbers.append(train(transformer, params, num_steps=2))
    assert numbers[0] == numbers[1]


def test_weights_of_another_type_are_refused():
    class Packed(nn.Parameter):
        pass

    block = nn.Linear(4, 4)
    block.weight = Packed(torch.zeros(4, 4), requires_grad=False)
    with pytest.raises(UsageError, match="weights of type Packed"):
        stream_weights(nn.ModuleList([block]), CPU)


@pytest.mark.parametrize("kind", ["5b", "1.5-5b-i2v"])
def test_the_stock_pipeline_renders_the_same(kind, tiny, copies):
    frames = []
    for streams in (False, True):
        transformer = load_transformer(tiny(kind), torch.float32)
        add_lora(transformer, 4, 4, seed=0, init="orthogonal")
        if streams:
            apply_level("stream", transformer)
        frames.append(render(transformer.eval(), tiny(kind)))
    assert torch.equal(*frames)


def render(transformer, folder):
    embeds = torch.randn(1, 226, transformer.config.text_embed_dim, generator=torch.Generator().manual_seed(0))
    image, size, pipeline_class = {}, (64, 96, 9), TEXT_TO_VIDEO_PIPELINE
    if transformer.config.in_channels == 32:
        size, pipeline_class = (256, 256, 9), IMAGE_TO_VIDEO_PIPELINE
        image["image"] = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    vae, scheduler = load_vae(folder, torch.float32), load_scheduler(folder)
    pipe = make_pipeline(SimpleNamespace(pipeline_class=pipeline_class), vae, scheduler, "pipeline", transformer).to(
        "cpu"
    )
    return pipe(
        prompt_embeds=embeds,
        negative_prompt_embeds=torch.zeros_like(embeds),
        height=size[0],
        width=size[1],
        num_frames=size[2],
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(2),
        output_type="latent",
        **image,
    ).frames


# ---------------------------------------------------------------- a whole run


@pytest.fixture
def run_script(tiny, prepared_data, tmp_path, monkeypatch):
    """Train by the text-to-video LoRA script, with every activation large enough; returns the result's bytes."""
    import cogvideox_text_to_video_lora as script

    monkeypatch.setattr(compose, "offload_activations", functools.partial(offload_activations, min_bytes=2048))

    def run(name, *flags):
        argv = ["--pretrained_model_name_or_path", str(tiny("5b")), "--data_root", str(prepared_data)]
        argv += ["--load_tensors", "--output_dir", str(tmp_path / name), "--mixed_precision", "bf16", "--seed", "0"]
        argv += ["--train_batch_size", "2", "--gradient_accumulation_steps", "2", "--learning_rate", "1e-2"]
        script.main(parse_training_args("t2v_lora", [*argv, *flags]))
        return (tmp_path / name / "pytorch_lora_weights.safetensors").read_bytes()

    return run


def test_a_run_gives_the_same_file_at_every_level_and_resumed(run_script, tmp_path):
    checkpoints = ["--checkpointing_steps", "2"]
    expected = run_script("balanced", "--memory", "balanced", "--max_train_steps", "4")
    assert run_script("offload", "--memory", "offload", "--max_train_steps", "4") == expected
    assert run_script("stream", "--memory", "stream", "--max_train_steps", "4", *checkpoints) == expected
    resume = ["--resume_from_checkpoint", str(tmp_path / "stream" / "checkpoint-2")]
    assert run_script("resumed", "--memory", "stream", "--max_train_steps", "4", *resume) == expected


# ---------------------------------------------------------------- loading


def tensors_of(transformer):
    return dict(transformer.named_parameters()) | dict(transformer.named_buffers())


def assert_same_model(transformer, expected):
    ours, theirs = tensors_of(transformer), tensors_of(expected)
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name
    assert type(transformer) is type(expected)
    assert transformer.config == expected.config
    assert not transformer.training
    assert not any(param.requires_grad for param in transformer.parameters())


load_into_place = functools.partial(load_blocks, device=CPU)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v"])
def test_blocks_are_loaded_into_place_as_diffusers_loads_them(kind, dtype, tiny):
    expected = load_transformer(tiny(kind), dtype)
    transformer = load_transformer(tiny(kind), dtype, load_blocks=load_into_place)
    assert_same_model(transformer, expected)
    home = transformer.transformer_blocks[1].ff.net[2].weight.untyped_storage().data_ptr()
    ring = stream_weights(transformer.transformer_blocks, CPU)
    assert ring.host[1].untyped_storage().data_ptr() == home  # adopted, not copied
    assert ring.host[1].nbytes == ring.host[1].untyped_storage().nbytes() / 2


def test_learned_positions_may_be_dropped_on_the_way(tiny):
    options = {"drop_learned_positions": True}
    expected = load_transformer(tiny("5b-i2v"), torch.float32, **options)
    assert_same_model(
        load_transformer(tiny("5b-i2v"), torch.float32, load_blocks=load_into_place, **options), expected
    )


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shard_size", ["100KB", "1GB"])
def test_sharded_files_and_variants_are_found(variant, shard_size, tiny, tmp_path):
    model = load_transformer(tiny("2b"), torch.float16)
    model.save_pretrained(tmp_path / "transformer", max_shard_size=shard_size, variant=variant)
    assert (len(weight_files(tmp_path / "transformer", variant)) > 1) == (shard_size == "100KB")
    options = {"variant": variant}
    expected = load_transformer(tmp_path, torch.bfloat16, **options)
    assert_same_model(load_transformer(tmp_path, torch.bfloat16, load_blocks=load_into_place, **options), expected)


def test_a_block_that_the_files_lack_is_named(tiny, tmp_path):
    model = load_transformer(tiny("5b"), torch.float32)
    del model.transformer_blocks[1]
    model.save_pretrained(tmp_path / "transformer")  # its configuration still says two
    with pytest.raises(UsageError, match=r"lacks transformer_blocks\.1\..*download the model again"):
        load_transformer(tmp_path, torch.float32, load_blocks=load_into_place)


def load_on_rank(folder, rank, rendezvous, answers):
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    transformer = load_transformer(folder, torch.float32, load_blocks=load_into_place)
    total = sum(float(param.double().sum()) for param in transformer.transformer_blocks.parameters())
    weight = transformer.transformer_blocks[1].ff.net[2].weight
    torch.distributed.barrier()
    if rank == 0:
        weight[0, 0] = 7
    torch.distributed.barrier()
    answers.put((rank, total, float(weight[0, 0])))
    torch.distributed.destroy_process_group()


def test_ranks_of_one_machine_share_the_weights(tiny, tmp_path):
    folder = tiny("5b")
    expected = load_transformer(folder, torch.float32)
    total = sum(float(param.double().sum()) for param in expected.transformer_blocks.parameters())
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    ranks = [
        context.Process(target=load_on_rank, args=(folder, rank, tmp_path / "rendezvous", answers)) for rank in (0, 1)
    ]
    for rank in ranks:
        rank.start()
    assert sorted(answers.get(timeout=60) for _ in ranks) == [(0, total, 7.0), (1, total, 7.0)]
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0


# ---------------------------------------------------------------- on a GPU, where copies take time

WIDE = {"num_attention_heads": 8, "attention_head_dim": 64, "num_layers": 8}  # little compute for what is copied
CUDA = torch.device("cuda", 0)


@pytest.fixture
def deterministic(deterministic):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        yield


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [None, "inductor"])
def test_on_a_gpu_three_runs_of_each_level_are_the_same_to_the_byte(compiled, deterministic, tmp_path):
    results = []
    for level in ["balanced", *LEVELS]:
        for run in range(3):
            transformer, params = make_transformer(torch.bfloat16, compiled=compiled, **WIDE)
            apply_level(level, transformer, CUDA)
            numbers = train(transformer, params, num_steps=10, widths=(64, 96))
            results.append((numbers, saved_bytes(transformer, tmp_path / f"{level}{run}")))
    assert all(result == results[0] for result in results)


@pytest.mark.gpu
def test_on_a_gpu_memory_does_not_grow():
    transformer, params = make_transformer(torch.bfloat16, **WIDE)
    apply_level("stream", transformer, CUDA)
    optimizer = torch.optim.AdamW(params, lr=1e-3)
    reserved = []
    for _ in range(50):
        train(transformer, params, num_steps=1, widths=(64, 96), optimizer=optimizer)
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[2:] == reserved[2:3] * 48


@pytest.mark.gpu
def test_on_a_gpu_little_is_left_there():
    sizes = {}
    for level in ["balanced", "offload", "stream"]:
        gc.collect()  # streamed blocks refer to themselves
        torch.cuda.empty_cache()
        transformer, params = make_transformer(torch.bfloat16, **WIDE | {"num_layers": 24})
        apply_level(level, transformer, CUDA)
        torch.cuda.reset_peak_memory_stats()
        train(transformer, params, num_steps=2, widths=(96,))
        sizes[level] = torch.cuda.max_memory_allocated()
        del transformer, params
    assert sizes["stream"] < sizes["offload"] < sizes["balanced"]


@pytest.mark.gpu
def test_on_a_gpu_a_streamed_model_moves_between_devices_and_samples():
    transformer, params = make_transformer(torch.bfloat16, **WIDE)
    _, ring = apply_level("stream", transformer, CUDA)
    assert all(home.is_pinned() for home in ring.host)
    with torch.no_grad():
        first = float(run_model(transformer, 64))
        transformer.to("cpu")
        assert transformer.transformer_blocks[0].ff.net[2].weight.is_pinned()
        transformer.to(CUDA)
        assert [float(run_model(transformer, 64)) for _ in range(3)] == [first] * 3
