"""The demo (`quickstart`): data, a warm-up, five training stages, GRPO, evaluation, export and report on one machine.

`chain` keeps what each step leaves, `data` makes the data, `stages` trains and evaluates, `report` exports and reports;
`quickstart` runs them. The procedural images are data sources like others (`data_prep/sources/{phantom,shapes}`), as is
the tokenizer's maker: what a source and a tokenizer are is decided there, and tests use them without the demo.
"""
