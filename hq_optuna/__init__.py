"""Find how many bits each layer of a trained PyTorch network needs, under a compute-cost budget."""
from hq_optuna._version import __version__
__all__ = ["__version__"]
