"""One of two processes that work on arrays together; what `test_peers.py` lets go wrong.

    JAX_COORDINATOR_ADDRESS=... JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=1 python job_member.py FAULT INDEX

Process INDEX meets the FAULT in its third round: killed, frozen (SIGSTOP), hangs, bad_input, defect, stop (SIGTERM);
"none" for a job that ends well. It prints the seconds of the system's clock at which it does.
"""

import os
import signal
import sys
import time

from rethinker_jax import commands, peers
from rethinker_jax.config import Config, RunConfig
from rethinker_jax.devices import start_jax
from rethinker_jax.errors import Stopped, UserError
from rethinker_jax.main import main
from rethinker_jax.processes import exchange

FAULT, INDEX = sys.argv[1], int(sys.argv[2])
# Silence ends the job soon only where it is what the test waits for: on a busy machine a sound process may be silent.
peers.SILENT_S = 4.0 if FAULT in ("killed", "frozen") else 120.0


def meet_fault() -> None:
    print(f"fault at {time.monotonic()}", flush=True)
    if FAULT == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if FAULT == "frozen":
        os.kill(os.getpid(), signal.SIGSTOP)
    if FAULT == "hangs":
        time.sleep(1000)
    if FAULT == "bad_input":
        raise UserError("the disk of this host is full")
    if FAULT == "defect":
        raise ValueError("a defect")
    if FAULT == "stop":
        raise Stopped("asked to stop (SIGTERM)", 75)


def work(_: object) -> None:
    start_jax(Config(run=RunConfig(compilation_cache="")))
    for number in range(6):
        peers.at(f"round {number}")
        if number == 2 and peers.index() == INDEX:
            meet_fault()
        found = exchange([number, peers.index()])
        assert found == [[number, index] for index in range(peers.count())], found
    print("done", flush=True)


commands.COMMANDS["report"] = commands.dataclasses.replace(commands.COMMANDS["report"], run=work)
sys.exit(main(["report", "x"]))
