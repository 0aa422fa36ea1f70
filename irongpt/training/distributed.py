"""The processes of one training run, which torchrun starts: the only file with torch.distributed.

    torchrun --nproc-per-node 2 -m irongpt train --fused

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK and the address of its store. Without WORLD_SIZE the
world is one process, and nothing of torch.distributed runs.

In every process a thread increments a counter in the store every HEARTBEAT seconds and reads those
of the others. If a counter stays the same for HEARTBEAT_TIMEOUT seconds, its process is considered
dead: the live process of lowest rank reports it, and all exit, even if they wait inside a CUDA
graph. So the collectives need no timeout, and rank 0 may save or sample for as long as it takes.
"""

import contextlib
import datetime
import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from irongpt.errors import DivergenceError, UserError, one_line, out_of_memory

HEARTBEAT = 1.0  # seconds between two heartbeats of a process
HEARTBEAT_TIMEOUT = 20.0  # seconds without one, after which a process is considered dead
START_TIMEOUT = 600.0  # seconds in which all processes must have started
ENDED, FAILED = "ended", "failed "  # what a process that exits writes in place of its counter


class World:
    """How the processes of a run communicate if there is only one. See `Torchrun` for several."""

    rank = 0
    size = 1
    local_rank = 0

    def own_range(self, count: int) -> range:
        """The adjacent indices, out of `count`, that belong to this process."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def all_gather(self, rows: Tensor) -> None:
        """Gives every process all rows. Each has written its own before: see `own_range`."""

    def reduce_rows(self, rows: Tensor) -> Tensor:
        """A reduce-scatter and an all-gather. rows: (S, n), of which this process has its own.

        Returns their sum in float32, (n,), in the order of the rows.
        """
        raise NotImplementedError

    def gather(self, value: Any) -> list[Any]:
        """The values (of JSON) of all processes, by rank. Waits until all have called it."""
        return [value]

    def all_true(self, value: bool) -> bool:
        """Whether the value is true in all processes."""
        return all(self.gather(value))

    def check_equal(self, facts: dict[str, Any]) -> None:
        """Raises UserError in every process unless all have the same facts."""
        first, *others = self.gather(facts)
        for rank, other in enumerate(others, start=1):
            for name in {**first, **other}:
                values = [known.get(name, "not given") for known in (first, other)]
                if values[0] != values[1]:
                    shown = " and ".join(str(value)[:40] for value in values)
                    raise UserError(
                        f"processes 0 and {rank} differ in {name}: {shown}; use the same for all"
                    )

    @contextlib.contextmanager
    def local_first(self) -> Iterator[None]:
        """A context that the first process of each machine leaves before the others enter it."""
        if self.local_rank:
            self.gather(None)
        yield
        if not self.local_rank:
            self.gather(None)

    def check_device(self, device: torch.device) -> None:
        """Raises UserError unless every process of this machine has its own GPU."""

    def close(self) -> None:
        """Ends the communication of the processes."""

    def fail(self, code: int) -> bool:
        """Ends the other processes after an error, with this exit code.

        Returns whether this process is the first, which reports it.
        """
        return True

    def report_dead_process(self) -> None:
        """Called when a collective may have failed because another process is dead."""


class Torchrun(World):
    """The processes that torchrun has started, one per GPU, or several on a CPU."""

    def __init__(self) -> None:
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        self.dist = dist
        self.rank, self.size, self.local_rank = map(_variable, ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        limit = datetime.timedelta(seconds=START_TIMEOUT)
        # Two connections: when the main thread waits for the store, the heartbeats go on.
        try:
            store, watch = (next(rendezvous("env://", timeout=limit))[0] for _ in range(2))
        except ValueError as e:  # for one, no MASTER_ADDR
            raise UserError(f"cannot connect the processes: {one_line(e)}; use torchrun") from e
        except dist.DistError as e:
            raise UserError(f"cannot connect the processes: {one_line(e)}") from e
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = dist.PrefixStore(f"irongpt-{attempt}", store)
        self.last, self.ended = ENDED, threading.Event()
        self.timeout = HEARTBEAT_TIMEOUT
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if gpus:
            torch.cuda.set_device(self.local_rank % gpus)
        self.watch = dist.PrefixStore(f"irongpt-alive-{attempt}", watch)
        self.watch.set(str(self.rank), "0")
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.watcher.start()
        try:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if gpus else "gloo",
                store=dist.PrefixStore("group", self.store),
                rank=self.rank,
                world_size=self.size,
                timeout=datetime.timedelta(days=7),
            )
        except RuntimeError as e:
            self.report_dead_process()
            self.fail(2)
            raise UserError(f"cannot connect the processes: {one_line(e)}") from e

    def all_gather(self, rows: Tensor) -> None:
        flat = rows.view(torch.uint8).view(-1)  # as bytes, because gloo has no bfloat16
        own = flat.chunk(self.size)[self.rank]
        # The first is the name in newer versions of PyTorch, where the second prints a warning.
        gather = getattr(self.dist, "all_gather_single", None) or self.dist.all_gather_into_tensor
        gather(flat, own)

    def reduce_rows(self, rows: Tensor) -> Tensor:
        n, own_shards = rows.shape[1], self.own_range(len(rows))
        length = -(-n // self.size)  # of the slice that each process sums
        own = rows.new_zeros(len(own_shards), length * self.size)
        own[:, :n] = rows[own_shards.start : own_shards.stop]
        sent = own.view(len(own_shards), self.size, length).transpose(0, 1).contiguous()
        got = torch.empty_like(sent)
        self.dist.all_to_all_single(got.view(torch.uint8).view(-1), sent.view(torch.uint8).view(-1))
        shards = got.view(len(rows), length)
        total = torch.zeros(self.size, length, device=rows.device)
        total[self.rank].copy_(shards[0])
        for shard in shards[1:]:
            total[self.rank] += shard
        self.all_gather(total)
        return total.view(-1)[:n]

    def gather(self, value: Any) -> list[Any]:
        text = json.dumps(value, default=str).encode()  # PyTorch would pickle and unpickle it
        lengths = torch.zeros(self.size, dtype=torch.int64)
        lengths[self.rank] = len(text)
        self.all_gather(lengths)
        texts = torch.full((self.size, int(lengths.max())), ord(" "), dtype=torch.uint8)
        texts[self.rank, : len(text)] = torch.tensor(list(text), dtype=torch.uint8)
        self.all_gather(texts)
        return [json.loads(bytes(row.tolist())) for row in texts]

    def check_device(self, device: torch.device) -> None:
        if device.type != "cuda":
            return
        count = _variable("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in os.environ else 1
        if count > (gpus := torch.cuda.device_count()):
            raise UserError(
                f"{count} processes, but {gpus} GPUs: two processes cannot share one; "
                f"use --nproc-per-node {gpus}"
            )
        if device.index != torch.cuda.current_device():
            raise UserError(
                f"--device {device}: torchrun gives each process its own GPU; leave the flag out"
            )

    def close(self) -> None:
        """Must be called after the CUDA graphs are destroyed: NCCL waits for them."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.gather(None)
        self._leave(ENDED)
        self.dist.destroy_process_group()

    def fail(self, code: int) -> bool:
        first = True
        with contextlib.suppress(RuntimeError):  # the store is gone
            first = bool(self.store.add("failures", 1) == 1)
        self._leave(f"{FAILED}{code}")
        return first

    def _leave(self, last: str) -> None:
        self.last = last
        self.ended.set()
        self.watcher.join()

    def _watch(self) -> None:
        counts = dict.fromkeys(range(self.size), "")
        seen = dict.fromkeys(range(self.size), time.monotonic())
        beats = 0
        with contextlib.suppress(RuntimeError):  # torchrun's store is gone, and torchrun with it
            while not self.ended.wait(HEARTBEAT):
                beats += 1
                self.watch.set(str(self.rank), str(beats))
                now = time.monotonic()
                for rank in range(self.size):
                    known = self.watch.check([str(rank)])
                    count = self.watch.get(str(rank)).decode() if known else ""
                    if count != counts[rank]:
                        counts[rank], seen[rank] = count, now
                for failed in (c for c in counts.values() if c.startswith(FAILED)):
                    os._exit(int(failed.removeprefix(FAILED)))  # the first has reported why
                limits = {r: self.timeout if c else START_TIMEOUT for r, c in counts.items()}
                late = [r for r in counts if counts[r] != ENDED and now - seen[r] > limits[r]]
                if late:
                    died = bool(counts[late[0]])
                    self._end(late[0], died, min(set(counts) - set(late)))
            self.watch.set(str(self.rank), self.last)

    def _end(self, rank: int, died: bool, reporter: int) -> None:
        if self.rank == reporter:
            how = "has died" if died else f"has not started within {START_TIMEOUT:.0f} s"
            advice = "; continue with --resume" if died else ""
            what = f"process {rank} of {self.size} {how}: the others end{advice}"
            print(f"irongpt: error: {what}", file=sys.stderr, flush=True)
        os._exit(1)

    def report_dead_process(self) -> None:
        """Waits until `_watch` has named the dead process and ended this one, else returns.

        Because a collective has failed, a shorter timeout is used. SIGTERM, by which torchrun ends
        this process, is ignored, so that the message can appear first.
        """
        self.timeout = 5 * HEARTBEAT
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(8 * HEARTBEAT)


def join() -> World:
    """The `World` of this process. Waits until all processes have started."""
    return Torchrun() if "WORLD_SIZE" in os.environ else World()


def together(command: Callable[[World], int]) -> int:
    """Runs a command in all processes, of which process 0 prints. Returns its exit code.

    An error in one of them ends all, and one line gives the reason.
    """
    world = join()
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere if world.rank else sys.stdout),
    ):
        try:
            code = command(world)
            world.close()
            return code
        except BaseException as e:
            full = out_of_memory(e)
            if isinstance(e, RuntimeError) and not full:
                world.report_dead_process()
            known = full or isinstance(e, UserError | DivergenceError)
            code = 2 if full or isinstance(e, UserError) else 1
            if world.fail(code) or not known:
                raise
            return code


def _variable(name: str) -> int:
    try:
        return int(os.environ[name])
    except (KeyError, ValueError):
        raise UserError(f"WORLD_SIZE is set, but {name} is not a number: use torchrun") from None
