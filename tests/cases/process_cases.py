"""Several processes in a test: forked from a server that has imported everything once, each with a log of its own."""

import multiprocessing
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

IMPORTED_ONCE = ["accelerate", "timm.data", "timm.optim", "timm.scheduler", "torch.utils.tensorboard", "sape2.studies.run"]
LIMIT_S = 600


@dataclass
class Ended:
    """How a process ended, and what it had to say on both outputs."""

    status: int
    said: str


class Started:
    """`size` processes that call `work(*arguments)` with the environment of a launcher; its result is their exit status."""

    def __init__(self, folder, size, work, *arguments):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED_ONCE)
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"{time.monotonic_ns()}-{rank}.txt" for rank in range(size)]
        port = free_port()
        self.processes = [
            context.Process(target=_child, args=(rank, size, port, log, work, arguments)) for rank, log in enumerate(self.logs)
        ]
        for process in self.processes:
            process.start()

    def wait(self):
        """All of them, by rank; those that do not end in time are killed, which a test takes for an error."""
        deadline = time.monotonic() + LIMIT_S
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()
        return [Ended(process.exitcode, log.read_text()) for process, log in zip(self.processes, self.logs, strict=True)]


def in_processes(folder, size, work, *arguments):
    return Started(folder, size, work, *arguments).wait()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _child(rank, size, port, log, work, arguments):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    file = os.open(log, os.O_CREAT | os.O_WRONLY)
    for number in (1, 2):
        os.dup2(file, number)
    sys.stdout.reconfigure(line_buffering=True)
    torch.set_num_threads(1)
    sys.exit(work(*arguments))


def writes_are_refused_below(folder: Path):
    """From here on, opening a file below `folder` for writing, or making a folder there, ends the process with status 77."""

    def watch(event, arguments):
        if event == "open":
            path, _, flags = arguments
            written = isinstance(path, (str, os.PathLike)) and isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
        else:
            path, written = arguments[0], event in ("os.mkdir", "os.rename", "os.remove")
        if written and Path(path).resolve().is_relative_to(folder.resolve()):
            os.write(2, f"{event} {path}\n".encode())
            os._exit(77)

    sys.addaudithook(watch)
