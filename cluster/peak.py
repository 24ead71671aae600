"""What an accelerator can compute at most and draws at most, from its maker's data sheet: dense, without sparsity."""

# Multiplications and additions in 10^12 a second: (half precision with float32 sums, float32), and the board's watts.
# The first match counts.
_SHEETS: list[tuple[str, float, float, float]] = [
    ("B200", 2250.0, 75.0, 1000.0),
    ("H200", 989.4, 66.9, 700.0),
    ("H100 PCIE", 756.5, 51.2, 350.0),
    ("H100 NVL", 835.5, 60.0, 400.0),
    ("H100", 989.4, 66.9, 700.0),
    ("A100", 311.9, 19.5, 400.0),
    ("L40S", 362.1, 91.6, 350.0),
    ("L4", 121.0, 30.3, 72.0),
    ("A10G", 70.0, 35.0, 300.0),
    ("A10", 125.0, 31.2, 150.0),
    ("V100", 125.0, 15.7, 300.0),
    ("T4", 65.0, 8.1, 70.0),
]


def peak_flops(name: str, precision: str) -> float | None:
    """Floating-point operations a second of the device that its driver calls ``name``; None for one not known here.

    Args:
        precision: ``fp32`` (without TF32, which torch doesn't use unless asked), ``bf16`` or ``fp16``.
    """
    sheet = _sheet(name)
    return None if sheet is None else (sheet[2] if precision == "fp32" else sheet[1]) * 1e12


def board_watts(name: str) -> float | None:
    """Watts that the device may draw (its largest form); None for one not known here."""
    sheet = _sheet(name)
    return None if sheet is None else sheet[3]


def _sheet(name: str) -> tuple[str, float, float, float] | None:
    words = set(name.upper().replace("-", " ").split())
    return next((sheet for sheet in _SHEETS if set(sheet[0].split()) <= words), None)


def peak_of(device: str, precision: str) -> float | None:
    """The same of a torch device; None for a CPU, whose peak is on no data sheet."""
    import torch

    if not device.startswith("cuda"):
        return None
    return peak_flops(torch.cuda.get_device_name(device), precision)
