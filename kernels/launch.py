"""How the Triton kernels are started: block sizes, numbers of programs, and the memory that they share.

Which kernel runs for a shape, `family` decides: those of few.py where a token's rows fit the registers, of bfloat16
else those of many.py, and else those that walk along d_b several tokens at a time. Those of last.py know no slots, only
groups.
"""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton import next_power_of_2
from vwn_ref.kernels import depth, few, last, many, step, width
from vwn_ref.kernels.finish import (
    coefficients_gradient_kernel,
    norm_gradient_kernel,
    projections_gradient_kernel,
)  # fmt: skip
from vwn_ref.kernels.projections import projections_kernel
from vwn_ref.kernels.tiles import LEAST_SUM
from vwn_ref.kernels.weights import weights_kernel

INTERPRETED = type(weights_kernel).__name__ == "InterpretedFunction"
TUNED = "sm_90"  # the target whose kernels were timed
AHEAD = not INTERPRETED  # whether programs may reach for what they want next: see `vwn_ref.kernels.rows.touch`
KERNELS = {  # by name, without _kernel: those that work on tokens
    name.removesuffix("_kernel"): kernel
    for module in (depth, few, last, many, step, width)
    for name, kernel in vars(module).items()
    if name.endswith("_kernel")
}


class Tile(NamedTuple):
    """Block sizes of a launch: see `vwn_ref.kernels.tiles`."""

    BT: int
    BD: int
    num_warps: int
    num_stages: int = 3  # Triton's own: loads of the next two chunks are under way; 1 holds fewer registers


def is_many(n: int) -> bool:
    """More than 4 slots: whether the sums over slots of the kernels that walk go to the tensor cores, see
    `vwn_ref.kernels.tiles`. (Those of many.py do for fewer, too.)"""
    return n > 4


