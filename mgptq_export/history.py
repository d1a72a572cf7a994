"""What a run found on its way to a quantized model, for the report: one ``history.json`` beside each checkpoint."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from mgptq_export.calibration import LayerFlow
from mgptq_export.models import SourceModel
from mgptq_runtime.errors import PackageError
from mgptq_runtime.progress import track
from mgptq_runtime.strict_json import parse_json_object

__all__ = ["HISTORY_FILE", "History", "layer_errors"]

HISTORY_FILE = "history.json"


@dataclass(frozen=True)
class History:
    """Attributes:
    losses: by linear, what its error was thought to cost, see :func:`mgptq_export.allocation.decision`.
    trials: KL(original || quantized) of every trial of the allocator, in nats per token.
    errors_solved: of every layer's output once the model was solved, see :func:`layer_errors`.
    errors_recovered: the same after recovery; empty without recovery.
    recovery: KL(original || quantized) before every step of recovery, on the step's batch.
    sweep: ``rows`` of the sweep that this is a budget of, see :func:`mgptq_export.sweep.sweep`.
    """

    losses: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    trials: tuple[float, ...] = ()
    errors_solved: tuple[float, ...] = ()
    errors_recovered: tuple[float, ...] = ()
    recovery: tuple[float, ...] = ()
    sweep: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "History":
        """What :meth:`to_json` gave."""
        series = ("trials", "errors_solved", "errors_recovered", "recovery", "sweep")
        return cls(values["losses"], **{name: tuple(values.get(name, ())) for name in series})

    def write(self, folder: Path) -> None:
        """Write ``history.json`` into a checkpoint's folder."""
        (folder / HISTORY_FILE).write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "History":
        """Of a checkpoint's folder; an empty one where there is none.

        Raises:
            PackageError: it cannot be read.
        """
        path = folder / HISTORY_FILE
        if not path.is_file():
            return cls()
        try:
            return cls.from_json(parse_json_object(path.read_bytes()))
        except (ValueError, KeyError, TypeError) as error:
            raise PackageError(
                f"{path} cannot be read ({type(error).__name__}: {error}); copy the package again, or remove the file"
            ) from error


@torch.no_grad()
def layer_errors(original: SourceModel, quantized: SourceModel, tokens: torch.Tensor) -> tuple[float, ...]:
    """How far every layer's output is from the original's: ``|h' - h| / |h|`` of the residual stream, mean over tokens.

    Args:
        original: its channels numbered as those of ``quantized``.
        tokens: int64 [sequences, length].
    """
    flows, errors = [LayerFlow(source, tokens) for source in (original, quantized)], []
    with track("Measuring layers", len(original.layers)) as advance:
        for index in range(len(original.layers)):
            for flow in flows:
                flow.advance(index)
                flow.source.memory.release_weights(flow.source.layers[index])
            pairs = zip(flows[0].states, flows[1].states, strict=True)
            relative = [(b - a).norm(dim=-1) / a.norm(dim=-1).clamp_min(1e-12) for a, b in pairs]
            errors.append(float(torch.cat([part.flatten() for part in relative]).mean()))
            advance()
    return tuple(errors)
