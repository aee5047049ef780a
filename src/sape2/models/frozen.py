"""Models for one image size: everything that depends only on the grid is computed once and stored as a constant.

No encoding needs code of its own: the model is traced for that size by `torch.export`, and every part of the graph that
does not depend on the images (coordinates, angles, index maps, resampled tables, dense bias tables) is replaced by its
value. This also works for models of other libraries with an encoding attached.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from sape2.machine import uncompiled

Size = tuple[int, int]


class Frozen(nn.Module):
    """A model for images of one size, any number of them. It is for inference: nothing in it can be trained.

    Raises ValueError for images of another size.
    """

    def __init__(self, graph: fx.GraphModule, size: Size) -> None:
        super().__init__()
        self.traced, self.size = graph, size

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Any:
        if tuple(images.shape[-2:]) != self.size:
            height, width = self.size
            raise ValueError(
                f"this model was frozen for images of {height}x{width} pixels; got {images.shape[-2]}x{images.shape[-1]}. "
                "Freeze the original again for another size"
            )
        return self.traced(images)

    def extra_repr(self) -> str:
        return f"size={self.size}, constants={sum(name.startswith('constant_') for name, _ in self.traced.named_buffers())}"


def freeze(model: nn.Module, size: int | Size) -> Frozen:
    """A copy of a model for images of `size`, (height, width) in pixels; same outputs up to rounding, any batch size.

    For exports to targets with fixed shapes: there is no arithmetic on the grid left. In eager mode on a CPU the original
    is faster, since the copy computes attention by plain products. Raises ValueError for a size that the model does not
    take, and for a model that `torch.export` cannot trace, with the reason.
    """
    size = as_size(size)
    model = copy.deepcopy(uncompiled(model)).eval().requires_grad_(False)
    program = trace(model, example(model, size))
    if any(_writes(node) for node in program.graph.nodes):
        program = program.run_decompositions({})  # the same operations without writing in place
    graph = program.module(check_guards=False)
    fold_constants(graph)
    graph.graph._tracer_cls = None  # that of the export, with which a graph is written but cannot be read
    return Frozen(fx.GraphModule(graph, graph.graph), size).eval()


def as_size(size: int | Size) -> Size:
    """(height, width) as numbers of Python; one number is a square."""
    height, width = size if isinstance(size, Sequence) else (size, size)
    return operator.index(height), operator.index(width)


# --- tracing ---------------------------------------------------------------------------------------------------------


def trace(model: nn.Module, images: Tensor, step: Size | None = None) -> ExportedProgram:
    """The graph of a model for any number of images of that size; with `step`, for any size in such steps, from two on.

    Raises ValueError where the model does not take images of that size, or of any size, with the first line of the reason.
    """
    shapes: dict[int, Any] = {0: Dim("batch")}
    if step is not None:
        shapes |= {2: step[0] * Dim("rows", min=2), 3: step[1] * Dim("columns", min=2)}
    try:
        with torch.no_grad():
            model(images)  # a size that is refused is refused at once, and in the words of the model
            program = torch.export.export(model, (images,), dynamic_shapes=(shapes,))
    except Exception as error:
        raise ValueError(_cannot_trace(model, images, step, error)) from error
    _check_open(program, model, shapes)
    return program


def _cannot_trace(model: nn.Module, images: Tensor, step: Size | None, error: Exception) -> str:
    lines = (" ".join(line.split()) for line in str(error).splitlines())
    reason = next((line for line in lines if line), type(error).__name__)
    size = f"{images.shape[-2]}x{images.shape[-1]} pixels" if step is None else "any size; give one size"
    return f"{type(model).__name__} cannot be traced for images of {size}: {reason}"


def _check_open(program: ExportedProgram, model: nn.Module, shapes: dict[int, Any]) -> None:
    """Raises ValueError if a dimension that should stay open became a number in the graph."""
    names = program.graph_signature.user_inputs
    images = next(node for node in program.graph.nodes if node.op == "placeholder" and node.name in names)
    shape = images.meta["val"].shape
    fixed = [dim for dim in shapes if isinstance(shape[dim], int) or shape[dim].node.maybe_as_int() is not None]
    if fixed:
        what = ", ".join({0: "number", 2: "height", 3: "width"}[dim] for dim in fixed)
        raise ValueError(f"{type(model).__name__} fixes the {what} of its images when it is traced; give one size")


def patch_projection(model: nn.Module) -> nn.Conv2d:
    """The first convolution of a model. Raises ValueError if it has none."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module
    raise ValueError(f"this is for models that cut images into patches by a convolution; {type(model).__name__} has none")


def example(model: nn.Module, size: Size, batch: int = 2, seed: int = 0) -> Float[Tensor, "batch channels height width"]:
    """Random images as a model takes them."""
    projection = patch_projection(model)
    images = torch.randn(batch, projection.in_channels, *size, generator=torch.Generator().manual_seed(seed), device="cpu")
    return images.to(projection.weight)


# --- folding ---------------------------------------------------------------------------------------------------------


def fold_constants(module: fx.GraphModule) -> None:
    """Replaces what does not depend on the inputs of a graph by buffers `constant_N`, in place; equal ones are kept once.

    A mere view of a parameter stays as it is: a copy would save nothing.
    """
    known = _known_values(module)
    parameters = {v.untyped_storage().data_ptr() for n, v in known.items() if n.op == "get_attr" and isinstance(v, Tensor)}
    constants: list[Tensor] = []
    for node, value in known.items():
        read_outside = any(user not in known for user in node.users)
        if node.op != "call_function" or not isinstance(value, Tensor) or not read_outside:
            continue
        if value.untyped_storage().data_ptr() in parameters:
            continue
        with module.graph.inserting_before(node):
            constant = module.graph.get_attr(_store(module, constants, value))
        constant.meta = dict(node.meta)
        node.replace_all_uses_with(constant, delete_user_cb=lambda user: user not in known)
    for node, value in known.items():
        if value is None and not node.users:  # an assertion about constants, which held just now
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()


def _known_values(module: fx.GraphModule) -> dict[fx.Node, Any]:
    """The values of all nodes that no input reaches, in the order of the graph."""
    known: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in module.graph.nodes:
            if node.op == "get_attr":
                value = operator.attrgetter(node.target)(module)
                if isinstance(value, Tensor):
                    known[node] = value.detach()
            elif node.op == "call_function" and all(n in known for n in node.all_input_nodes) and not _is_random(node):
                arguments, keywords = fx.map_arg((node.args, node.kwargs), lambda n: known[n])
                known[node] = cast("Callable", node.target)(*arguments, **keywords)
    return known


def _store(module: fx.GraphModule, constants: list[Tensor], value: Tensor) -> str:
    """The name of the buffer that holds the value."""
    for number, other in enumerate(constants):
        if other.dtype == value.dtype and torch.equal(other, value):
            return f"constant_{number}"
    constants.append(value.contiguous())
    module.register_buffer(f"constant_{len(constants) - 1}", constants[-1])
    return f"constant_{len(constants) - 1}"


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable
