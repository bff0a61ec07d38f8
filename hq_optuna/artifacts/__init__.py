"""Files of a study that are too large for its database, addressed by the hash of their content."""

from hq_optuna.artifacts.store import Artifacts, Reference, attach, attached, open_artifacts

__all__ = ["Artifacts", "Reference", "attach", "attached", "open_artifacts"]
