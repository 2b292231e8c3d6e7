"""What a GPU machine is, and how fast its link and the kernels on it are.

    python benchmarks/gpu_figures.py --machine FILE    # versions, driver, device; null without one
    python benchmarks/gpu_figures.py FILE              # bytes/s each way, and seconds of each kernel

Times are medians by CUDA events.  Each kernel goes round many copies of its weight, so that none is in a
cache.  A kernel that fails leaves its error in its place.
"""

import argparse
import json
import platform
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from subspec.bench.device import link_speeds, seconds

ROWS = (1, 2, 4, 8, 16)
SHAPES = ((17920, 1536), (1536, 8960), (8192, 4096))  # (N, K)
COLD_BYTES = 256 << 20  # more than any cache
Product = Callable[[Tensor, int], object]  # of rows (T, K), at the given number of its call
NVIDIA_SMI = "name,driver_version,pcie.link.gen.max,pcie.link.width.max,pcie.link.gen.current,power.limit"


def machine_facts() -> dict[str, Any]:
    """Versions, driver and device; nothing here fails."""
    facts: dict[str, Any] = {
        "device": None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "system": platform.platform(),
        "nvidia_smi": _asked(["nvidia-smi", f"--query-gpu={NVIDIA_SMI}", "--format=csv,noheader"]),
        "commit": _asked(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]),
    }
    try:
        from subspec.bench import machine

        facts |= {"versions": machine.versions(), "machine": machine.machine()}
    except Exception as error:  # noqa: BLE001 - whatever is wrong with the package, the report says it
        facts["package_error"] = repr(error)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        facts |= {
            "device": f"{properties.name} (sm_{properties.major}{properties.minor})",
            "multiprocessors": properties.multi_processor_count,
            "free_bytes": free,
            "total_bytes": total,
        }
    return facts


def _asked(command: list[str]) -> str | None:
    """A command's output, None where it does not work."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _cold(weight: Tensor) -> list[Tensor]:
    """Enough copies of a weight that none stays in a cache."""
    count = max(2, -(-COLD_BYTES // weight.nbytes))
    return [weight.clone() for _ in range(count)]


def products(n: int, k: int) -> dict[str, Callable[[], Product]]:
    """Ways to multiply rows by an (N, K) weight; each makes its weights when it is called."""
    from subspec.kernels import device
    from subspec.substitute.layout import tile_bytes

    def plain() -> list[Tensor]:
        return _cold(torch.randn(n, k, device="cuda").bfloat16())

    def torch_int4() -> Product:
        codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
        packed = _cold(torch.ops.aten._convert_weight_to_int4pack(codes, 8))
        scales = torch.ones(k // 64, n, 2, dtype=torch.bfloat16, device="cuda")
        multiply = torch.ops.aten._weight_int4pack_mm
        return lambda x, number: multiply(x, packed[number % len(packed)], 64, scales)

    def low_bit() -> Product:
        tiles = _cold(torch.zeros(tile_bytes(n, k), dtype=torch.uint8, device="cuda"))
        return lambda x, number: device.lowbit_linear(x, tiles[number % len(tiles)], n, k, None)

    def torch_linear() -> Product:
        weights = plain()
        return lambda x, number: F.linear(x, weights[number % len(weights)])

    def exact() -> Product:
        weights = plain()
        return lambda x, number: device.exact_linear(x, weights[number % len(weights)], None)

    return {
        "low-bit: torch int4pack": torch_int4,
        "low-bit: subspec": low_bit,
        "exact: torch linear": torch_linear,
        "exact: subspec tiles": exact,
    }


def product_times() -> list[dict[str, Any]]:
    """Seconds of each way of a product, by shape and rows."""
    found: list[dict[str, Any]] = []
    for n, k in SHAPES:
        for name, make in products(n, k).items():
            entry: dict[str, Any] = {"product": name, "n": n, "k": k, "seconds": {}}
            try:
                product = make()
                for rows in ROWS:
                    x = torch.randn(rows, k, device="cuda").bfloat16()
                    entry["seconds"][rows] = seconds(partial(product, x))
            except Exception as error:  # noqa: BLE001 - one kernel's failure is a finding; the others go on
                entry["error"] = repr(error)[-1000:]
            found.append(entry)
    return found


def _decode(images: Sequence[Tensor], tiles: Tensor, out: Tensor, number: int) -> None:
    """Rebuild a weight from one copy of its residual."""
    from subspec.kernels import device

    device.decode_residual(images[number % len(images)], tiles, *out.shape, out)


def decode_times() -> list[dict[str, Any]]:
    """Seconds to rebuild a weight from its residual."""
    from subspec.substitute.quantize import quantize_tiles
    from subspec.substitute.residual import encode

    found = []
    for n, k in SHAPES[:2]:
        entry: dict[str, Any] = {"n": n, "k": k}
        try:
            weight = (torch.randn(n, k) * 0.02).bfloat16()
            tiles = quantize_tiles(weight)
            images, near = _cold(encode(weight, tiles).cuda()), tiles.cuda()
            out = torch.empty(n, k, dtype=torch.bfloat16, device="cuda")
            took = seconds(partial(_decode, images, near, out))
            entry |= {"seconds": took, "weights_per_s": n * k / took}
            entry["exact"] = torch.equal(out.cpu().view(torch.int16), weight.view(torch.int16))
        except Exception as error:  # noqa: BLE001 - as above
            entry["error"] = repr(error)[-1000:]
        found.append(entry)
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--machine", action="store_true", help="facts instead of speeds")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    if options.machine:
        found = machine_facts()
    else:
        found = {"link": link_speeds(), "products": product_times(), "decode": decode_times()}
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
