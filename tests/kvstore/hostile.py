"""A client of the fast lane that does whatever a process can do with what it was given. test_lane.py runs it.

    python hostile.py SOCKET SESSION SEED SECONDS

It has a region, a lane and two bells, over and over: noise in all of them, also in the counters, headers that are half
true, descriptors sent where tokens belong, files cut short, all of it while its requests are answered. Prints how many
lanes it had.
"""

import contextlib
import mmap
import os
import socket
import sys
import time
from pathlib import Path

import grpc
import numpy as np
from hga_kvd_proto import lane as layout
from hga_kvd_proto.v1 import kvd_pb2, kvd_pb2_grpc

REGION_BYTES = 1 << 20
VALUES = (0, 1, 2, 7, 8, 9, 63, 64, 65, 4096, REGION_BYTES, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1)


class Hostile:
    def __init__(self, path, session_id, seed):
        self.path, self.session_id = Path(path), session_id
        self.chance = np.random.default_rng(seed)
        self.stub = kvd_pb2_grpc.KvdStub(grpc.insecure_channel(f"unix:{path}"))

    def number(self):
        near = int(self.chance.integers(0, 3)) - 1
        return (VALUES[self.chance.integers(len(VALUES))] + near) % (1 << 64)

    def attached(self):
        """(socket, descriptors) of a new region and lane; while the daemon still has too many of ours, asks again."""
        answer = self.stub.Attach(kvd_pb2.AttachRequest(region_bytes=REGION_BYTES, lane=True))
        peer = socket.socket(socket.AF_UNIX)
        peer.connect(str(self.path.parent / answer.handover_socket))
        peer.sendall(answer.token)
        return peer, socket.recv_fds(peer, 1, 8)[1]

    def request(self, lane, posted):
        """A slot with a header of which each field is right or wrong by chance."""
        at = layout.request_at(posted)
        body = self.chance.integers(0, 4, 64).astype("<u2").tobytes()
        fields = [posted, int(self.chance.integers(1, 4)), 64, self.session_id, 0, 0, 64 * 256, 0, 1, 0]
        wrong = self.chance.random(len(fields)) < 0.15
        fields = [self.number() if bad else good for bad, good in zip(wrong, fields, strict=True)]
        fields = [value % (1 << 32) if place in (1, 2, 8, 9) else value for place, value in enumerate(fields)]
        lane[at : at + layout.HEADER_BYTES] = layout.REQUEST.pack(*fields).ljust(layout.HEADER_BYTES, b"\0")
        lane[at + layout.HEADER_BYTES : at + layout.HEADER_BYTES + len(body)] = body

    def harm(self, region, lane, bells):
        """One of many things, at a place of its own choice."""
        words = np.frombuffer(lane, "<u8")
        match self.chance.integers(0, 8):
            case 0:
                words[self.chance.choice([32, 48])] = self.number()  # who is awake
            case 1:
                words[16] = self.number()  # what the daemon has completed
            case 2 if self.chance.random() < 0.2:
                words[0] = self.number()  # what was posted: this ends the lane
            case 3:
                start = int(self.chance.integers(4096, len(lane) - 4096))
                lane[start : start + 4096] = self.chance.bytes(4096)
            case 4:
                region[: 64 * 256] = self.chance.bytes(64 * 256)
            case 5:
                with contextlib.suppress(OSError):
                    os.eventfd_write(bells[0], int(self.chance.integers(1, 1 << 62)))
            case 6:
                os.set_blocking(bells[1], True)
            case 7:
                with contextlib.suppress(OSError):
                    os.read(bells[0], 8)  # a stolen ring

    def life(self, end):
        """Of one lane."""
        peer, descriptors = self.attached()
        for descriptor in descriptors[:2]:
            for size in (0, 4096, 1 << 30):
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, size)
                    raise AssertionError("a sealed file was given another size")
        region, lane = mmap.mmap(descriptors[0], REGION_BYTES), mmap.mmap(descriptors[1], layout.LANE_BYTES)
        for posted in range(1, int(self.chance.integers(2, 400))):
            self.request(lane, posted - 1)
            lane[:8] = posted.to_bytes(8, "little")
            with contextlib.suppress(BlockingIOError):  # it has rung
                os.eventfd_write(descriptors[2], 1)
            for _ in range(self.chance.integers(0, 4)):
                self.harm(region, lane, descriptors[2:])
            completed = int.from_bytes(lane[128:136], "little")
            if completed == layout.CLOSED or time.monotonic() > end:
                break
            while posted - completed >= layout.SLOT_COUNT and time.monotonic() < end:
                completed = int.from_bytes(lane[128:136], "little")
                if self.chance.random() < 0.01:
                    break
        if self.chance.random() < 0.5:
            with contextlib.suppress(OSError):
                socket.send_fds(peer, [self.chance.bytes(5)], list(descriptors))
        for descriptor in descriptors:
            os.close(descriptor)
        peer.close()


def main():
    path, session_id, seed, seconds = sys.argv[1:]
    hostile, lanes = Hostile(path, int(session_id), int(seed)), 0
    end = time.monotonic() + float(seconds)
    while time.monotonic() < end:
        try:
            hostile.life(end)
            lanes += 1
        except (OSError, grpc.RpcError, ValueError):  # too many clients at once, a lane without descriptors: again
            time.sleep(0.001)
    print(lanes)


if __name__ == "__main__":
    main()
