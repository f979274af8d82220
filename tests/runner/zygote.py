"""A process that has imported everything and computed nothing, and forks a process for each command: runs in a tenth of
a second that can be killed at any moment.

It reads one JSON object per line, {"argv": [...], "cwd": ..., "output": file, "fault": {...} or null, "world": 1},
and answers with {"codes": exit code or minus the signal of each process, "seconds": from the fault's signal to the end
of the last, or null}. A fault sends ``signal`` ``delay`` seconds after the ``n``-th call (from 1) of a method of
`PHASES` has begun in the process of rank ``rank``, if there are so many. Of several processes, which get what torchrun
would give them, each has its own output, ``file.<rank>``.
"""

import importlib
import json
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

PHASES = {
    "checking": "timm_mamba_pkd.runner.commands:check",
    "training": "timm_mamba_pkd.runner.train:Trainer._step",
    "caching": "timm_mamba_pkd.distillation.logits_cache:LogitsCache._store",
    "saving": "timm_mamba_pkd.runner.checkpoints:Checkpoints.save",
    "finishing": "timm_mamba_pkd.runner.train:finish_stage",
    "validating": "timm_mamba_pkd.runner.train:_validate",
    "writing weights": "timm_mamba_pkd.runner.train:_save_weights",
    "keeping the best": "timm_mamba_pkd.runner.checkpoints:Checkpoints.keep_best",
    "switching stages": "torchdistill.core.distillation:MultiStagesDistillationBox.advance_to_next_stage",
    "testing": "timm_mamba_pkd.runner.commands:measure",
    "reporting": "timm_mamba_pkd.runner.commands:report",
}


def plant(phase: str, n: int, delay: float, number: int, moment: str) -> None:
    """Have the signal sent; the file ``moment`` then holds the time."""
    module, _, path = PHASES[phase].partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    method, calls = getattr(owner, name), [0]

    def send() -> None:
        with open(moment, "w") as file:
            file.write(str(time.time()))
        os.kill(os.getpid(), number)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == n:
            threading.Timer(delay, send).start() if delay else send()
        return method(*args, **kwargs)

    setattr(owner, name, wrapper)


def run(command: dict[str, Any], rank: int, port: int) -> int:
    """In the child: the command, its output in a file."""
    import torch

    torch.set_num_threads(1)  # as tests/conftest.py has it
    world, output = command.get("world", 1), command["output"]
    if world > 1:
        output = f"{output}.{rank}"
        names = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()})
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(command["cwd"])
    from timm_mamba_pkd.cli import main

    if command["fault"] is not None:
        fault = dict(command["fault"])
        if fault.pop("rank", 0) == rank:
            plant(**fault)
    code = main(command["argv"])
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def serve() -> None:
    import timm_mamba_pkd.runner.results as results

    results.measure_latency = lambda *args: 1.0  # type: ignore[assignment]
    for line in sys.stdin:
        command = json.loads(line)
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(command.get("world", 1)):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    code = run(command, rank, port)
                finally:
                    os._exit(code)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        seconds = None
        if command["fault"] is not None and os.path.exists(command["fault"]["moment"]):
            with open(command["fault"]["moment"]) as file:
                seconds = time.time() - float(file.read())
        print(json.dumps({"codes": codes, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a Ctrl-C that is meant for pytest
    serve()
