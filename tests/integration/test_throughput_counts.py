"""Three counts agree to the token, whatever happened: the collective's, the router's, the workers'."""

from __future__ import annotations

from pathlib import Path

from tests.support.throughput_chaos import fleet, graceful_chaos, violent_chaos


async def test_three_counts_agree_after_scale_ups_kills_and_drains(tmp_path: Path) -> None:
    async with fleet(tmp_path) as made:
        await graceful_chaos(made)
        counts = await made.counts()
        assert counts.collective_workers > 10_000
        assert counts.equal, counts
        assert counts.lost_in_flight == 0
        assert made.failures == 0
        await violent_chaos(made)
        counts = await made.counts(killed=("w2",))
        assert 0 <= counts.lost_in_flight < 24 * 120  # less than what was running
        assert counts.equal, counts
        assert made.failures == 0
