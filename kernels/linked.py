"""How the gradient of a GHC's projections gets from the `depth` that makes it to the `width` that ran before it.

Both need the coefficients of one GHC: `width` reads with Å, and `depth` of the same sublayer carries on with Â and
writes with B. In a backward pass each makes its own columns of e = rstd · ∂L/∂q, and the gradients of W_α, W_β and gain
are made of Σ H′ᵀ e. Each for itself they would read H′ once more, and launch the kernels for it. So `depth`, whose
backward runs first, hands its e on, and `width` makes the gradients of all columns together. That saves a step's
backward n rows a token.

autograd carries it. Besides x, `width` returns the *link*, a tensor of the shape of `depth`'s e, without numbers (one
NaN, expanded). `depth` takes it as an argument and does nothing with it, but as its gradient it returns e. Who calls
`depth` without a link, or with one that wants no gradient, gets all gradients from `depth` itself.

Two consequences. A link belongs to the state H′ and the parameters that it was made with. And a backward
pass through `depth` alone also runs, and frees, the graph of that `width`.

For eager mode. Under torch.compile and torch.export an operation is a custom operator without a link, and where a
derivative is to be differentiated again, the reference is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from vwn_ref.kernels.operation import Operation, differentiated_again, reference_gradients, tracing


class Link(NamedTuple):
    """What a backward pass has to do with links: whether the depth in it hands e on, and, for the width in it, W_β of
    its GHC and the e that came, or None."""

    hands_on: bool
    W_beta: Tensor | None
    e: Tensor | None


UNLINKED = Link(False, None, None)


def nothing(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of one NaN: where it is read after all, it shows."""
    return torch.full((), float("nan"), dtype=dtype, device=device).expand(shape)


def zeros_for_none(gradients: list[Tensor | None], like: tuple) -> list[Tensor | None]:
    """Zeros for gradients that are missing. A single one may stay None: it is that of a width's x, which nothing read,
    and then only e flows back into that width."""
    if len(gradients) == 1:
        return gradients
    return [torch.zeros(**of) if g is None else g for g, of in zip(gradients, like, strict=True)]


class LinkedOperation:
    """An `Operation`, of which `gradients` is the backward pass, with links in eager mode.

    gradients: (kept inputs, kept outputs, numbers, gradients of the outputs, link=) -> gradients of the kept inputs; e,
        where it hands it on; the gradient of the width's W_β, where an e came. The gradient of an only output may be
        None. The rest as in `Operation`.
    """

    def __init__(
        self, name: str, inputs: str, kept: int, outputs: int, run: Callable, gradients: Callable, shapes: Callable,
        reference: Callable, rest: Callable, kept_outputs: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        self.unlinked = Operation(
            name, inputs, kept, outputs, run, lambda *arguments: gradients(*arguments)[0], shapes, reference, rest,
            kept_outputs=kept_outputs,
        )  # fmt: skip

        class Linked(torch.autograd.Function):
            @staticmethod
            def forward(ctx, link, W_beta, made, *arguments):
                found = run(*arguments)
                found = (found,) if isinstance(found, Tensor) else found
                ctx.save_for_backward(W_beta, *arguments[:kept], *(found[i] for i in kept_outputs))
                ctx.numbers = arguments[kept:]
                ctx.hands_on = link is not None
                ctx.like = tuple({"size": y.shape, "dtype": y.dtype, "device": y.device} for y in found)
                ctx.set_materialize_grads(False)  # no e is not an e of zeros
                return *found, None if made is None else nothing(found[0].device, *made)

            @staticmethod
            def backward(ctx, *of_outputs):
                W_beta, *saved = ctx.saved_tensors
                *of_outputs, e = of_outputs
                if e is None and all(g is None for g in of_outputs):  # that a node after this one returned
                    return (None,) * (3 + kept + len(rest()))
                of_outputs = zeros_for_none(of_outputs, ctx.like)
                of_link = of_W_beta = None
                if not differentiated_again(of_outputs):
                    link = Link(ctx.hands_on, W_beta, None if e is None else e.contiguous())
                    found, of_link, of_W_beta = gradients(*saved, *ctx.numbers, *of_outputs, link=link)
                elif of_outputs[0] is None:  # and no e: where a derivative is differentiated, none is handed on
                    found = (None,) * kept
                else:
                    found = reference_gradients(lambda *t: reference(*t, *ctx.numbers), saved[:kept], of_outputs)
                return of_link, of_W_beta, None, *found, *rest(*of_outputs)

        self.linked = Linked.apply

    def __call__(self, *arguments, link: Tensor | None = None, W_beta: Tensor | None = None, made: tuple | None = None):
        """The outputs, and the link of the width in it, or None. link: what the depth in it is given; W_beta and made:
        W_β of the GHC of the width, and shape and dtype of e there, None where it is static."""
        if link is not None and not link.requires_grad:
            link = None
        if not any(isinstance(t, Tensor) and t.requires_grad for t in arguments):
            made = None  # or x would want a gradient for W_β's sake
        if tracing(arguments[0]) or (link is None and made is None) or not torch.is_grad_enabled():
            found = self.unlinked(*arguments)
            return *((found,) if isinstance(found, Tensor) else found), None
        return self.linked(link, None if made is None else W_beta, made, *arguments)
