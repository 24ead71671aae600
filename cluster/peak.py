"""What an accelerator can compute at most, from its maker's data sheet: dense, without sparsity."""

# Multiplications and additions in 10^12 a second: (half precision with float32 sums, float32). The first match counts.
_TERA: list[tuple[str, float, float]] = [
    ("B200", 2250.0, 75.0),
    ("H200", 989.4, 66.9),
    ("H100 PCIE", 756.5, 51.2),
    ("H100 NVL", 835.5, 60.0),
    ("H100", 989.4, 66.9),
    ("A100", 311.9, 19.5),
    ("L40S", 362.1, 91.6),
    ("L4", 121.0, 30.3),
    ("A10G", 70.0, 35.0),
    ("A10", 125.0, 31.2),
    ("V100", 125.0, 15.7),
    ("T4", 65.0, 8.1),
]


def peak_flops(name: str, precision: str) -> float | None:
    """Floating-point operations a second of the device that its driver calls ``name``; None for one not known here.

    Args:
        precision: ``fp32`` (without TF32, which torch doesn't use unless asked), ``bf16`` or ``fp16``.
    """
    words = name.upper().replace("-", " ").split()
    for known, half, single in _TERA:
        if set(known.split()) <= set(words):
            return (single if precision == "fp32" else half) * 1e12
    return None


def peak_of(device: str, precision: str) -> float | None:
    """The same of a torch device; None for a CPU, whose peak is on no data sheet."""
    import torch

    if not device.startswith("cuda"):
        return None
    return peak_flops(torch.cuda.get_device_name(device), precision)
