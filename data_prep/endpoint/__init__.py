"""One client for OpenAI-compatible chat endpoints, of whatever trustworthiness: rating, reasoning traces, judging.

`run_jobs` is the door. Nothing of a sample, a reply or the key ever stands in a log or an error of this room.
"""

from __future__ import annotations

from data_prep.endpoint.account import BudgetReached
from data_prep.endpoint.client import CallFailed, ChatClient
from data_prep.endpoint.jobs import Job, check_sources, run_jobs
from data_prep.endpoint.messages import Message, parts, speech
from data_prep.endpoint.replies import Reply
from data_prep.endpoint.settings import Budget, Endpoint

__all__ = [
    "Budget",
    "BudgetReached",
    "CallFailed",
    "ChatClient",
    "Endpoint",
    "Job",
    "Message",
    "Reply",
    "check_sources",
    "parts",
    "run_jobs",
    "speech",
]
