"""`convert`: to and from Hugging Face, and the comparison of both models."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from infimed_jax.errors import UserError
from infimed_jax.progress import gigabytes
from launch.cli.arguments import add_command, add_group
from launch.cli.progress import progress_bar

DTYPES = ("bfloat16", "float32")


def add(commands: argparse._SubParsersAction) -> None:
    ways = add_group(commands, "convert", "Convert to and from Hugging Face, and verify an export.")
    p = add_command(
        ways, "from-hf", from_hf, "Make an initial checkpoint from Qwen3 and SigLIP folders, or a LLaVA folder."
    )
    p.add_argument("--text", type=Path, metavar="DIR", help="a Qwen3 folder (config.json, safetensors)")
    p.add_argument("--vision", type=Path, metavar="DIR", help="a SigLIP folder, with or without its text tower")
    p.add_argument(
        "--llava",
        type=Path,
        metavar="DIR",
        help="instead of both: a LLaVA folder of SigLIP and Qwen3, or another family's export",
    )
    p.add_argument("--output", type=Path, required=True, metavar="CKPT")
    p.add_argument("--visual-tokens", type=int, help="a square number [144, as in pretraining; --llava: all patches]")
    p.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="data type of the checkpoint [%(default)s]")
    p.add_argument("--family", default="infimed", help="the model's kind, as model.family names it [%(default)s]")
    p.add_argument("--seed", type=int, help="seed of the fresh projector [0]")
    p.add_argument("--tokenizer", type=Path, metavar="DIR", help="[the --text or --llava folder]")
    p = add_command(ways, "to-hf", to_hf, "Export a checkpoint of any stage to a LLaVA folder for transformers.")
    p.add_argument("--checkpoint", type=Path, required=True, help="a run's folder, or one checkpoint")
    p.add_argument("--output", type=Path, required=True, metavar="DIR")
    p.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="data type of the export [%(default)s]")
    p.add_argument("--visual-tokens", type=int, help="all patches, for a checkpoint that pools [the checkpoint's]")
    p.add_argument(
        "--vision", type=Path, metavar="DIR", help="the SigLIP folder with the weights that our tower leaves out"
    )
    p.add_argument("--lora", choices=("merged", "peft"), default="merged",
                   help="a LoRA run's adapters: in the weights, or beside them for PEFT [%(default)s]")  # fmt: skip
    p.add_argument("--evaluation", type=Path, action="append", default=[], metavar="DIR",
                   help="an output folder of `evaluate` for the model card, repeatable")  # fmt: skip
    p.add_argument("--tokenizer", type=Path, metavar="DIR", help="[the checkpoint's]")
    p = add_command(ways, "verify", verify, "Compare a checkpoint with its export, computed by transformers.")
    p.add_argument("--checkpoint", type=Path, required=True, help="a run's folder, or one checkpoint")
    p.add_argument(
        "--hf", type=Path, required=True, metavar="DIR", help="the folder that to-hf wrote; verify.json is put there"
    )
    p.add_argument("--tokenizer", type=Path, metavar="DIR", help="[the checkpoint's]")


def from_hf(args: argparse.Namespace) -> None:
    whole, parts = args.llava is not None, args.text is not None and args.vision is not None
    if whole == parts or (whole and (args.text or args.vision)):
        raise UserError("give --text and --vision, or --llava alone")
    if whole and args.seed is not None:
        raise UserError("--seed draws a fresh projector, and --llava brings its own: leave it out")
    seed = args.seed or 0
    if seed < 0:
        raise UserError("--seed must not be negative")
    if args.output.exists():
        raise UserError(f"{args.output} exists already: remove it or choose another folder")
    from infimed_jax.config import Config, Data, Train, to_dict
    from infimed_jax.data.chat import load_tokenizer
    from infimed_jax.files import write_json
    from infimed_jax.hf import provenance
    from infimed_jax.hf.import_ import open_export, open_parts
    from infimed_jax.models.params import param_count
    from infimed_jax.runs.checkpoint import keep_tokenizer
    from infimed_jax.runs.parameters import save_params

    if whole:
        opened = open_export(args.llava, visual_tokens=args.visual_tokens, dtype=args.dtype, family=args.family)
        folders = {"all weights": args.llava}
    else:
        tokens = 144 if args.visual_tokens is None else args.visual_tokens
        opened = open_parts(
            {"vision": args.vision, "text": args.text},
            visual_tokens=tokens,
            seed=seed,
            dtype=args.dtype,
            family=args.family,
        )
        folders = {"text weights": args.text, "vision weights": args.vision}
    tokenizer = _tokenizer(args.tokenizer or args.llava or args.text, opened.model.vocab_size)
    entry = provenance.import_entry(opened, folders)
    stage = Train(stage=provenance.IMPORT, train=opened.model.PARTS[1:])
    config = Config(model=opened.model, data=Data(tokenizer=str(tokenizer)), train=stage)
    with progress_bar("from-hf") as bar:

        def leaves():
            done = 0
            for path, leaf in opened.leaves():
                done += leaf.nbytes
                yield path, leaf
                del leaf  # before the next one is read
                bar(done, opened.nbytes, gigabytes(done, opened.nbytes))

        save_params(args.output, leaves(), {"config": to_dict(config), "history": [entry]})
    keep_tokenizer(load_tokenizer(tokenizer), args.output)
    counts = param_count(opened.model)
    report = args.output.with_name(f"{args.output.name}.json")
    write_json(report, {"dtype": args.dtype, "parameters": counts, "model": to_dict(opened.model), **entry})
    listed = ", ".join(f"{part} {count:,}" for part, count in counts.items() if part != "total")
    print(f"from-hf: {counts['total']:,} parameters in {args.dtype} ({listed})")
    if opened.fresh_projector:
        print(f"The projector is fresh, drawn from seed {seed}.")
    print(f"Outputs: {args.output}, {report}")


def to_hf(args: argparse.Namespace) -> None:
    from data_prep.sources import COMMERCIAL_USE
    from infimed_jax.config import Config, from_dict
    from infimed_jax.hf import provenance
    from infimed_jax.hf.configuration import MAX_POSITIONS
    from infimed_jax.hf.export import Export
    from infimed_jax.runs.history import history_of
    from infimed_jax.runs.parameters import open_params, open_stored

    apart = args.lora == "peft"
    params, metadata = (open_stored if apart else open_params)(args.checkpoint)
    config = from_dict(Config, metadata["config"])
    if apart and not config.train.lora.rank:
        raise UserError(f"{args.checkpoint} holds no adapters (train.lora.rank is 0): leave out --lora peft")
    history = history_of(metadata)
    export = Export(
        params,
        config.model,
        args.tokenizer or config.data.tokenizer,
        source_vision=args.vision,
        visual_tokens=args.visual_tokens,
        lora=config.train.lora if apart else None,
    )
    with progress_bar("to-hf") as bar:
        export.write(
            args.output,
            dtype=args.dtype,
            card=provenance.checkpoint_card(history, args.evaluation, COMMERCIAL_USE),
            max_positions=provenance.max_positions(history) or MAX_POSITIONS,
            on_progress=bar,
        )
    print(f"Outputs: {args.output}")


def verify(args: argparse.Namespace) -> None:
    from infimed_jax.config import Config, from_dict
    from infimed_jax.hf.verify import verify
    from infimed_jax.hf.weights import ADAPTER
    from infimed_jax.models.lora import scale_of
    from infimed_jax.runs.parameters import open_params, open_stored

    apart = (args.hf / ADAPTER).is_dir()
    params, metadata = (open_stored if apart else open_params)(args.checkpoint)
    config = from_dict(Config, metadata["config"])
    tokenizer = args.tokenizer or config.data.tokenizer
    result = verify(params, config.model, args.hf, tokenizer, lora_scale=scale_of(config.train.lora) if apart else 0.0)
    if result["status"] == "skipped":
        raise UserError(f"nothing was compared: {result['reason']}; the proof needs torch beside transformers")
    for case in result["cases"]:
        print(describe_case(case))
    for failure in result["failures"]:
        print(f"FAILED  {failure}")
    print(f"{result['status']}: {args.checkpoint} against {args.hf} ({result['dtype']})")
    print(f"Outputs: {args.hf / 'verify.json'}")
    if result["status"] != "passed":
        sys.exit(1)


def describe_case(case: dict) -> str:
    """One line: `verify/image: 1 image, 750 tokens; vision 1.2e-06, …`, each the largest difference."""
    parts = [f"{case['id']}: {case['images']} images, {case['tokens']} tokens"]
    compared = {name: value for name, value in case.items() if isinstance(value, dict) and name != "logits"}
    parts += [f"{name} {value['max_abs']:.1e}" for name, value in compared.items() if "max_abs" in value]
    if "logits" in case:
        logits = case["logits"]
        parts.append(
            f"logits max {logits['max_abs']:.1e} mean {logits['mean_abs']:.1e} of {logits['scale']:.1f}, "
            f"KL {logits['kl_mean']:.1e}, top-1 {logits['top1_agreement']:.1%}"
        )
    return ", ".join(parts)


def _tokenizer(folder: Path, vocab: int) -> Path:
    """The folder of a tokenizer that fits the model: later stages render with it."""
    from infimed_jax.data.chat import load_tokenizer

    try:
        tokens = len(load_tokenizer(folder))
    except UserError as error:
        raise UserError(f"{error}; name one by --tokenizer") from error
    if tokens > vocab:
        raise UserError(
            f"the tokenizer {folder} has {tokens} tokens, the model's vocab_size is {vocab}: name the model's own by "
            "--tokenizer"
        )
    return folder.absolute()
