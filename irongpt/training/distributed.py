"""The processes of one training, which torchrun starts: the only file with torch.distributed.

    torchrun --nproc-per-node 2 -m irongpt train --fused

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK and the address of its store. Without WORLD_SIZE the
world is one process, and nothing of torch.distributed runs.

Every process has a thread that counts up its number in the store every BEAT seconds and reads those
of the others. A process whose number stands still for SILENT seconds is dead, also where the others
wait for it inside a CUDA graph: the living process of lowest rank reports it, and all of them end.
So the exchange itself needs no time limit, and rank 0 may save or sample for as long as it takes.
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

from irongpt.console import output_is_optional
from irongpt.errors import DivergenceError, UserError, out_of_memory

BEAT = 1.0  # seconds between two signs of life
SILENT = 20.0  # seconds without one, after which a process is dead
START = 600.0  # seconds in which all processes must have started
PARTS_FROM = 5  # processes from which on each adds a part of the gradients
ENDED, FAILED = "ended", "failed "  # in place of the number, by a process that has left


class World:
    """One process, and what a training asks of several."""

    rank = 0
    size = 1
    local_rank = 0

    def mine(self, count: int) -> range:
        """The indices of `count` things that are this process's: adjacent ones."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def adds_parts(self) -> bool:
        return self.size >= PARTS_FROM

    def gather(self, rows: Tensor) -> None:
        """Fills in the other processes' rows; this one has written its own, see `mine`."""

    def add_rows(self, rows: Tensor) -> Tensor:
        """rows: (S, n), of which this process has its own -> their sum in float32, in order."""
        raise NotImplementedError

    def add(self, values: Tensor) -> None:
        """Adds the float64 values of all processes in place. All but one of each must be 0."""

    def all(self, value: bool) -> bool:
        """Whether it is true in all processes."""
        return value

    def agree(self, facts: dict[str, Any]) -> None:
        """Raises UserError on every process unless all have the same facts."""

    def first(self) -> contextlib.AbstractContextManager[None]:
        """A context that the first process of a machine leaves before the others enter it."""
        return contextlib.nullcontext()

    def share(self, value: str) -> str:
        """The value that the process 0 has given."""
        return value

    def wait(self) -> None:
        """Waits until all processes are here."""

    def check_device(self, device: torch.device) -> None:
        """Raises UserError unless every process of this machine has a GPU of its own."""

    def close(self) -> None:
        """Ends the work of the processes with each other."""

    def fail(self, code: int) -> bool:
        """Ends the other processes after an error, with this exit code.

        Returns whether this process is the first, which reports it.
        """
        return True

    def explain(self) -> None:
        """Called when an exchange may have failed because another process is dead."""


