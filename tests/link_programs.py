"""What the ranks of tests/test_links.py run. A file of its own, for every rank imports it: nothing heavy, torch only where it is needed."""

import os
import socket
import time


def who_am_i(prefix: str) -> tuple:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "GLOO_SOCKET_IFNAME", "EXTRA")
    return (prefix, [os.environ.get(name) for name in names], socket.gethostname(), [name for _, name in socket.if_nameindex()])


def fail_in(rank: str) -> None:
    if os.environ["RANK"] == rank:
        raise ValueError(f"rank {rank} has had enough")
    time.sleep(60)


def reduce_rows(rounds: int) -> list[float]:
    """all_reduce of a row of 8192 fp32 by gloo: seconds of each."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    row, times = torch.empty(8192), []
    for _ in range(rounds):
        row.fill_(dist.get_rank() + 1.0)
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(row)
        times.append(time.perf_counter() - began)
        assert row.eq(3.0).all()
    dist.destroy_process_group()
    return times
