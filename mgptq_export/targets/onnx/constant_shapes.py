"""Pass: constants get the shape that they have."""

import onnx_ir as ir

__all__ = ["declare_constant_shapes"]


def declare_constant_shapes(graph: ir.Graph) -> None:
    """Declare the true shape of every Constant's output, in place.

    The builder declares its one-element vectors as scalars, which the checker's shape inference refuses.
    """
    for node in graph:
        if node.op_type == "Constant":
            tensor = ir.convenience.get_const_tensor(node.outputs[0])
            if tensor is not None:
                node.outputs[0].shape = ir.Shape(tensor.shape.numpy())
