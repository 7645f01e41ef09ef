"""A pool of Ray actors, each with a model of its own, that do units of work until all are done.

1. An actor makes its task from a message once (a model is loaded once per actor) and then gets names of units, two at a
   time, so that it never waits for the driver.
2. An actor that is lost is started again by Ray, and its units are done again: they are named, so nothing is lost or
   counted twice. A unit that takes its actor with it every time is an error.
3. What a machine that does not come back took with it is given to others once they have nothing else to do.
4. Errors come back as values: what an actor could not load is said in its own words.
"""

from __future__ import annotations

import importlib
import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from clampdown import errors as tree
from clampdown.documents import parse_json
from clampdown.errors import ClampdownError, ShardError
from clampdown.extras import extra
from clampdown.scale.tasks import Task, Unit, task_of

DEPTH = 2
"""Units that an actor has at a time."""
RETRIES = 3
"""How often Ray does a unit again whose actor died."""
RESTARTS = 20
"""How often an actor is started again: one that can never load its model must not be for ever."""
PATIENCE = 60.0
"""Seconds without any result after which units of busy actors are given to idle ones too."""
OBJECT_STORE = 100_000_000
"""Bytes of shared memory of a Ray of our own: nothing large travels."""


@dataclass(frozen=True, slots=True)
class PoolRequest:
    """Which Ray: `local` for one of our own on this machine, `auto` or an address for one that runs. How many actors
    (None: one for each accelerator, else one for each machine), and how many accelerators each holds (None: one where
    there are any)."""

    address: str = "local"
    actors: int | None = None
    gpus_per_actor: float | None = None


class Actor:
    """What runs in an actor's process."""

    def __init__(self, message: str) -> None:
        self._task: Task | None = None
        self._failed = "null"
        try:
            self._task = task_of(message)
        except ClampdownError as error:
            self._failed = _as_value(error)

    def digest(self) -> str:
        """The task's key, or why there is none."""
        return self._failed if self._task is None else json.dumps({"value": self._task.digest})

    def do(self, kind: str, number: int) -> str:
        """One unit's result, or the error of ours that it ended in."""
        assert self._task is not None
        try:
            return json.dumps({"value": self._task.do((kind, number))})
        except ClampdownError as error:
            return _as_value(error)

    def process(self) -> int:
        """The number of the process, for whoever looks after it."""
        return os.getpid()


def _as_value(error: ClampdownError) -> str:
    return json.dumps({"error": type(error).__name__, "message": error.message, "hint": error.hint})


def _value(text: str) -> Any:
    """What an actor answered. Raises the error that it answered with."""
    found = parse_json(text, "an actor's answer", ShardError)
    if "value" in found:
        return found["value"]
    kind = getattr(tree, str(found["error"]), ClampdownError)
    raise kind(found["message"], hint=found["hint"])


def _ray() -> Any:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns of what it will do one day
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with extra("ray", "--ray"):
        return importlib.import_module("ray")


@dataclass
class Pool:
    """Actors that hold one task."""

    ray: Any
    actors: Sequence[Any]
    _busy: dict[Any, tuple[Any, Unit]] = field(default_factory=dict)

    def check(self, digest: str) -> None:
        """Wait until every actor has its task. Raises `ShardError` for one that loaded something else, and what an
        actor raised."""
        for actor in self.actors:
            found = _value(self._got(actor.digest.remote()))
            if found != digest:
                raise ShardError(
                    "an actor's work is not the driver's: its model, device, template or version of clampdown differ",
                    hint="actors and driver need the same files and the same kind of hardware; start the driver where "
                    "the actors are, for example with `ray job submit --entrypoint-num-gpus 1`",
                )

    def processes(self) -> list[int]:
        """The actors' process numbers, each on its own machine."""
        return [self._got(actor.process.remote()) for actor in self.actors]

    def run(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, str]]:
        """Every unit's result, as they come. Raises what a unit raised, and `ShardError` for one that is lost again and
        again."""
        waiting, done = deque(units), set[Unit]()
        while len(done) < len(set(units)):
            self._submit(waiting)
            ready, _ = self.ray.wait(list(self._busy), timeout=PATIENCE)
            if not ready:
                waiting.extend(self._stalled(done, waiting))
            for reference in ready:
                _, unit = self._busy.pop(reference)
                if unit in done:
                    continue
                result = _value(self._got(reference, unit))
                done.add(unit)
                yield unit, result

    def _submit(self, waiting: deque[Unit]) -> None:
        """Give each actor as many units as it may have, the least busy first."""
        held = {actor: sum(one is actor for one, _ in self._busy.values()) for actor in self.actors}
        while waiting:
            actor = min(held, key=lambda one: held[one])
            if held[actor] >= DEPTH:
                return
            unit = waiting.popleft()
            self._busy[actor.do.remote(*unit)] = (actor, unit)
            held[actor] += 1

    def _stalled(self, done: set[Unit], waiting: deque[Unit]) -> list[Unit]:
        """Units of busy actors that idle ones could do as well; each is given to two actors at most."""
        if waiting or len({id(actor) for actor, _ in self._busy.values()}) == len(self.actors):
            return []
        held = [unit for _, unit in self._busy.values() if unit not in done]
        return [unit for unit in held if held.count(unit) == 1]

    def _got(self, reference: Any, unit: Unit | None = None) -> Any:
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayActorError as error:
            what = "before it was ready" if unit is None else f"with {unit[0]} {unit[1]}, {RETRIES + 1} times"
            raise ShardError(
                f"an actor died {what}: {str(error).splitlines()[0]}",
                hint="a lack of memory is the usual reason: fewer actors for each machine, or smaller batches",
            ) from error


