"""SIGKILL at a random instant of a run; the resumed run is bitwise the one that was never killed.

The instant is random in time, so a case that is repeated is killed at another instruction.
"""

import random
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

import torch.distributed as dist
from run_helpers import assert_same, state

from irongpt.training import distributed
from tests.campaign.process import TINY, Commands, Worker

LONG, SHORT = "--iters 40 --eval-every 5", "--iters 6 --eval-every 2"
BPE = "--tokenizer bpe --vocab-size 320"
RUNS = (  # flags, and the number of processes
    (f"{LONG} --ops eager", 1),
    (f"{LONG} --ops builtin", 1),
    (f"{SHORT} --ops fused", 1),
    (f"{LONG} --ops builtin {BPE} --optimizer adamw", 1),
    (f"{LONG} --ops eager {BPE}", 1),
    (f"{LONG} --ops eager --shards 2", 2),
    (f"{SHORT} --ops fused {BPE} --grad-accum 2", 1),
    (f"{LONG} --ops builtin {BPE} --shards 2 --dropout 0", 2),
)


def quick() -> None:
    """A dead process is noticed after ten seconds, however busy the machine is."""
    distributed.HEARTBEAT, distributed.HEARTBEAT_TIMEOUT = 0.2, 10.0


class Case(Commands):
    """Kills one process of a run, or all of them, and resumes it."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        super().__init__(folder, stack)
        rng = random.Random(0)
        words = ["".join(rng.choices("etaoinshr", k=rng.randint(2, 7))) for _ in range(200)]
        (self.folder / "text.txt").write_text(" ".join(rng.choices(words, k=1200)))
        self.reference = cache(self._reference)
        self.seconds: dict[int, float] = {}  # that a run took

    @contextmanager
    def started(self, size: int, *args: object) -> Iterator[list[Worker]]:
        """The command in so many processes, as torchrun starts them: the store is ours."""
        with ExitStack() as stack:
            several = {}
            if size > 1:
                with socket.create_server(("127.0.0.1", 0)) as free:
                    port = free.getsockname()[1]
                store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
                stack.callback(lambda: store)
                several = dict(WORLD_SIZE=size, MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
                               TORCHELASTIC_USE_AGENT_STORE=True)  # fmt: skip
            workers = []
            for rank in range(size):
                names = several | dict(RANK=rank, LOCAL_RANK=rank) if several else {}
                variables = {name: str(value) for name, value in names.items()}
                worker = Worker(self.folder, quick, 4 << 30, f"output{rank}", **variables)
                workers.append(stack.enter_context(worker))
            for worker in workers:
                worker.start(*args)
            yield workers

    def complete(self, kind: int, *args: object) -> None:
        """Runs the command to its end."""
        begin = time.monotonic()
        with self.started(RUNS[kind][1], *args) as workers:
            for ended in [worker.end() for worker in workers]:
                assert ended.code == 0, f"exit code {ended.code}: {ended.err[-3000:]}"
        self.seconds[kind] = max(time.monotonic() - begin, self.seconds.get(kind, 0.0) / 2)

    def flags(self, kind: int) -> list[str]:
        return ["train", *TINY, *RUNS[kind][0].split()]

    def _reference(self, kind: int) -> Path:
        self.complete(kind, *self.flags(kind), "--out", f"reference{kind}")
        return self.folder / f"reference{kind}"

    def __call__(self, rng: random.Random, number: int) -> str:
        kind, run = number % len(RUNS), self.folder / "run"
        size, reference = RUNS[kind][1], self.reference(kind)
        wait, codes = rng.uniform(0, self.seconds[kind]), [0]
        victims = range(size) if rng.random() < 0.5 else [rng.randrange(size)]
        while 0 in codes:  # it was faster
            shutil.rmtree(run, ignore_errors=True)
            with self.started(size, *self.flags(kind), "--out", "run") as workers:
                time.sleep(wait)
                for rank in victims:
                    workers[rank].process.kill()
                codes = [worker.end().code for worker in workers]
            wait *= 0.8
        assert set(codes) <= {-9, 1}, codes
        begun = (run / "config.json").exists()
        where = "no step" if not begun else f"step {state(run)['step']}"
        again = ["--resume", "run"] if begun else [*self.flags(kind)[1:], "--out", "run"]
        try:
            self.complete(kind, "train", *again)
            assert_same(run, reference)
            left = [p.name for p in run.glob(".*")]
            assert not left, left
        except AssertionError as e:
            raise AssertionError(f"killed after {where} was saved, {RUNS[kind]}: {e}") from e
        return f"{RUNS[kind][0]}, {size}: {'killed before' if not begun else 'killed after'} step 0"
