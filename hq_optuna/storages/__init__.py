"""Opening a storage so that several processes can share it, and errors that hide passwords."""

from hq_optuna.storages.opening import (
    explain_storage_errors,
    load_study,
    open_storage,
    redact_url,
    sqlite_url,
    study_exists,
)

__all__ = [
    "explain_storage_errors",
    "load_study",
    "open_storage",
    "redact_url",
    "sqlite_url",
    "study_exists",
]
