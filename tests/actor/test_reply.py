"""A Reply: a future that makes its condition when somebody asks for it, and tells everybody who comes meanwhile."""

from __future__ import annotations

import threading
from concurrent.futures import Future, wait

import pytest

import atomr_accel_flashattn as fa
from atomr_accel_flashattn.actor import Job, Reply
from atomr_accel_flashattn.actor.reply import Ticket
from tests.actor.devices import PATIENCE, until
from tests.actor.fake_gpu import sent


def test_a_reply_has_all_that_a_future_has_and_makes_it_when_it_is_asked_for():
    reply = Reply()
    assert set(vars(Future())) <= set(dir(Reply))
    assert reply._made is None
    reply.begin_unseen()
    output, settled = fa.Output(None), []
    assert reply.answer_quietly(output, settled.append, Ticket(Job(sent()), reply))
    assert len(settled) == 1
    assert reply.result() == output
    assert reply._made is None
    assert (reply.exception(), reply.done(), reply.cancelled(), reply.running()) == (None, True, False, False)


@pytest.mark.parametrize("way", ["callback", "wait", "result"])
def test_who_comes_while_a_reply_is_answered_is_told(way: str):
    reply, told = Reply(), []
    listen = {
        "callback": lambda: reply.add_done_callback(told.append),
        "wait": lambda: told.extend(wait([reply], PATIENCE).done),
        "result": lambda: told.append(reply) if reply.result(PATIENCE) else None,
    }[way]
    listener = threading.Thread(target=listen)

    def settle(_: Ticket) -> None:
        if listener.ident is None:
            listener.start()
            listener.join(0.05)  # time enough to get in between

    reply.begin_unseen()
    if not reply.answer_quietly(fa.Output(None), settle, Ticket(Job(sent()), reply)):
        reply.answer(fa.Output(None))
    listener.join(PATIENCE)
    assert told == [reply]


def test_waiters_of_concurrent_futures_are_left_to_the_completion_thread():
    reply, settled = Reply(), []
    reply.begin_unseen()
    reply._condition  # noqa: B018 - makes the list
    list.append(reply._waiters, object())
    assert not reply.answer_quietly(fa.Output(None), settled.append, Ticket(Job(sent()), reply))
    assert (settled, reply.is_over()) == ([], False)


def test_a_signal_handler_that_listens_while_its_thread_answers_is_told():
    reply, told = Reply(), []

    def settle(_: Ticket) -> None:
        if reply._made is None:
            reply.add_done_callback(told.append)

    reply.begin_unseen()
    assert not reply.answer_quietly(fa.Output(None), settle, Ticket(Job(sent()), reply))
    reply.answer(fa.Output(None))
    assert told == [reply]


def test_a_signal_handler_that_looks_while_its_thread_answers_leaves_no_sleeper():
    reply, found = Reply(), []
    sleeper = threading.Thread(target=lambda: found.append(reply.result(PATIENCE)))

    def settle(_: Ticket) -> None:
        if sleeper.ident is None:
            assert reply.running()
            sleeper.start()
            until(lambda: reply._condition._waiters)

    reply.begin_unseen()
    assert reply.answer_quietly(fa.Output(None), settle, Ticket(Job(sent()), reply))
    sleeper.join(PATIENCE / 2)
    assert len(found) == 1
