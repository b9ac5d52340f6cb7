"""The entry point: `python run.py --config=configs/NAME.py[:ARG,...] [--workdir=DIR] [--config.FIELD=VALUE ...]`."""

import difflib
import io
import json
import math
import os
import re
import sys
import traceback
import warnings
from functools import partial
from pathlib import Path

from absl import flags, logging
from ml_collections import config_flags

from configs import base, ranges
from dreamprm_jax.errors import InputError, Stopped, is_full

_CONFIG = config_flags.DEFINE_config_file("config", None, "experiment, configs/NAME.py[:ARG,...]", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "output directory; default runs/NAME-ARGS")


def field_names(cfg, prefix: str = "") -> list[str]:
    """All settable fields of a config, dotted."""
    names = []
    for key, value in cfg.items(preserve_field_references=True):
        names += field_names(value, f"{prefix}{key}.") if hasattr(value, "lock") else [prefix + key]
    return names


def explain(error: Exception, argv: list[str]) -> str:
    """A flag error as one line; a misspelt field names its nearest neighbour."""
    misspelt = _misspelt(argv)
    if misspelt:
        return misspelt
    while error.__cause__ is not None:
        error = error.__cause__
    # ml_collections puts a whole traceback into its message; the last error in it is the cause.
    return " ".join(re.split(r"(?:\w+Error|\w+Exception): ", str(error))[-1].split())


def explain_config_file(error: Exception, argv: list[str]) -> str | None:
    """Where a config file of the user's own fails; None where the error is not that file's."""
    given = next((argument for argument in argv if re.match(r"--?config=", argument)), "")
    path = Path(given.partition("=")[2].partition(":")[0])
    if isinstance(error, SyntaxError):
        places, reason = [(error.filename, error.lineno)], error.msg
    else:
        frames = traceback.extract_tb(error.__traceback__)
        places, reason = [(frame.filename, frame.lineno) for frame in frames], error
    lines = [line for filename, line in places if filename and Path(filename).resolve() == path.resolve()]
    return f"{path} line {lines[-1]}: {type(error).__name__}: {reason}" if lines else None


def _misspelt(argv: list[str]) -> str | None:
    known = field_names(base.get_config())
    groups = {name.rsplit(".", 1)[0] for name in known if "." in name}
    for argument in argv[1:]:
        match = re.match(r"--?config\.([\w.]+)", argument)
        if match and match[1] not in known and match[1] not in groups:
            nearest = difflib.get_close_matches(match[1], known, n=1, cutoff=0.0)[0]
            return f"--config.{match[1]} is not a field of the config; the nearest is --config.{nearest}"
    return None


def parse(argv: list[str]):
    """argv -> (config, workdir).

    Raises:
      InputError: an unknown flag, field or argument, or a value of the wrong type or range.
    """
    # ml_collections reads sys.argv itself and wants --config before --config.FIELD; users need not know.
    sys.argv = argv = argv[:1] + sorted(argv[1:], key=lambda argument: not re.match(r"--?config=", argument))
    num_configs = sum(bool(re.match(r"--?config=", argument)) for argument in argv)
    if num_configs > 1:
        raise InputError(f"--config is given {num_configs} times: give one")
    try:
        extra = flags.FLAGS(argv)[1:]
        if extra:
            raise InputError(f"unexpected argument {extra[0]!r}: fields are set as --config.FIELD=VALUE")
        filename = flags.FLAGS["config"].value and config_flags.get_config_filename(flags.FLAGS["config"])
        if filename is None:
            raise InputError("--config is missing: give one, such as --config=configs/table.py")
        if not Path(filename.partition(":")[0]).is_file():
            raise InputError(f"--config={filename}: no such file; the configs are in configs/")
        cfg = _CONFIG.value
        ranges.validate(cfg)
    except InputError:
        raise
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise InputError(explain(error, argv)) from error
    except Exception as error:
        place = explain_config_file(error, argv)
        if place is None:
            raise
        raise InputError(place) from error
    if "://" in (_WORKDIR.value or ""):
        raise InputError(f"--workdir={_WORKDIR.value}: must be a path; give one on a disk that is mounted here")
    name, _, arguments = filename.partition(":")
    default = "-".join([Path(name).stem, *filter(None, arguments.split(","))])
    return cfg, Path(_WORKDIR.value or Path("runs") / default)


