"""`irongpt doctor`: the device, dtype and kernels that are used here, and how to fix problems."""

import contextlib
import json
import platform
import textwrap
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from irongpt_kernels import Ops, eager
from irongpt_kernels.runtime import emulate
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from irongpt import __version__, driver, gpu_state, ops
from irongpt import device as devices
from irongpt.config import PRESETS, WAR_AND_PEACE_VOCAB, GPTConfig
from irongpt.console import say_on_stderr
from irongpt.errors import UserError
from irongpt.files import check_result, write_result
from irongpt.model import GPT
from irongpt.training import scaling
from irongpt.training.distributed import World, together

FLOAT32 = 4  # bytes
STATE = 3  # float32 numbers per weight: the weight and AdamW's two moments

WIDTH = 96  # columns of the report
HOT = 85  # degrees Celsius at which a T4 slows down


@dataclass
class Report:
    """facts: lines by topic. problems: errors and their solutions. advice: reasons for slowness."""

    facts: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = {name: text.splitlines() for name, text in self.facts.items()}
        parts |= {"problems": self.problems, "advice": self.advice}
        return "\n".join(
            textwrap.fill(
                line, WIDTH, initial_indent=f"{'' if i else name:<10}", subsequent_indent=" " * 10
            )
            for name, lines in parts.items()
            for i, line in enumerate(lines)
        )


def doctor(device: str = "auto", json_file: Path | None = None) -> int:
    """Prints the report, and writes it to `json_file`. Returns 1 if there is a problem."""
    check_result(json_file)
    return together(lambda world: _doctor(world, device, json_file))


def _doctor(world: World, name: str, json_file: Path | None) -> int:
    """With several GPUs it also measures the speedup: under torchrun directly, else in a child."""
    not_found = name == "auto" and devices.why_gpu_not_found()
    device = devices.pick("cpu" if not_found else name)
    world.check_device(device)
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    found: object = None
    if world.size > 1:
        found = scaling.measure(world, device, "iron" if gpus else "nano")
    elif gpus > 1:
        say_on_stderr(f"measuring {gpus} GPUs, {scaling.LIMIT:.0f} s at most")
        found = scaling.by_torchrun(gpus)
    if world.rank:
        return 0
    report = examine(device)
    if found:
        report.facts["scaling"] = str(found)
    print(report)
    if json_file is not None:
        write_result(json_file, (json.dumps(asdict(report), indent=1) + "\n").encode())
    return 1 if report.problems else 0


def examine(device: torch.device) -> Report:
    report = Report()
    for topic in (_machine, _software, _training, _matmuls, _kernels, _memory):
        topic(report, device)
    return report


def _machine(report: Report, device: torch.device) -> None:
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    report.facts["machine"] = f"{devices.describe(device)}; {system}"
    if device.type == "cuda":
        _card(report, device)
    elif why := devices.why_gpu_not_found():
        report.problems.append(why)
    elif not torch.cuda.is_available():
        report.advice.append(
            "no NVIDIA GPU: irongpt train runs the nano preset on the CPU in minutes; the iron "
            "preset needs a GPU, such as the free T4 of a Colab notebook"
        )


def _card(report: Report, device: torch.device) -> None:
    p, cuda = torch.cuda.get_device_properties(device), torch.version.cuda
    report.facts["machine"] += f"\n{p.multi_processor_count} multiprocessors, CUDA {cuda}"
    now = gpu_state.query(device)
    if now is None:
        report.advice.append(
            "clocks, power and temperature are unknown: nvidia-ml-py is missing or fails"
        )
        return
    report.facts["machine"] += f", driver {driver.version()}"
    shown = ("sm_mhz", "max_sm_mhz", "memory_mhz", "watt", "limit_watt", "celsius")
    report.facts["clocks"] = "{} of {} MHz, memory {} MHz, {} of {} W, {} degrees C".format(
        *("unknown" if now[name] is None else f"{now[name]:g}" for name in shown)
    )
    limit, default, celsius = (now[k] for k in ("limit_watt", "default_limit_watt", "celsius"))
    if limit is not None and default is not None and limit < default:
        report.advice.append(
            f"the power limit is {limit:g} W, below the GPU's default of {default:g} W: slower"
        )
    if celsius is not None and celsius >= HOT:
        report.advice.append(f"{celsius} degrees C: the GPU lowers its clocks until it cools")


def _software(report: Report, device: torch.device) -> None:
    found = []
    for name, oldest in driver.OLDEST_PACKAGES.items():
        have = driver.installed(name)
        if have is None:
            found.append(f"no {name}")
            report.problems.append(f"{name} is not installed: --fused needs it")
            continue
        found.append(f"{name} {have}")
        if tuple(int(x) for x in have.split("+")[0].split(".")[:2]) < oldest:
            wanted = ".".join(map(str, oldest))
            report.problems.append(f"{name} {have} is too old: {wanted} or newer is tested")
    report.facts["software"] = f"irongpt {__version__}, {', '.join(found)}"


