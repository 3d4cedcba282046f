"""Full fine-tuning: fp32 masters get every gradient, and what is written is what was trained."""

import json
from argparse import Namespace

import pytest
import torch
from safetensors.torch import load_file

from args import parse_training_args
from base.errors import UsageError
from cogvideox.loading import load_transformer
from engine import master_weights
from engine.compose import build_engine_optimizer_from_args, build_sft_engine_from_args
from engine.master_weights import HostMasters, Masters
from engine.optimizers import make_lr_scheduler_from_args, split_tensors
from engine.sft import by_name, check_saved_transformer, load_weights, save_transformer, save_weights, setter
from engine.split import rounded
from engine.update import TrainingState, update
from run import checkpoints, levels
from run.checkpoints import write_checkpoint
from run.levels import check_sft_fits
from test_checkpointing import run_in


CPU = torch.device("cpu")


def small_model(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 8)).to(dtype)


def host_masters(model, offload_gradients=False):
    return HostMasters(list(model.parameters()), CPU, torch.bfloat16, offload_gradients)


PLACES = {
    "device": lambda model: Masters(list(model.parameters()), CPU),
    "host": host_masters,
    "host, gradients too": lambda model: host_masters(model, offload_gradients=True),
}


@pytest.fixture(params=PLACES)
def add_masters(request):
    return PLACES[request.param]


def backward(model, seed=0):
    inputs = torch.randn(4, 8, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(seed))
    model(inputs).float().square().mean().backward()


def test_gradients_reach_the_masters_in_fp32_and_leave_the_model(add_masters):
    model = small_model()
    masters = add_masters(model)
    backward(model)
    assert all(param.grad is None for param in model.parameters())
    masters.deliver_gradients()
    assert all(master.grad.dtype == torch.float32 for master in masters.params)
    reference = small_model()
    backward(reference)
    for master, param in zip(masters.params, reference.parameters(), strict=True):
        assert torch.equal(master.grad, param.grad.float())


def test_every_update_starts_from_no_gradient_and_gets_all_micro_steps(add_masters):
    """Two updates of two micro-steps; in the second one a part of the model takes no part."""
    model = small_model()
    masters = add_masters(model)
    sums = []
    for number, seeds in enumerate([(0, 1), (2, 3)]):
        for seed in seeds:
            backward(model[2:] if number else model, seed)
        averaged = masters.gradients()
        assert len(averaged) == (2 if number else 4)
        averaged[0] *= 3  # what averaging over the ranks does, in place
        masters.deliver_gradients()
        sums.append([None if master.grad is None else master.grad.clone() for master in masters.params])
        for master in masters.params:
            master.grad = None
    assert sums[1][0] is None and sums[1][1] is None
    for seed in (0, 1):
        reference = small_model()
        backward(reference, seed)
        for total, param in zip(sums[0], reference.parameters(), strict=True):
            total -= param.grad.float() * (3 if total is sums[0][0] else 1)
    assert all(rest.abs().max() < 1e-6 for rest in sums[0])


def test_small_gradients_are_not_lost_in_accumulation(add_masters):
    """A bf16 sum of 1 and 300 times 0.001 stays 1; the masters' sum does not."""
    param = torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    masters = add_masters(torch.nn.ParameterList([param]))
    for weight in [1.0] + [0.001] * 300:
        (param * weight).sum().backward()
    masters.deliver_gradients()
    assert torch.allclose(masters.params[0].grad, torch.full((4,), 1.3), rtol=0.01)


def test_copies_are_the_masters_rounded_half_away_from_zero(add_masters):
    """Not half to even as torch does it: masters of every kind, split ones too, have the same copies."""
    model = small_model()
    masters = add_masters(model)
    ties = torch.tensor([0x3F808000, 0x3F818000, -0x407F8000], dtype=torch.int32).view(torch.float32)
    upper = torch.tensor([0x3F81, 0x3F82, -0x407F], dtype=torch.int16).view(torch.bfloat16)
    with torch.no_grad():
        for master in masters.params:
            master += 1e-3
        masters.params[1][:3] = ties
    masters.write_to_model()
    assert torch.equal(masters.model_weights[1][:3], upper)
    for master, param in zip(masters.params, model.parameters(), strict=True):
        assert torch.equal(param.flatten()[3:], master.bfloat16().flatten()[3:])
    masters.read_from_model()
    assert all(torch.equal(a, b.float()) for a, b in zip(masters.params, model.parameters(), strict=True))


