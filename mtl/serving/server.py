"""The server's processes: one refresher and several workers under a supervisor that starts anew what dies.

All workers accept from one listening socket, so that connections waiting to be accepted outlive a worker. Workers are
started before the first look at the tables: what the store holds is served at once.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import uvicorn
from threadpoolctl import threadpool_limits

from mtl.config import ServeSettings, Settings, is_catalog
from mtl.errors import ConfigError, StateError
from mtl.lock import exclusive
from mtl.serving import metrics
from mtl.serving.contest import Contest, Record, Rival, contest_of, make_record
from mtl.serving.fastpath import FastPath
from mtl.serving.gauges import readings
from mtl.serving.http import PREDICT_PATH, application
from mtl.serving.observations import read, sealed
from mtl.serving.observer import Observer
from mtl.serving.overlay import Overlay, open_overlay
from mtl.serving.ranking import rescore_of
from mtl.serving.service import MAX_VERSION_AGE, Service
from mtl.serving.store import Store
from mtl.serving.turn import Turn
from mtl.serving.wire import Protocol

log = logging.getLogger("mtl")

_BACKLOG = 2048
_GRACE_SECONDS = 10  # for requests in hand when the server ends
_RESTART_SECONDS = 0.5  # at least between two starts of one process
_SWITCH_SECONDS = 0.001  # after which a thread that computes lets others in: deadlines are kept about as well
_ROOT = "tables.txt"  # in the store: whose copy it is


@dataclass(frozen=True)
class Folders:
    """Where the server keeps things."""

    root: str  # of the tables
    store: Path
    log: Path  # of observations
    feedback: Path  # the log of rewards
    decisions: Path  # the log of decisions

    @property
    def contest(self) -> Path:
        """Where it is kept what competing versions earned."""
        return self.store / "contest"

    @property
    def rivals(self) -> Path:
        """Where the stores are of versions that compete with the live one."""
        return self.store / "rivals"

    def rival(self, version: int) -> Path:
        return self.rivals / str(version)

    @classmethod
    def of(cls, settings: Settings) -> Folders:
        """
        Raises:
            ConfigError: no folder follows from the settings.
        """
        root, serve = settings.tables.root, settings.serve
        if is_catalog(root):
            raise ConfigError(f"tables.root = {root!r}: the server reads tables by folder or URI, not from a catalog")
        if not serve.store and "://" in root:
            raise ConfigError("serve.store: name a local folder, for tables in an object store have none beside them")
        store = Path(serve.store or f"{root}/_serving").absolute()
        observations = Path(serve.log or store / "observations")
        absolute = root if "://" in root else os.path.abspath(root)
        return cls(absolute, store, observations, store / "feedback", store / "decisions")


def serve(settings: Settings) -> dict[str, Any]:
    """Answer requests until SIGTERM or SIGINT.

    Returns:
        seconds, restarts (of processes that died) and model_version (the last one shown, None where there was none).

    Raises:
        ConfigError: a setting cannot be used, or the address is taken.
        StateError: the store is in use, of other tables, or damaged.
    """
    started = time.monotonic()
    folders = Folders.of(settings)
    rescore_of(settings.serve)  # a mistake in the name is found here
    with _locked(folders), _listening(settings.serve) as listener, metrics.shared(folders.store):
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        store = Store(folders.store, settings.serve.store_gb)
        open_overlay(folders.store, read(sealed(folders.log)), store.is_confirmed).close()
        store.close()
        _prepare_contest(settings.serve, folders)
        supervisor = Supervisor(settings, folders, listener)
        supervisor.run()
    return {
        "seconds": round(time.monotonic() - started, 3),
        "restarts": supervisor.restarts,
        "model_version": _version_shown(folders, settings.serve),
    }


@dataclass
class Supervisor:
    """Starts the processes, and starts anew those that die, until it is told to stop."""

    settings: Settings
    folders: Folders
    listener: socket.socket
    restarts: int = 0
    _stopped: bool = False
    _processes: dict[str, tuple[Any, Connection, float]] = field(default_factory=dict)

    def run(self) -> None:
        wake, woken = multiprocessing.Pipe(duplex=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop(woken))
        workers = self.settings.serve.workers or os.cpu_count() or 1
        work: dict[str, Callable[..., None]] = {f"worker-{i}": run_worker for i in range(workers)}
        work["refresher"] = run_refresher
        for version in self.settings.serve.rivals:
            work[f"refresher of version {version}"] = partial(run_refresher, version=version)
        for name in work:
            self._start(name, work[name])
        starting = {f"worker-{i}" for i in range(workers)}
        log.info("serve: listening on http://%s:%d", *self.listener.getsockname()[:2])
        try:
            while not self._stopped:
                sentinels = {process.sentinel: name for name, (process, _, _) in self._processes.items()}
                pipes = {self._processes[name][1]: name for name in starting}
                for ready in wait([*sentinels, *pipes, wake]):
                    if ready in pipes and ready not in sentinels:
                        name = pipes[ready]
                        if _said(ready):
                            starting.discard(name)
                            if not starting:
                                self._tell(workers)
                    elif ready is wake:
                        wake.recv_bytes()
                    elif ready in sentinels and not self._stopped:
                        self._restart(sentinels[ready], work)
        finally:
            self._end()

    def _start(self, name: str, target: Callable[..., None]) -> None:
        context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        told, tell = context.Pipe(duplex=False)
        arguments = (self.settings, self.folders, self.listener, tell, os.getpid())
        process = context.Process(target=target, args=arguments, name=name, daemon=True)
        process.start()
        tell.close()
        self._processes[name] = (process, told, time.monotonic())

    def _restart(self, name: str, work: dict[str, Callable[..., None]]) -> None:
        process, told, since = self._processes[name]
        process.join()
        told.close()
        metrics.forget(process.pid)
        log.error("serve: %s ended with status %s: starting it anew", name, process.exitcode)
        time.sleep(max(0.0, _RESTART_SECONDS - (time.monotonic() - since)))
        self.restarts += 1
        self._start(name, work[name])

    def _tell(self, workers: int) -> None:
        host, port = self.listener.getsockname()[:2]
        version = _version_shown(self.folders, self.settings.serve)
        log.info("serve: ready on http://%s:%d with model version %s, %d workers", host, port, version, workers)

    def _stop(self, woken: Connection) -> None:
        self._stopped = True
        woken.send_bytes(b"stop")

    def _end(self) -> None:
        for process, _, _ in self._processes.values():
            process.terminate()
        ends = time.monotonic() + _GRACE_SECONDS + 2
        for process, _, _ in self._processes.values():
            process.join(max(0.1, ends - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()


def run_worker(settings: Settings, folders: Folders, listener: socket.socket, tell: Connection, parent: int) -> None:
    """Answer requests until SIGTERM, or until the supervisor is gone."""
    # Until the loop has its own handlers: the supervisor's, which a fork has too, would tell it of our signals.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threadpool_limits(1)  # workers are as many as cores
    asyncio.run(_work(settings.serve, folders, listener, tell, parent), **_loop())
    os._exit(0)  # a thread in a function that hangs would be waited for


async def _work(
    settings: ServeSettings, folders: Folders, listener: socket.socket, tell: Connection, parent: int
) -> None:
    store, overlay = Store(folders.store, settings.store_gb, readonly=True), Overlay(folders.store)
    logs = folders.log, folders.feedback, folders.decisions
    contest = _contest(settings, folders)
    rivals, record = (contest.rivals, contest.record) if contest else ((), None)
    segments = settings.segment_seconds, settings.segment_mb * 2**20
    observer = Observer(overlay, *logs, *segments, rivals, record)
    observer.start()
    service = Service(store, overlay, observer, settings, rescore_of(settings), contest)
    service.look()
    measured = metrics.Metrics(lambda: readings(service))
    turn = Turn(PREDICT_PATH, FastPath(service, measured))
    config = uvicorn.Config(
        application(service, measured),
        http=partial(Protocol, turn=turn),  # type: ignore[arg-type]
        log_config=None,
        access_log=False,
        lifespan="off",
        proxy_headers=False,
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )
    server = _Server(config)
    loop = asyncio.get_running_loop()

    def stop() -> None:
        server.should_exit = True

    loop.add_signal_handler(signal.SIGTERM, stop)
    loop.add_signal_handler(signal.SIGINT, lambda: None)  # the supervisor's matter
    gc.collect()
    gc.freeze()  # what was loaded stays: the collector need not visit it
    gc.set_threshold(20_000, 20, 50)
    sys.setswitchinterval(_SWITCH_SECONDS)
    going = [asyncio.create_task(_keep_looking(service, measured, tell)), asyncio.create_task(_outlive(parent, stop))]
    if service.admission is not None:
        tasks = server.server_state.tasks
        service.admission.begun = lambda: len(tasks) + len(turn)
        going.append(asyncio.create_task(service.admission.run()))
    await server.serve(sockets=[listener])
    for task in going:
        task.cancel()
    await loop.run_in_executor(None, observer.stop)


async def _outlive(parent: int, stop: Callable[[], None]) -> None:
    """Nobody's worker for a moment, and no longer."""
    while os.getppid() == parent:
        await asyncio.sleep(MAX_VERSION_AGE)
    stop()


