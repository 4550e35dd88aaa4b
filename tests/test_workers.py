"""The pool of worker processes gives results by rank, and errors that name the rank."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.workers import Workers


def sum_over_ranks(rank, world_size, value):
    total = torch.tensor([float(value + rank)])
    dist.all_reduce(total)
    return rank, dist.get_world_size(), total.item()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_each_call_has_a_process_group_of_its_size(ranks, world_size):
    total = sum(10.0 + rank for rank in range(world_size))
    expected = [(rank, world_size, total) for rank in range(world_size)]
    assert ranks(world_size, sum_over_ranks, 10) == expected


def process_id(rank, world_size):
    return os.getpid(), torch.get_num_threads()


def test_calls_share_the_processes_which_have_one_thread_each(ranks):
    first = ranks(4, process_id)
    assert ranks(2, process_id) == first[:2]
    assert {threads for _, threads in first} == {1}


def draw(rank, world_size):
    return torch.rand(3)


def test_every_rank_is_seeded_alike(ranks):
    first, second = ranks(2, draw)
    assert torch.equal(first, second)


def fail_on_rank_1(rank, world_size):
    if rank == 1:
        raise KeyError("table 'user'")
    dist.barrier()


def test_error_of_one_rank_arrives_with_its_rank_and_traceback(ranks):
    with pytest.raises(KeyError, match="table 'user'") as caught:
        ranks(2, fail_on_rank_1)
    notes = "\n".join(caught.value.__notes__)
    assert "on rank 1 of 2" in notes
    assert "in fail_on_rank_1" in notes
    assert ranks(2, sum_over_ranks, 0) == [(0, 2, 1.0), (1, 2, 1.0)]


class TwoPartError(Exception):
    def __init__(self, table, rank):
        super().__init__(f"{table} on {rank}")


def fail_with_what_does_not_unpickle(rank, world_size):
    raise TwoPartError("user", rank)


def test_error_that_does_not_unpickle_arrives_as_text(ranks):
    with pytest.raises(RuntimeError, match="TwoPartError: user on 0"):
        ranks(1, fail_with_what_does_not_unpickle)


def test_more_ranks_than_workers_are_refused(ranks):
    with pytest.raises(ValueError, match="from 1 to 4 are there, got 5"):
        ranks(5, draw)


def sleep_on_rank_0(rank, world_size):
    if rank == 0:
        time.sleep(60)


def die_on_rank_1(rank, world_size):
    if rank == 1:
        os._exit(3)
    dist.barrier()


@pytest.mark.slow
def test_hang_names_the_rank_and_costs_only_the_call(capfd):
    workers = Workers(num_workers=2)
    with pytest.raises(TimeoutError, match=r"ranks \[0\] of 2 gave no answer in 2 s"):
        workers.run(2, sleep_on_rank_0, timeout_s=2.0)
    assert "in sleep_on_rank_0" in capfd.readouterr().err
    assert workers.run(2, sum_over_ranks, 0) == [(0, 2, 1.0), (1, 2, 1.0)]
    workers.close()


@pytest.mark.slow
def test_death_of_a_worker_is_an_error_and_the_next_call_works():
    workers = Workers(num_workers=2)
    with pytest.raises(RuntimeError, match="process of rank 1 ended with code 3"):
        workers.run(2, die_on_rank_1)
    assert workers.run(2, sum_over_ranks, 0) == [(0, 2, 1.0), (1, 2, 1.0)]
    workers.close()
