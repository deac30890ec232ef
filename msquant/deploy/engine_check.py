"""Whether an installed engine works: its packages are imported and a small product is computed."""

import json
import subprocess
import time
from dataclasses import dataclass
from typing import Any

from msquant.errors import EngineError
from msquant.inference.environments import SITE, EngineSpec, Environment, require_ready
from msquant.inference.launch import Launch

CHECK_SECONDS = 300.0


@dataclass(frozen=True)
class CheckResult:
    """What a check found.

    Attributes:
        environment: what was checked.
        report: what the engine's own script says: versions by package, and what it computed.
        seconds: how long it took.
    """

    environment: Environment
    report: dict[str, Any]
    seconds: float


def check(spec: EngineSpec, timeout: float = CHECK_SECONDS) -> CheckResult:
    """Run the engine's own check in its environment.

    Raises:
        EngineError: it is not installed, or does not work; names its last lines.
    """
    found = require_ready(spec)
    start = time.monotonic()
    launch = Launch((str(found.python), str(spec.check)), {"PYTHONPATH": str(SITE)})
    remedy = f"install it again: msquant engine install {spec.name} --reinstall"
    try:
        process = subprocess.run(
            launch.argv,
            env=launch.environment(),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
        )
        report = json.loads(process.stdout.strip().splitlines()[-1])
        if process.returncode == 0 and isinstance(report, dict):
            return CheckResult(found, report, time.monotonic() - start)
        how = f"exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        raise EngineError(
            f"{spec.name}: its check took over {timeout:.0f} s", where=found.path, remedy=remedy
        ) from None
    except OSError as error:
        raise EngineError(
            f"cannot be started: {error.strerror}", where=found.python, remedy=remedy
        ) from error
    except (ValueError, IndexError):
        how = f"exit code {process.returncode}"
    failure = EngineError(f"{spec.name} does not work ({how})", where=found.path, remedy=remedy)
    for line in [line for line in process.stderr.splitlines() if line.strip()][-6:]:
        failure.add_note(line)
    raise failure
