"""Usage adds up, and the meter reads what a block really used."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.meter import Meter, Usage, cpu_seconds, peak_memory_bytes, writer_name

_COUNTS = st.integers(0, 2**50)
_SECONDS = st.integers(0, 2**30).map(float)  # whole numbers add up exactly
_USAGES = st.builds(Usage, _SECONDS, _SECONDS, _SECONDS, _SECONDS, _COUNTS, _COUNTS, _COUNTS, _COUNTS)


@given(a=_USAGES, b=_USAGES, c=_USAGES)
def test_usages_add_up(a: Usage, b: Usage, c: Usage) -> None:
    assert a + Usage() == a and a + b == b + a and (a + b) + c == a + (b + c)
    assert (a + b).tokens == a.tokens + b.tokens
    assert Usage.of(a.as_dict()) == a


def test_unknown_and_missing_keys_are_tolerated() -> None:
    assert Usage.of({"rows": 3, "from_a_later_version": 1}) == Usage(rows=3)


def test_the_meter_reads_wall_and_processor_time() -> None:
    with Meter(cores=4, devices=2) as meter:
        time.sleep(0.2)
        end = time.process_time() + 0.1
        while time.process_time() < end:
            pass
        meter.rows, meter.tokens, meter.bytes_read, meter.bytes_written = 1, 2, 3, 4
    usage = meter.usage
    assert usage.wall_seconds >= 0.29
    assert usage.core_seconds == pytest.approx(4 * usage.wall_seconds)
    assert usage.device_seconds == pytest.approx(2 * usage.wall_seconds)
    assert 0.09 <= usage.cpu_seconds < usage.wall_seconds + 0.1
    assert (usage.rows, usage.tokens, usage.bytes_read, usage.bytes_written) == (1, 2, 3, 4)


def test_the_meter_reads_also_when_the_block_fails() -> None:
    meter = Meter()
    with pytest.raises(ValueError, match="inside"), meter:
        time.sleep(0.01)
        raise ValueError("inside")
    assert meter.usage.wall_seconds >= 0.01


def test_readings_of_this_process() -> None:
    before = cpu_seconds()
    block = bytearray(50_000_000)
    assert peak_memory_bytes() > len(block) and cpu_seconds() >= before
    host, _, pid = writer_name().rpartition(":")
    assert host and int(pid) > 0
