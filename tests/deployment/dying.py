"""`python dying.py FOLDER MOMENT,MOMENT... COMMAND...`: fedpeft, with a SIGKILL at each of these moments, once each.

A moment is PLACE:ROUND. "slow-PLACE:ROUND" is no death but twelve seconds, "full-PLACE:ROUND" a disk without room. That it
has come is noted in FOLDER before, so that the process that is started next lives through it.
"""

import errno
import os
import pathlib
import signal
import sys
import time

folder, moments, command = pathlib.Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:]


def die(place, round):
    moment = f"{place}:{round}"
    flag = folder / f"died-{moment.replace(':', '-')}"
    if moment in moments and not flag.exists():
        flag.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)


def once(kind, place, round):
    """Whether a moment of another kind has come, for the first time."""
    flag = folder / f"{kind}-{place}-{round}"
    if f"{kind}-{place}:{round}" not in moments or flag.exists():
        return False
    flag.write_text("")
    return True


def client():
    from fedpeft import flower_fleet, wire
    from fedpeft.training import one

    if "HEARTBEAT_SECONDS" in os.environ:
        flower_fleet.HEARTBEAT_SECONDS = float(os.environ["HEARTBEAT_SECONDS"])
    train, send, call, receive = one.train, flower_fleet.Fleet.send, flower_fleet.Fleet._call, flower_fleet.Fleet.receive
    sending = []

    def dying_train(adapted, task, config, jobs):
        for job in jobs:
            die("training", job.round)
            if once("slow", "training", job.round):
                time.sleep(12)
        return train(adapted, task, config, jobs)

    def dying_send(self, reply):
        answer, _ = wire.message_to_answer(reply)
        die("before-sending", answer.round)
        sending[:] = [answer.round]
        send(self, reply)
        die("after-sending", answer.round)

    def dying_call(self, method, request):
        if method == "PushObject" and sending:
            die("uploading", sending[0])
        return call(self, method, request)

    def dying_receive(self):
        message = receive(self)
        if message is not None:
            die("receiving", wire.message_to_assignment(message)[0].round)
        return message

    one.train, flower_fleet.Fleet.send, flower_fleet.Fleet._call = dying_train, dying_send, dying_call
    flower_fleet.Fleet.receive = dying_receive


def server():
    from fedpeft import durable
    from fedpeft.server import checkpoint, rounds
    from fedpeft.server.exchange import Exchange
    from fedpeft.strategies.strategy import Strategy

    look, write, apply, wait = Exchange._look, durable.write, Strategy.apply, rounds._wait_for
    now = [0]

    def dying_look(self, ends):
        now[0] = self.assignments[0].round
        die("asking", now[0])
        look(self, ends)

    def dying_apply(self, *arguments):
        die("aggregating", now[0])
        return apply(self, *arguments)

    def dying_write(path, data):
        if path.name == "strategy.safetensors" and path.parent.name == f".round-{now[0]:05d}.new":
            path.write_bytes(data[: len(data) // 2])
            die("checkpoint", now[0])
            if once("full", "checkpoint", now[0]):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, data)

    def dying_wait(federation):
        die("waiting", now[0] + 1)
        return wait(federation)

    Exchange._look, durable.write, Strategy.apply, rounds._wait_for = dying_look, dying_write, dying_apply, dying_wait
    checkpoint.durable.write = dying_write


{"client": client, "server": server}[command[0]]()

from fedpeft.cli import main  # noqa: E402

raise SystemExit(main(command))
