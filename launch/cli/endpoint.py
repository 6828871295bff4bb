"""The options of every command that calls an OpenAI-compatible endpoint."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from launch.cli.declare import add_fields, build

if TYPE_CHECKING:
    from data_prep.llm.settings import Endpoint

ENDPOINT, BUDGET = (f"data_prep.llm.settings:{kind}" for kind in ("Endpoint", "Budget"))


def add_endpoint(parser: argparse.ArgumentParser, one_of: argparse._MutuallyExclusiveGroup | None = None) -> None:
    """Options of the endpoint; the local one is the default, and an outside one must be named.

    With `one_of`, the endpoint is one choice among others, and always named.
    """
    group = parser.add_argument_group("endpoint")
    default = "" if one_of else " [port 8000 of this machine]"
    (one_of or group).add_argument("--endpoint", metavar="URL", help=f"OpenAI-compatible base address{default}")
    group.add_argument("--model", required=one_of is None, default="", help="the model's name there")
    group.add_argument("--private-endpoint", action="store_true",
                       help="trust a host in a private network; otherwise it counts as outside")  # fmt: skip
    add_fields(group, ENDPOINT, ("key_variable", "concurrency", "timeout", "attempts", "image_side"))
    add_fields(group, BUDGET, ("tokens", "cost"), prefix="budget_")
    add_fields(group, BUDGET, ("prompt_price", "reply_price", "image_tokens"))


def endpoint_of(args: argparse.Namespace, url: str = "", model: str = "") -> Endpoint:
    """The endpoint of the options, or another one of that address and model.

    UserError where the settings contradict themselves, or an outside endpoint lacks https or a budget.
    """
    from data_prep.llm.settings import LOCAL, Budget, Endpoint

    budget = build(Budget, args, prefix="budget_")
    given = {"url": url or args.endpoint or LOCAL, "private": args.private_endpoint, "budget": budget}
    given |= {"model": model} if model else {}
    return build(Endpoint, args, given=given)
