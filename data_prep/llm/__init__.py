"""One client for OpenAI-compatible chat endpoints, trusted or not; `quality` and `reflection` are the steps that ask.

`run_jobs` is the entry. Nothing of a sample, a reply or the key ever stands in a log or an error of this room.
"""

from __future__ import annotations

import importlib.util

from infimed_jax.errors import UserError

if not importlib.util.find_spec("openai"):
    raise UserError("asking a language model needs the openai package: pip install 'infimed-jax[llm]'")

from data_prep.llm.account import BudgetReached
from data_prep.llm.client import BY_ENDPOINT, CallFailed, ChatClient
from data_prep.llm.jobs import Job, check_sources, run_jobs
from data_prep.llm.messages import Message, parts, speech
from data_prep.llm.replies import Reply
from data_prep.llm.settings import Budget, Endpoint

__all__ = [
    "BY_ENDPOINT",
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
