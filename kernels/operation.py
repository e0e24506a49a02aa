"""A raw operation and its gradient, made differentiable: for eager mode, and for torch.compile and torch.export.

In eager mode an operation is a `torch.autograd.Function`, which costs less Python a call than a custom operator; under
`torch.compile` and `torch.export` it is the custom operator `torch.ops.vwn_ref.ghc_<name>`, one opaque node in the
graph. Both run the same two functions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad


class Operation:
    """A differentiable operation made of `run` and `run_backward`.

    Args:
        name: it is `torch.ops.vwn_ref.ghc_<name>`, and its gradient ghc_<name>_backward.
        inputs: the schema's inputs, tensors (some may be `Tensor?`) before numbers.
        kept: the first `kept` inputs are read by the backward pass; they are tensors.
        outputs: how many tensors come out; `kept_outputs` of them, by index, are read by the backward pass.
        run: (inputs) -> outputs.
        run_backward: (kept inputs, kept outputs, numbers, gradients of the outputs) -> gradients of the kept inputs;
            None for an input that is None.
        shapes: (inputs) -> shapes of the outputs. They have the dtype of the first input.
        reference: (kept inputs, numbers) -> outputs, differentiable as often as wanted; used for second derivatives and
            for gradients in batches.
        rest: (gradients of the outputs) -> gradients of the inputs that are not kept.
        device_types: as in `torch.library.custom_op`.
    """

    def __init__(
        self, name: str, inputs: str, kept: int, outputs: int, run: Callable, run_backward: Callable, shapes: Callable,
        reference: Callable, rest: Callable, device_types: str | None = None, kept_outputs: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        parts = inputs.split(", ")
        numbers = [x for x in parts if not x.startswith("Tensor")]
        saved_outputs = [f"Tensor y{i}" for i in kept_outputs]
        gradients = [f"Tensor g{i}" for i in range(outputs)]
        backward_inputs = ", ".join([*parts[:kept], *saved_outputs, *numbers, *gradients])

        def gradients_of(ctx, gradients, run_backward):
            saved = ctx.saved_tensors
            tensors = saved[:kept]
            if differentiated_again(gradients):
                found = reference_gradients(lambda *t: reference(*t, *ctx.numbers), tensors, gradients)
            else:
                found = run_backward(*saved, *ctx.numbers, *gradients)
                found = (None if t is None else g for t, g in zip(tensors, found, strict=True))  # traced: not None
            return *found, *rest(*gradients)

        def setup_context(ctx, inputs, output):
            output = (output,) if isinstance(output, Tensor) else output
            ctx.save_for_backward(*inputs[:kept], *(output[i] for i in kept_outputs))
            ctx.numbers = tuple(x for x in inputs[kept:] if not isinstance(x, Tensor))

        class Eager(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *arguments):
                output = run(*arguments)
                setup_context(ctx, arguments, output)
                return output

            @staticmethod
            def backward(ctx, *gradients):
                return gradients_of(ctx, gradients, run_backward)

        def operator(name, run, inputs, returned, shapes, like=0):
            returned = "Tensor" if returned == 1 else f"({', '.join(['Tensor'] * returned)})"
            made = torch.library.custom_op(
                f"vwn_ref::ghc_{name}",
                run,
                mutates_args=(),
                device_types=device_types,
                schema=f"({inputs}) -> {returned}",
            )

            @made.register_fake
            def _(*arguments):
                found = tuple(
                    arguments[0].new_empty(0)
                    if shape is None
                    else arguments[i if like is None else like].new_empty(shape)
                    for i, shape in enumerate(shapes(*arguments))
                )
                return found if len(found) > 1 else found[0]

            return made

        def run_backward_whole(*arguments):
            """An operator returns tensors: an empty one for None."""
            return tuple(arguments[0].new_empty(0) if g is None else g for g in run_backward(*arguments))

        self.eager = Eager.apply
        self.traced = operator(name, run, inputs, outputs, shapes)
        self.traced_backward = operator(
            f"{name}_backward",
            run_backward_whole,
            backward_inputs,
            kept,
            lambda *t: [None if x is None else x.shape for x in t[:kept]],
            like=None,
        )
        self.traced.register_autograd(
            lambda ctx, *gradients: gradients_of(ctx, gradients, self.traced_backward), setup_context=setup_context
        )

    def __call__(self, *arguments):
        return (self.traced if tracing(arguments[0]) else self.eager)(*arguments)


def differentiated_again(gradients: tuple) -> bool:
    """Whether a backward pass with these gradients is for PyTorch alone: one that is differentiated itself
    (create_graph=True), or many at once (is_grads_batched=True, the vectorised jacobian and hessian)."""
    kinds = torch._C._functorch.is_legacy_batchedtensor, torch._C._functorch.is_functorch_wrapped_tensor
    return torch.is_grad_enabled() or any(is_one(g) for g in gradients if g is not None for is_one in kinds)


def reference_gradients(function: Callable, inputs: tuple, gradients: tuple) -> tuple:
    """Gradients by differentiating the reference, so that they can be differentiated again.

    With respect to views of the inputs: an input may depend on another one, or be the same tensor, and what flows from
    one to the other is not this operation's. In the widest of their dtypes, since the reference does not mix them.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = tuple(None if t is None else t.view_as(t) for t in inputs)
        wide = functools.reduce(torch.promote_types, (t.dtype for t in inputs if t is not None))
        outputs = function(*(None if t is None else t.to(wide) for t in inputs))
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        pairs = [(y.to(g.dtype), g) for y, g in zip(outputs, gradients, strict=True) if y.requires_grad]
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    if not pairs:  # only an input that is not kept wants one
        return (None,) * len(inputs)
    outputs, gradients = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=again, materialize_grads=True))
    return tuple(next(found) if t is not None and t.requires_grad else None for t in inputs)


def tracing(t: Tensor) -> bool:
    """Under torch.compile or torch.export, where an autograd.Function would be looked into, and under a
    TorchDispatchMode (make_fx), which would see its allocations and not what is written into them."""
    return (
        torch.compiler.is_compiling()
        or type(t) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
    )


@torch.compiler.assume_constant_result  # called as it is where torch.compile traces: traced, it would always be True
def transformed() -> bool:
    """Inside a transform of `torch.func` or forward-mode AD, compiled or not: the operations have rules for neither."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def check_shape(name: str, t: Tensor, shape: tuple, meaning: str) -> None:
    """Raise ValueError unless `t` has that shape."""
    if t.shape != shape:
        raise ValueError(f"{name} has shape {tuple(t.shape)}: must be {meaning} = {list(shape)}")
