"""The other processes of a job, watched: one that dies, stops or hangs ends all of them, with its name and soon.

Left alone, jax lets the others wait in a collective for minutes, or aborts them without a word of who is missing. Here
each process leaves signs of life with the job's coordinator, every second, and a thread of each looks at all of them.
Nothing here imports jax: `devices` brings the coordinator's client when the process has joined a job.
"""

import ctypes
import dataclasses
import faulthandler
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, NoReturn, Protocol, runtime_checkable

RUN_AGAIN = 75  # exit code: the same command goes on from the last checkpoint
PERIOD_S = 1.0  # between looks; longer in a large job, whose signs all pass through process 0
FEW = 32  # processes: more of them look more seldom
SILENT_S = 30.0  # a process of which nothing was heard for so long is taken for dead or frozen
GONE_S = 30.0  # for which process 0, when all have done their work, waits for the others to go
ROOT = "rethinker_jax"
AGAIN = "the same command in all of them goes on from the last checkpoint"


@runtime_checkable
class Board(Protocol):
    """What every process of a job can write to and read; jax's client of the coordination service is one."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = ...) -> None: ...

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]: ...


@dataclasses.dataclass
class Sign:
    """The last sign of life of a process, and when its beat and its work moved last by our clock."""

    host: str
    beat: int
    work: int
    place: str
    beat_at: float
    work_at: float


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a process left: code 0 = with its work done."""

    code: int
    message: str
    host: str


class Peers:
    """The watch of one process over a job of several. `work` and `place` say where its main thread is."""

    def __init__(self, board: Board, index: int, count: int, silent_s: float, stall_s: float):
        self.index, self.count = index, count
        self.work, self.place = 0, "starting"
        self.stopping = False  # all have agreed to stop: who leaves is no reason to leave what is not yet written
        self._board, self._silent_s, self._stall_s = board, silent_s, stall_s
        self._host = socket.gethostname()
        self._period_s = PERIOD_S * max(1.0, count / FEW)
        self._signs: dict[int, Sign] = {}
        self._heard_at = time.monotonic()
        self._over = threading.Event()

    def start(self) -> None:
        self._beat(0)
        for work in (self._watch, self._guard):
            threading.Thread(target=work, name="peers", daemon=True).start()

    def leave(self, code: int, message: str) -> None:
        """Tell the others that this process ends early, and give them time to hear it: process 0 keeps the board."""
        self._over.set()
        try:
            self._note("left", {"code": code, "message": message[:2000], "host": self._host})
        except RuntimeError:
            return  # the board is gone, and with it all who could read
        if self.index == 0:
            time.sleep(3 * self._period_s)

    def finish(self) -> None:
        """Return in process 0 when all have done their work and gone; the others are ended here.

        Until then the watch goes on: who still writes a report is not mistaken for dead, nor waited for in vain.
        """
        self._note("left", {"code": 0, "message": "done", "host": self._host})
        self._await("left", self.count)
        if self.index == 0:
            self._await("gone", self.count - 1, GONE_S)
            self._over.set()
            return
        self._over.set()
        self._note("gone", {})
        sys.stdout.flush()
        sys.stderr.flush()
        # Not by way of jax, which would call the coordinator once more, and abort where that has gone.
        os._exit(0)

    def _await(self, kind: str, number: int, most_s: float = math.inf) -> None:
        began_at = time.monotonic()
        while time.monotonic() - began_at < most_s:
            if len(_notes(dict(self._board.key_value_dir_get(ROOT)), kind)) >= number:
                return
            time.sleep(self._period_s / 5)

    def _note(self, kind: str, note: Mapping[str, Any]) -> None:
        self._board.key_value_set(f"{ROOT}/{kind}/{self.index}", json.dumps(note), allow_overwrite=True)

    def await_verdict(self) -> None:
        """Block while the watch may still find out why a collective failed; it ends the process where it does."""
        time.sleep(self._silent_s + 5 * self._period_s)

    def _watch(self) -> None:
        beat = 0
        while not self._over.wait(self._period_s):
            beat += 1
            try:
                self._beat(beat)
                found = dict(self._board.key_value_dir_get(ROOT))
                self._heard_at = time.monotonic()
            except RuntimeError:
                continue  # the guard ends a board that stays silent
            self._judge(found)

    def _guard(self) -> None:
        """Beside the watch, which may wait for an answer of the board for ever."""
        while not self._over.wait(self._period_s):
            if time.monotonic() - self._heard_at > self._silent_s:
                self.board_lost(f"has not answered for {self._silent_s:.0f} s")

    def board_lost(self, how: str) -> NoReturn:
        """End this process, for the board has gone or is frozen with the process that keeps it."""
        self._over.set()
        who = f"process 0 of {self.count}, which keeps the job together, {how}"
        print(f"{who}: it was killed, is frozen, or its host is gone; {AGAIN}", file=sys.stderr, flush=True)
        os._exit(RUN_AGAIN)

    def _beat(self, beat: int) -> None:
        self._note("beat", {"host": self._host, "beat": beat, "work": self.work, "place": self.place})

    def _judge(self, found: Mapping[str, str]) -> None:
        """Ends this process if another one left before its work was done, fell silent, or all of them hang."""
        now = time.monotonic()
        left = {number: Ending(**note) for number, note in _notes(found, "left").items()}
        for number, ending in left.items():
            if ending.code and number != self.index and not self.stopping:
                self._end(
                    ending.code, f"process {number} of {self.count} ({ending.host}) stopped: {ending.message}", True
                )
        for number, note in _notes(found, "beat").items():
            sign = self._signs.get(number)
            if sign is None:
                self._signs[number] = Sign(**note, beat_at=now, work_at=now)
                continue
            if note["beat"] != sign.beat:
                sign.beat, sign.beat_at = note["beat"], now
            if note["work"] != sign.work:
                sign.work, sign.place, sign.work_at = note["work"], note["place"], now
        for number, sign in self._signs.items():
            if number not in left and now - sign.beat_at > self._silent_s:
                self._end(
                    RUN_AGAIN,
                    f"process {number} of {self.count} ({sign.host}) has not been heard of for {self._silent_s:.0f} s: "
                    "it was killed, is frozen, or its host is gone",
                )
        own = self._signs.get(self.index)
        if own is not None and now - own.work_at > self._stall_s:
            slowest = min(self._signs, key=lambda number: (self._signs[number].work, number))
            sign = self._signs[slowest]
            faulthandler.dump_traceback(all_threads=True)
            self._end(
                RUN_AGAIN,
                f"nothing has moved for {self._stall_s:.0f} s; furthest behind is process {slowest} of {self.count} "
                f"({sign.host}), in {sign.place!r}. The stacks above are this process's",
            )

    def _end(self, code: int, why: str, told: bool = False) -> NoReturn:
        """End this process at once: its main thread may be in a collective that never returns."""
        again = "" if code != RUN_AGAIN or told else f"; {AGAIN}"
        print(f"{why}{again}", file=sys.stderr, flush=True)
        self.leave(code, why)
        os._exit(code)