def test_the_norm_is_that_of_the_accumulated_gradients():
    """Taken as they leave, over all micro-steps; of an update in which a part of the model takes part, of that part."""
    for offload_gradients in (False, True):
        model = small_model()
        masters = host_masters(model, offload_gradients)
        for parts in ((model, model), (model[2:],)):
            for seed, part in enumerate(parts):
                backward(part, seed)
            norm = masters.gradient_norm()
            masters.deliver_gradients()
            assert norm == torch.nn.utils.get_total_norm([m.grad for m in masters.params if m.grad is not None])
            for master in masters.params:
                master.grad = None


def test_the_norm_is_that_of_the_average_over_ranks(monkeypatch):
    model = small_model()
    masters = host_masters(model, offload_gradients=True)
    backward(model)
    for grad in masters.gradients():
        grad /= 2
    monkeypatch.setattr(master_weights, "is_distributed", lambda: True)
    norm = masters.gradient_norm()
    masters.deliver_gradients()
    assert norm == torch.nn.utils.get_total_norm([master.grad for master in masters.params])


def test_masters_on_the_host_leave_a_model_in_the_compute_dtype():
    model = small_model(torch.float32)
    host_masters(model)
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("more", [[], ["--use_cpu_offload_optimizer"]], ids=["device", "host"])
def test_the_stored_weights_are_trained_not_their_rounding(more, tiny):
    argv = ["--pretrained_model_name_or_path", "m", "--data_root", "d", "--output_dir", "o", *more]
    args, transformer = parse_training_args("t2v_sft", argv), load_transformer(tiny("5b"), torch.float32)
    with torch.no_grad():
        for param in transformer.parameters():
            param.copy_((1.004 * param).half())  # no bf16 numbers any more, and many of them between two
    stored = [param.detach().clone() for param in transformer.parameters()]
    engine = build_sft_engine_from_args(
        args, None, 0.0, transformer, (1, 8, 2, 32), torch.bfloat16, torch.float32, CPU
    )
    assert all(torch.equal(a, b) for a, b in zip(engine.weights.values(), stored, strict=True))
    for copy, weight in zip(transformer.parameters(), stored, strict=True):  # as after every later update
        assert torch.equal(copy, rounded(weight, torch.bfloat16))


@pytest.fixture(params=["device", "host"])
def trained(tiny, request):
    """(transformer in bf16, masters by name that are no longer its stored weights)."""
    transformer = load_transformer(tiny("5b"), torch.float32).requires_grad_(True)
    masters = PLACES[request.param](transformer)
    torch.nn.Module.to(transformer, torch.bfloat16)
    with torch.no_grad():
        for master in masters.params:
            master *= 1.01
    masters.write_to_model()
    return transformer, by_name(transformer, masters.params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_result_is_the_masters_in_the_dtype_asked_for(trained, tmp_path, dtype):
    transformer, masters = trained
    save_transformer(transformer, masters, dtype, tmp_path, {})
    check_saved_transformer(transformer, masters, dtype, tmp_path)
    loaded = type(transformer).from_pretrained(tmp_path, subfolder="transformer", dtype=dtype)
    for name, param in loaded.named_parameters():
        assert torch.equal(param, rounded(masters[name], dtype)), name
    # The model in memory is as before
    assert {param.dtype for param in transformer.parameters()} == {torch.bfloat16}
    assert not list(tmp_path.glob(".*"))


def test_a_second_save_replaces_the_first_and_notes_facts(trained, tmp_path):
    transformer, masters = trained
    save_transformer(transformer, masters, torch.bfloat16, tmp_path, {"image_latent_scale": "raw"})
    assert json.loads((tmp_path / "transformer" / "training.json").read_text()) == {"image_latent_scale": "raw"}
    with torch.no_grad():
        next(iter(masters.values())).add_(1.0)
    with pytest.raises(RuntimeError, match="differs after saving"):
        check_saved_transformer(transformer, masters, torch.bfloat16, tmp_path)
    save_transformer(transformer, masters, torch.bfloat16, tmp_path, {})
    check_saved_transformer(transformer, masters, torch.bfloat16, tmp_path)
    assert not (tmp_path / "transformer" / "training.json").exists()


def test_masters_are_restored_bit_for_bit(trained, tmp_path):
    transformer, masters = trained
    path = tmp_path / "masters.safetensors"
    save_weights(transformer, masters, path, {"note": "1"})
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}
    fresh = {name: torch.zeros_like(master) for name, master in masters.items()}
    assert load_weights(transformer, setter(fresh), path)["note"] == "1"
    assert all(torch.equal(fresh[name], master) for name, master in masters.items())
    other = small_model()
    with pytest.raises(UsageError, match="other weights"):
        load_weights(other, setter(dict(other.named_parameters())), path)