def _training(report: Report, device: torch.device) -> None:
    preset = "iron" if device.type == "cuda" else "nano"
    dtype, why = devices.precision("auto", device)
    name = devices.dtype_name(dtype)
    report.facts["training"] = f"{name} ({why}); the default preset is {preset}"
    if device.type == "cuda":
        bf16 = "native" if emulate.capability(device) >= (8, 0) else "emulated and slow: not used"
        report.facts["training"] += f"\nbfloat16 is {bf16}"


def _matmuls(report: Report, device: torch.device) -> None:
    """Compiles a small kernel for each dtype, for this GPU or else for a T4, and looks for
    tensor-core instructions in it."""
    try:
        from irongpt_kernels.aot import probe
        from irongpt_kernels.runtime import launch

        if launch.INTERPRETED:
            report.facts["matmuls"] = "not compiled: TRITON_INTERPRET is set"
            return
        arch = launch.architecture(device)
        made = probe.matmuls(arch)
    except ImportError:  # no Triton, which `_software` reports
        return
    except RuntimeError as e:
        report.problems.append(str(e))
        return
    target = "" if device.type == "cuda" else "compiled for a T4: "
    listed = ", ".join(f"{dtype} uses {how}" for dtype, how in made.items())
    report.facts["matmuls"] = f"{target}{listed} (sm_{arch})"
    if arch >= 75 and made["float16"] != probe.TENSOR_CORES:
        report.problems.append("float16 matmuls do not use tensor cores: the kernels will be slow")


def _kernels(report: Report, device: torch.device) -> None:
    config = _iron()
    try:
        ops.load("fused", device, config)
    except UserError as e:
        report.facts["kernels"] = str(e)
        if device.type == "cuda":
            report.problems.append(str(e))
        return
    from irongpt_kernels.fused import attention_tiles

    dtype, D = devices.precision("auto", device).dtype, config.n_embd // config.n_head
    lines = []
    head = attention_tiles.head_options(device, config.context, D, dtype.itemsize)
    for kernel in ("forward", "query", "key") if head is None else ("forward",):
        t = attention_tiles.launch_options(kernel, device, D, dtype.itemsize)
        lines.append(f"{kernel} {t['BLOCK_M']} x {t['BLOCK_N']}, {t['num_warps']} warps")
    if head is not None:
        lines.append(
            f"backward, one program per head, {head['BLOCK_N']} keys, {head['num_warps']} warps"
        )
    shown = "; ".join(lines)
    report.facts["kernels"] = f"--fused runs; attention tiles, queries x keys: {shown}"
    for note in ops.notes("fused", device):
        report.facts["kernels"] += f"\n{note}"


def _memory(report: Report, device: torch.device) -> None:
    config, batch = _iron(), int(PRESETS["iron"].train["batch_size"])
    dtype = torch.float16 if device.type == "cpu" else devices.precision("auto", device).dtype
    needs = {"eager": training_bytes(config, batch, eager, dtype) / 2**30}
    with contextlib.suppress(ImportError):  # no Triton
        from irongpt_kernels import fused

        needs["fused"] = training_bytes(config, batch, fused, dtype) / 2**30
    listed = ", ".join(f"{gib:.1f} GiB with --ops {name}" for name, gib in needs.items())
    report.facts["memory"] = (
        f"training the iron preset needs {listed} (computed, in {devices.dtype_name(dtype)}; "
        "--ops builtin needs an amount in between)"
    )
    if device.type == "cuda":
        free, total = (x / 2**30 for x in torch.cuda.mem_get_info(device))
        report.facts["memory"] += f"\n{free:.1f} of {total:.1f} GiB are free"
        if free < 1.5 * min(needs.values()):
            report.problems.append(
                f"{free:.1f} GiB are free: end other processes on the GPU, or use half the "
                f"--batch-size ({batch // 2}) with --grad-accum 2"
            )


def _iron() -> GPTConfig:
    return GPTConfig(vocab_size=WAR_AND_PEACE_VOCAB, **PRESETS["iron"].model)


def training_bytes(config: GPTConfig, batch_size: int, ops: Ops, dtype: torch.dtype) -> int:
    """Memory of weights, gradients, optimizer and the tensors saved for the backward pass.

    dtype: that of the matmuls. Each storage counts once. It is a lower bound, because the kernels
    also need a workspace.
    """
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        alive.append(x)  # so that its address is not reused
        return x

    with FakeTensorMode(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model = GPT(config, ops)
        copies = model.make_low_precision_params(dtype) if dtype.itemsize == 2 else {}
        held = [*model.parameters(), *copies.values()]
        weights = {p.untyped_storage()._cdata for p in held}
        idx = torch.zeros(batch_size, config.context, dtype=torch.int64)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            model.loss(idx, idx, seed=torch.zeros((), dtype=torch.int64))
        state = STATE * FLOAT32 * sum(p.numel() for p in model.parameters())
        state += sum(c.nbytes for c in copies.values())
        # The gradient of a weight with a 16-bit copy has the dtype of the copy.
        state += sum(copies.get(p, p).nbytes for p in model.parameters())
    activations = sum(n for key, n in kept.items() if key not in weights)
    return state + activations
