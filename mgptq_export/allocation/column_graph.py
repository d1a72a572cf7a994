"""The graph perceptual module's input: columns as nodes, the Cholesky factor as edges (MG-PTQ, arXiv 2501.18154).

A second, small graph joins the tensors that columns belong to.
"""

import warnings
from dataclasses import dataclass

import torch
from torch_geometric.data import Batch, Data
from torch_geometric.utils import to_torch_csr_tensor

from mgptq_export.allocation.linear import LinearProblem
from mgptq_export.allocation.problem import AllocationProblem

__all__ = ["FEATURES", "ModelGraph", "build_graphs"]

FEATURES = 10


@dataclass(frozen=True)
class ModelGraph:
    """All linears' column graphs as one, and the graph of tensors, ready for the network.

    Attributes:
        features: float32 [nodes, FEATURES + kinds of linears], independent of the model's size.
        adjacency: sparse CSR, float32 [nodes, nodes]: in a column's row the weights of its neighbours, 0 to 1.
        unit_of_node: int64 [nodes], the allocation unit that a column belongs to.
        tensor_of_unit: int64 [units].
        tensor_edges: int64 [2, edges], between tensors.
    """

    features: torch.Tensor
    adjacency: torch.Tensor
    unit_of_node: torch.Tensor
    tensor_of_unit: torch.Tensor
    tensor_edges: torch.Tensor

    @property
    def tensors(self) -> int:
        """How many there are."""
        return int(self.tensor_of_unit.max()) + 1


def build_graphs(problem: AllocationProblem) -> ModelGraph:
    """Build every linear's column graph; linears of one input group share edges, and differ in their features."""
    graphs = []
    linears = problem.linears
    sensitivities = torch.stack([linear.sensitivity.mean().clamp_min(1e-30).log() for linear in linears])
    centre, spread = sensitivities.mean(), sensitivities.std().clamp_min(1e-3) if len(linears) > 1 else 1.0
    kinds = list(dict.fromkeys(linear.kind for linear in linears))
    for i, (linear, sensitivity) in enumerate(zip(linears, sensitivities, strict=True)):
        features = node_features(linear, (sensitivity - centre) / spread).cpu()
        kind = torch.zeros(len(features), len(kinds))
        kind[:, kinds.index(linear.kind)] = 1.0
        graphs.append(
            Data(
                x=torch.cat([features, kind], dim=1),
                edge_index=linear.inputs.edge_index,
                edge_weight=linear.inputs.edge_weight,
                unit=problem.unit_of_columns(i),
            )
        )
    batch = Batch.from_data_list(graphs)
    adjacency = _adjacency(batch.edge_index, batch.edge_weight, len(batch.x))
    return ModelGraph(batch.x, adjacency, batch.unit, problem.tensor_of_unit(), _tensor_edges(problem))


def _adjacency(edge_index: torch.Tensor, edge_weight: torch.Tensor, nodes: int) -> torch.Tensor:
    """Sparse CSR, which convolutions multiply by several times as quickly as they follow edges one by one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse", UserWarning)  # that such tensors are in beta
        return to_torch_csr_tensor(edge_index.flip(0), edge_weight, size=(nodes, nodes))


def _tensor_edges(problem: AllocationProblem) -> torch.Tensor:
    """Tensors of one layer feed one another; those of one kind in layers next to each other do alike."""
    tensor_of_linear = problem.tensor_of_linear().tolist()
    edges = set()
    for i, one in enumerate(problem.linears):
        for j, other in enumerate(problem.linears):
            alike = one.kind == other.kind and abs(one.layer - other.layer) == 1
            if one.layer == other.layer or alike:
                edges.add((tensor_of_linear[i], tensor_of_linear[j]))
    return torch.tensor(sorted(edge for edge in edges if edge[0] != edge[1]), dtype=torch.int64).view(-1, 2).t()


def node_features(linear: LinearProblem, sensitivity: torch.Tensor) -> torch.Tensor:
    """Features of a linear's columns: float32 [columns, FEATURES], logarithms relative to the linear's own mean."""
    weight, inputs = linear.weight, linear.inputs
    columns = weight.shape[1]
    energy = weight.square().mean(0)
    weighted_energy = (weight.square() * linear.sensitivity[:, None]).mean(0)
    peak = weight.abs().amax(0)
    importance = inputs.importance
    received, passed_on = (sums / inputs.diagonal.square() for sums in (inputs.received, inputs.passed_on))
    position = torch.arange(columns, device=weight.device) / columns
    constant = torch.ones(columns, device=weight.device)
    return torch.stack(
        [
            _relative_log(importance),
            _relative_log(energy),
            _relative_log(weighted_energy),
            _relative_log(importance * weighted_energy),
            torch.log1p(peak / energy.sqrt().clamp_min(1e-12)),
            torch.log1p(received),
            torch.log1p(passed_on),
            position,
            constant * sensitivity,
            constant * (linear.layer / linear.layers),
        ],
        dim=1,
    ).float()


def _relative_log(values: torch.Tensor) -> torch.Tensor:
    logs = values.clamp_min(1e-20).log()
    return (logs - logs.mean()) / 4.0
