"""Virtual Width Networks (arXiv 2511.11238): a reference implementation.

Reading order, with the paper's equations: `config` · `embedding` (1)-(3) · `ghc` (9), (10), (15), (16) ·
`dynamic` (11)-(14) · `reduce` (4) · `depth` (17) · `backbone` · `stack`, the loop of Algorithm 1 · `mtp` §3.4 ·
`model`, all of it · `cost` §3.5 · `family` §2, §4. `vwn_ref.kernels` has the same operations fused;
`vwn_ref.experiments` trains.
"""

from vwn_ref.config import VWNConfig
from vwn_ref.dynamic import DynamicGHC
from vwn_ref.embedding import OverWidthEmbedding, segments
from vwn_ref.ghc import GHC, parameter_groups
from vwn_ref.model import Losses, VWNTransformer
from vwn_ref.mtp import BlockLinear, MTPHead
from vwn_ref.reduce import Reduce

__all__ = [
    "GHC",
    "BlockLinear",
    "DynamicGHC",
    "Losses",
    "MTPHead",
    "OverWidthEmbedding",
    "Reduce",
    "VWNConfig",
    "VWNTransformer",
    "parameter_groups",
    "segments",
]
__version__ = "0.1.0"
