"""Deployments: the number of replicas becomes the wanted one, whatever nodes and engines do."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from coordinator.serving.deployments import FAILURES_LIMIT, Deployment, Load, Place, Unload
from potluck.wire.values import BlobRef, ErrorInfo, Signature

MODEL = BlobRef(sha256="0" * 64, size=1)
SIGNATURE = Signature(inputs=(), outputs=())
DIED = ErrorInfo(code="engine_failed", message="died", retryable=True)
CRASHED = ErrorInfo(code="model_crashed", message="took more than 60 s", retryable=True)
SHORT = ErrorInfo(code="out_of_memory", message="no room", retryable=True)
BROKEN = ErrorInfo(code="invalid_model", message="no", retryable=False)


def places(**gflops: float) -> list[Place]:
    return [Place(name, speed) for name, speed in gflops.items()]


def loads(deployment: Deployment, where: list[Place], now: float = 0.0) -> list[Load]:
    return [command for command in deployment.plan(where, {}, now, 1.0) if isinstance(command, Load)]


def test_the_fastest_nodes_that_hold_least_come_first() -> None:
    deployment = Deployment("m:1", MODEL, 2)
    commands = deployment.plan(places(slow=1, fast=9, full=99), {"full": 1}, 0.0, 1.0)
    assert [command.node_id for command in commands] == ["fast", "slow"]


def test_loading_is_asked_again_until_it_is_answered() -> None:
    deployment = Deployment("m:1", MODEL, 1)
    (first,) = loads(deployment, places(a=1), 0.0)
    assert loads(deployment, places(a=1), 0.5) == []
    assert loads(deployment, places(a=1), 1.5) == [first]
    assert deployment.loaded(first.replica_id, SIGNATURE)
    assert not deployment.loaded(first.replica_id, SIGNATURE)
    assert loads(deployment, places(a=1), 9.0) == []
    assert deployment.complete(places(a=1))


def test_a_lost_node_is_replaced() -> None:
    deployment = Deployment("m:1", MODEL, 1)
    (first,) = loads(deployment, places(a=9, b=1))
    deployment.loaded(first.replica_id, SIGNATURE)
    assert deployment.node_lost("a") == [first.replica_id]
    (second,) = loads(deployment, places(b=1))
    assert second.node_id == "b"


def test_on_every_node_means_also_on_those_that_join() -> None:
    deployment = Deployment("m:1", MODEL, 0)
    assert len(loads(deployment, places(a=1, b=1))) == 2
    assert [load.node_id for load in loads(deployment, places(a=1, b=1, c=1), 0.5)] == ["c"]


def test_a_model_that_cannot_be_loaded_fails_the_deployment_once_two_nodes_say_so() -> None:
    deployment = Deployment("m:1", MODEL, 1)
    for node_id in "ab":
        assert not deployment.failed
        (load,) = loads(deployment, places(a=2, b=1, c=0.5))
        assert load.node_id == node_id
        deployment.lost(load.replica_id, BROKEN, 0.0)
    assert deployment.failed
    assert deployment.error == BROKEN
    assert loads(deployment, places(a=1, b=1, c=1), 100.0) == []


def test_a_model_that_the_only_node_cannot_load_fails_the_deployment_at_once() -> None:
    deployment = Deployment("m:1", MODEL, 1)
    (load,) = loads(deployment, places(a=1))
    deployment.lost(load.replica_id, BROKEN, 0.0)
    assert loads(deployment, places(a=1)) == []
    assert deployment.failed


def test_one_node_that_is_broken_itself_keeps_no_model_from_the_others() -> None:
    deployment = Deployment("m:1", MODEL, 1)
    (load,) = loads(deployment, places(a=2, b=1))
    deployment.lost(load.replica_id, BROKEN, 0.0)
    (load,) = loads(deployment, places(a=2, b=1))
    assert deployment.loaded(load.replica_id, SIGNATURE)
    assert not deployment.failing
    assert deployment.error is None
    assert deployment.complete(places(a=2, b=1))
    deployment.node_lost("b")
    (again,) = loads(deployment, places(a=2), 1000.0)
    assert again.node_id == "a", "what was ready once is not given up"


def test_a_node_that_cannot_load_what_another_has_ready_spoils_nothing() -> None:
    deployment = Deployment("m:1", MODEL, wanted=0)
    first, second = loads(deployment, places(a=2, b=1))
    assert deployment.loaded(first.replica_id, SIGNATURE)
    deployment.lost(second.replica_id, BROKEN, 0.0)
    assert not deployment.failing
    assert deployment.refused == {second.node_id: BROKEN}
    assert deployment.state(places(a=2, b=1)) == "ready", "one on every node that can have it"


def test_what_was_ready_once_is_tried_again_also_on_a_node_that_could_not_load_it() -> None:
    deployment = Deployment("m:1", MODEL, wanted=2)
    first, second = loads(deployment, places(a=2, b=1))
    for load in (first, second):
        assert deployment.loaded(load.replica_id, SIGNATURE)
    deployment.node_lost("b")
    (load,) = loads(deployment, places(a=2, b=1), 1.0)
    deployment.lost(load.replica_id, BROKEN, 1.0)
    assert loads(deployment, places(a=2, b=1), 500.0) == []
    deployment.node_lost("a")
    assert [one.node_id for one in loads(deployment, places(b=1), 1000.0)] == ["b"]


def test_nodes_that_do_not_allow_the_code_are_left_out() -> None:
    refusal = ErrorInfo(code="code_not_allowed", message="own layer")
    deployment = Deployment("m:1", MODEL, wanted=0)
    where = places(a=1, b=2)
    first, second = loads(deployment, where)
    assert deployment.lost(first.replica_id, refusal, 0)
    assert deployment.loaded(second.replica_id, SIGNATURE)
    assert not loads(deployment, where, now=1000)
    assert deployment.complete(where)
    alone = Deployment("m:1", MODEL, wanted=1)
    (only,) = loads(alone, places(a=1))
    assert alone.lost(only.replica_id, refusal, 0)
    assert not loads(alone, places(a=1), now=1000)
    assert alone.failed
    assert alone.error == refusal


def test_a_node_that_fails_rests_and_others_are_tried() -> None:
    deployment = Deployment("m:1", MODEL, 1)
    tried = []
    for _ in range(2):
        (load,) = loads(deployment, places(a=9, b=1))
        tried.append(load.node_id)
        deployment.lost(load.replica_id, DIED, 0.0)
    assert tried == ["a", "b"]
    assert loads(deployment, places(a=9, b=1), 1.0) == []
    assert [load.node_id for load in loads(deployment, places(a=9, b=1), 60.0)] == ["a"]


def test_what_another_model_ended_is_loaded_again_at_once() -> None:
    deployment = Deployment("m:1", MODEL, 1)
    (load,) = loads(deployment, places(a=1))
    deployment.loaded(load.replica_id, SIGNATURE)
    deployment.lost(load.replica_id, DIED, 10.0)
    assert deployment.error is None
    (again,) = loads(deployment, places(a=1), 10.0)
    assert again.node_id == "a"


def test_one_of_which_three_engines_die_is_left_alone_for_an_hour_wherever_they_were() -> None:
    deployment = Deployment("m:1", MODEL, 1)
    where = places(a=4, b=3, c=2, d=1)
    for number, node in enumerate("abc"):
        now = 60.0 * number
        (load,) = loads(deployment, [place for place in where if place.node_id == node], now)
        deployment.loaded(load.replica_id, SIGNATURE)
        assert not deployment.failing
        deployment.lost(load.replica_id, CRASHED, now)
    assert deployment.failing
    assert not deployment.failed  # it was ready once, so it stays deployed
    assert deployment.error is not None
    assert "3 times within an hour" in deployment.error.message
    assert "node c: took more than 60 s" in deployment.error.message
    assert loads(deployment, where, 3000.0) == []
    assert not deployment.adopt("m:1/d/9", "d", where)
    (load,) = loads(deployment, where, 3700.0)
    deployment.loaded(load.replica_id, SIGNATURE)
    assert deployment.state(where) == "ready"
    assert deployment.error is None


def test_crashes_far_apart_end_nothing() -> None:
    deployment = Deployment("m:1", MODEL, 1)
    for day in range(10):
        (load,) = loads(deployment, places(a=1), 86400.0 * day)
        deployment.loaded(load.replica_id, SIGNATURE)
        deployment.lost(load.replica_id, CRASHED, 86400.0 * day + 1)
        assert not deployment.failing


def test_a_node_without_the_memory_is_tried_twice() -> None:
    deployment = Deployment("m:1", MODEL, 1)
    for number in range(2):
        (load,) = loads(deployment, places(a=1), 100.0 * number)
        deployment.lost(load.replica_id, SHORT, 100.0 * number)
    assert loads(deployment, places(a=1), 1000.0) == []
    assert deployment.failing
    assert deployment.error == SHORT


def test_fewer_wanted_takes_away_those_that_are_not_ready_first() -> None:
    deployment = Deployment("m:1", MODEL, 2)
    one, two = loads(deployment, places(a=2, b=1))
    deployment.loaded(two.replica_id, SIGNATURE)
    deployment.wanted = 1
    commands = deployment.plan(places(a=2, b=1), {}, 0.5, 1.0)
    assert [command for command in commands if isinstance(command, Unload)] == [Unload(one.replica_id, "a")]


def test_one_that_was_ready_once_is_never_given_up() -> None:
    deployment = Deployment("m:1", MODEL, 1)
    (first,) = loads(deployment, places(a=1))
    deployment.loaded(first.replica_id, SIGNATURE)
    deployment.node_lost("a")
    now = 0.0
    for number in range(10):
        now += 100.0
        (load,) = loads(deployment, places(b=1), now)
        deployment.lost(load.replica_id, BROKEN if number % 2 else DIED, now)
        assert not deployment.failed
        assert max(deployment.resting.values()) <= now + 20
    assert deployment.failing
    (load,) = loads(deployment, places(b=1), now + 100)
    assert deployment.loaded(load.replica_id, SIGNATURE)
    assert not deployment.failing


def test_on_every_node_takes_nothing_from_others_when_one_is_silent_for_a_moment() -> None:
    deployment = Deployment("m:1", MODEL, 0)
    for load in loads(deployment, places(a=1, b=1, c=1)):
        deployment.loaded(load.replica_id, SIGNATURE)
    assert deployment.plan(places(a=1, b=1), {}, 1.0, 1.0) == []
    assert len(deployment.ready) == 3
    deployment.node_lost("c")
    assert deployment.complete(places(a=1, b=1))


def test_what_a_node_holds_is_adopted_where_it_is_missed() -> None:
    deployment = Deployment("m:1", MODEL, 1)
    where = places(a=1, b=1)
    assert deployment.adopt("m:1/b/7", "b", where)
    assert [load.replica_id for load in loads(deployment, where)] == ["m:1/b/7"]  # sent again, and confirmed at once
    assert deployment.adopt("m:1/b/7", "b", where)
    assert not deployment.adopt("m:1/b/7", "a", where)
    assert not deployment.adopt("m:1/a/1", "a", where)  # one is enough
    deployment.wanted = 2
    assert not deployment.adopt("m:1/b/8", "b", where)  # and one per node


def test_what_a_node_holds_takes_the_place_of_what_is_still_to_be_loaded() -> None:
    deployment = Deployment("m:1", MODEL, 2)
    where = places(a=1, b=1, c=1)
    assert deployment.adopt("m:1/a/7", "a", where)
    [_, load] = loads(deployment, where)  # before the third node was heard of again
    assert load.node_id == "b"
    assert deployment.adopt("m:1/c/8", "c", where)
    unloads = [command for command in deployment.plan(where, {}, 0.0, 1.0) if isinstance(command, Unload)]
    assert [command.replica_id for command in unloads] == [load.replica_id]
    assert sorted(deployment.replicas) == ["m:1/a/7", "m:1/c/8"]
    deployment.check_invariants()


def test_a_node_that_was_asked_too_early_keeps_what_it_holds() -> None:
    deployment = Deployment("m:1", MODEL, 1)
    [load] = loads(deployment, places(a=1))  # before it reported its replicas
    assert deployment.adopt("m:1/a/7", "a", places(a=1))
    assert not deployment.adopt(load.replica_id, "a", places(a=1))
    assert list(deployment.replicas) == ["m:1/a/7"]


class Life(RuleBasedStateMachine):
    """Nodes come and go, loads succeed, fail and are lost."""

    def __init__(self) -> None:
        super().__init__()
        self.deployment = Deployment("m:1", MODEL, 2)
        self.nodes: dict[str, float] = {"a": 1.0}
        self.now = 0.0

    @rule(name=st.sampled_from("abcd"))
    def join(self, name: str) -> None:
        self.nodes[name] = 1.0

    @rule(name=st.sampled_from("abcd"))
    def leave(self, name: str) -> None:
        if self.nodes.pop(name, None):
            self.deployment.node_lost(name)

    @rule(seconds=st.floats(0, 30))
    def plan(self, seconds: float) -> None:
        self.now += seconds
        for command in self.deployment.plan(places(**self.nodes), {}, self.now, 1.0):
            assert isinstance(command, Unload) or command.node_id in self.nodes

    @precondition(lambda self: self.deployment.replicas)
    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        self.deployment.loaded(data.draw(st.sampled_from(sorted(self.deployment.replicas))), SIGNATURE)

    @precondition(lambda self: self.deployment.replicas)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        self.deployment.lost(data.draw(st.sampled_from(sorted(self.deployment.replicas))), DIED, self.now)

    @rule(name=st.sampled_from("abcd"), number=st.integers(1, 3))
    def hold(self, name: str, number: int) -> None:
        if name in self.nodes:
            self.deployment.adopt(f"m:1/{name}/{number}", name, places(**self.nodes))

    @rule(wanted=st.integers(0, 4))
    def ask(self, wanted: int) -> None:
        self.deployment.wanted, self.deployment.failures = wanted, 0

    @invariant()
    def holds(self) -> None:
        self.deployment.check_invariants()
        assert self.deployment.failures <= FAILURES_LIMIT
        assert all(replica.node_id in self.nodes for replica in self.deployment.replicas.values())


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
