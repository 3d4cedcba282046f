"""What several ranks must agree on, in two processes on the CPU."""

import json
import os
import signal
import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed

from args import parse_training_args
from base.ranks import exchange_on_host, group_store
from engine import compose
from engine.optimizers import make_lr_scheduler_from_args, make_optimizer_from_args
from engine.update import TrainingState, update
from test_scripts import run_ranks
from test_update import engine_of


NUM_RANKS = 2


@pytest.fixture
def on_two_ranks(tmp_path):
    """`function(rank)` on each of two ranks that have met; what each returned, through JSON."""

    def run(function):
        def main():
            torch.distributed.init_process_group("gloo")
            rank = torch.distributed.get_rank()
            (tmp_path / str(rank)).write_text(json.dumps(function(rank)))
            torch.distributed.destroy_process_group()

        assert run_ranks(main, NUM_RANKS) == [0] * NUM_RANKS
        return [json.loads((tmp_path / str(rank)).read_text()) for rank in range(NUM_RANKS)]

    return run


def flags(*more):
    return parse_training_args(
        "t2v_lora", ["--pretrained_model_name_or_path", "m", "--data_root", "d", "--output_dir", "o", *more]
    )


def test_all_ranks_compute_attention_by_the_kernel_of_the_first(on_two_ranks, monkeypatch):
    """Each would else take the one that was faster in its own trial, and results would depend on that."""

    def pick(rank):
        monkeypatch.setattr(compose, "pick_attention", lambda *given: f"the choice of rank {rank}")
        return compose.agree_on_attention(flags(), (1, 8, 2, 32), torch.float32, torch.device("cpu"))

    assert on_two_ranks(pick) == ["the choice of rank 0"] * NUM_RANKS


def test_warm_up_counts_updates_whatever_the_number_of_ranks(on_two_ranks):
    def rates(rank):
        args = flags("--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "4", "--max_train_steps", "6")
        optimizer = make_optimizer_from_args(args, [torch.nn.Parameter(torch.zeros(2))], 1.0)
        schedule, seen = make_lr_scheduler_from_args(args, optimizer, 6), []
        for _ in range(6):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return seen

    assert on_two_ranks(rates) == [[0, 0.25, 0.5, 0.75, 1, 1]] * NUM_RANKS


def test_an_update_is_the_clipped_mean_of_all_gradients(on_two_ranks):
    """Clipped before, each rank's would count the same, however long; and a sum would be twice the mean."""

    def step(rank):
        weight = torch.nn.Parameter(torch.zeros(2))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        gradient = torch.tensor([[6.0, 0.0], [0.0, 8.0]][rank])
        result = update((weight * gradient).sum(), TrainingState(engine_of(weight), optimizer, schedule), True, 2.5)
        return [float(result.grad_norm), *weight.tolist()]

    assert on_two_ranks(step) == [pytest.approx([5.0, -1.5, -2.0])] * NUM_RANKS


def test_a_rank_that_waits_for_another_hears_ctrl_c(on_two_ranks):
    """For hours, perhaps: the other hashes or uploads. A collective would hear it only when the other has come."""

    def wait(rank):
        if rank == 0:
            group_store().wait(["has left"], timedelta(seconds=60))
            return "never came"
        signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest-xdist's workers ignore it
        with pytest.raises(KeyboardInterrupt):
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            exchange_on_host("never")
        group_store().set("has left", "")
        return "left"

    assert on_two_ranks(wait) == ["never came", "left"]


def test_ranks_that_meet_hear_what_each_says(on_two_ranks):
    assert (
        on_two_ranks(lambda rank: [exchange_on_host("first", f"{rank}"), exchange_on_host("second")])
        == [[["0", "1"], ["", ""]]] * NUM_RANKS
    )
