"""What this machine will run, and why: one screen, with what to do about what is amiss."""

import json
import platform
import shutil
import textwrap
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import torch
from irongpt_kernels import eager
from irongpt_kernels.runtime import emulate
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from irongpt import __version__, gpu_state, launch_cache, ops
from irongpt import device as devices
from irongpt.config import PRESETS, GPTConfig
from irongpt.errors import UserError
from irongpt.files import check_result, write_result
from irongpt.model import GPT

FLOAT32 = 4  # bytes
STATE = 3  # float32 numbers per weight: the weight and AdamW's two moments

OLDEST = {"torch": (2, 10), "triton": (3, 6)}
VOCABULARY = 109  # characters of War and Peace
WIDTH = 96  # of what is printed
HOT = 85  # degrees Celsius from which a T4 slows down
CLOCKS = [  # nvidia-smi's names
    "driver_version",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.draw",
    "power.limit",
    "power.default_limit",
    "temperature.gpu",
]


@dataclass
class Report:
    """facts: a line each, by what it is about. amiss: what is wrong and what to do, a line each."""

    facts: dict[str, str] = field(default_factory=dict)
    amiss: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = {name: text.splitlines() for name, text in self.facts.items()}
        parts |= {"amiss": self.amiss, "advice": self.advice}
        return "\n".join(
            textwrap.fill(
                line, WIDTH, initial_indent=f"{'' if i else name:<10}", subsequent_indent=" " * 10
            )
            for name, lines in parts.items()
            for i, line in enumerate(lines)
        )


def doctor(device: str, json_file: Path | None) -> int:
    """Prints the report, and writes it to `json_file`. Returns 1 where something is amiss."""
    if json_file is not None:
        check_result(json_file)
    report = examine(devices.pick(device))
    print(report)
    if json_file is not None:
        write_result(json_file, (json.dumps(asdict(report), indent=1) + "\n").encode())
    return 1 if report.amiss else 0


def examine(device: torch.device) -> Report:
    report = Report()
    _machine(report, device)
    _software(report)
    _training(report, device)
    _products(report, device)
    _kernels(report, device)
    _memory(report, device)
    return report


def _machine(report: Report, device: torch.device) -> None:
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    report.facts["machine"] = f"{devices.describe(device)}; {system}"
    if device.type == "cuda":
        _card(report, device)
    elif shutil.which("nvidia-smi"):
        report.amiss.append(
            f"nvidia-smi is here, but torch {torch.__version__} finds no GPU: install a torch "
            "with CUDA, or look at the driver and CUDA_VISIBLE_DEVICES"
        )
    else:
        report.advice.append(
            "no NVIDIA GPU: irongpt train runs the nano preset on the CPU in minutes; the iron "
            "preset wants a GPU, such as the free T4 of a Colab notebook"
        )


def _card(report: Report, device: torch.device) -> None:
    p = torch.cuda.get_device_properties(device)
    cores = f"{p.multi_processor_count} multiprocessors"
    report.facts["machine"] += f"\n{cores}, CUDA {torch.version.cuda}"
    if (p.major, p.minor) < (7, 5):
        report.amiss.append("the kernels need compute capability 7.5 or newer: use --ops builtin")
    now = gpu_state.query(str(p.uuid), CLOCKS)
    if now is None:
        report.advice.append("nvidia-smi does not answer: clocks, power and heat are not known")
        return
    report.facts["machine"] += f", driver {now['driver_version']}"
    report.facts["clocks"] = (
        f"{now['clocks.sm']} of {now['clocks.max.sm']} MHz, memory {now['clocks.mem']} MHz, "
        f"{now['power.draw']} of {now['power.limit']} W, {now['temperature.gpu']} degrees C"
    )
    limit, default = (
        gpu_state.number(now["power.limit"]),
        gpu_state.number(now["power.default_limit"]),
    )
    if limit is not None and default is not None and limit < default:
        report.advice.append(
            f"the power limit is {limit:g} W, below the card's {default:g}: slower"
        )
    heat = gpu_state.number(now["temperature.gpu"])
    if heat is not None and heat >= HOT:
        report.advice.append(f"{heat:g} degrees C: the card lowers its clocks until it is cooler")


def _software(report: Report) -> None:
    found = []
    for name, oldest in OLDEST.items():
        try:
            have = version(name)
        except PackageNotFoundError:
            found.append(f"no {name}")
            report.amiss.append(f"{name} is not installed: without it there is no --fused")
            continue
        found.append(f"{name} {have}")
        if tuple(int(x) for x in have.split("+")[0].split(".")[:2]) < oldest:
            wanted = ".".join(map(str, oldest))
            report.amiss.append(f"{name} {have} is too old: {wanted} or newer is what is tested")
    report.facts["software"] = f"irongpt {__version__}, {', '.join(found)}"