# ---------------------------------------------------------------- checkpoints


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def make_state(tiny, request):
    """A run's state before its first update, all weights at `value` if given."""

    def make(place, value=None):
        more = ["--use_cpu_offload_optimizer"] if place == "host" else []
        argv = ["--pretrained_model_name_or_path", "m", "--data_root", "d", "--optimizer", "adamw", "--ema", *more]
        args, transformer = parse_training_args("t2v_sft", argv), load_transformer(tiny("5b"), torch.float32)
        shape = 1, 8, 4, 32
        engine = build_sft_engine_from_args(args, None, 0.0, transformer, shape, request.param, torch.bfloat16, CPU)
        optimizer = build_engine_optimizer_from_args(args, None, engine, 0.1)
        state = TrainingState(engine, optimizer, make_lr_scheduler_from_args(args, optimizer, 10))
        if value is not None:
            fill(state, value)
        return state

    return make


def fill(state, value):
    """Weights, their copies, the average and the optimizer's states made from one number; a schedule at that step."""
    engine = state.engine
    update(sum(weight.float().sum() for weight in engine.transformer.parameters()) * value, state, True, 1.0)
    engine.complete()
    set_weight, set_average = engine.set_weight(), setter(engine.average)
    for index, (name, weight) in enumerate(engine.weights.items()):
        set_weight(name, torch.full_like(weight, value + index / 256))
        set_average(name, torch.full_like(weight, value / 3))
    engine.ema.optimization_step = value
    if engine.masters:
        engine.masters.write_to_model()


def content_of(state):
    """All that a checkpoint holds, and the model that computes."""
    engine, (tensors, rest) = state.engine, split_tensors(state.optimizer.state_dict())
    lists = {"params": engine.weights.values(), "average": engine.average.values()}
    lists["model"] = engine.transformer.parameters()
    tensors |= {f"{name} {index}": tensor for name, found in lists.items() for index, tensor in enumerate(found)}
    numbers = engine.ema.optimization_step, state.lr_scheduler.state_dict(), rest
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}, json.loads(json.dumps(numbers))


def assert_same(ours, theirs):
    assert ours[1] == theirs[1] and ours[0].keys() == theirs[0].keys()
    assert [name for name in ours[0] if not torch.equal(ours[0][name], theirs[0][name])] == []