async def _keep_looking(service: Service, measured: metrics.Metrics, tell: Connection) -> None:
    loop, told = asyncio.get_running_loop(), False
    while True:
        try:
            if service.view is not None and not told:
                tell.send_bytes(b"ready")
                told = True
            await loop.run_in_executor(None, service.look)
            measured.publish()
        except Exception:
            log.exception("serve: what the store shows now cannot be opened; going on with what it showed")
        await asyncio.sleep(MAX_VERSION_AGE)


def _prepare_contest(settings: ServeSettings, folders: Folders) -> None:
    """Stores and observations of the rivals, and the record of what was earned; what was a rival's before is deleted."""
    for folder in folders.rivals.glob("[0-9]*"):
        if folder.name not in map(str, settings.rivals):
            shutil.rmtree(folder)  # it holds users
    if not settings.rivals:
        return
    for version in settings.rivals:
        folder = folders.rival(version)
        store = Store(folder, settings.store_gb)
        # The server may have run without this rival meanwhile.
        open_overlay(folder, read(sealed(folders.log)), store.is_confirmed, anew=True).close()
        store.close()
    make_record(folders.contest, folders.decisions, folders.feedback)


def _contest(settings: ServeSettings, folders: Folders) -> Contest | None:
    """One worker's part in it."""
    if not settings.rivals:
        return None
    rivals = [
        Rival(Store(folder, settings.store_gb, readonly=True), Overlay(folder), version)
        for version in settings.rivals
        for folder in [folders.rival(version)]
    ]
    return contest_of(settings, rivals, Record(folders.contest))


