"""All fast lanes: the engine's other face. Threads take turns to lead; the leader answers what RAM has, for all clients.

Why not a thread a client: eight of them that answer 20 us of Python each hand the interpreter lock to each other at every
bell, and together answer a fifth of what one does (ADR 0031). So:
- One thread leads: it looks at the counters of all lanes, one request of each in turn, and answers small fetches from RAM
  at once. Only that: no disk, no large copy, no wait for a range on loan.
- Before any other call it passes the lead on, and makes the call itself: no call waits for a thread to wake, and nobody
  waits for a slow call. There are as many threads as lanes, so there is one to lead unless every lane is busy.
- A lane is served by one thread at a time, in order: the one that makes its slow call, else the leader.

The same `Calls` and the same refusals as over gRPC. What a hostile client can do to its own lane is in lane.py; here it
gets one request a turn like the others.
"""

from __future__ import annotations

import threading

from hga_kvd_proto import lane as layout
from structlog.typing import FilteringBoundLogger

from hga_kvd.calls import Calls, Range
from hga_kvd.errors import InvalidRequest
from hga_kvd.lane import Lane, LaneBroken, Request
from hga_kvd.leading import Wait
from hga_kvd.refusals import refusal

_NAMES = {layout.FETCH: "Fetch", layout.APPEND: "Append", layout.PREFETCH: "Prefetch"}


class Lanes:
    def __init__(self, calls: Calls, lanes_max: int, log: FilteringBoundLogger) -> None:
        self._calls = calls
        self._lanes_max = lanes_max
        self._log = log
        self._lead = threading.Lock()  # who holds it leads
        self._lock = threading.Lock()  # over the lanes and the threads
        self._lanes: tuple[Lane, ...] = ()  # those that are not closed; replaced as a whole
        self._threads: set[threading.Thread] = set()
        self._shut = False
        self._wait = Wait()
        self._changed = False  # a lane ends, or there is a thread too many

    def __len__(self) -> int:
        return len(self._lanes)

    def open(self, client_id: int) -> tuple[int, ...]:
        """A lane for this client; its descriptors (memory, request bell, completion bell), which the caller must close.

        Empty where there can be none: the client goes on over gRPC.
        """
        if not layout.supported():
            return ()
        with self._lock:
            if self._shut or len(self._lanes) >= self._lanes_max:
                return ()
            thread = threading.Thread(target=self._work, name="lane", daemon=True)
            self._threads.add(thread)
            try:
                thread.start()  # and leaves again if it gets no lane
                lane = Lane(client_id)
            except (OSError, RuntimeError) as error:  # the latter: no more threads
                if thread.ident is None:
                    self._threads.discard(thread)
                self._rouse()
                self._log.warning("no lane", error=str(error))
                return ()
            self._wait.add(lane)
            self._lanes += (lane,)
        return lane.descriptors

    def end(self, client_id: int) -> None:
        """The client is gone: the call under way ends, nothing behind it is begun."""
        for lane in self._lanes:
            if lane.client_id == client_id:
                lane.ending = True
        self._rouse()

    def shutdown(self, grace_s: float) -> None:
        """Takes no new requests, and gives the calls in flight `grace_s`."""
        with self._lock:
            self._shut = True
            threads = list(self._threads)
        for lane in self._lanes:
            lane.ending = True
        self._rouse()
        for thread in threads:
            thread.join(grace_s)

    def _rouse(self) -> None:
        self._changed = True
        self._wait.rouse()

    # --- threads ---

    def _work(self) -> None:
        while True:
            with self._lead:
                try:
                    found = self._find_slow()
                except Exception:  # a fault of ours; clients go on over gRPC
                    self._log.exception("fault", call="lanes")
                    for lane in self._lanes:
                        lane.ending = True
                    continue
            if found is None:
                return
            lane, request = found
            self._call(lane, request)
            with self._lock:  # which orders memory too: who posts from here on is heard by who leads, or seen below
                lane.busy = False
            if (lane.posted_word[0] != lane.served or lane.ending) and self._lead.locked():
                self._rouse()

    def _find_slow(self) -> tuple[Lane, Request] | None:
        """Leads. Returns a request that may take long, its lane marked busy; None: this thread is one too many."""
        self._changed = True
        while True:
            if self._changed:
                self._changed = False
                for ended in [lane for lane in self._lanes if lane.ending and not lane.busy]:
                    self._close(ended)
                if len(self._threads) > len(self._lanes) and self._leave():
                    return None
            lane = self._wait.next(self._lanes)
            if lane is None or lane.ending:
                continue
            request = self._take(lane)
            if request is not None and not self._answer_few(lane, request):
                lane.busy = True
                return lane, request

    def _leave(self) -> bool:
        with self._lock:
            one_too_many = len(self._threads) > len(self._lanes)
            if one_too_many:
                self._threads.discard(threading.current_thread())
        return one_too_many

    def _close(self, lane: Lane) -> None:
        with self._lock:
            self._lanes = tuple(other for other in self._lanes if other is not lane)
        self._wait.remove(lane)
        lane.close()

    # --- calls ---

    def _take(self, lane: Lane) -> Request | None:
        """The lane's next request; None: it could not be, which is answered."""
        try:
            return lane.take()
        except LaneBroken as error:
            self._log.warning("lane ended", reason="a counter that cannot be", counters=str(error))
            lane.ending = self._changed = True
        except InvalidRequest as error:
            self._refuse(lane, error, "lane request")
        return None

    def _answer_few(self, lane: Lane, request: Request) -> bool:
        """Answers a small fetch if RAM has all of it. False: nothing was done."""
        if request.verb != layout.FETCH:
            return False
        place = Range(lane.client_id, request.offset, request.size)
        try:
            count = self._calls.fetch_few(request.session_id, request.body, place, request.epoch)
        except Exception:
            self._log.exception("fault", call="fetch_few")
            return False
        if count:
            lane.answer(ram_records=count)
        return count > 0

    def _call(self, lane: Lane, request: Request) -> None:
        verb, session_id, epoch, offset, size, first_chunk, chunk_count, deadline_us, body = request
        place = Range(lane.client_id, offset, size)
        try:
            if verb == layout.FETCH:
                fetched = self._calls.fetch(session_id, body, place, lane.wanted, epoch, deadline_us)
                statuses = b"" if fetched.statuses is None else fetched.statuses.tobytes()
                lane.answer(body=statuses, ram_records=fetched.ram_records, nvme_records=fetched.nvme_records)
            elif verb == layout.APPEND:
                count = self._calls.append(session_id, first_chunk, chunk_count, body, place, lane.wanted, epoch)
                lane.answer(chunk_count=count)
            elif verb == layout.PREFETCH:
                self._calls.prefetch(session_id, body, epoch)
                lane.answer()
            else:
                raise InvalidRequest(f"lane request of verb {verb}: this daemon knows {sorted(_NAMES)}")
        except Exception as error:
            self._refuse(lane, error, _NAMES.get(verb, f"lane verb {verb}"))

    def _refuse(self, lane: Lane, error: Exception, call: str) -> None:
        answer = refusal(error, call, "lane", self._log)
        lane.answer(answer.code.value[0], f"{answer.meaning}\0{answer.sentence}".encode(errors="replace"))
