"""`potluck-node` with fake engines, which do what the name of a job or input says. Takes the daemon's arguments."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from msgspec.structs import replace

import node.daemon
import node.executor
from node.__main__ import main
from node.engine.process import EngineInfo
from node.engine.watch import Limits
from node.sandbox.policy import Confinement
from potluck.errors import Cancelled, EngineFailed, InvalidModel, ModelCrashed, NotFound
from potluck.wire.reports import RequestOutcome
from potluck.wire.tasks import AnyTask, AnyTaskResult, EvaluateResult, EvaluateTask, PredictResult, TrainResult
from potluck.wire.values import BlobRef, Signature, Tensor, TensorSpec

BIG = 300_000
SIGNATURE = Signature(inputs=(), outputs=())
_SLOW = (TensorSpec(name="slow", datatype="UINT8", shape=(-1, 1)),)
SIGNATURE_SLOW = Signature(inputs=_SLOW, outputs=_SLOW)
"""Of a model that the gateway lets ask for what takes time."""


class FakeEngine:
    """Has the methods of `node.engine.process.Engine`, but no process."""

    count = 0
    unwatched_seconds = 0.0

    def __init__(
        self,
        scratch: Path,
        *,
        threads: int,
        limits: Limits,
        allow_code: Sequence[str],
        quick_kernels: bool,
        confinement: Confinement,
    ) -> None:
        FakeEngine.count += 1
        self.pid = FakeEngine.count
        self._scratch = scratch
        self._replicas: set[str] = set()
        self._suspects: set[str] = set()
        self._dead: asyncio.Future[EngineFailed] = asyncio.get_running_loop().create_future()
        self._cancelled = asyncio.Event()
        self.alive = False

    async def start(self) -> EngineInfo:
        self._scratch.mkdir(parents=True, exist_ok=True)
        self.alive = True
        return EngineInfo({"fake": "1"}, ())

    async def wait_dead(self) -> EngineFailed:
        return await asyncio.shield(self._dead)

    def blame(self, replica_id: str) -> EngineFailed:
        failure = self._dead.result()
        return ModelCrashed(failure.message) if replica_id in self._suspects else failure

    async def stuck(self, limit_seconds: float, bound_seconds: float) -> None:
        await asyncio.sleep(limit_seconds)

    async def run_task(
        self,
        job_id: str,
        task: AnyTask,
        files: dict[str, Path],
        on_progress: Callable[[int, dict[str, float]], None],
    ) -> AnyTaskResult:
        match job_id.partition("-")[0]:
            case "join":
                data = b"".join(files[sha256].read_bytes() for sha256 in sorted(files))
                sha256 = hashlib.sha256(data).hexdigest()
                (self._scratch / sha256).write_bytes(data)
                made = BlobRef(sha256=sha256, size=len(data))
                return TrainResult(base=made, update=made, samples=1, steps=1)
            case "predict":
                data = bytes(BIG if "big" in job_id else 8)
                return PredictResult(
                    count=1, outputs=(Tensor(name="y", datatype="UINT8", shape=(1, len(data)), data=data),)
                )
            case "evaluate":
                return EvaluateResult(count=1, sums={"loss": 1.0}, confusion=((0,) * 600,) * 600)
            case "crash":
                raise self._die("the engine was ended by SIGSEGV")
            case "bad":
                raise InvalidModel("no optimizer: compile the model")
            case "slow":
                for done in range(10_000):
                    on_progress(done + 1, {"loss": 0.5})
                    if self._cancelled.is_set():
                        self._cancelled.clear()
                        raise Cancelled("stopped at a step")
                    if self._dead.done():
                        break
                    await asyncio.sleep(0.01)
                raise EngineFailed("the engine was stopped")
            case "soon":  # as many steps as the first slice has items
                assert isinstance(task, EvaluateTask)
                for done in range(task.slices[0].stop):
                    on_progress(done + 1, {})
                    await asyncio.sleep(0.01)
                return EvaluateResult(count=task.slices[0].stop)
            case "deaf":
                raise await self.wait_dead()
            case other:
                raise AssertionError(other)

    async def cancel_task(self) -> None:
        self._cancelled.set()

    async def load_model(
        self, replica_id: str, path: Path, model_format: str, warm_rows: int, warm_seconds: float, pixel_scale: float
    ) -> tuple[Signature, int, int]:
        model = await asyncio.to_thread(path.read_bytes)
        if model == b"bad":
            raise InvalidModel("this is not a .keras file")
        self._replicas.add(replica_id)
        return SIGNATURE_SLOW if model == b"slow" else SIGNATURE, 123, warm_rows

    async def unload_model(self, replica_id: str) -> None:
        self._replicas.discard(replica_id)

    def cancel_inference(self, batch_id: str) -> None:
        pass

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass

    async def infer(
        self,
        replica_id: str,
        requests: Sequence[Sequence[Tensor]],
        files: Mapping[str, Path],
        *,
        batch_id: str,
        expires: float,
    ) -> tuple[list[RequestOutcome], float]:
        read = {sha256: await asyncio.to_thread(path.read_bytes) for sha256, path in files.items()}
        requests = [
            [replace(one, data=read[one.data.sha256]) if isinstance(one.data, BlobRef) else one for one in request]
            for request in requests
        ]
        if replica_id not in self._replicas:
            raise NotFound(f"replica {replica_id} is not loaded")
        match requests[0][0].name:
            case "crash":
                self._suspects.add(replica_id)
                self._die("the engine was ended by SIGSEGV")
                raise self.blame(replica_id)
            case "slow":
                await asyncio.sleep(1.0)
            case "grow":
                big = Tensor(name="y", datatype="UINT8", shape=(1, BIG), data=bytes(BIG))
                small = Tensor(name="z", datatype="UINT8", shape=(1, 1), data=b"\1")
                return [RequestOutcome(outputs=(big, small))], 0.0
            case _:
                pass
        return [RequestOutcome(outputs=tuple(request)) for request in requests], 0.001

    async def forget_job(self, job_id: str) -> None:
        pass

    async def stop(self, grace_seconds: float = 2.0) -> None:
        self._die("the engine was stopped")

    def _die(self, reason: str) -> EngineFailed:
        self.alive = False
        failure = EngineFailed(reason)
        if not self._dead.done():
            self._dead.set_result(failure)
        return failure


if __name__ == "__main__":
    node.daemon.Engine = FakeEngine  # type: ignore[attr-defined, assignment, misc]
    node.executor.STOP_SECONDS = 0.5
    main()
