"""The command line. Heavy imports stand inside the commands, so that `dsdpo --help` answers at once."""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import gc
import logging
import sys
import warnings
from pathlib import Path
from typing import TypeAlias

from dsdpo import __version__
from dsdpo.config.parser import Parser
from dsdpo.errors import CheckpointError, DsdpoError, config_error
from dsdpo.runtime.env import launched
from dsdpo.runtime.rundir import RunDir

INTERRUPTED = 130
_NO_CONFIG = "give RUN.yaml, or options such as --model_name_or_path"


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code (see `dsdpo.errors`)."""
    atexit.register(gc.freeze)  # or the last collection looks at all that was imported: a second for torch and the like
    # PEFT imports bitsandbytes where it is installed, which then misses a kernel that dsdpo does not use
    logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)
    arguments = sys.argv[1:] if argv is None else argv
    parser, commands = _parser()
    place = next((i for i, word in enumerate(arguments) if word in commands), len(arguments))
    options: list[str] = []
    if place < len(arguments) and arguments[place] in _TAKES_OVERRIDES:
        from dsdpo.config.command_line import separate

        own, options = separate(arguments[place + 1 :], commands[arguments[place]].arities())
        args, overrides = parser.parse_known_args([*arguments[: place + 1], *own])
    else:
        args, overrides = parser.parse_known_args(arguments)
    overrides += options
    if overrides and args.command not in _TAKES_OVERRIDES:
        parser.error(f"{args.command} does not know {' '.join(overrides)}; see dsdpo {args.command} --help")
    args.typed = arguments
    try:
        return int(args.function(args, overrides) or 0)
    except DsdpoError as error:
        mesh = launched()
        if mesh is None or mesh.is_main or (error.for_each_node and mesh.local_rank == 0):
            print(f"dsdpo {args.command}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"dsdpo {args.command}: interrupted", file=sys.stderr)
        return INTERRUPTED


# --- commands ---


def _launched_task(args: argparse.Namespace, overrides: list[str]) -> int:
    from dsdpo.launch.preflight import ClusterRequest
    from dsdpo.launch.supervisor import supervise
    from dsdpo.launch.task import Task, evaluation
    from dsdpo.launch.worker import join

    _name_config(args, overrides)
    more = {name: getattr(args, name) for name in ("model", "fresh", "confirmed") if hasattr(args, name)}
    task = Task(args.command, args.config, overrides, typed=tuple(args.typed), **more)
    if args.command == "eval":
        task = evaluation(task, args.usage_error)
    mesh = launched()
    if mesh is not None:
        return join(task, mesh, args.supervised)
    names = [field.name for field in dataclasses.fields(ClusterRequest)]
    cluster = ClusterRequest(**{name: getattr(args, name) for name in names})
    return supervise(task, cluster)


def _name_config(args: argparse.Namespace, overrides: list[str], missing: str = _NO_CONFIG) -> None:
    """Put the file of --config in its place. Ends the command where there is neither a config nor an option."""
    if file := getattr(args, "file", None):
        if args.config:
            args.usage_error(f"found {args.config} and --config {file}; give one run config")
        args.config = file
    if not args.config and not overrides:
        args.usage_error(missing)


def _prepare(args: argparse.Namespace, overrides: list[str]) -> None:
    from dsdpo.launch.preflight import preflight
    from dsdpo.launch.task import prepare_data

    _name_config(args, overrides)
    config, _ = preflight(args.config, overrides, "prepare")
    prepare_data(config, trains=False)


def _export(args: argparse.Namespace, _: list[str]) -> None:
    source, target = Path(args.output_dir), Path(args.to)
    if not source.is_dir():
        raise CheckpointError(f"there is no folder {source}; give the output_dir of a run")
    from dsdpo.export.huggingface import adapter_remark, export
    from dsdpo.runtime.progress import show_library_progress

    show_library_progress()
    warnings.simplefilter("ignore", FutureWarning)  # of peft, to peft
    print(f"exported {export(source, target, args.merge, args.step)} to {target}")
    if remark := adapter_remark(target):
        print(remark)


def _checkpoints(args: argparse.Namespace, _: list[str]) -> int:
    from dsdpo.tools.checkpoints import show

    return show(RunDir(Path(args.output_dir)), args.verify, args.prune)


def _import_checkpoint(args: argparse.Namespace, _: list[str]) -> None:
    source, target = Path(args.checkpoint), Path(args.to)
    if not source.is_dir():
        raise CheckpointError(f"there is no folder {source}; give a DeepSpeed checkpoint, such as out/checkpoint-500")
    from dsdpo.export.deepspeed_import import import_checkpoint
    from dsdpo.runtime.progress import show_library_progress

    show_library_progress()
    print(f"imported {import_checkpoint(source, target, args.tag, args.model)} to {target}")


def _import_config(args: argparse.Namespace, overrides: list[str]) -> int:
    from dsdpo.tools.import_config import import_config

    _name_config(args, overrides, "give another trainer's config, or its options")
    return import_config(args.config, overrides, args.to, args.num_accelerators)


def _chat(args: argparse.Namespace, _: list[str]) -> None:
    if args.prompts and not Path(args.prompts).is_file():
        raise config_error("prompts-file", "--prompts", f"--prompts: there is no file {args.prompts}")
    from dsdpo.tools.answers import AnswerSettings
    from dsdpo.tools.chat import chat

    names = [field.name for field in dataclasses.fields(AnswerSettings) if hasattr(args, field.name)]
    chat(args.model, args.compare, args.prompts, AnswerSettings(**{name: getattr(args, name) for name in names}))


def _files(args: argparse.Namespace, _: list[str]) -> None:
    from dsdpo.tools.shipped import write_files

    target = Path(args.to)
    written, kept = write_files(target)
    for file in written:
        print(target / file)
    print(f"wrote {len(written)} files to {target}" + (f"; {len(kept)} were there already" if kept else ""))


def _plot(args: argparse.Namespace, _: list[str]) -> None:
    folders = [Path(name) for name in args.output_dir]
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise CheckpointError(f"there is no folder {missing[0]}; give the output_dir of a run")
    from dsdpo.tools.plots import draw

    for picture in draw(folders, args.to):
        print(picture)


# --- arguments ---

_TAKES_OVERRIDES = ("train", "prepare", "reference", "eval", "import-config")


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


def _parser() -> tuple[Parser, dict[str, Parser]]:
    parser = Parser(prog="dsdpo", description="Preference tuning of language models with DeepSpeed.")
    parser.add_argument("--version", action="version", version=f"dsdpo {__version__}")
    _add_local_rank(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    train = _add_task(commands, "train", "train, or go on with a run that was stopped, and export the weights")
    train.add_argument("--fresh", action="store_true", help="begin again; what output_dir holds is moved aside")
    train.add_argument("--yes", dest="confirmed", action="store_true", help="do not ask before --fresh does so")
    _add_launch(train)
    _add_task(commands, "prepare", "read, check, template and tokenize the data").set_defaults(function=_prepare)
    _add_launch(_add_task(commands, "reference", "fill the store of reference log-probs"))
    _add_eval(commands)
    _add_export(commands)
    _add_checkpoints(commands)
    _add_import(commands)
    _add_chat(commands)
    plot = commands.add_parser("plot", help="PNG curves from metrics.jsonl; of several runs, in one picture")
    plot.add_argument("output_dir", metavar="OUTPUT_DIR", nargs="+", help="output_dir of a run")
    plot.add_argument("--to", metavar="DIR", help="folder for the pictures of several runs (comparison)")
    plot.set_defaults(function=_plot)
    _add_import_config(commands)
    files = commands.add_parser("files", help="write DeepSpeed configs, launch and SLURM scripts, examples")
    files.add_argument("--to", required=True, metavar="DIR", help="folder; what differs there is not overwritten")
    files.set_defaults(function=_files)
    return parser, dict(commands.choices)


def _add_task(commands: Commands, name: str, text: str) -> Parser:
    usage = f"dsdpo {name} [RUN.yaml] [arguments] [--key value ...]"
    parser = commands.add_parser(name, help=text, usage=usage, takes_options=True)
    what = "run config, also another trainer's; --key value sets one of its options"
    parser.add_argument("config", metavar="RUN.yaml", nargs="?", default="", help=what)
    parser.add_argument("--config", dest="file", metavar="RUN.yaml", help="the same, as TRL's scripts take it")
    parser.set_defaults(usage_error=parser.error)
    return parser


def _add_launch(parser: Parser) -> None:
    launch = parser.add_argument_group("launch", "without them: all accelerators of this machine, or one CPU rank")
    launch.add_argument("--num_accelerators", type=int, metavar="N", help="ranks per node")
    launch.add_argument("--hostfile", metavar="FILE", help="nodes, as `host slots=N` lines")
    launch.add_argument("--include", metavar="NODES", help="only these, such as node-1:0,1@node-2")
    launch.add_argument("--exclude", metavar="NODES", help="all but these")
    launch.add_argument("--master_addr", metavar="ADDR", help="of the first node, where it has several networks")
    launch.add_argument("--master_port", type=int, metavar="PORT", help="port for the ranks to meet (a free one)")
    again = "in a SLURM job: back into the queue when the scheduler stopped it, or what failed may pass"
    launch.add_argument("--requeue", action="store_true", help=again)
    launch.add_argument("--supervised", metavar="TOKEN", help=argparse.SUPPRESS)
    _add_local_rank(parser)
    parser.set_defaults(function=_launched_task)


def _add_local_rank(parser: Parser) -> None:
    """Launchers add it, `deepspeed` before the command; LOCAL_RANK says the same."""
    parser.add_argument("--local_rank", type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _add_export(commands: Commands) -> None:
    parser = commands.add_parser("export", help="a run's weights as a Hugging Face folder")
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="output_dir of a run")
    parser.add_argument("--to", required=True, metavar="DIR", help="new folder")
    parser.add_argument("--step", type=int, metavar="N", help="of the checkpoint after step N (the end, or the newest)")
    parser.add_argument("--merge", action="store_true", help="fold the LoRA adapter into its base model")
    parser.set_defaults(function=_export)


def _add_import(commands: Commands) -> None:
    text = "another trainer's DeepSpeed checkpoint as a Hugging Face folder"
    warning = "These are pickle files, and reading one can run code: import only what you trust."
    parser = commands.add_parser("import-checkpoint", help=text, description=f"Writes {text}. {warning}")
    parser.add_argument("checkpoint", metavar="DIR", help="folder with the file latest, or a global_step folder in it")
    parser.add_argument("--to", required=True, metavar="OUT", help="new folder")
    parser.add_argument("--tag", metavar="TAG", help="which folder of DIR to read (the one that latest names)")
    parser.add_argument("--model", metavar="BASE", help="what was trained, or an adapter's base: folder or hub id")
    parser.set_defaults(function=_import_checkpoint)


def _add_import_config(commands: Commands) -> None:
    text = "another trainer's config or options as a run config"
    more = "It lists what was translated, what has no effect here, and what is refused."
    usage = "dsdpo import-config FILE [--to RUN.yaml] [--num_accelerators N] [--key value ...]"
    parser = commands.add_parser("import-config", help=text, usage=usage, description=f"Writes {text}. {more}")
    parser.add_argument("config", metavar="FILE", nargs="?", default="", help="of LLaMA-Factory or TRL; YAML or JSON")
    parser.add_argument("--to", metavar="RUN.yaml", help="new file (the terminal)")
    parser.add_argument("--num_accelerators", type=int, metavar="N", help="ranks in all, for train_batch_size")
    parser.set_defaults(function=_import_config, usage_error=parser.error)


def _add_checkpoints(commands: Commands) -> None:
    parser = commands.add_parser("checkpoints", help="list a run's checkpoints, verify them, remove old ones")
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="output_dir of a run")
    parser.add_argument("--verify", action="store_true", help="read and hash every file")
    parser.add_argument("--prune", type=int, metavar="N", help="remove all but the newest N whole ones (at least 2)")
    parser.set_defaults(function=_checkpoints)


def _add_eval(commands: Commands) -> None:
    parser = commands.add_parser(
        "eval",
        help="loss, accuracy and margin on held-out pairs",
        usage="dsdpo eval OUTPUT_DIR | RUN.yaml --model DIR [arguments] [--key value ...]",
        takes_options=True,
        description="Evaluates trained weights on the held-out pairs of a run, and prints one JSON line. With the "
        "output_dir of a run that has ended, its own config and weights are taken.",
    )
    parser.add_argument("config", metavar="OUTPUT_DIR", help="output_dir of a run, or a run config; then --model names")
    parser.add_argument("--model", metavar="DIR", help="weights: output_dir, model or adapter folder, or hub id")
    parser.set_defaults(usage_error=parser.error)
    _add_launch(parser)


def _add_chat(commands: Commands) -> None:
    parser = commands.add_parser(
        "chat",
        help="talk to a model, or compare two",
        description="Answers what you type, or the prompts of a file. With the output_dir of a run, its weights answer "
        "with the template, system message and max_length that it was trained with. In a conversation, /reset starts a "
        "new one and /exit ends.",
    )
    parser.add_argument("model", metavar="MODEL", help="output_dir of a run, model or adapter folder, or hub id")
    beside = "show this model's answers beside; without BASE, those of the model that MODEL was trained from"
    parser.add_argument("--compare", nargs="?", const="", metavar="BASE", help=beside)
    prompts = "answer a file's prompts, and end; .txt: one a line; .jsonl: a record with prompt or messages a line"
    parser.add_argument("--prompts", metavar="FILE", help=prompts)
    answers = parser.add_argument_group("answers")
    longest = "longest answer, in tokens (256, or what max_length leaves)"
    answers.add_argument("--max_new_tokens", type=int, metavar="N", help=longest)
    heat = "0: the likeliest token each time; 1: tokens as likely as the model says; between: fewer surprises (0)"
    answers.add_argument("--temperature", type=float, default=0.0, metavar="T", help=heat)
    top = "draw from the likeliest tokens only, which together have this probability (1: from all)"
    answers.add_argument("--top_p", type=float, default=1.0, metavar="P", help=top)
    answers.add_argument("--seed", type=int, metavar="N", help="the same answers each time (others each time)")
    conversation = parser.add_argument_group("conversation", "without them: as the run was trained")
    conversation.add_argument("--template", metavar="T", help="chat template, as in a run config (default)")
    conversation.add_argument("--system", metavar="TEXT", help='system message; "" for none')
    longest = "longest conversation with its answer, in tokens (what the model can hold)"
    conversation.add_argument("--max_length", type=int, metavar="N", help=longest)
    parser.set_defaults(function=_chat)
