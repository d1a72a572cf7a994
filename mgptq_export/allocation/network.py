"""The graph network: column graphs in, a correction of every unit's costs out."""

import torch
from torch import nn
from torch.nn import functional
from torch_geometric.nn import GraphConv
from torch_geometric.utils import scatter

from mgptq_export.allocation.column_graph import ModelGraph

__all__ = ["AllocatorNetwork"]

LARGEST_CORRECTION = 2.0


class AllocatorNetwork(nn.Module):
    """Graph perceptual module and bit-width allocator.

    Two graph convolutions over the weighted column graph embed every column; a third, over the graph of tensors, lets
    those that feed one another and their likes in the layers next to them know of each other. The allocator
    reads a unit's columns, its tensor, and what the unit is estimated to lose in each format. Its answer corrects the
    logarithms of these estimates, of all formats alike, so an untrained network allocates as they say.

    Args:
        features: of a column.
        formats: that a unit may have.
    """

    def __init__(self, features: int, formats: int, hidden: int = 32) -> None:
        super().__init__()
        self.first = GraphConv(features, hidden, aggr="mean")
        self.second = GraphConv(hidden, hidden, aggr="mean")
        self.between_tensors = GraphConv(hidden, hidden, aggr="mean")
        inner, last = nn.Linear(2 * hidden + formats, hidden), nn.Linear(hidden, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.allocator = nn.Sequential(inner, nn.SiLU(), last)

    def forward(self, graph: ModelGraph, log_costs: torch.Tensor) -> torch.Tensor:
        """What to add to the logarithms of every unit's costs: float32 [units].

        Args:
            log_costs: normalized estimates, float32 [units, formats].
        """
        columns = functional.silu(self.first(graph.features, graph.adjacency))
        columns = functional.silu(self.second(columns, graph.adjacency))
        units = scatter(columns, graph.unit_of_node, dim=0, dim_size=len(graph.tensor_of_unit), reduce="mean")
        tensors = scatter(units, graph.tensor_of_unit, dim=0, dim_size=graph.tensors, reduce="mean")
        tensors = functional.silu(self.between_tensors(tensors, graph.tensor_edges))
        # By an index, several threads would sum gradients in an order that changes.
        of_units = torch.cat([units, tensors.index_select(0, graph.tensor_of_unit), log_costs], dim=1)
        return LARGEST_CORRECTION * torch.tanh(self.allocator(of_units).squeeze(1) / LARGEST_CORRECTION)
