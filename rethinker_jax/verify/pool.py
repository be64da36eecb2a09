"""The verifier's pool: many responses in, verdicts out in the same order, and nothing hangs or is lost.

One thread per worker process feeds it small chunks and waits for each reply under the item's wall-clock deadline, which
starts when the worker turns to the item. An item at which a worker dies is tried again, and is `crash` only where
workers keep dying at it. Everything else in the chunk goes back to the queue. Answers are extracted here (linear in the
text), so equal answers to a problem are judged once.

What decides should not depend on the machine's load: CPU time counts as `timeout` with rule `cpu_limit` and is
remembered. A worker that waits for a core is waited for, up to `process.MAX_DEADLINES` deadlines. One that is not done
then, or is stuck past the first (stopped, swapped out), is killed and its item tried once more, then it is `timeout`
with rule `deadline`; that and a crash are never remembered.

The processes live no longer than the thread that starts them, so threads end only with the pool.
"""

import atexit
import collections
import concurrent.futures
import dataclasses
import hashlib
import sys
import threading
import weakref
from collections.abc import Sequence
from typing import Any

from rethinker_jax.config import VerifierConfig
from rethinker_jax.errors import UserError
from rethinker_jax.types import Verdict, VerdictName
from rethinker_jax.verify.extract import extract
from rethinker_jax.verify.guards import MAX_TEXT_CHARS
from rethinker_jax.verify.judge import JudgeItem, resolve_type
from rethinker_jax.verify.process import CpuLimitPassed, DeadlinePassed, WorkerGone, WorkerProcess
from rethinker_jax.verify.worker import CPU_LIMIT

__all__ = ["JudgeItem", "PendingVerdicts", "VerifierPool"]

CACHE_SIZE = 8_192  # verdicts of about 400 bytes: two steps of training
CHUNK = 32
MAX_DEATHS = 3  # of workers at one item, or of starting workers in a row
MAX_KILLS = 20  # the same where somebody else killed them
CPU_GRACE_S = 0.25  # in which the worker itself says that an item met its CPU limit
DEADLINE = "deadline"

Key = tuple[str, str, tuple[str, ...], str | None, str]  # type, gold, choices, extracted answer, how it was extracted


@dataclasses.dataclass
class _Deaths:
    """How often a worker was lost at one thing. Being killed says little about that thing, so more of it is borne."""

    own: int = 0
    kills: int = 0

    def add(self, killed: bool) -> bool:
        """Counts one more; returns whether that is enough."""
        self.kills += killed
        self.own += not killed
        return self.own >= MAX_DEATHS or self.kills >= MAX_KILLS


@dataclasses.dataclass(eq=False)
class _Task:
    key: Key
    digest: bytes
    waiting: list[concurrent.futures.Future[Verdict]]
    deaths: _Deaths = dataclasses.field(default_factory=_Deaths)
    stalled: bool = False


def _digest(key: Key) -> bytes:
    """What the cache knows a key by: answers and golds may be long, and its memory is bounded."""
    return hashlib.blake2b(repr(key).encode(), digest_size=16).digest()


class PendingVerdicts:
    """Verdicts on their way. `result()` waits for all of them, in the order of the items."""

    def __init__(self, futures: Sequence[concurrent.futures.Future[Verdict]]):
        self._futures = tuple(futures)

    def __len__(self) -> int:
        return len(self._futures)

    def done(self) -> bool:
        return all(future.done() for future in self._futures)

    def num_done(self) -> int:
        return sum(future.done() for future in self._futures)

    def result(self) -> list[Verdict]:
        """Raises UserError when the workers cannot be started, RuntimeError when the pool was closed first."""
        return [future.result() for future in self._futures]


