r"""Runs a function in several processes of a group, as ``torchrun`` would, but with less to import.

The processes are forks of a server that has imported the library once.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from pyro_vaediff.train.distributed import process_group

TIMEOUT = 120  # seconds of a machine that has other things to do; one takes less than 10

context = multiprocessing.get_context("forkserver")
# torch imports the second one at the first step of an optimizer, for more than a second.
context.set_forkserver_preload(["pytest", "torch._dynamo", "pyro_vaediff.train.loop"])


def together(function: Callable, size: int, *args: Any, **kwargs: Any) -> list[Any]:
    r"""Returns what a function returns in each process of a group.

    Arguments:
        function: The function, which a module must define. In place of an exception that is raised
            in it, it returns the exception.
        size: The number of processes; their results come in the order of their ranks.
        args: Its arguments.
        kwargs: Its keyword arguments.
    """
    port = free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    processes = [
        context.Process(
            target=child, args=(rank, size, port, sender, partial(function, *args, **kwargs))
        )
        for rank, (_, sender) in enumerate(pipes)
    ]
    try:
        for process in processes:
            process.start()
        results = []
        for receiver, _ in pipes:
            assert receiver.poll(TIMEOUT), f"no result after {TIMEOUT} seconds"
            results.append(receiver.recv())
        for process in processes:
            process.join(TIMEOUT)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()
    broken = [result for result in results if isinstance(result, str)]
    assert not broken, "\n".join(broken)
    return results


def child(rank: int, size: int, port: int, sender: Connection, function: Callable) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        with process_group("cpu"):
            result = function()
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
        result = error
    except BaseException:
        result = traceback.format_exc()
    sender.send(result)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
