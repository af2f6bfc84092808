"""The only place that starts, kills and reaps worker processes. What to do and when is the supervisor's decision.

Processes are started and reaped in one thread of its own, which lives as long as the master: a start takes some
milliseconds that the event loop does not have, and a child asks the kernel to be killed with the thread that made it
(PR_SET_PDEATHSIG), so that thread must not end before the master does.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, Literal

import structlog

from core.model import ModelSpec
from workers import deaths
from workers.arena import Arena
from workers.channel import MasterEnd
from workers.contract import PoolEvent, Said, WorkerDown, WorkerUp, WorkerView
from workers.devices import DevicePlan
from workers.messages import (
    BatchDidNotFit,
    BatchDone,
    Boot,
    BootFailed,
    FromWorker,
    Loading,
    Ping,
    Pong,
    Progress,
    Ready,
    RunBatch,
    Stop,
    ToWorker,
)
from workers.printed import Printed
from workers.process import SharedFd, child_main
from workers.supervisor import Life, Start, Supervisor, SupervisorConfig, WorkerState

log = structlog.get_logger("pool")
REAPING = 1.0  # seconds that killed processes have, at a stop, to be gone
Kind = Literal["died", "killed", "memory", "hung", "boot_failed", "stopped"]


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """Seconds, counts and the outputs folder, as in the settings. An idle worker that does not answer a ping for
    `ping_timeout` is killed, and so is one that was retired and has not gone after `retire_timeout`."""

    root: str
    codec_threads: int = 2
    warm_up: bool = True
    log_level: str = "info"
    loaded_models: int = 0
    models_folder: str = ""
    capture: bool = False  # what workers print becomes lines of the log
    ping_interval: float = 2.0
    ping_timeout: float = 5.0
    retire_timeout: float = 30.0
    supervisor: SupervisorConfig = field(default_factory=SupervisorConfig)


@dataclass(slots=True)
class Incarnation:
    """One life of one worker: its process, its channel, and what is known of it."""

    worker: str
    number: int
    process: SpawnProcess
    channel: MasterEnd
    outstanding: int = 0             # batches sent and not done
    pinged_at: float | None = None   # an unanswered ping
    boot_error: str | None = None
    killed_for: str | None = None
    frozen: bool = False             # somebody had stopped it when it was last looked at
    stopping: bool = False
    what: str = "process started"
    loading: str = ""                # a model, for a batch
    progress: float = 0.0
    facts: Mapping[str, Any] = field(default_factory=dict)
    memory: Pong | None = None
    printed: Printed | None = None


def exit_words(code: int | None) -> str:
    """An exit code as a person says it."""
    if code is not None and code < 0:
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"killed by signal {-code}"
    return f"exited with code {code}"


def _detail(living: Incarnation | None, life: Life) -> str:
    """What a device does just now, where that takes long, or what has become of it."""
    if living is None:
        return life.detail
    return living.what if life.state is WorkerState.STARTING else living.loading or life.detail


class Pool:
    def __init__(
        self, plans: Sequence[DevicePlan], specs: Sequence[ModelSpec], arena: Arena, config: PoolConfig
    ) -> None:
        self._plans = {plan.worker: plan for plan in plans}
        self._specs = tuple(specs)
        self._arena = arena
        self._config = config
        self._supervisor = Supervisor.of(self._plans, config.supervisor)
        self._living: dict[str, Incarnation] = {}
        self._oom_kills = deaths.oom_kills()
        self._spawner = ThreadPoolExecutor(1, thread_name_prefix="spawner")
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._all_gone = asyncio.Event()
        self._listener: Callable[[PoolEvent], None] = lambda _: None

    async def start(self, listener: Callable[[PoolEvent], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        atexit.register(self._kill_all)
        self._reconcile()
        self._pinger = self._loop.create_task(self._ping_idle_workers())

    def send(self, worker: str, incarnation: int, *messages: ToWorker) -> None:
        living = self._living.get(worker)
        if living and living.number == incarnation:
            living.outstanding += sum(isinstance(message, RunBatch) for message in messages)
            living.channel.send(*messages)

    def kill(self, worker: str, incarnation: int, why: str) -> None:
        living = self._living.get(worker)
        if living and living.number == incarnation and living.killed_for is None:
            living.killed_for = why
            living.frozen = deaths.is_stopped(living.process.pid)
            self._supervisor.dying(worker, why)
            log.warning("worker is killed", device=worker, incarnation=incarnation, why=why)
            living.process.kill()  # its end of the channel closes; _reap follows

    def retire(self, worker: str, incarnation: int) -> None:
        """Ask it to finish what it holds and go; a new incarnation follows."""
        living = self._living.get(worker)
        if living and living.number == incarnation and not living.stopping:
            living.stopping = True
            self._supervisor.dying(worker, "making place for its successor")
            living.channel.send(Stop())
            self._loop.call_later(self._config.retire_timeout, self.kill, worker, incarnation, "did not go when asked")

    def revive(self) -> list[str]:
        """Start the devices that were given up, and say which."""
        revived = self._supervisor.revive(self._loop.time())
        self._reconcile()
        return revived

    async def stop(self, grace: float) -> None:
        self._supervisor.stop()
        if self._timer:
            self._timer.cancel()
        self._pinger.cancel()
        for living in self._living.values():
            living.stopping = True
            if self._supervisor.lives[living.worker].state is WorkerState.STARTING:  # it hears nothing yet
                self.kill(living.worker, living.number, "stopped while it was loading")
            self._supervisor.dying(living.worker, "stopping")
            living.channel.send(Stop())
        try:
            await asyncio.wait_for(self._wait_all_gone(), grace)
        except TimeoutError:
            for living in list(self._living.values()):
                self.kill(living.worker, living.number, "did not stop in time")
            try:
                await asyncio.wait_for(self._wait_all_gone(), REAPING)
            except TimeoutError:  # the kernel does not let go of it (a device's driver hangs)
                log.error("killed workers are not gone yet", devices=list(self._living))
        self._spawner.shutdown(wait=not self._living)
        atexit.unregister(self._kill_all)

    def view(self) -> list[WorkerView]:
        return [self._view_one(plan, self._supervisor.lives[plan.worker]) for plan in self._plans.values()]

    def _view_one(self, plan: DevicePlan, life: Life) -> WorkerView:
        living = self._living.get(plan.worker)
        state = {
            WorkerState.READY: "ready",
            WorkerState.GIVEN_UP: "given_up",
            WorkerState.STOPPED: "stopped",
        }.get(life.state, "starting" if life.incarnation <= 1 else "restarting")
        if self._supervisor.draining and state == "ready":
            state = "draining"
        return WorkerView(
            worker=plan.worker, index=plan.index, kind=plan.kind, name=plan.name, state=state,
            detail=_detail(living, life),
            pid=living.process.pid if living else None, alive=living is not None,
            incarnation=life.incarnation, restarts=life.restarts,
            progress=1.0 if state == "ready" else living.progress if living else 0.0,
            facts=living.facts if living else {},
        )

    # --- starting ---------------------------------------------------------------------------------------------------

    def _reconcile(self) -> None:
        """Do what the supervisor wants now, and wake when it next wants something."""
        for action in self._supervisor.tick(self._loop.time()):
            if isinstance(action, Start):
                self._background(self._start(action))
            else:
                self.kill(action.worker, action.incarnation, action.why)
        if self._timer:
            self._timer.cancel()
        at = self._supervisor.next_at()
        self._timer = self._loop.call_at(at, self._reconcile) if at is not None else None

    async def _start(self, action: Start) -> None:
        boot = self._boot(action)
        try:
            process, requests, results, printed = await self._loop.run_in_executor(self._spawner, self._spawn, boot)
        except OSError as fault:  # no memory or no file descriptor for a process now: no fault of the device
            self._ended(action.worker, action.incarnation, f"could not be started ({fault.strerror})", "died")
            return
        except Exception as fault:
            log.exception("a worker process cannot be made", device=action.worker)
            cause = f"could not be started ({type(fault).__name__}); the server's log has the details"
            self._ended(action.worker, action.incarnation, cause, "boot_failed")
            return
        living = Incarnation(action.worker, action.incarnation, process, channel=None)  # type: ignore[arg-type]
        living.channel = MasterEnd(
            requests, results,
            on_message=lambda message: self._on_message(living, message),
            on_closed=lambda: self._background(self._reap(living)),
        )
        if printed >= 0:
            living.printed = Printed(printed, action.worker, action.incarnation)
        self._living[action.worker] = living
        if self._supervisor.draining:
            living.stopping = True
            self.kill(action.worker, action.incarnation, "stopping")

    def _boot(self, action: Start) -> Boot:
        plan, config = self._plans[action.worker], self._config
        return Boot(
            worker=action.worker, incarnation=action.incarnation,
            device="cuda:0" if plan.kind == "cuda" else "cpu", visible=plan.visible, threads=plan.threads,
            codec_threads=config.codec_threads, cpus=tuple(plan.cpus), specs=self._specs, root=config.root,
            arena_bytes=self._arena.size, warm_up=config.warm_up, log_level=config.log_level,
            boot_timeout=config.supervisor.boot_timeout, loaded_models=config.loaded_models,
            alike=len({(other.kind, other.name) for other in self._plans.values()}) == 1,
            models_folder=config.models_folder,
        )

    def _spawn(self, boot: Boot) -> tuple[SpawnProcess, Connection, Connection, int]:
        """The process, the master's ends of its channel, and the end from which what it prints is read (-1: none)."""
        context = multiprocessing.get_context("spawn")
        printed, prints = os.pipe() if self._config.capture else (-1, -1)
        child_requests, requests = context.Pipe(duplex=False)
        results, child_results = context.Pipe(duplex=False)
        told = SharedFd(prints) if prints >= 0 else None
        process = context.Process(
            target=child_main, args=(boot, child_requests, child_results, SharedFd(self._arena.fd), told),
            name=f"imagepool {boot.worker}", daemon=True,
        )
        try:
            process.start()
        except BaseException:
            requests.close()
            results.close()
            if printed >= 0:
                os.close(printed)
            raise
        finally:  # only the child may hold these, or its death would not close the channel
            child_requests.close()
            child_results.close()
            if prints >= 0:
                os.close(prints)
        return process, requests, results, printed

    # --- living -----------------------------------------------------------------------------------------------------

    def _on_message(self, living: Incarnation, message: FromWorker) -> None:
        match message:
            case Progress(what, fraction):
                living.what, living.progress = what, fraction
                self._supervisor.booting(living.worker, self._loop.time())
            case Ready() if living.killed_for is not None:
                pass  # too late: whatever it were given would be lost, and held against the jobs
            case Ready(facts):
                living.facts = facts
                self._supervisor.ready(living.worker)
                self._reconcile()
                refused = facts.get("refused", {})
                for model, why in refused.items():
                    log.error("a model is not served", device=living.worker, model=model, why=why)
                told = {name: fact for name, fact in facts.items() if name != "refused"}
                log.info("worker is ready", device=living.worker, incarnation=living.number, **told)
                self._listener(WorkerUp(living.worker, living.number, refused))
            case BootFailed(error):
                living.boot_error = error.message
                log.error("worker cannot start", device=living.worker, why=error.message)
            case Loading(_, model, done):
                living.loading = "" if done else f"loading {model}"
                self._listener(Said(living.worker, living.number, message))
            case Pong():
                living.pinged_at, living.memory = None, message
            case _:
                if isinstance(message, (BatchDone, BatchDidNotFit)):
                    living.outstanding -= 1
                    living.pinged_at = None
                    self._supervisor.worked(living.worker)
                self._listener(Said(living.worker, living.number, message))

    async def _ping_idle_workers(self) -> None:
        """An idle worker shows in its device loop that it lives; a busy one by finishing its batch in time. One that
        somebody has stopped is ended either way, at the second look: it may just have been a moment."""
        number = 0
        while True:
            await asyncio.sleep(self._config.ping_interval)
            number += 1
            now = self._loop.time()
            for living in list(self._living.values()):
                if living.frozen and deaths.is_stopped(living.process.pid):
                    self.kill(living.worker, living.number, "somebody has stopped it (SIGSTOP)")
                    continue
                living.frozen = deaths.is_stopped(living.process.pid)
                if self._supervisor.lives[living.worker].state is not WorkerState.READY or living.outstanding:
                    continue
                if living.pinged_at is None:
                    living.pinged_at = now
                    living.channel.send(Ping(number))
                elif now - living.pinged_at > self._config.ping_timeout:
                    self.kill(living.worker, living.number, "does not answer although it is idle")

    # --- ending -----------------------------------------------------------------------------------------------------

    async def _reap(self, living: Incarnation) -> None:
        """Its end of the channel is closed: make sure that the process is dead, then say so."""
        living.process.kill()
        while living.process.exitcode is None:
            await self._loop.run_in_executor(self._spawner, living.process.join, 0.5)
        code = living.process.exitcode
        living.process.close()
        before, self._oom_kills = self._oom_kills, deaths.oom_kills()
        if living.printed is not None:
            living.printed.close()
        was_starting = self._supervisor.lives[living.worker].state is WorkerState.STARTING
        end = deaths.blamed_on(code, frozen=living.frozen, before=before, after=self._oom_kills)
        failed_to_boot = living.boot_error is not None or (was_starting and end == "died")
        cause = living.killed_for or living.boot_error or exit_words(code)
        ours = living.killed_for is not None and not living.frozen
        kind: Kind = "hung" if ours else "boot_failed" if failed_to_boot else end
        self._ended(living.worker, living.number, cause, "stopped" if living.stopping else kind)

    def _ended(self, worker: str, number: int, cause: str, kind: Kind) -> None:
        self._living.pop(worker, None)
        self._supervisor.exited(
            worker, self._loop.time(), cause, failed_to_boot=kind == "boot_failed", on_purpose=kind == "stopped",
            outside=kind == "killed",
        )
        state = self._supervisor.lives[worker].state.value
        tell = log.info if kind == "stopped" else log.warning
        tell("worker ended", device=worker, incarnation=number, cause=cause, next=state)
        self._listener(WorkerDown(worker, number, cause, kind))
        if not self._supervisor.draining:
            self._reconcile()
        if not self._living:
            self._all_gone.set()

    def _kill_all(self) -> None:
        """The last resort, when the interpreter ends without `stop`: multiprocessing would wait for them for ever."""
        for living in self._living.values():
            with contextlib.suppress(ValueError):  # closed already
                living.process.kill()

    async def _wait_all_gone(self) -> None:
        while self._living or self._tasks:
            self._all_gone.clear()
            waiting = [asyncio.ensure_future(self._all_gone.wait()), *self._tasks]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            waiting[0].cancel()

    def _background(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
