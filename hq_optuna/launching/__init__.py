"""Many workers of one search: started, watched, restarted, ended together."""

from hq_optuna.launching.crew import Crew, Life, Member
from hq_optuna.launching.process import WorkerCommand, WorkerProcess

__all__ = ["Crew", "Life", "Member", "WorkerCommand", "WorkerProcess"]
