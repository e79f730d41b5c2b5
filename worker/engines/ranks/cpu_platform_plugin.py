"""Entry point `vllm.platform_plugins`: chooses megatoken's CPU platform, and only where a CPU replica runs on Ray.

vLLM calls `activate` in every process that imports it, so this module imports nothing heavy. The variable is set by
placement.py for the engine core and by cpu_ray_executor.py for the ranks; a node with accelerators never has it, and
keeps vLLM's own platform and executor as they are.
"""

from __future__ import annotations

import os
from typing import Final

from megatoken.worker.engines.ranks.variables import DEVICE_VARIABLE

PLATFORM: Final = "megatoken.worker.engines.ranks.cpu_platform.RayCpuPlatform"


def activate() -> str | None:
    """The platform class for this process, or None to leave the choice to vLLM."""
    return PLATFORM if os.environ.get(DEVICE_VARIABLE) else None
