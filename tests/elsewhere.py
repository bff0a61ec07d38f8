"""Names of workers that are not this process."""

from hq_optuna.protocol import worker_identity

HOST, NAMESPACE, _, START = worker_identity.worker_id().split("/")
DEAD = f"{HOST}/{NAMESPACE}/{2**22 + 1}/{START}"  # above Linux's largest process id
AWAY = f"elsewhere/{NAMESPACE}/1/{START}"
