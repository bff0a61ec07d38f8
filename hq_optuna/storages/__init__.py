"""Opening a storage so that several processes can share it, and errors that hide passwords."""

from hq_optuna.storages.opening import (
    explain_storage_errors,
    load_study,
    open_storage,
    redact_url,
    refuse_read_only,
    refuses_writing,
    sqlite_path,
    sqlite_url,
    storage_exists,
    study_exists,
)
from hq_optuna.storages.retrying import (
    RETRY_FOR_S,
    RetryingStorage,
    explain_errors_of,
    open_retrying,
    pausing,
)

__all__ = [
    "RETRY_FOR_S",
    "RetryingStorage",
    "explain_errors_of",
    "explain_storage_errors",
    "load_study",
    "open_retrying",
    "open_storage",
    "pausing",
    "redact_url",
    "refuse_read_only",
    "refuses_writing",
    "sqlite_path",
    "sqlite_url",
    "storage_exists",
    "study_exists",
]