@contextmanager
def pool(request: PoolRequest, message: str) -> Iterator[Pool]:
    """Actors with the message's task, until the block ends. A Ray of our own ends with it.

    Raises `MissingPackageError` without Ray, `ShardError` when there is none at the address.
    """
    ray = _ray()
    ours = not ray.is_initialized()
    if ours:
        _connect(ray, request)
    try:
        options = _options(ray, request)
        made = ray.remote(Actor).options(**options[1], max_restarts=RESTARTS, max_task_retries=RETRIES)
        actors = [made.remote(message) for _ in range(options[0])]
        try:
            yield Pool(ray, actors)
        finally:
            for actor in actors:
                ray.kill(actor)
    finally:
        if ours:
            ray.shutdown()


def _connect(ray: Any, request: PoolRequest) -> None:
    own = {"object_store_memory": OBJECT_STORE, "include_dashboard": False} if request.address == "local" else {}
    if own and request.actors:
        own["num_cpus"] = max(request.actors, os.cpu_count() or 1)
    try:
        ray.init(address=request.address, log_to_driver=False, logging_level="ERROR", **own)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise ShardError(
            f"there is no Ray at '{request.address}': {str(error).splitlines()[0]}",
            hint="local starts one here, auto takes the one that runs on this machine, or give an address",
        ) from error


def _options(ray: Any, request: PoolRequest) -> tuple[int, dict[str, float]]:
    """How many actors, and what each holds. Raises `ShardError` when they would wait for room for ever."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = ([float(each.get(name, 0)) for each in machines] for name in ("CPU", "GPU"))
    return shares(cpus, gpus, request)


def shares(cpus: Sequence[float], gpus: Sequence[float], request: PoolRequest) -> tuple[int, dict[str, float]]:
    """As `_options`, from the machines' processors and accelerators. An actor is on one machine: what two machines have
    left of each cannot be put together."""
    held = request.gpus_per_actor
    if held is None:
        held = 1.0 if any(gpus) else 0.0
    actors = request.actors or (_places(gpus, held) if held else len(cpus))
    if held and _places(gpus, held) < max(actors, 1):
        raise ShardError(
            f"{actors} actors with {held:g} accelerators each do not fit: the machines have {_listed(gpus)}",
            hint="fewer --actors, or --gpus-per-actor 0",
        )
    if held:
        return actors, {"num_cpus": 1.0, "num_gpus": held}
    each = next((n for n in range(int(max(cpus)), 0, -1) if _places(cpus, n) >= actors), None)
    if each is None:
        raise ShardError(f"{actors} actors do not fit: the machines have {_listed(cpus)} processors", hint="--actors")
    return actors, {"num_cpus": float(each), "num_gpus": 0.0}


def _places(machines: Sequence[float], held: float) -> int:
    """How many actors find room that hold so much each."""
    return sum(int(there / held) for there in machines)


def _listed(machines: Sequence[float]) -> str:
    return " + ".join(f"{there:g}" for there in machines)
