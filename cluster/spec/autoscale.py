"""What a spec says about how many replicas a model should have when that is not a number."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class AutoscaleSpec(BaseModel):
    """Between how many replicas, and what they should achieve."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_replicas: int = Field(1, ge=0, le=100_000, description="never fewer; 0: none while nobody asks")
    max_replicas: int = Field(ge=1, le=100_000, description="never more")
    utilisation: float = Field(0.75, ge=0.1, le=0.95, description="share of the replicas' full rate that load may take")
    ttft_p99_s: float | None = Field(None, gt=0, le=3600, description="time to first token that 99% should not exceed")
    itl_p99_s: float | None = Field(None, gt=0, le=3600, description="time between tokens, the same")
    queue_s: float = Field(10.0, gt=0, le=3600, description="in which what waits should be worked off")
    scale_down_after_s: float = Field(300.0, ge=1, le=3600, description="for which fewer must have been enough")
    hold_s: float = Field(600.0, ge=1, le=86_400, description="how long requests wait for the first replica")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas: {self.min_replicas} is not allowed; at most max_replicas, {self.max_replicas}"
            )
        return self