def _notes(found: Mapping[str, str], kind: str) -> dict[int, dict[str, Any]]:
    prefix = f"{ROOT}/{kind}/"
    return {int(key.removeprefix(prefix)): json.loads(note) for key, note in found.items() if key.startswith(prefix)}


COMMAND: list[str] = []  # the words of this process's command line, which have to be the same in all
_peers: list[Peers] = []  # of this process: none, or one


def watch(board: Board, index: int, count: int, address: str, stall_s: float) -> None:
    """Begin to watch; once a process. address: HOST:PORT of the board."""
    peers = Peers(board, index, count, SILENT_S, stall_s)
    peers.start()
    _peers.append(peers)
    host, _, port = address.rpartition(":")
    _soften_abort(peers, host, int(port))


def _soften_abort(peers: Peers, host: str, port: int) -> None:
    """jax's library aborts this process, with a stack, as soon as the coordinator is lost, and cannot be told not to.

    So an abort is looked at first: where the coordinator no longer listens, it becomes what it is. Any other abort goes
    its way. The handler is one of C, because Python's would wait for the main thread.
    """

    def handle(_: int) -> None:
        _LIBC.alarm(20)  # whatever happens here, the process ends
        try:
            socket.create_connection((host, port), timeout=5).close()
        except OSError:
            peers.board_lost("has gone")

    _handlers.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(handle))
    _LIBC.signal(signal.SIGABRT, _handlers[-1])


_LIBC = ctypes.CDLL(None)
_handlers: list[Any] = []  # what C calls has to stay


def watched() -> bool:
    """Is this process one of several."""
    return bool(_peers)


def index() -> int:
    """The number of this process in its job; 0 of one that is alone."""
    return _peers[0].index if _peers else 0


def count() -> int:
    """Processes of the job."""
    return _peers[0].count if _peers else 1


def at(place: str) -> None:
    """The main thread has come here: a sign that it works. Costs nothing worth counting."""
    for peers in _peers:
        peers.work, peers.place = peers.work + 1, place


def stop_together() -> None:
    """All processes have agreed to stop here: each ends when it has written its part."""
    for peers in _peers:
        peers.stopping = True


def finish() -> None:
    """This process has done its work. Returns in process 0 alone, and last."""
    for peers in _peers:
        peers.finish()


def leave(code: int, message: str) -> None:
    """This process ends before its work is done: tell the others, and do not wait for them. Returns if it is alone."""
    for peers in _peers:
        sys.stdout.flush()
        sys.stderr.flush()
        peers.leave(code, message)
        os._exit(code)


def await_verdict() -> None:
    """After an error that another process's end may have caused: give the watch time to say so."""
    for peers in _peers:
        peers.await_verdict()
