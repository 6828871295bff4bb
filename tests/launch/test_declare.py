"""Options made from dataclasses: against the dataclasses themselves."""

import argparse
import dataclasses

import pytest

from data_prep.llm.quality.assess import Plan
from data_prep.llm.settings import Budget, Endpoint
from launch.cli.declare import add_fields, build
from launch.cli.endpoint import add_endpoint, endpoint_of


def parsed(*arguments: str, prefix: str = "") -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_fields(parser, "data_prep.llm.quality.assess:Plan", ("samples", "threshold", "max_tokens", "seed"), prefix)
    return parser.parse_args(arguments)


def test_an_option_has_its_fields_name_type_default_and_docstring(capsys):
    assert build(Plan, parsed()) == Plan()
    assert build(Plan, parsed("--samples", "7", "--threshold", "4.5")) == Plan(samples=7, threshold=4.5)
    with pytest.raises(SystemExit):
        parsed("--samples", "many")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        parsed("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "--samples SAMPLES samples drawn at random from each source; the published number [500]" in shown


def test_a_prefix_and_given_fields():
    args = parsed("--plan-samples", "9", prefix="plan_")
    assert build(Plan, args, prefix="plan_", given={"threshold": 2.0}) == Plan(samples=9, threshold=2.0)


def test_the_endpoints_options_make_its_own_defaults_and_its_budget():
    parser = argparse.ArgumentParser()
    add_endpoint(parser)
    assert endpoint_of(parser.parse_args(["--model", "m"])) == Endpoint("m")
    money = [
        "--budget-cost",
        "2",
        "--prompt-price",
        "3",
        "--reply-price",
        "4",
        "--budget-tokens",
        "5",
        "--image-tokens",
        "6",
    ]
    args = parser.parse_args(["--model", "m", "--attempts", "1", *money])
    budget = Budget(tokens=5, cost=2, prompt_price=3, reply_price=4, image_tokens=6)
    assert endpoint_of(args) == dataclasses.replace(Endpoint("m"), attempts=1, budget=budget)
