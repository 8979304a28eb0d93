"""torch.compile for shapes that never change, with what it made kept on disk for the next start."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

CACHE = "TORCHINDUCTOR_CACHE_DIR"  # torch's own variable; who sets it has chosen
VARIANTS = 64  # torch counts those of one piece of code over all networks and shapes of a process


def compiled[**P, Output](function: Callable[P, Output]) -> Callable[P, Output]:
    """The function as one piece of machine code per shape; raises, when called, where that cannot be.

    What was compiled before, by this or another process, is read back from `keep_on_disk`'s folder.
    """
    import torch._dynamo

    keep_on_disk()
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    return torch.compile(function, fullgraph=True, dynamic=False)


def keep_on_disk() -> None:
    """Have torch keep what it compiles in a folder that only this user can write.

    torch reads it back as pickles and native code, which run with this user's rights. So it is never part
    of a checkpoint, which may come from elsewhere, and not in /tmp, torch's own choice, where another
    user could have put the folder first. Raises ValueError when there is no such folder.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if os.environ.get(CACHE, default_cache_dir()) != default_cache_dir():  # torch writes its own there, too
        return
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vla" / "compiled"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        ours = found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        wrong = (
            "" if ours and os.access(folder, os.W_OK) else "one that others can write, or this user cannot"
        )
    except OSError as error:
        wrong = str(error)
    if wrong:
        raise ValueError(
            f"compiled code: got {str(folder)!r} ({wrong}), expected a folder of this user's own. remedy: set "
            f"{CACHE} to one, or do without compiling."
        )
    os.environ[CACHE] = str(folder)