def run_refresher(
    settings: Settings,
    folders: Folders,
    listener: socket.socket,
    tell: Connection,
    parent: int,
    version: int | None = None,
) -> None:
    """Keep the store, or that of a rival, like the tables until SIGTERM, or until the supervisor is gone."""
    listener.close()
    stopped = False

    def stop(*_: Any) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What reads Delta is loaded here alone: the workers start without it.
    from mtl.serving.housekeeping import keep_like_the_tables

    folder = folders.rival(version) if version else folders.store
    is_over = lambda: stopped or os.getppid() != parent  # noqa: E731
    keep_like_the_tables(settings.serve, folders.root, folder, folders.log, is_over, version)


class _Server(uvicorn.Server):
    """Signals are the worker's matter: uvicorn would raise them again before the log is handed over."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _loop() -> dict[str, Any]:
    try:
        import uvloop
    except ImportError:  # not on Windows
        return {}
    if sys.version_info < (3, 12):
        uvloop.install()
        return {}
    return {"loop_factory": uvloop.new_event_loop}


def _version_shown(folders: Folders, settings: ServeSettings) -> int | None:
    store = Store(folders.store, settings.store_gb, readonly=True)
    try:
        with store.reading() as transaction:
            live = store.live(transaction)
        return None if live is None else live.model_version
    finally:
        store.close()


@contextmanager
def _locked(folders: Folders) -> Iterator[None]:
    """One server a store and a log, and one root of tables."""
    with (
        exclusive(f"{folders.store}/lock", f"the server on {folders.store}"),
        exclusive(f"{folders.log}/.lock", f"the server with the log {folders.log}"),
    ):
        mark = folders.store / _ROOT
        if mark.exists() and mark.read_text() != folders.root:
            raise StateError(
                f"{folders.store} is the copy of the tables under {mark.read_text()}, not of {folders.root}: name another "
                f"serve.store, or delete {mark} where these have moved"
            )
        mark.write_text(folders.root)
        yield


@contextmanager
def _listening(settings: ServeSettings) -> Iterator[socket.socket]:
    try:
        family = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((settings.host, settings.port))
    except OSError as error:
        raise ConfigError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}") from None
    with listener:
        listener.listen(_BACKLOG)
        yield listener


def _said(pipe: Any) -> bool:
    try:
        return bool(pipe.recv_bytes())
    except (EOFError, OSError):
        return False  # it died; its sentinel tells as well, and may have been heard first
