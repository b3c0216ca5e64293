"""What guards train.py, evaluate.py and the scripts: errors in one line, and runs not mixed up."""
import multiprocessing
import signal
import sys
from pathlib import Path

REMEDIES = {"shared memory": "give the container more with --shm-size=8g, or take fewer --workers",
            "DataLoader": "scripts/check_data.py finds clips that crash or hang the decoder",
            "out of memory": "lower --batch_size, or train with --checkpointing or --micro_batch"}
# A resumed run may change these flags: it still sees the same clips, by the same recipe.
FREE = ("resume", "out_dir", "data_root", "clip_root", "init_from", "clip", "workers", "timeout",
        "device", "precision", "compile", "checkpointing", "log_every", "eval_every",
        "save_minutes", "max_steps", "dry_run")


def run_program(main):
    """Run a command. An error that its user can fix is one line, others keep their traceback."""
    sys.stdout.reconfigure(errors="replace")    # class names that the terminal cannot show
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as e:
        sys.exit(f"{Path(sys.argv[0]).name}: {e}")
    except RuntimeError as e:
        text = f"{e} {e.__cause__}"
        for word, remedy in REMEDIES.items():           # "Caught ...": Python code in a worker
            if word in text and (word == "shared memory" or "Caught" not in text):
                print(f"To fix this, {remedy}.", file=sys.stderr)
                break
        raise
    finally:
        if hasattr(signal, "SIGCHLD"):          # or PyTorch reports the workers that we kill
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in multiprocessing.active_children():
            worker.kill()                       # they ignore SIGTERM, and one may hang


def check_resume(checkpoint, **now):
    """ValueError if this is not the run that was stopped. A newer flag counts as unchanged."""
    before = {**now, **checkpoint["args"], **{k: checkpoint[k] for k in ("classes", "clips")}}
    changed = [f"{name} was {str(before[name])[:60]}, is {str(value)[:60]}"
               for name, value in now.items() if name not in FREE and before[name] != value]
    if changed:
        raise ValueError("--resume needs the same run: " + "; ".join(changed))