def _training(report: Report, device: torch.device) -> None:
    preset = "iron" if device.type == "cuda" else "nano"
    dtype, why = devices.precision("auto", device)
    name = str(dtype).removeprefix("torch.")
    report.facts["training"] = f"{name} ({why}); preset {preset} unless another is named"
    if device.type == "cuda":
        bf16 = "native" if emulate.capability(device) >= (8, 0) else "emulated and slow: not used"
        report.facts["training"] += f"\nbfloat16 is {bf16}"


def _products(report: Report, device: torch.device) -> None:
    """By probe kernels, for the GPU that is here; on a CPU for a T4, as an example."""
    try:
        from irongpt_kernels.aot import probe
        from irongpt_kernels.runtime import launch
    except ImportError:
        return
    if launch.INTERPRETED:
        report.facts["products"] = "not compiled: TRITON_INTERPRET is set"
        return
    arch = launch.architecture(device)
    whose = "" if device.type == "cuda" else "compiled here for a T4: "
    try:
        made = probe.products(arch)
    except RuntimeError as e:
        report.amiss.append(str(e))
        return
    listed = ", ".join(f"{dtype} by {how}" for dtype, how in made.items())
    report.facts["products"] = f"{whose}{listed} (sm_{arch})"
    if arch >= 75 and made["float16"] != probe.TENSOR_CORES:
        report.amiss.append("float16 products miss the tensor cores: the kernels will be slow")


def _kernels(report: Report, device: torch.device) -> None:
    config = _iron()
    try:
        ops.load("fused", device, config)
    except UserError as e:
        report.facts["kernels"] = str(e)
        return
    from irongpt_kernels.fused import attention_tiles

    dtype, D = devices.precision("auto", device).dtype, config.n_embd // config.n_head
    lines = []
    for kernel in ("forward", "query", "key"):
        t = attention_tiles.tiles(kernel, device, D, dtype.itemsize)
        lines.append(f"{kernel} {t['BLOCK_M']} x {t['BLOCK_N']} in {t['num_warps']} warps")
    report.facts["kernels"] = f"--fused runs; attention tiles: {', '.join(lines)}"
    for note in (ops.slow_note("fused", device), launch_cache.note("fused", device)):
        report.facts["kernels"] += f"\n{note}" if note else ""


def _memory(report: Report, device: torch.device) -> None:
    config, batch = _iron(), int(PRESETS["iron"].train["batch_size"])
    dtype = torch.float16 if device.type == "cpu" else devices.precision("auto", device).dtype
    needs = {"eager": training_bytes(config, batch, eager, dtype) / 2**30}
    try:
        from irongpt_kernels import fused
    except ImportError:
        pass
    else:
        needs["fused"] = training_bytes(config, batch, fused, dtype) / 2**30
    listed = ", ".join(f"{gib:.1f} GiB with --ops {name}" for name, gib in needs.items())
    report.facts["memory"] = (
        f"the iron preset keeps {listed} (computed, in {str(dtype).removeprefix('torch.')}; "
        "builtin is between)"
    )
    if device.type == "cuda":
        free, total = (x / 2**30 for x in torch.cuda.mem_get_info(device))
        report.facts["memory"] += f"\n{free:.1f} of {total:.1f} GiB are free"
        if free < 1.5 * min(needs.values()):
            report.amiss.append(
                f"{free:.1f} GiB are free: end what else uses the GPU, or train with half the "
                f"--batch-size ({batch // 2}) and --grad-accum 2"
            )


def _iron() -> GPTConfig:
    return GPTConfig(vocab_size=VOCABULARY, **PRESETS["iron"].model)


STATE = 3  # numbers of every weight in float32: itself, AdamW's two moments


def training_bytes(config: GPTConfig, batch_size: int, ops: ModuleType, dtype: torch.dtype) -> int:
    """Weights, gradients, optimizer, and every tensor that the forward keeps for the backward.

    dtype: of the matrix products. What a kernel needs for a moment comes on top, so it is a bound
    from below; each storage counts once.
    """
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        alive.append(x)  # or its number might be another's later
        return x

    alive: list[Tensor] = []
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
        # A copy has the gradient of its weight, in its own type.
        state += sum(copies.get(p, p).nbytes for p in model.parameters())
    activations = sum(n for key, n in kept.items() if key not in weights)
    return state + activations