class VerifierPool:
    """A context manager over `config.num_workers` persistent processes. Thread-safe.

    `counts` holds how many verdicts of each name were given, and `items`, `cache_hits`, `judged`, `cpu_timeouts`,
    `cpu_kills` (of these, by the parent), `wall_timeouts`, `retries`, `restarts`.
    """

    def __init__(self, config: VerifierConfig):
        self.config = config
        self._counts: collections.Counter[str] = collections.Counter()
        self._lock = threading.Condition()
        self._queue: collections.deque[_Task] = collections.deque()
        self._open_tasks: dict[bytes, _Task] = {}
        self._cache: collections.OrderedDict[bytes, Verdict] = collections.OrderedDict()
        self._workers: dict[int, WorkerProcess] = {}
        self._closed = False
        self._failed_starts = _Deaths()
        self._failure: UserError | RuntimeError | None = None
        self._threads = [
            threading.Thread(target=self._run, args=(slot,), name=f"verifier-{slot}", daemon=True)
            for slot in range(config.num_workers)
        ]
        for thread in self._threads:
            thread.start()
        self._at_exit = _close_at_exit(self)

    def __enter__(self) -> "VerifierPool":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def counts(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counts)

    @property
    def worker_pids(self) -> list[int]:
        with self._lock:
            return [worker.pid for worker in self._workers.values()]

    def judge_many(self, items: Sequence[JudgeItem]) -> list[Verdict]:
        """The verdicts of all items, in their order; returns when the last is there."""
        return self.submit(items).result()

    def submit(self, items: Sequence[JudgeItem]) -> PendingVerdicts:
        """Queues the items and returns at once; they are judged while the caller does something else."""
        keys = [_key(item) for item in items]
        digests = [_digest(key) for key in keys]
        futures = []
        with self._lock:
            if self._closed:
                raise RuntimeError("the verifier pool is closed")
            for key, digest in zip(keys, digests, strict=True):
                futures.append(self._enqueue(key, digest))
            self._lock.notify_all()
        return PendingVerdicts(futures)

    def _enqueue(self, key: Key, digest: bytes) -> concurrent.futures.Future[Verdict]:
        future: concurrent.futures.Future[Verdict] = concurrent.futures.Future()
        self._counts["items"] += 1
        known = self._cache.get(digest)
        if known is not None:
            self._cache.move_to_end(digest)
            self._counts["cache_hits"] += 1
            self._counts[known.verdict] += 1
            future.set_result(dataclasses.replace(known, extracted=key[3]))
        elif digest in self._open_tasks:
            self._counts["cache_hits"] += 1
            self._open_tasks[digest].waiting.append(future)
        elif self._failure is not None:
            future.set_exception(self._failure)
        else:
            task = self._open_tasks[digest] = _Task(key, digest, [future])
            self._queue.append(task)
        return future

    def close(self) -> None:
        """Kills the workers; what is still pending raises. May be called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            workers = list(self._workers.values())
            self._fail_all(RuntimeError("the verifier pool was closed before this item was judged"))
            self._lock.notify_all()
        for worker in workers:
            worker.kill()
        for thread in self._threads:
            thread.join(timeout=10)
        atexit.unregister(self._at_exit)

    def _fail_all(self, error: Exception) -> None:
        """Under the lock: gives every pending item the error."""
        self._queue.clear()
        tasks = list(self._open_tasks.values())
        self._open_tasks.clear()
        for task in tasks:
            for future in task.waiting:
                future.set_exception(error)

    def _run(self, slot: int) -> None:
        """The thread of one worker slot: keeps a process alive and feeds it until the pool closes."""
        worker: WorkerProcess | None = None
        try:
            while (chunk := self._next_chunk(start_early=worker is None)) is not None:
                if worker is not None and not worker.alive():  # died while it had nothing to do: no item's fault
                    self._stop(slot, worker)
                    worker = None
                if worker is None:
                    worker = self._start(slot)
                if worker is None:
                    self._give_back(chunk)
                elif chunk and not self._serve(worker, chunk):
                    self._stop(slot, worker)
                    worker = None
        finally:
            if worker is not None:
                self._stop(slot, worker)
            # Nothing but closing and giving up ends a thread. If a defect of ours did, nobody is to wait for ever.
            self._give_up(RuntimeError("a thread of the verifier pool ended; its traceback is on standard error"))

    def _next_chunk(self, start_early: bool) -> list[_Task] | None:
        """The tasks to do next, taken off the queue; [] = start a process before there is work; None = closed."""
        with self._lock:
            while not self._closed and self._failure is None and not self._queue and not start_early:
                self._lock.wait()
            if self._closed or self._failure is not None:
                return None
            size = min(CHUNK, -(-len(self._queue) // (2 * len(self._threads))))
            return [self._queue.popleft() for _ in range(size)]

    def _give_back(self, tasks: Sequence[_Task]) -> None:
        with self._lock:
            if not self._closed and self._failure is None:
                self._queue.extendleft(reversed(tasks))
                self._lock.notify_all()

    def _start(self, slot: int) -> WorkerProcess | None:
        """A process that listens, or None; after some failures in a row the pool gives up with the reason."""
        try:
            worker = WorkerProcess(self.config)
        except OSError as error:  # no memory, processes, files or space in the temporary folder left
            self._note_failed_start(str(error), killed=False)
            return None
        with self._lock:
            if self._closed:
                worker.kill()
            self._workers[slot] = worker
        try:
            worker.wait_ready()
        except (WorkerGone, DeadlinePassed) as loss:
            self._note_failed_start(worker.error_tail(), isinstance(loss, WorkerGone) and worker.was_killed())
            self._stop(slot, worker)
            return None
        with self._lock:
            self._failed_starts = _Deaths()
        return worker

    def _note_failed_start(self, reason: str, killed: bool) -> None:
        with self._lock:
            enough = self._failed_starts.add(killed)
            tries = self._failed_starts.own + self._failed_starts.kills
        if enough:
            self._give_up(
                UserError(
                    f"the verifier's worker process does not start ({tries} attempts). Its last words: "
                    f"{reason or 'none'}. Check that math-verify is installed and verifier.memory_mb "
                    f"(now {self.config.memory_mb}) is at least 512."
                )
            )

    def _give_up(self, failure: UserError | RuntimeError) -> None:
        """Gives every item, pending or still to come, the error; unless the pool is closed or has given up before."""
        with self._lock:
            if not self._closed and self._failure is None:
                self._failure = failure
                self._fail_all(failure)
                self._lock.notify_all()

    def _stop(self, slot: int, worker: WorkerProcess) -> None:
        with self._lock:
            self._workers.pop(slot, None)
            self._counts["restarts"] += not self._closed
        worker.close()

    def _serve(self, worker: WorkerProcess, chunk: list[_Task]) -> bool:
        """Sends a chunk and settles its tasks. False: the worker is gone or must go; the unjudged are queued again."""
        for number, task in enumerate(chunk):
            kind, answer, choices, extracted, rule = task.key
            worker.send(
                {"n": number, "extracted": extracted, "rule": rule, "answer": answer, "choices": choices, "type": kind}
            )
        for number, task in enumerate(chunk):
            try:
                reply = worker.read_reply(self.config.deadline_s, self.config.cpu_limit_s + CPU_GRACE_S)
            except (CpuLimitPassed, DeadlinePassed, WorkerGone) as loss:
                self._give_back(chunk[number + 1 :])
                self._settle_loss(worker, task, loss)
                return False
            assert reply["n"] == number, f"worker answered item {reply['n']} where {number} was due"
            self._settle(task, reply["verdict"], reply["rule"], reply["ms"])
            if reply["last"]:
                self._give_back(chunk[number + 1 :])
                return False
        return True

    def _settle_loss(self, worker: WorkerProcess, task: _Task, loss: Exception) -> None:
        """The worker is lost at this task: a verdict if that is the task's fault, else another try."""
        deadline_ms = self.config.deadline_s * 1000
        if isinstance(loss, CpuLimitPassed):
            with self._lock:
                self._counts["cpu_kills"] += 1
            self._settle(task, "timeout", CPU_LIMIT, deadline_ms)
        elif isinstance(loss, DeadlinePassed) and task.stalled:
            self._settle(task, "timeout", DEADLINE, deadline_ms)
        elif isinstance(loss, WorkerGone) and task.deaths.add(worker.was_killed()):
            self._settle(task, "crash", "worker_died", 0.0)
        else:
            task.stalled = isinstance(loss, DeadlinePassed)
            with self._lock:
                self._counts["retries"] += 1
            self._give_back([task])

    def _settle(self, task: _Task, name: VerdictName, rule: str, ms: float) -> None:
        verdict = Verdict(name, float(name == "correct"), task.key[3], sys.intern(rule), ms)
        with self._lock:
            if self._open_tasks.pop(task.digest, None) is None:
                return  # the pool was closed meanwhile
            self._counts["judged"] += 1
            self._counts[name] += len(task.waiting)
            self._counts["cpu_timeouts"] += rule == CPU_LIMIT
            self._counts["wall_timeouts"] += rule == DEADLINE
            if name != "crash" and rule != DEADLINE:
                self._cache[task.digest] = dataclasses.replace(verdict, extracted=None)
                if len(self._cache) > CACHE_SIZE:
                    self._cache.popitem(last=False)
            waiting = task.waiting
        for future in waiting:
            future.set_result(verdict)


def _key(item: JudgeItem) -> Key:
    """What is judged of an item. Texts are cut just above the length at which they are refused by their length."""
    found = extract(item.response)
    text = found.text if found.text is None else found.text[: MAX_TEXT_CHARS + 1]
    choices = tuple(choice[: MAX_TEXT_CHARS + 1] for choice in item.choices)
    return resolve_type(item.type), item.answer[: MAX_TEXT_CHARS + 1], choices, text, found.rule


def _close_at_exit(pool: VerifierPool) -> Any:
    """Registers a hook that closes the pool when the interpreter ends, without keeping the pool alive until then."""
    reference = weakref.ref(pool)

    def hook() -> None:
        alive = reference()
        if alive is not None:
            alive.close()

    atexit.register(hook)
    return hook