def flip(path, place):
    """Change a letter of the header's first name, or a byte of the first or of the last tensor."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[{"header": 12, "first": start, "last": -1}[place]] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("place", ["device", "host"])
def test_a_checkpoint_is_loaded_bit_for_bit(place, make_state, tmp_path):
    state = make_state(place, 2)
    path = write_checkpoint(tmp_path, 2, state, {})
    for other in (make_state(place), make_state(place, 5)):
        assert checkpoints.load(path, other, {}) == 2
        assert_same(content_of(other), content_of(state))


@pytest.mark.parametrize("place", ["header", "first", "last"])
@pytest.mark.parametrize("name", ["masters", "ema", "optimizer", "transformer/diffusion_pytorch_model"])
def test_nothing_of_a_checkpoint_that_turns_out_damaged_is_trained_from(name, place, make_state, tmp_path, caplog):
    args, run = Namespace(output_dir=str(tmp_path), resume_from_checkpoint=None), run_in(tmp_path)
    for step in (1, 2):
        write_checkpoint(tmp_path, step, make_state("device", step), {})
    flip(tmp_path / f"checkpoint-2/{name}.safetensors", place)
    state = make_state("device")
    assert checkpoints.resume(args, run, checkpoints.find(args, run, 9, {}), state, {}) == 1
    assert f"checkpoint-2 cannot be used: {name}.safetensors was changed" in caplog.text
    expected = make_state("device")
    checkpoints.load(tmp_path / "checkpoint-1", expected, {})
    assert_same(content_of(state), content_of(expected))

    args = Namespace(output_dir=str(tmp_path), resume_from_checkpoint="2")
    with pytest.raises(UsageError, match=f"--resume_from_checkpoint 2: {name}.safetensors was changed"):
        checkpoints.resume(args, run, checkpoints.find(args, run, 9, {}), state, {})


# ---------------------------------------------------------------- does it fit?


def sft_flags(*more):
    return parse_training_args("t2v_sft", ["--pretrained_model_name_or_path", "m", "--data_root", "d", *more])


def fits(*flags, weights=5.57e9, dtype=torch.bfloat16):
    check_sft_fits(sft_flags(*flags), weights, dtype, torch.device("cuda"))


@pytest.fixture
def card_of_80_gb(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (79 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 120 * 2**30}))


def test_what_cannot_fit_is_refused_before_it_is_loaded(card_of_80_gb):
    """5b takes 73 GiB, with fp32 sums of gradients 83."""
    summed = ["--gradient_accumulation_steps", "4"]
    fits()
    with pytest.raises(
        UsageError, match=r"needs 83 GiB .* 79 GiB are free on the GPU; add --memory offload, or train"
    ):
        fits(*summed)
    with pytest.raises(UsageError, match="add --memory offload in place of --gradient_checkpointing, or"):
        fits(*summed, "--gradient_checkpointing")
    fits(*summed, "--memory", "auto")  # which says itself what does not fit
    fits(*summed, weights=1.69e9)
    check_sft_fits(sft_flags(*summed), 5.57e9, torch.bfloat16, CPU)


def test_what_makes_it_fit_is_counted(card_of_80_gb):
    for flags in ("--memory offload", "--use_cpu_offload_optimizer", "--use_8bit", "--optimizer came"):
        fits("--gradient_accumulation_steps", "4", *flags.split())
    fits("--use_cpu_offload_optimizer", dtype=torch.float32)
    with pytest.raises(
        UsageError, match=r"needs 93 GiB for fp32 weights.*; add --use_cpu_offload_optimizer, or train"
    ):
        fits("--optimizer", "came", "--ema")
    by_cpu = ["--optimizer", "came", "--use_cpu_offload_optimizer"]
    with pytest.raises(
        UsageError, match=r"needs 112 GiB for the weights and fp32 grad.*; add --offload_gradients, or"
    ):
        fits(*by_cpu, weights=20e9)
    for flags in ([*by_cpu, "--offload_gradients"], ["--memory", "offload"]):
        with pytest.raises(UsageError, match=r"needs 93 GiB for the weights, .*GPU; train a LoRA"):
            fits(*flags, weights=50e9)


def test_host_memory_is_counted_for_all_processes_of_the_machine(card_of_80_gb, monkeypatch):
    low_bits = "gradients, optimizer states and the low bits of weights"
    with pytest.raises(UsageError, match=f"--memory offload: .* needs 224 GiB of host memory for {low_bits}"):
        fits("--memory", "offload", weights=20e9)
    with pytest.raises(
        UsageError, match=f"--use_cpu_offload_optimizer: .* needs 224 GiB of host memory for {low_bits}"
    ):
        fits("--use_cpu_offload_optimizer", weights=20e9)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    with pytest.raises(UsageError, match=r"needs 166 GiB of host memory .* of 2 process\(es\), and 120 GiB"):
        fits("--use_cpu_offload_optimizer")
    with pytest.raises(UsageError, match=r"needs 83 GiB .*GPU; add --use_cpu_offload_optimizer, or train a LoRA"):
        fits()


def test_offload_is_refused_where_states_cannot_be_streamed(monkeypatch):
    """By what the flags alone do not say: the precision, DeepSpeed, the number of processes."""
    args = sft_flags("--memory", "offload")
    check_sft_fits(args, 1e6, torch.bfloat16, CPU)
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(UsageError, match=f"in bf16 only, and this run computes in {str(dtype)[6:]}; use --mixed"):
            check_sft_fits(args, 1e6, dtype, CPU)
    with monkeypatch.context() as patches:
        patches.setenv("WORLD_SIZE", "2")
        with pytest.raises(
            UsageError, match="one GPU only yet, not on 2; use --memory balanced with --use_cpu_offload"
        ):
            check_sft_fits(args, 1e6, torch.bfloat16, CPU)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UsageError, match="DeepSpeed has an optimizer of its own; use --memory balanced"):
        check_sft_fits(args, 1e6, torch.bfloat16, CPU)


def test_choosing_a_level_refuses_full_fine_tuning_that_cannot_have_it():
    args, model = sft_flags("--memory", "offload"), Namespace(num_parameters=1e6)
    assert levels.choose(args, model, [(9, 64, 96)], torch.bfloat16, CPU, is_lora=False) == ("offload", 0)
    with pytest.raises(UsageError, match="in bf16 only"):
        levels.choose(args, model, [(9, 64, 96)], torch.float32, CPU, is_lora=False)
