"""The benchmark that says where a step's milliseconds are."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import profile_steps
from profile_steps import Event, StepProfiler


def test_a_report_says_what_the_training_waited_for():
    """Two steps in 10 s: compute of 4 and 4 s; in the gap of 2 s a copy for 1.5 s; other copies hidden by compute."""
    events = [
        Event("nvjet_tst_128x256", 7, 0, 4),
        Event("Memcpy HtoD (Pinned -> Device)", 9, 4, 5.5),
        *(Event("Memcpy DtoH (Device -> Pinned)", 11, 1 + place / 2, 1.5 + place / 2) for place in range(4)),
        Event("flash_fwd", 7, 6, 9),
        Event("elementwise_kernel", 7, 9, 10),
    ]
    lines = profile_steps.lines_of(events, num_steps=2)
    assert lines[0].endswith("5.000")
    assert "busy 4.000, idle 1.000" in lines[1]
    report = "\n".join(lines)
    assert "copies to the GPU: 0.750, of it 0.750 while" in report
    assert "copies to the host: 1.000, of it 0.000 while" in report
    assert "matrix products: 2.000\n" in report
    assert "attention: 1.500\n" in report and "other kernels: 0.500\n" in report
    assert "nothing at all: 0.250" in report  # from 5.5 to 6
    assert "NCCL" not in report
    times = [line.split()[0] for line in lines[lines.index("  longest:") + 1 :]]
    assert times == ["2.000", "1.500", "1.000", "0.750", "0.500"]


def test_a_report_of_copies_alone_is_one_too():
    lines = profile_steps.lines_of([Event("Memcpy HtoD", 9, 1, 2), Event("Memcpy DtoH", 11, 4, 5)], num_steps=1)
    assert lines[0].endswith("4.000") and "  nothing at all: 2.000" in lines


def test_spans_are_merged_and_compared():
    assert profile_steps.union([(3, 5), (0, 2), (1, 4), (6, 7)]) == [(0, 5), (6, 7)]
    assert profile_steps.gaps([(1, 2), (4, 6)], 0, 6) == [(0, 1), (2, 4)]
    assert profile_steps.shared([(0, 2), (4, 6)], [(1, 5), (5.5, 9)]) == 2.5
    assert profile_steps.shared([(0, 10)], [(1, 2), (3, 4), (9, 12)]) == 3
    assert profile_steps.shared([(0, 1)], []) == 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Memcpy HtoD (Pinned -> Device)", "copies to the GPU"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "NCCL"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "updates"),
        ("void kOptimizerStatic8bit2StateBlockwise<c10::BFloat16>", "updates"),
        ("_optimizer_update_2state_8bit_blockwise_triton_kernel", "updates"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90_object", "attention"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "matrix products"),
        ("triton_poi_fused_add_mul_0", "other kernels"),
    ],
)
def test_kernels_are_known_by_their_names(name, kind):
    assert profile_steps.kind_of(Event(name, 7, 0, 1), training=7) == kind


def test_what_runs_beside_the_training_is_told_apart():
    assert profile_steps.kind_of(Event("triton_poi_fused_add_mul_0", 9, 0, 1), training=7) == profile_steps.BESIDE
    assert profile_steps.kind_of(Event("ncclDevKernel_AllReduce", 9, 0, 1), training=7) == "NCCL"


def test_only_some_steps_in_the_middle_are_profiled():
    said, num_profiled = [], 0
    profile = SimpleNamespace(
        start=lambda: said.append("start"),
        stop=lambda: said.append("stop"),
        profiler=SimpleNamespace(kineto_results=SimpleNamespace(events=list)),
    )
    profiler = StepProfiler(
        SimpleNamespace(
            cuda=SimpleNamespace(synchronize=lambda: None),
            profiler=SimpleNamespace(profile=lambda activities: profile, ProfilerActivity=SimpleNamespace(CUDA=1)),
            autograd=torch.autograd,
        )
    )
    for _ in range(8):
        profiler.on_step()
        num_profiled += said[-1:] == ["start"]  # of the steps that come next
    assert said == ["start", "stop"] and num_profiled == profile_steps.NUM_STEPS
    assert "no profile" in profiler.report()  # nothing ran on a GPU, as far as it was told


def test_events_of_a_real_profile_have_names_and_times():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ones(2) + 1
    events = profile_steps.events_of(profile.profiler.kineto_results.events(), torch.autograd.DeviceType.CPU)
    assert {"aten::ones", "aten::add"} <= {event.name for event in events}
    assert all(event.start < event.end for event in events)


@pytest.mark.gpu
def test_on_a_gpu_kernels_and_copies_are_found():
    profiler, weight = StepProfiler(torch), torch.randn(2048, 2048, device="cuda")
    host = torch.empty(weight.shape, pin_memory=True)
    for _ in range(profile_steps.FIRST + profile_steps.NUM_STEPS):
        weight = (weight @ weight).clamp(-1, 1)
        host.copy_(weight, non_blocking=True)
        profiler.on_step()
    report = profiler.report()
    assert "matrix products" in report and "copies to the host" in report
