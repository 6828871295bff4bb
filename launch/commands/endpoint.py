"""The arguments of every command that asks an OpenAI-compatible endpoint."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_prep.endpoint.settings import Endpoint


def add_endpoint(parser: argparse.ArgumentParser) -> None:
    """Settings of the endpoint; the local one is the default, and anything outside must be asked for."""
    group = parser.add_argument_group("endpoint")
    group.add_argument("--endpoint", metavar="URL", help="OpenAI-compatible base address [port 8000 of this machine]")
    group.add_argument("--model", required=True, help="the model's name there")
    group.add_argument("--private-endpoint", action="store_true",
                       help="a host in a private network is our own; else it counts as outside")  # fmt: skip
    group.add_argument("--key-variable", default="", metavar="NAME", help="environment variable with the API key")
    group.add_argument("--concurrency", type=int, default=8, help="calls in flight [%(default)s]")
    group.add_argument("--timeout", type=float, default=180.0, help="seconds of one call [%(default)s]")
    group.add_argument("--attempts", type=int, default=5, help="of one call, the first included [%(default)s]")
    group.add_argument("--image-side", type=int, default=1024, help="pixels of an image sent, at most [%(default)s]")
    group.add_argument("--budget-tokens", type=int, default=0, help="tokens at most, over all runs with this cache")
    group.add_argument("--budget-cost", type=float, default=0.0, help="money at most, likewise; needs both prices")
    group.add_argument("--prompt-price", type=float, default=0.0, help="of a million prompt tokens")
    group.add_argument("--reply-price", type=float, default=0.0, help="of a million reply tokens")
    group.add_argument("--image-tokens", type=int, default=4096,
                       help="most that the endpoint counts for one image [%(default)s]")  # fmt: skip


def endpoint_of(args: argparse.Namespace) -> Endpoint:
    """UserError where the settings contradict themselves, or an outside endpoint lacks https or a budget."""
    from data_prep.endpoint.settings import LOCAL, Budget, Endpoint

    return Endpoint(
        model=args.model,
        url=args.endpoint or LOCAL,
        private=args.private_endpoint,
        key_variable=args.key_variable,
        concurrency=args.concurrency,
        timeout=args.timeout,
        attempts=args.attempts,
        image_side=args.image_side,
        budget=Budget(args.budget_tokens, args.budget_cost, args.prompt_price, args.reply_price, args.image_tokens),
    )
