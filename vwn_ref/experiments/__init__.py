"""Training, sweeps and figures; these need more packages than the model does, see `PACKAGES`."""

import sys
from importlib.util import find_spec

# What the extra "experiments" of pyproject.toml installs.
PACKAGES = (
    "datasets", "filelock", "platformdirs", "pyarrow", "tokenizers", "safetensors", "tqdm", "tyro", "scipy",
    "matplotlib",
)  # fmt: skip

if sys.argv[:1] == ["-m"]:  # as a command, `python -m vwn_ref.experiments.train`: Python has only begun to look for it
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"vwn_ref.experiments needs {', '.join(missing)}, not installed here: in the clone, "
            '`pip install ".[experiments]"` installs what is missing'
        )
