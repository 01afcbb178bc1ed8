"""Groups form while others run and nothing stops the queue; slots are taken together or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest

from svckit.groups import EARLY_GROUPS, Groups, Slots


class Item:
    """Something to be done."""

    def __init__(self, name: object) -> None:
        self.name = name
        self.done = asyncio.get_running_loop().create_future()

    def __repr__(self) -> str:
        return str(self.name)


class Recorder:
    """Work that notes its groups and waits at a gate."""

    def __init__(self) -> None:
        self.groups: list[list[object]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def work(self, group: list[Item]) -> None:
        self.groups.append([item.name for item in group])
        await self.gate.wait()
        for item in group:
            if item.name == "bad":
                raise ValueError("bad item")
        for item in group:
            item.done.set_result(None)

    def failed(self, item: Item, error: Exception) -> None:
        item.done.set_exception(error)


async def test_a_lone_item_goes_at_once_and_those_of_one_turn_go_together() -> None:
    recorder = Recorder()
    groups = Groups("test", recorder.work, recorder.failed, gather=60)
    lone = Item(0)
    groups.put(lone)
    await lone.done
    together = [Item(n) for n in (1, 2, 3)]
    for item in together:
        groups.put(item)
    await asyncio.gather(*(item.done for item in together))
    assert recorder.groups == [[0], [1, 2, 3]]


async def test_what_comes_while_a_group_runs_forms_the_next_one_up_to_its_size() -> None:
    recorder = Recorder()
    recorder.gate.clear()
    groups = Groups("test", recorder.work, recorder.failed, max_size=3)
    items = [Item(n) for n in range(6)]
    groups.put(items[0])
    await asyncio.sleep(0.01)
    for item in items[1:]:
        groups.put(item)
    await asyncio.sleep(0.01)
    assert recorder.groups == [[0]], "one lane: nothing starts while a group runs"
    recorder.gate.set()
    await asyncio.gather(*(item.done for item in items))
    assert recorder.groups == [[0], [1, 2, 3], [4, 5]]


async def put_one_by_one(groups: Groups[Item], names: Iterable[object]) -> list[Item]:
    """One in each turn of the loop."""
    items = [Item(name) for name in names]
    for item in items:
        groups.put(item)
        await asyncio.sleep(0)
    return items


async def test_after_company_a_group_waits_and_those_after_it_only_for_as_many_as_came() -> None:
    recorder = Recorder()
    groups = Groups("test", recorder.work, recorder.failed, gather=0.1)
    for item in (first := [Item(n) for n in range(4)]):
        groups.put(item)
    await asyncio.gather(*(item.done for item in first))
    for names in ("abc", "abcd", "abcd"):
        await asyncio.gather(*(item.done for item in await put_one_by_one(groups, names)))
    assert recorder.groups == [[0, 1, 2, 3], [*"abc"], [*"abcd"], [*"abcd"]], "in full until no more come than before"
    groups._gather = 60
    for _ in range(EARLY_GROUPS):
        await asyncio.gather(*(item.done for item in await put_one_by_one(groups, "defg")))
    assert recorder.groups[4:] == [[*"defg"]] * EARLY_GROUPS
    groups._gather = 0.1
    await asyncio.gather(*(item.done for item in await put_one_by_one(groups, "ghijk")))
    assert recorder.groups[-1] == [*"ghijk"], "once in a while one waits in full: more may come by now"
    groups._gather = 60
    await asyncio.gather(*(item.done for item in await put_one_by_one(groups, "lmnop")))
    assert recorder.groups[-1] == [*"lmnop"]


async def test_of_fewer_callers_fewer_are_expected_after_a_few_waits() -> None:
    recorder = Recorder()
    groups = Groups("test", recorder.work, recorder.failed, gather=0.01)

    async def burst(size: int) -> None:
        await asyncio.gather(*(item.done for item in await put_one_by_one(groups, range(size))))

    groups._last_size = 2  # as after company
    for size in (16, 2):
        await burst(size)
    groups._gather = 60
    await burst(12)
    assert [len(group) for group in recorder.groups] == [16, 2, 12], "one quiet moment says little"
    groups._gather = 0.01
    for _ in range(8):
        await burst(2)
    groups._gather = 60
    await asyncio.gather(*(item.done for item in await put_one_by_one(groups, range(2))))


async def test_the_longer_a_group_takes_the_longer_the_next_one_waits_up_to_a_bound() -> None:
    recorder = Recorder()
    groups = Groups("test", recorder.work, recorder.failed, gather=0.001, longest_gather=1)

    async def wait_after(seconds: float) -> float:
        """How long one that comes after company is to wait, when that took as long."""
        groups._took = seconds
        groups.put(Item("a"))
        assert groups._timer is not None
        left = groups._timer.when() - asyncio.get_running_loop().time()
        groups.start()
        await groups.drained()
        groups._last_size = 2
        return left

    recorder.gate.clear()
    for item in [Item(n) for n in range(2)]:
        groups.put(item)
    await asyncio.sleep(0.05)
    recorder.gate.set()
    await groups.drained()
    assert groups._took > 0.04
    assert 0.2 < await wait_after(0.2) <= 0.4
    assert 0.5 < await wait_after(60) <= 1
    assert await wait_after(0) <= 0.001 + 1e-6


async def test_a_burst_after_lone_ones_reaches_its_size_at_once() -> None:
    recorder = Recorder()
    groups = Groups("test", recorder.work, recorder.failed, gather=0.05)
    groups._last_size, groups._expected, groups._early = 2, 1, 2  # as soon after a wait in which one came
    for names in ("abcd", "abcdef"):
        await asyncio.gather(*(item.done for item in await put_one_by_one(groups, names)))
    assert recorder.groups == [[*"abcd"], [*"abcdef"]]


async def test_a_lone_item_is_kept_where_nobody_waits_for_it() -> None:
    recorder = Recorder()
    groups = Groups("test", recorder.work, recorder.failed, gather=0.5, eager=False)
    await asyncio.gather(*(item.done for item in await put_one_by_one(groups, "a")))
    for item in (both := [Item("b")]):
        groups.put(item)
    await asyncio.sleep(0.01)
    groups.put(Item("c"))
    await both[0].done
    assert recorder.groups == [["a"], ["b", "c"]]


async def test_lanes_run_beside_each_other() -> None:
    recorder = Recorder()
    recorder.gate.clear()
    groups = Groups("test", recorder.work, recorder.failed, lanes=2)
    items = [Item(n) for n in range(3)]
    for item in items:
        groups.put(item)
        await asyncio.sleep(0.01)
    assert recorder.groups == [[0], [1]]
    recorder.gate.set()
    await asyncio.gather(*(item.done for item in items))
    await groups.drained()


async def test_an_item_taken_out_before_its_start_never_runs_and_after_it_stays() -> None:
    recorder = Recorder()
    recorder.gate.clear()
    groups = Groups("test", recorder.work, recorder.failed)
    running, waiting = Item("running"), Item("waiting")
    groups.put(running)
    await asyncio.sleep(0.01)
    groups.put(waiting)
    assert groups.take_out(waiting)
    assert not groups.take_out(running)
    assert not groups.take_out(waiting)
    recorder.gate.set()
    await running.done
    await groups.drained()
    assert recorder.groups == [["running"]]


async def test_a_failing_group_fails_its_items_and_the_queue_goes_on() -> None:
    recorder = Recorder()
    groups = Groups("test", recorder.work, recorder.failed)
    bad, beside, after = Item("bad"), Item("beside"), Item("after")
    groups.put(bad)
    groups.put(beside)
    for item in (bad, beside):
        with pytest.raises(ValueError, match="bad item"):
            await item.done
    groups.put(after)
    await after.done


def test_slots_are_taken_together_in_order_of_arrival() -> None:
    ready: list[str] = []
    slots: Slots[str] = Slots()
    slots.take("ab", "ab", ready.append)
    slots.take("b", "b", ready.append)
    slots.take("bc", "bc", ready.append)
    slots.take("c", "c", ready.append)
    slots.take("d", "d", ready.append)
    assert ready == ["ab", "d"]
    slots.give_back("ab")
    assert ready == ["ab", "d", "b"]
    slots.give_back("b")
    assert ready == ["ab", "d", "b", "bc"]
    slots.give_back("bc")
    slots.give_back("c")
    slots.give_back("d")
    assert ready == ["ab", "d", "b", "bc", "c"]
    assert not slots._queues and not slots._held and not slots._missing


def test_an_item_that_leaves_the_line_lets_the_next_pass_only_if_it_was_first() -> None:
    ready: list[str] = []
    slots: Slots[str] = Slots()
    for name in ("first", "second", "third"):
        slots.take(name, "k", ready.append)
    slots.give_back("second")
    assert ready == ["first"]
    slots.give_back("first")
    assert ready == ["first", "third"]
    slots.give_back("unknown")


def test_a_key_named_twice_is_one_slot() -> None:
    ready: list[str] = []
    slots: Slots[str] = Slots()
    slots.take("item", "kk", ready.append)
    assert ready == ["item"]
    slots.give_back("item")
    slots.take("next", "k", ready.append)
    assert ready == ["item", "next"]
