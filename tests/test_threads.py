"""The number of threads follows what is fastest, at little cost."""

from __future__ import annotations

import pytest

from asyncrl.threads import Threads, halves


class Machine:
    """A clock that updates move; `seconds(threads)` is what one takes now."""

    def __init__(self, choices):
        self.now, self.said, self.spent = 100.0, [], {number: 0.0 for number in choices}
        self.threads = Threads(choices, self.set_number, self.said.append, lambda: self.now)

    def set_number(self, number: int) -> None:
        self.number = number

    def learn(self, seconds, during: float, period: float = 0.0) -> None:
        """Updates for a time, with data for one every `period` seconds."""
        end = self.now + during
        while self.now < end:
            begun = self.now
            with self.threads:
                self.now += seconds(self.number)
                self.spent[self.number] += seconds(self.number)
            self.now = max(self.now, begun + period)


def quiet(threads: int) -> float:
    return {1: 0.040, 2: 0.025, 4: 0.015}[threads]


def busy(threads: int) -> float:
    return {1: 0.045, 2: 0.600, 4: 1.2}[threads]


def test_where_nobody_else_is_all_threads_are_kept_and_trials_cost_little():
    machine = Machine([2, 1])
    machine.learn(quiet, 3_600)
    assert machine.threads.number == machine.number == 2 and not machine.said
    assert 0 < machine.spent[1] < 0.001 * machine.spent[2]


def test_beside_others_one_thread_is_enough_and_the_rest_come_back_afterwards():
    machine = Machine([2, 1])
    machine.learn(quiet, 600)
    machine.spent = {1: 0.0, 2: 0.0}
    machine.learn(busy, 3_600)
    assert machine.threads.number == 1
    assert machine.spent[2] < 0.03 * 3_600  # noticed at once, and tried ever more rarely
    (said,) = machine.said
    assert said.startswith("1 instead of 2 threads") and "45 instead of 600 ms" in said
    machine.learn(quiet, 600)
    assert machine.threads.number == machine.number == 2


def test_more_threads_come_back_though_they_gain_little():
    machine = Machine([2, 1])
    machine.learn(busy, 60)
    assert machine.threads.number == 1
    machine.learn(lambda threads: {1: 0.025, 2: 0.024}[threads], 1_000)
    assert machine.threads.number == 2
    machine.learn(lambda threads: {1: 0.024, 2: 0.025}[threads], 1_000)
    assert machine.threads.number == 2  # nor do they go for little


def test_long_updates_are_seldom_tried_and_a_slow_one_ends_a_trial():
    machine = Machine([2, 1])
    machine.learn(lambda threads: 100 * quiet(threads), 600)
    assert machine.threads.number == 2 and 0 < machine.spent[1] < 0.07 * 600


def test_a_number_that_is_faster_only_beside_bursts_of_acting_is_not_taken():
    machine = Machine([2, 1])

    def seconds(threads: int) -> float:
        acting = machine.now % 0.7 < 0.2
        return {1: 0.020, 2: 0.025}[threads] if acting else {1: 0.016, 2: 0.012}[threads]

    machine.learn(seconds, 3_600)
    assert machine.spent[1] < 0.01 * machine.spent[2]


def test_a_learner_that_waits_for_data_leaves_threads_to_the_actors():
    machine = Machine([2, 1])
    machine.learn(quiet, 600, period=0.042)  # one would come to 0.040: too close
    assert machine.threads.number == 2
    machine.learn(quiet, 600, period=0.060)  # 0.025 with two threads
    assert machine.threads.number == 1
    assert machine.said[0].endswith("take 40 instead of 25 ms, and data comes no sooner")
    machine.learn(quiet, 1_000, period=0.043)  # and does not go back and forth
    assert machine.threads.number == 1 and len(machine.said) == 1
    machine.learn(quiet, 1_000, period=0.030)  # more data than one thread can take
    assert machine.threads.number == 2


def test_a_learner_with_little_to_do_gets_a_single_one_of_many_threads():
    machine = Machine([4, 2, 1])
    machine.learn(quiet, 600, period=0.1)  # 0.015, 0.025 or 0.040 of which are updates
    assert machine.threads.number == 1


def test_of_several_the_fastest_is_found():
    machine = Machine(halves(4))
    machine.learn(busy, 60)
    assert machine.threads.number == 1
    machine.learn(quiet, 2_000)
    assert machine.threads.number == 4


def test_a_single_choice_is_never_left():
    machine = Machine([2])
    machine.learn(lambda threads: 1.0, 1_000)
    assert machine.number == 2 and not machine.said
    assert halves(1) == [1] and halves(12) == [12, 6, 3, 1]


def test_an_update_that_fails_is_not_counted():
    machine = Machine([2, 1])
    with pytest.raises(ZeroDivisionError), machine.threads:
        1 / 0  # noqa: B018
    machine.learn(quiet, 30)
    assert machine.threads.number == 2
