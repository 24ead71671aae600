"""Knowledge distillation at cluster scale, with its costs on the table."""

__version__ = "0.1.0"