def whole_rows(m: int, n: int, d: int, bits: int, backward: bool = True) -> int:
    """Warps that hold a token's rows, whole, in their registers: see `vwn_ref.kernels.few`. 0 where nothing does, and
    the other kernels walk along d_b.

    A warp takes 512 columns, 16 for each thread, or half of that: backward where 2n + m rows would spill, forward for
    4 slots, since fewer than 16 warps would be on a multiprocessor.
    """
    if is_many(n) or m > 4:
        return 0
    wide = 2 * n + m <= (8 if bits == 16 else 6) if backward else n <= 3
    warps = max(1, next_power_of_2(d) // (512 if wide else 256))
    return warps if warps <= 8 and (backward or whole_rows(m, n, d, bits)) else 0


def family(kernel: str, m: int, n: int, d: int, dtype: torch.dtype) -> str:
    """What stands before the name of the kernel that is launched: few_ (up to 4 slots, unless rows are too long), many_
    (all others of bfloat16), or nothing."""
    prefix = "few_" if whole_rows(m, n, d, 8 * dtype.itemsize) else "many_" if dtype == torch.bfloat16 else ""
    return prefix if prefix + kernel in KERNELS else ""


def many_tile(kernel: str, n: int, d: int, target: str) -> Tile:
    """For many.py: tokens of a tile, columns of d_b, and a warp for each 16 rows, as tensor cores take them. Nothing is
    loaded ahead. By time on an H200 (NOTES.md) 128 columns are the better choice more often than not, even where some
    registers spill. Fewer where nothing was timed, on other targets and in some kernels of up to 4 slots, where 128
    spill far more, and in step_backward of up to 4 slots, which was slower."""
    per = 16 // max(2, next_power_of_2(n)) if n <= 8 else 1
    wide = target == TUNED and (is_many(n) or (n > 2 and kernel == "many_step_kernel"))
    most = 32 if n <= 2 else 128 if wide else 64
    columns = 32 if INTERPRETED else most
    return Tile(per, max(16, min(columns, next_power_of_2(d))), max(1, next_power_of_2(n) // 16), 1)


def many_registers(kernel: str, n: int, d: int, target: str) -> int:
    """How many a thread may have there: fewer let more programs on a multiprocessor. 0 for no limit but the
    hardware's: with one, step_backward was slower. A step of 5 to 8 slots was 12 % faster with 128 than with 168 at
    D = 4096, and 6 % at 1024, where it would spill more; one of 64 slots 5 % slower at 1024 and 5 % faster at 4096."""
    if INTERPRETED or target != TUNED or kernel.endswith("backward_kernel"):
        return 0
    return 128 if 8 < n <= 16 or (4 < n <= 8 and d >= 512 and kernel == "many_step_kernel") else 168


def few_registers(kernel: str, m: int, n: int, warps: int, bits: int, target: str) -> int:
    """The same for few.py. At (1, 4), D = 1024, step_backward has no more than 168 by itself: to say so lets twelve
    warps share the tokens. (Another form of it, of which as many ran at once, was 13 % faster; as it is launched it has
    not been timed.)"""
    timed = not INTERPRETED and target == TUNED and bits == 16
    return 168 if timed and kernel == "few_step_backward_kernel" and (m, n, warps) == (1, 4, 4) else 0


def tile(kernel: str, m: int, n: int, d: int, bits: int) -> Tile:
    """One good choice a kernel, the same for every number of tokens, among those that `vwn_ref.kernels.aot` compiles
    without spilling registers. Which is fastest, `vwn_ref.kernels.tune` says where there is a GPU.

    As a rule one warp a program, so that no warp waits for another, and several tokens, so that one load of the
    projections serves them all. More than 16 slots: four or more warps, which share a token's matrix products.
    """
    if INTERPRETED:  # every operation of every program costs the same there: few programs, and more than one chunk
        tile = Tile(8 if n <= 8 else 4, 32, 1)
    else:
        name = kernel.removesuffix("_kernel")
        tile = _TILES[name if (name, bits) in _TILES else "forward", bits][_kind(n)]
    most = next_power_of_2(d)
    if n > 16 and kernel.endswith("backward_kernel"):
        most //= 2  # a single chunk is no loop: the compiler loads all matrices at once, and spills
    elif n > 16 and d > 256:
        most = 64  # chunks of 128 are worth it for short rows; two of them do not fit an AMD GPU's shared memory
    return tile._replace(BD=max(16, min(tile.BD, most)))


def _kind(n: int) -> int:
    return 0 if not is_many(n) else 1 if n <= 8 else 2 if n <= 16 else 3


# (kernel, bits of the state: 16 is float16) -> for n ≤ 4, n ≤ 8, n ≤ 16, more. Tiles that do not spill on an H100 and
# load at least a chunk ahead, where there is one that does both; of these, those with the fewest instructions a token.
_TILES = {
    ("width", 16): (Tile(4, 64, 1), Tile(2, 64, 1, 2), Tile(2, 64, 1, 2), Tile(1, 128, 4, 2)),
    ("depth", 16): (Tile(4, 64, 1), Tile(2, 64, 1, 2), Tile(2, 64, 1, 3), Tile(1, 128, 4, 2)),
    ("step", 16): (Tile(4, 32, 1), Tile(2, 64, 1, 2), Tile(2, 64, 1, 2), Tile(1, 128, 4, 2)),
    ("forward", 32): (Tile(4, 32, 1), Tile(2, 32, 1), Tile(1, 32, 1), Tile(1, 32, 4)),
    ("width_backward", 16): (Tile(2, 32, 1), Tile(2, 32, 1, 2), Tile(2, 32, 1, 2), Tile(1, 64, 4, 2)),
    ("width_backward", 32): (Tile(2, 16, 1), Tile(2, 16, 1), Tile(1, 32, 1), Tile(1, 32, 4)),
    ("depth_backward", 16): (Tile(1, 64, 1), Tile(2, 32, 1, 2), Tile(2, 32, 2), Tile(1, 64, 8, 2)),
    ("depth_backward", 32): (Tile(1, 32, 1), Tile(2, 16, 1), Tile(1, 16, 2, 1), Tile(1, 16, 8)),
    ("step_backward", 16): (Tile(1, 32, 1), Tile(2, 32, 1, 2), Tile(1, 32, 1), Tile(1, 32, 8)),
    ("step_backward", 32): (Tile(1, 32, 1), Tile(1, 32, 1), Tile(1, 32, 1), Tile(1, 32, 8)),
}
if LEAST_SUM > 8:  # Triton before 3.8: a sum over 8 slots takes two tokens a program, or 16 slots' registers
    _TILES["step", 16] = (Tile(4, 32, 1), Tile(2, 32, 1), Tile(1, 64, 1), Tile(1, 64, 4))
    _TILES["step_backward", 16] = (Tile(1, 32, 1), Tile(2, 16, 1), Tile(1, 32, 1), Tile(1, 32, 8))


@functools.cache
def programs(device: torch.device, each: int) -> int:
    """How many programs share the tokens where a program takes several blocks, `each` on every multiprocessor."""
    if device.type == "cpu":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count * each


def fuses_step_backward(m: int, n: int, d: int, dtype: torch.dtype) -> bool:
    """Whether a step's backward is one kernel. Else it is two, of width and of depth, and moves 2n more rows a token:
    with the walks of float32, and of float16 for many slots, one kernel would spill, or take 16 columns at a time."""
    return INTERPRETED or family("step_backward", m, n, d, dtype) != "" or (n <= 8 and dtype.itemsize == 2)


LONGEST_GROUP = 8192  # numbers that a program has in its registers, whole: 16 a thread, of 16 warps


def group_sizes(m: int, n: int, d: int) -> dict:
    """For last.py: D is all that a group has, m d_b numbers. A longer one is taken in chunks of half the longest, 8
    numbers a thread."""
    D, BD = m * d, max(32, next_power_of_2(m * d))
    BD, of_warp = (BD, 512) if BD <= LONGEST_GROUP else (LONGEST_GROUP // 2, 256)
    return {"R": n // m, "D": D, "BD": BD, "num_warps": max(1, BD // of_warp)}


@functools.cache
def target_of(device: torch.device) -> str:
    """As `vwn_ref.kernels.aot` names them: sm_90."""
    if torch.version.hip or device.type == "cpu":
        return "hip" if torch.version.hip else TUNED
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def sizes(kernel: str, m: int, n: int, d: int, dtype: torch.dtype, target: str = TUNED) -> dict:
    """The compile-time arguments that kernels have, and num_warps and num_stages; see `weight_sizes` for the others."""
    if kernel.startswith("group_norm"):
        return group_sizes(m, n, d)
    if kernel.startswith("few_"):
        backward = kernel.endswith("backward_kernel")
        warps = whole_rows(m, n, d, 8 * dtype.itemsize, backward)
        registers = few_registers(kernel, m, n, warps, 8 * dtype.itemsize, target)
        # by time on an H200: `depth_backward` gains up to 28 %, a step of four warps loses 2 %
        ahead = AHEAD and dtype.itemsize == 2 and ("step" not in kernel or warps <= 2)
        found = {"M": m, "N": n, "D": d, "BD": max(32, next_power_of_2(d)), "num_warps": warps}
        found |= {"maxnreg": registers} if registers else {}
        return found | ({"AHEAD": ahead} if backward else {})
    if kernel.startswith("many_"):
        PER, BD, num_warps, num_stages = many_tile(kernel, n, d, target)
        reads = "width" in kernel or "step" in kernel
        exact = {"PREC": precision(torch.float32)} if reads else {}  # of the product with H′ H′ᵀ, which has to be
        exact |= {"GRAM": n <= 32} if reads and not kernel.endswith("backward_kernel") else {}
        registers = many_registers(kernel, n, d, target)
        exact |= {"maxnreg": registers} if registers else {}
        return exact | {
            "M": m, "N": n, "D": d, "PER": PER, "BD": BD, "num_warps": num_warps, "num_stages": num_stages,
            "MP": max(16, PER * next_power_of_2(m)), "NP": max(16, next_power_of_2(n)),
        }  # fmt: skip
    BT, BD, num_warps, num_stages = tile(kernel, m, n, d, 8 * dtype.itemsize)
    many, MP, NP = is_many(n), next_power_of_2(m), next_power_of_2(n)
    least = (8 if BT > 1 else LEAST_SUM) if many else 1  # what a sum on the tensor cores is padded to
    fusion = {} if many else {"enable_fp_fusion": False}  # see `projections_gradient_sizes`
    return fusion | {
        "M": m, "N": n, "D": d, "BT": BT, "BD": BD, "MANY": many, "PREC": precision(dtype), "num_warps": num_warps,
        "num_stages": num_stages,
        "MP": max(least, MP), "NP": max(least, NP),
    }  # fmt: skip


def precision(dtype: torch.dtype) -> str:
    """How `tl.dot` treats float32 for states of a dtype: see `vwn_ref.kernels.tiles`."""
    if INTERPRETED or torch.version.hip:
        return "ieee"
    return "tf32x3" if dtype == torch.float32 else "tf32"


class Stretch(NamedTuple):
    """Of `weights_kernel`: rows and columns of d_b that a program takes a turn, and how many such programs a
    multiprocessor holds at once, by their shared memory."""

    BR: int
    BD: int
    num_warps: int
    num_stages: int
    each: int


# States of bfloat16, for n ≤ 4, n ≤ 8, n ≤ 16, more. For every BD columns e is loaded again, taken apart, and handed
# from thread to thread, so 64 columns would be few. A multiprocessor has some hundred kB of loads under way. All
# programs run at the same time; more of them would leave more sums.
_STRETCHES = (
    Stretch(64, 256, 8, 3, 2), Stretch(64, 128, 4, 4, 2), Stretch(64, 128, 4, 4, 2), Stretch(64, 128, 8, 4, 1)
)  # fmt: skip


def stretch(m: int, n: int, d: int, columns: int, dtype: torch.dtype) -> Stretch:
    """For so many columns of e."""
    KP = next_power_of_2(columns)
    if INTERPRETED:
        chosen = Stretch(64, 32, 1, 1, 1)
    elif dtype != torch.bfloat16:  # 64 rows of float32 would not fit an AMD GPU's shared memory
        chosen = Stretch(64 if KP < 128 else 32, 64, 4 if m + n <= 64 else 8, 3, 3)
    elif KP * e_dtype(m, n, dtype).itemsize > 256:  # or sums and e would not fit the registers
        chosen = Stretch(32, 64, 8, 2, 2)
    else:
        chosen = _STRETCHES[_kind(n)]
    return chosen._replace(BD=max(16, min(chosen.BD, next_power_of_2(d))))


def weight_sizes(
    m: int, n: int, d: int, read: int, write: int, dtype: torch.dtype, target: str = TUNED
) -> dict:  # fmt: skip
    """The compile-time arguments of `weights_kernel`, for so many columns of a width and of a depth, and num_warps and
    num_stages. AMD's GPUs have shared memory for one stretch ahead."""
    split, chosen = dtype == torch.bfloat16, stretch(m, n, d, read + write, dtype)
    if not target.startswith("sm_"):
        chosen = chosen._replace(num_stages=min(chosen.num_stages, 2))
    least = 8 if split and LEAST_SUM == 8 else 16  # an older Triton has no such product for Hopper's warp groups
    return {
        "D": d, "READ": read, "WRITE": write, "KP": max(least, next_power_of_2(read + write)), "BR": chosen.BR,
        "BD": chosen.BD, "num_warps": chosen.num_warps, "num_stages": chosen.num_stages,
        "PREC": "bf16" if split else precision(dtype),
    }  # fmt: skip


def weight_splits(device: torch.device, rows: int, m: int, n: int, d: int, columns: int, dtype: torch.dtype) -> int:
    """S of weights.py: as many programs as run at once, but no more than there are stretches of rows."""
    chosen = stretch(m, n, d, columns, dtype)
    at_once = programs(device, chosen.each) // (1 if device.type == "cpu" else triton.cdiv(d, chosen.BD))
    return min(triton.cdiv(rows, chosen.BR), max(1, at_once))


def e_dtype(m: int, n: int, dtype: torch.dtype) -> torch.dtype:
    """What e = rstd · ∂L/∂q is kept in. With many slots it is a good part of what a backward pass moves, in float32 a
    tenth to a third at (8, 64); there it is rounded to bfloat16 as the state's gradients are. float16 has too small a
    range for it, and an odd number of columns would not be loaded ahead."""
    return dtype if n > 8 and n % 2 == m % 2 == 0 and dtype == torch.bfloat16 else torch.float32


def coefficients_gradient_sizes(m: int, n: int) -> dict:
    """Some hundred programs where there are that many elements: the loads of one multiprocessor would be waited for.
    Up to 16 neighbours lie together; four thousand numbers, of all partial sums or half of them, are read a turn."""
    BE = min(16, 1 << max(0, (n * (n + m) // 48).bit_length() - 1)) if not INTERPRETED else 512
    return {"BE": BE, "BP": 4096 // BE, "num_warps": 8}


def norm_gradient_sizes(kernel: str, m: int, n: int, d: int, dtype: torch.dtype) -> dict:
    """For the sums that this kernel leaves, whose rows have BD places for d_b columns. A program for 8 columns or 16,
    with the 32 or 64 bytes of a row that come from memory together at the least; eight thousand numbers a turn."""
    few = kernel.startswith("few_")
    BD = sizes(kernel, m, n, d, dtype)["BD"] if few else d
    BC = 8 if m * BD <= 1024 else 16
    return {
        "M": m, "D": d, "BD": BD, "PIECES": 4 // dtype.itemsize if few else 1, "BC": BC, "BP": 8192 // BC,
        "num_warps": 8,
    }  # fmt: skip


def projections_gradient_sizes(m: int, n: int) -> dict:
    """Tiles of some four thousand numbers, and not too few programs, so that none takes many turns.

    Threads that add up a row each hold a copy of the sum. Where each has one product of it, the compiler would make
    that product and the first addition one operation, rounded once, where the neighbour's product is rounded by itself:
    then the copies differ in their last bit, and which of them is stored is the hardware's choice. Hence no such
    operations here, nor in walks for few slots."""
    KP = next_power_of_2(n + 2 * m)
    BD = 32 if INTERPRETED else 1 if KP > 32 else 32 // KP * 4
    return {"KP": KP, "BD": BD, "BS": max(1, 4096 // (KP * BD)), "enable_fp_fusion": False}


# Multiply-and-add as one instruction, said at every launch, since Triton means to change its default: without it there
# are up to a third more instructions. What `sizes` says itself goes before. aot.py compiles so by the environment.
FUSED = {"enable_fp_fusion": True}
PROJECTIONS = {"BD": 128, "num_warps": 4}  # of `projections_kernel`: columns of d_b that a program takes


class Launch:
    """A state H [..., n, d_b] as the kernels see it, and what belongs to starting them."""

    def __init__(self, H: Tensor, m: int, dynamic: bool) -> None:
        self.n, self.d = H.shape[-2:]
        self.m, self.dynamic = m, dynamic
        self.T = H.numel() // (self.n * self.d)
        self.device = H.device
        self.dtype = H.dtype
        self._kernels: dict = {}
        self._sizes: dict[str, dict] = {}

    def kernel(self, name: str):
        """The kernel that is launched for "width", "width_backward" …"""
        if name not in self._kernels:
            self._kernels[name] = KERNELS[family(name, self.m, self.n, self.d, self.dtype) + name]
        return self._kernels[name]

    def sizes(self, name: str) -> dict:
        if name not in self._sizes:  # asked for half a dozen times
            kernel = self.kernel(name).__name__
            self._sizes[name] = sizes(kernel, self.m, self.n, self.d, self.dtype, target_of(self.device))
        return self._sizes[name]

    def programs(self, name: str) -> int:
        """How many programs share the tokens (those of a group, where a program has one), and leave a partial sum each,
        in a backward pass; no more than tokens. (Where a block has several tokens some get none, and leave zeros.)
        Eight warps are all that fit a multiprocessor with 255 registers a thread, twelve with 168; those of last.py
        take half of 255."""
        most = self.sizes(name).get("maxnreg", 128 if name == "group_norm_backward" else 255)
        return self._share(name, 2048 // most)

    def _share(self, name: str, warps: int) -> int:
        """So many that a multiprocessor has that many warps, those of all groups together; one of each at least."""
        chosen = self.sizes(name)
        return min(self.T, programs(self.device, max(1, warps // (chosen["num_warps"] * chosen.get("R", 1)))))

    def at_once(self, name: str) -> int:
        """How many tokens have their sums apart: those of all programs, of which one may have several in a tile."""
        return max(self.programs(name), 1) * self.sizes(name).get("PER", 1)

    def on_device(self):
        """Triton launches on the current device."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def start(self, name: str, *arguments, **more) -> None:
        """Run one program for each block of tokens, or `programs` of them that share the tokens. For an absent tensor
        another stands in, which no kernel touches."""
        if not self.T:
            return
        kernel, chosen = self.kernel(name), self.sizes(name)
        if name.endswith("backward"):
            count = self.programs(name)
        elif "BT" in chosen:
            count = triton.cdiv(self.T, chosen["BT"])
        elif kernel.__name__.startswith("few_") and self.n <= 3:  # whatever their warps, as was faster there
            count = min(self.T, programs(self.device, 64))
        else:  # several times what fits: then it matters little how many programs do
            count = self._share(name, 64)
        arguments = [arguments[0] if a is None else a for a in arguments]
        if "R" not in chosen:
            more["DYNAMIC"] = self.dynamic
        with self.on_device():
            kernel[(count * chosen.get("R", 1),)](*arguments, **(FUSED | chosen), **more)

    def projections(self, name: str, depth: tuple = (), width: tuple = ()) -> Tensor | None:
        """V of projections.py for that kernel, from (W_alpha, W_beta, gain) of a depth, (W_alpha, gain) of a width, or
        both; None where the GHC is static."""
        if not self.dynamic or not self.T:
            return None
        rows = (self.n + self.m if depth else 0) + (self.m if width else 0)
        dtype = torch.bfloat16 if self.kernel(name).__name__.startswith("many_") else torch.float32
        V = torch.empty(rows, self.d, dtype=dtype, device=self.device)
        arguments = (*(depth or (V, V, V)), *(width or (V, V)), V)
        with self.on_device():
            projections_kernel[(triton.cdiv(self.d, PROJECTIONS["BD"]),)](
                *arguments, M=self.m, N=self.n, D=self.d, DEPTH=bool(depth), WIDTH=bool(width), **FUSED, **PROJECTIONS,
            )  # fmt: skip
        return V

    def norm_partial(self, name: str, norm_gain: Tensor | None) -> Tensor | None:
        """Zeros that the gradient of the next norm's gain is added to, for each program of that kernel: [P, m, d_b], or
        as `add_rows` wants them."""
        if norm_gain is None:
            return None
        columns = self.norm_sizes(name)["BD"]
        return self.zeros(max(self.programs(name), 1), self.m, columns)

    def norm_sizes(self, name: str) -> dict:
        return norm_gradient_sizes(self.kernel(name).__name__, self.m, self.n, self.d, self.dtype)

    def norm_gradient(self, name: str, partial: Tensor | None, like: Tensor | None) -> Tensor | None:
        """Their sum: [D]."""
        if partial is None:
            return None
        found, chosen = torch.empty_like(like), self.norm_sizes(name)
        with self.on_device():
            norm_gradient_kernel[(triton.cdiv(self.m * chosen["BD"], chosen["BC"]),)](
                partial, len(partial), found, **FUSED, **chosen
            )
        return found

    def zeros(self, *shape: int) -> Tensor:
        """float32, for sums."""
        return torch.zeros(shape, dtype=torch.float32, device=self.device)

    def partial(self, name: str, columns: int) -> Tensor:
        """Room for the sums that each program of that kernel leaves (of many.py: for each token of its tile),
        [P, 2, n, columns]. It is zeros for kernels that add to it: those of many.py, and with more than 16 slots the
        walks that have a depth in them. Behind it these park Â of the tokens they are at, see `vwn_ref.kernels.depth`.
        """
        size = own = 2 * self.n * columns
        chosen = self.sizes(name)
        if "BT" in chosen and columns > self.m:
            own = depth.own_size.fn(self.m, self.n, chosen["NP"], chosen["BT"])
        filled = self.dynamic and own == size and not self.kernel(name).__name__.startswith("many_")
        make = torch.empty if self.T and filled else torch.zeros
        whole = make(self.at_once(name), own, dtype=torch.float32, device=self.device)
        return whole[:, :size].unflatten(1, (2, self.n, columns))

    def coefficient_gradients(self, columns: int) -> Tensor:
        """Room for e = rstd · ∂L/∂q: [T, n, columns]."""
        shape = (self.T, self.n, columns) if self.dynamic else (0,)
        return torch.empty(shape, dtype=e_dtype(self.m, self.n, self.dtype), device=self.device)

    def gradients(self, sums: Tensor, A: Tensor, B, S_alpha, S_beta) -> list[Tensor | None]:
        """Gradients of these four from the sums of a depth, [P, 2, n, n+m], or from those of a width, [P, 2, n, m],
        whose B and S_beta are None; None for what is None."""
        make = torch.empty_like if self.T else torch.zeros_like
        found = [None if t is None else make(t) for t in (A, B, S_alpha, S_beta)]
        if self.T:
            blocks = coefficients_gradient_sizes(self.m, self.n)
            with self.on_device():
                coefficients_gradient_kernel[(triton.cdiv(A.numel(), blocks["BE"]), 2 if self.dynamic else 1)](
                    sums, sums.stride(0), len(sums), *(found[0] if t is None else t for t in found), M=self.m, N=self.n,
                    DEPTH=B is not None, **FUSED, **blocks,
                )  # fmt: skip
        return found

    def weight_partial(self, H: Tensor, E_read: Tensor | None, E_write: Tensor | None) -> Tensor:
        """Σ H′ᵀ E over tokens and slots, in S parts: [S, d_b, columns]; those of a width before those of a depth."""
        rows, d = self.T * self.n, self.d
        read, write = (0 if E is None else E.shape[-1] for E in (E_read, E_write))
        constants = weight_sizes(self.m, self.n, d, read, write, H.dtype, target_of(self.device))
        splits = weight_splits(self.device, rows, self.m, self.n, d, read + write, H.dtype)
        partial = torch.empty((splits, d, read + write), dtype=torch.float32, device=self.device)
        with self.on_device():
            weights_kernel[(triton.cdiv(d, constants["BD"]), splits)](
                H, *(H if E is None else E for E in (E_read, E_write)), partial, rows, **FUSED, **constants
            )  # fmt: skip
        return partial

    def weight_gradients(self, H: Tensor, E_read, E_write, W_alpha, W_beta, gain) -> list[Tensor | None]:
        """Gradients of these three, from e of a width, of a depth, or of both; None for W_beta where it is of a width,
        and for all where the GHC is static."""
        if not self.dynamic:
            return [None, None, None]
        whole = self.T and E_read is not None and E_write is not None  # every column is written
        of_alpha = (torch.empty_like if whole else torch.zeros_like)(W_alpha)
        make = torch.empty_like if self.T else torch.zeros_like
        found = [of_alpha, None if E_write is None else make(W_beta), make(gain)]
        if self.T:
            blocks, partial = projections_gradient_sizes(self.m, self.n), self.weight_partial(H, E_read, E_write)
            with self.on_device():
                projections_gradient_kernel[(triton.cdiv(self.d, blocks["BD"]),)](
                    partial, len(partial), *(W_alpha if t is None else t for t in (W_alpha, W_beta, gain, *found)),
                    M=self.m, N=self.n, D=self.d, READ=0 if E_read is None else self.m,
                    WRITE=0 if E_write is None else self.n + self.m, **blocks,
                )  # fmt: skip
        return found
