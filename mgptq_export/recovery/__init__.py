"""Recovery: with all codes fixed, scales, norms and biases are trained to bring back the original's predictions."""

from mgptq_export.recovery.training import Recovered, recover

__all__ = ["Recovered", "recover"]
