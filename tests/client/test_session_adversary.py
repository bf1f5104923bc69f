"""A session that is cut short between two layers goes on as if nothing had been, through the real daemon: no room, another
process of the same name, a daemon that was replaced, an exception anywhere. Nothing is wrong or lost silently."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hga_kvd_client import Session, SessionOptions, connect, errors
from sequences import GEOMETRY, LAYERS, ROPE, SCALE, Tokens, blocks

OPTIONS = SessionOptions(
    router="sketch", sketch_groups=3, sketch_basis_tokens=256, sink_chunks=1, recent_chunks=2, bank_groups=8,
    flush_chunks=2, prefill_tile_chunks=3,
)  # fmt: skip
PROMPT = 640


def prompted(client, name: str | None, tokens: Tokens) -> Session:
    session = client.open(name, GEOMETRY, ROPE, OPTIONS)
    for first, end in blocks([320], PROMPT):
        tokens.run(session, first, end)
    return session


def steps(session: Session, tokens: Tokens, first: int, end: int) -> torch.Tensor:
    return torch.stack([tokens.run(session, at, at + 1) for at in range(first, end)])


def step_with(session: Session, tokens: Tokens, at: int, layer: int, between: Callable[[], None]) -> torch.Tensor:
    """One token, with something happening between append and attention of a layer."""
    session.note_tokens(tokens.ids[at : at + 1])
    outs = []
    for each in range(LAYERS):
        session.append(each, tokens.k[each, :, at : at + 1], tokens.v[each, :, at : at + 1])
        if each == layer:
            between()
        outs.append(session.attend(each, tokens.q[each, :, at : at + 1], SCALE))
    return torch.stack(outs)


@pytest.fixture(scope="module")
def running_on(module_daemon):
    """One that nothing happens to."""
    return module_daemon()


@pytest.fixture(scope="module")
def undisturbed(running_on):
    tokens = Tokens(PROMPT + 80)
    with connect(running_on.target) as client, prompted(client, None, tokens) as session:
        return steps(session, tokens, PROMPT, PROMPT + 80)


@pytest.mark.parametrize("layer", [0, LAYERS - 1])
def test_a_daemon_that_is_killed_between_layers(daemon, undisturbed, layer):
    running, tokens = daemon(), Tokens(PROMPT + 80)
    with connect(running.target) as client:
        session = prompted(client, "s", tokens)
        outs = [steps(session, tokens, PROMPT, PROMPT + 3)]
        session.flush()

        def replaced() -> None:
            running.kill()
            running.start()

        outs.append(step_with(session, tokens, PROMPT + 3, layer, replaced)[None])
        outs.append(steps(session, tokens, PROMPT + 4, PROMPT + 80))
        assert session.stats.recoveries == 1
        torch.testing.assert_close(torch.cat(outs), undisturbed, atol=1e-5, rtol=1e-5)
        session.close()


class Cut(Exception):
    pass


# Each call that a step makes, cut before the daemon hears of it and after it has answered.
@pytest.mark.parametrize("call", ["fetch", "append", "put_summaries", "flush"])
@pytest.mark.parametrize("answered", [False, True])
def test_an_exception_in_any_call_of_a_step(running_on, undisturbed, monkeypatch, call, answered):
    tokens = Tokens(PROMPT + 80)
    with connect(running_on.target) as client:
        session = prompted(client, "s", tokens)
        connection = session._stored.connection
        real, left = getattr(connection, call), [3 if call == "fetch" else 1]

        def cut(*args, **named):
            left[0] -= 1
            if left[0]:
                return real(*args, **named)
            if answered:
                real(*args, **named)
            raise Cut

        monkeypatch.setattr(connection, call, cut)
        outs, failed = [], 0
        for at in range(PROMPT, PROMPT + 80):
            while True:
                try:
                    outs.append(tokens.run(session, at, at + 1))
                    break
                except Cut:
                    failed += 1
                    session.truncate(at)
        assert failed == 1
        assert session.tokens == PROMPT + 80
        torch.testing.assert_close(torch.stack(outs), undisturbed, atol=1e-5, rtol=1e-5)
        session.flush()
        stored = session.token_ids()
        assert np.array_equal(stored, tokens.ids[: len(stored)])
        other = client.open("s", GEOMETRY, ROPE, OPTIONS)
        assert other.tokens == (PROMPT + 79) // 64 * 64
        other.delete()


def test_an_append_that_was_taken_unheard_and_a_daemon_replaced(daemon, undisturbed, monkeypatch):
    """The daemon has more chunks than the session ever heard of, and they are durable."""
    running, tokens = daemon(), Tokens(PROMPT + 80)
    with connect(running.target) as client:
        session = prompted(client, "s", tokens)
        connection = session._stored.connection
        real = connection.append

        def cut(*args, **named):
            monkeypatch.undo()
            real(*args, **named)
            connection.flush(session._stored._session_id)
            running.kill()
            running.start()
            raise Cut

        monkeypatch.setattr(connection, "append", cut)
        with pytest.raises(Cut):
            steps(session, tokens, PROMPT, PROMPT + 80)
        first = session.tokens
        session.truncate(first)
        outs = steps(session, tokens, first, PROMPT + 80)
        torch.testing.assert_close(outs, undisturbed[first - PROMPT :], atol=1e-5, rtol=1e-5)
        session.close()


def test_no_room_is_refused_before_a_block_and_decoding_goes_on_when_there_is(daemon, undisturbed):
    tokens = Tokens(PROMPT + 80)
    chunk_bytes = GEOMETRY.chunk_bytes
    with connect(daemon("--ram", str(24 * chunk_bytes), nvme=False).target, region_bytes=1 << 20) as client:
        session = prompted(client, None, tokens)
        fillers = []

        def fill() -> None:
            for seed in range(1, 40):
                fillers.append(client.open(None, GEOMETRY, ROPE, OPTIONS))
                other = Tokens(129, seed)
                other.run(fillers[-1], 0, 128)
                other.run(fillers[-1], 128, 129)

        with pytest.raises((errors.StorageFull, errors.LimitExceeded)):
            fill()
        outs, refused = [], 0
        for at in range(PROMPT, PROMPT + 80):
            while True:
                try:
                    outs.append(tokens.run(session, at, at + 1))
                    break
                except (errors.StorageFull, errors.LimitExceeded):
                    assert session.tokens == at
                    refused += 1
                    if refused == 3:  # nothing changed by asking again
                        for filler in fillers:
                            with contextlib.suppress(errors.KvdError):
                                filler.delete()
        assert refused == 3
        torch.testing.assert_close(torch.stack(outs), undisturbed, atol=1e-5, rtol=1e-5)


def test_two_processes_of_one_name(running_on, undisturbed):
    """Who appends second is refused in a sentence, and takes nothing back of what the first has stored."""
    running, tokens, others = running_on, Tokens(PROMPT + 80), Tokens(PROMPT + 80, seed=5)
    with connect(running.target) as client, connect(running.target) as second_client:
        first = prompted(client, "s", tokens)
        first.flush()
        second = second_client.open("s", GEOMETRY, ROPE, OPTIONS)
        at = second.tokens
        assert at == PROMPT - 64 or at == PROMPT
        outs = [steps(first, tokens, PROMPT, PROMPT + 70)]
        for _ in range(2):  # and again, however often it is tried
            with pytest.raises(errors.AppendOutOfOrder, match="append there"):
                steps(second, others, second.tokens, PROMPT + 80)
            second.truncate(second.tokens)
        outs.append(steps(first, tokens, PROMPT + 70, PROMPT + 80))
        torch.testing.assert_close(torch.cat(outs), undisturbed, atol=1e-5, rtol=1e-5)
        first.flush()
        stored = first.token_ids()
        assert np.array_equal(stored, tokens.ids[: len(stored)])
        first.close()
