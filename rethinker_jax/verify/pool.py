"""The verifier's pool: many responses in, verdicts out in the same order, and nothing hangs or is lost.

One thread per worker process feeds it small chunks and waits for each reply under the item's wall-clock deadline, which
starts when the worker turns to the item. Past the deadline the worker is killed and the item is `timeout`. The item at
which a worker dies is tried once more, then it is `crash`. Everything else in the chunk goes back to the queue. Answers
are extracted here (linear in the text), so equal answers to a problem are judged once.

What decides should not depend on the machine's load: the CPU limit counts as `timeout` with rule `cpu_limit` and is
remembered; a wall-clock timeout (rule `deadline`) and a crash never are.
"""

import atexit
import collections
import concurrent.futures
import dataclasses
import threading
import weakref
from collections.abc import Sequence
from typing import Any

from rethinker_jax.config import VerifierConfig
from rethinker_jax.errors import UserError
from rethinker_jax.types import Verdict
from rethinker_jax.verify.extract import extract
from rethinker_jax.verify.guards import MAX_TEXT_CHARS
from rethinker_jax.verify.judge import JudgeItem, resolve_type
from rethinker_jax.verify.process import DeadlinePassed, WorkerGone, WorkerProcess
from rethinker_jax.verify.worker import CPU_LIMIT

__all__ = ["JudgeItem", "PendingVerdicts", "VerifierPool"]

CACHE_SIZE = 200_000
CHUNK = 32
MAX_ATTEMPTS = 2
MAX_FAILED_STARTS = 3
DEADLINE = "deadline"

Key = tuple[str, str, tuple[str, ...], str | None, str]


@dataclasses.dataclass(eq=False)
class _Task:
    key: Key
    waiting: list[concurrent.futures.Future[Verdict]]
    attempts: int = 0


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
    `wall_timeouts`, `retries`, `restarts`.
    """

    def __init__(self, config: VerifierConfig):
        self.config = config
        self._counts: collections.Counter[str] = collections.Counter()
        self._lock = threading.Condition()
        self._queue: collections.deque[_Task] = collections.deque()
        self._open_tasks: dict[Key, _Task] = {}
        self._cache: collections.OrderedDict[Key, Verdict] = collections.OrderedDict()
        self._workers: dict[int, WorkerProcess] = {}
        self._closed = False
        self._failed_starts = 0
        self._failure: UserError | None = None
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
        keys = []
        for item in items:
            found = extract(item.response)
            text = (
                found.text
                if found.text is None or len(found.text) <= MAX_TEXT_CHARS
                else found.text[: MAX_TEXT_CHARS + 1]
            )
            keys.append((resolve_type(item.type), item.answer, tuple(item.choices), text, found.rule))
        futures = []
        with self._lock:
            if self._closed:
                raise RuntimeError("the verifier pool is closed")
            for key in keys:
                futures.append(self._enqueue(key))
            self._lock.notify_all()
        return PendingVerdicts(futures)

    def _enqueue(self, key: Key) -> concurrent.futures.Future[Verdict]:
        future: concurrent.futures.Future[Verdict] = concurrent.futures.Future()
        self._counts["items"] += 1
        known = self._cache.get(key)
        if known is not None:
            self._cache.move_to_end(key)
            self._counts["cache_hits"] += 1
            self._counts[known.verdict] += 1
            future.set_result(known)
        elif key in self._open_tasks:
            self._counts["cache_hits"] += 1
            self._open_tasks[key].waiting.append(future)
        elif self._failure is not None:
            future.set_exception(self._failure)
        else:
            task = _Task(key, [future])
            self._open_tasks[key] = task
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
        """A process that listens, or None; after three failures in a row the pool gives up with the reason."""
        worker = WorkerProcess(self.config)
        with self._lock:
            if self._closed:
                worker.kill()
            self._workers[slot] = worker
        try:
            worker.wait_ready()
        except (WorkerGone, DeadlinePassed):
            reason = worker.error_tail()
            self._stop(slot, worker)
            with self._lock:
                self._failed_starts += 1
                if self._failed_starts >= MAX_FAILED_STARTS and not self._closed:
                    self._failure = UserError(
                        f"the verifier's worker process does not start ({MAX_FAILED_STARTS} attempts). Its last words: "
                        f"{reason or 'none'}. Check that math-verify is installed and verifier.memory_mb "
                        f"(now {self.config.memory_mb}) is at least 512."
                    )
                    self._fail_all(self._failure)
                    self._lock.notify_all()
            return None
        with self._lock:
            self._failed_starts = 0
        return worker

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
            cpu_before = worker.cpu_seconds() if number == 0 else None
            try:
                reply = worker.read_line(self.config.deadline_s)
            except DeadlinePassed:
                self._settle_timeout(worker, task, cpu_before)
                self._give_back(chunk[number + 1 :])
                return False
            except WorkerGone:
                self._retry_or_crash(task)
                self._give_back(chunk[number + 1 :])
                return False
            assert reply["n"] == number, f"worker answered item {reply['n']} where {number} was due"
            self._settle(
                task,
                Verdict(
                    reply["verdict"], float(reply["verdict"] == "correct"), task.key[3], reply["rule"], reply["ms"]
                ),
            )
            if reply["last"]:
                self._give_back(chunk[number + 1 :])
                return False
        return True

    def _settle_timeout(self, worker: WorkerProcess, task: _Task, cpu_before: float | None) -> None:
        """Past the deadline: the CPU limit where the process burned it without returning to Python, else the clock."""
        cpu_after = worker.cpu_seconds()
        burned = cpu_before is not None and cpu_after is not None and cpu_after - cpu_before >= self.config.cpu_limit_s
        rule = CPU_LIMIT if burned else DEADLINE
        self._settle(task, Verdict("timeout", 0.0, task.key[3], rule, self.config.deadline_s * 1000))

    def _retry_or_crash(self, task: _Task) -> None:
        task.attempts += 1
        if task.attempts < MAX_ATTEMPTS:
            with self._lock:
                self._counts["retries"] += 1
            self._give_back([task])
        else:
            self._settle(task, Verdict("crash", 0.0, task.key[3], "worker_died"))

    def _settle(self, task: _Task, verdict: Verdict) -> None:
        with self._lock:
            if self._open_tasks.pop(task.key, None) is None:
                return  # the pool was closed meanwhile
            self._counts["judged"] += 1
            self._counts[verdict.verdict] += len(task.waiting)
            self._counts["cpu_timeouts"] += verdict.rule == CPU_LIMIT
            self._counts["wall_timeouts"] += verdict.rule == DEADLINE
            if verdict.verdict != "crash" and verdict.rule != DEADLINE:
                self._cache[task.key] = verdict
                if len(self._cache) > CACHE_SIZE:
                    self._cache.popitem(last=False)
            waiting = task.waiting
        for future in waiting:
            future.set_result(verdict)


def _close_at_exit(pool: VerifierPool) -> Any:
    """Registers a hook that closes the pool when the interpreter ends, without keeping the pool alive until then."""
    reference = weakref.ref(pool)

    def hook() -> None:
        alive = reference()
        if alive is not None:
            alive.close()

    atexit.register(hook)
    return hook