class Torchrun(World):
    """The processes that torchrun has started, one per GPU, or several on a CPU."""

    def __init__(self) -> None:
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        self.dist = dist
        self.rank, self.size, self.local_rank = map(_variable, ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        wait = datetime.timedelta(seconds=START)
        # Two connections: a wait of the main thread does not hold up the signs of life.
        store, watch = (next(rendezvous("env://", timeout=wait))[0] for _ in range(2))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = dist.PrefixStore(f"irongpt-{attempt}", store)
        self.last, self.ended, self.agreed, self.silent = ENDED, threading.Event(), 0, SILENT
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if gpus:
            torch.cuda.set_device(self.local_rank % gpus)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus else "gloo",
            store=dist.PrefixStore("group", self.store),
            rank=self.rank,
            world_size=self.size,
            timeout=datetime.timedelta(days=7),
        )
        self.watch = dist.PrefixStore(f"irongpt-alive-{attempt}", watch)
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.watcher.start()

    def gather(self, rows: Tensor) -> None:
        flat = rows.view(torch.uint8).view(-1)  # copied, not computed: gloo has no bfloat16
        own = flat.chunk(self.size)[self.rank]
        # The first is the name in newer versions of PyTorch, where the second prints a warning.
        gather = getattr(self.dist, "all_gather_single", None) or self.dist.all_gather_into_tensor
        gather(flat, own)

    def add_rows(self, rows: Tensor) -> Tensor:
        n, mine = rows.shape[1], self.mine(len(rows))
        part = -(-n // self.size)
        own = rows.new_zeros(len(mine), part * self.size)
        own[:, :n] = rows[mine.start : mine.stop]
        sent = own.view(len(mine), self.size, part).transpose(0, 1).contiguous()
        got = torch.empty_like(sent)
        self.dist.all_to_all_single(got.view(torch.uint8).view(-1), sent.view(torch.uint8).view(-1))
        shards = got.view(len(rows), part)
        total = torch.zeros(self.size, part, device=rows.device)
        total[self.rank].copy_(shards[0])
        for shard in shards[1:]:
            total[self.rank] += shard
        self.gather(total)
        return total.view(-1)[:n]

    def add(self, values: Tensor) -> None:
        self.dist.all_reduce(values)

    def all(self, value: bool) -> bool:
        found = torch.tensor(float(value))
        self.dist.all_reduce(found, self.dist.ReduceOp.MIN)
        return bool(found)

    def agree(self, facts: dict[str, Any]) -> None:
        """By JSON in the store: a process may still lack what the others have."""
        self.agreed += 1
        keys = [f"facts-{self.agreed}-{rank}" for rank in range(self.size)]
        self.store.set(keys[self.rank], json.dumps(facts, default=str))
        first, *others = (json.loads(self.store.get(key)) for key in keys)
        for rank, other in enumerate(others, start=1):
            for name in {**first, **other}:
                values = [known.get(name, "not given") for known in (first, other)]
                if values[0] != values[1]:
                    shown = " and ".join(str(value)[:40] for value in values)
                    raise UserError(
                        f"the processes 0 and {rank} differ in {name}: {shown}; all need the same"
                    )

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        key = f"first-{os.environ.get('GROUP_RANK', '0')}"
        if self.local_rank:
            self.store.wait([key], datetime.timedelta(days=7))
        try:
            yield
        finally:
            if not self.local_rank:
                self.store.set(key, "done")

    def share(self, value: str) -> str:
        if not self.rank:
            self.store.set("shared", value)
        return str(self.store.get("shared").decode())

    def wait(self) -> None:
        self.dist.all_reduce(torch.zeros(1))

    def check_device(self, device: torch.device) -> None:
        count = _variable("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in os.environ else 1
        if device.type != "cuda":
            return
        if count > (gpus := torch.cuda.device_count()):
            raise UserError(
                f"{count} processes, but {gpus} GPUs: two processes cannot share one; "
                f"use --nproc-per-node {gpus}"
            )
        if device.index != torch.cuda.current_device():
            raise UserError(
                f"--device {device}: torchrun gives each process a GPU of its own; leave it out"
            )

    def close(self) -> None:
        """Call it after the CUDA graphs are gone: NCCL waits for them."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.wait()
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
        beat = 0
        with contextlib.suppress(RuntimeError):  # torchrun's store is gone, and torchrun with it
            while not self.ended.wait(BEAT):
                beat += 1
                self.watch.set(str(self.rank), str(beat))
                now = time.monotonic()
                for rank in range(self.size):
                    known = self.watch.check([str(rank)])
                    count = self.watch.get(str(rank)).decode() if known else ""
                    if count != counts[rank]:
                        counts[rank], seen[rank] = count, now
                for failed in (c for c in counts.values() if c.startswith(FAILED)):
                    os._exit(int(failed.removeprefix(FAILED)))  # the first has reported why
                late = [r for r in counts if counts[r] != ENDED and now - seen[r] > self.silent]
                if late:
                    self._end(late, min(set(counts) - set(late)))
            self.watch.set(str(self.rank), self.last)

    def _end(self, late: list[int], speaker: int) -> None:
        if self.rank == speaker:
            print(
                f"irongpt: error: process {late[0]} of {self.size} has died: the others end; "
                "continue with --resume",
                file=sys.stderr,
                flush=True,
            )
        os._exit(1)

    def explain(self) -> None:
        """Waits until `_watch` has named the dead process and ended this one, else returns.

        Because the exchange failed, a shorter silence than SILENT counts as death. SIGTERM, by
        which torchrun ends this process, is ignored, so that the message can appear first.
        """
        self.silent = 5 * BEAT
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(8 * BEAT)


def join() -> World:
    """The world of this process. Waits until all of its processes have started."""
    return Torchrun() if "WORLD_SIZE" in os.environ else World()


def together(command: Callable[[World], int]) -> int:
    """Runs a command in all processes, of which the first prints. Returns its exit code.

    An error in one of them ends all, and one line says why.
    """
    world = join()
    with contextlib.ExitStack() as stack:
        if world.rank:  # the process 0 prints
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        else:
            stack.enter_context(output_is_optional())
        try:
            code = command(world)
            world.close()
            return code
        except BaseException as e:
            full = out_of_memory(e)
            if isinstance(e, RuntimeError) and not full:
                world.explain()
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
