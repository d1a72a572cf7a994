"""What calibration text tells about a model: Hessians of the inputs, sensitivity of the outputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mgptq_export.compute import compute_dtype, computing_in
from mgptq_export.hooks import hooked
from mgptq_export.journal import Record
from mgptq_export.models import SourceModel
from mgptq_runtime.errors import NumericalError
from mgptq_runtime.progress import track

__all__ = ["GroupStatistics", "HessianAccumulator", "ModelStatistics", "collect_statistics"]

SEQUENCES_AT_ONCE = 4
HEAD = "head.hessian"


class HessianAccumulator:
    """``H = 2/n sum x x^T`` over the ``n`` activations that a linear reads (MG-PTQ's ``2 X X^T``)."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self._sum = torch.zeros(columns, columns, device=device)
        self._count = 0

    def add(self, activation: torch.Tensor) -> None:
        """Add activations: float [..., columns]."""
        rows = activation.detach().reshape(-1, activation.shape[-1]).float()
        self._sum.addmm_(rows.t(), rows)
        self._count += rows.shape[0]

    @property
    def hessian(self) -> torch.Tensor:
        """float32 [columns, columns]."""
        return self._sum * (2.0 / max(self._count, 1))


@dataclass(frozen=True)
class GroupStatistics:
    """Attributes:
    name: of the input group.
    hessian: float32 [columns, columns].
    sensitivity: for every linear, float32 [rows]: mean over tokens of the squared gradient of the model's loss
        with respect to the linear's output, labels drawn from the model (the diagonal of the Fisher information).
    """

    name: str
    hessian: torch.Tensor
    sensitivity: dict[str, torch.Tensor]


@dataclass(frozen=True)
class ModelStatistics:
    """Attributes:
    groups: by group name.
    head_hessian: float32 [hidden, hidden], of the head's input.
    """

    groups: dict[str, GroupStatistics]
    head_hessian: torch.Tensor

    def to_record(self) -> Record:
        """For a journal."""
        arrays = {HEAD: self.head_hessian.cpu().numpy()}
        for name, group in self.groups.items():
            arrays[f"{name}.hessian"] = group.hessian.cpu().numpy()
            arrays |= {f"{linear}.sensitivity": values.cpu().numpy() for linear, values in group.sensitivity.items()}
        return Record(arrays, {name: list(group.sensitivity) for name, group in self.groups.items()})

    @classmethod
    def from_record(cls, record: Record, device: torch.device) -> "ModelStatistics":
        """What :meth:`to_record` gave."""

        def tensor(name: str) -> torch.Tensor:
            return torch.from_numpy(record.arrays[name]).to(device)

        groups = {}
        for name, linears in record.facts.items():
            sensitivity = {linear: tensor(f"{linear}.sensitivity") for linear in linears}
            groups[name] = GroupStatistics(name, tensor(f"{name}.hessian"), sensitivity)
        return cls(groups, tensor(HEAD))


def collect_statistics(
    source: SourceModel, tokens: torch.Tensor, sensitivity_samples: int, generator: torch.Generator
) -> ModelStatistics:
    """Run the calibration set through the model.

    Args:
        tokens: int64 [samples, sequence].
        sensitivity_samples: how many of the sequences to run backward as well.
        generator: draws the labels.

    Raises:
        NumericalError: an activation or a gradient is NaN or infinite.
    """
    groups = source.groups()
    device = source.model.device
    hessians = {group.name: HessianAccumulator(group.columns, device) for group in groups}
    head = HessianAccumulator(source.model.lm_head.in_features, device)
    gradients = {
        name: torch.zeros(module.out_features, device=device) for g in groups for name, module in g.modules.items()
    }
    handles = []
    for group in groups:
        first = next(iter(group.modules.values()))
        handles.append(first.register_forward_pre_hook(_feed(hessians[group.name])))
        for name, module in group.modules.items():
            handles.append(module.register_forward_hook(_watch_gradient(gradients[name])))
    backward, rest = list(tokens[:sensitivity_samples].split(1)), tokens[sensitivity_samples:]
    forward = list(rest.split(SEQUENCES_AT_ONCE)) if len(rest) else []
    with hooked(handles), track("Measuring activations and sensitivity", len(backward) + len(forward)) as advance:
        for batch in backward:
            head.add(_run_backward(source.model, batch.to(device), generator))
            advance()
        for batch in forward:
            head.add(_run_forward(source.model, batch.to(device)))
            advance()
    count = min(sensitivity_samples, tokens.shape[0]) * tokens.shape[1]
    result = {}
    for group in groups:
        sensitivity = {name: gradients[name] / count for name in group.modules}
        for name, values in sensitivity.items():
            if not torch.isfinite(values).all():
                raise NumericalError(f"{name}: the loss gradient is NaN or infinite on the calibration text")
        result[group.name] = GroupStatistics(group.name, hessians[group.name].hessian, sensitivity)
    return ModelStatistics(result, head.hessian)


def _feed(accumulator: HessianAccumulator) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    return lambda module, inputs: accumulator.add(inputs[0])


def _watch_gradient(total: torch.Tensor) -> Callable[[nn.Module, object, torch.Tensor], None]:
    def accumulate(gradient: torch.Tensor) -> None:
        total.add_(gradient.float().flatten(0, -2).square().sum(0))

    def watch(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(accumulate)

    return watch


def _run_forward(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """What the head reads, [sequences, length, hidden]."""
    with torch.no_grad(), computing_in(compute_dtype(model.device), model.device):
        hidden: torch.Tensor = model.model(batch, use_cache=False).last_hidden_state
    return hidden


def _run_backward(model: Any, batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The same, after a way back from labels that the model's own predictions draw."""
    # Gradients flow through activations only: weights are frozen, so their gradients are never formed.
    embedded = model.get_input_embeddings()(batch).requires_grad_(True)
    with computing_in(compute_dtype(model.device), model.device):
        hidden: torch.Tensor = model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden).float().flatten(0, 1)
    if not torch.isfinite(logits).all():
        raise NumericalError("the model's logits are NaN or infinite on the calibration text; check the model")
    probabilities = torch.softmax(logits.detach(), -1).cpu()
    labels = torch.multinomial(probabilities, 1, generator=generator).squeeze(1).to(logits.device)
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    return hidden