def log_machine(cfg) -> None:
    """Devices and versions; a paper-scale run on a bare CPU says so loudly."""
    import flax
    import jax
    import optax

    devices = jax.devices()
    versions = f"jax {jax.__version__}, flax {flax.__version__}, optax {optax.__version__}"
    print(f"{versions}, {len(devices)} x {devices[0].device_kind}{unused(cfg, len(devices))}", file=sys.stderr)
    if devices[0].platform == "cpu" and cfg.model.checkpoint and cfg.model.compute_dtype == "bfloat16":
        warnings.warn(
            "NO ACCELERATOR FOUND: a run at this scale on a CPU takes months. Install requirements-cuda.txt or "
            "requirements-tpu.txt (README, Accelerators).",
            stacklevel=2,
        )


def unused(cfg, num_devices: int) -> str:
    """What to say of devices that the run leaves idle; nothing where it takes all."""
    from dreamprm_jax.sharding import sizes_of

    taken = math.prod(sizes_of(cfg.mesh, num_devices))
    if taken >= num_devices:
        return ""
    return f", of which the run takes {taken} (--config.mesh.data, fsdp, tensor: docs/distributed.md)"


def find_task(cfg):
    """What runs `config.task`; jax stays unloaded where CPU cores and a network are all it takes."""
    if cfg.task == "prepare":
        from dreamprm_jax.prepare import run_prepare

        return run_prepare
    if cfg.task == "generate":
        from dreamprm_jax.generate import run_generation

        return run_generation
    return device_task(cfg)


def join(cfg) -> None:
    """Joins the processes that share the run; all but the first keep quiet."""
    from dreamprm_jax import sharding

    given = cfg.distributed
    sharding.join(given.coordinator, given.num_processes, given.process_id)
    shared = {name: value for name, value in cfg.to_dict().items() if name != "distributed"}
    sharding.check_same(json.dumps(shared, sort_keys=True))
    if not sharding.is_first():
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is loaded
        sys.stdout = io.StringIO()


def device_task(cfg):
    """What runs `config.task`, the devices set up."""
    import jax  # after parsing: a wrong flag answers at once

    from dreamprm_jax.programs import keep_between_runs

    if cfg.distributed.coordinator:
        join(cfg)
    if cfg.model.matmul_precision == "highest":
        jax.config.update("jax_default_matmul_precision", "highest")
    keep_between_runs(Path.home() / ".cache" / "dreamprm_jax")
    log_machine(cfg)
    if cfg.task == "score":
        from dreamprm_jax.scoring import run_scoring

        return run_scoring
    if cfg.task == "export":
        from dreamprm_jax.export import run_export

        return run_export
    if cfg.task == "evaluate":
        from dreamprm_jax.evaluate import run_evaluation

        return run_evaluation
    if cfg.task == "compare":
        from configs.compare import part_configs
        from dreamprm_jax.compare import run_comparison

        given = config_flags.get_override_values(flags.FLAGS["config"])
        return partial(run_comparison, configs=part_configs(cfg, given))
    from dreamprm_jax.experiment import run_training

    return run_training


def leave(status: int) -> int:
    """The exit status of a run that ends early; one of several processes ends here and now, since at a usual exit it
    would wait for the others, which wait for it."""
    if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
        sys.stderr.flush()
        os._exit(status)
    return status


def main(argv: list[str]) -> int:
    """Parses, dispatches on `config.task`, turns a user's mistake into exit status 2."""
    if {"--help", "-h", "-help"} & set(argv):
        print(__doc__, "Fields of the config, with unit and range: configs/base.py", sep="\n")
        return 0
    try:
        cfg, workdir = parse(argv)
        summary = find_task(cfg)(cfg, workdir)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return leave(2)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return leave(128 + stopped.number)  # as a shell has it
    except KeyboardInterrupt:
        print("interrupted; the same command resumes what it began", file=sys.stderr)
        return leave(130)  # 128 + SIGINT
    except Exception as error:
        if is_full(error):
            where = getattr(error, "filename", None) or "the disk of the workdir"
            print(f"error: {where}: the disk is full; free some space, and the same command goes on", file=sys.stderr)
            return leave(2)
        traceback.print_exc()
        return leave(1)
    print(json.dumps(summary, indent=2))
    return 0


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)  # Orbax tells every save in eight lines
    status = main(sys.argv)
    sys.stdout.flush()
    sys.stderr.flush()
    if status:  # here and now: a usual exit waits for what is being compiled, and Orbax's threads complain of it
        os._exit(status)
